"""LVIS: COCO's photographs with masks of 1,203 categories, as closed-set questions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from regiongpt.data.convert.base import option
from regiongpt.data.convert.coco import InstancesConverter


@dataclass(frozen=True, kw_only=True)
class LvisConverter(InstancesConverter):
    """LVIS v0.5 or v1. Its images are COCO's of 2017: ``images`` is the folder with ``train2017`` and ``val2017``."""

    name: ClassVar[str] = "lvis"
    summary: ClassVar[str] = "LVIS: the class of boxes or masks among its long list of names"

    label_set: str = option("name of the closed set, as the question shall name it", default="LVIS")

    def image_name(self, entry: Mapping[str, Any]) -> Any:
        """The folder and file that end the address; the file name, where there is one, is that of another split."""
        url = entry.get("coco_url")
        return "/".join(url.split("/")[-2:]) if isinstance(url, str) else None

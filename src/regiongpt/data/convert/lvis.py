"""LVIS: COCO's photographs with masks of 1,203 categories, as closed-set questions."""

from typing import ClassVar

from regiongpt.data.convert.coco import InstancesConverter
from regiongpt.data.convert.values import Words


class LvisConverter(InstancesConverter):
    """LVIS v0.5 or v1. Its images are COCO's of 2017: ``images`` is the folder with ``train2017`` and ``val2017``.

    An image's file is what its address ends in; the file name, where there is one, is that of another split.
    """

    name: ClassVar[str] = "lvis"
    summary: ClassVar[str] = "LVIS: the class of boxes or masks among its long list of names"
    url_first: ClassVar[bool] = True

    label_set: Words = "LVIS"
    """Name of the closed set, as the question shall name it."""

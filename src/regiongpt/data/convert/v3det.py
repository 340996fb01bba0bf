"""V3Det: boxes of 13,204 categories, as closed-set questions.

Paper: §4 (at most 100 boxes a category for pre-training, 10 for fine-tuning).
"""

from pathlib import Path
from typing import ClassVar

from pydantic import NonNegativeInt

from regiongpt.data.convert.coco import InstancesConverter
from regiongpt.data.convert.values import Words, short
from regiongpt.data.instances import InstancesFile
from regiongpt.errors import DataError


class V3DetConverter(InstancesConverter):
    """V3Det; ``images`` is the folder that holds its folder ``images``, with which file names begin."""

    name: ClassVar[str] = "v3det"
    summary: ClassVar[str] = "V3Det: the class of boxes among 13,204 names, balanced by category"

    label_set: Words = "V3Det"
    """Name of the closed set, as the question shall name it."""
    boxes_per_category: NonNegativeInt = 100
    """Most objects of a category, drawn by the seed: 100 to pre-train and 10 to fine-tune in the paper; 0 for all."""
    names: Path | None = None
    """category_name_13204_v3det_2023_v1.txt, to hold the names against."""

    def inputs(self) -> list[Path]:
        """The files that are given."""
        return [*self.instances, *([self.names] if self.names is not None else [])]

    def check_names(self, file: InstancesFile) -> None:
        """Raises DataError where a file's categories are not in the list of names."""
        super().check_names(file)
        if self.names is None:
            return
        try:
            lines = self.names.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"expected a list of category names at {self.names}, got {error}; check the path") from None
        listed = {" ".join(line.split()) for line in lines}
        if foreign := [name for name in file.names.values() if name not in listed]:
            raise DataError(
                f"{file.path}: expected categories of {self.names.name}, but {short(foreign[0])} and "
                f"{len(foreign) - 1} others are not in it; give two files of one release"
            )

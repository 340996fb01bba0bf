"""What the tasks share: finding files, sizes of objects, and the parts of answers."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from regiongpt.errors import DataError
from regiongpt.evaluate.task import SIZES, Answer, Item, Task


def find(given: Path | None, folder: Path, names: Iterable[str], what: str, flag: str, *, file: bool = True) -> Path:
    """The path given, or the first of the names in the folder.

    Raises:
        DataError: There is none; the message calls it ``what``, and names the option ``flag``.
    """
    tried = [given] if given is not None else [folder / name for name in names]
    for path in tried:
        if path.is_file() if file else path.is_dir():
            return path
    raise DataError(f"found no {what} at {' or '.join(map(str, tried))}; check the path, or give --{flag}")


class InstancesTask(Task):
    """A benchmark on an instances file in COCO's format."""

    wanted: ClassVar[str] = "annotations"

    split: str = "val2017"
    """Split of the annotations: instances_SPLIT.json."""
    annotations: Path | None = None
    """The annotations file, wherever it is."""
    images: Path | None = None
    """Folder of the images, wherever it is."""

    @property
    def split_read(self) -> str:
        """The split of the annotations that are looked for."""
        return self.split if self.annotations is None else ""

    @property
    def file(self) -> Path:
        """The annotations."""
        names = [f"annotations/instances_{self.split}.json", f"instances_{self.split}.json", f"{self.split}.json"]
        return find(self.annotations, self.data, names, self.wanted, "annotations")

    @property
    def folder(self) -> Path:
        """The folder of the images."""
        return find(self.images, self.data, [self.split, "images", "."], "images", "images", file=False)


def given(items: Sequence[Item], answers: Mapping[str, Answer], kind: str) -> list[Any]:
    """The ``text``, ``probability``, ``scores`` or ``called`` of each item's answer; None where there is none."""
    return [getattr(answers[item.id], kind) if item.id in answers else None for item in items]


def images_of(items: Sequence[Item]) -> list[Hashable]:
    """The image of each item, as statistics take them."""
    return [item.image_id for item in items]


def box_area(box: Sequence[float]) -> float:
    """The area of an xyxy box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def size_name(area: float) -> str:
    """COCO's word for an object of an area in px^2."""
    return next(name for name, above in SIZES if area < above)

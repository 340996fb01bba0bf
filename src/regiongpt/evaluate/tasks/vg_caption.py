"""Captions of Visual Genome's regions, against what people wrote of them.

Paper: §4.2, Table 4
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from regiongpt.data.convert.jsonstream import iter_array
from regiongpt.data.convert.values import is_whole
from regiongpt.data.convert.visual_genome import VisualGenomeConverter
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError
from regiongpt.evaluate.paper import TABLES
from regiongpt.evaluate.tasks.captioning import PROTOCOL, CaptionTask, Described
from regiongpt.evaluate.tasks.scoring import find

GROUPINGS: Final = {
    "region": "each region is an item of its own, with its one phrase as the only reference",
    "box": "regions of one image with the same box are one item, with all their phrases as references",
}


class VisualGenomeCaption(CaptionTask):
    """One caption a region of the images of a split, which a file lists: papers use different ones."""

    name: ClassVar[str] = "vg_caption"
    summary: ClassVar[str] = "captions of Visual Genome's regions: METEOR and CIDEr (Table 4)"
    item_id: ClassVar[str] = "region id"
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        PROTOCOL: {
            "METEOR": TABLES["vg_caption"].figure("METEOR") / 100,
            "CIDEr": TABLES["vg_caption"].figure("CIDEr") / 100,
        }
    }
    paper_source: ClassVar[str] = "Table 4, Visual Genome; the paper names neither split nor number of regions"

    split: str = "test"
    """Split of the file of splits."""
    regions: Path | None = None
    """region_descriptions.json, wherever it is."""
    image_data: Path | None = None
    """image_data.json, wherever it is."""
    splits: Path | None = None
    """Json of image ids by split, such as densecap_splits.json; without one, all images."""
    images: Path | None = None
    """Folder with VG_100K and VG_100K_2, wherever it is."""
    grouping: Literal["region", "box"] = "region"
    """How references are grouped: each region by itself, or regions with the same box together."""

    @property
    def split_read(self) -> str:
        """Of the file of splits."""
        return self.split if self.splits is not None else ""

    def inputs(self) -> list[Path]:
        """Regions, images' sizes and splits."""
        found = [
            find(self.regions, self.data, ["region_descriptions.json"], "regions", "regions"),
            find(self.image_data, self.data, ["image_data.json"], "sizes of images", "image-data"),
        ]
        return [*found, self.splits] if self.splits is not None else found

    def pinned(self) -> dict[str, str]:
        """Split and grouping."""
        split = f"{self.split} of {self.splits.name}" if self.splits is not None else "all images of the file"
        return {"split": f"Visual Genome, {split}", "references": GROUPINGS[self.grouping]}

    def regions_described(self) -> list[Described]:
        """One a region or a box, by image and region id."""
        regions, image_data = self.inputs()[:2]
        folder = find(self.images, self.data, ["images", "."], "images", "images", file=False)
        wanted = _split_of(self.splits, self.split) if self.splits is not None else None
        reader = VisualGenomeConverter(
            images=folder, regions=regions, image_data=image_data, boxes_per_image=0, check_images=False
        )
        found: list[Described] = []
        for record in reader.records(self.left_out):
            image_id = int(record.id.rsplit("/", 1)[-1])
            if wanted is not None and image_id not in wanted:
                continue
            parts = [(record.regions[turn.regions[0] - 1], turn.answer) for turn in record.turns]
            asked: dict[Any, tuple[str, Sequence[float], list[str]]] = {}
            for region, phrase in sorted(parts, key=lambda part: int(part[0].source_id)):
                box = region.region.to_dict()["box"]
                key = region.source_id if self.grouping == "region" else tuple(box)
                asked.setdefault(key, (region.source_id, box, []))[2].append(phrase)
            found += [
                Described(number, folder / record.image, image_id, (record.width, record.height), box, phrases)
                for number, box, phrases in asked.values()
            ]
        if not found:
            raise DataError(f"{regions}: no regions of the split {self.split!r}; {self.left_out.summary()}")
        return found


def _split_of(path: Path, split: str) -> set[int]:
    """The image ids of a split.

    Raises:
        DataError: The file has no such list of ids.
    """
    rejects = Rejects()
    try:
        numbers = list(iter_array(path, split, rejects))
    except DataError as error:
        raise DataError(f"{error}; the file of splits is to have a list of image ids by split") from None
    if rejects.counts or not numbers or not all(is_whole(number) for number in numbers):
        raise DataError(f"{path}: expected a list {split!r} of image ids as whole numbers; got another form")
    return set(numbers)

"""Where images and their regions come from: an instances file in COCO's format, or a folder of records."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from regiongpt.data.instances import InstancesFile
from regiongpt.data.records import RecordRegion
from regiongpt.data.shards import CROWD, RecordSet, Rejects
from regiongpt.errors import ConfigError, DataError
from regiongpt.regions import Region


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image, by its place in the source and its path below the images' folder, with its size and its regions."""

    place: int
    name: str
    width: int
    height: int
    regions: tuple[RecordRegion, ...]


class Source:
    """All images and regions, in an order that the files alone decide; iterating makes one image at a time.

    Args:
        images: Folder of the images.
        regions: Json of COCO, LVIS, V3Det or another tool's COCO export, or a folder of records.
        crowds: Take what is marked as a crowd for an object.

    Attributes:
        rejects: What could not be used, by kind.
        count: How many regions there are.
        places: How many images, those without a region among them.

    Raises:
        ConfigError: A path does not exist.
        DataError: The regions cannot be read, or there are none.
    """

    def __init__(self, images: Path, regions: Path, crowds: bool = False) -> None:
        if not images.is_dir():
            raise ConfigError(f"--images {images}: no such folder")
        if not regions.exists():
            raise ConfigError(f"--regions {regions}: no such file or folder")
        self.images, self.path, self.rejects = images, regions, Rejects()
        self._records: RecordSet | None = None
        if regions.is_dir():
            self._records = RecordSet(regions, images)
            counts = self._records.manifest.counts
            self.count, self.places = counts.get("regions", 0), len(self._records)
        else:
            self._file = InstancesFile(
                regions, self.rejects, shapes="both", folder=images, check="missing",
                crowds="take" if crowds else "leave out",
            )  # fmt: skip
            self.count, self.places = len(self._file.ids), len(self._file.paths)
        if not self.count:
            told = f": {self.rejects.summary()}; the last: {self.rejects.last}" if self.rejects.counts else ""
            hint = "; --crowds takes what is marked as a crowd" if self.rejects.counts[CROWD] else ""
            raise DataError(f"--regions {regions}: no region that can be captioned{told}{hint}")

    def __iter__(self) -> Iterator[Item]:
        return self._of_records() if self._records is not None else self._of_instances()

    def _of_instances(self) -> Iterator[Item]:
        file = self._file
        bounds = np.searchsorted(file.places, np.arange(len(file.images) + 1)).tolist()
        for place, name in enumerate(file.paths):
            regions = []
            for k in range(bounds[place], bounds[place + 1]):
                category, identity = file.names[int(file.categories[k])], str(file.name_of(int(file.ids[k])))
                region = file.mask(k) or Region.box(*file.boxes[k].tolist(), normalized=False)
                regions.append(RecordRegion(region=region, category=category, source_id=identity))
            if regions:
                yield Item(
                    place=place, name=name, width=int(file.widths[place]), height=int(file.heights[place]),
                    regions=tuple(regions),
                )  # fmt: skip

    def _of_records(self) -> Iterator[Item]:
        assert self._records is not None
        for place, (name, records) in enumerate(groupby(self._records, key=lambda record: record.image)):
            listed = list(records)
            regions = dict.fromkeys(each for record in listed for each in record.regions)  # a record may repeat one
            if name and regions:
                yield Item(
                    place=place, name=name, width=listed[0].width, height=listed[0].height, regions=tuple(regions)
                )

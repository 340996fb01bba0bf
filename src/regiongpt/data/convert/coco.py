"""COCO instances (2014, 2017) as closed-set questions about boxes or masks, and its captions of whole images.

Paper: §3.2 and Table 1 (the closed-set prompt), §4 (20 boxes a category for fine-tuning).
"""

import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field, NonNegativeInt

from regiongpt.console import progress
from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.values import Words, short
from regiongpt.data.instances import Indices, InstancesFile, Shapes, read_captions
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError
from regiongpt.prompts import COCO_80, COCO_IDS, LABEL_SETS
from regiongpt.regions import Region

log = logging.getLogger(__name__)


class InstancesConverter(Converter):
    """Files in the format of COCO's instances: what class is each object, asked with the name of the closed set.

    The questions about an image are one conversation, or several where there are many. Crowds are not asked about: no
    single class stands in such a box alone.
    """

    sound_regions: ClassVar[bool] = True
    url_first: ClassVar[bool] = False

    instances: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Instances files; an image in two of them is taken from the first."""
    label_set: Words
    """Name of the closed set, as the question shall name it."""
    boxes_per_category: NonNegativeInt = 0
    """Most objects of a category, drawn by the seed over all files; 0 for all."""
    objects_per_record: NonNegativeInt = 20
    """Most objects in one conversation, the others follow in further ones; 0 for all in one."""
    shapes: Shapes = "box"
    """What marks an object: box, mask (polygons, RLE) or both, each asked about."""
    crowds: bool = False
    """Take what is marked as a crowd too: CVAT, datumaro and supervision mark every mask so that is stored as RLE."""
    check_images: bool = True
    """Leave out images that are missing or of another size."""

    def official(self) -> Mapping[int, str]:
        """The names by id that hold for a file that breaks off before its categories, none unless they are known."""
        return {}

    def check_names(self, file: InstancesFile) -> None:
        """Raises DataError where a file's categories are not those of the closed set."""
        known = LABEL_SETS.get(self.label_set)
        if known and (foreign := sorted(set(file.names.values()) - set(known))):
            raise DataError(
                f"{file.path}: expected category names of {self.label_set}, got {short(foreign[0])} and "
                f"{len(foreign) - 1} others; give the closed set another name with label_set"
            )

    def inputs(self) -> list[Path]:
        """The files that are given."""
        return list(self.instances)

    def captions_of(self, files: list[InstancesFile], rejects: Rejects) -> dict[int, list[tuple[int, str]]]:
        """Captions of whole images with their ids, by image; none unless a subclass has some."""
        return {}

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """Conversations in the order of the files, the images' ids and the objects' ids, then the image's captions."""
        selected = self.select(rejects)
        captions = self.captions_of([file for file, _ in selected], rejects)
        total = sum(len(file.images) for file, _ in selected)
        for file, place, objects in progress(_by_image(selected), self.name, "images", total):
            yield from self.conversations(file, place, objects)
            number = int(file.images[place])
            for identity, text in captions.get(number, ()):
                yield Record(
                    id=f"{self.name}/{file.name_of(number)}/caption/{identity}",
                    source=self.name,
                    image=file.paths[place],
                    width=int(file.widths[place]),
                    height=int(file.heights[place]),
                    regions=(),
                    turns=(Turn(task="image_caption", answer=text),),
                )

    def select(self, rejects: Rejects) -> list[tuple[InstancesFile, Indices]]:
        """The files, each with the indices of the objects that are asked about, in order.

        Raises:
            DataError: A file cannot be used, or two name their categories differently.
        """
        files: list[InstancesFile] = []
        names: dict[int, str] = {}
        known: set[int] = set()
        for path in self.instances:
            file = InstancesFile(
                path,
                rejects,
                shapes=self.shapes,
                folder=self.images if self.check_images else None,
                check="size" if self.check_images else "",
                url_first=self.url_first,
                crowds="take" if self.crowds else "leave out",
                known=known,
                official=self.official(),
            )
            self.check_names(file)
            for number, name in file.names.items():
                if names.setdefault(number, name) != name:
                    raise DataError(
                        f"{path}: expected category {number} to be {names[number]!r} as in {self.instances[0].name}, "
                        f"got {name!r}; files of one data set belong together, convert others apart"
                    )
            known.update(file.images.tolist())
            files.append(file)
        chosen = self._sample(files, sorted(names))
        return list(zip(files, chosen, strict=True))

    def _sample(self, files: list[InstancesFile], categories: list[int]) -> list[Indices]:
        """Of each category at most as many objects as wanted, by (seed, category) over all files."""
        if not self.boxes_per_category:
            return [np.arange(len(file.ids)) for file in files]
        starts = np.cumsum([0, *(len(file.ids) for file in files)])
        owners = np.concatenate([file.categories for file in files])
        order = np.argsort(owners, kind="stable")
        bounds = np.searchsorted(owners[order], categories), np.searchsorted(owners[order], categories, side="right")
        kept = np.zeros(len(owners), bool)
        for category, begin, end in zip(categories, *bounds, strict=True):
            drawn = np.random.default_rng((self.seed, category)).permutation(end - begin)[: self.boxes_per_category]
            kept[order[begin + drawn]] = True
        return [np.flatnonzero(kept[a:b]) for a, b in pairwise(starts)]

    def conversations(self, file: InstancesFile, place: int, objects: Indices) -> Iterator[Record]:
        """The conversations about the objects of one image, whose place in the file's images is given."""
        number = file.name_of(int(file.images[place]))
        most = self.objects_per_record or max(1, len(objects))
        for part, begin in enumerate(range(0, len(objects), most)):
            regions: list[RecordRegion] = []
            turns: list[Turn] = []
            chosen = objects[begin : begin + most]
            columns = (chosen, file.boxes[chosen], file.categories[chosen], file.ids[chosen])
            for index, box, category, identity in zip(*(column.tolist() for column in columns), strict=True):
                name = file.names[category]
                shapes: list[Region | None] = [Region.box(*box)] if self.shapes != "mask" else []
                shapes += [file.mask(index)] if self.shapes != "box" else []
                for region in filter(None, shapes):
                    regions.append(RecordRegion(region=region, category=name, source_id=str(file.name_of(identity))))
                    turns.append(_turn(self.label_set, len(regions), name))
            yield Record(
                id=f"{self.name}/{number}" + (f"/{part + 1}" if part else ""),
                source=self.name,
                image=file.paths[place],
                width=int(file.widths[place]),
                height=int(file.heights[place]),
                regions=tuple(regions),
                turns=tuple(turns),
            )


class CocoConverter(InstancesConverter):
    """COCO instances of 2014 or 2017, or any file of the format with its own closed set.

    With ``captions``, the human captions of the images are records of their own, for images that can be used.
    """

    name: ClassVar[str] = "coco"
    summary: ClassVar[str] = "COCO instances: the class of boxes or masks, and captions of whole images"

    label_set: Words = "COCO-80"
    """Name of the closed set, as the question shall name it."""
    captions: tuple[Path, ...] = ()
    """Captions files of the same images, to caption images too."""
    captions_per_image: NonNegativeInt = 1
    """Most captions of an image, drawn by the seed; 0 for all."""

    def official(self) -> Mapping[int, str]:
        """COCO's own numbers."""
        return dict(zip(COCO_IDS, COCO_80, strict=True)) if self.label_set == "COCO-80" else {}

    def inputs(self) -> list[Path]:
        """The files that are given."""
        return [*self.instances, *self.captions]

    def captions_of(self, files: list[InstancesFile], rejects: Rejects) -> dict[int, list[tuple[int, str]]]:
        """Those that are wanted, in the order of their ids."""
        captions = read_captions(self.captions, {int(number) for file in files for number in file.images}, rejects)
        for number, found in captions.items():
            if 0 < self.captions_per_image < len(found):
                rng = np.random.default_rng((self.seed, number))
                drawn = rng.choice(len(found), self.captions_per_image, replace=False)
                captions[number] = [found[k] for k in sorted(drawn.tolist())]
        return captions


@lru_cache(maxsize=1 << 17)
def _turn(label_set: str, region: int, name: str) -> Turn:
    """One closed-set question; the same few thousand serve a million objects."""
    return Turn(task="classify", regions=(region,), answer=name, label_set=label_set, guided=True)


def _by_image(selected: list[tuple[InstancesFile, Indices]]) -> Iterator[tuple[InstancesFile, int, Indices]]:
    """Every image of every file with its chosen objects, which are in the order of the images."""
    for file, chosen in selected:
        bounds = np.searchsorted(file.places[chosen], np.arange(len(file.images) + 1)).tolist()
        for place, (begin, end) in enumerate(pairwise(bounds)):
            yield file, place, chosen[begin:end]

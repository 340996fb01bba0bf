"""COCO, LVIS, V3Det and any file of COCO's format: the class of each box or mask, asked with a closed set.

Paper: §3.2 and Table 1 (the closed-set prompt), §4 (boxes per category)
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field, NonNegativeInt

from regiongpt.console import progress
from regiongpt.data.coco import Indices, InstancesFile, Shapes, read_captions
from regiongpt.data.reading import Words
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects, many
from regiongpt.data.sources import Converter
from regiongpt.errors import DataError, short
from regiongpt.prompts import LABEL_SETS
from regiongpt.regions import Region


class InstancesConverter(Converter):
    """The questions about an image are one conversation, or several where there are many."""

    sound_regions: ClassVar[bool] = True

    instances: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Instances files; the first file that lists an image is used."""
    label_set: Words
    """Name of the closed set in the question."""
    boxes_per_category: NonNegativeInt = 0
    """Most objects per category, sampled over all files; 0 for all."""
    objects_per_record: NonNegativeInt = 20
    """Most objects per conversation; the rest go to further ones; 0 for no limit."""
    shapes: Shapes = "box"
    """Regions: box, mask (polygons, RLE), or both, asked about separately."""
    crowds: bool = False
    """Include crowds; CVAT, datumaro and supervision mark every RLE mask as one."""
    check_images: bool = True
    """Skip images that are missing or have another size."""

    def captions_of(self, images: set[int], rejects: Rejects) -> dict[int, list[tuple[int, str]]]:
        """Captions of whole images with their ids, by image; none unless a subclass has some."""
        return {}

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """Conversations in the order of the files, the images' ids and the objects' ids, then the image's captions."""
        files = self._files(rejects)
        captions = self.captions_of({number for file in files for number in file.images.tolist()}, rejects)
        drawn = self._draw(files)
        total = sum(len(file.images) for file in files)
        for file, place, objects in progress(_by_image(files, drawn), self.name, "images", total):
            yield from self._conversations(file, place, objects)
            for number, text in captions.get(int(file.images[place]), ()):
                turn = Turn(task="image_caption", answer=text)
                key = f"{file.name_of(int(file.images[place]))}/caption/{number}"
                yield self.record(key, file.paths[place], file.size(place), [], [turn])

    def _files(self, rejects: Rejects) -> list[InstancesFile]:
        """The files; DataError where one has names outside the closed set, or two name their categories differently."""
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
                crowds="take" if self.crowds else "leave out",
                known=known,
            )
            if foreign := sorted(set(file.names.values()) - set(LABEL_SETS.get(self.label_set, file.names.values()))):
                others = f" and {many(len(foreign) - 1, 'other')} are" if len(foreign) > 1 else " is"
                wrong = f"{short(foreign[0])}{others} not of {self.label_set}"
                raise DataError(f"{path}: {wrong}; name the closed set with --label-set")
            for number, name in file.names.items():
                if names.setdefault(number, name) != name:
                    raise DataError(
                        f"{path}: expected category {number} to be {names[number]!r} as in {self.instances[0].name}, "
                        f"got {name!r}; convert different data sets separately"
                    )
            known.update(file.images.tolist())
            files.append(file)
        return files

    def _draw(self, files: list[InstancesFile]) -> list[Indices]:
        """Sample objects per category over all files, by (seed, category); indices by file."""
        if not self.boxes_per_category:
            return [np.arange(len(file.ids)) for file in files]
        categories = np.concatenate([file.categories for file in files])
        kept = np.zeros(len(categories), bool)
        order = np.argsort(categories, kind="stable")
        for objects in np.split(order, np.flatnonzero(np.diff(categories[order])) + 1) if len(order) else ():
            rng = np.random.default_rng((self.seed, int(categories[objects[0]])))
            kept[objects[rng.permutation(len(objects))[: self.boxes_per_category]]] = True
        bounds = np.cumsum([0, *(len(file.ids) for file in files)]).tolist()
        return [np.flatnonzero(kept[a:b]) for a, b in pairwise(bounds)]

    def _conversations(self, file: InstancesFile, place: int, objects: Indices) -> Iterator[Record]:
        most = self.objects_per_record or max(1, len(objects))
        for part, begin in enumerate(range(0, len(objects), most)):
            regions: list[RecordRegion] = []
            turns: list[Turn] = []
            chosen = objects[begin : begin + most]
            columns = (chosen, file.boxes[chosen], file.categories[chosen], file.ids[chosen])
            for index, box, category, number in zip(*(column.tolist() for column in columns), strict=True):
                name = file.names[category]
                shapes: list[Region | None] = [Region.box(*box)] if self.shapes != "mask" else []
                shapes += [file.mask(index)] if self.shapes != "box" else []
                source_id = str(file.name_of(number)) if number >= 0 else ""
                for region in filter(None, shapes):
                    regions.append(RecordRegion(region=region, category=name, source_id=source_id))
                    turns.append(_turn(self.label_set, len(regions), name))
            key = f"{file.name_of(int(file.images[place]))}" + (f"/{part + 1}" if part else "")
            yield self.record(key, file.paths[place], file.size(place), regions, turns)


class CocoConverter(InstancesConverter):
    """COCO instances of 2014 or 2017, or any file of the format with its own closed set.

    With ``captions``, the human captions of the images are records of their own, for images that can be used.
    """

    name: ClassVar[str] = "coco"
    summary: ClassVar[str] = "COCO instances: the class of boxes or masks, and captions of whole images"

    label_set: Words = "COCO-80"
    """Name of the closed set in the question."""
    captions: tuple[Path, ...] = ()
    """Captions files of the same images, to also caption whole images."""
    captions_per_image: NonNegativeInt = 1
    """Most captions per image, sampled; 0 for all."""

    def captions_of(self, images: set[int], rejects: Rejects) -> dict[int, list[tuple[int, str]]]:
        """The selected ones, sorted by id."""
        captions = read_captions(self.captions, images, rejects)
        for number, found in captions.items():
            if 0 < self.captions_per_image < len(found):
                rng = np.random.default_rng((self.seed, number))
                drawn = rng.choice(len(found), self.captions_per_image, replace=False)
                captions[number] = [found[k] for k in sorted(drawn.tolist())]
        return captions


class LvisConverter(InstancesConverter):
    """LVIS v0.5 or v1. Its images are COCO's of 2017: ``images`` is the folder with ``train2017`` and ``val2017``."""

    name: ClassVar[str] = "lvis"
    summary: ClassVar[str] = "LVIS: the class of boxes or masks among its long list of names"

    label_set: Words = "LVIS"
    """Name of the closed set in the question."""


class V3DetConverter(InstancesConverter):
    """V3Det; ``images`` is the folder that holds its folder ``images``, with which file names begin."""

    name: ClassVar[str] = "v3det"
    summary: ClassVar[str] = "V3Det: the class of boxes among 13,204 names, balanced by category"

    label_set: Words = "V3Det"
    """Name of the closed set in the question."""
    boxes_per_category: NonNegativeInt = 100
    """Most objects per category, sampled: 100 for pre-training and 10 for fine-tuning in the paper; 0 for all."""


@lru_cache(maxsize=1 << 17)
def _turn(label_set: str, region: int, name: str) -> Turn:
    """One closed-set question; the same few thousand serve a million objects."""
    return Turn(task="classify", regions=(region,), answer=name, label_set=label_set, guided=True)


def _by_image(files: list[InstancesFile], drawn: list[Indices]) -> Iterator[tuple[InstancesFile, int, Indices]]:
    """Every image of every file with its drawn objects, which are in the order of the images."""
    for file, chosen in zip(files, drawn, strict=True):
        bounds = np.searchsorted(file.places[chosen], np.arange(len(file.images) + 1)).tolist()
        for place, (begin, end) in enumerate(pairwise(bounds)):
            yield file, place, chosen[begin:end]

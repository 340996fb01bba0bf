"""COCO instances (2014, 2017) as closed-set questions about boxes or masks, and its captions of whole images.

Paper: §3.2 and Table 1 (the closed-set prompt), §4 (20 boxes a category for fine-tuning).
"""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from regiongpt.data.convert.base import Converter, option
from regiongpt.data.convert.images import Fault
from regiongpt.data.convert.instances import SHAPES, Indices, InstancesFile, Shapes
from regiongpt.data.convert.jsonstream import iter_array
from regiongpt.data.convert.values import MALFORMED, is_whole, plain_text, short
from regiongpt.data.progress import track
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects
from regiongpt.errors import ConfigError, DataError
from regiongpt.prompts import COCO_80, COCO_IDS, LABEL_SETS
from regiongpt.regions import Region

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InstancesConverter(Converter):
    """Files in the format of COCO's instances: what class is each object, asked with the name of the closed set.

    The questions about an image are one conversation, or several where there are many. Crowds are not asked about: no
    single class stands in such a box alone.
    """

    sound_regions: ClassVar[bool] = True

    instances: tuple[Path, ...] = option("instances files; an image in two of them is taken from the first")
    label_set: str = option("name of the closed set, as the question shall name it")
    boxes_per_category: int = option(
        "most objects of a category, drawn by the seed over all files; 0 for all", default=0
    )
    objects_per_record: int = option(
        "most objects in one conversation, the others follow in further ones; 0 for all in one", default=20
    )
    shapes: str = option("what marks an object: box, mask (polygons, RLE) or both, each asked about", default="box")
    check_images: bool = option("leave out images that are missing or of another size", default=True)

    def __post_init__(self) -> None:
        for name in ("boxes_per_category", "objects_per_record"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.shapes not in SHAPES:
            raise ConfigError(f"shapes: expected one of {', '.join(SHAPES)}, got {self.shapes!r}")
        if not self.instances:
            raise ConfigError("instances: expected at least one file, got none")
        if not self.label_set.strip():
            raise ConfigError("label_set: expected the name of a closed set, got none")

    @abstractmethod
    def image_name(self, entry: Mapping[str, Any]) -> Any:
        """The path of an image below the images' folder, as its entry in the file names it."""

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
        for file, place, objects in track(_by_image(selected), total):
            yield from self.conversations(file, place, objects)
            for identity, text in captions.get(int(file.images[place]), ()):
                yield Record(
                    id=f"{self.name}/{file.images[place]}/caption/{identity}",
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
                shapes=cast(Shapes, self.shapes),
                image_name=self.image_name,
                folder=self.images if self.check_images else None,
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
        log.info(
            "%s: %d of %d objects are asked about, %d crowds are not",
            self.name,
            sum(map(len, chosen)),
            sum(len(file.ids) for file in files),
            sum(file.crowds for file in files),
        )
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
        number = int(file.images[place])
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
                    regions.append(RecordRegion(region=region, category=name, source_id=str(identity)))
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


@dataclass(frozen=True, kw_only=True)
class CocoConverter(InstancesConverter):
    """COCO instances of 2014 or 2017, or any file of the format with its own closed set.

    With ``captions``, the human captions of the images are records of their own, for images that can be used.
    """

    name: ClassVar[str] = "coco"
    summary: ClassVar[str] = "COCO instances: the class of boxes or masks, and captions of whole images"

    label_set: str = option("name of the closed set, as the question shall name it", default="COCO-80")
    captions: tuple[Path, ...] = option("captions files of the same images, to caption images too", default=())
    captions_per_image: int = option("most captions of an image, drawn by the seed; 0 for all", default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.captions_per_image < 0:
            raise ConfigError(f"captions_per_image: expected 0 or more, got {self.captions_per_image}")

    def image_name(self, entry: Mapping[str, Any]) -> Any:
        """The file name."""
        return entry.get("file_name")

    def official(self) -> Mapping[int, str]:
        """COCO's own numbers."""
        return dict(zip(COCO_IDS, COCO_80, strict=True)) if self.label_set == "COCO-80" else {}

    def inputs(self) -> list[Path]:
        """The files that are given."""
        return [*self.instances, *self.captions]

    def captions_of(self, files: list[InstancesFile], rejects: Rejects) -> dict[int, list[tuple[int, str]]]:
        """Those that are wanted, in the order of their ids."""
        captions: dict[int, list[tuple[int, str]]] = {}
        images = {int(number) for file in files for number in file.images}
        seen: set[int] = set()
        for path in self.captions:
            apart, before = 0, len(seen)
            for place, entry in enumerate(iter_array(path, "annotations", rejects)):
                identity, image = (entry.get("id"), entry.get("image_id")) if isinstance(entry, dict) else (None, None)
                if not (is_whole(identity) and is_whole(image)):
                    reason = f"expected id, image_id and caption, got {short(entry)}"
                    rejects.add(MALFORMED, path, f"annotations[{place}]", reason)
                    continue
                text = plain_text(entry.get("caption"), "caption")
                if image not in images:
                    apart += 1
                    rejects.add("caption of an absent image", path, identity, f"expected a usable image, got {image}")
                elif identity in seen:
                    rejects.add("duplicate id", path, identity, "expected each caption once, got its id again")
                elif isinstance(text, Fault):
                    rejects.add(text.kind, path, identity, text.reason)
                else:
                    seen.add(identity)
                    captions.setdefault(image, []).append((identity, text))
            if apart and images and len(seen) == before:
                raise DataError(
                    f"{path}: expected captions of images of {', '.join(each.name for each in self.instances)}, but "
                    f"all {apart} are of others; give files that belong together"
                )
        for number, found in captions.items():
            found.sort()
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

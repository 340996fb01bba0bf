"""Sources of records: settings, which are the command's options, and the files of a data set read as records.

Here too are the closed sets: the class of each box or mask of COCO, LVIS, V3Det. Paper: §3.2, Table 1; §4
"""

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import numpy as np
from pydantic import Field, NonNegativeInt

from regiongpt.data.coco import Frame, Instance, InstancesFile, Shapes, crowd_hint, read_captions
from regiongpt.data.reading import Words
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import (
    CROWD,
    MANIFEST,
    REJECTS,
    Manifest,
    RecordSet,
    Rejects,
    counted,
    file_identity,
    many,
    require_data_extra,
    write_records,
)
from regiongpt.environment import progress
from regiongpt.errors import ConfigError, DataError, short
from regiongpt.prompts import LABEL_SETS
from regiongpt.regions import Region
from regiongpt.settings import Settings
from regiongpt.storage import is_unicode

log = logging.getLogger(__name__)

CONVERTERS: Final[dict[str, str]] = {
    "coco": "sources:CocoConverter",
    "lvis": "sources:LvisConverter",
    "v3det": "sources:V3DetConverter",
    "vg": "visual_genome:VisualGenomeConverter",
    "refcoco": "refcoco:RefCocoConverter",
    "llava": "chat:LlavaConverter",
    "jsonl": "chat:JsonlConverter",
}
"""Module and class of each converter, imported when it is asked for."""


class Converter(Settings, ABC):
    """One data set's files as records; an option of 0 or ``""`` is off."""

    name: ClassVar[str]
    summary: ClassVar[str]
    sound_regions: ClassVar[bool] = False
    """Whether each region of a record was already checked against its image."""

    images: Path
    """Folder of the images."""

    @abstractmethod
    def records(self, rejects: Rejects) -> Iterator[Record]:
        """The records in an order that the files and the options alone decide; what cannot be used goes to ``rejects``.

        DataError where a whole file is missing or of another format, or files do not belong together.
        """

    def record(
        self, key: str, image: str, size: tuple[int, int], regions: Iterable[RecordRegion], turns: Iterable[Turn]
    ) -> Record:
        """A record of this source, whose id ends in ``key``; ``size`` is the image's width and height in pixels."""
        return Record(
            id=f"{self.name}/{key}",
            source=self.name,
            image=image,
            width=size[0],
            height=size[1],
            regions=tuple(regions),
            turns=tuple(turns),
        )

    def inputs(self) -> list[Path]:
        """The files that are read, without the images."""
        given = [value if isinstance(value, tuple) else (value,) for name, value in self if name != "images"]
        return [path for path in chain.from_iterable(given) if isinstance(path, Path)]

    def arguments(self) -> dict[str, Any]:
        """The options as the manifest states them: the last part of paths, so that moved files are the same."""

        def stated(value: Any) -> Any:
            if isinstance(value, tuple):
                return [stated(each) for each in value]
            return value.name if isinstance(value, Path) else value

        return {name: stated(value) for name, value in self}


class Output(Settings):
    """Output folder and strictness."""

    out: Path
    """Folder of the records, new or empty."""
    strict: bool = False
    """Stop at the first record that cannot be used."""
    overwrite: bool = False
    """Replace existing records in --out."""


def load_converter(name: str) -> type[Converter]:
    """The converter class of a name; ConfigError if there is none."""
    if name not in CONVERTERS:
        raise ConfigError(f"expected a source among {', '.join(CONVERTERS)}, got {name!r}")
    module, _, attribute = CONVERTERS[name].partition(":")
    found: type[Converter] = getattr(import_module(f"regiongpt.data.{module}"), attribute)
    return found


def convert(converter: Converter, out: Path, strict: bool = False, overwrite: bool = False) -> Manifest:
    """Convert one source into a folder of records; does nothing where that has been done before.

    Args:
        converter: The source and its options.
        out: The folder. ConfigError where it holds records of another source or of other options.
        strict: Stop at the first record that cannot be used, with DataError as for a file.
        overwrite: Replace other records.
    """
    require_data_extra()
    if not is_unicode(str(out)):
        raise DataError(f"{str(out)!a}: the name is not UTF-8, which Parquet's writer needs; choose another place")
    if not converter.images.is_dir():
        raise DataError(f"images: no folder at {converter.images}; check the path")
    if (out / MANIFEST).exists() and not overwrite:
        there = Manifest.read(out)
        same = (there.source, there.arguments) == (converter.name, converter.arguments())
        if same and there.inputs == [file_identity(path) for path in converter.inputs()]:
            return there
        held = f"holds other records, those of '{there.source}' with {there.arguments}"
        raise ConfigError(f"{out}: {held}; give another --out, or --overwrite")
    rejects = Rejects(strict)
    return write_records(
        out,
        converter.records(rejects),
        rejects,
        source=converter.name,
        images=str(converter.images.resolve()),
        inputs=converter.inputs(),
        arguments=converter.arguments(),
        check_regions=not converter.sound_regions,
    )


def summary(manifest: Manifest, out: Path, seconds: float | None) -> str:
    """Summary of a conversion; ``seconds`` is None if the records existed already."""
    counts, rejects = manifest.counts, manifest.rejects
    listed = ", ".join(many(counts.get(f"{name}s", 0), name) for name in ("record", "image", "region", "turn"))
    time = "already converted, nothing to do" if seconds is None else f"{seconds:,.1f} s"
    lines = [f"{manifest.source}: {listed}", f"{out}: {many(len(manifest.shards), 'shard')}; {time}"]
    tasks = [f"{count:,} {name[5:]}" for name, count in sorted(counts.items()) if name.startswith("task:")]
    lines += [f"turns: {', '.join(tasks)}"] if len(tasks) > 1 else []
    if rejects:
        lines += [f"{sum(rejects.values()):,} left out, each with its reason in {out / REJECTS}:", *counted(rejects)]
    else:
        lines.append("nothing left out")
    if rejects.get(CROWD) and not counts.get("regions"):
        lines.append("every object is marked as a crowd (some tools mark every mask); --crowds includes them")
    return "\n".join(lines)


# -- Closed sets -------------------------------------------------------------------------------------------------------


class InstancesConverter(Converter):
    """The questions about an image are one conversation, or several where there are many.

    With ``captions``, the human captions of the images are records of their own, for images that can be used.
    """

    sound_regions: ClassVar[bool] = True

    instances: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Instances files; the first file that lists an image is used."""
    label_set: Words
    """Name of the closed set in the question."""
    boxes_per_category: NonNegativeInt = 0
    """Most objects per category, sampled over all files; 0 for all."""
    seed: NonNegativeInt = 0
    """Random seed."""
    objects_per_record: NonNegativeInt = 20
    """Most objects per conversation; the rest go to further ones; 0 for no limit."""
    shapes: Shapes = "box"
    """Regions: box, mask (polygons, RLE), or both, asked about separately."""
    crowds: bool = False
    """Include crowds; CVAT, datumaro and supervision mark every RLE mask as one."""
    check_images: bool = True
    """Skip images that are missing or have another size."""
    captions: tuple[Path, ...] = ()
    """Captions files of the same images, to also caption whole images."""
    captions_per_image: NonNegativeInt = 1
    """Most captions per image, sampled; 0 for all."""

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """Conversations in the order of the files, the images' ids and the objects' ids, then the image's captions."""
        files = self._files(rejects)
        self._sample(files)
        captions = read_captions(self.captions, {image.id for file in files for image in file.images}, rejects)
        total = sum(len(file.images) for file in files)
        read = ((file, *each) for file in files for each in file.by_image())
        for file, image, objects in progress(read, self.name, "images", total):
            yield from self._conversations(file, image, objects)
            found = captions.get(image.id, [])
            if 0 < self.captions_per_image < len(found):
                rng = np.random.default_rng((self.seed, image.id))
                drawn = rng.choice(len(found), self.captions_per_image, replace=False)
                found = [found[k] for k in sorted(drawn.tolist())]
            for number, text in found:
                turn = Turn(task="image_caption", answer=text)
                key = f"{file.name_of(image.id)}/caption/{number}"
                yield self.record(key, image.path, (image.width, image.height), [], [turn])

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
                check="size",
                crowds="take" if self.crowds else "leave out",
                known=known,
            )
            if foreign := sorted(set(file.names.values()) - set(LABEL_SETS.get(self.label_set, file.names.values()))):
                wrong = f"{len(foreign)} of its {len(file.names)} categories are not of {self.label_set}"
                raise DataError(f"{path}: {wrong}, such as {short(foreign[0])}; name the closed set with --label-set")
            for number, name in file.names.items():
                if names.setdefault(number, name) != name:
                    told = f"expected category {number} to be {names[number]!r} as in {self.instances[0].name}"
                    raise DataError(f"{path}: {told}, got {name!r}; convert different data sets separately")
            known.update(image.id for image in file.images)
            files.append(file)
        return files

    def _sample(self, files: list[InstancesFile]) -> None:
        """Keep some objects of each category over all files, drawn by (seed, category)."""
        if not self.boxes_per_category:
            return
        places = defaultdict[int, list[tuple[int, int]]](list)
        for number, file in enumerate(files):
            for k, each in enumerate(file.objects):
                places[each.category].append((number, k))
        kept: set[tuple[int, int]] = set()
        for category, found in places.items():
            order = np.random.default_rng((self.seed, category)).permutation(len(found))
            kept.update(found[k] for k in order[: self.boxes_per_category].tolist())
        for number, file in enumerate(files):
            file.objects = [each for k, each in enumerate(file.objects) if (number, k) in kept]

    def _conversations(self, file: InstancesFile, image: Frame, objects: list[Instance]) -> Iterator[Record]:
        most = self.objects_per_record or max(1, len(objects))
        for part, begin in enumerate(range(0, len(objects), most)):
            regions: list[RecordRegion] = []
            turns: list[Turn] = []
            for each in objects[begin : begin + most]:
                boxes = [Region.box(*each.box)] if self.shapes != "mask" else []
                masks = [each.mask.region()] if self.shapes != "box" else []
                for region in filter(None, [*boxes, *masks]):
                    regions.append(file.record_region(each, region))
                    asked: Any = {"task": "classify", "label_set": self.label_set, "guided": True}
                    turns.append(Turn(answer=file.names[each.category], regions=(len(regions),), **asked))
            key = f"{file.name_of(image.id)}" + (f"/{part + 1}" if part else "")
            yield self.record(key, image.path, (image.width, image.height), regions, turns)


class CocoConverter(InstancesConverter):
    """COCO instances of 2014 or 2017, or any file of the format with its own closed set."""

    name: ClassVar[str] = "coco"
    summary: ClassVar[str] = "COCO instances: the class of boxes or masks, and captions of whole images"

    label_set: Words = "COCO-80"
    """Name of the closed set in the question."""


class LvisConverter(InstancesConverter):
    """LVIS v1. Its images are COCO's of 2017: ``images`` is the folder with ``train2017`` and ``val2017``."""

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


# -- Annotated images as they are, of any source -----------------------------------------------------------------------


class AnnotatedImages:
    """All images with their regions, as records without turns in an order that the files alone decide.

    ``regions`` is JSON of COCO, LVIS, V3Det or another tool's COCO export, or a folder of records; with ``crowds``,
    what is marked as a crowd is taken too. ``count`` is the number of regions, ``rejects`` what could not be used.
    ConfigError where a path does not exist, DataError where the regions cannot be read or there are none.
    """

    def __init__(self, images: Path, regions: Path, crowds: bool = False) -> None:
        if not images.is_dir():
            raise ConfigError(f"--images {images}: no such folder")
        if not regions.exists():
            raise ConfigError(f"--regions {regions}: no such file or folder")
        self.images, self.path, self.rejects = images, regions, Rejects()
        self._held: RecordSet | InstancesFile
        if regions.is_dir():
            self._held = RecordSet(regions, images)
            self.count = self._held.manifest.counts.get("regions", 0)
        else:
            self._held = InstancesFile(
                regions, self.rejects, shapes="both", folder=images, check="missing",
                crowds="take" if crowds else "leave out",
            )  # fmt: skip
            self.count = len(self._held.objects)
        if not self.count:
            told = f": {self.rejects.summary()}; the last: {self.rejects.last}" if self.rejects.counts else ""
            raise DataError(f"--regions {regions}: no usable region{told}{crowd_hint(self.rejects)}")

    def __iter__(self) -> Iterator[Record]:
        for place, (image, width, height, regions) in enumerate(self._read()):
            if image and regions:
                yield Record(
                    id=str(place), source="regions", image=image, width=width, height=height, regions=tuple(regions),
                    turns=(),
                )  # fmt: skip

    def _read(self) -> Iterator[tuple[str, int, int, Iterable[RecordRegion]]]:
        if isinstance(self._held, InstancesFile):
            file = self._held
            for image, found in file.by_image():
                regions = [file.record_region(each, each.mask.region() or Region.box(*each.box)) for each in found]
                yield image.path, image.width, image.height, regions
            return
        for name, group in groupby(self._held, key=lambda record: record.image):
            first, *others = group
            shared = dict.fromkeys(each for record in (first, *others) for each in record.regions)  # some are repeated
            yield name, first.width, first.height, shared

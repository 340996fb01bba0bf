"""Sources of records: settings, which are the command's options, and the files of a data set read as records."""

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from pydantic import NonNegativeInt

from regiongpt.data.coco import InstancesFile, crowd_hint
from regiongpt.data.reading import is_unicode
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
from regiongpt.errors import ConfigError, DataError
from regiongpt.regions import Region
from regiongpt.settings import Settings

log = logging.getLogger(__name__)

CONVERTERS: Final[dict[str, str]] = {
    "coco": "closed_sets:CocoConverter",
    "lvis": "closed_sets:LvisConverter",
    "v3det": "closed_sets:V3DetConverter",
    "vg": "visual_genome:VisualGenomeConverter",
    "refcoco": "refcoco:RefCocoConverter",
    "llava": "chat:LlavaConverter",
    "region_captions": "chat:RegionCaptionsConverter",
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
    seed: NonNegativeInt = 0
    """Random seed."""

    @abstractmethod
    def records(self, rejects: Rejects) -> Iterator[Record]:
        """The records in an order that the files and the options alone decide; what cannot be used goes to ``rejects``.

        Raises:
            DataError: A whole file is missing or of another format, or files do not belong together.
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
        return [path for paths in given for path in paths if isinstance(path, Path)]

    def arguments(self) -> dict[str, Any]:
        """The options as the manifest states them."""
        return {name: _stated(value) for name, value in self}


def _stated(value: Any) -> Any:
    """An option in the manifest: the last part of paths, so that moved files are the same."""
    if isinstance(value, Path):
        return value.name
    return [_stated(each) for each in value] if isinstance(value, tuple) else value


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
        out: The folder.
        strict: Stop at the first record that cannot be used.
        overwrite: Replace records of another source or of other options.

    Raises:
        ConfigError: The folder holds other records, or the libraries are missing.
        DataError: A file cannot be used; in strict mode, a record; the disk is full.
    """
    require_data_extra()
    out = Path(out)
    if not is_unicode(str(out)):
        raise DataError(f"{str(out)!a}: the name is not UTF-8, which Parquet's writer needs; choose another place")
    if not converter.images.is_dir():
        raise DataError(f"images: no folder at {converter.images}; check the path")
    if (out / MANIFEST).exists() and not overwrite:
        there = Manifest.read(out)
        # Another version may have lacked an option, or had one more that was off.
        stated = {name: _stated(field.default) for name, field in type(converter).model_fields.items()}
        stated |= {name: value for name, value in there.arguments.items() if name in stated or value}
        same = (there.source, stated) == (converter.name, converter.arguments())
        if same and there.inputs == [file_identity(path) for path in converter.inputs()]:
            log.info("%s: already converted, nothing to do", out)
            return there
        raise ConfigError(
            f"{out}: holds other records, those of '{there.source}' with {there.arguments}; "
            "give another --out, or --overwrite"
        )
    rejects = Rejects(strict)
    collected = gc.isenabled()
    gc.disable()  # millions of parsed values hold no cycles, and looking for them took a tenth of the time
    try:
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
    finally:
        if collected:
            gc.enable()


def summary(manifest: Manifest, out: Path, seconds: float | None) -> str:
    """Summary of a conversion; ``seconds`` is None if the records existed already."""
    counts, rejects = manifest.counts, manifest.rejects
    size = sum((out / shard["file"]).stat().st_size for shard in manifest.shards)
    listed = ", ".join(many(counts.get(f"{name}s", 0), name) for name in ("record", "image", "region", "turn"))
    time = "already converted, nothing to do" if seconds is None else f"{seconds:,.1f} s"
    lines = [
        f"{manifest.source}: {listed}",
        f"{out}: {many(len(manifest.shards), 'shard')}, {size / 1e6:,.1f} MB; {time}",
    ]
    tasks = [f"{count:,} {name[5:]}" for name, count in sorted(counts.items()) if name.startswith("task:")]
    lines += [f"turns: {', '.join(tasks)}"] if len(tasks) > 1 else []
    if rejects:
        lines += [f"{sum(rejects.values()):,} left out, each with its reason in {out / REJECTS}:", *counted(rejects)]
    else:
        lines.append("nothing left out")
    if rejects.get(CROWD) and not counts.get("regions"):
        lines.append("every object is marked as a crowd (some tools mark every mask); --crowds includes them")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Annotated images as they are, of any source


class AnnotatedImages:
    """All images with their regions, as records without turns in an order that the files alone decide.

    Attributes:
        count: Number of regions.
        rejects: What could not be used, by kind.

    Args:
        images: Folder of the images.
        regions: JSON of COCO, LVIS, V3Det or another tool's COCO export, or a folder of records.
        crowds: Take what is marked as a crowd too.

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
        self._held: RecordSet | InstancesFile
        if regions.is_dir():
            self._held = RecordSet(regions, images)
            self.count = self._held.manifest.counts.get("regions", 0)
        else:
            self._held = InstancesFile(
                regions, self.rejects, shapes="both", folder=images, check="missing",
                crowds="take" if crowds else "leave out",
            )  # fmt: skip
            self.count = len(self._held.ids)
        if not self.count:
            told = f": {self.rejects.summary()}; the last: {self.rejects.last}" if self.rejects.counts else ""
            raise DataError(f"--regions {regions}: no usable region{told}{crowd_hint(self.rejects)}")

    def __iter__(self) -> Iterator[Record]:
        read = _by_image(self._held) if isinstance(self._held, RecordSet) else _objects(self._held)
        for place, (name, width, height, regions) in enumerate(read):
            if name and regions:
                yield Record(
                    id=str(place), source="regions", image=name, width=width, height=height, regions=tuple(regions),
                    turns=(),
                )  # fmt: skip


def _objects(file: InstancesFile) -> Iterator[tuple[str, int, int, list[RecordRegion]]]:
    bounds = np.searchsorted(file.places, np.arange(len(file.images) + 1)).tolist()
    for place, name in enumerate(file.paths):
        regions = []
        for k in range(bounds[place], bounds[place + 1]):
            region = file.mask(k) or Region.box(*file.boxes[k].tolist(), normalized=False)
            category, identity = file.names[int(file.categories[k])], str(file.name_of(int(file.ids[k])))
            regions.append(RecordRegion(region=region, category=category, source_id=identity))
        yield name, *file.size(place), regions


def _by_image(records: RecordSet) -> Iterator[tuple[str, int, int, list[RecordRegion]]]:
    for name, group in groupby(records, key=lambda record: record.image):
        listed = list(group)
        regions = dict.fromkeys(each for record in listed for each in record.regions)  # records may repeat one
        yield name, listed[0].width, listed[0].height, list(regions)

"""What is captioned and asked: images, regions, close-ups, prompts, and the keys of answers (paper §3.3)."""

import math
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from regiongpt.annotate.options import MODES, Captions, Mode, Options
from regiongpt.data.coco import InstancesFile, crowd_hint
from regiongpt.data.records import RecordRegion, region_row
from regiongpt.data.shards import RecordSet, Rejects
from regiongpt.errors import ConfigError, DataError
from regiongpt.regions import Region
from regiongpt.storage import Store, digest, sha256

WORDING: Final[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("wording.toml").read_text(encoding="utf-8"))
_MOST_TO_CHOOSE: Final = 60
"""Regions of an image up to which a caption is located back."""


class Item(NamedTuple):
    """One image: its place in the source, its path below the images' folder, its size and its regions."""

    place: int
    name: str
    width: int
    height: int
    regions: tuple[RecordRegion, ...]


class Source:
    """All images and regions, in an order that the files alone decide; iterating makes one image at a time.

    ``regions`` is json of COCO, LVIS, V3Det or another tool's COCO export, or a folder of records; ``count`` how many
    regions there are, ``rejects`` what could not be used, by kind.

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
            raise DataError(f"--regions {regions}: no region that can be captioned{told}{crowd_hint(self.rejects)}")

    def __iter__(self) -> Iterator[Item]:
        items = _of_records(self._held) if isinstance(self._held, RecordSet) else _of_instances(self._held)
        return (item for item in items if item.name and item.regions)


def _of_instances(file: InstancesFile) -> Iterator[Item]:
    bounds = np.searchsorted(file.places, np.arange(len(file.images) + 1)).tolist()
    for place, name in enumerate(file.paths):
        regions = []
        for k in range(bounds[place], bounds[place + 1]):
            category, identity = file.names[int(file.categories[k])], str(file.name_of(int(file.ids[k])))
            region = file.mask(k) or Region.box(*file.boxes[k].tolist(), normalized=False)
            regions.append(RecordRegion(region=region, category=category, source_id=identity))
        yield Item(place, name, int(file.widths[place]), int(file.heights[place]), tuple(regions))


def _of_records(records: RecordSet) -> Iterator[Item]:
    for place, (name, group) in enumerate(groupby(records, key=lambda record: record.image)):
        listed = list(group)
        regions = dict.fromkeys(each for record in listed for each in record.regions)  # a record may repeat one
        yield Item(place, name, listed[0].width, listed[0].height, tuple(regions))


class Ask(NamedTuple):
    """One caption that is wanted: of a region by its place, or of the whole image (-1), in a mode and prompt version.

    ``key`` is that of its answer; ``locate`` and ``score`` those of the region it is located back to and of its
    similarity, "" where they are not asked for.
    """

    key: str
    number: int
    mode: Mode
    version: int
    locate: str = ""
    score: str = ""

    @property
    def keys(self) -> list[str]:
        """All three, those that are asked for."""
        return [key for key in (self.key, self.locate, self.score) if key]


def asks_of(options: Options, settings: str, scorer: str, image: str, item: Item) -> list[Ask]:
    """All that is asked about an image, known by its hash; the global caption first, where it is needed.

    Keys are made of image content, region, class, prompt and ``settings``, which stand for captioner and settings;
    ``scorer`` stands for the model that scores similarity, "" for none.
    """
    mode, seed, asks = options.mode, options.seed, []
    choosing = options.locate_back and len(item.regions) <= _MOST_TO_CHOOSE
    # The gallery shows a region of each of the first images.
    shown = draw(seed, image, len(item.regions)) if item.place < options.gallery else -1
    for number, each in enumerate(item.regions):
        where = region_row(each.region)
        version = draw(seed, f"{image} {where} {each.category}", len(WORDING["region"]))
        for each_mode in MODES if number == shown else (mode,):
            prompt = (image, where, each.category, each_mode, WORDING["region"][version])
            key, is_own = digest("region", *prompt, settings, seed), each_mode == mode
            locate, score = f"{key} locate" * (is_own and choosing), f"{key} {scorer}" * (is_own and scorer != "")
            asks.append(Ask(key, number, each_mode, version, locate, score))
    if any(ask.mode != "crop" for ask in asks):
        version = draw(seed, image, len(WORDING["image"]))
        asks.insert(0, Ask(digest("image", image, WORDING["image"][version], settings, seed), -1, "full", version))
    return asks


class Work(NamedTuple):
    """An image, all that is asked about it, and the values there are, by key.

    A value with an ``error`` is a failure: that of the last of so many ``tries``.
    """

    item: Item
    asks: list[Ask]
    known: dict[str, dict[str, Any]]
    image: str  # SHA-256, "" where the file cannot be read

    def missing(self, keys: Iterable[str]) -> bool:
        """Whether any of these keys has no answer."""
        return any("error" in self.known.get(key, {"error": ""}) for key in keys)


def works(source: Source, store: Store, options: Options, noted: Mapping[str, Any], write: bool) -> Iterator[Work]:
    """All images with what the store knows about each, for a run as it is noted.

    An image is hashed where its size or time of change is new to the store, which notes that with ``write``.
    """
    # Mode and seed are in each key by themselves, and a region is the same in whatever file it stands.
    left_out = ("mode", "seed", "regions")
    settings = digest({name: value for name, value in noted["fingerprint"].items() if name not in left_out})
    for item in source:
        image = ""
        with suppress(OSError):
            status = os.stat(source.images / item.name)
            key = digest("file", item.name, status.st_size, status.st_mtime_ns)
            if not (hashed := store.get([key])):
                hashed = {key: {"image": sha256(source.images / item.name)}}
                if write:
                    store.add(hashed)
            image = hashed[key]["image"]
        asks = asks_of(options, settings, noted["scorer"], image, item)
        yield Work(item, asks, store.get([key for ask in asks for key in ask.keys]), image)


def draw(seed: int, item: str, count: int) -> int:
    """A number below ``count`` that only the seed and the item decide."""
    return int.from_bytes(blake2b(f"{seed} {item}".encode(), digest_size=8).digest()) % count


def region_prompt(version: int, mode: Mode, category: str) -> str:
    """What stage 2 asks about a crop, behind the context; only mode ``full`` names the class."""
    text = str(WORDING["region"][version].format(name=category if mode == "full" else "object"))
    return text[0].upper() + text[1:] if mode == "crop" else text


def context(caption: str) -> str:
    """How a prompt of stage 2 begins: alike for all regions of an image, so that an engine can reuse what it read."""
    return f"In the context of the entire image, {caption.strip().rstrip('.!,;: ')},"


def window(captions: Captions, region: Region, width: int, height: int) -> tuple[int, int, int, int]:
    """Half-open xyxy of a region's close-up in pixels of its image: margin and least size, as far as there is room."""
    x0, y0, x1, y1 = map(float, region.bounds(width, height))
    sides = []
    for low, high, size in ((x0, x1, width), (y0, y1, height)):
        length = min(size, max((high - low) * (1 + 2 * captions.crop_margin), captions.crop_least))
        start = min(max((low + high - length) / 2, 0), size - length)
        sides.append((math.floor(start), min(size, math.ceil(start + length))))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def shrink(image: Image.Image, most: int) -> Image.Image:
    """The image, scaled down if its longer side is above ``most``; its aspect is kept."""
    scale = min(1.0, most / max(image.size))
    return image if scale == 1 else image.resize([max(1, round(side * scale)) for side in image.size])

"""What is captioned and asked: images, regions, close-ups, prompts, and the keys of answers (paper §3.3)."""

import tomllib
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt

from regiongpt.annotate.store import key_of
from regiongpt.data.instances import InstancesFile
from regiongpt.data.records import RecordRegion, region_row
from regiongpt.data.shards import CROWD, RecordSet, Rejects
from regiongpt.errors import ConfigError, DataError
from regiongpt.regions import Region
from regiongpt.settings import Settings

Mode = Literal["crop", "context", "full"]
MODES: Final[tuple[Mode, ...]] = ("crop", "context", "full")
WORDING: Final[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("wording.toml").read_text(encoding="utf-8"))
_MOST_TO_CHOOSE: Final = 60
"""Regions of an image up to which a caption is located back."""


class Plan(Settings):
    """What is asked about each region."""

    mode: Mode = "full"
    """a region's caption from its crop alone, with the global caption (context), or with the class name too (full)"""
    seed: NonNegativeInt = 0
    """of prompt versions and answers"""
    gallery: NonNegativeInt = 12
    """regions that are captioned in all three modes, to be shown side by side"""
    locate_back: bool = False
    """ask which of all regions each caption describes"""


class Closeup(Settings):
    """How the picture of a region is cut out of its image."""

    crop_margin: float = Field(0.15, ge=0, le=4)
    """context around a region on each side, as a share of its box"""
    crop_least: int = Field(48, ge=1)
    """least side of a crop in pixels, as far as the image has them; smaller regions get more context"""
    crop_most: int = Field(768, ge=16)
    """longest side of what a model is shown in pixels; larger crops and images are scaled down"""

    def window(self, region: Region, width: int, height: int) -> tuple[int, int, int, int]:
        """Half-open xyxy of a region's crop, in pixels of its image."""
        x0, y0, x1, y1 = map(float, region.bounds(width, height))
        sides = []
        for low, high, size in ((x0, x1, width), (y0, y1, height)):
            half = max((high - low) * (0.5 + self.crop_margin), self.crop_least / 2)
            middle = min(max((low + high) / 2, min(half, size / 2)), max(size - half, size / 2))
            sides.append((max(0, int(middle - half)), min(size, -int(-(middle + half) // 1))))
        (left, right), (top, bottom) = sides
        return left, top, right, bottom

    def crop(self, image: Image.Image, region: Region) -> Image.Image:
        """The close-up of a region."""
        return self.shrink(image.crop(self.window(region, *image.size)))

    def shrink(self, image: Image.Image) -> Image.Image:
        """The image, scaled down if its longer side is above ``crop_most``; its aspect is kept."""
        scale = min(1.0, self.crop_most / max(image.size))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return image if scale == 1 else image.resize(size)


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
    regions there are, ``places`` how many images, ``rejects`` what could not be used, by kind.

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
            self.count, self.places = self._held.manifest.counts.get("regions", 0), len(self._held)
        else:
            self._held = InstancesFile(
                regions, self.rejects, shapes="both", folder=images, check="missing",
                crowds="take" if crowds else "leave out",
            )  # fmt: skip
            self.count, self.places = len(self._held.ids), len(self._held.paths)
        if not self.count:
            told = f": {self.rejects.summary()}; the last: {self.rejects.last}" if self.rejects.counts else ""
            hint = "; --crowds takes what is marked as a crowd" if self.rejects.counts[CROWD] else ""
            raise DataError(f"--regions {regions}: no region that can be captioned{told}{hint}")

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

    ``key`` is that of its answer, ``locate`` and ``score`` those of where it is located back to and of its similarity.
    """

    key: bytes
    number: int
    mode: Mode
    version: int
    locate: bytes | None = None
    score: bytes | None = None


def keys_of(asks: list[Ask]) -> list[bytes]:
    """The keys of everything that belongs to captions."""
    return [key for ask in asks for key in (ask.key, ask.locate, ask.score) if key is not None]


class Wanted:
    """Lists what a run, as its store notes it, asks about images; the gallery is drawn from ``places`` of them.

    Keys are made of image content, region, class, prompt, captioner and settings.
    """

    def __init__(self, noted: Mapping[str, Any], places: int) -> None:
        self.plan, self.scorer = Plan(**noted["plan"]), noted["scorer"]
        # Mode and seed are in each key by themselves, and a region is the same in whatever file it stands.
        left_out = ("mode", "seed", "regions")
        self.settings = {name: value for name, value in noted["fingerprint"].items() if name not in left_out}
        rng = np.random.default_rng((self.plan.seed, 1))
        shown = rng.permutation(places)[: self.plan.gallery].tolist()
        self._gallery = dict(zip(shown, rng.integers(0, 2**31, len(shown)).tolist(), strict=True))

    def asks(self, digest: str, item: Item) -> list[Ask]:
        """All that is asked about an image, known by its hash; the global caption first, where it is needed."""
        mode, seed, asks = self.plan.mode, self.plan.seed, []
        choosing = self.plan.locate_back and len(item.regions) <= _MOST_TO_CHOOSE
        shown = self._gallery[item.place] % len(item.regions) if item.place in self._gallery else -1
        for number, each in enumerate(item.regions):
            where = region_row(each.region)
            version = draw(seed, f"{digest} {where} {each.category}", len(WORDING["region"]))
            for each_mode in MODES if number == shown else (mode,):
                prompt = (digest, where, each.category, each_mode, WORDING["region"][version])
                ask = Ask(key_of("region", *prompt, self.settings, seed), number, each_mode, version)
                if each_mode == mode:
                    locate = key_of("locate", ask.key.hex()) if choosing else None
                    score = key_of("score", ask.key.hex(), self.scorer) if self.scorer else None
                    ask = ask._replace(locate=locate, score=score)
                asks.append(ask)
        if all(ask.mode == "crop" for ask in asks):
            return asks
        version = draw(seed, digest, len(WORDING["image"]))
        return [
            Ask(key_of("image", digest, WORDING["image"][version], self.settings, seed), -1, "full", version),
            *asks,
        ]


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

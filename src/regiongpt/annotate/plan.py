"""Images, regions, crops, prompts and the keys of answers (paper §3.3)."""

import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from regiongpt.annotate.options import MODES, Mode, Options
from regiongpt.data.records import Record, region_row
from regiongpt.data.sources import AnnotatedImages
from regiongpt.storage import Store, digest, sha256

WORDING: Final[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("wording.toml").read_text(encoding="utf-8"))
Stage = Literal["image", "region", "locate", "score"]
Value = dict[str, Any]


class Ask(NamedTuple):
    """One thing to find out: a caption of the image or of a region, or what the region's caption is worth."""

    key: str  # of the answer; what is asked about a caption has the caption's key, a space and more
    stage: Stage
    number: int  # of the region from 0, -1 for the image
    mode: Mode
    version: int  # of the prompt


class Work(NamedTuple):
    """An image, all that is asked about it, and the values there are."""

    record: Record
    image: str  # SHA-256, "" where the file cannot be read
    asks: list[Ask]  # the global caption first, where it is needed
    known: dict[str, Value]  # by key; one with an ``error`` is a failure, the last of its ``tries``

    def todo(self) -> dict[str, Ask]:
        """All that has no answer, by key."""
        return {ask.key: ask for ask in self.asks if "error" in self.known.get(ask.key, {"error": ""})}


def works(
    source: AnnotatedImages, store: Store, options: Options, noted: Mapping[str, Any], write: bool
) -> Iterator[Work]:
    """All images with what the store knows about each; with ``write`` it notes the hashes of new or changed ones."""
    left_out = ("mode", "seed", "regions")  # in each key by themselves, or of no matter
    settings = digest({name: value for name, value in noted["fingerprint"].items() if name not in left_out})
    for record in source:
        path, image = source.images / record.image, ""
        with suppress(OSError):
            status = os.stat(path)
            key = digest("file", record.image, status.st_size, status.st_mtime_ns)
            if not (hashed := store.get([key])):
                hashed = {key: {"image": sha256(path)}}
                if write:
                    store.add(hashed)
            image = hashed[key]["image"]
        asks = _asks(options, settings, noted["scorer"], image, record)
        yield Work(record, image, asks, store.get([ask.key for ask in asks]))


def _asks(options: Options, settings: str, scorer: str, image: str, record: Record) -> list[Ask]:
    """All that is asked about an image; keys are of image content, region, class, prompt, captioner and settings."""
    seed, asks = options.seed, []
    # The gallery shows a region of each of the first images.
    shown = draw(seed, image, len(record.regions)) if int(record.id) < options.gallery else -1
    for number, each in enumerate(record.regions):
        where = region_row(each.region)
        version = draw(seed, f"{image} {where} {each.category}", len(WORDING["region"]))
        for mode in MODES if number == shown else (options.mode,):
            key = digest("region", image, where, each.category, mode, WORDING["region"][version], settings, seed)
            asks.append(Ask(key, "region", number, mode, version))
            if mode == options.mode and options.locate_back:
                asks.append(Ask(f"{key} locate", "locate", number, mode, version))
            if mode == options.mode and scorer:
                asks.append(Ask(f"{key} {scorer}", "score", number, mode, version))
    if any(ask.mode != "crop" for ask in asks):
        version = draw(seed, image, len(WORDING["image"]))
        key = digest("image", image, WORDING["image"][version], settings, seed)
        asks.insert(0, Ask(key, "image", -1, "full", version))
    return asks


def draw(seed: int, item: str, count: int) -> int:
    """A number below ``count`` that only the seed and the item decide."""
    return int.from_bytes(blake2b(f"{seed} {item}".encode(), digest_size=8).digest()) % count


def region_prompt(version: int, mode: Mode, category: str) -> str:
    """The stage 2 question about a crop, after the context; only mode ``full`` names the class."""
    text = str(WORDING["region"][version].format(name=category if mode == "full" else "object"))
    return text[0].upper() + text[1:] if mode == "crop" else text


def context(caption: str) -> str:
    """Start of a stage 2 prompt, the same for all regions of an image so that an engine can reuse its cache."""
    return f"In the context of the entire image, {caption.strip().rstrip('.!,;: ')},"

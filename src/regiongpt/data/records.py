"""One training record: an image, regions of it, and turns about them; what every source yields and training reads.

A turn without a question is worded when read, by one of ten paraphrases, by (seed, epoch, index). Paper: §3.2, §4
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import numpy as np

from regiongpt.errors import DataError, RegionError
from regiongpt.prompts import IMAGE_TOKEN, check_placeholders, question
from regiongpt.regions import Region

SCHEMA_VERSION: Final = 1
"""Increased when a reader of the old schema could misread the new one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordRegion:
    """One region of a record, in pixels of its image, with its class and its id in the source if they are known."""

    region: Region
    category: str = ""
    source_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One question and its answer, in which ``<regionN>`` stands for a region of the record."""

    task: str  # a key of prompts.QUESTIONS, or "chat" for a question that stands as it is
    answer: str
    question: str = ""  # as it stands, without <image>; "" to have it worded by the task
    regions: tuple[int, ...] = ()  # numbers from 1 of the regions in the wording, in order
    expression: str = ""  # what to find, for "locate"
    category: str = ""  # the class asked for, for "presence"
    label_set: str = ""  # the closed set named in the suffix of "classify"
    guided: bool = False  # whether the suffix that fixes the format of the answer is added (paper Table 1)

    def text(self, wording: int, suffixes: bool = True) -> str:
        """The question in one of its wordings, without suffix if not ``suffixes``; DataError if its task needs more."""
        if self.question:
            return self.question
        needs = {"expression": self.expression, "category": self.category, "label_set": self.label_set}
        return question(self.task, wording, regions=self.regions, guided=self.guided and suffixes, **needs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image and a conversation about it; docs/data.md says more of the fields."""

    id: str  # unique in its folder, and the same whenever the same source is converted
    source: str
    image: str  # path below the images' folder, with forward slashes; "" for a conversation without one
    width: int  # pixels, 0 without an image
    height: int
    regions: tuple[RecordRegion, ...]  # what <region1>, <region2>, ... stand for
    turns: tuple[Turn, ...]  # at least one

    @property
    def task(self) -> str:
        """The task of the turns, ``"mixed"`` where they differ."""
        tasks = {turn.task for turn in self.turns}
        return tasks.pop() if len(tasks) == 1 else "mixed"

    def check(self, regions: bool = True) -> None:
        """Make sure that a model can learn from the record, with or without looking at its regions, which is slow.

        Raises:
            RegionError: A region makes no sense in the image, or a placeholder has no region.
            DataError: There is no turn, a turn has no answer or lacks what its task needs, or regions have no image.
        """
        if not self.turns:
            raise DataError("expected at least one turn, got none")
        if self.regions and not self.image:
            raise DataError("expected an image for the regions, got none")
        if self.image and (self.width < 1 or self.height < 1):
            raise DataError(f"expected the image's size, got {self.width} x {self.height} (W x H)")
        for number, each in enumerate(self.regions if regions else (), 1):
            each.region.check(self.width, self.height, f"<region{number}>")
        for number, turn in enumerate(self.turns, 1):
            if not turn.answer.strip():
                raise DataError(f"turn {number}: expected an answer, got an empty one")
            _check_turn(turn, len(self.regions))

    def messages(self, seed: int, epoch: int, index: int, suffixes: bool = True) -> list[dict[str, str]]:
        """The conversation as chat messages, worded by the seed, the epoch and the record's place in its folder."""
        wordings = np.random.default_rng((seed, epoch, index)).integers(0, 2**31, len(self.turns))
        said: list[dict[str, str]] = []
        for turn, wording in zip(self.turns, wordings.tolist(), strict=True):
            said.append({"role": "user", "content": turn.text(wording, suffixes)})
            said.append({"role": "assistant", "content": turn.answer})
        if self.image:
            said[0]["content"] = f"{IMAGE_TOKEN}\n{said[0]['content']}"
        return said

    def row(self) -> dict[str, Any]:
        """The record as a row of the schema: plain lists, numbers and strings."""
        regions = [
            {**region_row(each.region), "category": each.category, "source_id": each.source_id} for each in self.regions
        ]
        turns = [{name: getattr(turn, name) for name in Turn.__slots__} for turn in self.turns]
        whole = {name: getattr(self, name) for name in ("id", "source", "task", "image", "width", "height")}
        return {**whole, "regions": regions, "turns": turns}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Record":
        """The record of a row; DataError if that is not of the schema."""
        try:
            regions = [
                RecordRegion(region=region_of_row(each), category=each["category"], source_id=each["source_id"])
                for each in row["regions"]
            ]
            turns = [Turn(**{**each, "regions": tuple(each["regions"])}) for each in row["turns"]]
            plain = {name: row[name] for name in ("id", "source", "image", "width", "height")}
            return cls(**plain, regions=tuple(regions), turns=tuple(turns))
        except (KeyError, TypeError, ValueError, RegionError) as error:
            told = f"not a record of schema version {SCHEMA_VERSION} ({error!r}); convert the source again"
            raise DataError(told) from error


@lru_cache(maxsize=1 << 12)
def _check_turn(turn: Turn, n_regions: int) -> None:
    """Raises as :meth:`Record.check` does for a turn's placeholders; a closed set repeats its questions."""
    check_placeholders([turn.text(0), turn.answer], n_regions)


def region_row(region: Region) -> dict[str, Any]:
    """A region as columns: ``kind``; ``coordinates`` of a vector, ``size`` (H, W) and ``counts`` of pixels.

    The coordinates are rows of numbers: one of a box, one a ring, one of a point with its radius, two of a scribble
    with its width.
    """
    (kind, value), *rest = region.to_dict().items()
    stroke = [number for _, number in rest if number is not None]
    row: dict[str, Any] = {"kind": kind, "coordinates": [], "size": [], "counts": ""}
    if kind == "box":
        if rest:
            raise RegionError("a record holds boxes in pixels; multiply a normalized one by the image's size")
        row["coordinates"] = [list(value)]
    elif kind == "polygon":
        row["coordinates"] = [list(chain.from_iterable(ring)) for ring in value]
    elif kind == "point":
        row["coordinates"] = [[*value, *stroke]]
    elif kind == "scribble":
        row["coordinates"] = [list(chain.from_iterable(value)), *([stroke] if stroke else [])]
    else:
        row |= {"size": list(value["size"]), "counts": value["counts"]}
    return row


def region_of_row(row: Mapping[str, Any]) -> Region:
    """The region of such columns; raises RegionError or ValueError for what is none."""
    kind, rows = row["kind"], row["coordinates"]
    if kind in ("mask", "rle"):
        return Region.from_dict({kind: {"size": list(row["size"]), "counts": row["counts"]}})
    if kind == "box":
        return Region.box(*rows[0], normalized=False)
    if kind == "polygon":
        return Region.polygon([list(ring) for ring in rows])
    if kind == "point":
        return Region.point(*rows[0])
    if kind == "scribble":
        return Region.scribble(list(rows[0]), *(rows[1] if len(rows) > 1 else ()))
    raise ValueError(f"expected a kind of region, got {kind!r}")

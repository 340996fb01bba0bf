"""A benchmark: questions about images, and scores of the answers; neither needs a model."""

import math
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.shards import Rejects, many
from regiongpt.errors import DataError
from regiongpt.evaluate.bootstrap import Statistic, interval
from regiongpt.regions import Region
from regiongpt.settings import Settings
from regiongpt.storage import digest, finite

RESAMPLES: Final = 1000
"""Default number of bootstrap resamples."""
SIZES: Final = (("small", 32.0**2), ("medium", 96.0**2), ("large", float("inf")))
"""COCO's object sizes: name, and the area in px^2 below which it applies."""
OURS: Final = "RegionGPT-7B"
"""The paper's model in its tables."""
Rows = list[list[str]]
"""A table of text, its header first."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a benchmark."""

    id: str  # in the benchmark's own numbering, such as an annotation id; unique
    image: Path
    image_id: int | str  # items of one image are resampled together
    question: str  # the user's text with <regionN>, without <image>
    size: tuple[int, int] | None = None  # annotated W x H; items of images of another size are left out
    regions: tuple[Region, ...] = ()  # what the placeholders stand for, in pixels of the image
    choices: tuple[str, ...] = ()  # answers to score by likelihood, in this order
    expression: str = ""  # score how likely the model calls each region by it
    max_new_tokens: int = 32
    truth: str = ""  # the right answer in words: a class name, Region [2], yes; the first reference
    groups: Mapping[str, str] = field(default_factory=dict)  # what results are broken down by: {"size": "small"}
    detail: Mapping[str, Any] = field(default_factory=dict)  # what the task itself needs for scoring, as plain JSON

    @property
    def regions_key(self) -> str:
        """A digest of the regions that an answer by number is about; empty for fewer than two."""
        return digest([region.to_dict() for region in self.regions])[:12] if len(self.regions) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to an item; None for what is unknown or was not requested.

    Raises:
        DataError: A number is not finite, or the probability lies outside [0, 1].
    """

    text: str | None = None
    probability: float | None = None  # probability of the text and its end
    scores: tuple[float, ...] | None = None  # one per choice of the item, in order; larger is better
    called: tuple[float, ...] | None = None  # log likelihood that each region is called by the item's expression

    def __post_init__(self) -> None:
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise DataError(f"probability: {self.probability} is not between 0 and 1")
        for score in (*(self.scores or ()), *(self.called or ())):
            if not math.isfinite(score):
                raise DataError(f"scores: {score} is not a finite number")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without what is not known."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Answer":
        """The inverse of :meth:`to_dict`; other keys are ignored."""
        lists = {name: tuple(map(float, values[name])) for name in ("scores", "called") if name in values}
        return cls(text=values.get("text"), probability=values.get("probability"), **lists)


class Scored(NamedTuple):
    """Results of one protocol."""

    statistics: Mapping[str, Statistic]  # by result, such as "accuracy"
    scores: Mapping[str, Sequence[float | None]]  # by result, of each item; None where there is nothing to say of it
    of: Mapping[str, int] = {}  # how many items a result is about, where that is not all that have a score
    by_group: Mapping[str, Mapping[str, Mapping[str, float | None]]] = {}  # besides mean scores, by kind and group


class Measured(NamedTuple):
    """Results of a task."""

    protocols: Mapping[str, Scored]
    pinned: Mapping[str, str]  # what has to be equal for two results to be comparable: split, grouping, scorer, ...
    notes: Sequence[str] = ()  # sentences that belong beside the results
    tables: Mapping[str, Rows] = {}  # for the page of results, such as a confusion matrix, by their titles


class Result(NamedTuple):
    """The scores of one task."""

    data: dict[str, Any]  # as plain JSON, what result.json holds
    rows: list[dict[str, Any]]  # one JSON object an item, its scores under "protocol.result"
    statistics: Mapping[str, Mapping[str, Statistic]]  # by protocol and result, for comparisons


class Task(Settings, ABC):
    """One benchmark; its fields are the options of the command."""

    name: ClassVar[str]
    summary: ClassVar[str]
    item_id: ClassVar[str]  # what an item's id is, for messages: "annotation id"
    reads: ClassVar[tuple[str, ...]] = ("text",)  # what is scored of an answer, any of text, scores, called
    by: ClassVar[tuple[str, ...]] = ()  # groups of the items that mean scores are broken down by
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {}  # its results by protocol and name, as shares of 1

    data: Path
    """Folder of the data set with the files below."""
    limit: int = Field(default=0, ge=0)
    """Use only the first N images; 0 for all."""
    seed: int = Field(default=0, ge=0)
    """Random seed."""

    @abstractmethod
    def inputs(self) -> list[Path]:
        """The annotation files that are read, for the manifest; images are not among them."""

    @abstractmethod
    def read_items(self) -> list[Item]:
        """All items, in an order determined by files and options."""

    @abstractmethod
    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """Score answers under every protocol that they allow."""

    def items(self) -> list[Item]:
        """The items of the first ``limit`` images; raises as :meth:`read_items` does."""
        self.left_out.counts.clear()
        items = self.read_items()
        first = set(list(dict.fromkeys(item.image_id for item in items))[: self.limit or None])
        return [item for item in items if item.image_id in first]

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        """Score answers by item id; an item without one counts as wrong, and is noted.

        Args:
            items: What :meth:`items` gave, or some of them.
            answers: By item id.
            resamples: Bootstrap resamples; 0 for no intervals.
            seed: Bootstrap seed.

        Raises:
            DataError: An answer does not fit its item.
        """
        for item in items:
            given = answers.get(item.id, Answer())
            counts = len(item.choices or item.detail.get("ids", ())), len(item.regions)
            for name, values, count in zip(("scores", "called"), (given.scores, given.called), counts, strict=True):
                if values is not None and len(values) != count:
                    raise DataError(f"item {item.id}: {len(values)} {name}, not {count}")
        measured = self.measure(items, answers)
        if not measured.protocols:
            raise DataError(f"no item has an answer to score, any of {', '.join(self.reads)}")
        protocols: dict[str, Any] = {}
        breakdowns: dict[str, Any] = {}
        scores: dict[str, Sequence[float | None]] = {}
        for protocol, scored in measured.protocols.items():
            places = [k for k in range(len(items)) if any(each[k] is not None for each in scored.scores.values())]
            protocols[protocol] = {
                name: {
                    "value": finite(statistic.value()),
                    "of": scored.of.get(name, len(places)),
                    # What chance gives is known, not measured.
                    "interval": _interval(statistic, resamples, seed) if name != "chance" else None,
                    "paper": self.paper.get(protocol, {}).get(name),
                }
                for name, statistic in scored.statistics.items()
            }
            found = {key: _breakdown(items, places, key, scored) for key in self.by}
            breakdowns[protocol] = {key: groups for key, groups in found.items() if groups}
            scores |= {f"{protocol}.{name}": each for name, each in scored.scores.items()}
        notes = []
        if missing := [item.id for item in items if item.id not in answers]:
            those = f"{len(missing)} of {many(len(items), 'item')} {'has' if len(missing) == 1 else 'have'}"
            notes.append(f"{those} no answer and count as wrong ({self.item_id}s {listed(missing)})")
        if self.left_out.counts:
            notes.append(f"annotations not asked about: {self.left_out.listed()}")
        data = {
            "task": self.name,
            "pinned": dict(measured.pinned),
            "protocols": protocols,
            "breakdowns": breakdowns,
            "paper": "; ".join(f"{each.number}, {each.data}" for each in TABLES.values() if each.task == self.name),
            "notes": [*notes, *measured.notes],
            "tables": dict(measured.tables),
        }
        rows = []
        for place, item in enumerate(items):
            row: dict[str, Any] = {
                "id": item.id,
                "image_id": item.image_id,
                "image": item.image.name,
                "question": item.question,
            }
            row |= {"truth": item.truth, "answer": answers.get(item.id, Answer()).text, "groups": dict(item.groups)}
            row["missing"] = item.id not in answers
            if len(item.regions) > 1:  # the number of a region means something only beside the regions
                row["regions"] = [region.to_dict() for region in item.regions]
            row["scores"] = {name: each[place] for name, each in scores.items() if each[place] is not None}
            rows.append(row)
        return Result(data, rows, {name: scored.statistics for name, scored in measured.protocols.items()})

    def options(self, change: Callable[[Path], object]) -> dict[str, Any]:
        """The options, each path in them changed."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: change(value) if isinstance(value, Path) else value for name, value in values.items()}

    @cached_property
    def left_out(self) -> Rejects:
        """Entries that :meth:`items` could not use, counted by kind."""
        return Rejects()


def _interval(statistic: Statistic, resamples: int, seed: int) -> list[float] | None:
    if not resamples or len(statistic.clusters) < 2:
        return None
    low, high = interval(statistic, min(resamples, statistic.most_resamples), seed)
    return [low, high] if low == low else None


def _breakdown(items: Sequence[Item], places: Sequence[int], key: str, scored: Scored) -> dict[str, dict[str, Any]]:
    """Mean scores of the items of each group: sizes in their order, other groups the largest first."""
    groups: dict[str, list[int]] = {}
    for k in places:
        if key in items[k].groups:
            groups.setdefault(items[k].groups[key], []).append(k)
    order = [name for name, _ in SIZES]
    found: dict[str, dict[str, Any]] = {}
    for group in sorted(groups, key=lambda name: (order.index(name) if name in order else 3, -len(groups[name]))):
        means: dict[str, float | None] = {}
        for name, each in scored.scores.items():
            own = [value for k in groups[group] if (value := each[k]) is not None]
            means[name] = float(np.mean(own)) if own else None
        found[group] = {**means, **scored.by_group.get(key, {}).get(group, {}), "items": len(groups[group])}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What the paper prints


class PaperTable(NamedTuple):
    """One of the paper's tables, or its part about one data set; None for a dash."""

    number: str
    title: str
    data: str
    columns: tuple[str, ...]
    rows: Mapping[str, list[float | None]]
    note: str = ""
    task: str = ""


TABLES: Final = {
    name: PaperTable(**{**values, "rows": finite(values["rows"])})
    for name, values in tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8")).items()
}
"""Tables 3-8, from ``paper.toml``."""


def printed(table: str, **columns: str) -> dict[str, float]:
    """The paper's own results, as shares of 1, by the name that they have here."""
    found = dict(zip(TABLES[table].columns, TABLES[table].rows[OURS], strict=True))
    return {name: value / 100 for name, column in columns.items() if (value := found[column]) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# What tasks share


class InstancesTask(Task):
    """A benchmark on an instances file in COCO's format."""

    wanted: ClassVar[str] = "annotations"

    split: str = "val2017"
    """Split of the annotations: instances_SPLIT.json."""
    annotations: Path | None = None
    """Annotations file, if not in the folder."""
    images: Path | None = None
    """Folder of the images, if not in the folder."""

    @property
    def file(self) -> Path:
        """The annotations file."""
        names = [f"annotations/instances_{self.split}.json", f"instances_{self.split}.json", f"{self.split}.json"]
        return find(self.annotations, self.data, names, self.wanted, "annotations")

    @property
    def folder(self) -> Path:
        """The folder of the images."""
        return find(self.images, self.data, [self.split, "images", "."], "images", "images", file=False)


class AnnotatedTask(Task):
    """A benchmark whose questions are made from COCO's annotations."""

    split: str = "dev"
    """instances_SPLIT.json in the folder, with images/."""

    def inputs(self) -> list[Path]:
        """The annotations."""
        return [source.instances for source in photo_sources(self.data, self.split)]

    def annotated(self) -> list[ImageAnnotations]:
        """The images with their objects."""
        data = load_coco(photo_sources(self.data, self.split))
        self.left_out.counts.update(data.skipped)
        return list(data.images)


def find(given: Path | None, folder: Path, names: Iterable[str], what: str, flag: str, *, file: bool = True) -> Path:
    """The path given, or the first of the names in the folder.

    Raises:
        DataError: There is none; the message calls it ``what``, and names the option ``flag``.
    """
    tried = [given] if given is not None else [folder / name for name in names]
    for path in tried:
        if path.is_file() if file else path.is_dir():
            return path
    raise DataError(f"found no {what} at {' or '.join(map(str, tried))}; check the path, or give --{flag}")


def given(items: Sequence[Item], answers: Mapping[str, Answer], kind: str) -> list[Any]:
    """The ``text``, ``probability``, ``scores`` or ``called`` of each item's answer; None where there is none."""
    return [getattr(answers.get(item.id), kind, None) for item in items]


def images_of(items: Sequence[Item]) -> list[Hashable]:
    """The image of each item, as statistics take them."""
    return [item.image_id for item in items]


def size_name(area: float | Sequence[float]) -> str:
    """COCO's word for the size of an object: of an area in px^2, or of an xyxy box."""
    if not isinstance(area, float | int):
        area = (area[2] - area[0]) * (area[3] - area[1])
    return next(name for name, above in SIZES if area < above)


def listed(values: Sequence[object], most: int = 5) -> str:
    """The first few values, and how many more there are."""
    shown = ", ".join(str(value) for value in values[:most])
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown


class RunOptions(Settings):
    """Options of a run, for all tasks."""

    out: Path | None = None
    """Folder of the results; run the same command again to resume."""
    model: Path | None = None
    """Checkpoint folder; default: nano."""
    device: str | None = None
    """cuda, mps or cpu; default: the first available."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: float32 on the CPU, else bfloat16."""
    untrained: bool = False
    """Allow a checkpoint that has not been trained."""
    detail: Literal["fast", "careful"] = "fast"
    """fast, or careful: also encode each region's own crop, if the model was trained for it."""
    predictions: Path | None = None
    """Score the answers in this file; no model is run."""
    missing: Literal["refuse", "wrong"] = "refuse"
    """With --predictions: items without an answer are an error, or wrong."""
    resamples: int = Field(default=RESAMPLES, ge=0, le=1_000_000)
    """Bootstrap resamples; 0 for no intervals."""
    gallery: int = Field(default=24, ge=0)
    """Worst mistakes to show on the page."""
    overwrite: bool = False
    """Replace existing results in --out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        without = self.predictions is None
        for name in ("missing",) if without else ("model", "device", "dtype", "untrained", "detail"):
            if name in self.model_fields_set:
                why = "it goes with --predictions" if without else "no model is run for --predictions"
                raise ValueError(f"--{name}: {why}; leave it out")
        return self

"""What a benchmark is: questions about images, and how answers to them are scored; neither needs a model."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from regiongpt.data.shards import Rejects, many
from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.bootstrap import Statistic, interval, mean_statistic
from regiongpt.evaluate.metrics.detection import PrecisionStatistic
from regiongpt.regions import Region
from regiongpt.settings import Settings
from regiongpt.storage import digest

RESAMPLES: Final = 1000
"""Bootstrap resamples behind an interval, by default."""
MOST_PRECISIONS: Final = 200
"""Most resamples of an average precision, each of which costs as much as matching a whole set."""
SIZES: Final = (("small", 32.0**2), ("medium", 96.0**2), ("large", float("inf")))
"""COCO's sizes of objects: name, and the area in px^2 below which it applies."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a benchmark.

    Args:
        id: In the benchmark's own numbering, such as an annotation id; unique.
        image: Image file.
        image_id: Items of one image are resampled together.
        question: The user's text with ``<regionN>``, without ``<image>``.
        size: Width and height in pixels that the annotations state; items of images of another size are left out.
        regions: What the placeholders stand for, in pixels of the image.
        choices: Answers to score by likelihood, in this order.
        expression: Score how likely the model calls each region by it; empty for no such score.
        generate: Whether a free answer is wanted.
        max_new_tokens: Longest free answer, in tokens.
        truth: The right answer as a person would say it: a class name, ``Region [2]``, ``yes``; the first reference.
        groups: What results are broken down by: ``{"category": "dog", "size": "small"}``.
        detail: What the task itself needs for scoring, as plain JSON.
    """

    id: str
    image: Path
    image_id: int | str
    question: str
    size: tuple[int, int] | None = None
    regions: tuple[Region, ...] = ()
    choices: tuple[str, ...] = ()
    expression: str = ""
    generate: bool = True
    max_new_tokens: int = 32
    truth: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def regions_key(self) -> str:
        """A digest of the regions that an answer by number is about; empty for fewer than two."""
        return digest([region.to_dict() for region in self.regions])[:12] if len(self.regions) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to an item; what was not asked for, or is not known, is None.

    Args:
        text: The free answer.
        probability: Of that text and its end, in [0, 1].
        scores: Of the item's choices, in their order; larger is better.
        called: Log likelihood that each of the item's regions is called by the item's expression.

    Raises:
        DataError: A number is not finite, or the probability lies outside [0, 1].
    """

    text: str | None = None
    probability: float | None = None
    scores: tuple[float, ...] | None = None
    called: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise DataError(f"probability: {self.probability} is not between 0 and 1")
        for score in (*(self.scores or ()), *(self.called or ())):
            if not math.isfinite(score):
                raise DataError(f"scores: {score} is no finite number")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without what is not known."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Answer":
        """The inverse of :meth:`to_dict`; other keys are ignored."""
        lists = {name: tuple(map(float, values[name])) for name in ("scores", "called") if name in values}
        return cls(text=values.get("text"), probability=values.get("probability"), **lists)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a result.

    Attributes:
        value: In [0, 1], CIDEr in [0, 10]; None where there is nothing to measure.
        of: How many items it is about.
        interval: 95 % of the bootstrap resamples of the images; None where none was drawn.
    """

    value: float | None
    of: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for the page of results, such as a confusion matrix."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]


Figures = Mapping[str, Figure]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The scores of one task.

    Attributes:
        task: Its name.
        pinned: What has to be equal for two results to be comparable, by name: split, grouping, scorer, ...
        protocols: Figures by protocol and name.
        breakdowns: By protocol, then ``"size"``, ``"category"``, ..., then group: figures by name.
        rows: One JSON object per item, its ``scores`` under ``"protocol.figure"``.
        tables: For the page of results.
        notes: Sentences that belong beside the results, such as how many answers were missing.
        statistics: By protocol and figure, for bootstrap intervals and comparisons.
    """

    task: str
    pinned: Mapping[str, str]
    protocols: Mapping[str, Figures]
    breakdowns: Mapping[str, Mapping[str, Mapping[str, Figures]]] = field(default_factory=dict)
    rows: tuple[dict[str, Any], ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, Mapping[str, Statistic]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without rows and statistics."""
        names = ("task", "pinned", "protocols", "breakdowns", "tables", "notes")
        return {name: _plain(getattr(self, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, Figure | Table):
        return dataclasses.asdict(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a protocol makes of the answers.

    Attributes:
        statistics: By figure.
        scores: By figure, a number for each item; None where the protocol says nothing about it.
        of: How many items a figure is about, by its name; all that have a score by default.
        breakdowns: Besides those that the task's ``by`` gives.
    """

    statistics: Mapping[str, Statistic]
    scores: Mapping[str, Sequence[float | None]]
    of: Callable[[str], int] | None = None
    breakdowns: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a task makes of the answers: see :class:`Result`."""

    protocols: Mapping[str, Scored]
    pinned: Mapping[str, str]
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()


class Task(Settings, ABC):
    """One benchmark; its fields are the options of the command.

    Attributes:
        name: On the command line.
        summary: One line of help.
        item_id: What an item's id is, for messages: ``"annotation id"``.
        reads: What is scored of an :class:`Answer`, any of ``text``, ``scores``, ``called``.
        by: Groups of the items that mean scores are broken down by.
        paper: The paper's results by protocol and figure, in the unit of :class:`Figure`.
        paper_source: Where in the paper they are, and what they were measured on.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    item_id: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("text",)
    by: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    paper_source: ClassVar[str] = ""

    data: Path
    """Folder of the data set; the files below are looked for in it."""
    limit: int = Field(default=0, ge=0)
    """Only the first so many images that are asked about; 0 for all."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random choice."""

    @abstractmethod
    def inputs(self) -> list[Path]:
        """The annotation files that are read, for the manifest; images are not among them."""

    @abstractmethod
    def read_items(self) -> list[Item]:
        """All items, in an order that files and options alone decide.

        Raises:
            DataError: A file is missing or of another format, or has nothing to ask about.
            ConfigError: An option does not fit the files, or what scoring needs is not installed.
        """

    @abstractmethod
    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """What is to be said of answers.

        Raises:
            DataError: An answer does not fit its item, such as scores for another number of choices.
        """

    def items(self) -> list[Item]:
        """The items of the first ``limit`` images; raises as :meth:`read_items` does."""
        self.left_out.counts.clear()
        items = self.read_items()
        first = set(list(dict.fromkeys(item.image_id for item in items))[: self.limit or None])
        return [item for item in items if item.image_id in first]

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        """Score answers.

        Args:
            items: What :meth:`items` gave, or some of them.
            answers: By item id; an item without one counts as wrong, and is noted.
            resamples: Of the bootstrap; 0 for no intervals. What chance would give has none.
            seed: Of the bootstrap.

        Raises:
            DataError: As :meth:`measure` does.
        """
        measured = self.measure(items, answers)
        figures, breakdowns = {}, {}
        scores: dict[str, Sequence[float | None]] = {}
        for protocol, scored in measured.protocols.items():
            places = [k for k in range(len(items)) if any(each[k] is not None for each in scored.scores.values())]
            figures[protocol] = {
                name: figure(each, scored.of(name) if scored.of else len(places), resamples * (name != "chance"), seed)
                for name, each in scored.statistics.items()
            }
            own = [items[k] for k in places]
            values = {name: [each[k] or 0.0 for k in places] for name, each in scored.scores.items()}
            means = {key: by_group(own, key, partial(_means, own, values)) for key in self.by}
            breakdowns[protocol] = {key: each for key, each in {**means, **scored.breakdowns}.items() if each}
            scores |= {f"{protocol}.{name}": each for name, each in scored.scores.items()}
        notes = []
        if missing := [item.id for item in items if item.id not in answers]:
            count = f"{len(missing)} of {many(len(items), 'item')} {'has' if len(missing) == 1 else 'have'}"
            notes.append(f"{count} no answer and count as wrong ({self.item_id}s {listed(missing)})")
        if self.left_out.counts:
            notes.append(f"annotations not asked about: {self.left_out.listed()}")
        return Result(
            task=self.name,
            pinned=measured.pinned,
            protocols=figures,
            breakdowns=breakdowns,
            rows=tuple(_row(item, answers, scores, place) for place, item in enumerate(items)),
            tables=tuple(measured.tables),
            notes=(*notes, *measured.notes),
            statistics={name: scored.statistics for name, scored in measured.protocols.items()},
        )

    @property
    def split_read(self) -> str:
        """The split that the options name; empty where they name the files themselves."""
        return str(getattr(self, "split", ""))

    @cached_property
    def left_out(self) -> Rejects:
        """What :meth:`items` could not use, counted by kind."""
        return Rejects()

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in type(self).model_fields}


def _row(
    item: Item, answers: Mapping[str, Answer], scores: Mapping[str, Sequence[float | None]], place: int
) -> dict[str, Any]:
    return {
        "id": item.id,
        "image_id": item.image_id,
        "truth": item.truth,
        "answer": answers[item.id].text if item.id in answers else None,
        "groups": dict(item.groups),
        "missing": item.id not in answers,
        # The number of a region means something only beside the regions.
        **({"regions": [region.to_dict() for region in item.regions]} if len(item.regions) > 1 else {}),
        "scores": {name: values[place] for name, values in scores.items() if values[place] is not None},
    }


def figure(statistic: Statistic, of: int, resamples: int, seed: int) -> Figure:
    """A figure, without a value where there is nothing to measure, with its interval unless ``resamples`` is 0."""
    value = statistic.value() if statistic.clusters else float("nan")
    if np.isnan(value):
        return Figure(value=None, of=of)
    count = min(resamples, MOST_PRECISIONS) if isinstance(statistic, PrecisionStatistic) else resamples
    ends = interval(statistic, count, seed) if count and len(statistic.clusters) > 1 else None
    return Figure(value=value, of=of, interval=None if ends is None or np.isnan(ends).any() else ends)


def by_group(
    items: Sequence[Item], key: str, measure: Callable[[list[int]], Mapping[str, Figure]]
) -> dict[str, Mapping[str, Figure]]:
    """Figures of the items of each group, by their places: sizes in their order, other groups the largest first."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if key in item.groups:
            places.setdefault(item.groups[key], []).append(place)
    order = [name for name, _ in SIZES]
    names = sorted(places, key=lambda name: (order.index(name) if name in order else len(order), -len(places[name])))
    return {name: measure(places[name]) for name in names}


def _means(items: Sequence[Item], scores: Mapping[str, Sequence[float]], places: Sequence[int]) -> dict[str, Figure]:
    return {name: mean_figure(items, values, places) for name, values in scores.items()}


def mean_figure(items: Sequence[Item], scores: Sequence[float], places: Sequence[int]) -> Figure:
    """The mean score of the items at some places, without an interval."""
    statistic = mean_statistic([items[k].image_id for k in places], [scores[k] for k in places])
    return figure(statistic, len(places), 0, 0)


def listed(values: Sequence[object], most: int = 10) -> str:
    """The first few of some values, and how many more there are."""
    shown = ", ".join(str(value) for value in values[:most])
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown


class RunOptions(Settings):
    """How benchmarks are run, whatever the tasks."""

    out: Path | None = None
    """Folder of the results; the same command again goes on there."""
    model: Path | None = None
    """Checkpoint folder; otherwise the package's own model."""
    device: str | None = None
    """cuda, mps or cpu; otherwise the first of these there is."""
    dtype: str | None = None
    """float32, bfloat16 or float16; otherwise float32 on the CPU and bfloat16 elsewhere."""
    untrained: bool = False
    """Ask a checkpoint even if it has not been trained."""
    predictions: Path | None = None
    """Score these answers; no model is run."""
    missing: Literal["refuse", "wrong"] = "refuse"
    """With --predictions: what to do with items that have none."""
    unknown: Literal["refuse", "ignore"] = "refuse"
    """With --predictions: what to do with those for no item."""
    resamples: int = Field(default=RESAMPLES, ge=0, le=1_000_000)
    """Resamples of the bootstrap; 0 for no intervals."""
    gallery: int = Field(default=24, ge=0)
    """Worst mistakes on the page of results."""
    overwrite: bool = False
    """Replace other results in --out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.predictions is not None
        for name in ("model", "device", "dtype", "untrained") if given else ("missing", "unknown"):
            if name in self.model_fields_set:
                why = "no model is run for --predictions" if given else "it goes with --predictions"
                raise ValueError(f"--{name}: {why}; leave it out")
        return self

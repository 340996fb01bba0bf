"""A benchmark: questions about images, and scores of the answers; neither needs a model."""

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from regiongpt.data.reading import Row
from regiongpt.data.shards import Rejects, many
from regiongpt.drawing import Rows
from regiongpt.errors import DataError
from regiongpt.evaluate.bootstrap import Sampled, Statistic, resample
from regiongpt.inference.options import Look, ModelOptions
from regiongpt.regions import Region
from regiongpt.settings import Settings
from regiongpt.storage import digest, finite

RESAMPLES: Final = 1000
"""Default number of bootstrap resamples."""
SIZES: Final = (("small", 32.0**2), ("medium", 96.0**2), ("large", float("inf")))
"""COCO's object sizes: name, and the area in px^2 below which it applies."""
OURS: Final = "RegionGPT-7B"
"""The paper's model in its tables."""


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
    sure: bool = False  # whether the probability of the generated text is wanted
    max_new_tokens: int = 32
    truth: str = ""  # the right answer in words: a class name, Region [2], yes; the first reference
    groups: Mapping[str, str] = field(default_factory=dict)  # what results are broken down by: {"size": "small"}
    detail: Mapping[str, Any] = field(default_factory=dict)  # what the task itself needs for scoring

    @property
    def regions_key(self) -> str:
        """A digest of the regions that an answer by number is about; empty for fewer than two."""
        return digest([region.to_dict() for region in self.regions])[:12] if len(self.regions) > 1 else ""


class Answer(Row):
    """The answer to an item; None for what is unknown or was not requested."""

    model_config = ConfigDict(frozen=True, strict=False, extra="ignore", allow_inf_nan=False)

    text: str | None = None
    probability: float | None = Field(default=None, ge=0, le=1)  # of the text and its end
    scores: tuple[float, ...] | None = None  # one per choice of the item, in order; larger is better

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without what is not known."""
        return self.model_dump(exclude_none=True)


class Scored(NamedTuple):
    """Results of one protocol."""

    statistics: Mapping[str, Statistic]  # by result, such as "accuracy"
    scores: Mapping[str, Sequence[float | None]]  # by result, of each item; None where there is nothing to say of it
    of: Mapping[str, int] = {}  # how many items a result is about, where that is not all that have a score


class Measured(NamedTuple):
    """Results of a task."""

    protocols: Mapping[str, Scored]
    pinned: Mapping[str, str]  # what has to be equal for two results to be comparable: split, grouping, scorer, ...
    notes: Sequence[str] = ()  # sentences that belong beside the results
    tables: Mapping[str, Rows] = {}  # for the page of results, by their titles


class Result(NamedTuple):
    """The scores of one task."""

    data: dict[str, Any]  # as plain JSON, what result.json holds
    rows: list[dict[str, Any]]  # one JSON object an item, its scores under "protocol.result"
    sampled: Mapping[str, Mapping[str, Sampled]]  # by protocol and result, for comparisons


class Task(Settings, ABC):
    """One benchmark; its fields are the options of the command."""

    name: ClassVar[str]
    summary: ClassVar[str]
    by: ClassVar[tuple[str, ...]] = ()  # groups of the items that mean scores are broken down by

    data: Path
    """Folder of the data set with the files below."""
    limit: int = Field(default=0, ge=0)
    """Use only the first N images; 0 for all."""

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

    def score(self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES) -> Result:
        """Score answers by the id of items, those of :meth:`items` or some; one without an answer counts as wrong."""
        measured = self.measure(items, answers)
        if not measured.protocols:
            raise DataError(f"{self.name}: no item has an answer to score")
        protocols: dict[str, Any] = {}
        breakdowns: dict[str, Any] = {}
        scores: dict[str, Sequence[float | None]] = {}
        sampled: dict[str, dict[str, Sampled]] = {}
        paper = printed(self.name)
        for protocol, scored in measured.protocols.items():
            places = [k for k in range(len(items)) if any(each[k] is not None for each in scored.scores.values())]
            sampled[protocol] = {name: resample(each, resamples) for name, each in scored.statistics.items()}
            protocols[protocol] = {
                name: {
                    "value": finite(each.value),
                    "of": scored.of.get(name, len(places)),
                    "interval": each.interval,
                    "paper": paper.get(protocol, {}).get(name),
                }
                for name, each in sampled[protocol].items()
            }
            found = {key: _breakdown(items, places, key, scored.scores) for key in self.by}
            breakdowns[protocol] = {key: groups for key, groups in found.items() if groups}
            scores |= {f"{protocol}.{name}": each for name, each in scored.scores.items()}
        notes = []
        if missing := [item.id for item in items if item.id not in answers]:
            those = f"{len(missing)} of {many(len(items), 'item')} {'has' if len(missing) == 1 else 'have'}"
            notes.append(f"{those} no answer, which counts as wrong ({listed(missing)})")
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
        rows = [
            {
                **{"id": item.id, "image_id": item.image_id, "image": item.image.name, "question": item.question},
                **{"truth": item.truth, "answer": answers.get(item.id, Answer()).text, "groups": dict(item.groups)},
                "missing": item.id not in answers,
                # The number of a region means something only beside the regions.
                **({"regions": [each.to_dict() for each in item.regions]} if len(item.regions) > 1 else {}),
                "scores": {name: each[place] for name, each in scores.items() if each[place] is not None},
            }
            for place, item in enumerate(items)
        ]
        return Result(data, rows, sampled)

    @cached_property
    def left_out(self) -> Rejects:
        """Entries that :meth:`items` could not use, counted by kind."""
        return Rejects()


def _breakdown(
    items: Sequence[Item], places: Sequence[int], key: str, scores: Mapping[str, Sequence[float | None]]
) -> dict[str, dict[str, Any]]:
    """Mean scores of the items of each group: sizes in their order, other groups the largest first."""
    groups: dict[str, list[int]] = {}
    for k in places:
        if key in items[k].groups:
            groups.setdefault(items[k].groups[key], []).append(k)
    order = [name for name, _ in SIZES]
    found: dict[str, dict[str, Any]] = {}
    for group in sorted(groups, key=lambda name: (order.index(name) if name in order else 3, -len(groups[name]))):
        means: dict[str, float | None] = {}
        for name, each in scores.items():
            own = [value for k in groups[group] if (value := each[k]) is not None]
            means[name] = float(np.mean(own)) if own else None
        found[group] = {**means, "items": len(groups[group])}
    return found


# -- What the paper prints ---------------------------------------------------------------------------------------------


class PaperTable(NamedTuple):
    """One of the paper's tables, or its part about one data set; None for a dash."""

    number: str
    title: str
    data: str
    columns: tuple[str, ...]
    rows: Mapping[str, list[float | None]]
    note: str = ""
    task: str = ""
    protocol: str = ""
    results: tuple[str, ...] = ()  # what the columns are called here, where that differs; empty for none


TABLES: Final = {
    name: PaperTable(**{**values, "rows": finite(values["rows"])})
    for name, values in tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8")).items()
}
"""Tables 3-8, from ``paper.toml``."""


def printed(task: str) -> dict[str, dict[str, float]]:
    """The paper's own results for a task, as shares of 1, by protocol and by the name that they have here."""
    return {
        each.protocol: {
            name: value / 100
            for name, value in zip(each.results or each.columns, each.rows[OURS], strict=True)
            if value is not None
        }
        for each in TABLES.values()
        if each.task == task
    }


# -- What tasks share --------------------------------------------------------------------------------------------------


def find(given: Path | None, folder: Path, names: Iterable[str], option: str, *, file: bool = True) -> Path:
    """The path given by an option, or the first of the names in the folder; DataError where there is none."""
    tried = [given] if given is not None else [folder / name for name in names]
    for path in tried:
        if path.is_file() if file else path.is_dir():
            return path
    raise DataError(f"found no {' or '.join(map(str, tried))}; give --{option}")


def given(items: Sequence[Item], answers: Mapping[str, Answer], kind: str) -> list[Any]:
    """The ``text``, ``probability`` or ``scores`` of each item's answer; None where there is none."""
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


class RunOptions(ModelOptions, Look):
    """Options of a run, for all tasks."""

    out: Path | None = None
    """Folder of the results; run the same command again to resume."""
    baseline: Path | None = None
    """Folder of another vision-language model of transformers, asked instead."""
    region_as: Literal["outline", "coordinates", "crop"] | None = None
    """How a baseline is told of a region: outline, coordinates (in its own convention) or crop."""
    batch_size: int = Field(default=8, ge=1)
    """Questions that a baseline answers at a time."""
    predictions: Path | None = None
    """Score the answers in this file; no model is run."""
    resamples: int = Field(default=RESAMPLES, ge=0, le=1_000_000)
    """Bootstrap resamples; 0 for no intervals."""
    gallery: int = Field(default=24, ge=0)
    """Worst mistakes to show on the page."""
    overwrite: bool = False
    """Replace existing results in --out."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        ours, others = ["model", "untrained", "detail"], ["region_as", "batch_size"]
        refused, why = others, "only with --baseline"
        if self.predictions:
            refused, why = [*ours, "baseline", *others, "device", "dtype"], "no model is run for --predictions"
        elif self.baseline:
            refused, why = ours, "for RegionGPT checkpoints alone, not with --baseline"
        for name in refused:
            if name in self.model_fields_set:
                raise ValueError(f"--{name.replace('_', '-')}: {why}; leave it out")
        super()._check_model()  # type: ignore[operator]  # pydantic leaves the plain method
        return self

"""What the tasks share: finding files, and results made of statistics and of the items' own scores."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.bootstrap import Statistic, interval, mean_statistic
from regiongpt.evaluate.metrics.detection import PrecisionStatistic
from regiongpt.evaluate.task import Answer, Figure, Item, Result, Table, Task

SIZES: Final = (("small", 32.0**2), ("medium", 96.0**2), ("large", float("inf")))
"""COCO's sizes of objects: name, and the area in px^2 below which it applies."""
MOST_PRECISIONS: Final = 200
"""Most resamples of an average precision, each of which costs as much as matching a whole set."""


def find(given: Path | None, folder: Path, names: Iterable[str], what: str, flag: str, *, file: bool = True) -> Path:
    """The path given, or the first of the names that is in the folder.

    Args:
        given: What was typed; None to look for the names.
        folder: Where they are looked for.
        names: Relative to it.
        what: For the message: ``"images"``.
        flag: The option that names it.
        file: Whether a file is wanted, not a folder.

    Raises:
        DataError: There is none.
    """
    tried = [given] if given is not None else [folder / name for name in names]
    for path in tried:
        if path.is_file() if file else path.is_dir():
            return path
    raise DataError(f"found no {what} at {' or '.join(map(str, tried))}; check the path, or give --{flag}")


def limited(items: Sequence[Item], limit: int) -> list[Item]:
    """The items of the first ``limit`` images that are asked about; all for 0."""
    first = set(list(dict.fromkeys(item.image_id for item in items))[: limit or None])
    return [item for item in items if item.image_id in first]


def given(items: Sequence[Item], answers: Mapping[str, Answer], kind: str) -> list[Any]:
    """The ``text``, ``probability``, ``scores`` or ``called`` of each item's answer; None where there is none."""
    return [getattr(answers[item.id], kind) if item.id in answers else None for item in items]


def images_of(items: Sequence[Item]) -> list[Hashable]:
    """The image of each item, as statistics take them."""
    return [item.image_id for item in items]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a protocol makes of the answers.

    Attributes:
        statistics: By figure.
        scores: By figure, a number for each item; None where the protocol says nothing about it.
        of: How many items a figure is about, by its name, where not about all that have a score.
    """

    statistics: Mapping[str, Statistic]
    scores: Mapping[str, Sequence[float | None]]
    of: Callable[[str], int] | None = None


def make_result(
    task: Task,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    protocols: Mapping[str, Scored],
    *,
    pinned: Mapping[str, str],
    by: Sequence[str],
    resamples: int,
    seed: int,
    notes: Sequence[str] = (),
    tables: Sequence[Table] = (),
    more: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Figure]]]] | None = None,
) -> Result:
    """The result of a task.

    Args:
        task: The task.
        items: What was asked.
        answers: By item id.
        protocols: What each protocol makes of them.
        pinned: See :class:`Result`.
        by: Groups of the items that the mean scores are broken down by.
        resamples: Of the bootstrap; what chance would give gets no interval.
        seed: Of the bootstrap.
        notes: Besides those on missing answers and on annotations that were left out.
        tables: For the page.
        more: Further breakdowns by protocol.
    """
    figures, breakdowns = {}, {}
    scores: dict[str, Sequence[float | None]] = {}
    for name, scored in protocols.items():
        places = [k for k in range(len(items)) if any(each[k] is not None for each in scored.scores.values())]
        figures[name] = {
            key: figure(each, scored.of(key) if scored.of else len(places), 0 if key == "chance" else resamples, seed)
            for key, each in scored.statistics.items()
        }
        own = [items[k] for k in places]
        values = {key: [each[k] or 0.0 for k in places] for key, each in scored.scores.items()}
        breakdowns[name] = {**means_by_group(own, by, values), **(more or {}).get(name, {})}
        scores |= {f"{name}.{key}": each for key, each in scored.scores.items()}
    rows = [
        {
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
        for place, item in enumerate(items)
    ]
    said = []
    if missing := [item.id for item in items if item.id not in answers]:
        have = "has" if len(missing) == 1 else "have"
        count = f"{len(missing)} of {counted(len(items), 'item')}"
        said.append(f"{count} {have} no answer and count as wrong ({task.item_id}s {listed(missing)})")
    if task.left_out.counts:
        said.append(f"annotations not asked about: {task.left_out.listed()}")
    return Result(
        task=task.name,
        pinned=pinned,
        protocols=figures,
        breakdowns=breakdowns,
        rows=tuple(rows),
        tables=tuple(tables),
        notes=(*said, *notes),
        statistics={name: scored.statistics for name, scored in protocols.items()},
    )


def figure(statistic: Statistic, of: int, resamples: int, seed: int) -> Figure:
    """A figure with its interval; no value where there is nothing to measure, no interval for 0 resamples."""
    value = statistic.value() if statistic.clusters else float("nan")
    if np.isnan(value):
        return Figure(value=None, of=of)
    count = min(resamples, MOST_PRECISIONS) if isinstance(statistic, PrecisionStatistic) else resamples
    ends = interval(statistic, count, seed) if count and len(statistic.clusters) > 1 else None
    return Figure(value=value, of=of, interval=None if ends is None or np.isnan(ends).any() else ends)


def by_group(
    items: Sequence[Item], key: str, measure: Callable[[list[int]], Mapping[str, Figure]]
) -> dict[str, Mapping[str, Figure]]:
    """Figures of the items of each group: sizes in their order, other groups the largest first.

    Args:
        items: The items.
        key: Which of the items' groups.
        measure: Figures of the items at some places.
    """
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if key in item.groups:
            places.setdefault(item.groups[key], []).append(place)
    order = [name for name, _ in SIZES]
    names = sorted(places, key=lambda name: (order.index(name) if name in order else len(order), -len(places[name])))
    return {name: measure(places[name]) for name in names}


def means_by_group(
    items: Sequence[Item], keys: Sequence[str], scores: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Mapping[str, Figure]]]:
    """The mean of each score, without an interval, by each way of grouping the items."""

    def measure(places: list[int]) -> dict[str, Figure]:
        return {name: mean_figure(items, values, places) for name, values in scores.items()}

    found = {key: by_group(items, key, measure) for key in keys}
    return {key: groups for key, groups in found.items() if groups}


def mean_figure(items: Sequence[Item], scores: Sequence[float], places: Sequence[int]) -> Figure:
    """The mean score of the items at some places, without an interval."""
    statistic = mean_statistic([items[k].image_id for k in places], [scores[k] for k in places])
    return figure(statistic, len(places), 0, 0)


def counted(number: int, noun: str) -> str:
    """``"1 class"``, ``"2 classes"``, ``"1,000 images"``."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def listed(values: Sequence[object], most: int = 10) -> str:
    """The first few of some values, and how many more there are."""
    shown = ", ".join(str(value) for value in values[:most])
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown


def box_area(box: Sequence[float]) -> float:
    """The area of an xyxy box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def size_name(area: float) -> str:
    """COCO's word for an object of an area in px^2."""
    return next(name for name, above in SIZES if area < above)

"""What the tasks share: finding files, figures with intervals, rows of items, notes on missing answers."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.bootstrap import Statistic, interval, mean_statistic
from regiongpt.evaluate.metrics.detection import PrecisionStatistic
from regiongpt.evaluate.task import Answer, Figure, Item, Table, Task

SIZES: Final = (("small", 32.0**2), ("medium", 96.0**2), ("large", float("inf")))
"""COCO's sizes of objects: name, and the area in px^2 below which it applies."""
MOST_PRECISIONS: Final = 200
"""Most resamples of an average precision, of which each costs as much as matching a whole set."""


def find(given: Path | None, folder: Path, names: Iterable[str], what: str, flag: str, *, file: bool = True) -> Path:
    """The path given, or the first of the names that is in the folder.

    Args:
        given: What the person has named; None to look for the names.
        folder: Where they are looked for.
        names: Relative to it.
        what: For the message: ``"the images"``.
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


def figure(statistic: Statistic, of: int, resamples: int, seed: int) -> Figure:
    """A figure with its interval; no value where there is nothing to measure, no interval for 0 resamples."""
    value = statistic.value() if statistic.clusters else float("nan")
    if np.isnan(value):
        return Figure(value=None, of=of)
    count = min(resamples, MOST_PRECISIONS) if isinstance(statistic, PrecisionStatistic) else resamples
    ends = interval(statistic, count, seed) if count and len(statistic.clusters) > 1 else None
    return Figure(value=value, of=of, interval=None if ends is None or np.isnan(ends).any() else ends)


def figures(statistics: Mapping[str, Statistic], of: int, resamples: int, seed: int) -> dict[str, Figure]:
    """A figure of each statistic, all about the same items; what chance would give has no interval."""
    return {name: figure(each, of, 0 if name == "chance" else resamples, seed) for name, each in statistics.items()}


def images_of(items: Sequence[Item]) -> list[Hashable]:
    """The image of each item, as statistics take them."""
    return [item.image_id for item in items]


def by_group(
    items: Sequence[Item], key: str, measure: Callable[[list[int]], Mapping[str, Figure]], order: Sequence[str] = ()
) -> dict[str, Mapping[str, Figure]]:
    """Figures of the items of each group, those of ``order`` first, then the largest first.

    Args:
        items: The items.
        key: Which of the items' groups.
        measure: Figures of the items at some places.
        order: Groups that have an order of their own.
    """
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if key in item.groups:
            places.setdefault(item.groups[key], []).append(place)
    names = sorted(places, key=lambda name: (order.index(name) if name in order else len(order), -len(places[name])))
    return {name: measure(places[name]) for name in names}


def means_by_group(
    items: Sequence[Item], keys: Sequence[str], scores: Mapping[str, Sequence[float | None]]
) -> dict[str, dict[str, Mapping[str, Figure]]]:
    """The mean of each of some scores, without an interval, by each way of grouping the items.

    Args:
        items: The items.
        keys: Which of the items' groups; those that no item has are left out.
        scores: By figure, the score of each item.
    """

    def measure(places: list[int]) -> dict[str, Figure]:
        return {
            name: mean_figure([items[k].image_id for k in places], [values[k] or 0.0 for k in places])
            for name, values in scores.items()
        }

    found = {key: by_group(items, key, measure, [name for name, _ in SIZES]) for key in keys}
    return {key: groups for key, groups in found.items() if groups}


def mean_figure(images: Sequence[Hashable], scores: Sequence[float]) -> Figure:
    """The mean of some items' scores, without an interval."""
    return figure(mean_statistic(images, scores), len(scores), 0, 0)


def rows_of(
    items: Sequence[Item], answers: Mapping[str, Answer], scores: Mapping[str, Sequence[float | None]]
) -> tuple[dict[str, Any], ...]:
    """One JSON object an item.

    Args:
        items: The items.
        answers: By item id.
        scores: By ``"protocol.figure"``, a number for each item, or None where the protocol says nothing of it.
    """
    return tuple(
        {
            "id": item.id,
            "image_id": item.image_id,
            "truth": item.truth,
            "answer": answers[item.id].text if item.id in answers else None,
            "groups": dict(item.groups),
            "missing": item.id not in answers,
            # Answers by number mean something beside the regions alone.
            **({"regions": [region.to_dict() for region in item.regions]} if len(item.regions) > 1 else {}),
            "scores": {name: values[place] for name, values in scores.items() if values[place] is not None},
        }
        for place, item in enumerate(items)
    )


def notes_of(task: Task, items: Sequence[Item], answers: Mapping[str, Answer]) -> list[str]:
    """What there is to say of items without an answer, and of annotations that were not asked about."""
    missing = [item.id for item in items if item.id not in answers]
    notes = []
    if missing:
        listing = f"{task.item_id}s {listed(missing)}"
        notes.append(f"{len(missing)} of {len(items)} items have no answer and count as wrong ({listing})")
    if task.left_out.counts:
        notes.append(f"annotations not asked about: {task.left_out.summary()}")
    return notes


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


def confusion_table(truths: Sequence[str], said: Sequence[str | None], names: Sequence[str], title: str) -> Table:
    """How often each category was taken for each other: a row a category that occurs, a column a name that was said.

    Args:
        truths: Category of each item.
        said: What it was taken for; None where the answer was off the list.
        names: All categories, in order.
        title: Title of the table.
    """
    place = {name: k for k, name in enumerate(names)}
    counts = np.zeros((len(names), len(names) + 1), np.int64)
    for truth, answer in zip(truths, said, strict=True):
        counts[place[truth], len(names) if answer is None else place[answer]] += 1
    across = [k for k in range(len(names)) if counts[:, k].any()]
    down = [k for k in range(len(names)) if counts[k].any()]
    return Table(
        title=title,
        columns=("category", *(names[k] for k in across), "off the list"),
        rows=tuple((names[k], *(int(counts[k, c]) for c in (*across, len(names)))) for k in down),
    )

"""What the tasks share: finding files, figures with intervals, rows of items, what is said of missing answers."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.bootstrap import Statistic, interval, mean_statistic
from regiongpt.evaluate.metrics.detection import PrecisionStatistic
from regiongpt.evaluate.task import Answer, Figure, Item, Table

SIZES: Final = (("small", 32.0**2), ("medium", 96.0**2), ("large", float("inf")))
"""COCO's sizes of objects: name, and the area in px^2 below which it applies."""
MOST_PRECISIONS: Final = 200
"""Most resamples of an average precision, of which each costs as much as matching a whole set."""
_NAMED = 10


def find_file(given: Path | None, folder: Path, names: Iterable[str], what: str, flag: str) -> Path:
    """The file given, or the first of the names that is in the folder.

    Raises:
        DataError: There is none.
    """
    tried = [Path(given)] if given is not None else [Path(folder) / name for name in names]
    for path in tried:
        if path.is_file():
            return path
    raise DataError(f"expected {what} at {' or '.join(map(str, tried))}, found none; check the path, or give --{flag}")


def find_folder(given: Path | None, folder: Path, names: Iterable[str], what: str, flag: str) -> Path:
    """The folder given, or the first of the names that is in ``folder``.

    Raises:
        DataError: There is none.
    """
    tried = [Path(given)] if given is not None else [Path(folder) / name for name in names]
    for path in tried:
        if path.is_dir():
            return path
    raise DataError(f"expected {what} in {' or '.join(map(str, tried))}, found none; check the path, or give --{flag}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raises ConfigError where an option is none of its values."""
    if value not in known:
        raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def limited(items: Sequence[Item], limit: int) -> list[Item]:
    """The items of the first ``limit`` images that are asked about; all for 0."""
    if limit < 0:
        raise ConfigError(f"limit: expected 0 or more, got {limit}")
    kept = dict.fromkeys(item.image_id for item in items)
    first = set(list(kept)[: limit or None])
    return [item for item in items if item.image_id in first]


def figure(statistic: Statistic, of: int, resamples: int, seed: int) -> Figure:
    """A figure with its interval; no value where there is nothing to measure, no interval for 0 resamples."""
    value = statistic.value() if statistic.clusters else float("nan")
    if np.isnan(value):
        return Figure(value=None, of=of)
    count = min(resamples, MOST_PRECISIONS) if isinstance(statistic, PrecisionStatistic) else resamples
    ends = interval(statistic, count, seed) if count and len(statistic.clusters) > 1 else None
    return Figure(value=value, of=of, interval=ends)


def figures(statistics: Mapping[str, Statistic], of: int, resamples: int, seed: int) -> dict[str, Figure]:
    """A figure of each statistic, all about the same items."""
    return {name: figure(statistic, of, resamples, seed) for name, statistic in statistics.items()}


def images_of(items: Sequence[Item]) -> list[Hashable]:
    """The image of each item, as statistics take them."""
    return [item.image_id for item in items]


def by_group(
    items: Sequence[Item],
    key: str,
    measure: Callable[[list[int]], Mapping[str, Figure]],
    order: Sequence[str] = (),
) -> dict[str, Mapping[str, Figure]]:
    """Figures of the items of each group, those of ``order`` first, then the largest first.

    Args:
        items: The items.
        key: Of the items' groups.
        measure: Figures of the items at some places.
        order: Groups that have an order of their own.
    """
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if key in item.groups:
            places.setdefault(item.groups[key], []).append(place)
    names = sorted(places, key=lambda name: (order.index(name) if name in order else len(order), -len(places[name])))
    return {name: measure(places[name]) for name in names}


def mean_figure(items: Sequence[Item], scores: Sequence[float], places: Sequence[int]) -> Figure:
    """The mean score of the items at some places, without an interval."""
    statistic = mean_statistic([items[k].image_id for k in places], [scores[k] for k in places])
    return figure(statistic, len(places), 0, 0)


def rows_of(
    items: Sequence[Item], answers: Mapping[str, Answer], scores: Mapping[str, Sequence[float | None]]
) -> tuple[dict[str, Any], ...]:
    """One json object an item.

    Args:
        items: The items.
        answers: By item id.
        scores: By ``"protocol.figure"``, a number for each item, or None where the protocol says nothing of it.
    """
    rows = []
    for place, item in enumerate(items):
        answer = answers.get(item.id)
        rows.append(
            {
                "id": item.id,
                "image_id": item.image_id,
                "truth": item.truth,
                "answer": answer.text if answer is not None else None,
                "groups": dict(item.groups),
                "missing": answer is None,
                # Answers by number mean something beside the regions alone.
                **({"regions": [region.to_dict() for region in item.regions]} if len(item.regions) > 1 else {}),
                "scores": {name: values[place] for name, values in scores.items() if values[place] is not None},
            }
        )
    return tuple(rows)


def missing_notes(items: Sequence[Item], answers: Mapping[str, Answer], what: str) -> list[str]:
    """What there is to say of items without an answer."""
    missing = [item.id for item in items if item.id not in answers]
    if not missing:
        return []
    return [f"{len(missing)} of {len(items)} items have no answer and count as wrong ({what}s {listed(missing)})"]


def listed(values: Sequence[object], most: int = _NAMED) -> str:
    """The first few of some values, and how many more there are."""
    shown = ", ".join(str(value) for value in values[:most])
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown


def size_name(area: float) -> str:
    """COCO's word for an object of an area in px^2."""
    return next(name for name, above in SIZES if area < above)


def confusion_table(truths: Sequence[str], said: Sequence[str | None], names: Sequence[str], title: str) -> Table:
    """How often each category was taken for each other: a row a category that occurs, a column a name that was said.

    Args:
        truths: Category of each item.
        said: What it was taken for; None where the answer was off the list.
        names: All categories, in order.
        title: Of the table.
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

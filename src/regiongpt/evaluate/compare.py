"""Two runs on the same items: the difference of every figure by the paired bootstrap, and the items that changed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from regiongpt.data.shards import file_identity
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.bootstrap import TOO_FEW, Paired, paired
from regiongpt.evaluate.report import NOTHING, Rows, aligned
from regiongpt.evaluate.run import ITEMS, PREDICTIONS, TaskRun, map_paths, read_run
from regiongpt.evaluate.task import RESAMPLES, Answer, Result
from regiongpt.storage import finite, reason

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Change:
    """An item that one of the runs answered better: both answers, and how much the score rose from A to B."""

    id: str
    truth: str
    a: str
    b: str
    by: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One task of two runs.

    Attributes:
        task: Its name.
        items: How many both have answered.
        figures: By protocol and figure.
        figure: By which items changed, as ``"protocol.figure"``.
        gained: Items that the second run scores higher, the largest change first.
        lost: Items that it scores lower.
        reworded: Number of items whose text alone differs.
    """

    task: str
    items: int
    figures: Mapping[str, Mapping[str, Paired]]
    figure: str
    gained: tuple[Change, ...]
    lost: tuple[Change, ...]
    reworded: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; what cannot be measured is null."""
        changed = {name: [vars(change) for change in getattr(self, name)] for name in ("gained", "lost")}
        figures = {protocol: {name: vars(each) for name, each in own.items()} for protocol, own in self.figures.items()}
        return {
            "task": self.task,
            "items": self.items,
            "figures": finite(figures),
            "changed": {"by": self.figure, **changed, "reworded": self.reworded},
        }

    def summary(self) -> str:
        """How many items changed."""
        return f"{len(self.gained):,} items better, {len(self.lost):,} worse, {self.reworded:,} reworded"

    def tables(self) -> list[tuple[str, Rows]]:
        """A table for each protocol: its name, and its rows."""
        head = ["figure", "A", "B", "B - A", "95 %", "p"]
        return [
            (protocol, [head, *(_row(name, each) for name, each in figures.items())])
            for protocol, figures in self.figures.items()
            if figures
        ]

    def changed(self) -> list[tuple[str, Rows]]:
        """The items that changed as tables."""
        head = ["item", "truth", "A", "B", "score"]
        return [
            (title, [head, *([c.id, c.truth, _short(c.a), _short(c.b), f"{c.by:+.2f}"] for c in changes)])
            for title, changes in (("better", self.gained), ("worse", self.lost))
            if changes
        ]

    def as_text(self) -> str:
        """For a terminal, with at most 20 items of each kind."""
        lines = [f"{self.task}: {self.items:,} items"]
        for protocol, rows in self.tables():
            lines += ["", f"  {protocol}", *(f"    {line}" for line in aligned(rows))]
        lines += ["", f"  by {self.figure}: {self.summary()}"]
        for title, rows in self.changed():
            lines += [f"  {title}:", *(f"    {line}" for line in aligned(rows[:21]))]
        return "\n".join(lines)


def compare_runs(
    a: Path, b: Path, data: Path | None = None, names: Sequence[str] = (), resamples: int = RESAMPLES
) -> list[Comparison]:
    """Compare every task that two runs have in common.

    Args:
        a: Folder of the first run.
        b: Folder of the second; differences are B less A.
        data: Where the data set is now, if it has moved.
        names: Only these tasks.
        resamples: Of the bootstrap.

    Raises:
        ConfigError: The runs are of other settings, or have no task in common.
        DataError: A run cannot be read, its data set is not what it was, or the two have no item in common.
    """
    first, second = ({run.name: run for run in read_run(folder)} for folder in (a, b))
    for folder, found in ((a, first), (b, second)):
        if lacking := [name for name in names if name not in found]:
            raise ConfigError(f"{folder}: no finished {lacking[0]!r}, only {', '.join(found)}")
    shared = [name for name in first if name in second and (not names or name in names)]
    if not shared:
        raise ConfigError(f"no task in common: {', '.join(first)} in {a}, {', '.join(second)} in {b}")
    return [_compare(first[name], second[name], data, resamples) for name in shared]


def _compare(a: TaskRun, b: TaskRun, data: Path | None, resamples: int) -> Comparison:
    task = a.task(data)
    ours, theirs = ({**map_paths(run.task(), lambda path: path.name), "data": ""} for run in (a, b))
    differing = [f"--{name}: {ours[name]!r} and {theirs[name]!r}" for name in ours if ours[name] != theirs[name]]
    differing += ["the annotation files"] if a.manifest["inputs"] != b.manifest["inputs"] else []
    if differing:
        raise ConfigError(f"{a.folder} and {b.folder}: runs of other settings or files ({'; '.join(differing)})")
    if [file_identity(path) for path in task.inputs()] != a.manifest["inputs"]:
        raise DataError(
            f"{task.data}: not the annotation files that {a.folder} was evaluated on; give their folder with --data"
        )
    asked = [set(_read_lines(run.folder / ITEMS, lambda row: str(row["id"]))) for run in (a, b)]
    items = [item for item in task.items() if item.id in asked[0] & asked[1]]
    if not items:
        raise DataError(f"{a.folder} and {b.folder}: no item that both were asked about")
    ids = {item.id for item in items}
    results = []
    for run in (a, b):
        read = _read_lines(run.folder / PREDICTIONS, lambda row: (str(row["id"]), Answer.from_dict(row)))
        results.append(task.score(items, {name: answer for name, answer in read if name in ids}, resamples=0))
    figures = {
        protocol: {
            name: paired(statistic, results[1].statistics[protocol][name], resamples)
            for name, statistic in found.items()
            if name in results[1].statistics.get(protocol, {})
        }
        for protocol, found in results[0].statistics.items()
    }
    figure, gained, lost, reworded = changes(*results)
    return Comparison(
        task=a.name, items=len(items), figures=figures, figure=figure, gained=gained, lost=lost, reworded=reworded
    )


def changes(a: Result, b: Result) -> tuple[str, tuple[Change, ...], tuple[Change, ...], int]:
    """The items by how the first figure has changed that both runs have a score of: better, worse, and reworded."""
    found: list[Change] = []
    reworded = 0
    by_figure: dict[str, None] = {}
    for ours, theirs in zip(a.rows, b.rows, strict=True):
        figure = next((name for name in ours["scores"] if name in theirs["scores"]), None)
        if figure is None:
            continue
        by_figure[figure] = None
        by = theirs["scores"][figure] - ours["scores"][figure]
        texts = [str(row["answer"]) if row["answer"] is not None else NOTHING for row in (ours, theirs)]
        if by:
            found.append(Change(id=str(ours["id"]), truth=str(ours["truth"]), a=texts[0], b=texts[1], by=by))
        else:
            reworded += texts[0] != texts[1]
    found.sort(key=lambda change: -abs(change.by))
    gained, lost = (tuple(each for each in found if (each.by > 0) == up) for up in (True, False))
    return ", ".join(by_figure) or "no figure that both have", gained, lost, reworded


def _row(name: str, each: Paired) -> list[str]:
    ends = " to ".join(_times_100(end, "+") for end in each.interval) if each.interval else ""
    p = TOO_FEW if each.too_few else NOTHING if each.p is None else f"{each.p:.3f}"
    return [name, _times_100(each.a), _times_100(each.b), _times_100(each.difference, "+"), ends, p]


def _times_100(value: float, sign: str = "") -> str:
    # What rounds to nothing has no sign of its own.
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}" if value == value else NOTHING


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def _read_lines(path: Path, made: Callable[[dict[str, Any]], T]) -> list[T]:
    found: list[T] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                found.append(made(dict(json.loads(line))))
        return found
    except (OSError, ValueError, TypeError, KeyError, RecursionError, DataError) as error:
        raise DataError(f"{path}:{len(found) + 1}: not as a run writes it: {reason(error)}; evaluate again") from None

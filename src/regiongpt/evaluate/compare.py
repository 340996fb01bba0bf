"""Two runs on the same items: the difference of every figure by the paired bootstrap, and the items that changed."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from regiongpt.data.shards import file_identity
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.answering import from_json
from regiongpt.evaluate.metrics.bootstrap import TOO_FEW, Paired, paired
from regiongpt.evaluate.report import STYLE
from regiongpt.evaluate.runs import PLACES, PREDICTIONS, TaskRun, read_lines, read_run, task_of
from regiongpt.evaluate.tables import NOTHING, aligned
from regiongpt.evaluate.task import Answer, Result, Task
from regiongpt.pages import card, page, table

_SHOWN: Final = 20
_ELSEWHERE: Final = ("limit",)
"""Options that may differ: only the items that both runs have are compared."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """An item that one of the runs answered better.

    Attributes:
        id: Of the item.
        truth: The right answer.
        a: What the first run answered, and ``b`` the second.
        b: See ``a``.
        by: How much the score rose from the first to the second.
    """

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
        figure: That tells which items changed, as ``"protocol.figure"``.
        gained: Items that the second run scores higher by it, the most first.
        lost: Items that it scores lower.
        reworded: Items whose text differs though the score does not.
    """

    task: str
    items: int
    figures: Mapping[str, Mapping[str, Paired]]
    figure: str
    gained: tuple[Change, ...]
    lost: tuple[Change, ...]
    reworded: int

    def to_dict(self) -> dict[str, Any]:
        """As plain json."""
        return {
            "task": self.task,
            "items": self.items,
            "figures": {
                protocol: {name: vars(each) for name, each in figures.items()}
                for protocol, figures in self.figures.items()
            },
            "changed": {
                "by": self.figure,
                "gained": [vars(change) for change in self.gained],
                "lost": [vars(change) for change in self.lost],
                "reworded": self.reworded,
            },
        }


def compare_runs(
    a: Path, b: Path, data: Path | None = None, names: Sequence[str] = (), resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """Compares every task that two runs have in common.

    Args:
        a: Folder of the first run.
        b: Folder of the second; differences are its figures less the first's.
        data: Where the data set is now; where it was by default.
        names: Only these tasks.
        resamples: Of the bootstrap.
        seed: Likewise.

    Raises:
        ConfigError: The runs are of other settings, or have no task in common.
        DataError: A run cannot be read, its data set is not what it was, or the two have no item in common.
    """
    first, second = ({run.name: run for run in read_run(folder)} for folder in (a, b))
    for folder, found in ((a, first), (b, second)):
        if lacking := [name for name in names if name not in found]:
            raise ConfigError(f"{folder}: expected a finished {lacking[0]!r}, found {', '.join(found)}")
    shared = [name for name in first if name in second and (not names or name in names)]
    if not shared:
        raise ConfigError(
            f"expected two runs with a task in common, found {', '.join(first)} in {a} and {', '.join(second)} in {b}"
        )
    return [compare(first[name], second[name], data, resamples, seed) for name in shared]


def compare(a: TaskRun, b: TaskRun, data: Path | None = None, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compares one task of two runs; see :func:`compare_runs`."""
    _refuse_different(a, b)
    task = task_of(a.name, {**a.manifest["options"], **dict.fromkeys(_ELSEWHERE, 0)}, data)
    _refuse_changed(task, a)
    given = [_answers(run) for run in (a, b)]
    asked = [{row["id"] for row in run.rows()} for run in (a, b)]
    items = [item for item in task.load() if item.id in asked[0] and item.id in asked[1]]
    if not items:
        raise DataError(f"{a.folder} and {b.folder}: expected runs on the same items, found none that both have")
    results = [
        task.score(items, {item.id: found[item.id] for item in items if item.id in found}, resamples=0)
        for found in given
    ]
    figures = {
        protocol: {
            name: paired(statistic, results[1].statistics[protocol][name], resamples, seed)
            for name, statistic in found.items()
            if name in results[1].statistics.get(protocol, {})
        }
        for protocol, found in results[0].statistics.items()
    }
    figure, gained, lost, reworded = _changes(results[0], results[1])
    return Comparison(
        task=a.name, items=len(items), figures=figures, figure=figure, gained=gained, lost=lost, reworded=reworded
    )


def _refuse_different(a: TaskRun, b: TaskRun) -> None:
    """Raises ConfigError where the figures of two runs are not of the same thing."""
    ours, theirs = ({**run.manifest["settings"], **dict.fromkeys((*_ELSEWHERE, *PLACES))} for run in (a, b))
    differing = [
        f"--{name}: {ours.get(name)!r} and {theirs.get(name)!r}" for name in ours if ours[name] != theirs.get(name)
    ]
    if a.manifest["inputs"] != b.manifest["inputs"]:
        differing.append("the annotation files")
    if differing:
        raise ConfigError(
            f"{a.folder} and {b.folder}: expected runs with the same settings on the same files, but these differ: "
            f"{'; '.join(differing)}"
        )


def _refuse_changed(task: Task, run: TaskRun) -> None:
    there = [file_identity(path) for path in task.inputs()]
    if there != run.manifest["inputs"]:
        raise DataError(
            f"{task.data}: expected the annotation files that {run.folder} was evaluated on, found others; give their "
            "folder with --data"
        )


def _answers(run: TaskRun) -> dict[str, Answer]:
    return {row["id"]: from_json(row) for row in read_lines(run.folder / PREDICTIONS)}


def _changes(a: Result, b: Result) -> tuple[str, tuple[Change, ...], tuple[Change, ...], int]:
    """The items by how the first figure has changed that both runs have a score of."""
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


def as_text(comparison: Comparison) -> str:
    """For a terminal."""
    lines = [f"{comparison.task}: {comparison.items:,} items"]
    for protocol, cells in _cells(comparison):
        lines += ["", f"  {protocol}", *(f"    {line}" for line in aligned(cells))]
    gained, lost = len(comparison.gained), len(comparison.lost)
    lines += [
        "",
        f"  by {comparison.figure}: {gained:,} items better, {lost:,} worse, {comparison.reworded:,} reworded",
    ]
    for title, changes in (("better", comparison.gained), ("worse", comparison.lost)):
        if changes:
            lines += [f"  {title}:", *(f"    {line}" for line in aligned(_changed(changes[:_SHOWN])))]
    return "\n".join(lines)


def as_page(comparisons: Sequence[Comparison], a: Path, b: Path) -> str:
    """As a page that needs no other file."""
    cards = []
    for each in comparisons:
        tables = "".join(f"<div>{table(cells, protocol)}</div>" for protocol, cells in _cells(each))
        parts = [f'<div class="tables">{tables}</div>']
        parts.append(
            f"<p>By {html.escape(each.figure)}: {len(each.gained):,} items better, {len(each.lost):,} worse, "
            f"{each.reworded:,} reworded.</p>"
        )
        for title, changes in (("Better", each.gained), ("Worse", each.lost)):
            if changes:
                shown = table(_changed(changes))
                parts.append(f"<details><summary>{title}: {len(changes):,}</summary>{shown}</details>")
        cards.append(card("".join(parts), f"{each.task}: {each.items:,} items"))
    return page("Two runs compared", f"A: {a}; B: {b}; differences are B less A, times 100", "\n".join(cards), STYLE)


def _cells(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    head = ["figure", "A", "B", "B - A", "95 %", "p"]
    return [
        (protocol, [head, *(_row(name, each) for name, each in figures.items())])
        for protocol, figures in comparison.figures.items()
        if figures
    ]


def _row(name: str, each: Paired) -> list[str]:
    ends = " to ".join(_times_100(end, "+") for end in each.interval) if each.interval else ""
    p = TOO_FEW if each.too_few else NOTHING if each.p is None else f"{each.p:.3f}"
    return [name, _times_100(each.a), _times_100(each.b), _times_100(each.difference, "+"), ends, p]


def _times_100(value: float, sign: str = "") -> str:
    # What rounds to nothing has no sign of its own.
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}" if value == value else NOTHING


def _changed(changes: Sequence[Change]) -> list[list[str]]:
    body = [[each.id, each.truth, _short(each.a), _short(each.b), f"{each.by:+.2f}"] for each in changes]
    return [["item", "truth", "A", "B", "score"], *body]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"

"""The variants of an ablation side by side: means over the seeds with intervals, differences, and the paper's order."""

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from regiongpt.ablate.study import Study
from regiongpt.ablate.variants import KINDS
from regiongpt.charts import Bar, bar_chart
from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.bootstrap import Floats, Statistic, around, centred, ends, resample
from regiongpt.evaluate.paper import TABLES, PaperTable
from regiongpt.evaluate.runner import load_items
from regiongpt.evaluate.runs import PAGE, RESULT, TaskRun
from regiongpt.evaluate.tables import NOTHING, markdown
from regiongpt.evaluate.task import Task
from regiongpt.pages import card, page, table, write_page
from regiongpt.storage import finite, write_file, write_json

Measured = Mapping[str, Mapping[str, Statistic]]
"""Statistics by protocol and figure."""

TABLE = "table.md"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of one variant, times 100.

    Attributes:
        mean: Over the seeds.
        interval: 95 % of the resamples, each of which draws images and seeds anew.
        seeds: The figure with each seed.
        gain: Over the first variant, resampled with the same images; None for the first.
        gain_interval: Likewise; None where the two were not asked about the same images.
    """

    mean: float
    interval: tuple[float, float]
    seeds: tuple[float, ...]
    gain: float | None = None
    gain_interval: tuple[float, float] | None = None


Summary = dict[str, dict[str, dict[str, Cell]]]
"""Cells by protocol, figure and variant."""


def measure(tasks: Mapping[str, Task], runs: Mapping[str, Sequence[TaskRun]]) -> tuple[dict[str, list[Measured]], int]:
    """The statistics of all variants with all seeds, on the items that every variant was asked about.

    Args:
        tasks: By variant, what it was asked.
        runs: By variant, its run with each seed.

    Returns:
        By variant, the statistics of each seed; and the number of items.

    Raises:
        DataError: The variants have no item in common.
    """
    items = {name: load_items(task) for name, task in tasks.items()}
    shared = set.intersection(*({item.id for item in each} for each in items.values()))
    if not shared:
        raise DataError("expected variants that are asked about the same items, but they have none in common")
    found: dict[str, list[Measured]] = {}
    for name, task in tasks.items():
        asked = [item for item in items[name] if item.id in shared]
        for run in runs[name]:
            answers = run.answers()
            given = {item.id: answers[item.id] for item in asked if item.id in answers}
            found.setdefault(name, []).append(task.score(asked, given, resamples=0).statistics)
    return found, len(shared)


def summarise(measured: Mapping[str, Sequence[Measured]], resamples: int, seed: int = 0) -> Summary:
    """Means, intervals and differences of all figures that every variant has.

    Args:
        measured: By variant, the statistics of each seed; the first variant is what the others are held against.
        resamples: Of the bootstrap, at least 1.
        seed: Of the drawing.
    """
    names = list(measured)
    first = measured[names[0]][0]
    summary: Summary = {}
    for protocol, figures in first.items():
        for figure in figures:
            if all(figure in each.get(protocol, {}) for runs in measured.values() for each in runs):
                own = {name: [each[protocol][figure] for each in measured[name]] for name in names}
                summary.setdefault(protocol, {})[figure] = _cells(own, resamples, seed)
    return summary


def _cells(own: Mapping[str, Sequence[Statistic]], resamples: int, seed: int) -> dict[str, Cell]:
    names = list(own)
    drawn = {name: _drawn(statistics, resamples, seed, place) for place, (name, statistics) in enumerate(own.items())}
    means = {name: 100 * float(np.mean([each.value() for each in statistics])) for name, statistics in own.items()}
    cells = {}
    for name, statistics in own.items():
        alike = name != names[0] and statistics[0].clusters == own[names[0]][0].clusters
        cells[name] = Cell(
            mean=means[name],
            interval=around(drawn[name], means[name], 100 * statistics[0].most),
            seeds=tuple(100 * each.value() for each in statistics),
            gain=means[name] - means[names[0]] if name != names[0] else None,
            gain_interval=ends(centred(drawn[name] - drawn[names[0]], means[name] - means[names[0]]))
            if alike
            else None,
        )
    return cells


def _drawn(statistics: Sequence[Statistic], resamples: int, seed: int, place: int) -> Floats:
    """The mean over seeds of each resample: the images are the same for all variants, the seeds each one's own."""
    times = resample(len(statistics[0].clusters), resamples, seed)
    values = 100 * np.stack([each.values(times) for each in statistics])
    picks = np.random.default_rng((seed, 31, place)).integers(len(statistics), size=(len(statistics), resamples))
    means: Floats = np.take_along_axis(values, picks, axis=0).mean(axis=0)
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Shown


def to_dict(summary: Summary) -> dict[str, Any]:
    """As plain json."""
    return {
        protocol: {
            figure: {variant: vars(cell) for variant, cell in cells.items()} for figure, cells in figures.items()
        }
        for protocol, figures in summary.items()
    }


def orders(summary: Summary, printed: PaperTable | None) -> list[str]:
    """For each figure that the paper has too, its order of the variants beside the one found here."""
    lines = []
    for protocol, figures in summary.items():
        for figure, cells in figures.items():
            column = next((c for c in printed.columns if _plain(c) == _plain(figure)), None) if printed else None
            if printed is None or column is None:
                continue
            both = {name: cell for name, cell in cells.items() if name in printed.rows and cell.mean == cell.mean}
            if len(both) < 2:
                continue
            ours = _ranked({name: cell.mean for name, cell in both.items()})
            theirs = _ranked({name: printed.figure(column, name) for name in both})
            verdict = "the same order" if ours == theirs else "another order"
            lines.append(f"{protocol}, {figure}: here {ours}; paper {theirs}: {verdict}{_beyond(both)}")
    return lines


def _ranked(values: Mapping[str, float]) -> str:
    """``a > b = c``, the largest first."""
    names = sorted(values, key=lambda name: -values[name])
    signs = [" = " if values[a] == values[b] else " > " for a, b in pairwise(names)]
    return "".join(part for pair in zip(names, [*signs, ""], strict=True) for part in pair)


def _beyond(cells: Mapping[str, Cell]) -> str:
    """Which variants differ from the first by more than the resamples do."""
    others = {name: cell.gain_interval for name, cell in cells.items() if cell.gain_interval is not None}
    first = next((name for name, cell in cells.items() if cell.gain is None), None)
    if first is None or not others:
        return ""
    apart = [f"'{name}'" for name, (low, high) in others.items() if low > 0 or high < 0]
    who = f"{' and '.join(apart)} differ" if len(apart) > 1 else f"{apart[0] if apart else 'no other'} differs"
    return f"; beyond chance {who} from '{first}'"


def _plain(name: str) -> str:
    plain = name.lower().replace("_", "").replace(" ", "")
    return {"apsmall": "aps", "apmedium": "apm", "aplarge": "apl"}.get(plain, plain)


def tables(summary: Summary) -> list[tuple[str, list[list[str]]]]:
    """Of each protocol its name and a row of text a figure, the header first."""
    found = []
    for protocol, figures in summary.items():
        variants = list(next(iter(figures.values())))
        body = [[name, *(_text(cells[each]) for each in variants)] for name, cells in figures.items()]
        found.append((protocol, [["figure", *variants], *body]))
        gains = [[name, *(_gain(cells[each]) for each in variants[1:])] for name, cells in figures.items()]
        found.append((f"{protocol}, difference from {variants[0]}", [["figure", *variants[1:]], *gains]))
    return found


def _text(cell: Cell) -> str:
    if cell.mean != cell.mean:
        return NOTHING
    return f"{cell.mean:.1f} ({cell.interval[0]:.1f} to {cell.interval[1]:.1f})"


def _gain(cell: Cell) -> str:
    if cell.gain is None or cell.gain != cell.gain:
        return NOTHING
    ends = cell.gain_interval
    return f"{cell.gain:+.1f}" + (f" ({ends[0]:+.1f} to {ends[1]:+.1f})" if ends else "")


def paper_rows(printed: PaperTable) -> list[list[str]]:
    """The paper's table as rows of text, the header first."""
    body = [
        [name, *(NOTHING if value is None else f"{value:.1f}" for value in values)]
        for name, values in printed.rows.items()
    ]
    return [["variant", *printed.columns], *body]


def as_markdown(title: str, about: Sequence[str], summary: Summary, printed: PaperTable | None) -> str:
    """The tables as a document."""
    parts = [f"# {title}", *about]
    parts += [f"## {name}\n\n{markdown(rows)}" for name, rows in tables(summary)]
    if printed is not None:
        parts.append(
            f"## The paper's {printed.number}\n\nMeasured on {printed.data}: another data set, so that only the order "
            f"can be compared.\n\n{markdown(paper_rows(printed))}"
        )
        parts += [f"- {line}" for line in orders(summary, printed)]
    return "\n\n".join(parts) + "\n"


def as_page(title: str, about: Sequence[str], summary: Summary, printed: PaperTable | None) -> str:
    """The tables and bars as a page that needs no other file."""
    parts = [card("".join(f"<p>{html.escape(line)}</p>" for line in about))]
    parts += [card(table(rows), name) for name, rows in tables(summary)]
    if printed is not None:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in orders(summary, printed))
        note = f"Measured on {printed.data}: another data set, so that only the order can be compared."
        parts.append(card(table(paper_rows(printed)) + f"<ul>{lines}</ul>", f"The paper's {printed.number}", note))
    drawn = [
        bar_chart(f"{protocol}: {figure}", [(name, [_bar(cell)]) for name, cell in cells.items()], [figure])
        for protocol, figures in summary.items()
        for figure, cells in figures.items()
    ]
    parts.append(card(f'<div class="charts">{"".join(drawn)}</div>', "Bars"))
    return page(title, "means over the seeds, times 100, with 95 % intervals", "\n".join(parts))


def _bar(cell: Cell) -> Bar:
    if cell.mean != cell.mean:
        return Bar(value=None)
    return Bar(value=cell.mean, interval=cell.interval)


def write_study(study: Study, runs: Mapping[str, Sequence[TaskRun]]) -> str:
    """Write table, page and json of an ablation.

    Returns:
        The table.

    Raises:
        DataError: a file cannot be written.
    """
    measured, items = measure(study.tasks, runs)
    found = summarise(measured, study.resamples)
    printed = TABLES.get(KINDS[study.kind].paper)
    first = next(iter(runs.values()))[0]
    everywhere = [run.result["pinned"] for each in runs.values() for run in each]
    alike = {name: text for name, text in everywhere[0].items() if all(each.get(name) == text for each in everywhere)}
    pinned = "; ".join(f"{name}: {text}" for name, text in alike.items())
    about = [
        f"{KINDS[study.kind].summary}; recipe {study.recipe.name}{''.join(f' {word}' for word in study.overrides)}",
        f"{first.name}, {items:,} items; {pinned}",
        f"Means over the seeds {', '.join(map(str, study.seeds))}, times 100; behind each the range of 95 % of the "
        f"resamples, which draw the images{' and the seeds' if len(study.seeds) > 1 else ''} anew.",
    ]
    title = f"Ablation: {study.kind}"
    text = as_markdown(title, about, found, printed)
    write_file(study.out / TABLE, text)
    write_page(as_page(title, about, found, printed), study.out / PAGE, "--out")
    origin = {name: [json.loads(json.dumps(run.manifest)) for run in each] for name, each in runs.items()}
    write_json(
        study.out / RESULT,
        {
            "ablation": study.kind,
            "task": first.name,
            "items": items,
            "seeds": list(study.seeds),
            "variants": [dataclasses.asdict(variant) for variant in study.variants],
            "pinned": alike,
            "protocols": finite(to_dict(found)),
            "orders": orders(found, printed),
            "manifests": origin,
        },
    )
    return text + f"\nwritten to {study.out / TABLE}, {study.out / RESULT} and {study.out / PAGE}"

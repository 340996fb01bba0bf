"""The variants of an ablation side by side: means over the seeds with intervals, differences, and the paper's order."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from regiongpt.ablate.study import KINDS, Study
from regiongpt.charts import Bar, bar_chart
from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.bootstrap import (
    FEWEST_IMAGES,
    TOO_FEW,
    Floats,
    Statistic,
    around,
    centred,
    ends,
    resample,
    too_few,
)
from regiongpt.evaluate.paper import TABLES, PaperTable
from regiongpt.evaluate.report import printed_rows
from regiongpt.evaluate.runner import load_items
from regiongpt.evaluate.runs import PAGE, RESULT, TaskRun
from regiongpt.evaluate.tables import NOTHING, markdown
from regiongpt.evaluate.task import Task
from regiongpt.report import write_page
from regiongpt.storage import finite, write_file, write_json

TABLE: Final = "table.md"
FEWEST_SEEDS: Final = 2

Measured = Mapping[str, Mapping[str, Statistic]]
"""Statistics by protocol and figure."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of one variant, times 100.

    Attributes:
        mean: Mean over the seeds.
        seeds: The figure with each seed.
        interval: 95 % of the resamples, each of which draws images and seeds anew; None if there are too few.
        gain: Difference from the first variant; None for the first.
        gain_interval: Its interval, resampled with the same images; None if there are too few seeds, images or
            differing answers, or the two were not asked about the same images.
        too_few: Whether there are too few seeds, images or differing answers to tell.
    """

    mean: float
    seeds: tuple[float, ...]
    interval: tuple[float, float] | None = None
    gain: float | None = None
    gain_interval: tuple[float, float] | None = None
    too_few: bool = False


Summary = dict[str, dict[str, dict[str, Cell]]]
"""Cells by protocol, figure and variant."""


def write_summary(study: Study, runs: Mapping[str, Sequence[TaskRun]]) -> str:
    """Write table, page and JSON into the ablation's folder.

    Args:
        study: The ablation.
        runs: By variant, its scored task with each seed.

    Returns:
        The table, and where everything is.

    Raises:
        DataError: The variants have no item in common, or a file cannot be written.
    """
    measured, items = measure(study.tasks, runs)
    found = summarise(measured, study.options.resamples)
    printed = TABLES.get(KINDS[study.kind].paper)
    first = next(iter(runs.values()))[0]
    everywhere = [run.result["pinned"] for each in runs.values() for run in each]
    alike = {name: text for name, text in everywhere[0].items() if all(each.get(name) == text for each in everywhere)}
    about = [
        f"{KINDS[study.kind].summary}; recipe {study.recipe}{''.join(f' {word}' for word in study.overrides)}",
        f"{first.name}, {items:,} items; {'; '.join(f'{name}: {text}' for name, text in alike.items())}",
        f"Means over the seeds {', '.join(map(str, study.seeds))}, times 100; behind each the range of 95 % of the "
        "resamples, which draw the images and the seeds anew.",
    ]
    if any(cell.too_few for figures in found.values() for cells in figures.values() for cell in cells.values()):
        about.append(
            f"{TOO_FEW[:1].upper()}{TOO_FEW[1:]} where it says so: that takes {FEWEST_SEEDS} seeds, {FEWEST_IMAGES} "
            "images and a few of them with differing answers."
        )
    title, said = f"Ablation: {study.kind}", orders(found, printed)
    rows = tables(found)
    paper = [] if printed is None else [printed_rows(printed)]
    measured_on = (
        f"Measured on {printed.data}: another data set, so that only the order can be compared." if printed else ""
    )
    parts = [f"# {title}", *about, *(f"## {name}\n\n{markdown(each)}" for name, each in rows)]
    if printed is not None:
        parts += [
            f"## The paper's {printed.number}\n\n{measured_on}\n\n{markdown(paper[0])}",
            *(f"- {x}" for x in said),
        ]
    text = "\n\n".join(parts) + "\n"
    write_file(study.out / TABLE, text)
    write_page(
        study.out / PAGE,
        "ablation.html",
        title=title,
        made="means over the seeds, times 100, with 95 % intervals",
        about=about,
        tables=rows,
        paper=[(f"The paper's {printed.number}", paper[0], measured_on, said)] if printed else [],
        charts=[
            bar_chart(f"{protocol}: {figure}", [(name, [_bar(cell)]) for name, cell in cells.items()], [figure])
            for protocol, figures in found.items()
            for figure, cells in figures.items()
        ],
    )
    write_json(
        study.out / RESULT,
        {
            "ablation": study.kind,
            "task": first.name,
            "items": items,
            "seeds": list(study.seeds),
            "variants": [dataclasses.asdict(variant) for variant in study.variants],
            "pinned": alike,
            "protocols": finite(
                {
                    protocol: {
                        figure: {name: dataclasses.asdict(cell) for name, cell in cells.items()}
                        for figure, cells in figures.items()
                    }
                    for protocol, figures in found.items()
                }
            ),
            "orders": said,
            "manifests": {name: [run.manifest for run in each] for name, each in runs.items()},
        },
    )
    return text + f"\nwritten to {study.out / TABLE}, {study.out / RESULT} and {study.out / PAGE}"


def measure(tasks: Mapping[str, Task], runs: Mapping[str, Sequence[TaskRun]]) -> tuple[dict[str, list[Measured]], int]:
    """The statistics of all variants with all seeds, on the items that every variant was asked about.

    Returns:
        By variant, the statistics of each seed; and the number of items.

    Raises:
        DataError: The variants have no item in common.
    """
    items = {name: load_items(task) for name, task in tasks.items()}
    shared = set.intersection(*({item.id for item in each} for each in items.values()))
    if not shared:
        raise DataError("the variants were asked about different items, and have none in common")
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
        measured: By variant, the statistics of each seed; the others are held against the first variant.
        resamples: Resamples of the bootstrap, at least 1.
        seed: Seed of the drawing.
    """
    names = list(measured)
    summary: Summary = {}
    for protocol, figures in measured[names[0]][0].items():
        for figure in figures:
            if all(figure in each.get(protocol, {}) for runs in measured.values() for each in runs):
                own = {name: [each[protocol][figure] for each in measured[name]] for name in names}
                summary.setdefault(protocol, {})[figure] = _cells(own, resamples, seed)
    return summary


def _cells(own: Mapping[str, Sequence[Statistic]], resamples: int, seed: int) -> dict[str, Cell]:
    first, *_ = own
    values = {name: tuple(100 * each.value() for each in statistics) for name, statistics in own.items()}
    means = {name: float(np.mean(each)) for name, each in values.items()}
    drawn = {name: _drawn(statistics, resamples, seed, place) for place, (name, statistics) in enumerate(own.items())}
    cells = {}
    for name, statistics in own.items():
        few = len(statistics) < FEWEST_SEEDS or len(statistics[0].clusters) < FEWEST_IMAGES
        alike = statistics[0].clusters == own[first][0].clusters
        unsure = few or (name != first and alike and any(map(too_few, own[first], statistics)))
        gain = means[name] - means[first]
        cells[name] = Cell(
            mean=means[name],
            seeds=values[name],
            interval=None if few else around(drawn[name], means[name], 100 * statistics[0].most),
            gain=None if name == first else gain,
            gain_interval=None
            if name == first or unsure or not alike
            else ends(centred(drawn[name] - drawn[first], gain)),
            too_few=unsure,
        )
    return cells


def _drawn(statistics: Sequence[Statistic], resamples: int, seed: int, place: int) -> Floats:
    """The mean over seeds of each resample: the images are the same for all variants, the seeds each one's own."""
    times = resample(len(statistics[0].clusters), resamples, seed)
    values = 100 * np.stack([each.values(times) for each in statistics])
    picks = np.random.default_rng((seed, 31, place)).integers(len(statistics), size=(len(statistics), resamples))
    means: Floats = np.take_along_axis(values, picks, axis=0).mean(axis=0)
    return means


def orders(summary: Summary, printed: PaperTable | None) -> list[str]:
    """For each figure that the paper has too, its order of the variants beside the one found here."""
    lines = []
    columns = {_plain(column): column for column in printed.columns} if printed else {}
    for protocol, figures in summary.items():
        for figure, cells in figures.items():
            both = {n: c for n, c in cells.items() if printed and n in printed.rows and c.mean == c.mean}
            if printed is None or _plain(figure) not in columns or len(both) < 2:
                continue
            theirs = _ranked({name: printed.figure(columns[_plain(figure)], name) for name in both})
            if any(cell.too_few for cell in both.values()):
                lines.append(f"{protocol}, {figure}: here {TOO_FEW}; paper {theirs}")
                continue
            ours = _ranked({name: cell.mean for name, cell in both.items()})
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
    """For each protocol its name and a row of text per figure, the header first."""
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
    return f"{cell.mean:.1f}" + (f" ({cell.interval[0]:.1f} to {cell.interval[1]:.1f})" if cell.interval else "")


def _gain(cell: Cell) -> str:
    if cell.gain is None or cell.gain != cell.gain:
        return NOTHING
    if cell.too_few:
        return TOO_FEW
    ends = cell.gain_interval
    return f"{cell.gain:+.1f}" + (f" ({ends[0]:+.1f} to {ends[1]:+.1f})" if ends else "")


def _bar(cell: Cell) -> Bar:
    return Bar(value=cell.mean if cell.mean == cell.mean else None, interval=cell.interval)

"""Results as tables of text and as one page: beside the paper's, broken down, with the worst mistakes."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from regiongpt.drawing import draw_regions
from regiongpt.errors import RegionGPTError
from regiongpt.evaluate.paper import OF_TASK, OURS, TABLES, PaperTable
from regiongpt.evaluate.task import Answer, Item, Result
from regiongpt.evaluate.tasks import task_class
from regiongpt.report import Bar, bar_chart, picture, render, write_page

if TYPE_CHECKING:
    from regiongpt.evaluate.run import TaskRun

PAGE: Final = "index.html"
NOTHING: Final = "–"
_FEW: Final = 12
"""Most groups of which every protocol has a bar of its own, and most columns of a table that is not folded away."""
_COLUMN: Final = 30
"""Most bars in a chart."""
_ALIKE: Final = 3
"""Most mistakes of one truth, and of one image."""

Rows = list[list[str]]
"""A table of text, its header first."""

# ---------------------------------------------------------------------------------------------------------------------
# Text


def tables(run: "TaskRun") -> list[tuple[str, Rows]]:
    """A table for each protocol: its name, and its rows; numbers are times 100, as the paper prints them."""
    paper = task_class(run.name).paper
    found = []
    for protocol, figures in run.result["protocols"].items():
        printed = paper.get(protocol, {})
        rows = [["figure", "value", "95 %", "items", "paper"]]
        for name, figure in figures.items():
            value, interval = times_100(figure)
            row = [name, number(value), f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else ""]
            rows.append([*row, f"{figure['of']:,}", number(100 * printed[name], 2) if name in printed else NOTHING])
        has_paper = any(row[-1] != NOTHING for row in rows[1:])
        found.append((protocol, rows if has_paper else [row[:-1] for row in rows]))
    return found


def as_text(run: "TaskRun") -> str:
    """A task's results for a terminal."""
    lines = [run.name, "  " + "; ".join(f"{name}: {text}" for name, text in run.result["pinned"].items())]
    for protocol, rows in tables(run):
        lines += ["", f"  {protocol}", *(f"    {line}" for line in aligned(rows))]
    if paper := task_class(run.name).paper_source:
        lines += ["", f"  paper: {paper}; another data set is another test"]
    return "\n".join([*lines, *(f"  note: {note}" for note in run.result["notes"])])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table in Markdown."""
    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def number(value: float | None, digits: int = 1) -> str:
    """A value, already times 100."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def times_100(figure: Mapping[str, Any]) -> tuple[float | None, tuple[float, float] | None]:
    """Value and interval of a figure as it was written, times 100."""
    value, ends = figure["value"], figure["interval"]
    interval = None if ends is None or None in ends else (100 * ends[0], 100 * ends[1])
    return None if value is None else 100 * value, interval


def printed_rows(printed: PaperTable) -> Rows:
    """A table of the paper as rows of text."""
    body = [
        [f"{name} (the paper's)" if name == OURS else name, *(number(value, 2) for value in values)]
        for name, values in printed.rows.items()
    ]
    return [["method", *printed.columns], *body]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def write_report(out: Path, runs: Sequence["TaskRun"]) -> None:
    """Write ``index.html`` of a run with some tasks; DataError where it cannot be written."""
    summary = [["task, protocol", "figure", "value", "95 %", "items", "paper"]]
    for run in runs:
        for protocol, rows in tables(run):
            summary += [[f"{run.name}, {protocol}", *row, NOTHING][:6] for row in rows[1:2]]
    write_page(
        out / PAGE,
        "evaluation.html",
        title="Evaluation",
        made="; ".join(sorted({_origin(run.manifest) for run in runs})),
        summary=summary,
        tasks=[
            {
                "name": run.name,
                **{name: run.result[name] for name in ("pinned", "notes")},
                "tables": tables(run),
                "printed": [(TABLES[name], printed_rows(TABLES[name])) for name in OF_TASK.get(run.name, ())],
                "paper_source": task_class(run.name).paper_source,
                "charts": list(_charts(run.result["breakdowns"])),
                "extra": [_extra(table) for table in run.result["tables"]],
                "origin": list(_facts(run.manifest)),
                "mistakes": Markup(run.mistakes),
            }
            for run in runs
        ],
    )


def _origin(manifest: Mapping[str, Any]) -> str:
    model, predictions = manifest.get("model"), manifest.get("predictions")
    name = f"predictions {predictions['name']}" if predictions else f"model {model['name']}" if model else "unknown"
    commit = (manifest["code"].get("commit") or {}).get("hash")
    return f"{name}, regiongpt {manifest['packages']['regiongpt']}{f' at {commit[:10]}' if commit else ''}"


def _charts(found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> Iterator[Markup]:
    """A chart for each way of dividing the items, of the first figure of each protocol."""
    for by in dict.fromkeys(by for parts in found.values() for by in parts):
        protocols = [protocol for protocol, parts in found.items() if by in parts]
        groups = list(dict.fromkeys(group for protocol in protocols for group in found[protocol][by]))
        protocols = protocols[:1] if len(groups) > _FEW else protocols
        names = {each: next(iter(next(iter(found[each][by].values())))) for each in protocols}
        listed = [
            (group, [_bar(found[each][by].get(group, {}).get(names[each])) for each in protocols]) for group in groups
        ]
        if len(groups) > _FEW:
            listed.sort(key=lambda pair: -(pair[1][0].value or 0.0))
        series = [f"{protocol}: {name}" for protocol, name in names.items()]
        for start in range(0, len(listed), _COLUMN):
            part = f", {start + 1} to {min(len(listed), start + _COLUMN)}" if len(listed) > _COLUMN else ""
            title = f"by {by}{part}" + (f" ({series[0]})" if len(series) == 1 else "")
            yield bar_chart(title, listed[start : start + _COLUMN], series, reach=100.0)


def _bar(figure: Mapping[str, Any] | None) -> Bar:
    if figure is None:
        return Bar(value=None)
    value, interval = times_100(figure)
    return Bar(value=value, interval=interval, of=figure["of"])


def _extra(found: Mapping[str, Any]) -> tuple[str, Rows, bool]:
    """A table of the task's own, and whether it is to be folded away."""
    body = [
        [NOTHING if value is None else f"{value:.3f}" if isinstance(value, float) else str(value) for value in row]
        for row in found["rows"]
    ]
    return found["title"], [list(found["columns"]), *body], len(found["columns"]) > _FEW or len(body) > 2 * _FEW


def _facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for part, values in manifest.items():
        for name, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            if part != "options" and value is not None:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                yield f"{part}: {name}" if name else part, text


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def worst(result: Result, answers: Mapping[str, Answer], count: int) -> list[dict[str, Any]]:
    """The ``count`` rows with the lowest scores, by the first figure of each; among equals the most confident first.

    At most three are of one truth, and of one image.
    """

    def confidence(name: str) -> float:
        answer = answers.get(name, Answer())
        return max(answer.scores) if answer.scores else answer.probability or 0.0

    first = {row["id"]: next(iter(row["scores"].values()), 1.0) for row in result.rows}
    wrong = [row for row in result.rows if not row["missing"] and first[row["id"]] < 1.0]
    wrong.sort(key=lambda row: (first[row["id"]], -confidence(row["id"]), str(row["id"])))
    chosen: list[dict[str, Any]] = []
    seen: Counter[tuple[str, Any]] = Counter()
    for row in wrong:
        marks = [("truth", row["truth"]), ("image", row["image_id"])]
        if len(chosen) < count and all(seen[mark] < _ALIKE for mark in marks):
            chosen.append(row)
            seen.update(marks)
    return chosen


def draw_mistakes(rows: Sequence[Mapping[str, Any]], items: Sequence[Item], answers: Mapping[str, Answer]) -> str:
    """Cards of HTML, each with the image, its regions, the question, the answer and the truth."""
    asked = {item.id: item for item in items}
    cards = []
    for row in rows:
        item, answer = asked[row["id"]], answers.get(row["id"], Answer())
        shown: Markup | None = None
        fault = ""
        try:
            drawn = draw_regions(item.image, item.regions)
            shown = picture(drawn, f"{item.image.name} with the regions asked about", 640)
        except RegionGPTError as error:
            fault = str(error)
        ranked = sorted(zip(item.choices, answer.scores or (), strict=False), key=lambda pair: -pair[1])
        groups = [f"{name} {value}" for name, value in item.groups.items()]
        cards.append(
            {
                "item": item,
                "about": " · ".join([item.image.name, *([", ".join(groups)] if groups else [])]),
                "answer": "no answer" if row["answer"] is None else str(row["answer"]),
                "probability": answer.probability,
                "scores": ranked[:3],
                "picture": shown,
                "fault": fault,
            }
        )
    return render("mistakes.html", cards=cards)

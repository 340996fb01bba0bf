"""A run as one page: figures beside the paper's, bars by size and category, the worst mistakes on their images."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from regiongpt.charts import Bar, bar_chart
from regiongpt.evaluate.paper import OF_TASK, OURS, TABLES, PaperTable
from regiongpt.evaluate.runs import MISTAKES, PAGE, TaskRun
from regiongpt.evaluate.tables import NOTHING, Row, interval_of, paper_source, rows, times_100
from regiongpt.pages import card, facts, page, table, write_page

_FEW: Final = 12
"""Groups up to which every protocol has its own bar; beyond, the first protocol alone."""
_COLUMN: Final = 30
"""Bars in one column."""
_WIDE: Final = 12
"""Columns of a table beyond which it is folded away."""


def write_report(out: Path, runs: Sequence[TaskRun]) -> Path:
    """Writes ``index.html`` of a run.

    Args:
        out: Folder of the run.
        runs: Its tasks, from :func:`regiongpt.evaluate.runs.read_run`.

    Returns:
        The file.

    Raises:
        ConfigError: It cannot be written.
    """
    sections = [_summary(runs), *(_task(run) for run in runs)]
    origin = {_origin(run) for run in runs}
    body = "\n".join(sections)
    text = page("Evaluation", "; ".join(sorted(origin)), body, STYLE)
    write_page(text, out / PAGE, "--out")
    return out / PAGE


def _origin(run: TaskRun) -> str:
    model, predictions = run.manifest.get("model"), run.manifest.get("predictions")
    name = f"predictions {predictions['name']}" if predictions else f"model {model['name']}" if model else "unknown"
    commit = (run.manifest["code"].get("commit") or {}).get("hash")
    return f"{name}, regiongpt {run.manifest['packages']['regiongpt']}{f' at {commit[:10]}' if commit else ''}"


def _summary(runs: Sequence[TaskRun]) -> str:
    """The first figure of every protocol of every task."""
    cells = [["task, protocol", "figure", "value", "95 %", "items", "paper"]]
    for run in runs:
        seen: set[str] = set()
        for row in rows(run):
            if row.protocol not in seen:
                seen.add(row.protocol)
                cells.append([f"{run.name}, {row.protocol}", *row.cells()])
    note = (
        "<p class='meta'>Figures times 100, as the paper prints them. Behind each value stands the range of 95 % of "
        "the bootstrap resamples of the images. The paper's figures are of its own data sets: they say what a "
        "7B model reached there, not what this one would have to reach here.</p>"
    )
    return card(table(cells) + note, "Summary")


def _task(run: TaskRun) -> str:
    found = list(rows(run))
    protocols = list(dict.fromkeys(row.protocol for row in found))
    parts = [facts([(name, str(text)) for name, text in run.result["pinned"].items()])]
    parts += [f"<p class='note'>{html.escape(note)}</p>" for note in run.result["notes"]]
    tables = [_figures(protocol, [row for row in found if row.protocol == protocol]) for protocol in protocols]
    tables += [_paper(TABLES[name]) for name in OF_TASK.get(run.name, ())]
    parts.append(f'<div class="tables">{"".join(f"<div>{each}</div>" for each in tables)}</div>')
    if any(row.paper is not None for row in found):
        parts.append(f"<p class='meta'>paper: {html.escape(paper_source(run))}</p>")
    drawn = "".join(_breakdowns(run.result["breakdowns"]))
    if drawn:
        parts.append(f'<h3>Broken down</h3><div class="charts">{drawn}</div>')
    parts += [_extra(each) for each in run.result["tables"]]
    parts.append(_folded("Where this comes from", _manifest(run.manifest)))
    gallery = run.folder / MISTAKES
    shown = gallery.read_text(encoding="utf-8") if gallery.is_file() else ""
    worst = (
        f"<h2 class='worst'>{html.escape(run.name)}: the worst mistakes</h2><div class='gallery'>{shown}</div>"
        if shown
        else ""
    )
    return card("\n".join(parts), run.name) + worst


def _figures(protocol: str, found: Sequence[Row]) -> str:
    with_paper = any(row.paper is not None for row in found)
    head = ["figure", "value", "95 %", "items", *(["paper"] if with_paper else [])]
    return table([head, *(row.cells()[: len(head)] for row in found)], protocol)


def _paper(printed: PaperTable) -> str:
    body = [
        [f"{name} (the paper's)" if name == OURS else name, *(NOTHING if x is None else f"{x:.2f}" for x in values)]
        for name, values in printed.rows.items()
    ]
    note = f" {printed.note}" if printed.note else ""
    return (
        table([["method", *printed.columns], *body], f"The paper's {printed.number}: {printed.title}")
        + f"<p class='meta'>Measured on {html.escape(printed.data)}: another data set than the tables here, unless "
        f"they name it.{html.escape(note)}</p>"
    )


def _breakdowns(found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> Iterator[str]:
    """A chart for each way of dividing the items, of the first figure of each protocol."""
    for by in dict.fromkeys(by for parts in found.values() for by in parts):
        protocols = [protocol for protocol, parts in found.items() if by in parts]
        groups = list(dict.fromkeys(group for protocol in protocols for group in found[protocol][by]))
        if len(groups) > _FEW:
            protocols = protocols[:1]
        names = {protocol: _first_figure(found[protocol][by]) for protocol in protocols}
        listed = [
            (group, [_bar(found[protocol][by].get(group, {}).get(names[protocol])) for protocol in protocols])
            for group in groups
        ]
        if len(groups) > _FEW:
            listed.sort(key=lambda pair: -(pair[1][0].value or 0.0))
        series = [f"{protocol}: {names[protocol]}" for protocol in protocols]
        for start in range(0, len(listed), _COLUMN):
            part = f", {start + 1} to {min(len(listed), start + _COLUMN)}" if len(listed) > _COLUMN else ""
            title = f"by {by}{part}" + (f" ({series[0]})" if len(series) == 1 else "")
            yield bar_chart(title, listed[start : start + _COLUMN], series, reach=100.0)


def _first_figure(groups: Mapping[str, Mapping[str, Any]]) -> str:
    return next((name for figures in groups.values() for name in figures), "")


def _bar(figure: Mapping[str, Any] | None) -> Bar:
    if figure is None:
        return Bar(value=None)
    return Bar(value=times_100(figure["value"]), interval=interval_of(figure), of=figure["of"])


def _extra(found: Mapping[str, Any]) -> str:
    """A table of the task's own, folded away where it is large."""
    body = [[_cell(value) for value in row] for row in found["rows"]]
    shown = table([list(found["columns"]), *body])
    if len(found["columns"]) > _WIDE or len(body) > 2 * _WIDE:
        return _folded(found["title"], shown)
    return f"<h3>{html.escape(found['title'])}</h3>{shown}"


def _cell(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _manifest(manifest: Mapping[str, Any]) -> str:
    pairs: list[tuple[str, str]] = []
    for part, values in manifest.items():
        if isinstance(values, Mapping) and part != "options":
            pairs += [(f"{part}: {name}", _plain(value)) for name, value in values.items()]
        elif part != "options" and values is not None:
            pairs.append((part, _plain(values)))
    return facts(pairs)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


STYLE: Final = """
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; font-size: 14px; }
details .facts, details .wide { margin-top: 8px; }
.note { margin: 10px 0; padding: 8px 12px; border-left: 3px solid var(--c4); background: var(--asked);
  overflow-wrap: anywhere; }
.worst { margin: 28px 0 0; } .talk strong { color: var(--ink); }
article > .charts, .tables { margin-top: 14px; }
.tables, .gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr));
  gap: 0 20px; }
.tables > div, .gallery > article { min-width: 0; } .gallery .talk { flex-basis: 100%; }
.gallery .talk p { margin-bottom: 2px; }
.gallery .a { background: var(--wrong); color: var(--ink); } :root { --wrong: #f8d7d3; }
@media (prefers-color-scheme: dark) { :root { --wrong: #5c2b29; } }
.gallery .pair > img { max-width: 100%; max-height: 480px; object-fit: contain; }
"""

"""A run as one page: results beside the paper's, bars by size and category, the worst mistakes on their images."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from regiongpt.charts import Bar, bar_chart
from regiongpt.drawing import draw_regions
from regiongpt.errors import RegionGPTError
from regiongpt.evaluate.paper import OF_TASK, OURS, TABLES, PaperTable
from regiongpt.evaluate.runs import MISTAKES, PAGE, TaskRun
from regiongpt.evaluate.tables import NOTHING, rows, tables, times_100
from regiongpt.evaluate.task import Answer, Item, Result
from regiongpt.evaluate.tasks import task_class
from regiongpt.report import picture, render, write_page

_FEW: Final = 12
"""Groups up to which every protocol has its own bar, and columns up to which a table is not folded away."""
_COLUMN: Final = 30
"""Bars in one column."""
_ALIKE: Final = 3
"""Most mistakes of one truth, and of one image: a page of one confusion alone would show little."""
_SIDE: Final = 640


def write_report(out: Path, runs: Sequence[TaskRun]) -> None:
    """Write ``index.html`` of a run.

    Args:
        out: Folder of the run.
        runs: Its tasks, from :func:`regiongpt.evaluate.runs.read_run`.

    Raises:
        DataError: It cannot be written.
    """
    summary = [["task, protocol", "figure", "value", "95 %", "items", "paper"]]
    for run in runs:
        first = {row.protocol: row for row in reversed(list(rows(run)))}
        summary += [[f"{run.name}, {name}", *first[name].cells()] for name in run.result["protocols"] if name in first]
    write_page(
        out / PAGE,
        "evaluation.html",
        title="Evaluation",
        made="; ".join(sorted({_origin(run) for run in runs})),
        summary=summary,
        tasks=[_task(run) for run in runs],
    )


def _origin(run: TaskRun) -> str:
    model, predictions = run.manifest.get("model"), run.manifest.get("predictions")
    name = f"predictions {predictions['name']}" if predictions else f"model {model['name']}" if model else "unknown"
    commit = (run.manifest["code"].get("commit") or {}).get("hash")
    return f"{name}, regiongpt {run.manifest['packages']['regiongpt']}{f' at {commit[:10]}' if commit else ''}"


def _task(run: TaskRun) -> dict[str, Any]:
    gallery = run.folder / MISTAKES
    return {
        "name": run.name,
        "pinned": run.result["pinned"],
        "notes": run.result["notes"],
        "tables": tables(run),
        "printed": [{**vars(TABLES[name]), "rows": printed_rows(TABLES[name])} for name in OF_TASK.get(run.name, ())],
        "paper_source": task_class(run.name).paper_source,
        "charts": list(_charts(run.result["breakdowns"])),
        "extra": [_extra(table) for table in run.result["tables"]],
        "origin": list(_facts(run.manifest)),
        "mistakes": Markup(gallery.read_text(encoding="utf-8")) if gallery.is_file() else "",
    }


def printed_rows(printed: PaperTable) -> list[list[str]]:
    """A table of the paper as rows of text, the header first."""
    body = [
        [f"{name} (the paper's)" if name == OURS else name, *(NOTHING if x is None else f"{x:.2f}" for x in values)]
        for name, values in printed.rows.items()
    ]
    return [["method", *printed.columns], *body]


def _charts(found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> Iterator[Markup]:
    """A chart for each way of dividing the items, of the first figure of each protocol."""
    for by in dict.fromkeys(by for parts in found.values() for by in parts):
        protocols = [protocol for protocol, parts in found.items() if by in parts]
        groups = list(dict.fromkeys(group for protocol in protocols for group in found[protocol][by]))
        if len(groups) > _FEW:
            protocols = protocols[:1]
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


def _extra(found: Mapping[str, Any]) -> tuple[str, list[list[str]], bool]:
    """A table of the task's own, and whether it is to be folded away."""
    body = [
        [NOTHING if value is None else f"{value:.3f}" if isinstance(value, float) else str(value) for value in row]
        for row in found["rows"]
    ]
    return found["title"], [list(found["columns"]), *body], len(found["columns"]) > _FEW or len(body) > 2 * _FEW


def _facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for part, values in manifest.items():
        pairs = values.items() if isinstance(values, Mapping) else [("", values)]
        for name, value in pairs:
            if part != "options" and value is not None:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                yield f"{part}: {name}" if name else part, text


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def worst(result: Result, answers: Mapping[str, Answer], count: int) -> list[dict[str, Any]]:
    """The rows of a result that were answered worst, the worst first.

    Lowest score first, by the first figure that an item has a score of; among equals the most confident first.

    Args:
        result: The scored task.
        answers: By item id.
        count: At most so many, and at most three of one truth or of one image.
    """
    first = {row["id"]: next(iter(row["scores"].values()), 1.0) for row in result.rows}
    wrong = [row for row in result.rows if not row["missing"] and first[row["id"]] < 1.0]
    wrong.sort(key=lambda row: (first[row["id"]], -_confidence(answers.get(row["id"])), str(row["id"])))
    chosen: list[dict[str, Any]] = []
    seen: Counter[tuple[str, Any]] = Counter()
    for row in wrong:
        marks = [("truth", row["truth"]), ("image", row["image_id"])]
        if len(chosen) < count and all(seen[mark] < _ALIKE for mark in marks):
            chosen.append(row)
            seen.update(marks)
    return chosen


def _confidence(answer: Answer | None) -> float:
    """How sure the model was of its choice, else of its text; 0 where that is not known."""
    if answer is None:
        return 0.0
    return max(answer.scores) if answer.scores else answer.probability or 0.0


def mistakes(chosen: Sequence[Mapping[str, Any]], items: Sequence[Item], answers: Mapping[str, Answer]) -> str:
    """Cards of HTML, each with the image, its regions, the question, the answer and the truth.

    Args:
        chosen: Rows of a result, from :func:`worst`.
        items: The task's items.
        answers: By item id.
    """
    asked = {item.id: item for item in items}
    cards = []
    for row in chosen:
        item, answer = asked[row["id"]], answers.get(row["id"])
        card: dict[str, Any] = {"id": item.id, "question": item.question, "truth": item.truth, "fault": ""}
        groups = ", ".join(f"{name} {value}" for name, value in item.groups.items())
        card["about"] = f"{item.image.name}{f' · {groups}' if groups else ''}"
        card["answer"] = str(row["answer"] if row["answer"] is not None else "no answer")
        card["probability"] = answer.probability if answer is not None else None
        ranked = zip(item.choices, answer.scores, strict=True) if answer is not None and answer.scores else ()
        card["scores"] = sorted(ranked, key=lambda pair: -pair[1])[:3]
        try:
            drawn = draw_regions(item.image, item.regions)
            card["picture"] = picture(drawn, f"{item.image.name} with the regions asked about", _SIDE)
        except RegionGPTError as error:
            card["fault"] = str(error)
        cards.append(card)
    return render("mistakes.html", cards=cards)

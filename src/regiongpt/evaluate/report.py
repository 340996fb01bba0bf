"""Results of finished runs: read, as text, as a page, and two runs compared by the paired bootstrap."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Final, NamedTuple

import numpy as np

from regiongpt.data.shards import many
from regiongpt.drawing import Rows, aligned, draw_regions, picture, write_page
from regiongpt.errors import ConfigError, DataError, RegionGPTError
from regiongpt.evaluate import TASKS
from regiongpt.evaluate.bootstrap import TOO_FEW, Sampled, paired
from regiongpt.evaluate.task import OURS, TABLES, Answer, Item, PaperTable
from regiongpt.storage import finite, read_json, reason

RESULT, MANIFEST, PAGE = "result.json", "manifest.json", "index.html"
ITEMS, PREDICTIONS, SAMPLED = "items.jsonl", "predictions.jsonl", "resamples.json"
NOTHING: Final = "–"


class TaskRun(NamedTuple):
    """A scored task of a run: its folder ``DIR/TASK`` and what is in there; without items where it was read."""

    folder: Path
    result: dict[str, Any]
    manifest: dict[str, Any]
    items: Sequence[Item] = ()
    answers: Mapping[str, Answer] = {}


def read_run(out: Path) -> list[TaskRun]:
    """The finished tasks in a run's folder, in the order of the paper's tables; DataError for a broken one, or none."""
    folders = [out / name for name in TASKS if (out / name / MANIFEST).is_file()]
    if not folders:
        raise DataError(f"{out}: no finished task of `regiongpt evaluate` in this folder")
    result, manifest = ("task", "pinned", "protocols", "notes"), ("settings", "inputs", "code")
    return [
        TaskRun(folder=each, result=read_object(each / RESULT, result), manifest=read_object(each / MANIFEST, manifest))
        for each in folders
    ]


def read_object(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object with some keys; DataError where the file holds none."""
    found = read_json(path)
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise DataError(f"{path}: expected {', '.join(keys)}; evaluate again")
    return found


# -- Text --------------------------------------------------------------------------------------------------------------


def tables(run: TaskRun) -> list[tuple[str, Rows]]:
    """A table for each protocol: its name, and its rows; numbers are times 100, as the paper prints them."""
    found = []
    for protocol, figures in run.result["protocols"].items():
        paper = any(each.get("paper") is not None for each in figures.values())
        rows = [["result", "value", "95 %", "items", *["paper"] * paper]]
        for name, each in figures.items():
            row = [name, number(each["value"]), " to ".join(map(number, each["interval"] or ())), f"{each['of']:,}"]
            rows.append([*row, *[number(each.get("paper"), 2)] * paper])
        found.append((protocol, rows))
    return found


def as_text(run: TaskRun) -> str:
    """A task's results for a terminal."""
    lines = [run.result["task"], "  " + "; ".join(f"{name}: {text}" for name, text in run.result["pinned"].items())]
    for protocol, rows in tables(run):
        lines += ["", f"  {protocol}", *(f"    {line}" for line in aligned(rows))]
    if paper := run.result.get("paper"):
        lines += ["", f"  paper: {paper}; another data set is another test"]
    return "\n".join([*lines, *(f"  note: {note}" for note in run.result["notes"])])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table in Markdown."""
    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def number(share: float | None, digits: int = 1, sign: str = "") -> str:
    """A fraction times 100; what rounds to 0 has no minus sign."""
    return NOTHING if share is None or share != share else f"{round(100 * share, digits) + 0.0:{sign}.{digits}f}"


def printed_rows(table: PaperTable) -> Rows:
    """A table of the paper as rows of text."""
    rows = [["method", *table.columns]]
    for name, values in table.rows.items():
        shown = [NOTHING if value is None else f"{value:.2f}" for value in values]
        rows.append([f"{name} (the paper's)" if name == OURS else name, *shown])
    return rows


# -- The page ----------------------------------------------------------------------------------------------------------


def write_report(run: TaskRun, rows: Sequence[Mapping[str, Any]], mistakes: int) -> None:
    """Write ``index.html`` of a task that was just scored; DataError where it cannot be written."""
    model, predictions = run.manifest["model"], run.manifest.get("predictions")
    name = f"predictions {predictions['name']}" if predictions else f"model {model['name']}"
    asked = {item.id: item for item in run.items}
    write_page(
        run.folder / PAGE,
        "evaluation.html",
        title=f"Evaluation: {run.result['task']}",
        made=f"{name}, regiongpt {run.manifest['packages']['regiongpt']}",
        result=run.result,
        tables=tables(run),
        printed=[(table, printed_rows(table)) for table in TABLES.values() if table.task == run.result["task"]],
        origin=[(part, json.dumps(values)) for part, values in run.manifest.items()],
        mistakes=[
            _card(asked[row["id"]], run.answers.get(row["id"], Answer())) for row in worst(rows, run.answers, mistakes)
        ],
    )


def worst(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Answer], count: int) -> list[Mapping[str, Any]]:
    """The ``count`` rows with the lowest scores, by the first result of each; among equals the most confident first."""

    def rank(row: Mapping[str, Any]) -> tuple[float, float, str]:
        answer = answers.get(row["id"], Answer())
        sure = max(answer.scores) if answer.scores else answer.probability or 0.0
        return next(iter(row["scores"].values()), 1.0), -sure, row["id"]

    return sorted((row for row in rows if not row["missing"] and rank(row)[0] < 1.0), key=rank)[:count]


def _card(item: Item, answer: Answer) -> dict[str, Any]:
    """A mistake on the page: the image with its regions, the question, the answer and the truth."""
    try:
        shown = picture(draw_regions(item.image, item.regions), f"{item.image.name} with the regions asked about", 640)
    except RegionGPTError as error:
        return {"item": item, "answer": answer, "scores": [], "picture": str(error)}
    ranked = sorted(zip(item.choices, answer.scores or (), strict=False), key=lambda pair: -pair[1])
    return {"item": item, "answer": answer, "scores": ranked[:3], "picture": shown}


# -- Two runs compared -------------------------------------------------------------------------------------------------


def compare_runs(a: Path, b: Path) -> list[dict[str, Any]]:
    """Compare every task that two runs have in common; differences are B less A.

    Returns:
        Plain JSON for each: ``task``, ``items`` (how many), ``figures`` (by protocol and result, see :class:`Paired`),
        and the items that ``gained`` and ``lost``.

    Raises:
        ConfigError: The runs have different settings, files or items, or no task in common.
        DataError: A run cannot be read.
    """
    first, second = ({run.folder.name: run for run in read_run(folder)} for folder in (a, b))
    shared = [name for name in first if name in second]
    if not shared:
        raise ConfigError(f"no task in common: {', '.join(first)} in {a}, {', '.join(second)} in {b}")
    return [_compare(first[name], second[name]) for name in shared]


def _compare(a: TaskRun, b: TaskRun) -> dict[str, Any]:
    ours, theirs = ({**run.manifest["settings"], "data": ""} for run in (a, b))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    differing = [f"--{name}: {ours.get(name)!r} and {theirs.get(name)!r}" for name in names]
    differing += ["the annotation files"] if a.manifest["inputs"] != b.manifest["inputs"] else []
    rows = [_read_rows(run.folder / ITEMS) for run in (a, b)]
    sampled = [_read_sampled(run.folder / SAMPLED) for run in (a, b)]
    if not differing and [row["id"] for row in rows[0]] != [row["id"] for row in rows[1]]:
        differing = ["the items"]
    if differing:
        raise ConfigError(f"{a.folder} and {b.folder}: the runs differ in {'; '.join(differing)}")
    figures: dict[str, Any] = {}
    for protocol, found in sampled[0].items():
        for name in (name for name in found if name in sampled[1].get(protocol, {})):
            pair = paired(found[name], sampled[1][protocol][name])
            figures.setdefault(protocol, {})[name] = finite(pair._asdict())
    return {"task": a.folder.name, "items": len(rows[0]), "figures": figures, **changes(*rows)}


def changes(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The items that gained and lost, by the first result of each that both runs have; the largest change first."""
    found = []
    for ours, theirs in zip(a, b, strict=True):
        name = next((name for name in ours["scores"] if name in theirs["scores"]), None)
        if name and (by := theirs["scores"][name] - ours["scores"][name]):
            change = {"id": ours["id"], "truth": ours["truth"], "result": name, "by": by}
            found.append({**change, "a": ours["answer"] or NOTHING, "b": theirs["answer"] or NOTHING})
    found.sort(key=lambda change: -abs(change["by"]))
    return {"gained": [each for each in found if each["by"] > 0], "lost": [each for each in found if each["by"] < 0]}


def comparison_as_text(found: Mapping[str, Any]) -> str:
    """A comparison for a terminal, with at most 20 items of each kind."""
    lines = [f"{found['task']}: {found['items']:,} items"]
    for protocol, figures in found["figures"].items():
        rows = [["result", "A", "B", "B - A", "95 %", "p"]]
        for name, each in figures.items():
            ends = " to ".join(number(end, sign="+") for end in each["interval"] or ())
            p = TOO_FEW if each["too_few"] else NOTHING if each["p"] is None else f"{each['p']:.3f}"
            rows.append([name, number(each["a"]), number(each["b"]), number(each["difference"], sign="+"), ends, p])
        lines += ["", f"  {protocol}", *(f"    {line}" for line in aligned(rows))]
    for kind in ("gained", "lost"):
        lines += ["", f"  {kind}: {many(len(found[kind]), 'item')}"]
        rows = [
            [c["id"], c["truth"], *(shorten(c[run], 60, placeholder="…") for run in "ab"), f"{c['by']:+.2f}"]
            for c in found[kind][:20]
        ]
        lines += [f"    {line}" for line in aligned([["item", "truth", "A", "B", "score"], *rows])] if rows else []
    return "\n".join(lines)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    with _whole(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [{name: row[name] for name in ("id", "truth", "answer", "scores")} for row in rows]


def _read_sampled(path: Path) -> dict[str, dict[str, Sampled]]:
    with _whole(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        for each in (each for own in found.values() for each in own.values()):  # None stands for NaN
            each["value"], each["values"] = float(np.float64(each["value"])), np.array(each["values"], np.float64)
        return {name: {key: Sampled(**each) for key, each in own.items()} for name, own in found.items()}


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {reason(error)}; evaluate again") from None

"""The folder of a run: for each task its figures, its items, its answers and where they come from.

DIR/answers/*.jsonl         every answer under its key, as it came (:mod:`regiongpt.evaluate.store`)
DIR/TASK/result.json        figures with intervals, breakdowns, tables, notes
DIR/TASK/items.jsonl        a line an item: question, truth, answer, scores
DIR/TASK/predictions.jsonl  a line an item: the answer alone, as ``--predictions`` takes it
DIR/TASK/manifest.json      versions, commit, hashes, settings; written last
DIR/index.html              all of it as a page
"""

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.answering import to_json
from regiongpt.evaluate.predictions import regions_of
from regiongpt.evaluate.task import Answer, Item, Result, Task
from regiongpt.evaluate.tasks import TASKS, task_class

RESULT: Final = "result.json"
ITEMS: Final = "items.jsonl"
PREDICTIONS: Final = "predictions.jsonl"
MISTAKES: Final = "mistakes.html"
MANIFEST: Final = "manifest.json"
PAGE: Final = "index.html"

_DECIDING: Final = ("settings", "inputs", "model", "predictions", "scoring")
"""Parts of a manifest without which two figures are not of the same thing."""
PLACES: Final = ("data",)
"""Settings that decide nothing: a folder may move, and its files are held against each other by their content."""


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task of a run, as read from its folder.

    Attributes:
        folder: ``DIR/TASK``.
        result: :meth:`regiongpt.evaluate.task.Result.to_dict` as it was written.
        manifest: Where the figures come from.
    """

    folder: Path
    result: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the task."""
        return str(self.result["task"])

    def rows(self) -> list[dict[str, Any]]:
        """The items with question, truth, answer and scores.

        Raises:
            DataError: The file is missing or not json lines.
        """
        return read_lines(self.folder / ITEMS)


def options_of(task: Task) -> dict[str, Any]:
    """The options of a task as plain json, from which :func:`task_of` makes it again; paths are absolute."""
    return {field.name: _plain(getattr(task, field.name)) for field in dataclasses.fields(task)}


def task_of(name: str, options: Mapping[str, Any], data: Path | None = None) -> Task:
    """The task that :func:`options_of` was given.

    Args:
        name: Of the task.
        options: Plain json.
        data: Where its data set is now; where it was by default. Files that lay in the data set move with it.

    Raises:
        ConfigError: There is no such task, or it has no such option in this version.
    """
    kind = task_class(name)
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(options) - {field.name for field in dataclasses.fields(kind)}):
        raise ConfigError(f"{name}: expected options of this version, got {', '.join(unknown)}; evaluate again")
    before = Path(str(options.get("data", "")))
    values = {}
    for field, value in options.items():
        made = _typed(hints[field], value)
        if data is not None:
            made = _moved(made, before, data)
        values[field] = made
    return kind(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if typing.get_origin(hint) is tuple:
        return tuple(_typed(typing.get_args(hint)[0], each) for each in value)
    return Path(value) if hint is Path or Path in typing.get_args(hint) else value


def _moved(value: Any, before: Path, now: Path) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, before, now) for each in value)
    if isinstance(value, Path) and value.is_relative_to(before):
        return now / value.relative_to(before)
    return value


def refuse_other(out: Path, name: str, manifest: Mapping[str, Any], overwrite: bool) -> None:
    """Refuses to replace the figures of something else.

    Raises:
        ConfigError: The folder holds this task's figures of another model, of other settings or of other files.
        DataError: What it holds cannot be read.
    """
    path = out / name / MANIFEST
    if overwrite or not path.exists():
        return
    there = read_json(path)
    differing = [part for part in _DECIDING if _deciding(there, part) != _deciding(manifest, part)]
    if differing:
        raise ConfigError(
            f"{out / name}: expected an empty folder or figures of the same model, settings and files, found others "
            f"({', '.join(differing)} differ); give another --out, or --overwrite"
        )


def _deciding(manifest: Mapping[str, Any], part: str) -> Any:
    found = json.loads(json.dumps(manifest.get(part)))
    if not isinstance(found, dict):
        return found
    if part == "settings":
        return {name: value for name, value in found.items() if name not in PLACES}
    # The same checkpoint answered by newer code is the same run, gone on with.
    return {name: found.get(name) for name in ("files", "dtype")} if part == "model" else found


def write_task(
    out: Path,
    result: Result,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    manifest: Mapping[str, Any],
    cards: str = "",
) -> TaskRun:
    """Writes one task of a run, the manifest last; each file is whole or not there.

    Args:
        out: Folder of the run.
        result: The figures.
        items: That were asked.
        answers: By item id.
        manifest: Where the figures come from.
        cards: Of the worst mistakes, as HTML.

    Raises:
        DataError: The folder cannot be written.
    """
    folder = out / result.task
    asked = {item.id: item for item in items}
    rows = [{**row, "question": asked[row["id"]].question, "image": asked[row["id"]].image.name} for row in result.rows]
    given = [{"id": name, **to_json(answer), **_regions(asked[name])} for name, answer in answers.items()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        write_lines(folder / ITEMS, rows)
        write_lines(folder / PREDICTIONS, given)
        _write_whole(folder / MISTAKES, cards, "replace")
        write_json(folder / RESULT, result.to_dict())
        write_json(folder / MANIFEST, manifest)
    except OSError as error:
        raise DataError(
            f"{folder}: expected room and the right to write results there, got {error.strerror or error}; free some "
            "space or give another --out, then run the same command again"
        ) from error
    return TaskRun(folder=folder, result=read_json(folder / RESULT), manifest=read_json(folder / MANIFEST))


def _regions(item: Item) -> dict[str, str]:
    """What the answer's number of a region means, for whoever reads it again."""
    return {"regions": told} if (told := regions_of(item)) else {}


def read_run(out: Path) -> list[TaskRun]:
    """The finished tasks of a run, in the order of the paper's tables.

    Raises:
        DataError: The folder holds none, or a file of one is broken.
    """
    found = [
        TaskRun(folder=out / name, result=read_json(out / name / RESULT), manifest=read_json(out / name / MANIFEST))
        for name in TASKS
        if (out / name / MANIFEST).is_file()
    ]
    if not found:
        raise DataError(f"{out}: expected the folder of a run of `regiongpt evaluate`, found no finished task in it")
    return found


def write_json(path: Path, values: Any) -> None:
    """Writes plain json beside the file and renames it; numbers that json does not have become null."""
    _write_whole(path, json.dumps(finite(values), indent=1, ensure_ascii=False) + "\n", "surrogatepass")


def _write_whole(path: Path, text: str, errors: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8", errors)
    temporary.replace(path)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes json lines likewise."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)
    temporary.replace(path)


def finite(value: Any) -> Any:
    """The same value with None for NaN and infinities, which json readers of other languages refuse."""
    if isinstance(value, float):
        return value if float("-inf") < value < float("inf") else None
    if isinstance(value, Mapping):
        return {str(name): finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> dict[str, Any]:
    """One json object.

    Raises:
        DataError: There is none.
    """
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
        return values
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a json object, got {error}; evaluate again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of json lines.

    Raises:
        DataError: The file is missing or a line is none.
    """
    found: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            for line in file:
                found.append(dict(json.loads(line)))
        return found
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}:{len(found) + 1}: expected a json object a line, got {error}; evaluate again"
        ) from None

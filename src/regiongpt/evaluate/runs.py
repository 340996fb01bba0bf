"""The folder of a run: for each task its results, its items, its answers and where they come from.

DIR/answers/*.sqlite        every answer under its key, as it came (:mod:`regiongpt.store`)
DIR/TASK/result.json        results with intervals, breakdowns, tables, notes
DIR/TASK/items.jsonl        a line an item: question, truth, answer, scores
DIR/TASK/predictions.jsonl  a line an item: the answer alone, as ``--predictions`` takes it
DIR/TASK/mistakes.html      the worst mistakes, as they stand on the page
DIR/TASK/manifest.json      versions, commit, hashes, settings; written last
DIR/index.html              all of it as a page
"""

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

import regiongpt
from regiongpt.data.shards import file_identity
from regiongpt.environment import commit, machine, versions
from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.evaluate.task import Answer, Item, Result, Task
from regiongpt.evaluate.tasks import TASKS, task_class
from regiongpt.storage import digest, read_json, reason, sha256, write_file, write_json, writing

T = TypeVar("T")

RESULT: Final = "result.json"
ITEMS: Final = "items.jsonl"
PREDICTIONS: Final = "predictions.jsonl"
MISTAKES: Final = "mistakes.html"
MANIFEST: Final = "manifest.json"
PAGE: Final = "index.html"

ANSWERING: Final = ("inference", "model", "prompts.py", "regions.py", "coverage.py", "images.py")
"""The part of this package that turns an image and a question into an answer."""
_DECIDING: Final = ("settings", "inputs", "model", "predictions", "scoring")
"""Parts of a manifest without which two results are not of the same thing."""
_NOTED: Final = ("data", "name", "device", "key")
"""What these parts note and decides nothing: where files are, and which code answered."""


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task of a run.

    Attributes:
        folder: ``DIR/TASK``.
        result: :meth:`regiongpt.evaluate.task.Result.to_dict`.
        manifest: Where the results come from.
    """

    folder: Path
    result: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the task."""
        return str(self.result["task"])

    def rows(self) -> list[dict[str, Any]]:
        """The items with question, truth, answer and scores.

        Raises:
            DataError: The file is missing or not JSON lines.
        """
        return _read_lines(self.folder / ITEMS, lambda row: {**row, "id": str(row["id"])})

    def answers(self) -> dict[str, Answer]:
        """The answers by item id.

        Raises:
            DataError: The file is missing or not JSON lines.
        """
        return dict(_read_lines(self.folder / PREDICTIONS, lambda row: (str(row["id"]), Answer.from_dict(row))))

    def task(self, data: Path | None = None) -> Task:
        """The task with the options that it was run with, and all images.

        Args:
            data: Where its data set is now; where it was by default. Files that lay in the data set move with it.

        Raises:
            ConfigError: This version has no such task or option.
        """
        try:
            found = task_class(self.name)(**{**self.manifest["options"], "limit": 0})
        except ConfigError as error:
            raise ConfigError(f"{self.folder}: a run of another version: {error}; evaluate again") from None
        if data is None:
            return found
        return found.replace(**{name: _moved(value, found.data, data) for name, value in found.options().items()})


def _moved(value: Any, before: Path, now: Path) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, before, now) for each in value)
    return now / value.relative_to(before) if isinstance(value, Path) and value.is_relative_to(before) else value


def make_manifest(task: Task, model: Mapping[str, Any] | None, scoring: Mapping[str, Any]) -> dict[str, Any]:
    """What is noted beside the results of a task.

    Args:
        task: The benchmark.
        model: From :func:`model_identity`; None where predictions are scored.
        scoring: How.

    Raises:
        DataError: A file of the benchmark cannot be read.
    """
    return {
        "settings": task.settings(),
        "inputs": [file_identity(path) for path in task.inputs()],
        "model": dict(model) if model is not None else None,
        "code": {"commit": commit(), "answering": code_hash()},
        "packages": {"python": platform.python_version(), **versions()},
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {name: _absolute(value) for name, value in task.options().items()},
        "scoring": dict(scoring),
    }


def _absolute(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return [_absolute(each) for each in value] if isinstance(value, tuple) else value


def model_identity(path: Path, dtype: str, device: str) -> dict[str, Any]:
    """A checkpoint by the content of its files, with what else its answers depend on.

    Args:
        path: The checkpoint folder.
        dtype: It is run in.
        device: It is run on, noted but no part of the key: the same arithmetic elsewhere differs by rounding alone.

    Returns:
        ``name``, ``files`` (SHA-256 by name), ``dtype``, ``device``, and ``key``, a digest of all that decides an
        answer but the question: files, dtype, the code that answers, torch and transformers.

    Raises:
        CheckpointError: The folder is no checkpoint, or a file cannot be read.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no checkpoint folder, it has no config.json; check --model")
    try:
        files = {each.name: sha256(each) for each in sorted(path.iterdir()) if each.is_file()}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.filename} cannot be read: {reason(error)}") from None
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{path}: a checkpoint folder without weights (*.safetensors); check --model")
    libraries = {name: found for name, found in versions().items() if name in ("torch", "transformers")}
    # The last parts of the path tell checkpoints from one another; every run ends in "stage2/model".
    parts = [part for part in path.resolve().parts[1:] if part not in ("model", "stage1", "stage2")]
    return {
        "name": "/".join(parts[-2:]) or str(path),
        "files": files,
        "dtype": dtype,
        "device": device,
        "key": digest(files, dtype, code_hash(), libraries),
    }


@cache
def code_hash() -> str:
    """A digest of the sources that turn a question into an answer."""
    root = Path(regiongpt.__file__).parent
    sources = [
        path for name in ANSWERING for path in ((root / name).rglob("*.py") if "." not in name else [root / name])
    ]
    return digest({str(path.relative_to(root)): sha256(path) for path in sorted(sources)})


def refuse_other(out: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Refuse to replace the results of something else.

    Raises:
        ConfigError: The folder holds this task's results of another model, of other settings or of other files.
        DataError: What it holds cannot be read.
    """
    path = out / name / MANIFEST
    if not path.exists():
        return
    there, now = read_json(path), json.loads(json.dumps(manifest))
    if differing := [part for part in _DECIDING if _deciding(there.get(part)) != _deciding(now.get(part))]:
        raise ConfigError(
            f"{out / name}: holds other results ({', '.join(differing)} differ); give another --out, or --overwrite"
        )


def _deciding(part: Any) -> Any:
    return {name: value for name, value in part.items() if name not in _NOTED} if isinstance(part, dict) else part


def write_task(
    out: Path,
    result: Result,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    manifest: Mapping[str, Any],
    mistakes: str = "",
) -> TaskRun:
    """Write one task of a run, the manifest last; each file is whole or not there.

    Args:
        out: Folder of the run.
        result: The results.
        items: What was asked.
        answers: By item id.
        manifest: Where the results come from.
        mistakes: The worst mistakes, as HTML.

    Raises:
        DataError: The folder cannot be written.
    """
    folder = out / result.task
    asked = {item.id: item for item in items}
    rows = ({**row, "question": asked[row["id"]].question, "image": asked[row["id"]].image.name} for row in result.rows)
    # What the answer's number of a region means, for whoever reads it again.
    marks = {name: {"regions": item.regions_key} if item.regions_key else {} for name, item in asked.items()}
    given = ({"id": name, **answer.to_dict(), **marks[name]} for name, answer in answers.items())
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    _write_lines(folder / ITEMS, rows)
    _write_lines(folder / PREDICTIONS, given)
    write_file(folder / MISTAKES, mistakes)
    write_json(folder / RESULT, result.to_dict())
    write_json(folder / MANIFEST, manifest)
    return TaskRun(folder=folder, result=result.to_dict(), manifest=dict(manifest))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    def write(beside: Path) -> None:
        with beside.open("w", encoding="utf-8", errors="replace", newline="") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

    write_file(path, write)


def read_run(out: Path) -> list[TaskRun]:
    """The finished tasks of a run, in the order of the paper's tables.

    Raises:
        DataError: The folder holds none, or a file of one is broken.
    """
    folders = [out / name for name in TASKS if (out / name / MANIFEST).is_file()]
    if not folders:
        raise DataError(f"{out}: no finished task of `regiongpt evaluate` in this folder")
    return [
        TaskRun(
            folder=each,
            result=_read_object(each / RESULT, ("task", "pinned", "protocols", "breakdowns", "tables", "notes")),
            manifest=_read_object(each / MANIFEST, ("options", "inputs", "code", "packages")),
        )
        for each in folders
    ]


def _read_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise DataError(f"{path}: not as a run writes it, with {', '.join(keys)}; evaluate again")
    return found


def _read_lines(path: Path, made: Callable[[dict[str, Any]], T]) -> list[T]:
    found: list[T] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                found.append(made(dict(json.loads(line))))
        return found
    except (OSError, ValueError, TypeError, KeyError, RecursionError, DataError) as error:
        raise DataError(f"{path}:{len(found) + 1}: not as a run writes it: {reason(error)}; evaluate again") from None

"""Predictions: answers read from a file and matched with the items of a benchmark."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, NamedTuple

from regiongpt.data.reading import is_number
from regiongpt.data.shards import many
from regiongpt.errors import DataError, naming, short
from regiongpt.evaluate.task import Answer, Item, Task, listed
from regiongpt.settings import nearest
from regiongpt.storage import reason

ID_KEYS: Final = {
    "annotation id": ("ann_id", "annotation_id"),
    "sentence id": ("sent_id",),
    "region id": ("region_id",),
}
"""Names of an item's id besides ``id`` and ``question_id``, by what the task's ids are."""
TEXT_KEYS: Final = ("text", "answer", "caption", "prediction")
"""Names of the answer."""


class Predictions(NamedTuple):
    """Answers by item id, and sentences on what was repeated, missing or could not be asked."""

    answers: Mapping[str, Answer]
    report: tuple[str, ...]


def read_predictions(
    path: Path, task: Task, items: Sequence[Item], *, missing: Literal["refuse", "wrong"] = "refuse"
) -> Predictions:
    """Read predictions and match them with the items; ``docs/evaluation.md`` describes the file.

    Args:
        path: JSON objects, one a line or in one array.
        task: The benchmark.
        items: Its items.
        missing: For items without a prediction, or without what other items have: fail, or count them as wrong.

    Raises:
        DataError: The file is missing or of another form; predictions are of other regions, for no item, missing, or
            twice and different.
    """
    by_id = {item.id: item for item in items}
    answers: dict[str, Answer] = {}
    strangers: list[str] = []
    repeated: list[str] = []
    for where, entry in _entries(path):
        with naming(where):
            if not isinstance(entry, dict):
                raise DataError(f"a JSON {type(entry).__name__}; give an object")
            number = str(_one_of(entry, ("id", "question_id", *ID_KEYS.get(task.item_id, ())), task.item_id, int | str))
            if number not in by_id:
                strangers.append(number)
                continue
            answer = _answer(entry, by_id[number], task)
            if number in answers:
                repeated.append(number)
                if answers[number] != answer:
                    raise DataError(f"another prediction for {task.item_id} {number} that differs; keep one")
            answers[number] = answer

    if strangers:
        raise DataError(
            f"{path}: {many(len(strangers), 'prediction')} for no item: {task.item_id}s {listed(strangers)}, "
            f"where the benchmark has {listed(list(by_id))}; give those of this split and task"
        )
    lacking = [item.id for item in items if item.id not in answers]
    if lacking and missing == "refuse":
        raise DataError(
            f"{path}: {len(lacking)} of {len(items)} items have no prediction: {task.item_id}s "
            f"{listed(lacking)}; add them, or count them as wrong with --missing wrong"
        )
    report = []
    for kind in task.reads:
        without = [number for number, answer in answers.items() if getattr(answer, kind) is None]
        if without and len(without) < len(answers):
            told = f"{len(without)} of {len(answers)} predictions lack {kind!r}: {task.item_id}s "
            told += listed(without)
            if missing == "refuse":
                raise DataError(f"{path}: {told}; give it for all items or none, or add --missing wrong")
            report.append(f"{told}; they count as wrong where {kind!r} is scored")
    if repeated:
        report.append(f"{many(len(repeated), 'prediction')} given more than once ({listed(repeated)})")
    return Predictions(answers, tuple(report))


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of the file, each with where it is."""
    where = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if text.lstrip()[:1] == "[":
            entries = [(f"{path}[{k}]", each) for k, each in enumerate(json.loads(text))]
        else:
            entries = []
            # Line feeds alone end a line: JSON may hold other separators of lines within a text.
            for k, line in enumerate(text.split("\n"), 1):
                where = f"{path}:{k}"
                if line.strip():
                    entries.append((where, json.loads(line)))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: not readable as JSON in UTF-8: {reason(error)}") from None
    if not entries:
        raise DataError(f"{path}: no predictions in this file")
    yield from entries


def _one_of(entry: Mapping[str, Any], names: Sequence[str], what: str, kind: type | UnionType) -> Any:
    """The value that stands under any of some names."""
    given = {key: entry[key] for key in names if entry.get(key) is not None}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, kind):
            raise DataError(f"{key}: give {'text' if kind is str else 'a whole number or text'}, got {short(value)}")
    if len(set(map(str, given.values()))) > 1:
        pairs = ", ".join(f"{key} {short(value)}" for key, value in given.items())
        raise DataError(f"more than one {what}, {pairs}; keep one")
    if not given:
        raise DataError(f"no {what}; give one of {', '.join(names)}, found keys: {', '.join(entry)}")
    return next(iter(given.values()))


def _answer(entry: Mapping[str, Any], item: Item, task: Task) -> Answer:
    if entry.get("regions") not in (None, item.regions_key, [region.to_dict() for region in item.regions]):
        raise DataError(
            f"an answer about other regions than the {len(item.regions)} of this question, or in another order; give "
            "the --seed, --proposals and other options that the answers were made with"
        )
    # A label is an answer where it is the name of a class; elsewhere it is the truth.
    names = (*TEXT_KEYS, "label") if "ids" in item.detail else TEXT_KEYS
    scored = any(entry.get(kind) is not None for kind in task.reads if kind != "text")
    worded = any(entry.get(name) is not None for name in names)
    text = _one_of(entry, names, "answer", str) if worded or not scored else None
    if text is not None and text.strip() == item.question.strip():
        raise DataError(f"expected an answer, got the question itself, {short(text)}")
    choices = item.choices or tuple(item.detail.get("ids", ()))
    scores, probability = entry.get("scores"), entry.get("probability")
    if isinstance(scores, dict):
        named = {" ".join(name.split()): value for name, value in scores.items()}
        if strange := [name for name in named if name not in choices]:
            raise DataError(f"scores: {strange[0]!r} is not a choice; {nearest(strange[0], choices)}")
        if lacking := [name for name in choices if name not in named]:
            raise DataError(f"scores: none for {listed(lacking)}")
        scores = [named[name] for name in choices]
    sure = None if probability is None else _numbers([probability], 1, "probability", "answer")
    return Answer(
        text=text,
        probability=sure[0] if sure else None,
        scores=_numbers(scores, len(choices), "scores", "choices"),
        called=_numbers(entry.get("called"), len(item.regions), "called", "regions"),
    )


def _numbers(given: Any, count: int, key: str, of: str) -> tuple[float, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != count:
        got = len(given) if isinstance(given, list) else short(given)
        raise DataError(f"{key}: give a number for each of {count} {of}, got {got}")
    if wrong := [value for value in given if not is_number(value)]:
        raise DataError(f"{key}: give finite numbers, got {short(wrong[0])}")
    return tuple(map(float, given))

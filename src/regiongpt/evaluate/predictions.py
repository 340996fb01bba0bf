"""Answers that anyone may have given, read from a file and held against the items of a benchmark."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from regiongpt.errors import DataError
from regiongpt.evaluate.task import Answer, Item, Task

ID_KEYS: Final = ("id", "question_id", "ann_id", "annotation_id", "sent_id", "ref_id", "region_id")
"""Names of an item's id, the first that is there counts."""
TEXT_KEYS: Final = ("text", "answer", "caption", "prediction", "label")
"""Names of the answer, likewise."""
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a file of predictions says of a benchmark's items.

    Attributes:
        answers: By item id.
        report: What was left out, repeated or missing, a sentence each.
    """

    answers: Mapping[str, Answer]
    report: tuple[str, ...]


def read_predictions(
    path: Path,
    task: Task,
    items: Sequence[Item],
    *,
    missing: Literal["refuse", "wrong"] = "refuse",
    unknown: Literal["refuse", "ignore"] = "refuse",
) -> Predictions:
    """Reads predictions and holds them against the items.

    The file holds json objects, one a line or in one array. Each has the item's id (``id``, ``question_id``,
    ``ann_id``, ...) and at least one of: the answer (``text``, ``answer``, ``caption``, ...), with ``probability`` if
    it is known; ``scores`` of the item's choices, a list in their order or an object by choice; and ``called``, a list:
    of each of the item's regions the log likelihood to be called by its expression. A ``split`` is held against the
    task's.

    Args:
        path: Of the file.
        task: The benchmark.
        items: Its items.
        missing: For items without a prediction: fail, or count them as wrong.
        unknown: For predictions of no item: fail, or leave them out.

    Raises:
        DataError: The file is missing or of another form; predictions are of another split, for no item, missing, or
            twice and not alike.
    """
    path = Path(path)
    by_id = {item.id: item for item in items}
    answers: dict[str, Answer] = {}
    strangers: list[str] = []
    repeated: list[str] = []
    split = getattr(task, "split", None)
    for where, entry in _entries(path):
        own = _split(entry)
        if own is not None and split is not None and own != split:
            raise DataError(f"{where}: expected a prediction for the split {split!r}, got one for {own!r}")
        number = _id(entry, where, task)
        item = by_id.get(number)
        if item is None:
            strangers.append(number)
            continue
        answer = _answer(entry, item, where)
        if number in answers:
            if answers[number] != answer:
                raise DataError(
                    f"{where}: expected one prediction for {task.item_id} {number}, got another that differs; keep one"
                )
            repeated.append(number)
        answers[number] = answer
    lacking = [item.id for item in items if item.id not in answers]
    if strangers and not answers:
        raise DataError(
            f"{path}: expected predictions for {task.item_id}s of this split such as {_shown(list(by_id))}, got "
            f"{len(strangers)} for others such as {_shown(strangers)}; are they of another split, or of another task?"
        )
    if strangers and unknown == "refuse":
        raise DataError(
            f"{path}: expected predictions for the {len(items)} items alone, got {len(strangers)} for others: "
            f"{task.item_id}s {_shown(strangers)}; take them out, or leave them aside with --unknown ignore"
        )
    if lacking and missing == "refuse":
        raise DataError(
            f"{path}: expected a prediction for each of {len(items)} items, found none for {len(lacking)}: "
            f"{task.item_id}s {_shown(lacking)}; add them, or count them as wrong with --missing wrong"
        )
    report = []
    if strangers:
        report.append(f"{len(strangers)} predictions are for no item and were left out ({_shown(strangers)})")
    if repeated:
        report.append(f"{len(repeated)} predictions came more than once, always alike ({_shown(repeated)})")
    return Predictions(answers=answers, report=tuple(report))


def _shown(values: Sequence[str]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return f"{', '.join(values[:_SHOWN])}{more}"


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of the file, each with where it is."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"expected predictions at {path}, got {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected json in UTF-8, got other bytes") from None
    if text.lstrip()[:1] == "[":
        entries = [(f"{path}[{k}]", each) for k, each in enumerate(_parsed(text, str(path)))]
    else:
        lines = [(k, line) for k, line in enumerate(text.splitlines(), 1) if line.strip()]
        entries = [(f"{path}:{k}", _parsed(line, f"{path}:{k}")) for k, line in lines]
    if not entries:
        raise DataError(f"{path}: expected predictions, found none")
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected a json object, got {type(entry).__name__}")
        yield where, entry


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: expected json, got {error}") from None


def _split(entry: Mapping[str, Any]) -> str | None:
    value = entry.get("split")
    return value if isinstance(value, str) else None


def _id(entry: Mapping[str, Any], where: str, task: Task) -> str:
    key = next((key for key in ID_KEYS if key in entry), None)
    if key is None:
        known = ", ".join(map(repr, entry)) or "none"
        raise DataError(f"{where}: expected the {task.item_id} as 'id', found keys: {known}")
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{where}: expected {key} as a number or text, got {value!r}")
    return str(value)


def _answer(entry: Mapping[str, Any], item: Item, where: str) -> Answer:
    key = next((key for key in TEXT_KEYS if key in entry), None)
    text = entry[key] if key is not None else None
    probability, scores, called = entry.get("probability"), entry.get("scores"), entry.get("called")
    if text is None and scores is None and called is None:
        raise DataError(f"{where}: expected the answer as 'text', or 'scores' of the choices, found neither")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: expected {key} as text, got {text!r}")
    if probability is not None and (isinstance(probability, bool) or not isinstance(probability, int | float)):
        raise DataError(f"{where}: expected probability as a number from 0 to 1, got {probability!r}")
    try:
        return Answer(
            text=text,
            probability=None if probability is None else float(probability),
            scores=None if scores is None else _scores(scores, item, where),
            called=None if called is None else _numbers(called, len(item.regions), "regions", where),
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _scores(given: Any, item: Item, where: str) -> tuple[float, ...]:
    choices = item.choices or tuple(item.detail.get("names", ()))
    if isinstance(given, dict):
        for name in given:
            if name not in choices:
                near = difflib.get_close_matches(name, choices, 1)
                raise DataError(f"{where}: expected scores of choices, got one of {name!r}; near: {', '.join(near)}")
        if lacking := [name for name in choices if name not in given]:
            raise DataError(f"{where}: expected a score of every choice, found none of {_shown(lacking)}")
        given = [given[name] for name in choices]
    return _numbers(given, len(choices), "choices", where)


def _numbers(given: Any, count: int, of: str, where: str) -> tuple[float, ...]:
    if not isinstance(given, list) or len(given) != count:
        got = len(given) if isinstance(given, list) else repr(given)
        raise DataError(f"{where}: expected a score for each of {count} {of}, got {got}")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in given):
        raise DataError(f"{where}: expected scores as numbers, got {given!r}"[:200])
    return tuple(float(value) for value in given)

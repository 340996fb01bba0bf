"""Answers that anyone may have given, read from a file and held against the items of a benchmark."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from regiongpt.data.convert.values import is_box, is_number, short
from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.labels import folded
from regiongpt.evaluate.metrics.overlap import ENOUGH, overlaps
from regiongpt.evaluate.store import digest
from regiongpt.evaluate.task import Answer, Item, Task
from regiongpt.evaluate.tasks.scoring import listed
from regiongpt.prompts import region_answer

ID_KEYS: Final = ("id", "question_id")
"""Names of any item's id."""
OWN_KEYS: Final = {
    "annotation id": ("ann_id", "annotation_id"),
    "sentence id": ("sent_id",),
    "region id": ("region_id",),
}
"""Further names of it, by what the task's ids are."""
TEXT_KEYS: Final = ("text", "answer", "caption", "prediction", "label")
"""Names of the answer; ``label`` where it is the name of a class, for elsewhere it is the truth."""
_SHOWN: Final = 5


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

    The file holds json objects, one a line or in one array. Each has the item's id (``id``, ``question_id``, or what
    the task's ids are: ``ann_id``, ``sent_id``, ``region_id``) and at least one of those that the task reads: the
    answer (``text``, ``answer``, ``caption``, ...), with ``probability`` if it is known; ``scores`` of the item's
    choices, a list in their order or an object by choice; and ``called``, a list: of each of the item's regions the log
    likelihood to be called by its expression. What one item has, all must have. A ``split`` is held against the task's.

    Where the answer is one of several regions, ``bbox`` (x, y, width, height) may stand for it: it means the region
    that overlaps it most, if by half or more. ``regions``, as a run writes it, is held against the item's regions, for
    their numbers mean something in that order alone.

    Args:
        path: Of the file.
        task: The benchmark.
        items: Its items.
        missing: For items without a prediction, or without what other items have: fail, or count them as wrong.
        unknown: For predictions of no item: fail, or leave them out.

    Raises:
        DataError: The file is missing or of another form; predictions are of another split, of other regions, for no
            item, missing, or twice and not alike.
    """
    path = Path(path)
    by_id = {item.id: item for item in items}
    answers: dict[str, Answer] = {}
    strangers: list[str] = []
    repeated: list[str] = []
    split = task.split_read
    for where, entry in _entries(path):
        own = _split(entry)
        if own is not None and split and own != split:
            raise DataError(f"{where}: expected a prediction for the split {split!r}, got one for {own!r}")
        number = _id(entry, where, task)
        item = by_id.get(number)
        if item is None:
            strangers.append(number)
            continue
        answer = _answer(entry, item, where, task)
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
            f"{path}: expected predictions for {task.item_id}s of this split such as {listed(list(by_id), _SHOWN)}, "
            f"got {len(strangers)} for others such as {listed(strangers, _SHOWN)}; are they of another split, or of "
            "another task?"
        )
    if strangers and unknown == "refuse":
        raise DataError(
            f"{path}: expected predictions for the {len(items)} items alone, got {len(strangers)} for others: "
            f"{task.item_id}s {listed(strangers, _SHOWN)}; take them out, or leave them aside with --unknown ignore"
        )
    if lacking and missing == "refuse":
        raise DataError(
            f"{path}: expected a prediction for each of {len(items)} items, found none for {len(lacking)}: "
            f"{task.item_id}s {listed(lacking, _SHOWN)}; add them, or count them as wrong with --missing wrong"
        )
    report = _in_part(path, task, answers, missing)
    if strangers:
        report.append(f"{len(strangers)} predictions are for no item and were left out ({listed(strangers, _SHOWN)})")
    if repeated:
        report.append(f"{len(repeated)} predictions came more than once, always alike ({listed(repeated, _SHOWN)})")
    return Predictions(answers=answers, report=tuple(report))


def _in_part(path: Path, task: Task, answers: Mapping[str, Answer], missing: str) -> list[str]:
    """What some of the answers have and others lack, a sentence each.

    Raises:
        DataError: There is such, and it is not to be counted as wrong.
    """
    report = []
    for kind in task.reads:
        lacking = [number for number, answer in answers.items() if getattr(answer, kind) is None]
        if not lacking or len(lacking) == len(answers):
            continue
        told = f"{len(lacking)} of {len(answers)} predictions lack {kind!r}: {task.item_id}s {listed(lacking, _SHOWN)}"
        if missing == "refuse":
            raise DataError(
                f"{path}: expected {kind!r} in every prediction or in none, but {told}; add it, take it out of the "
                "others, or count these as wrong with --missing wrong"
            )
        report.append(f"{told}; they count as wrong where {kind!r} is scored")
    return report


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of the file, each with where it is."""
    try:
        # As a run writes it: an answer may hold half of a surrogate pair.
        text = path.read_bytes().decode("utf-8", "surrogatepass").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"expected predictions at {path}, got {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected json in UTF-8, got other bytes; unpack the file, or save it so") from None
    if text.lstrip()[:1] == "[":
        entries = [(f"{path}[{k}]", each) for k, each in enumerate(_parsed(text, str(path)))]
    else:
        # Line feeds alone end a line: json may hold other separators of lines within a text.
        lines = [(k, line) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
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
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected json, got {error}") from None


def _split(entry: Mapping[str, Any]) -> str | None:
    value = entry.get("split")
    return None if value is None else str(value)


def _id(entry: Mapping[str, Any], where: str, task: Task) -> str:
    names = (*ID_KEYS, *OWN_KEYS.get(task.item_id, ()))
    given = {key: entry[key] for key in names if key in entry}
    if not given:
        known = ", ".join(map(repr, entry)) or "none"
        raise DataError(f"{where}: expected the {task.item_id} as {_either(names)}, found keys: {known}")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise DataError(f"{where}: expected {key} as a number or text, got {short(value)}")
    if len({str(value) for value in given.values()}) > 1:
        got = ", ".join(f"{key} {short(value)}" for key, value in given.items())
        raise DataError(f"{where}: expected one {task.item_id}, got {got}; keep the one that is meant")
    return str(next(iter(given.values())))


def _answer(entry: Mapping[str, Any], item: Item, where: str, task: Task) -> Answer:
    named = ("bbox",) if len(item.regions) > 1 else ()
    if not any(entry.get(key) is not None for key in (*_text_keys(item), *named, *task.reads)):
        wanted = _either((*task.reads, *named))
        raise DataError(f"{where}: expected the answer as {wanted}, found {', '.join(map(repr, entry))}")
    _check_regions(entry, item, where)
    text = _text(entry, item, where)
    probability, scores, called = (entry.get(key) for key in ("probability", "scores", "called"))
    if probability is not None and not is_number(probability):
        raise DataError(f"{where}: expected probability as a number from 0 to 1, got {short(probability)}")
    rated = None if scores is None else _scores(scores, item, where)
    likely = None if called is None else _numbers(called, len(item.regions), "regions", where)
    try:
        sure = None if probability is None else float(probability)
        return Answer(text=text, probability=sure, scores=rated, called=likely)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _text_keys(item: Item) -> tuple[str, ...]:
    return TEXT_KEYS if "names" in item.detail else TEXT_KEYS[:-1]


def _text(entry: Mapping[str, Any], item: Item, where: str) -> str | None:
    """The answer in words; of a box, the words for the region that it means."""
    given = {key: entry[key] for key in _text_keys(item) if entry.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: expected {key} as text, got {short(value)}")
    if len(set(given.values())) > 1:
        got = " and ".join(f"{key} {short(value)}" for key, value in given.items())
        raise DataError(f"{where}: expected one answer, got {got}; keep the one that is the answer")
    text = next(iter(given.values()), None)
    if text is not None and text.strip() == item.question.strip():
        raise DataError(f"{where}: expected an answer, got the question itself, {short(text)}")
    box = entry.get("bbox")
    if box is None or len(item.regions) < 2:
        return text
    if text is not None:
        raise DataError(f"{where}: expected a text or a bbox as the answer, got both; keep one")
    if not is_box(box) or box[2] <= 0 or box[3] <= 0:
        raise DataError(f"{where}: expected bbox as x, y, width, height in pixels, got {short(box)}")
    x, y, width, height = map(float, box)
    agreement = overlaps((x, y, x + width, y + height), [region.to_dict()["box"] for region in item.regions])
    best = int(agreement.argmax())
    return region_answer(best + 1) if agreement[best] >= ENOUGH else f"a box at {short(box)}"


def _check_regions(entry: Mapping[str, Any], item: Item, where: str) -> None:
    """Holds the regions that were asked about, where they are given, against those of the item."""
    given = entry.get("regions")
    if given is not None and given not in (regions_of(item), [region.to_dict() for region in item.regions]):
        raise DataError(
            f"{where}: expected an answer about the {len(item.regions)} regions of this question, in their order, got "
            "one about others; give the --seed, --proposals and other options that the answers were made with"
        )


def regions_of(item: Item) -> str:
    """What a run's predictions say of the regions that an answer by number is about; ``""`` where it is not by number.

    Args:
        item: The question.
    """
    return digest([region.to_dict() for region in item.regions])[:12] if len(item.regions) > 1 else ""


def _either(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names]
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]


def _scores(given: Any, item: Item, where: str) -> tuple[float, ...]:
    choices = item.choices or tuple(item.detail.get("names", ()))
    if isinstance(given, dict):
        given = {folded(name): value for name, value in given.items()}
        for name in given:
            if name not in choices:
                near = difflib.get_close_matches(name, choices, 1)
                raise DataError(
                    f"{where}: expected scores of choices, got one of {name!r}{f'; near: {near[0]}' if near else ''}"
                )
        if lacking := [name for name in choices if name not in given]:
            raise DataError(f"{where}: expected a score of every choice, found none of {listed(lacking, _SHOWN)}")
        given = [given[name] for name in choices]
    return _numbers(given, len(choices), "choices", where)


def _numbers(given: Any, count: int, of: str, where: str) -> tuple[float, ...]:
    if not isinstance(given, list) or len(given) != count:
        got = len(given) if isinstance(given, list) else short(given)
        raise DataError(f"{where}: expected a score for each of {count} {of}, got {got}")
    if wrong := [value for value in given if not is_number(value)]:
        raise DataError(f"{where}: expected scores as finite numbers, got {short(wrong[0])}")
    return tuple(float(value) for value in given)

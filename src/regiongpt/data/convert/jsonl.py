"""People's own data: a documented form of json lines, one image with its regions and its conversation a line."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

from regiongpt.console import progress
from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.images import check_image
from regiongpt.data.convert.jsonstream import TRUNCATED
from regiongpt.data.convert.values import MALFORMED, image_name, short, sides, unicode_text, words_alone
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Fault, Rejects, fault_of
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.prompts import (
    IMAGE_TOKEN,
    LABEL_SETS,
    NO_MATCH,
    QUESTIONS,
    check_placeholders,
    parse_region_answer,
    region_answer,
)
from regiongpt.regions import Region
from regiongpt.settings import nearest
from regiongpt.storage import reason

KEYS: Final = ("id", "image", "width", "height", "regions", "conversation")
SLOTS: Final = tuple(slot.name for slot in dataclasses.fields(Turn))


class JsonlConverter(Converter):
    """One record a line, each line one json object.

    ``id``: text or a whole number, unique in the file; ``line-`` and the line's number where there is none.
    ``image``: path below the images' folder with forward slashes; missing or ``""`` for a conversation without one.
    ``width``, ``height``: of the image in pixels, to be held against the file; both or neither.
    ``regions``: a list of regions in the form of :meth:`regiongpt.Region.to_dict`, in pixels of the image, each of
    which may have a ``category`` besides: ``{"box": [10, 20, 60, 80], "category": "dog"}``. They are ``<region1>``,
    ``<region2>``, ... of the conversation. A mask is given as RLE.
    ``conversation``: a list of turns. ``{"question": ..., "answer": ...}`` stands as it is, with ``<regionN>`` wherever
    a region is meant and without ``<image>``; it may name a ``task`` to be counted as. ``{"task": ..., "answer": ...}``
    is worded by the ten questions of a task of :data:`regiongpt.prompts.QUESTIONS` instead, and gives what that task
    needs: ``regions`` (numbers from 1), ``expression`` for ``locate``, ``category`` for ``presence``. With
    ``"guided": true`` a question of ``locate`` or ``classify`` ends in how to answer, and the answer is held to that:
    ``Region [1]`` or ``No corresponding options found.``; a name of the ``label_set``.
    """

    name: ClassVar[str] = "jsonl"
    summary: ClassVar[str] = "your own data: json lines of images, regions and conversations"
    sound_regions: ClassVar[bool] = True

    data: Path
    """The file of json lines."""

    def inputs(self) -> list[Path]:
        """The one file."""
        return [self.data]

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """One record a line, in the order of the file."""
        seen: set[str] = set()
        for number, entry in iter_lines(self.data, rejects):
            with noting_line(self.data, number, rejects):
                record = self._record(number, entry)
                record.check()
                if record.id in seen:
                    raise Fault("duplicate id", f"expected each id once, got {short(record.id)} again")
                seen.add(record.id)
                yield record

    def _record(self, number: int, entry: Mapping[str, Any]) -> Record:
        _expect_keys(entry, KEYS)
        own, image = entry.get("id", f"line-{number}"), entry.get("image") or ""
        if not isinstance(own, str | int) or own == "":
            raise Fault(MALFORMED, f"id: expected text or a whole number, got {short(own)}")
        width = height = 0
        if image:
            stated = sides(entry) if entry.keys() & {"width", "height"} else ()
            width, height = check_image(self.images / image_name(image), *stated)
        regions = tuple(_region(given, f"<region{k}>") for k, given in enumerate(_listed(entry, "regions", []), 1))
        turns = tuple(_turn(given, k, len(regions)) for k, given in enumerate(_listed(entry, "conversation"), 1))
        return Record(
            id=f"{self.name}/{own}",
            source=self.name,
            image=image,
            width=width,
            height=height,
            regions=regions,
            turns=turns,
        )


@contextmanager
def noting_line(path: Path, number: int, rejects: Rejects) -> Iterator[None]:
    """Count a line that cannot be used, whatever is wrong with it, and go on behind it."""
    with rejects.noting(path, number):
        try:
            yield
        except RegionGPTError as error:
            raise Fault(fault_of(error).kind, f"{path.name}:{number}: {error}") from None


def iter_lines(path: Path, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of json lines with the numbers of their lines; blank lines are passed over.

    Args:
        path: Of the file, in UTF-8.
        rejects: Where lines are noted that are no json objects.

    Raises:
        DataError: The file cannot be read, or has lines of which none is a json object.
    """
    found = number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(progress(file, path.name, "lines"), 1):
                if line.strip():
                    with noting_line(path, number, rejects):
                        entry = _decoded(line, number)
                        found += 1
                        yield number, entry
    except OSError as error:
        raise DataError(f"{path}: not a readable file of json lines: {reason(error)}; check the path") from None
    if number and not found:
        raise DataError(f"{path}: no line is a json object; give a file of json lines")


def _decoded(line: bytes, number: int) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        entry = json.loads(text)
        if "\\ud" in text.lower():
            unicode_text(json.dumps(entry, ensure_ascii=False))
    except UnicodeDecodeError as error:
        raise Fault("text that is not Unicode", f"expected UTF-8, got the byte 0x{line[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        # A line that is not ended is the last one, and was being written.
        kind = "line that is not json" if line.endswith(b"\n") else TRUNCATED
        raise Fault(kind, f"expected a json object: {reason(error)}") from None
    if not isinstance(entry, dict):
        raise Fault(MALFORMED, f"expected a json object, got {short(entry)}")
    return entry


def _expect_keys(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise Fault("unknown key", f"unknown key {short(key)}; {nearest(key, known)}")


def _listed(entry: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
    value = entry.get(key, default)
    if not isinstance(value, list):
        raise Fault(MALFORMED, f"{key}: expected a list, got {short(value)}")
    return value


def _region(given: Any, name: str) -> RecordRegion:
    if not isinstance(given, dict):
        raise Fault(MALFORMED, f"{name}: expected an object such as {{'box': [...]}}, got {short(given)}")
    form = dict(given)
    category = form.pop("category", "")
    if not isinstance(category, str):
        raise Fault(MALFORMED, f"{name}: expected category as text, got {short(category)}")
    return RecordRegion(region=Region.from_dict(form, name), category=words_alone(category))


def _turn(given: Any, place: int, n_regions: int) -> Turn:
    """One turn; its numbers of regions are held against the regions here, placeholders by the record."""
    if not isinstance(given, dict):
        raise Fault(MALFORMED, f"turn {place}: expected an object, got {short(given)}")
    _expect_keys(given, SLOTS)
    literal = "question" in given
    if literal and (extra := given.keys() - {"question", "answer", "task"}):
        raise Fault(
            MALFORMED,
            f"turn {place}: expected a question as it stands or what a task needs, got {', '.join(sorted(extra))} too",
        )
    task = given.get("task", "chat" if literal else None)
    tasks = (*QUESTIONS, *(["chat"] if literal else []))
    if task not in tasks:
        raise Fault("unknown task", f"turn {place}: expected a task among {', '.join(tasks)}, got {short(task)}")
    values: dict[str, Any] = {"answer": "", **given, "task": task}
    for key, value in values.items():
        if key == "regions":
            if not isinstance(value, list) or not all(type(each) is int and each > 0 for each in value):
                raise Fault(MALFORMED, f"turn {place}: expected regions as numbers from 1, got {short(value)}")
            check_placeholders([f"<region{each}>" for each in value], n_regions)
            values[key] = tuple(value)
        elif not isinstance(value, bool if key == "guided" else str):
            kind = "true or false" if key == "guided" else "text"
            raise Fault(MALFORMED, f"turn {place}: expected {key} as {kind}, got {short(value)}")
        elif key in ("expression", "category", "label_set"):
            words_alone(str(value))
        elif IMAGE_TOKEN in str(value):
            reason = f"turn {place}: expected no {IMAGE_TOKEN}, the image comes first of itself"
            raise Fault("placeholder in the text", reason)
    if literal and not given["question"].strip():
        raise Fault("question empty", f"turn {place}: expected a question, got none")
    turn = Turn(**values)
    if turn.guided:
        _check_guided(turn, f"turn {place}")
    return turn


def _check_guided(turn: Turn, name: str) -> None:
    """Hold the answer of a question that says how to answer against that."""
    if turn.task == "locate":
        chosen = parse_region_answer(turn.answer)
        if chosen is not None and chosen not in turn.regions:
            options = ", ".join(map(region_answer, turn.regions))
            raise Fault(
                "answer that is no option", f"{name}: expected {options} or {NO_MATCH!r}, got {short(turn.answer)}"
            )
    elif turn.task != "classify":
        raise Fault(MALFORMED, f"{name}: expected guided with 'locate' or 'classify' alone, got it with {turn.task!r}")
    elif not turn.label_set.strip():
        raise Fault(MALFORMED, f"{name}: expected the label_set that a guided 'classify' names, got none")
    elif turn.answer not in LABEL_SETS.get(turn.label_set, (turn.answer,)):
        raise Fault("unknown category", f"{name}: expected a name of {turn.label_set}, got {short(turn.answer)}")

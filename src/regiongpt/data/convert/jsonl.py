"""People's own data: a documented form of json lines, one image with its regions and its conversation a line."""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.images import Fault, check_image, image_size
from regiongpt.data.convert.jsonstream import TRUNCATED
from regiongpt.data.convert.values import MALFORMED, image_fault, is_side, short, unicode_fault
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects
from regiongpt.errors import ConfigError, DataError, RegionError
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
            place = f"{self.data.name}:{number}"
            try:
                record = self._record(number, entry)
                record.check()
                if record.id in seen:
                    fault = Fault("duplicate id", f"expected each id once, got {short(record.id)} again")
                else:
                    seen.add(record.id)
                    yield record
                    continue
            except _FaultError as error:
                fault = error.fault
            except RegionError as error:
                fault = Fault("region that makes no sense", str(error))
            except (DataError, ConfigError) as error:
                fault = Fault("record without a lesson", str(error))
            rejects.add(fault.kind, self.data, number, f"{place}: {fault.reason}")

    def _record(self, number: int, entry: Mapping[str, Any]) -> Record:
        _expect_keys(entry, KEYS)
        own = entry.get("id", f"line-{number}")
        if not isinstance(own, str | int) or own == "":
            raise _FaultError(MALFORMED, f"id: expected text or a whole number, got {short(own)}")
        image, width, height = self._image(entry)
        regions = tuple(
            _region(given, f"<region{place}>") for place, given in enumerate(_listed(entry, "regions", default=[]), 1)
        )
        turns = tuple(
            _turn(given, place, len(regions)) for place, given in enumerate(_listed(entry, "conversation"), 1)
        )
        return Record(
            id=f"{self.name}/{own}",
            source=self.name,
            image=image,
            width=width,
            height=height,
            regions=regions,
            turns=turns,
        )

    def _image(self, entry: Mapping[str, Any]) -> tuple[str, int, int]:
        name = entry.get("image") or ""
        if not name:
            return "", 0, 0
        width, height = entry.get("width"), entry.get("height")
        if (width, height) != (None, None) and not (is_side(width) and is_side(height)):
            raise _FaultError(MALFORMED, f"expected width and height as whole numbers, got {short((width, height))}")
        if fault := image_fault(name) or check_image(self.images / name, width, height):
            raise _FaultError(*fault)
        return (name, *image_size(self.images / name))


class _FaultError(Exception):
    """What is wrong with a line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault(kind, reason)


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
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                entry = _decoded(line, number)
                if isinstance(entry, Fault):
                    rejects.add(entry.kind, path, number, f"{path.name}:{number}: {entry.reason}")
                else:
                    found += 1
                    yield number, entry
    except OSError as error:
        raise DataError(f"expected a file of json lines at {path}, got {error.strerror}; check the path") from None
    if number and not found:
        raise DataError(f"{path}: expected json lines, one object each, found no such line; give another file")


def _decoded(line: bytes, number: int) -> dict[str, Any] | Fault:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        entry = json.loads(text)
        if "\\ud" in text.lower() and (fault := unicode_fault(json.dumps(entry, ensure_ascii=False))):
            return fault
    except UnicodeDecodeError as error:
        return Fault("text that is not Unicode", f"expected UTF-8, got the byte 0x{line[error.start]:02x}")
    except (ValueError, RecursionError) as error:
        # A line that is not ended is the last one, and was being written.
        kind = "line that is not json" if line.endswith(b"\n") else TRUNCATED
        return Fault(kind, f"expected a json object, got {error}")
    if not isinstance(entry, dict):
        return Fault(MALFORMED, f"expected a json object, got {short(entry)}")
    return entry


def _expect_keys(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise _FaultError("unknown key", f"expected keys among {', '.join(known)}, got {short(key)}{hint}")


def _listed(entry: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
    value = entry.get(key, default)
    if not isinstance(value, list):
        raise _FaultError(MALFORMED, f"{key}: expected a list, got {short(value)}")
    return value


def _region(given: Any, name: str) -> RecordRegion:
    if not isinstance(given, dict):
        raise _FaultError(MALFORMED, f"{name}: expected an object such as {{'box': [...]}}, got {short(given)}")
    form = dict(given)
    category = form.pop("category", "")
    if not isinstance(category, str):
        raise _FaultError(MALFORMED, f"{name}: expected category as text, got {short(category)}")
    return RecordRegion(region=Region.from_dict(form, name), category=category)


def _turn(given: Any, place: int, n_regions: int) -> Turn:
    """One turn; its numbers of regions are held against the regions here, placeholders by the record."""
    if not isinstance(given, dict):
        raise _FaultError(MALFORMED, f"turn {place}: expected an object, got {short(given)}")
    _expect_keys(given, SLOTS)
    literal = "question" in given
    if literal and given.keys() - {"question", "answer", "task"}:
        extra = ", ".join(sorted(given.keys() - {"question", "answer", "task"}))
        raise _FaultError(
            MALFORMED, f"turn {place}: expected a question as it stands or what a task needs, got {extra} too"
        )
    task = given.get("task", "chat" if literal else None)
    tasks = (*QUESTIONS, *(["chat"] if literal else []))
    if task not in tasks:
        raise _FaultError("unknown task", f"turn {place}: expected a task among {', '.join(tasks)}, got {short(task)}")
    values: dict[str, Any] = {"answer": "", **given, "task": task}
    for key, value in values.items():
        if key == "regions":
            if not isinstance(value, list) or not all(type(each) is int and each > 0 for each in value):
                raise _FaultError(MALFORMED, f"turn {place}: expected regions as numbers from 1, got {short(value)}")
            check_placeholders([f"<region{each}>" for each in value], n_regions)
            values[key] = tuple(value)
        elif not isinstance(value, bool if key == "guided" else str):
            kind = "true or false" if key == "guided" else "text"
            raise _FaultError(MALFORMED, f"turn {place}: expected {key} as {kind}, got {short(value)}")
    if literal and not given["question"].strip():
        raise _FaultError("question empty", f"turn {place}: expected a question, got none")
    if any(IMAGE_TOKEN in value for value in values.values() if isinstance(value, str)):
        raise _FaultError(
            "placeholder in the text", f"turn {place}: expected no {IMAGE_TOKEN}, the image comes first of itself"
        )
    turn = Turn(**values)
    if turn.guided and (fault := _unguided(turn)):
        raise _FaultError(fault.kind, f"turn {place}: {fault.reason}")
    return turn


def _unguided(turn: Turn) -> Fault | None:
    """What is wrong with an answer whose question says how to answer."""
    if turn.task == "locate":
        chosen = parse_region_answer(turn.answer)
        if chosen is None or chosen in turn.regions:
            return None
        options = ", ".join(map(region_answer, turn.regions))
        return Fault("answer that is no option", f"expected {options} or {NO_MATCH!r}, got {short(turn.answer)}")
    if turn.task == "classify":
        if not turn.label_set.strip():
            return Fault(MALFORMED, "expected the label_set that a guided 'classify' names, got none")
        names = LABEL_SETS.get(turn.label_set)
        if names is not None and turn.answer not in names:
            return Fault("unknown category", f"expected a name of {turn.label_set}, got {short(turn.answer)}")
        return None
    return Fault(MALFORMED, f"expected guided with 'locate' or 'classify' alone, got it with {turn.task!r}")

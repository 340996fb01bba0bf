"""Source files entry by entry, and the checks of what they hold. What cannot be used raises ``Fault``."""

import json
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from regiongpt.data.shards import Fault, Rejects
from regiongpt.environment import progress
from regiongpt.errors import DataError, short
from regiongpt.prompts import IMAGE_TOKEN, PLACEHOLDER
from regiongpt.regions import MIN_AREA
from regiongpt.settings import explain
from regiongpt.storage import is_below, is_unicode, reason

Corners = tuple[float, float, float, float]
MALFORMED: Final = "record of another format"
APART: Final = "files that do not belong together"
TRUNCATED: Final = "truncated json"
_DECODE = json.JSONDecoder().raw_decode


# -- Values ------------------------------------------------------------------------------------------------------------


def whole(value: Any) -> int | None:
    """A whole number from 0 on, also written as ``384.0`` or ``"384"``; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    elif isinstance(value, str) and (digits := value.removesuffix(".0")).isdecimal() and len(digits) < 20:
        value = int(digits) if str(int(digits)) == digits else value
    return value if is_whole(value) else None


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 on, such as an id; ``True`` is not."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number that fits a finite float; ``True`` is not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def clipped_box(box: Sequence[Any], width: int, height: int) -> Corners:
    """A box (x, y, width, height) as half-open xyxy within its image, all in pixels; Fault if no area is left."""
    if not all(map(is_number, box)):
        raise Fault("box that is not four numbers", f"expected x, y, width, height as finite pixels, got {short(box)}")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise Fault("box without size", f"expected a width and height above 0, got {short(box)} (x, y, w, h)")
    x0, y0 = max(float(x), 0.0), max(float(y), 0.0)
    x1, y1 = min(float(x + w), float(width)), min(float(y + h), float(height))
    if x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < MIN_AREA:
        within = f"{MIN_AREA} px^2 within {width} x {height} pixels (W x H)"
        raise Fault("box outside the image", f"expected at least {within}, got {short(box)} (x, y, w, h)")
    return x0, y0, x1, y1


def overlaps(box: Corners, others: Sequence[Corners]) -> NDArray[np.float64]:
    """Intersection over union (n,) of a box with each of n others, all xyxy."""
    own, rest = np.array(box, np.float64), np.array(others, np.float64).reshape(-1, 4)
    shared = np.clip(np.minimum(own[2:], rest[:, 2:]) - np.maximum(own[:2], rest[:, :2]), 0, None).prod(axis=1)
    areas = (rest[:, 2:] - rest[:, :2]).prod(axis=1) + (own[2:] - own[:2]).prod()
    return shared / (areas - shared)  # type: ignore[no-any-return]


def stated_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """The ``width`` and ``height`` of an image's entry in pixels, None if it has neither; Fault for anything else."""
    given = entry.get("width"), entry.get("height")
    if given == (None, None):
        return None
    width, height = map(whole, given)
    if not (width and height and max(width, height) < 1 << 31):
        raise Fault("image without size", f"expected width and height, got {short(given)}")
    return width, height


def plain_text(value: Any, what: str) -> str:
    """One line of text without placeholders and repeated blanks; ``what`` is its name in faults."""
    if not isinstance(value, str):
        raise Fault(f"{what} that is not text", f"expected text, got {short(value)}")
    text = " ".join(value.split())
    if not text:
        raise Fault(f"{what} empty", "expected words, got none")
    return words_alone(text)


def words_alone(text: str) -> str:
    """The text; Fault if it holds ``<image>`` or ``<region1>``, or is not Unicode."""
    if "<" in text and (IMAGE_TOKEN in text or PLACEHOLDER.search(text)):
        raise Fault("placeholder in the text", f"expected plain text, got {short(text)}")
    return unicode_text(text)


def unicode_text(text: str) -> str:
    """The text; Fault for half of a surrogate pair, which JSON can spell but no file can hold."""
    if not is_unicode(text):
        raise Fault("text that is not Unicode", f"expected valid Unicode, got half of a surrogate in {short(text)}")
    return text


def image_name(name: Any) -> str:
    """The path of an image below the images' folder; Fault for any other."""
    if isinstance(name, str) and name and is_unicode(name) and is_below(name):
        return name
    raise Fault("image outside the folder", f"expected a path below the images' folder, got {short(name)}")


def check_image(path: str | Path, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height in pixels of an image as training loads it, from its header, after EXIF orientation.

    Fault where it is missing, cannot be read, or is not of the stated width and height.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            # Asking every image for EXIF would decode those without it whole.
            tagged = image.format == "TIFF" or not image.info.keys().isdisjoint(("exif", "xmp"))
            sideways = tagged and image.getexif().get(0x0112) in (5, 6, 7, 8)
            found = (image.height, image.width) if sideways else (image.width, image.height)
    except (FileNotFoundError, NotADirectoryError):
        raise Fault("image file missing", f"expected an image at {path}, found none") from None
    except Exception as error:  # header parsers raise nearly every built-in exception on broken data
        raise Fault("unreadable image", f"{path}: PIL cannot open it ({reason(error)})") from None
    if found != (width or found[0], height or found[1]):
        expected = f"expected {width} x {height} pixels (W x H) as annotated"
        raise Fault("image of another size", f"{expected}, got {found[0]} x {found[1]} in {path}")
    return found


def known_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height of an image, None where it cannot be read."""
    try:
        return check_image(path)
    except Fault:
        return None


# -- Typed rows --------------------------------------------------------------------------------------------------------


class Row(BaseModel):
    """One entry of a file, with the types of the keys that are read; other keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @classmethod
    def read(cls, entry: Any, where: str = "") -> Self:
        """The entry as a row; Fault if a value is missing or of another type, its reason beginning with ``where``."""
        if not isinstance(entry, dict):
            raise Fault(MALFORMED, f"{where}expected an object, got {short(entry)}")
        try:
            return cls.model_validate(entry)
        except ValidationError as error:
            unknown = any(each["type"] == "extra_forbidden" for each in error.errors(include_url=False))
            raise Fault("unknown key" if unknown else MALFORMED, f"{where}{explain(cls, error)}") from None


def _identity(value: Any) -> str:
    if type(value) not in (str, int) or value == "":
        raise Fault(MALFORMED, f"id: expected text or a whole number, got {short(value)}")
    return unicode_text(str(value))


Words = Annotated[str, AfterValidator(words_alone)]
Xywh = Annotated[list[float], Field(min_length=4, max_length=4)]
Identity = Annotated[str, BeforeValidator(_identity)]
Whole = Annotated[int, Field(ge=0, lt=1 << 63)]
Side = Annotated[
    int, BeforeValidator(lambda value: value if whole(value) is None else whole(value)), Field(gt=0, lt=1 << 31)
]
ImageName = Annotated[str, BeforeValidator(image_name)]
Expression = Annotated[str, BeforeValidator(lambda value: plain_text(value, "expression"))]


# -- Files -------------------------------------------------------------------------------------------------------------


class _Json:
    """The text of a JSON file and a place in it; JSONDecodeError where it stops being JSON."""

    def __init__(self, path: Path) -> None:
        # A byte that is not UTF-8 spoils the text that it is in, not the file.
        self.text, self.at = path.read_text(encoding="utf-8-sig", errors="surrogateescape"), 0

    def peek(self) -> str:
        """The next character that is not blank, ``""`` at the end."""
        while (found := self.text[self.at : self.at + 1]) and found in " \t\n\r":
            self.at += 1
        return found

    def take(self, expected: str) -> None:
        """Move past the next character, which must be this one."""
        if self.peek() != expected:
            raise JSONDecodeError(f"expected {expected}", self.text, self.at)
        self.at += 1

    def value(self) -> Any:
        """Move past one whole value and return it."""
        self.peek()
        value, self.at = _DECODE(self.text, self.at)
        return value

    def items(self, brackets: str) -> Iterator[str]:
        """Stop before each element of an array, or value of an object, with its key; the caller moves past it."""
        self.take(brackets[0])
        while self.peek() != brackets[1]:
            key = ""
            if brackets == "{}":
                key = str(self.value())
                self.take(":")
            yield key
            if self.peek() != brackets[1]:
                self.take(",")
        self.take(brackets[1])


def iter_array(path: Path, key: str | None = None) -> Iterator[Any]:
    """The elements of one top-level array, or of the file itself without a ``key``; see :func:`iter_arrays`."""
    return (element for _, element in iter_arrays(path, None if key is None else (key,)))


def iter_arrays(path: Path, keys: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """The elements of several top-level arrays of a JSON file in its order, each with its key.

    Without keys, the file is itself an array. Its text is held in memory, but only one decoded element at a time.
    DataError where the file cannot be read, is not whole JSON, or lacks one of the arrays.
    """
    wanted = "an array" if keys is None else f"an object with an array {', '.join(map(repr, keys))}"
    lacking = list(keys or ())
    try:
        file = _Json(path)
        if file.peek() != ("[" if keys is None else "{"):
            raise DataError(f"{path}: expected json that is {wanted}, got {short(file.text[:20])}; give another file")
        for key in ("",) if keys is None else file.items("{}"):
            if file.peek() != "[" or (keys is not None and key not in keys):
                file.value()
                continue
            lacking = [each for each in lacking if each != key]
            for _ in progress(file.items("[]"), path.name, key or "entries"):
                yield key, file.value()
        if file.peek():
            raise JSONDecodeError("expected the end", file.text, file.at)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a whole json file: {reason(error)}; fetch it again") from None
    if lacking:
        raise DataError(f"{path}: expected {wanted}, found no array {', '.join(map(repr, lacking))}")


def iter_lines(path: Path, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines with their line numbers; other lines are rejects, blank ones skipped.

    DataError where the file cannot be read, or none of its lines is a JSON object.
    """
    found = number = 0
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(progress(file, path.name, "lines"), 1):
                if not line.strip():
                    continue
                with rejects.noting(path, number):
                    try:
                        entry = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        # A line without an end is the last one, and was being written.
                        kind = "line that is not json" if line.endswith("\n") else TRUNCATED
                        raise Fault(kind, f"expected a JSON object: {reason(error)}") from None
                    if not isinstance(entry, dict):
                        raise Fault(MALFORMED, f"expected a JSON object, got {short(entry)}")
                    found += 1
                    yield number, entry
    except OSError as error:
        raise DataError(f"{path}: not a readable file of json lines: {reason(error)}; check the path") from None
    if number and not found:
        raise DataError(f"{path}: no line is a JSON object; give a JSON lines file")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"it would import and could run {short(f'{module}.{name}')}")


def load_plain_pickle(path: Path) -> Any:
    """The content of a pickle of plain data such as dicts, lists and strings, those of Python 2 read as Latin-1.

    A pickle is a program, and a download may be anybody's: DataError if it asks for an import, or is not whole.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:  # broken pickles raise nearly every built-in exception
        raise DataError(f"{path}: not a whole pickle of plain data: {reason(error)}; fetch the file again") from None

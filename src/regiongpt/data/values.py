"""Checks where data enters: single values, typed rows and images. What cannot be used raises ``Fault``."""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeGuard

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from regiongpt.data.records import is_below
from regiongpt.data.shards import Fault
from regiongpt.errors import short
from regiongpt.prompts import IMAGE_TOKEN, PLACEHOLDER
from regiongpt.regions import MIN_AREA
from regiongpt.settings import explain

Corners = tuple[float, float, float, float]
MALFORMED: Final = "record of another format"
"""The kind of fault of a record that lacks what the source's layout has."""
APART: Final = "files that do not belong together"
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


def whole(value: Any) -> int | None:
    """A whole number from 0 on, also written as ``384.0`` or ``"384"``; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    elif isinstance(value, str) and (digits := value.removesuffix(".0")).isdecimal() and len(digits) < 20:
        value = int(digits) if str(int(digits)) == digits else value
    return value if is_whole(value) else None


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 on, such as an id; ``True`` is none."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number that a float can hold; ``True`` is none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_box(value: Any) -> TypeGuard[list[float]]:
    """Whether a value is a list of four such numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def clipped_box(box: Sequence[Any], width: int, height: int) -> Corners:
    """A box (x, y, width, height) as half-open xyxy within its image, all in pixels.

    Raises:
        Fault: It is no box, or has no area in the image.
    """
    if not all(map(is_number, box)):
        kind = "finite" if all(type(value) in (int, float) for value in box) else "four numbers"
        raise Fault(f"box that is not {kind}", f"expected x, y, width, height as finite pixels, got {short(box)}")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise Fault("box without size", f"expected a width and height above 0, got {short(box)} (x, y, w, h)")
    x0, y0 = max(float(x), 0.0), max(float(y), 0.0)
    x1, y1 = min(float(x + w), float(width)), min(float(y + h), float(height))
    if x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < MIN_AREA:
        within = f"{MIN_AREA} px^2 within {width} x {height} pixels (W x H)"
        raise Fault("box outside the image", f"expected at least {within}, got {short(box)} (x, y, w, h)")
    return x0, y0, x1, y1


def stated_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """The ``width`` and ``height`` of an image's entry in pixels, None without any; Fault for what is no size."""
    given = entry.get("width"), entry.get("height")
    if given == (None, None):
        return None
    width, height = map(whole, given)
    if not (width and height and max(width, height) < 1 << 31):
        raise Fault("image without size", f"expected width and height, got {short(given)}")
    return width, height


def plain_text(value: Any, what: str) -> str:
    """One line of text without placeholders, runs of blanks as single ones; ``what`` is the fault's name for it."""
    if not isinstance(value, str):
        raise Fault(f"{what} that is not text", f"expected text, got {short(value)}")
    text = " ".join(value.split())
    if not text:
        raise Fault(f"{what} empty", "expected words, got none")
    return words_alone(text)


def words_alone(text: str) -> str:
    """A text as it is; Fault if it holds ``<image>`` or ``<region1>``, or is not Unicode."""
    if "<" in text and (IMAGE_TOKEN in text or PLACEHOLDER.search(text)):
        raise Fault("placeholder in the text", f"expected words alone, got {short(text)}")
    return unicode_text(text)


def unicode_text(text: str) -> str:
    """A text as it is; Fault for half of a surrogate pair, which json can spell but no file can hold."""
    if not is_unicode(text):
        raise Fault("text that is not Unicode", f"expected whole characters, got half of a pair in {short(text)}")
    return text


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def image_name(name: Any) -> str:
    """The path of an image below the images' folder."""
    if isinstance(name, str) and name and is_unicode(name) and is_below(name):
        return name
    wanted = "expected a path below the folder of images, with forward slashes"
    raise Fault("image outside the folder", f"{wanted}, got {short(name)}")


def _setting(text: str) -> str:
    try:
        return plain_text(text, "text") and text
    except Fault as fault:
        raise ValueError(fault.reason) from None


Words = Annotated[str, AfterValidator(_setting)]
"""A setting that becomes part of questions."""


class Row(BaseModel):
    """One entry of a file, with the types of what is read of it; other keys are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @classmethod
    def read(cls, entry: Any, where: str = "") -> Self:
        """The entry as a row; ``where`` stands before the reason of a fault.

        Raises:
            Fault: It is no object, or a value is missing or of another type.
        """
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


Identity = Annotated[str, BeforeValidator(_identity)]
Whole = Annotated[int, Field(ge=0, lt=1 << 63)]
Side = Annotated[
    int, BeforeValidator(lambda value: value if whole(value) is None else whole(value)), Field(gt=0, lt=1 << 31)
]
ImageName = Annotated[str, BeforeValidator(image_name)]
Expression = Annotated[str, BeforeValidator(lambda value: plain_text(value, "expression"))]
Caption = Annotated[str, BeforeValidator(lambda value: plain_text(value, "caption"))]


def check_image(path: str | Path, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height in pixels of an image as training loads it, by its header alone and EXIF orientation applied.

    Raises:
        Fault: It is missing, cannot be read, or is not of the width and height that annotations state.
    """
    found = _measured(os.fspath(path))  # text is many times as fast to look up as a Path
    if width is not None and height is not None and found != (width, height):
        expected = f"expected {width} x {height} pixels (W x H) as annotated"
        raise Fault("image of another size", f"{expected}, got {found[0]} x {found[1]} in {path}")
    return found


def known_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height of an image; None where it cannot be read, which is said where it is needed."""
    try:
        return check_image(path)
    except Fault:
        return None


@lru_cache(maxsize=1 << 16)  # of images that are fine: another may come to be there
def _measured(path: str) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            # Asking every image would have those without such data decoded whole.
            tagged = image.format == "TIFF" or not image.info.keys().isdisjoint(("exif", "xmp"))
            sideways = tagged and image.getexif().get(_ORIENTATION) in _SIDEWAYS
            return (height, width) if sideways else (width, height)
    except (FileNotFoundError, NotADirectoryError):
        raise Fault("image file missing", f"expected an image at {path}, found none") from None
    except Exception as error:  # header parsers raise nearly every built-in exception on broken data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Fault("unreadable image", f"{path}: PIL cannot open it ({reason})") from None

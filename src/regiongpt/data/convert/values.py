"""Single values of a source, held to what a record needs: boxes, texts, names of images and numbers.

A value that cannot be used raises :class:`regiongpt.data.shards.Fault`.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeGuard

from pydantic import AfterValidator

from regiongpt.data.records import is_below
from regiongpt.data.shards import Fault
from regiongpt.prompts import IMAGE_TOKEN, PLACEHOLDER
from regiongpt.regions import MIN_AREA

Corners = tuple[float, float, float, float]
MALFORMED: Final = "record of another format"
"""The kind of fault of a record that lacks what the source's layout has."""
APART: Final = "files that do not belong together"


def whole(value: Any) -> int | None:
    """A whole number from 0 on, also where a tool has written it as ``384.0`` or ``"384"``; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    elif isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value) if str(int(value)) == value else value
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


def sides(entry: Any) -> tuple[int, int]:
    """Width and height of an entry's image in pixels."""
    width, height = whole(entry.get("width")), whole(entry.get("height"))
    if not (width and height and max(width, height) < 1 << 31):
        given = entry.get("width"), entry.get("height")
        raise Fault(MALFORMED, f"expected width and height as whole numbers, got {short(given)}")
    return width, height


def clipped_box(box: Sequence[Any], width: int, height: int) -> Corners:
    """A box given by its corner and size as half-open xyxy within the image.

    Args:
        box: x, y, width and height in pixels.
        width: Of the image in pixels.
        height: Of the image in pixels.
    """
    for value in box:
        if type(value) not in (int, float):
            raise Fault("box that is not four numbers", f"expected x, y, width, height as numbers, got {short(box)}")
        if not is_number(value):
            raise Fault("box that is not finite", f"expected finite pixels, got {short(box)}")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise Fault("box without size", f"expected a width and height above 0, got {short(box)} (x, y, w, h)")
    x0, y0 = max(float(x), 0.0), max(float(y), 0.0)
    x1, y1 = min(float(x + w), float(width)), min(float(y + h), float(height))
    if x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < MIN_AREA:
        within = f"{MIN_AREA} px^2 within {width} x {height} pixels (W x H)"
        raise Fault("box outside the image", f"expected at least {within}, got {short(box)} (x, y, w, h)")
    return x0, y0, x1, y1


def plain_text(value: Any, what: str) -> str:
    """A text of one line without placeholders.

    Args:
        value: As the source has it; blanks at its ends go, those inside become single ones.
        what: The fault's name for it: ``"expression"``.
    """
    if not isinstance(value, str):
        raise Fault(f"{what} that is not text", f"expected text, got {short(value)}")
    text = " ".join(value.split())
    if not text:
        raise Fault(f"{what} empty", "expected words, got none")
    return words_alone(text)


def words_alone(text: str) -> str:
    """A text that can be taught as it stands: a source's own ``<image>`` or ``<region1>`` are words to it alone."""
    if "<" in text and (IMAGE_TOKEN in text or PLACEHOLDER.search(text)):
        raise Fault("placeholder in the text", f"expected words alone, got {short(text)}")
    return unicode_text(text)


def unicode_text(text: str) -> str:
    """A text without half of a surrogate pair, which json can spell but no file can hold."""
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


def _check_words(text: str) -> str:
    try:
        plain_text(text, "text")
    except Fault as fault:
        raise ValueError(fault.reason) from None
    return text


Words = Annotated[str, AfterValidator(_check_words)]
"""A setting that becomes part of questions."""


def image_name(name: Any) -> str:
    """The path of an image below the images' folder."""
    if isinstance(name, str) and name and is_unicode(name) and is_below(name):
        return name
    raise Fault(
        "image outside the folder",
        f"expected a path below the folder of images, with forward slashes, got {short(name)}",
    )


def short(value: Any) -> str:
    """A value as a message shows it: in plain characters, and at most 80 of them."""
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."

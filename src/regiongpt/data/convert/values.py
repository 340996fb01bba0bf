"""Single values of a source, held to what a record needs: boxes, texts, names of images and whole numbers."""

import sys
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Final, TypeGuard

from pydantic import AfterValidator

from regiongpt.data.convert.images import Fault
from regiongpt.prompts import IMAGE_TOKEN, PLACEHOLDER
from regiongpt.regions import MIN_AREA

Corners = tuple[float, float, float, float]
MALFORMED: Final = "record of another format"
"""The kind of fault of a record that lacks what the source's layout has."""


def whole(value: Any) -> int | None:
    """A whole number from 0 on, also where a tool has written it as ``384.0`` or ``"384"``; None for anything else."""
    if (type(value) is float and value.is_integer()) or (
        isinstance(value, str) and value.isdecimal() and len(value) < 20 and str(int(value)) == value
    ):
        value = int(value)
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


def is_side(value: Any) -> TypeGuard[int]:
    """Whether a value can be the width or the height of an image in pixels."""
    return type(value) is int and 0 < value < 1 << 31


def clipped_box(x: Any, y: Any, width: Any, height: Any, image_width: int, image_height: int) -> Corners | Fault:
    """A box given by its corner and size as half-open xyxy within the image, or what is wrong with it.

    Args:
        x: Of the left edge, in pixels; ``y`` of the top edge likewise.
        y: Of the top edge.
        width: Of the box in pixels.
        height: Of the box in pixels.
        image_width: In pixels.
        image_height: In pixels.
    """
    given = (x, y, width, height)
    for value in given:
        if type(value) not in (int, float):
            return Fault("box that is not four numbers", f"expected x, y, width, height as numbers, got {short(given)}")
        if not is_number(value):
            return Fault("box that is not finite", f"expected finite pixels, got {short(given)}")
    if width <= 0 or height <= 0:
        return Fault("box without size", f"expected a width and height above 0, got {short(given)} (x, y, w, h)")
    x0, y0 = max(float(x), 0.0), max(float(y), 0.0)
    x1, y1 = min(float(x + width), float(image_width)), min(float(y + height), float(image_height))
    if x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < MIN_AREA:
        return Fault(
            "box outside the image",
            f"expected it within {image_width} x {image_height} pixels (W x H), got {short(given)} (x, y, w, h)",
        )
    return x0, y0, x1, y1


def plain_text(value: Any, what: str) -> str | Fault:
    """A text of one line without placeholders, or what is wrong with it.

    Args:
        value: As the source has it; blanks at its ends go, those inside become single ones.
        what: The fault's name for it: ``"expression"``.
    """
    if not isinstance(value, str):
        return Fault(f"{what} that is not text", f"expected text, got {short(value)}")
    text = " ".join(value.split())
    if not text:
        return Fault(f"{what} empty", "expected words, got none")
    return text_fault(text) or text


def text_fault(text: str) -> Fault | None:
    """What keeps a text of a source from being taught as it stands, None if nothing does.

    A source's own ``<image>`` or ``<region1>`` are words to it; the model would see an image or a region there.
    """
    if "<" in text and (IMAGE_TOKEN in text or PLACEHOLDER.search(text)):
        return Fault("placeholder in the text", f"expected words alone, got {short(text)}")
    return unicode_fault(text)


def _check_words(text: str) -> str:
    if isinstance(fault := plain_text(text, "text"), Fault):
        raise ValueError(fault.reason)
    return text


Words = Annotated[str, AfterValidator(_check_words)]
"""A setting that becomes part of questions."""


def unicode_fault(text: str) -> Fault | None:
    """The fault of a text with half of a surrogate pair, which json can spell but no file can hold, or None."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return Fault("text that is not Unicode", f"expected whole characters, got half of a pair in {short(text)}")
    return None


def image_fault(name: Any) -> Fault | None:
    """What is wrong with the name of an image below the images' folder, None if nothing is."""
    if isinstance(name, str) and name and not unicode_fault(name) and "\0" not in name:
        windows = PureWindowsPath(name)
        if not (windows.drive or windows.root or "\\" in name) and ".." not in PurePosixPath(name).parts:
            return None
    return Fault(
        "image outside the folder",
        f"expected a path below the folder of images, with forward slashes, got {short(name)}",
    )


def short(value: Any) -> str:
    """A value as a message shows it: in plain characters, and at most 80 of them."""
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."

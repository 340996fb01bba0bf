"""Checks, by the header of its file alone, that an annotated image is there and is the one that was annotated."""

import os
from functools import lru_cache
from pathlib import Path

from regiongpt.data.shards import Fault

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


def check_image(path: str | Path, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """Width and height in pixels of an image as training loads it, EXIF orientation applied; it is opened once.

    Args:
        path: Of the image file.
        width: That the annotations state, in pixels; None where they state none.
        height: Likewise.

    Raises:
        Fault: It is missing, cannot be read, or is of another size.
    """
    found = _measured(os.fspath(path))  # text is many times as fast to look up as a Path
    if width is not None and height is not None and found != (width, height):
        raise Fault(
            "image of another size",
            f"expected {width} x {height} pixels (W x H) as annotated, got {found[0]} x {found[1]} in {path}",
        )
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

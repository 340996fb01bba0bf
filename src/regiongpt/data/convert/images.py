"""Checks, by the header of its file alone, that an annotated image is there and is the one that was annotated."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from regiongpt.errors import DataError

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


class Fault(NamedTuple):
    """What is wrong with an image: the kind that rejects are counted by, and the reason."""

    kind: str
    reason: str


def check_image(path: Path, width: int | None = None, height: int | None = None) -> Fault | None:
    """What is wrong with the image of a record, None if nothing is; a good image is opened once.

    Args:
        path: Of the image file.
        width: That the annotations state, in pixels; None where they state none.
        height: Likewise.
    """
    try:
        found = _measured(Path(path))
    except _UnusableError as error:
        return error.fault
    if width is not None and height is not None and found != (width, height):
        return Fault(
            "image of another size",
            f"expected {width} x {height} pixels (W x H) as annotated, got {found[0]} x {found[1]} in {path}",
        )
    return None


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of an image as training loads it, EXIF orientation applied.

    Raises:
        DataError: There is no such file, or it is not an image.
    """
    try:
        return _measured(Path(path))
    except _UnusableError as error:
        raise DataError(f"{error.fault.reason}; fetch it, or check the folder of images") from None


def known_size(path: Path) -> tuple[int, int] | None:
    """Likewise; None where the file cannot be read, which is said where it is needed."""
    try:
        return image_size(path)
    except DataError:
        return None


class _UnusableError(Exception):
    """A fault that is raised and so not cached: the file may come to be there."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


@lru_cache(maxsize=1 << 16)
def _measured(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            # Asking every image would have those without such data decoded whole.
            tagged = image.format == "TIFF" or not image.info.keys().isdisjoint(("exif", "xmp"))
            sideways = tagged and image.getexif().get(_ORIENTATION) in _SIDEWAYS
            return (height, width) if sideways else (width, height)
    except (FileNotFoundError, NotADirectoryError):
        fault = Fault("image file missing", f"expected an image at {path}, found none")
    except Exception as error:  # header parsers raise nearly every built-in exception on broken data
        reason = " ".join(str(error).split()) or type(error).__name__
        fault = Fault("unreadable image", f"expected an image at {path}, got a file that PIL cannot open ({reason})")
    raise _UnusableError(fault)

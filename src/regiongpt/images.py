"""Images of any kind, converted to the form the rest of the code uses: upright 8-bit RGB.

Also the square padding (:class:`SquareFrame`): the only place that knows an image is padded before a tower sees it.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from regiongpt.errors import DataError
from regiongpt.storage import reason

MAX_PIXELS = 178_956_970
"""Images beyond this many pixels (half a gigabyte as RGB) are refused before they are decoded."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")
"""File suffixes read from a folder of images."""

ImageSource = str | Path | bytes | BinaryIO | Image.Image | NDArray[np.generic]


def load_image(source: ImageSource) -> Image.Image:
    """Read an image of any usual kind as upright 8-bit RGB.

    The EXIF orientation is applied, transparent images are laid on white, 16-bit greyscale is scaled to 8 bits, and of
    an animation the first frame is taken.

    Args:
        source: A path, the bytes of an image file, a binary file object, a PIL image, an array of dtype uint8 or uint16
            and shape (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA.

    Raises:
        DataError: The source is missing, not an image, truncated, empty, of more than :data:`MAX_PIXELS` pixels, or
            of a pixel type without a known range (floats, 32-bit integers).
    """
    name, image = open_image(source)
    with warnings.catch_warnings(action="ignore"):
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF says nothing about orientation, and the pixels are good
            image = image.copy()
    return _to_rgb(image, name)


def open_image(source: ImageSource) -> tuple[str, Image.Image]:
    """Read an image with the pixels that are stored, of any mode, and what messages call it."""
    if isinstance(source, np.ndarray):
        return "image array", _from_array(source)
    data = b""
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "PIL image")
    else:
        name, data = _read(source)
    with warnings.catch_warnings(action="ignore"):  # it is either read or an error
        try:
            image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(data))
            _check_size(image.width, image.height, name)
            image.load()
        except DataError:
            raise
        except Image.DecompressionBombError as error:
            raise DataError(f"{name}: its header claims more than {MAX_PIXELS:,} pixels; scale it down") from error
        except Exception as error:  # parsers and decoders raise nearly every built-in exception on broken data
            raise DataError(f"{name}: expected an image, got one truncated or damaged, or another file") from error
    return name, image


def _read(source: str | Path | bytes | BinaryIO) -> tuple[str, bytes]:
    name = str(source) or "''" if isinstance(source, str | Path) else str(getattr(source, "name", "image bytes"))
    try:
        if isinstance(source, str | Path):
            data: Any = Path(source).read_bytes()
        else:
            data = source.read() if hasattr(source, "read") else source
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{name}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: the image file cannot be read: {reason(error)}") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        wanted = "an image as a path, bytes, binary file, PIL image or array"
        raise DataError(f"{name}: expected {wanted}, got {type(data).__name__}")
    if not data:
        raise DataError(f"{name}: expected an image, got an empty file")
    return name, bytes(data)


def _from_array(array: NDArray[np.generic]) -> Image.Image:
    expected = "image array: expected dtype uint8 or uint16 and shape (H, W), (H, W, 3) or (H, W, 4)"
    if array.dtype not in (np.uint8, np.uint16):
        why = ", whose white may be 1 or 255" if array.dtype.kind == "f" else ""
        raise DataError(f"{expected}, got dtype {array.dtype}{why}; scale it to 0..255 as uint8")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise DataError(f"{expected}, got shape {array.shape}; put the channels last, one image per call")
    _check_size(array.shape[1], array.shape[0], "image array")
    return Image.fromarray(np.ascontiguousarray(array if array.dtype == np.uint8 else _to_8_bit(array)))


def _check_size(width: int, height: int, name: str) -> None:
    if not 1 <= width * height <= MAX_PIXELS:
        raise DataError(f"{name}: expected 1 to {MAX_PIXELS:,} pixels, got {width} x {height} (W x H); scale it down")


def _to_8_bit(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scale 0..65535 to 0..255, rounding to nearest; 257 is exactly 65535 / 255."""
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            got = f"{values.dtype} from {values.min()} to {values.max()}"
            raise DataError(f"{name}: expected pixels of 8 or 16 bits, got {got}; scale them to 0..255")
        return Image.fromarray(_to_8_bit(values)).convert("RGB")
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
            layer = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{name}: expected an image that converts to RGB, got PIL mode {image.mode}") from error


@dataclass(frozen=True)
class SquareFrame:
    """How a ``width`` x ``height`` image becomes a square: padded around its centre (paper: §4), or ``stretched``.

    Patches cover the share ``seen`` of the square's sides, from its top left corner.
    """

    width: int
    height: int
    stretched: bool = False
    seen: float = 1.0

    @property
    def side(self) -> int:
        """Side of the padded square, in pixels."""
        return max(self.width, self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """Column and row of the padded square at which the image begins."""
        if self.stretched:
            return 0, 0
        return (self.side - self.width) // 2, (self.side - self.height) // 2

    def pad(self, image: Image.Image, fill: tuple[int, int, int] = (127, 127, 127)) -> Image.Image:
        """Centre the image in a ``side`` x ``side`` square of colour ``fill``."""
        if self.stretched or self.width == self.height:
            return image
        square = Image.new("RGB", (self.side, self.side), fill)
        square.paste(image, self.offset)
        return square

    def edges(self, grid_h: int, grid_w: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lines of a grid over the square, ``y_edges`` (grid_h + 1,) and ``x_edges`` (grid_w + 1,).

        They are in pixels of the original image; on padding, they lie outside it. What no patch covers belongs to the
        last row and column.
        """
        sides = (self.width, self.height) if self.stretched else (self.side, self.side)
        x_edges, y_edges = (
            np.linspace(0.0, side * self.seen, cells + 1) for side, cells in zip(sides, (grid_w, grid_h), strict=True)
        )
        x_edges[-1], y_edges[-1] = sides
        return y_edges - self.offset[1], x_edges - self.offset[0]

"""Regions of an image, in every form people mark them: box, mask, polygon, RLE, point, scribble.

A region holds what was given, in pixels of the original image: x to the right, y down, from the top left corner. It is
clipped to its image when it is used. Paper: §3.1
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from shapely.errors import GEOSException

from regiongpt.coverage import Bounds, BoxShape, PixelShape, Shape, decode_rle, polygon_shape, stroke_shape
from regiongpt.errors import RegionError, short
from regiongpt.images import MAX_PIXELS, SquareFrame

KINDS = ("box", "mask", "polygon", "rle", "point", "scribble")
STROKE = 0.015  # default radius of a point and width of a scribble, as a share of the longer side of the image
MIN_AREA = 1e-3  # square pixels below which a region counts as empty
MAX_COORDINATE = 1e9  # pixels


class Region(ABC):
    """An immutable part of an image, made by :meth:`box`, :meth:`mask`, :meth:`polygon`, :meth:`rle` and others.

    Every method that takes the width and height of the image in pixels raises RegionError where the region makes no
    sense in it.
    """

    kind: str  # one of KINDS
    note: str = ""
    """A note for the user about how the region was read, such as soft mask edges; else empty."""

    @staticmethod
    def of(value: Any, name: str = "region") -> "Region":
        """The region that a value stands for, called ``name`` in messages.

        It is a Region; a box as four numbers x0, y0, x1, y1 in pixels (list, tuple, array or tensor); a mapping for
        :meth:`from_dict`; a PIL image or bool array (H, W) for :meth:`mask`.
        """
        if isinstance(value, Region):
            return value
        if isinstance(value, Mapping):
            return Region.from_dict(value, name)
        with _called(name):
            array = value if isinstance(value, Image.Image) else _array(value)
            if isinstance(array, Image.Image) or (array.dtype == np.bool_ and array.ndim == 2):
                return Region.mask(array)
            if array.shape == (4,):
                return Region.box(*(array.tolist() if hasattr(value, "dtype") else value))
        wanted = "a Region such as Region.box(x0, y0, x1, y1), or [x0, y0, x1, y1]"
        raise RegionError(f"{name}: expected {wanted}, got {short(value)}")

    @staticmethod
    def list_of(values: Any) -> "list[Region]":
        """One region, or a sequence of regions, as a list; each may be anything that :meth:`of` takes."""
        values = _array(values) if hasattr(values, "dtype") else values
        is_mask = isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype == np.bool_
        if is_mask or isinstance(values, Region | Mapping | Image.Image):
            values = [values]
        try:
            listed = list(values)
        except TypeError:
            raise RegionError(f"regions: expected a list of regions, got {short(values)}") from None
        if len(listed) > 1 and (isinstance(listed[0], int | float) or getattr(listed[0], "ndim", 1) == 0):
            listed = [listed]
        return [Region.of(value, f"<region{number}>") for number, value in enumerate(listed, 1)]

    @staticmethod
    def box(x0: float, y0: float, x1: float, y1: float, *, normalized: bool | None = None) -> "Region":
        """The half-open box from its left and top edge to its right and bottom edge, fractions of pixels allowed.

        With ``normalized``, the numbers are fractions of the image's size. :meth:`check` refuses a box within 0..1
        unless that is said to be False.
        """
        x0, y0, x1, y1 = _numbers((x0, y0, x1, y1), "x0, y0, x1, y1")
        if not isinstance(normalized, bool | np.bool_ | None):
            raise RegionError(f"region: expected normalized as true or false, got {short(normalized)}")
        if normalized and not (min(x0, y0, x1, y1) >= -1 and max(x0, y0, x1, y1) <= 2):
            raise RegionError(f"region: expected normalized numbers within 0..1, got {short([x0, y0, x1, y1])}")
        return _Box((x0, y0, x1, y1), None if normalized is None else bool(normalized))

    @staticmethod
    def mask(mask: "ArrayLike | Image.Image") -> "Region":
        """The pixels inside a mask as large as the image: a PIL image, or an array or tensor.

        Arrays are (H, W) of bool, integers up to 255 or 65535 or floats up to 1 or 255, or uint8 (H, W, 3 or 4) RGB(A).
        Of two values, the larger is inside. Of more (soft edges, JPEG, probabilities), inside is from half on: 128 of
        255, 32768 of 65535, 0.5 of 1; :attr:`note` says so. In a colour image the brightest channel counts; in one with
        transparency only the alpha channel, unless that is the same everywhere.
        """
        array = np.empty(0) if isinstance(mask, Image.Image) else _array(mask)
        if array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8:
            mask = Image.fromarray(array)
        if isinstance(mask, Image.Image):
            array = _brightness(mask)
        if array.ndim != 2:
            raise RegionError(f"region: expected a mask of shape (H, W), got {array.shape}")
        inside, note = _inside(array)
        return _Pixels("mask", array.shape[0], array.shape[1], PixelShape.of(inside), note)

    @staticmethod
    def polygon(points: Any) -> "Region":
        """The union of the insides of rings; where a ring crosses itself, even-odd counts.

        One ring is [[x, y], ...], or flat [x, y, x, y, ...] as in COCO, and closes itself; several are a list of these.
        """
        if not _is_list(points):
            raise RegionError(f"region: expected a polygon as [[x, y], ...] or a list of rings, got {short(points)}")
        items = _array(points).tolist() if hasattr(points, "dtype") else list(points)
        several = all(map(_is_list, items)) and not all(len(item) == 2 and not _is_list(item[0]) for item in items)
        return _Vector("polygon", tuple(_points(ring, "polygon") for ring in (items if several and items else [items])))

    @staticmethod
    def rle(rle: Mapping[str, Any]) -> "Region":
        """A mask in COCO's run-length encoding: ``size`` [H, W], and ``counts``, compressed or a list of runs."""
        expected = 'region: expected RLE like {"size": [H, W], "counts": "..."}'
        if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
            raise RegionError(f"{expected}, got {short(rle)}; write it as pycocotools does")
        size, counts = rle["size"], rle["counts"]
        counts = counts.decode("latin-1") if isinstance(counts, bytes) else counts
        counts = tuple(counts) if _is_list(counts) else counts
        whole = _is_list(size) and len(size) == 2 and all(isinstance(each, int | np.integer) for each in size)
        if not isinstance(counts, str | tuple) or not whole or min(size) < 1 or math.prod(map(int, size)) > MAX_PIXELS:
            raise RegionError(f"{expected} of at most {MAX_PIXELS:,} pixels, got {short(rle)}")
        return _Pixels("rle", int(size[0]), int(size[1]), counts)

    @staticmethod
    def point(x: float, y: float, radius: float | None = None) -> "Region":
        """A disk around a point, by default of radius 1.5 % of the image's longer side, at least one pixel."""
        centre = np.array([_numbers((x, y), "x, y")])
        return _Vector("point", (centre,), None if radius is None else _numbers([radius], "radius")[0])

    @staticmethod
    def scribble(points: Any, width: float | None = None) -> "Region":
        """A stroke of a round brush along [[x, y], ...] or [x, y, x, y, ...]; its default width is a point's radius."""
        line = _points(points, "scribble")
        return _Vector("scribble", (line,), None if width is None else _numbers([width], "width")[0])

    @staticmethod
    def from_dict(data: Mapping[str, Any], name: str = "region") -> "Region":
        """The inverse of :meth:`to_dict`; messages call the region ``name``.

        It takes ``{"box": [x0, y0, x1, y1]}``, maybe ``"normalized"``, ``{"mask": rle}``, ``{"polygon": rings}``,
        ``{"rle": rle}``, ``{"point": [x, y]}``, maybe with ``"radius"``, or ``{"scribble": points}``, with ``"width"``.
        """
        kinds = [kind for kind in KINDS if isinstance(data, Mapping) and kind in data]
        option = {"box": "normalized", "point": "radius", "scribble": "width"}.get(kinds[0], "") if kinds else ""
        if len(kinds) != 1 or set(data) - {kinds[0], option}:
            got = f"keys {short(list(data))}" if isinstance(data, Mapping) else short(data)
            raise RegionError(f"{name}: expected an object with one of the keys {', '.join(KINDS)}, got {got}")
        kind, value, extra = kinds[0], data[kinds[0]], data.get(option)
        with _called(name):
            if kind == "box":
                return Region.box(*_numbers(value, "x0, y0, x1, y1"), normalized=extra)
            if kind == "point":
                x, y = _numbers(value, "x, y")
                return Region.point(x, y, extra)
            if kind == "scribble":
                return Region.scribble(value, extra)
            if kind == "polygon":
                return Region.polygon(value)
            coded = Region.rle(value)
            assert isinstance(coded, _Pixels)
            return coded if kind == "rle" else replace(coded, kind="mask", source=coded.pixels())

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The region as an object that json can write; the keys are those of :meth:`from_dict`."""

    def scaled(self, width: int, height: int) -> "Region":
        """The region in pixels if it was given in fractions of the image's size; masks stay unchanged."""
        return self

    @abstractmethod
    def _shape(self, width: int, height: int) -> Shape:
        """The region clipped to the image, maybe with no area left."""

    def _coordinates(self) -> Any:
        """Numbers that may be fractions of the image."""
        return ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"<{self}>"

    def check(self, width: int, height: int, name: str = "region") -> "Region":
        """Return the region if it makes sense in an image, as one partly outside does; messages call it ``name``.

        RegionError where it is empty, inverted, not finite, wholly outside, of another size, or looks normalized.
        """
        self._resolve(width, height, name, checked=True)
        return self

    def area(self, width: int, height: int) -> float:
        """Exact area inside the image, in square pixels."""
        return self._resolve(width, height).area

    def bounds(self, width: int, height: int) -> Bounds:
        """The smallest box x0, y0, x1, y1 around the part inside the image."""
        return self._resolve(width, height).bounds

    def close_up(self, width: int, height: int, margin: float, least: float) -> tuple[int, int, int, int]:
        """A half-open window x0, y0, x1, y1 of the image around the region.

        ``margin`` is the room on each side, as a share of the region's bounds, ``least`` the least side in pixels, as
        far as the image has them.
        """
        x0, y0, x1, y1 = self.bounds(width, height)
        sides = []
        for low, high, size in ((x0, x1, width), (y0, y1, height)):
            length = min(size, max((high - low) * (1 + 2 * margin), least))
            start = min(max((low + high - length) / 2, 0), size - length)
            sides.append((math.floor(start), min(size, math.ceil(start + length))))
        (left, right), (top, bottom) = sides
        return left, top, right, bottom

    def pool_weights(self, frame: SquareFrame, grid_h: int, grid_w: int, name: str = "") -> NDArray[np.float32]:
        """Weights (grid_h, grid_w), summing to 1, of a feature grid over the padded image. Paper: §3.1 (mask pooling).

        A region thinner than a cell still has its full weight. With a ``name``, it is checked as by :meth:`check`.
        """
        shape = self._resolve(frame.width, frame.height, name or "region", checked=bool(name))
        areas = shape.coverage(*frame.edges(grid_h, grid_w))
        return (areas / areas.sum()).astype(np.float32)  # type: ignore[no-any-return]

    def to_mask(self, width: int, height: int) -> NDArray[np.bool_]:
        """Pixels of which at least half is in the region, (height, width); if none is, those it covers most."""
        shape = self._resolve(width, height)
        x0, y0, x1, y1 = shape.bounds
        left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
        areas = shape.coverage(np.arange(top, bottom + 1.0), np.arange(left, right + 1.0))
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = areas >= min(0.5, areas.max())
        return mask

    def _resolve(self, width: int, height: int, name: str = "region", checked: bool = False) -> Shape:
        """The region clipped to the image; ``checked`` refuses numbers that look normalized."""
        with _called(name):
            numbers = self._coordinates() if checked and max(width, height) > 1 else ()
            if len(numbers) and min(numbers) >= 0 and 0 < max(numbers) <= 1:
                how = (
                    "give --normalized (in Python normalized=True, or False if these are pixels) or multiply by W and H"
                )
                raise RegionError(f"region: {self} lies within 0..1 and looks normalized; {how}")
            shape = self._shape(width, height)
            if not shape.area >= MIN_AREA:
                raise RegionError(f"region: {self} covers nothing of the image of {width} x {height} pixels (W x H)")
        return shape


@dataclass(frozen=True, eq=False, repr=False)
class _Box(Region):
    edges: tuple[float, float, float, float]
    normalized: bool | None = None  # None: pixels, unless they lie within 0..1
    kind = "box"

    def __str__(self) -> str:
        return f"{'normalized ' if self.normalized else ''}box ({', '.join(map(_number, self.edges))})"

    def to_dict(self) -> dict[str, Any]:
        return {"box": list(self.edges), **({"normalized": True} if self.normalized else {})}

    def scaled(self, width: int, height: int) -> "_Box":
        x0, y0, x1, y1 = self.edges
        return _Box((x0 * width, y0 * height, x1 * width, y1 * height), normalized=False)

    def _coordinates(self) -> Any:
        return self.edges if self.normalized is None else ()

    def _shape(self, width: int, height: int) -> Shape:
        x0, y0, x1, y1 = self.scaled(width, height).edges if self.normalized else self.edges
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            raise RegionError(f"region: expected finite pixels x0,y0,x1,y1, got {self}; give numbers")
        if x0 >= x1 or y0 >= y1:
            wrong = f"got {self}, inverted or empty; give left, top, right, bottom"
            raise RegionError(f"region: expected x0 < x1 and y0 < y1, {wrong}")
        return BoxShape((max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))))


@dataclass(frozen=True, eq=False, repr=False)
class _Pixels(Region):
    """A mask or an RLE: the size of the image it was drawn on, and set pixels."""

    kind: str
    height: int
    width: int
    source: PixelShape | str | tuple[int, ...]  # the pixels, or their run lengths: data sets hold millions of these
    note: str = ""

    def pixels(self) -> PixelShape:
        if isinstance(self.source, PixelShape):
            return self.source
        try:
            return PixelShape.of(decode_rle(self.source, self.height, self.width))
        except ValueError as error:
            size = f"{self.width} x {self.height} pixels (W x H)"
            raise RegionError(f"region: expected COCO RLE of {size}, but {error}") from None

    def __str__(self) -> str:
        return f"{self.kind} of {self.width} x {self.height} pixels"

    def to_dict(self) -> dict[str, Any]:
        pixels = self.pixels()
        (rows, columns), top, left = pixels.window.shape, pixels.top, pixels.left
        around = ((top, self.height - top - rows), (left, self.width - left - columns))
        coded = coco_mask.encode(np.asfortranarray(np.pad(pixels.window, around), np.uint8))
        return {self.kind: {"size": [self.height, self.width], "counts": coded["counts"].decode("ascii")}}

    def _shape(self, width: int, height: int) -> Shape:
        if (self.height, self.width) != (height, width):
            wanted = f"a {self.kind} of the image's size, {width} x {height} pixels (W x H)"
            raise RegionError(f"region: expected {wanted}, got {self.width} x {self.height}; draw it on this image")
        pixels = self.pixels()
        if pixels.area == 0:
            raise RegionError(f"region: expected a {self.kind} with at least one set pixel, got an empty {self}")
        return pixels


@dataclass(frozen=True, eq=False, repr=False)
class _Vector(Region):
    """A polygon, a point or a scribble, drawn once an image size."""

    kind: str
    rings: tuple[NDArray[np.float64], ...]  # (N, 2) each; a point or scribble has one ring, its points
    size: float | None = None  # radius of a point, width of a scribble
    certain: bool = False  # numbers within 0..1 are known to be pixels

    def __str__(self) -> str:
        if self.kind == "point":
            size = "" if self.size is None else f" of radius {_number(self.size)}"
            return f"point ({', '.join(map(_number, self.rings[0][0]))}){size}"
        rings = f" in {len(self.rings)} rings" if len(self.rings) > 1 else ""
        return f"{self.kind} of {sum(map(len, self.rings))} points{rings}"

    def to_dict(self) -> dict[str, Any]:
        rings = [ring.tolist() for ring in self.rings]
        if self.kind == "polygon":
            return {"polygon": rings}
        if self.kind == "point":
            return {"point": rings[0][0], "radius": self.size}
        return {"scribble": rings[0], "width": self.size}

    def scaled(self, width: int, height: int) -> Region:
        return replace(self, rings=tuple(ring * (width, height) for ring in self.rings), certain=True)

    def _coordinates(self) -> Any:
        return () if self.certain or self.kind == "point" else np.concatenate(self.rings).ravel()

    def _shape(self, width: int, height: int) -> Shape:
        drawn = self.__dict__.get("_drawn")
        if drawn is None or drawn[0] != (width, height):
            try:
                drawn = (width, height), self._draw(width, height)
            except (ValueError, GEOSException) as error:
                why = "cannot be drawn" if isinstance(error, GEOSException) else str(error)
                raise RegionError(f"region: {self} {why}; draw it with fewer points") from None
            self.__dict__["_drawn"] = drawn
        return drawn[1]

    def _draw(self, width: int, height: int) -> Shape:
        values = np.append(np.concatenate(self.rings), self.size or 0.0)
        wrong = values[~(np.abs(values) <= MAX_COORDINATE)]
        if wrong.size:
            raise RegionError(f"region: expected finite coordinates in pixels, got {_number(wrong[0])} in {self}")
        if self.kind == "polygon":
            if min(map(len, self.rings)) < 3:
                raise RegionError(f"region: expected rings of at least 3 points, got {self}; use a box or a scribble")
            return polygon_shape(self.rings, width, height)
        size = max(1.0, STROKE * max(width, height)) if self.size is None else self.size
        if size <= 0:
            what = "radius" if self.kind == "point" else "width"
            raise RegionError(f"region: expected a {what} above 0 pixels, got {_number(size)}; leave it out")
        return stroke_shape(self.rings[0], size if self.kind == "point" else size / 2, width, height)


@contextmanager
def _called(name: str) -> Iterator[None]:
    try:
        yield
    except RegionError as error:
        raise RegionError(str(error).replace("region:", f"{name}:", 1)) from None


def _is_list(value: Any) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or bool(getattr(value, "ndim", 0))


def _array(values: Any) -> NDArray[Any]:
    """Lists, arrays and torch's tensors, wherever they lie, as an array."""
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            values = values.float() if "bfloat16" in str(values.dtype) else values
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # lists of several lengths, sparse tensors, those without data
        raise RegionError(f"region: expected an array or lists of one length, got {short(values)}") from None


def _numbers(values: Any, names: str) -> list[Any]:
    """As many numbers as there are names."""
    listed, count = list(values) if _is_list(values) else [], names.count(",") + 1
    try:
        if len(listed) != count or any(isinstance(each, bool | np.bool_ | str) for each in listed):
            raise TypeError
        return list(map(float, listed))
    except (TypeError, ValueError, OverflowError):
        wanted = f"{count} numbers {names}" if count > 1 else f"{names} as a number"
        raise RegionError(f"region: expected {wanted}, got {short(values)}") from None


def _points(values: Any, what: str) -> NDArray[np.float64]:
    """Points (N, 2) from [[x, y], ...] or [x, y, x, y, ...], in an array of their own."""
    array = _array(values) if _is_list(values) else np.empty(0)
    if array.ndim == 1 and array.size % 2 == 0:
        array = array.reshape(-1, 2)
    if array.size == 0 or array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iuf":
        raise RegionError(f"region: expected a {what} as numbers [[x, y], ...] or [x, y, ...], got {short(values)}")
    return array.astype(float)


def _brightness(image: Image.Image) -> NDArray[Any]:
    """The channel (H, W) that holds the mask: alpha if it varies or is 0, else the brightest channel."""
    if "A" in image.mode.upper() or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.size == 0 or alpha.min() < alpha.max() or alpha.max() == 0:
            return alpha
    elif image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return np.asarray(image)
    return np.asarray(image.convert("RGB")).max(axis=2)  # type: ignore[no-any-return]


def _inside(values: NDArray[Any]) -> tuple[NDArray[np.bool_], str]:
    """Which pixels (H, W) of a mask are inside, and what to note."""
    if values.dtype == np.bool_ or values.size == 0:
        return values.astype(bool), ""
    numeric = values.dtype.kind in "uif" and bool(np.isfinite(values).all())
    low, high = (values.min(), values.max()) if numeric else (-1, -1)
    if low < 0 or high > 65535:
        got = f"{_number(low)} to {_number(high)}" if numeric else "other values"
        raise RegionError(f"region: expected a mask of bool, 0..65535 or floats 0..1, got {values.dtype} of {got}")
    if np.all((values == low) | (values == high)):
        return (values == high) & (high > 0), ""
    white = 1 if values.dtype.kind == "f" and high <= 1 else 255 if high <= 255 else 65535
    inside: NDArray[np.bool_] = values >= white / 2
    if not inside.any():
        raise RegionError(f"region: expected a mask that reaches half of {white}, got values up to {_number(high)}")
    return inside, f"the mask has more than two values; inside is from {math.ceil(white / 2) if white > 1 else 0.5} on"


def _number(value: float) -> str:
    return f"{value + 0.0:.10g}"  # never -0

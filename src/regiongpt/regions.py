"""Regions of an image, in every form people mark them: box, mask, polygon, RLE, point, scribble.

A :class:`Region` is immutable and holds what the person gave, in pixels of the original image: x to the right, y
down, (0, 0) the top left corner of the top left pixel. It learns the image's size only when it is asked something, and
is then clipped to that image. Everything asked of a region that is empty, malformed or wholly outside its image raises
a :class:`~regiongpt.errors.RegionError`; :meth:`Region.check` asks on purpose, and names the region in the message.

Paper: §3.1 (regions of any shape are given as masks and pooled).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco_mask

from regiongpt.coverage import (
    Bounds,
    BoxShape,
    PixelShape,
    PolygonShape,
    Shape,
    clipped,
    decode_counts,
    decode_runs,
    united,
)
from regiongpt.errors import RegionError
from regiongpt.images import MAX_PIXELS, SquareFrame

KINDS = ("box", "mask", "polygon", "rle", "point", "scribble")
STROKE = 0.015
"""Default radius of a point and width of a scribble, as a share of the longer side of the image."""
MIN_AREA = 1e-3
"""Square pixels below which a region counts as empty; a pixel is a thousand times as much."""
MAX_COORDINATE = 1e9
_CIRCLE = 32  # segments a quarter circle: the disk's area is 0.04 % short

Point = tuple[float, float]


class Region(ABC):
    """A part of an image. Make one with :meth:`box`, :meth:`mask`, :meth:`polygon`, :meth:`rle`, :meth:`point`,
    :meth:`scribble` or :meth:`from_dict`.

    Regions compare equal when they are of one kind and hold the same numbers or pixels.
    """  # noqa: D205

    kind: str
    """One of :data:`KINDS`."""

    @staticmethod
    def box(x0: float, y0: float, x1: float, y1: float) -> "Region":
        """The box from its left and top edge to its right and bottom edge, in pixels, half open, fractions allowed.

        Raises:
            RegionError: a coordinate is not a number.
        """
        return _Box(*_numbers((x0, y0, x1, y1), "box", 4))

    @staticmethod
    def mask(mask: ArrayLike) -> "Region":
        """The set pixels of a mask.

        Args:
            mask: shape (H, W) of the whole original image; dtype bool, or integers that are all 0 or 1, or 0 or 255.

        Raises:
            RegionError: it is of another shape, or holds other values.
        """
        array = np.asarray(mask)
        if array.ndim != 2:
            raise RegionError(
                f"region: expected a mask of shape (H, W), got {array.shape}; pass one mask a region, without channels"
            )
        if array.dtype != np.bool_:
            values = [] if array.size == 0 or array.dtype.kind not in "iu" else [int(array.min()), int(array.max())]
            if (
                not values
                or values[0] < 0
                or values[1] not in (0, 1, 255)
                or np.any((array != 0) & (array != values[1]))
            ):
                raise RegionError(
                    f"region: expected a mask of dtype bool, or of integers 0 and 1 or 0 and 255, got {array.dtype} "
                    f"with other values; pass a comparison such as mask > 0"
                )
            array = array != 0
        return _Mask(array.shape[0], array.shape[1], PixelShape.of(array))

    @staticmethod
    def polygon(points: Sequence[Any] | NDArray[Any]) -> "Region":
        """The inside of one or several rings; several are united. Where a ring crosses itself, even-odd counts.

        Args:
            points: [[x, y], ...], or flat [x, y, x, y, ...] as COCO writes it, or a list of several such rings; in
                pixels. A ring closes itself.

        Raises:
            RegionError: there is no ring, or one that is not made of pairs of numbers.
        """
        points = points.tolist() if isinstance(points, np.ndarray) else list(points)
        nested = bool(points) and all(isinstance(item, Sequence | np.ndarray) for item in points)
        several = nested and not all(len(item) == 2 and np.ndim(item) == 1 for item in points)
        rings = tuple(_points(ring, "polygon") for ring in (points if several else [points]))
        return _Polygon(rings)

    @staticmethod
    def rle(rle: Mapping[str, Any]) -> "Region":
        """A mask in COCO's run-length encoding.

        Args:
            rle: ``size`` [H, W] of the original image, and ``counts``: compressed (str or bytes) or a list of runs.
                Runs that do not decode are found by :meth:`check`.

        Raises:
            RegionError: one of the two is missing or of another type.
        """
        expected = 'expected RLE like {"size": [H, W], "counts": "..."}'
        if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
            got = f"keys {sorted(map(str, rle))}" if isinstance(rle, Mapping) else type(rle).__name__
            raise RegionError(f"region: {expected}, got {got}; write it as pycocotools does")
        size, counts = rle["size"], rle["counts"]
        if not isinstance(counts, str | bytes):
            if not isinstance(counts, Sequence | np.ndarray):
                raise RegionError(f"region: {expected} or a list of runs, got counts of type {type(counts).__name__}")
            counts = tuple(counts)
        whole = isinstance(size, Sequence | np.ndarray) and len(size) == 2 and all(_is_whole(side) for side in size)
        if not whole or min(size) < 1 or int(size[0]) * int(size[1]) > MAX_PIXELS:
            raise RegionError(
                f"region: {expected} with two sides of at least 1 and at most {MAX_PIXELS:,} pixels in all, "
                f"got size {_short(size)}"
            )
        return _Rle(int(size[0]), int(size[1]), counts.decode("latin-1") if isinstance(counts, bytes) else counts)

    @staticmethod
    def point(x: float, y: float, radius: float | None = None) -> "Region":
        """A disk about a point.

        Args:
            x: of the centre, in pixels.
            y: of the centre, in pixels.
            radius: in pixels; None is 1.5 % of the longer side of the image, and at least one pixel.

        Raises:
            RegionError: one of them is not a number.
        """
        x, y = _numbers((x, y), "point", 2)
        return _Point(x, y, None if radius is None else _numbers((radius,), "radius", 1)[0])

    @staticmethod
    def scribble(points: Sequence[Any] | NDArray[Any], width: float | None = None) -> "Region":
        """A stroke of a round brush along a line; a single point gives a dot.

        Args:
            points: [[x, y], ...] or flat [x, y, x, y, ...], in pixels.
            width: of the brush in pixels; None is 1.5 % of the longer side of the image, and at least one pixel.

        Raises:
            RegionError: there is no point, or one that is not a pair of numbers.
        """
        line = tuple((x, y) for x, y in _points(points, "scribble").tolist())
        return _Scribble(line, None if width is None else _numbers((width,), "width", 1)[0])

    @staticmethod
    def from_dict(data: Mapping[str, Any], name: str = "region") -> "Region":
        """The inverse of :meth:`to_dict`.

        Args:
            data: one of ``{"box": [x0, y0, x1, y1]}``, ``{"mask": rle}``, ``{"polygon": rings}``, ``{"rle": rle}``,
                ``{"point": [x, y], "radius": r}``, ``{"scribble": points, "width": w}``; radius and width may be
                missing or null.
            name: what messages call the region.

        Raises:
            RegionError: it is none of these.
        """
        kinds = [kind for kind in KINDS if isinstance(data, Mapping) and kind in data]
        extra = {"point": {"radius"}, "scribble": {"width"}}.get(kinds[0], set()) if kinds else set()
        if len(kinds) != 1 or set(data) - {kinds[0]} - extra:
            got = f"keys {_short(list(data))}" if isinstance(data, Mapping) else _short(data)
            raise RegionError(f"{name}: expected an object with one of the keys {', '.join(KINDS)}, got {got}")
        kind = kinds[0]
        value = data[kind]
        try:
            if kind == "box":
                return _Box(*_numbers(value, "box", 4))
            if kind == "point":
                x, y = _numbers(value, "point", 2)
                return Region.point(x, y, data.get("radius"))
            if kind == "scribble":
                return Region.scribble(value, data.get("width"))
            if kind == "polygon":
                return Region.polygon(value)
            coded = Region.rle(value)
            assert isinstance(coded, _Rle)
            return coded if kind == "rle" else _Mask(coded.height, coded.width, coded.decoded("region"))
        except RegionError as error:
            raise RegionError(str(error).replace("region:", f"{name}:", 1)) from None
        except TypeError:
            raise RegionError(f"{name}: expected a {kind} as a list of numbers, got {_short(value)}") from None

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The region as an object that json can write; the keys are those of :meth:`from_dict`."""

    @abstractmethod
    def flip(self, width: int) -> "Region":
        """The region of the image mirrored left to right.

        Args:
            width: of the image, in pixels.
        """

    @abstractmethod
    def _move(self, x0: int, y0: int, x1: int, y1: int, width: int, height: int) -> "Region":
        """The region in the frame of a crop that it is known to reach into."""

    @abstractmethod
    def _shape(self, width: int, height: int, name: str) -> Shape:
        """The region clipped to the image, maybe with no area left; RegionError if it makes no sense anywhere."""

    def crop(self, x0: int, y0: int, x1: int, y1: int, width: int, height: int) -> "Region | None":
        """What is left of the region in a crop of the image, in pixels of the crop.

        Args:
            x0: left edge of the crop, in whole pixels within the image; ``y0``, ``x1``, ``y1`` likewise.
            y0: top edge.
            x1: right edge, exclusive.
            y1: bottom edge, exclusive.
            width: of the image, in pixels.
            height: of the image, in pixels.

        Returns:
            The region, or None if less than :data:`MIN_AREA` of it lies in the crop.

        Raises:
            RegionError: as :meth:`check`.
            ValueError: the crop is empty or reaches beyond the image.
        """
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"crop {(x0, y0, x1, y1)} is empty or not within the image of {width} x {height} pixels")
        shape = self._resolve(width, height, "region")
        left = shape.coverage(np.array([y0, y1], float), np.array([x0, x1], float))[0, 0]
        return self._move(x0, y0, x1, y1, width, height) if left >= MIN_AREA else None

    def check(self, width: int, height: int, name: str = "region") -> "Region":
        """Make sure that the region makes sense in an image.

        Args:
            width: of the image, in pixels.
            height: of the image, in pixels.
            name: what messages call the region, such as ``<region1>``.

        Returns:
            The region itself; one partly outside is fine, and counts as far as it is inside.

        Raises:
            RegionError: it is empty, inverted, not finite, malformed, wholly outside, or of another size.
        """
        self._resolve(width, height, name)
        return self

    def area(self, width: int, height: int) -> float:
        """Exact area inside the image of ``width`` x ``height`` pixels, in square pixels."""
        return self._resolve(width, height, "region").area

    def bounds(self, width: int, height: int) -> Bounds:
        """The smallest box x0, y0, x1, y1 around the part inside the image of ``width`` x ``height`` pixels."""
        return self._resolve(width, height, "region").bounds

    def coverage(self, y_edges: ArrayLike, x_edges: ArrayLike, width: int, height: int) -> NDArray[np.float32]:
        """Exact area of the region, clipped to the image, inside each cell of a grid.

        Args:
            y_edges: (H + 1,) ascending lines between the rows of the grid, in pixels of the image.
            x_edges: (W + 1,) ascending lines between its columns.
            width: of the image, in pixels.
            height: of the image, in pixels.

        Returns:
            (H, W) float32 in square pixels. It sums to :meth:`area` if the grid covers the image.
        """
        shape = self._resolve(width, height, "region")
        return shape.coverage(np.asarray(y_edges, float), np.asarray(x_edges, float)).astype(np.float32)

    def pool_weights(self, frame: SquareFrame, grid_h: int, grid_w: int) -> NDArray[np.float32]:
        """How much each cell of a feature grid over the padded image counts for the region.

        Paper: §3.1 (mask pooling).

        Args:
            frame: the square that the image is padded to, and the grid spans.
            grid_h: rows of the grid.
            grid_w: columns of the grid.

        Returns:
            (grid_h, grid_w) float32, summing to 1; a region thinner than a cell still has its full weight.
        """
        shape = self._resolve(frame.width, frame.height, "region")
        areas = shape.coverage(*frame.edges(grid_h, grid_w))
        weights: NDArray[np.float32] = (areas / areas.sum()).astype(np.float32)
        return weights

    def to_mask(self, width: int, height: int) -> NDArray[np.bool_]:
        """Pixels whose centre is in the region, (height, width); if there is none, the pixel it covers most."""
        shape = self._resolve(width, height, "region")
        mask = shape.pixels(width, height)
        if not mask.any():
            x0, y0, x1, y1 = shape.bounds
            rows = np.arange(math.floor(y0), math.ceil(y1) + 1, dtype=float)
            columns = np.arange(math.floor(x0), math.ceil(x1) + 1, dtype=float)
            areas = shape.coverage(rows, columns)
            row, column = np.unravel_index(int(areas.argmax()), areas.shape)
            mask[int(rows[row]), int(columns[column])] = True
        return mask

    def to_coco(self, width: int, height: int) -> dict[str, Any]:
        """``bbox``, ``area`` and ``segmentation`` of a COCO annotation; what is no box or polygon becomes RLE."""
        x0, y0, x1, y1 = map(float, self.bounds(width, height))
        segmentation: Any = []
        if self.kind == "polygon":
            segmentation = [[number for point in ring for number in point] for ring in self.to_dict()["polygon"]]
        elif self.kind != "box":
            coded = coco_mask.encode(np.asfortranarray(self.to_mask(width, height), dtype=np.uint8))
            segmentation = {"size": [height, width], "counts": coded["counts"].decode("ascii")}
        return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": self.area(width, height), "segmentation": segmentation}

    def geometry(self, width: int, height: int) -> Any:
        """The region clipped to the image as a shapely Polygon or MultiPolygon; None for masks and RLE."""
        shape = self._resolve(width, height, "region")
        if isinstance(shape, BoxShape):
            return shapely.box(*shape.bounds)
        return shape.geometry if isinstance(shape, PolygonShape) else None

    def _resolve(self, width: int, height: int, name: str) -> Shape:
        shape = self._shape(width, height, name)
        if not shape.area >= MIN_AREA:
            raise RegionError(
                f"{name}: {self} covers nothing of the image of {width} x {height} pixels (W x H); "
                f"expected it at least partly within x 0..{width}, y 0..{height}"
            )
        return shape


@dataclass(frozen=True)
class _Box(Region):
    x0: float
    y0: float
    x1: float
    y1: float
    kind = "box"

    def __str__(self) -> str:
        return f"box ({', '.join(map(_number, (self.x0, self.y0, self.x1, self.y1)))})"

    def to_dict(self) -> dict[str, Any]:
        return {"box": [self.x0, self.y0, self.x1, self.y1]}

    def flip(self, width: int) -> Region:
        return _Box(width - self.x1, self.y0, width - self.x0, self.y1)

    def _move(self, x0: int, y0: int, x1: int, y1: int, width: int, height: int) -> Region:
        return _Box(max(self.x0, x0) - x0, max(self.y0, y0) - y0, min(self.x1, x1) - x0, min(self.y1, y1) - y0)

    def _shape(self, width: int, height: int, name: str) -> Shape:
        if not all(map(math.isfinite, (self.x0, self.y0, self.x1, self.y1))):
            raise RegionError(f"{name}: expected finite pixels x0,y0,x1,y1, got {self}; give numbers")
        if self.x0 > self.x1 or self.y0 > self.y1:
            raise RegionError(
                f"{name}: expected x0 < x1 and y0 < y1, got {self}, which is inverted; "
                "give left, top, right, bottom (not width and height)"
            )
        if self.x0 == self.x1 or self.y0 == self.y1:
            raise RegionError(f"{name}: expected x0 < x1 and y0 < y1, got {self}, which is empty; give it an area")
        return BoxShape(max(self.x0, 0.0), max(self.y0, 0.0), min(self.x1, float(width)), min(self.y1, float(height)))


@dataclass(frozen=True, eq=False)
class _Pixels(Region):
    """What a mask and an RLE share: the size of the image they were drawn on, and set pixels."""

    height: int
    width: int

    @abstractmethod
    def decoded(self, name: str) -> PixelShape:
        """The set pixels."""

    def __str__(self) -> str:
        return f"{self.kind} of {self.width} x {self.height} pixels"

    def __repr__(self) -> str:
        return f"<{self}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Pixels) or (self.kind, self._size) != (other.kind, other._size):
            return False
        mine, others = self.decoded("region"), other.decoded("region")
        return mine.bounds == others.bounds and np.array_equal(mine.window, others.window)

    def __hash__(self) -> int:
        return hash((self.kind, self._size))

    @property
    def _size(self) -> tuple[int, int]:
        return self.height, self.width

    def to_dict(self) -> dict[str, Any]:
        pixels = self.decoded("region").pixels(self.width, self.height)
        coded = coco_mask.encode(np.asfortranarray(pixels, dtype=np.uint8))
        return {self.kind: {"size": [self.height, self.width], "counts": coded["counts"].decode("ascii")}}

    def flip(self, width: int) -> Region:
        self._expect(width, self.height, "region")
        pixels = self.decoded("region")
        window = pixels.window[:, ::-1].copy()
        return self._with(self.height, width, PixelShape(window, pixels.top, width - int(pixels.bounds[2])))

    def _move(self, x0: int, y0: int, x1: int, y1: int, width: int, height: int) -> Region:
        pixels = self.decoded("region")
        rows = slice(max(y0 - pixels.top, 0), max(y1 - pixels.top, 0))
        columns = slice(max(x0 - pixels.left, 0), max(x1 - pixels.left, 0))
        part = PixelShape.of(pixels.window[rows, columns])
        top = pixels.top + rows.start + part.top - y0
        left = pixels.left + columns.start + part.left - x0
        return self._with(y1 - y0, x1 - x0, PixelShape(part.window, top, left))

    def _with(self, height: int, width: int, pixels: PixelShape) -> Region:
        return _Mask(height, width, pixels)

    def _shape(self, width: int, height: int, name: str) -> Shape:
        self._expect(width, height, name)
        pixels = self.decoded(name)
        if pixels.area == 0:
            raise RegionError(f"{name}: expected a {self.kind} with at least one set pixel, got an empty {self}")
        return pixels

    def _expect(self, width: int, height: int, name: str) -> None:
        if self._size != (height, width):
            raise RegionError(
                f"{name}: expected a {self.kind} of the image's size, {width} x {height} pixels (W x H), "
                f"got {self.width} x {self.height}; draw it on this image, or resize it without smoothing"
            )


@dataclass(frozen=True, eq=False, repr=False)
class _Mask(_Pixels):
    shape: PixelShape
    kind = "mask"

    def decoded(self, name: str) -> PixelShape:
        return self.shape


@dataclass(frozen=True, eq=False, repr=False)
class _Rle(_Pixels):
    counts: str | tuple[int, ...]
    kind = "rle"

    def decoded(self, name: str) -> PixelShape:
        counts = self.counts if isinstance(self.counts, str) else list(self.counts)
        try:
            runs = decode_counts(counts, self.height * self.width)
        except ValueError as error:
            raise RegionError(
                f"{name}: expected COCO RLE of {self.width} x {self.height} pixels (W x H), but {error}; "
                "encode the mask again"
            ) from error
        return PixelShape.of(decode_runs(runs, self.height, self.width))

    def _with(self, height: int, width: int, pixels: PixelShape) -> Region:
        return Region.from_dict({"rle": _Mask(height, width, pixels).to_dict()["mask"]})


@dataclass(frozen=True)
class _Vector(Region):
    """What polygons, points and scribbles share: shapely draws them."""

    @abstractmethod
    def _drawn(self, width: int, height: int, name: str) -> Any:
        """The whole region as shapely geometry, not clipped."""

    def _shape(self, width: int, height: int, name: str) -> Shape:
        return clipped(self._drawn(width, height, name), width, height)

    def _expect_finite(self, values: Sequence[float], name: str) -> None:
        wrong = [value for value in values if not abs(value) <= MAX_COORDINATE]
        if wrong:
            raise RegionError(
                f"{name}: expected finite coordinates in pixels, got {_number(wrong[0])} in {self}; "
                "give pixels of the original image"
            )


@dataclass(frozen=True, eq=False)
class _Polygon(_Vector):
    rings: tuple[NDArray[np.float64], ...]  # of (N, 2) each: data sets hold millions, too many for pairs of Python's
    kind = "polygon"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Polygon):
            return NotImplemented
        return len(self.rings) == len(other.rings) and all(map(np.array_equal, self.rings, other.rings))

    def __hash__(self) -> int:
        return hash(tuple(tuple(ring.ravel().tolist()) for ring in self.rings))

    def __str__(self) -> str:
        points = sum(map(len, self.rings))
        return f"polygon of {points} points" + (f" in {len(self.rings)} rings" if len(self.rings) > 1 else "")

    def to_dict(self) -> dict[str, Any]:
        return {"polygon": [ring.tolist() for ring in self.rings]}

    def flip(self, width: int) -> Region:
        return _Polygon(tuple(np.column_stack((width - ring[:, 0], ring[:, 1])) for ring in self.rings))

    def _move(self, x0: int, y0: int, x1: int, y1: int, width: int, height: int) -> Region:
        return _Polygon(tuple(ring - (x0, y0) for ring in self.rings))

    def _drawn(self, width: int, height: int, name: str) -> Any:
        self._expect_finite(np.concatenate(self.rings).ravel().tolist(), name)
        for index, ring in enumerate(self.rings, 1):
            if len(ring) < 3:
                where = f" in ring {index}" if len(self.rings) > 1 else ""
                raise RegionError(
                    f"{name}: expected a polygon of at least 3 points, got {len(ring)}{where}; "
                    "use a box for two corners, or a scribble for a line"
                )
        drawn = united(self.rings)
        if drawn.area < MIN_AREA:
            raise RegionError(
                f"{name}: expected a polygon that encloses an area, got {self} that lie on one line; "
                "use a scribble for a line"
            )
        return drawn


@dataclass(frozen=True)
class _Point(_Vector):
    x: float
    y: float
    radius: float | None
    kind = "point"

    def __str__(self) -> str:
        size = "" if self.radius is None else f" of radius {_number(self.radius)}"
        return f"point ({_number(self.x)}, {_number(self.y)}){size}"

    def to_dict(self) -> dict[str, Any]:
        return {"point": [self.x, self.y], "radius": self.radius}

    def flip(self, width: int) -> Region:
        return _Point(width - self.x, self.y, self.radius)

    def _move(self, x0: int, y0: int, x1: int, y1: int, width: int, height: int) -> Region:
        return _Point(self.x - x0, self.y - y0, _stroke(self.radius, width, height))

    def _drawn(self, width: int, height: int, name: str) -> Any:
        self._expect_finite([self.x, self.y, self.radius or 0.0], name)
        if self.radius is not None and self.radius <= 0:
            raise RegionError(f"{name}: expected a radius above 0 pixels, got {_number(self.radius)}; leave it out")
        return shapely.buffer(shapely.Point(self.x, self.y), _stroke(self.radius, width, height), quad_segs=_CIRCLE)


@dataclass(frozen=True)
class _Scribble(_Vector):
    points: tuple[Point, ...]
    width: float | None
    kind = "scribble"

    def __str__(self) -> str:
        return f"scribble of {len(self.points)} points"

    def to_dict(self) -> dict[str, Any]:
        return {"scribble": [list(point) for point in self.points], "width": self.width}

    def flip(self, width: int) -> Region:
        return _Scribble(tuple((width - x, y) for x, y in self.points), self.width)

    def _move(self, x0: int, y0: int, x1: int, y1: int, width: int, height: int) -> Region:
        return _Scribble(tuple((x - x0, y - y0) for x, y in self.points), _stroke(self.width, width, height))

    def _drawn(self, width: int, height: int, name: str) -> Any:
        self._expect_finite([value for point in self.points for value in point] + [self.width or 0.0], name)
        if self.width is not None and self.width <= 0:
            raise RegionError(f"{name}: expected a width above 0 pixels, got {_number(self.width)}; leave it out")
        moved = [self.points[0], *(b for a, b in zip(self.points, self.points[1:], strict=False) if a != b)]
        line = shapely.LineString(moved) if len(moved) > 1 else shapely.Point(*moved[0])
        return shapely.buffer(line, _stroke(self.width, width, height) / 2, quad_segs=_CIRCLE)


def _stroke(given: float | None, width: int, height: int) -> float:
    return max(1.0, STROKE * max(width, height)) if given is None else given


def _numbers(values: Any, what: str, count: int) -> tuple[float, ...]:
    """Exactly ``count`` numbers as floats."""
    try:
        if isinstance(values, str | bytes) or any(isinstance(value, str | bytes) for value in values):
            raise TypeError
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise RegionError(f"region: expected a {what} of {count} numbers, got {_short(values)}") from None
    if len(numbers) != count:
        raise RegionError(f"region: expected a {what} of {count} numbers, got {len(numbers)}: {_short(values)}")
    return numbers


def _points(values: Any, what: str) -> NDArray[np.float64]:
    """Points (N, 2) from [[x, y], ...] or [x, y, x, y, ...], in an array of their own."""
    expected = f"region: expected a {what} as [[x, y], ...] or [x, y, x, y, ...] in numbers"
    try:
        array = np.asarray(values)
    except ValueError:
        raise RegionError(f"{expected}, got lists of different lengths: {_short(values)}") from None
    if array.size == 0:
        raise RegionError(f"{expected}, got none; give its points")
    if array.dtype.kind not in "iuf":
        raise RegionError(f"{expected}, got {_short(values)}")
    if array.ndim == 1 and array.size % 2 == 0:
        array = array.reshape(-1, 2)
    elif array.ndim == 1:
        raise RegionError(f"{expected}, got {array.size} numbers; give an x and a y for every point")
    if array.ndim != 2 or array.shape[1] != 2:
        raise RegionError(f"{expected}, got an array of shape {array.shape}")
    return array.astype(float)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:.10g}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."

"""Exact areas: how many square pixels of a shape lie in each cell of a grid.

Three shapes cover every kind of region: an axis-aligned box, a set of pixels, and a set of polygons. Each is already
clipped to its image. All of them answer the same four questions, in float64 and without sampling, so that a shape
thinner than a cell, or smaller than a pixel, is neither lost nor blurred.

Coordinates are pixels of the original image, x to the right and y down; pixel (row, column) is the unit square from
(column, row) to (column + 1, row + 1). Grids are given by the ascending lines between their cells, ``y_edges``
(H + 1,) and ``x_edges`` (W + 1,), which need neither be evenly spaced nor lie within the image.

Paper: §3.1 (mask pooling); the weights of the pooling come from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import shapely
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Bounds = tuple[float, float, float, float]

_PRECISION = 2.0**-20
"""Pixels that polygons are rounded to: with a fixed grid of points, intersections of any polygons are sound."""


class Shape(Protocol):
    """A shape inside an image."""

    @property
    def area(self) -> float:
        """Square pixels."""

    @property
    def bounds(self) -> Bounds:
        """The smallest box around it, xyxy."""

    def coverage(self, y_edges: Floats, x_edges: Floats) -> Floats:
        """Square pixels in each cell, (H, W)."""

    def pixels(self, width: int, height: int) -> Bools:
        """Which pixels of the image have their centre in it, (height, width)."""


@dataclass(frozen=True)
class BoxShape:
    """An axis-aligned box, half open."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Square pixels."""
        return max(self.x1 - self.x0, 0.0) * max(self.y1 - self.y0, 0.0)

    @property
    def bounds(self) -> Bounds:
        """The box itself."""
        return self.x0, self.y0, self.x1, self.y1

    def coverage(self, y_edges: Floats, x_edges: Floats) -> Floats:
        """Overlap lengths down times overlap lengths across: a box is separable."""
        return np.outer(np.diff(np.clip(y_edges, self.y0, self.y1)), np.diff(np.clip(x_edges, self.x0, self.x1)))

    def pixels(self, width: int, height: int) -> Bools:
        """Pixels with x0 <= column + 0.5 < x1, and the same for rows."""
        rows = np.arange(height) + 0.5
        columns = np.arange(width) + 0.5
        return np.logical_and.outer((rows >= self.y0) & (rows < self.y1), (columns >= self.x0) & (columns < self.x1))


@dataclass(frozen=True, eq=False)
class PixelShape:
    """A set of pixels: a bool window and the place of its first row and column in the image."""

    window: Bools
    top: int
    left: int

    @staticmethod
    def of(mask: Bools) -> "PixelShape":
        """The set pixels of a mask (H, W), copied and cut to their bounding rows and columns."""
        rows = np.flatnonzero(mask.any(axis=1))
        if rows.size == 0:
            return PixelShape(np.zeros((0, 0), bool), 0, 0)
        band = mask[rows[0] : rows[-1] + 1]
        columns = np.flatnonzero(band.any(axis=0))
        window = np.array(band[:, columns[0] : columns[-1] + 1], dtype=bool, order="C")
        window.setflags(write=False)
        return PixelShape(window, int(rows[0]), int(columns[0]))

    @property
    def area(self) -> float:
        """Square pixels, a whole number."""
        return float(np.count_nonzero(self.window))

    @property
    def bounds(self) -> Bounds:
        """The smallest box of whole pixels around it, xyxy."""
        rows, columns = self.window.shape
        return float(self.left), float(self.top), float(self.left + columns), float(self.top + rows)

    def coverage(self, y_edges: Floats, x_edges: Floats) -> Floats:
        """Integrate down, then across; the second pass runs on one line a grid row, so the first is the cost."""
        bands = np.diff(_integral(self.window.view(np.uint8), y_edges - self.top), axis=0)
        return np.diff(_integral(np.ascontiguousarray(bands.T), x_edges - self.left), axis=0).T

    def pixels(self, width: int, height: int) -> Bools:
        """The mask itself."""
        mask = np.zeros((height, width), bool)
        rows, columns = self.window.shape
        mask[self.top : self.top + rows, self.left : self.left + columns] = self.window
        return mask


@dataclass(frozen=True, eq=False)
class PolygonShape:
    """A valid shapely Polygon or MultiPolygon, holes allowed."""

    geometry: Any

    @property
    def area(self) -> float:
        """Square pixels."""
        return float(self.geometry.area)

    @property
    def bounds(self) -> Bounds:
        """The smallest box around it, xyxy; NaN when it is empty."""
        x0, y0, x1, y1 = self.geometry.bounds
        return float(x0), float(y0), float(x1), float(y1)

    def coverage(self, y_edges: Floats, x_edges: Floats) -> Floats:
        """Sum, over the boundary, of the signed area to the right of each piece of it.

        A piece within one cell adds to that cell the area between itself and the cell's right line, and its whole
        height times a cell's width to every cell further right; what lies outside the polygon cancels. The boundary
        is cut where it crosses a line of the grid, so the work grows with its length in cells, not with their number.
        """
        start, end = self._segments()
        start, end = _cut(start, end, y_edges, x_edges)
        middle = (start + end) / 2
        rise = end[:, 1] - start[:, 1]
        rows, columns = len(y_edges) - 1, len(x_edges) - 1
        # Row and column 0 of these tables lie before the grid, the last ones behind it.
        row = np.searchsorted(y_edges, middle[:, 1], side="right")
        column = np.searchsorted(x_edges, middle[:, 0], side="right")
        cell = row * (columns + 2) + column
        table = (rows + 2, columns + 2)
        right = np.append(x_edges, x_edges[-1])[column]
        heights = np.bincount(cell, rise, minlength=table[0] * table[1]).reshape(table)
        partial = np.bincount(cell, rise * (right - middle[:, 0]), minlength=table[0] * table[1]).reshape(table)
        passed = np.cumsum(heights, axis=1)[1:-1, :columns]
        areas: Floats = partial[1:-1, 1:-1] + passed * np.diff(x_edges)
        return np.maximum(areas, 0.0)  # rounding leaves -1e-13 in cells outside

    def pixels(self, width: int, height: int) -> Bools:
        """Pixels whose centre is inside: the winding number along each line of centres."""
        start, end = self._segments()
        turn = np.where(end[:, 1] > start[:, 1], 1, -1)
        first = _first_centre(np.minimum(start[:, 1], end[:, 1]), height)
        last = _first_centre(np.maximum(start[:, 1], end[:, 1]), height)
        segment, row = _ranges(first, last)
        slope = (end - start)[segment]
        x = start[segment, 0] + (row + 0.5 - start[segment, 1]) * slope[:, 0] / slope[:, 1]
        winding = np.zeros((height, width + 1), np.int8)
        np.add.at(winding, (row, _first_centre(x, width)), turn[segment].astype(np.int8))
        inside: Bools = np.cumsum(winding, axis=1, dtype=np.int8)[:, :width] != 0
        return inside

    def _segments(self) -> tuple[Floats, Floats]:
        """Both ends, (N, 2) xy, of every straight piece of the boundary, with the inside always on the same hand."""
        # Normal form turns outer rings one way and holes the other.
        rings = shapely.get_rings(shapely.get_parts(shapely.normalize(self.geometry)))
        points, ring = shapely.get_coordinates(rings, return_index=True)
        joined = ring[1:] == ring[:-1]
        start, end = points[:-1][joined], points[1:][joined]
        (ax, ay), (bx, by) = (start - points[:1]).T, (end - points[:1]).T
        # The area to the right of every piece, which must sum to more than nothing, falls with its x.
        return (start, end) if np.sum((ax + bx) * (by - ay)) < 0 else (end, start)


def united(rings: Sequence[Floats]) -> Any:
    """The union of the insides of rings, each (N, 2) xy, N >= 3, that may cross themselves: even-odd counts."""
    # Coordinates a hair apart, and only those, break the intersections that make_valid works out.
    rounded = [np.round(np.append(ring, ring[:1], axis=0) / _PRECISION) * _PRECISION for ring in rings]
    return _polygons_only(shapely.make_valid(shapely.polygons([shapely.linearrings(ring) for ring in rounded])))


def clipped(geometry: Any, width: int, height: int) -> PolygonShape:
    """The part of a Polygon or MultiPolygon that lies in the image."""
    frame = shapely.box(0, 0, width, height)
    return PolygonShape(_polygons_only(shapely.intersection(geometry, frame, grid_size=_PRECISION)))


def _polygons_only(geometry: Any) -> Any:
    """What has an area in shapely geometries, as one valid Polygon or MultiPolygon (maybe empty)."""
    parts = shapely.get_parts(shapely.get_parts(geometry))  # twice: collections hold multi-polygons
    parts = parts[shapely.get_type_id(parts) == 3]
    return parts[0] if len(parts) == 1 else shapely.union_all(parts, grid_size=_PRECISION)


def _integral(values: NDArray[Any], edges: Floats) -> Floats:
    """The integral over rows from 0 to each edge, (E, W), of values (H, W) that are constant within a row."""
    rows = len(values)
    if rows == 0:
        return np.zeros((len(edges), values.shape[1]))
    edges = np.clip(edges, 0.0, rows)
    row = np.minimum(edges.astype(np.int64), rows - 1)
    starts = np.unique(np.append(row, 0))
    dtype = np.float64 if values.dtype.kind == "f" else np.int32
    # Band by band: add.reduceat does the same in one call, at a tenth of the speed along this axis.
    bands = zip(starts, [*starts[1:], rows], strict=True)
    sums = np.stack([np.add.reduce(values[a:b], axis=0, dtype=dtype) for a, b in bands])
    before = np.cumsum(np.vstack([np.zeros_like(sums[:1]), sums[:-1]]), axis=0)[np.searchsorted(starts, row)]
    integral: Floats = before + (edges - row)[:, None] * values[row]
    return integral


def _ranges(first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs (i, k) with first[i] <= k < last[i], in order."""
    counts = np.maximum(last - first, 0)
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts - first)[owner]


def _first_centre(position: Floats, size: int) -> NDArray[np.int64]:
    """Index of the first pixel whose centre is at or after the position, within 0..size."""
    return np.clip(np.ceil(position - 0.5), 0, size).astype(np.int64)


def _cut(start: Floats, end: Floats, y_edges: Floats, x_edges: Floats) -> tuple[Floats, Floats]:
    """Cut segments wherever they cross a line of the grid, so that each piece lies within one cell."""
    owners = [np.arange(len(start)), np.arange(len(start))]
    shares = [np.zeros(len(start)), np.ones(len(start))]
    for axis, lines in ((0, x_edges), (1, y_edges)):
        a, b = start[:, axis], end[:, axis]
        first = np.searchsorted(lines, np.minimum(a, b), side="right")
        last = np.searchsorted(lines, np.maximum(a, b), side="left")
        owner, line = _ranges(first, last)
        owners.append(owner)
        shares.append((lines[line] - a[owner]) / (b - a)[owner])
    owner, share = np.concatenate(owners), np.concatenate(shares)
    order = np.lexsort((share, owner))
    owner, share = owner[order], share[order, None]
    points = start[owner] * (1 - share) + end[owner] * share
    joined = owner[1:] == owner[:-1]
    return points[:-1][joined], points[1:][joined]


def decode_counts(counts: str | bytes | list[int], cells: int) -> NDArray[np.int64]:
    """Run lengths of a COCO run-length encoding, compressed (str, bytes) or not (list).

    Compressed, each number is a string of characters with five bits each, least first, and a sixth that says whether
    more follow; from the fourth on, numbers are differences to the one two places before.

    Args:
        counts: the encoding.
        cells: how many pixels the runs must add up to.

    Raises:
        ValueError: they do not, or this is no such encoding; the message is a clause that says why.
    """
    if isinstance(counts, list):
        if not all(isinstance(count, int | np.integer) for count in counts):
            raise ValueError("its counts are not whole numbers")
        if any(count < 0 or count > cells for count in counts):
            raise ValueError(f"a run is not within 0..{cells}")
        runs = np.array(counts, np.int64)
    else:
        data = counts.encode("utf-8") if isinstance(counts, str) else counts
        codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
        if np.any((codes < 0) | (codes > 63)):
            raise ValueError("its counts hold characters outside '0'..'o'")
        last = np.flatnonzero(codes < 32)
        if codes.size == 0 or codes[-1] >= 32:
            raise ValueError("its counts are cut short")
        lengths = np.diff(last, prepend=-1)
        if lengths.max() > 7:
            raise ValueError("its counts hold an impossibly long run")
        place = np.arange(codes.size) - np.repeat(last - lengths + 1, lengths)
        runs = np.add.reduceat((codes & 31) << 5 * place, last - lengths + 1)
        runs -= np.where(codes[last] & 16, 1, 0) << 5 * lengths  # the top bit of the last five is the sign
        runs[1::2] = np.cumsum(runs[1::2])
        runs[2::2] = np.cumsum(runs[2::2])
        if runs.min() < 0:
            raise ValueError("its counts hold a negative run")
    if runs.sum() != cells:
        raise ValueError(f"its runs add up to {runs.sum()} pixels, not {cells}")
    return runs


def decode_runs(runs: NDArray[np.int64], height: int, width: int) -> Bools:
    """The mask (height, width) of runs that go down the columns, beginning with unset pixels."""
    values = np.zeros(len(runs), bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width, height).T

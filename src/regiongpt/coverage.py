"""Areas: how many square pixels of a shape lie in each cell of a grid, in float64 and without sampling.

Pixel (row, column) is the unit square from (x, y) = (column, row). Grids are given by the ascending lines between
their cells, ``y_edges`` (H + 1,) and ``x_edges`` (W + 1,), evenly spaced or not, inside the image or not. Paper: §3.1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Bounds = tuple[float, float, float, float]

# Points of a stroke, and crossings of a ring and of a stroke with itself, beyond which drawing takes seconds.
MOST_POINTS, RING_CROSSINGS, STROKE_CROSSINGS = 10_000, 1_000, 10_000
_CIRCLE = 32  # segments a quarter circle: the disk's area is 0.04 % short
_PRECISION = 2.0**-20  # pixels that polygons are rounded to: on a fixed grid of points, intersections are sound


@dataclass(frozen=True)
class BoxShape:
    """An axis-aligned box, half open: x0, y0, x1, y1."""

    bounds: Bounds

    @property
    def area(self) -> float:
        """Square pixels."""
        x0, y0, x1, y1 = self.bounds
        return max(x1 - x0, 0.0) * max(y1 - y0, 0.0)

    def coverage(self, y_edges: Floats, x_edges: Floats) -> Floats:
        """Square pixels in each cell, (H, W)."""
        x0, y0, x1, y1 = self.bounds
        return np.outer(np.diff(np.clip(y_edges, y0, y1)), np.diff(np.clip(x_edges, x0, x1)))


@dataclass(frozen=True, eq=False)
class PixelShape:
    """A set of pixels: a bool window and the place of its first row and column."""

    window: Bools
    top: int
    left: int

    @staticmethod
    def of(mask: Bools) -> "PixelShape":
        """The set pixels of a mask (H, W), copied and cut to their bounding rows and columns."""
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        if rows.size == 0:
            return PixelShape(np.zeros((0, 0), bool), 0, 0)
        window = np.array(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], dtype=bool, order="C")
        window.setflags(write=False)
        return PixelShape(window, int(rows[0]), int(columns[0]))

    @property
    def area(self) -> float:
        """Square pixels."""
        return float(np.count_nonzero(self.window))

    @property
    def bounds(self) -> Bounds:
        """The smallest box around it, xyxy."""
        rows, columns = self.window.shape
        return float(self.left), float(self.top), float(self.left + columns), float(self.top + rows)

    def coverage(self, y_edges: Floats, x_edges: Floats) -> Floats:
        """Square pixels in each cell: integrated down, then across, on one line a grid row."""
        bands = np.diff(_integral(self.window.view(np.uint8), y_edges - self.top), axis=0)
        return np.diff(_integral(np.ascontiguousarray(bands.T), x_edges - self.left), axis=0).T


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
        """Square pixels in each cell, from the straight pieces of the boundary with the inside on their right."""
        # Normal form turns outer rings clockwise, where y goes up, and holes the other way.
        rings = shapely.get_rings(shapely.get_parts(shapely.normalize(self.geometry)))
        points, ring = shapely.get_coordinates(rings, return_index=True)
        joined = ring[1:] == ring[:-1]
        return _signed_areas(points[:-1][joined], points[1:][joined], y_edges, x_edges)


Shape = BoxShape | PixelShape | PolygonShape


def polygon_shape(rings: Sequence[Floats], width: int, height: int) -> PolygonShape:
    """The union of the insides of rings (N, 2) xy, clipped to the image; ValueError if one crosses itself too often."""
    # Coordinates a hair apart, and only those, break the intersections that make_valid works out.
    rings = [np.round(ring / _PRECISION) * _PRECISION for ring in rings]
    closed = [np.append(ring, ring[:1], axis=0) for ring in rings]
    polygons = shapely.polygons([shapely.linearrings(ring) for ring in closed])
    for k in np.flatnonzero(~shapely.is_valid(polygons)):
        _check_crossings(closed[k], RING_CROSSINGS)
    return _clipped(shapely.make_valid(polygons), width, height)


def stroke_shape(points: Floats, radius: float, width: int, height: int) -> PolygonShape:
    """Area covered by a round brush along a line (N, 2) xy, clipped to the image; ValueError if it is too tangled."""
    points = points[np.append(True, np.any(points[1:] != points[:-1], axis=1))]
    if len(points) > MOST_POINTS:
        raise ValueError(f"has more than {MOST_POINTS:,} points")
    if len(points) > 1:
        _check_crossings(points, STROKE_CROSSINGS)
    # Piece by piece: the time to draw a line that crosses itself grows with the third power of its points.
    pieces = [points[k : k + 33] for k in range(0, max(1, len(points) - 1), 32)]
    lines = [shapely.LineString(piece) if len(piece) > 1 else shapely.Point(*piece[0]) for piece in pieces]
    return _clipped(shapely.buffer(lines, radius, quad_segs=_CIRCLE), width, height)


def _clipped(geometries: Any, width: int, height: int) -> PolygonShape:
    """The union of what has an area, as far as it lies in the image."""
    frame = shapely.box(0, 0, width, height)
    return PolygonShape(_union(shapely.intersection(_union(geometries), frame, grid_size=_PRECISION)))


def _union(geometries: Any) -> Any:
    """The polygons among shapely geometries, as one valid Polygon or MultiPolygon (maybe empty)."""
    parts = shapely.get_parts(shapely.get_parts(geometries))  # twice: collections hold multi-polygons
    parts = parts[shapely.get_type_id(parts) == 3]
    return parts[0] if len(parts) == 1 else shapely.union_all(parts, grid_size=_PRECISION)


def _check_crossings(line: Floats, most: int) -> None:
    edges = shapely.linestrings(np.stack((line[:-1], line[1:]), axis=1))
    tree, found = shapely.STRtree(edges), 0
    for some in np.array_split(edges, len(edges) // 8 + 1):
        found += tree.query(some, predicate="crosses").shape[1]
        if found > 2 * most:  # each is found from both edges
            raise ValueError(f"crosses itself more than {most:,} times")


def _signed_areas(start: Floats, end: Floats, y_edges: Floats, x_edges: Floats) -> Floats:
    """Sum, over edges (N, 2) xy with the inside on their right, of the area to the right of each; (H, W).

    A piece adds to its own cell the area up to the cell's right line, and its height times the width to every cell
    further right; what lies outside the shape cancels.
    """
    rows, columns = len(y_edges) - 1, len(x_edges) - 1
    owner, points = _cut(start, end, y_edges, x_edges)
    joined = owner[1:] == owner[:-1]
    middle = ((points[:-1] + points[1:]) / 2)[joined]
    column = np.searchsorted(x_edges, middle[:, 0], side="right")
    cell = np.searchsorted(y_edges, middle[:, 1], side="right") * (columns + 2) + column
    rise = (points[1:, 1] - points[:-1, 1])[joined]
    # Row and column 0 of these tables lie before the grid, the last ones behind it.
    heights, partial = np.zeros((2, rows + 2, columns + 2))
    np.add.at(heights.ravel(), cell, rise)
    np.add.at(partial.ravel(), cell, rise * (np.append(x_edges, x_edges[-1])[column] - middle[:, 0]))
    passed = np.cumsum(heights, axis=1)[1:-1, :columns]
    areas: Floats = partial[1:-1, 1:-1] + passed * np.diff(x_edges)
    return np.maximum(areas, 0.0)  # rounding leaves -1e-13 in cells outside


def _cut(start: Floats, end: Floats, y_edges: Floats, x_edges: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The number of the edge and the point (N, 2) xy of every place where edges begin, end or cross the grid."""
    numbers = np.arange(len(start))
    owners, shares = [numbers, numbers], [np.zeros(len(start)), np.ones(len(start))]
    for axis, lines in ((0, x_edges), (1, y_edges)):
        a, b = start[:, axis], end[:, axis]
        first = np.searchsorted(lines, np.minimum(a, b), side="right")
        counts = np.maximum(np.searchsorted(lines, np.maximum(a, b), side="left") - first, 0)
        owner = np.repeat(numbers, counts)
        line = np.arange(len(owner)) - (np.cumsum(counts) - counts - first)[owner]
        owners.append(owner)
        shares.append((lines[line] - a[owner]) / (b - a)[owner])
    owner, share = np.concatenate(owners), np.concatenate(shares)
    order = np.argsort(2 * owner + share)
    owner, share = owner[order], share[order]
    return owner, start[owner] * (1 - share[:, None]) + end[owner] * share[:, None]


def _integral(values: NDArray[Any], edges: Floats) -> Floats:
    """The integral over rows from 0 to each edge, (E, W), of values (H, W) that are constant within a row."""
    rows = len(values)
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


def decode_rle(counts: str | Sequence[int], height: int, width: int) -> Bools:
    """The mask (height, width) of a COCO run-length encoding; ValueError where it is none, or not of that many pixels.

    Runs go down the columns and begin with unset pixels. Compressed, each is characters of five bits, least first, and
    a sixth that says whether more follow; from the fourth on, runs are differences to the one two places before.
    """
    cells = height * width
    if isinstance(counts, str):
        codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
        last = np.flatnonzero(codes < 32)
        lengths = np.diff(last, prepend=-1)
        if codes.size == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] >= 32 or lengths.max() > 7:
            raise ValueError("its counts are damaged or cut short")
        place = np.arange(codes.size) - np.repeat(last - lengths + 1, lengths)
        runs = np.add.reduceat((codes & 31) << 5 * place, last - lengths + 1)
        runs -= np.where(codes[last] & 16, 1, 0) << 5 * lengths  # the top bit of the last five is the sign
        runs[1::2] = np.cumsum(runs[1::2])
        runs[2::2] = np.cumsum(runs[2::2])
    else:
        runs = np.array(counts)
        if runs.dtype.kind not in "iuf" or np.any(runs % 1 != 0):
            raise ValueError("its counts are not whole numbers")
    if runs.size == 0 or runs.min() < 0 or runs.max() > cells or runs.sum() != cells:
        raise ValueError(f"its runs do not add up to {cells}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs.astype(np.int64)).reshape(width, height).T

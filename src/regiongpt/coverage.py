"""Areas: how many square pixels of a shape lie in each cell of a grid, in float64 and without sampling pixels.

A shape thinner than a cell or smaller than a pixel is neither lost nor blurred. Lines that cross themselves very often
are sampled, since shapely's time for them grows with the third power of their points.

Coordinates are pixels of the original image, x to the right and y down; pixel (row, column) is the unit square from
(column, row) to (column + 1, row + 1). Grids are given by the ascending lines between their cells, ``y_edges``
(H + 1,) and ``x_edges`` (W + 1,), which need neither be evenly spaced nor lie within the image. Paper: §3.1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Bounds = tuple[float, float, float, float]

MANY_CROSSINGS = 256
"""Crossings of a ring or stroke with itself up to which shapely draws it."""
MANY_POINTS, MOST_POINTS = 200, 10_000
"""Points up to which shapely draws a stroke that crosses itself often, and one that does not."""
SAMPLES = 3072
"""Samples along the longer side of the image where tangles are sampled."""
_CIRCLE = 32  # segments a quarter circle: the disk's area is 0.04 % short
_PRECISION = 2.0**-20
"""Pixels that polygons are rounded to: with a fixed grid of points, intersections of any polygons are sound."""


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
        """The smallest box around the shape, xyxy."""
        return self.x0, self.y0, self.x1, self.y1

    def coverage(self, y_edges: Floats, x_edges: Floats) -> Floats:
        """Square pixels in each cell, (H, W)."""
        return np.outer(np.diff(np.clip(y_edges, self.y0, self.y1)), np.diff(np.clip(x_edges, self.x0, self.x1)))

    def pixels(self, width: int, height: int) -> Bools:
        """Which pixels of the image have their centre in the shape, (height, width)."""
        rows = np.arange(height) + 0.5
        columns = np.arange(width) + 0.5
        return np.logical_and.outer((rows >= self.y0) & (rows < self.y1), (columns >= self.x0) & (columns < self.x1))


@dataclass(frozen=True, eq=False)
class PixelShape:
    """A set of pixels, or of smaller cells: a bool window and the place of its first row and column."""

    window: Bools
    top: int
    left: int
    step: tuple[float, float] = (1.0, 1.0)  # height and width of a cell, in pixels of the image

    @staticmethod
    def of(mask: Bools, step: tuple[float, float] = (1.0, 1.0)) -> "PixelShape":
        """The set pixels of a mask (H, W), copied and cut to their bounding rows and columns."""
        rows = np.flatnonzero(mask.any(axis=1))
        if rows.size == 0:
            return PixelShape(np.zeros((0, 0), bool), 0, 0)
        band = mask[rows[0] : rows[-1] + 1]
        columns = np.flatnonzero(band.any(axis=0))
        window = np.array(band[:, columns[0] : columns[-1] + 1], dtype=bool, order="C")
        window.setflags(write=False)
        return PixelShape(window, int(rows[0]), int(columns[0]), step)

    @property
    def area(self) -> float:
        """Square pixels."""
        return float(np.count_nonzero(self.window)) * self.step[0] * self.step[1]

    @property
    def bounds(self) -> Bounds:
        """The smallest box of whole cells around it, xyxy."""
        (rows, columns), (dy, dx) = self.window.shape, self.step
        return self.left * dx, self.top * dy, (self.left + columns) * dx, (self.top + rows) * dy

    def coverage(self, y_edges: Floats, x_edges: Floats) -> Floats:
        """Integrate down, then across; the second pass runs on one line a grid row, so the first is the cost."""
        bands = np.diff(_integral(self.window.view(np.uint8), y_edges / self.step[0] - self.top), axis=0)
        areas = np.diff(_integral(np.ascontiguousarray(bands.T), x_edges / self.step[1] - self.left), axis=0).T
        return areas * (self.step[0] * self.step[1])

    def pixels(self, width: int, height: int) -> Bools:
        """The mask itself; of smaller cells, pixels of which at least half is set."""
        if self.step != (1.0, 1.0):
            return self.coverage(np.arange(height + 1.0), np.arange(width + 1.0)) >= 0.5
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
        """Square pixels in each cell, (H, W)."""
        return _signed_areas(*self._segments(), y_edges, x_edges)

    def pixels(self, width: int, height: int) -> Bools:
        """Pixels whose centre is inside."""
        return np.asarray(_windings(*self._segments(), width, height) % 2 == 1)

    def _segments(self) -> tuple[Floats, Floats]:
        """Both ends, (N, 2) xy, of every straight piece of the boundary, with the inside always on the same side."""
        # Normal form turns outer rings one way and holes the other.
        rings = shapely.get_rings(shapely.get_parts(shapely.normalize(self.geometry)))
        points, ring = shapely.get_coordinates(rings, return_index=True)
        joined = ring[1:] == ring[:-1]
        start, end = points[:-1][joined], points[1:][joined]
        (ax, ay), (bx, by) = (start - points[:1]).T, (end - points[:1]).T
        # The area to the right of every piece, which must sum to more than nothing, falls with its x.
        return (start, end) if np.sum((ax + bx) * (by - ay)) < 0 else (end, start)


Shape = BoxShape | PixelShape | PolygonShape


def polygon_shape(rings: Sequence[Floats], width: int, height: int) -> Shape:
    """The union of the insides of rings, clipped to the image; where a ring crosses itself, even-odd counts.

    Args:
        rings: (N, 2) xy each, N >= 3.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
    """
    # Coordinates a hair apart, and only those, break the intersections that make_valid works out.
    rings = [np.round(ring / _PRECISION) * _PRECISION for ring in rings]
    polygons = shapely.polygons([shapely.linearrings(np.append(ring, ring[:1], axis=0)) for ring in rings])
    knotted = (rings[k] for k in np.flatnonzero(~shapely.is_valid(polygons)))
    if any(_is_tangled(np.append(ring, ring[:1], axis=0)) for ring in knotted):
        return _sampled([(ring, np.roll(ring, -1, axis=0)) for ring in rings], width, height, even_odd=True)
    return _clipped(_polygons_only(shapely.make_valid(polygons)), width, height)


def stroke_shape(points: Floats, radius: float, width: int, height: int) -> Shape:
    """Area covered by a round brush along a line, clipped to the image.

    Args:
        points: (N, 2) xy of the line, N >= 1.
        radius: Brush radius in pixels.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
    """
    points = points[np.append(True, np.any(points[1:] != points[:-1], axis=1))]
    if len(points) <= MANY_POINTS or (len(points) <= MOST_POINTS and not _is_tangled(points)):
        line = shapely.LineString(points) if len(points) > 1 else shapely.Point(*points[0])
        return _clipped(_polygons_only(shapely.buffer(line, radius, quad_segs=_CIRCLE)), width, height)
    radius = max(radius, 0.75 * max(width, height) / SAMPLES)  # lest it fall between samples
    along = np.diff(points, axis=0)
    side = along[:, ::-1] * (1, -1) * (radius / np.hypot(*along.T))[:, None]
    sides = np.stack((points[:-1] + side, points[:-1] - side, points[1:] - side, points[1:] + side), axis=1)
    turn = np.linspace(0, -2 * np.pi, 33)[:-1]
    disks = points[:, None] + radius * np.column_stack((np.cos(turn), np.sin(turn)))
    edges = [(ring.reshape(-1, 2), np.roll(ring, -1, axis=1).reshape(-1, 2)) for ring in (sides, disks)]
    start, end = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    return _sampled([(start, end)], width, height, even_odd=False)


def _sampled(outlines: Sequence[tuple[Floats, Floats]], width: int, height: int, even_odd: bool) -> PixelShape:
    """The area that outlines, given by both ends of their edges, surround an odd number of times, or at all."""
    rows, columns = (max(1, round(SAMPLES * size / max(width, height))) for size in (height, width))
    step = np.array((width / columns, height / rows))
    inside = np.zeros((rows, columns), bool)
    for start, end in outlines:
        windings = _windings(start / step, end / step, columns, rows)
        inside |= windings % 2 == 1 if even_odd else windings != 0
    return PixelShape.of(inside, (height / rows, width / columns))


def _clipped(geometry: Any, width: int, height: int) -> PolygonShape:
    """The part of a Polygon or MultiPolygon that lies in the image."""
    frame = shapely.box(0, 0, width, height)
    return PolygonShape(_polygons_only(shapely.intersection(geometry, frame, grid_size=_PRECISION)))


def _polygons_only(geometry: Any) -> Any:
    """The parts of shapely geometries that have an area, as one valid Polygon or MultiPolygon (maybe empty)."""
    parts = shapely.get_parts(shapely.get_parts(geometry))  # twice: collections hold multi-polygons
    parts = parts[shapely.get_type_id(parts) == 3]
    return parts[0] if len(parts) == 1 else shapely.union_all(parts, grid_size=_PRECISION)


def _is_tangled(line: Floats) -> bool:
    """Whether a line crosses itself too often for shapely."""
    edges = shapely.linestrings(np.stack((line[:-1], line[1:]), axis=1))
    tree, found = shapely.STRtree(edges), 0
    for some in np.array_split(edges, len(edges) // 8 + 1):
        found += tree.query(some, predicate="crosses").shape[1]
        if found > 2 * MANY_CROSSINGS:  # each is found from both edges
            return True
    return False


def _windings(start: Floats, end: Floats, width: int, height: int) -> NDArray[np.int16]:
    """How often outlines wind around the centre of each pixel, (height, width)."""
    left, right = _first_centre(np.array([start[:, 0].min(), start[:, 0].max()]), width)
    low, high = (_first_centre(ends, height) for ends in np.sort((start[:, 1], end[:, 1]), axis=0))
    passed = np.zeros((high.max() - low.min(), right - left + 1), np.int16)
    down = np.where(end[:, 1] > start[:, 1], 1, -1).astype(np.int16)
    for begin in range(0, len(start), 1024):
        some = slice(begin, begin + 1024)
        edge, row = _ranges(low[some], high[some])
        (x, y), (dx, dy) = start[some][edge].T, (end - start)[some][edge].T
        column = np.clip(_first_centre(x + (row + 0.5 - y) * dx / dy, width), left, right) - left
        # One index and numbers of the same type: 30 times as fast as any other form.
        np.add.at(passed.ravel(), (row - low.min()) * passed.shape[1] + column, down[some][edge])
    windings = np.zeros((height, width), np.int16)
    np.cumsum(passed[:, :-1], axis=1, dtype=np.int16, out=windings[low.min() : high.max(), left:right])
    return windings


def _signed_areas(start: Floats, end: Floats, y_edges: Floats, x_edges: Floats) -> Floats:
    """Sum, over edges (N, 2) xy with the inside on their right, of the area to the right of each; (H, W).

    A piece within one cell adds to that cell the area between itself and the cell's right line, and its whole height
    times a cell's width to every cell further right; what lies outside the shape cancels. The edges are cut where they
    cross a line of the grid, so the work grows with their length in cells, not with the number of cells.
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


def _cut(start: Floats, end: Floats, y_edges: Floats, x_edges: Floats) -> tuple[Ints, Floats]:
    """Cut edges wherever they cross a line of the grid; the number of the edge and the point (N, 2) xy of every cut."""
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
    order = np.argsort(2 * owner + share)
    owner, share = owner[order], share[order]
    return owner, start[owner] * (1 - share[:, None]) + end[owner] * share[:, None]


def decode_rle(counts: str | Sequence[int], height: int, width: int) -> Bools:
    """The mask (height, width) of a COCO run-length encoding: runs go down the columns and begin with unset pixels.

    Compressed, each run is a string of characters with five bits each, least first, and a sixth that says whether more
    follow; from the fourth on, runs are differences to the one two places before.

    Raises:
        ValueError: this is no such encoding, or not of that many pixels; the message is a clause that says why.
    """
    cells = height * width
    if isinstance(counts, str):
        codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
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
    elif not all(isinstance(count, int | float | np.integer | np.floating) and count % 1 == 0 for count in counts):
        raise ValueError("its counts are not whole numbers")
    elif any(count < 0 or count > cells for count in counts):
        raise ValueError(f"a run is not within 0..{cells}")
    else:
        runs = np.array(counts, np.int64)
    if runs.size and runs.min() < 0:
        raise ValueError("its counts hold a negative run")
    if runs.sum() != cells:
        raise ValueError(f"its runs add up to {runs.sum()} pixels, not {cells}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T

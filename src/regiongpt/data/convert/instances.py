"""Reads an instances file of COCO's format into columns of numbers: a million objects fit where their json would not.

Every image and annotation that cannot be used is left out here and told, so what a converter asks for is sound.
"""

import logging
import math
from array import array
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from regiongpt.data.convert.images import Fault, check_image
from regiongpt.data.convert.jsonstream import TRUNCATED, iter_arrays
from regiongpt.data.convert.values import MALFORMED, clipped_box, image_fault, is_side, is_whole, plain_text, short
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError, RegionError
from regiongpt.regions import MAX_COORDINATE, MIN_AREA, Region

log = logging.getLogger(__name__)

Indices = NDArray[np.intp]
Shapes = Literal["box", "mask", "both"]
SHAPES: Final = ("box", "mask", "both")
_NONE, _POLYGON, _RLE, _FAULTY = range(4)  # what an annotation has for a mask
_AT_ONCE: Final = 20_000  # polygons that are looked at together


class InstancesFile:
    """The images, objects and category names of one file, those left out that cannot be used.

    Args:
        path: Of the json.
        rejects: Where what is left out is noted.
        shapes: What is wanted of each object: its box, its mask or both. Without ``"box"``, an object without a sound
            mask is left out; with it, its box is kept.
        image_name: The path of an image below the images' folder, as its entry names it.
        folder: Of the images, to leave out those that are missing or of another size; None checks none.
        known: Ids of images to take for duplicates: those of the files before.
        official: Names by category id, for a file that breaks off before its categories.

    Attributes:
        names: Of the categories by id.
        images: Ids in ascending order, with ``widths``, ``heights`` and ``paths`` beside them.
        ids: Of the objects, crowds left out, in the order of their images and then their ids. Beside them are the
            ``places`` of their images in ``images``, their ``categories`` (ids) and ``boxes`` (N, 4), half-open xyxy
            within the image.
        crowds: How many annotations of groups are left out, which nobody asks about.

    Raises:
        DataError: The file is missing, not json or not of this format.
    """

    def __init__(
        self,
        path: Path,
        rejects: Rejects,
        *,
        shapes: Shapes,
        image_name: Callable[[Mapping[str, Any]], Any],
        folder: Path | None,
        known: set[int],
        official: Mapping[int, str],
    ) -> None:
        self.path = path
        self._rejects, self._shapes, self._image_name = rejects, shapes, image_name
        self._folder, self._known = folder, known
        self.names: dict[int, str] = {}
        self._frames: dict[int, tuple[int, int, str]] = {}
        self._left_out: set[int] = set()
        self._ids, self._image_ids, self._category_ids = array("q"), array("q"), array("q")
        self._boxes, self._crowd, self._mask = array("d"), array("b"), array("b")
        self._rle: dict[int, dict[str, Any]] = {}
        self._points, self._ring_ends, self._first_ring = array("d"), array("q", [0]), array("q", [0])
        breaks = rejects.counts[TRUNCATED]
        readers = {"images": self._read_image, "annotations": self._read_annotation, "categories": self._read_category}
        counts = dict.fromkeys(readers, 0)
        for key, entry in iter_arrays(path, tuple(readers), rejects):
            readers[key](entry, counts[key])
            counts[key] += 1
        if not self.names and rejects.counts[TRUNCATED] > breaks:
            if not official:
                raise DataError(f"{path}: expected categories, but the file breaks off before them; fetch it again")
            log.warning("%s: breaks off before its categories; the official ids are taken", path)
            self.names = dict(official)
        self._settle()

    # -----------------------------------------------------------------------------------------------------------------
    # Entry by entry

    def _add_fault(self, fault: Fault, record: object) -> None:
        self._rejects.add(fault.kind, self.path, record, fault.reason)

    def _read_category(self, entry: Any, place: int) -> None:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not is_whole(number):
            self._add_fault(Fault(MALFORMED, f"expected id and name, got {short(entry)}"), f"categories[{place}]")
            return
        name = plain_text(entry.get("name"), "category name")
        if isinstance(name, Fault):
            self._add_fault(name, f"category {number}")
        elif self.names.setdefault(number, name) != name:
            raise DataError(
                f"{self.path}: expected one name for category {number}, got {self.names[number]!r} and {name!r}; "
                "give the file as it was released"
            )

    def _read_image(self, entry: Any, place: int) -> None:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not is_whole(number):
            self._add_fault(Fault(MALFORMED, f"expected an image's id, got {short(entry)}"), f"images[{place}]")
            return
        path, width, height = self._image_name(entry), entry.get("width"), entry.get("height")
        fault = image_fault(path)
        if number in self._frames or number in self._left_out or number in self._known:
            self._add_fault(Fault("duplicate id", "expected each image once, got it again"), f"image {number}")
            if number in self._known:
                self._left_out.add(number)
            return
        if not (is_side(width) and is_side(height)):
            fault = Fault("image without size", f"expected width and height, got {short(width)} and {short(height)}")
        elif fault is None and self._folder is not None:
            fault = check_image(self._folder / path, width, height)
        if fault is None:
            self._frames[number] = (width, height, path)
        else:
            self._left_out.add(number)
            self._add_fault(fault, f"image {number}")

    def _read_annotation(self, entry: Any, place: int) -> None:
        try:
            ids = (entry["id"], entry["image_id"], entry["category_id"])
            box = array("d", entry["bbox"])
            if len(box) != 4 or not all(map(is_whole, ids)) or entry.get("iscrowd") not in (None, 0, 1):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            reason = (
                "expected whole id, image_id, category_id, a bbox of four numbers and, if any, iscrowd 0 or 1, got "
                f"{short(entry)}"
            )
            self._add_fault(Fault(MALFORMED, reason), f"annotations[{place}]")
            return
        self._ids.append(ids[0])
        self._image_ids.append(ids[1])
        self._category_ids.append(ids[2])
        self._boxes.extend(box)
        self._crowd.append(1 if entry.get("iscrowd") else 0)
        self._mask.append(self._read_mask(entry.get("segmentation"), ids[0]))
        self._first_ring.append(len(self._ring_ends) - 1)

    def _read_mask(self, segmentation: Any, record: int) -> int:
        """Takes the mask of the next annotation; what is wrong with it by itself is told."""
        if not segmentation:
            return _NONE
        if isinstance(segmentation, dict):
            # Without masks only their size is held against the image's.
            kept = segmentation if self._shapes != "box" else {"size": segmentation.get("size")}
            self._rle[len(self._ids) - 1] = kept
            return _RLE
        rings: list[array[float]] = []
        fault: Fault | None = None
        for given in segmentation if isinstance(segmentation, list) else [segmentation]:
            try:
                ring = array("d", given)
            except (TypeError, OverflowError):
                ring = array("d", [0.0])
            if not ring or len(ring) % 2:
                fault = Fault("polygon that is not pairs of numbers", f"expected x, y, x, y, ..., got {short(given)}")
            elif not (math.isfinite(sum(ring)) and min(ring) >= -MAX_COORDINATE and max(ring) <= MAX_COORDINATE):
                fault = Fault("polygon that is not finite", f"expected finite pixels, got {short(given)}")
            elif len(ring) < 6:
                thin = f"expected three points or more, got {len(ring) // 2}; the ring is left out"
                self._add_fault(Fault("polygon of fewer than three points", thin), record)
            else:
                rings.append(ring)
        if fault is not None:
            self._add_fault(self._told(fault), record)
        if fault is not None or not rings:
            return _FAULTY
        if self._shapes != "box":
            for ring in rings:
                self._points.extend(ring)
                self._ring_ends.append(len(self._points) // 2)
        return _POLYGON

    def _told(self, fault: Fault) -> Fault:
        """The fault of a mask, with what becomes of its object."""
        then = "the object is left out" if self._shapes == "mask" else "its box is kept"
        return Fault(fault.kind, f"{fault.reason}; {then}")

    # -----------------------------------------------------------------------------------------------------------------
    # All together

    def _settle(self) -> None:
        """Holds the annotations against the images and categories, and puts what is sound in order."""
        self.images: NDArray[np.int64] = np.array(sorted(self._frames), np.int64)
        frames = [self._frames[number] for number in self.images.tolist()]
        self._frames.clear()
        self.widths = np.array([frame[0] for frame in frames], np.int64)
        self.heights = np.array([frame[1] for frame in frames], np.int64)
        self.paths = [frame[2] for frame in frames]

        ids, image_ids, categories = (_column(column) for column in (self._ids, self._image_ids, self._category_ids))
        found = np.searchsorted(self.images, image_ids)
        places = np.minimum(found, max(len(self.images) - 1, 0))
        absent = (self.images[places] != image_ids) if len(self.images) else np.ones(len(ids), bool)
        repeated = np.ones(len(ids), bool)
        repeated[np.unique(ids, return_index=True)[1]] = False
        unnamed = ~np.isin(categories, list(self.names))
        given = _column(self._boxes).reshape(-1, 4)
        boxes, bad_box = self._clip(given, places, absent)
        bad = absent | repeated | unnamed | bad_box
        for k in np.flatnonzero(bad).tolist():
            self._add_fault(self._fault(k, bool(absent[k]), bool(repeated[k]), bool(unnamed[k]), places), int(ids[k]))
        crowd = _column(self._crowd) != 0
        self.crowds = int(np.count_nonzero(crowd & ~bad))
        self._mask_kinds = _column(self._mask).copy()
        kept = np.flatnonzero(~bad & ~crowd)
        self._check_rle(~bad, crowd, places)
        if self._shapes != "box":
            self._check_polygons(kept, places)
        if self._shapes == "mask":
            for k in kept[self._mask_kinds[kept] == _NONE].tolist():
                reason = "expected a mask, got a box alone; convert boxes, or both"
                self._add_fault(Fault("object without a mask", reason), int(ids[k]))
            kept = kept[np.isin(self._mask_kinds[kept], (_POLYGON, _RLE))]
        kept = kept[np.lexsort((ids[kept], places[kept]))]
        self._kept = kept
        self.ids, self.places, self.categories, self.boxes = ids[kept], places[kept], categories[kept], boxes[kept]

    def _clip(
        self, given: NDArray[np.float64], places: Indices, absent: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Boxes as xyxy within their images, and which of them are none."""
        boxes = np.column_stack((given[:, :2], given[:, :2] + given[:, 2:]))
        bad = ~np.isfinite(given).all(axis=1) | (given[:, 2:] <= 0).any(axis=1)
        if len(self.images):
            limits = np.column_stack((self.widths, self.heights))[places]
            boxes = np.clip(boxes, 0.0, np.hstack((limits, limits)))
        with np.errstate(invalid="ignore"):
            bad |= ~(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) >= MIN_AREA)
        return boxes, bad & ~absent

    def _fault(self, k: int, absent: bool, repeated: bool, unnamed: bool, places: Indices) -> Fault:
        """Why annotation ``k`` is left out."""
        if absent:
            number = self._image_ids[k]
            if number in self._left_out:
                return Fault("annotation of an image left out", f"expected a usable image, got image {number}")
            return Fault("annotation of an absent image", f"expected an image of the file, got image {number}")
        if repeated:
            return Fault("duplicate id", "expected each annotation once, got its id again")
        if unnamed:
            return Fault("unknown category", f"expected a category of the file, got {self._category_ids[k]}")
        width, height = int(self.widths[places[k]]), int(self.heights[places[k]])
        x, y, w, h = box = self._boxes[4 * k : 4 * k + 4].tolist()
        clipped = clipped_box(x, y, w, h, width, height)
        if isinstance(clipped, Fault):
            return clipped
        reason = f"expected at least {MIN_AREA} px^2 within {width} x {height} pixels, got {short(box)} (x, y, w, h)"
        return Fault("box outside the image", reason)

    def _check_rle(self, usable: NDArray[np.bool_], crowd: NDArray[np.bool_], places: Indices) -> None:
        for k, rle in self._rle.items():
            if not usable[k]:
                continue
            width, height = int(self.widths[places[k]]), int(self.heights[places[k]])
            fault: Fault | None = None
            if rle.get("size") != [height, width]:
                reason = f"expected the size {[height, width]} of its image (H, W), got {short(rle.get('size'))}"
                fault = Fault("RLE of another size", reason)
            elif self._shapes != "box" and not crowd[k]:
                try:
                    Region.rle(rle).check(width, height, "mask")
                except RegionError as error:
                    fault = Fault("mask that makes no sense", str(error))
            if fault is not None:
                self._mask_kinds[k] = _FAULTY
                self._add_fault(self._told(fault), self._ids[k])

    def _check_polygons(self, kept: Indices, places: Indices) -> None:
        """Finds polygons without area in their image: many at a time, and one by one where that leaves a doubt."""
        kept = kept[self._mask_kinds[kept] == _POLYGON]
        points = _column(self._points).reshape(-1, 2)
        first, ends = _column(self._first_ring), _column(self._ring_ends)
        for start in range(0, len(kept), _AT_ONCE):
            part = kept[start : start + _AT_ONCE]
            # The first ring alone is looked at: if it is sound and inside, so is the whole.
            begin, lengths = ends[first[part]], np.diff(ends)[first[part]]
            owners = np.repeat(np.arange(len(part)), lengths)
            steps = np.arange(len(owners)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            rings = shapely.linearrings(points[begin[owners] + steps], indices=owners)
            drawn = shapely.polygons(rings)
            bounds = shapely.bounds(drawn)
            limits = np.column_stack((self.widths, self.heights))[places[part]]
            inside = (bounds[:, :2] >= 0).all(axis=1) & (bounds[:, 2:] <= limits).all(axis=1)
            sound = inside & (shapely.area(drawn) >= 2 * MIN_AREA) & shapely.is_valid(drawn)
            for k in part[~sound].tolist():
                try:
                    self._polygon(k).check(int(self.widths[places[k]]), int(self.heights[places[k]]), "polygon")
                except RegionError as error:
                    self._mask_kinds[k] = _FAULTY
                    self._add_fault(self._told(Fault("mask that makes no sense", str(error))), self._ids[k])

    # -----------------------------------------------------------------------------------------------------------------
    # What is asked for

    def mask(self, index: int) -> Region | None:
        """The mask of one of the objects, as the file has it: polygons or RLE; None without a sound one."""
        k = int(self._kept[index])
        kind = self._mask_kinds[k]
        if kind == _RLE:
            return Region.rle(self._rle[k])
        return self._polygon(k) if kind == _POLYGON else None

    def _polygon(self, k: int) -> Region:
        ends = self._ring_ends[self._first_ring[k] : self._first_ring[k + 1] + 1]
        points = _column(self._points)
        return Region.polygon([points[2 * begin : 2 * end] for begin, end in pairwise(ends)])


def _column(values: "array[Any]") -> NDArray[Any]:
    """The numbers of an array without a copy."""
    return np.frombuffer(values, values.typecode) if len(values) else np.zeros(0, values.typecode)

"""Files in COCO's format, as COCO and other tools write them; docs/data.md has the rules."""

import logging
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import unquote

import numpy as np
import shapely

from regiongpt.data.reading import (
    MALFORMED,
    Corners,
    check_image,
    clipped_box,
    image_name,
    is_number,
    iter_array,
    iter_arrays,
    known_size,
    plain_text,
    stated_size,
    whole,
)
from regiongpt.data.records import RecordRegion
from regiongpt.data.shards import CROWD, Fault, Rejects, many
from regiongpt.errors import DataError, RegionError, short
from regiongpt.regions import MAX_COORDINATE, MIN_AREA, Region
from regiongpt.storage import is_below, is_unicode

log = logging.getLogger(__name__)

Box = Corners
Shapes = Literal["box", "mask", "both"]
_LVIS: Final = ("neg_category_ids", "not_exhaustive_category_ids")
_NO_CLASS: Final = ("_background_", "__background__", "background", "__ignore__")  # as LabelMe begins its categories
_NO_ID: Final = -(1 << 62)
_NO_SENSE: Final = "mask that makes no sense"


# -- One annotation ----------------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """A ``segmentation``: rings of x, y, x, y, ..., or RLE, or neither, with what is wrong with it."""

    rings: Sequence["array[float]"] = ()
    rle: dict[str, Any] | None = None
    faults: Sequence[Fault] = ()

    def bounds(self) -> Corners | None:
        """x, y, width, height around it; None without a mask, or where it has no area."""
        x0 = y0 = x1 = y1 = 0.0
        if self.rings:
            points = np.concatenate([np.reshape(ring, (-1, 2)) for ring in self.rings])
            (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        elif self.rle:
            with suppress(RegionError):
                x0, y0, x1, y1 = Region.rle(self.rle).bounds(*self.rle["size"][::-1])
        return (x0, y0, x1 - x0, y1 - y0) if x1 > x0 else None

    def is_clear(self, width: int, height: int) -> bool:
        """Whether it is certainly sound in an image of that size, as its first ring is: a check ten times as fast."""
        if not self.rings:
            return False
        ring = shapely.Polygon(np.reshape(self.rings[0], (-1, 2)))
        x0, y0, x1, y1 = ring.bounds
        inside = min(x0, y0) >= 0 and x1 <= width and y1 <= height and max(x1, y1) > 1  # else it looks normalized
        return bool(inside and ring.area >= 2 * MIN_AREA and ring.is_valid)

    def region(self) -> Region | None:
        """The mask as a region, None without one; RegionError for malformed RLE."""
        if self.rle is not None:
            return Region.rle(self.rle)
        return Region.polygon([np.array(ring) for ring in self.rings]) if self.rings else None


class Annotation(NamedTuple):
    """An entry of ``annotations`` or of detection results, in any tool's format."""

    id: int | None  # needed only to refer to an object
    image: int | None
    category: int | None
    box: Corners | None  # x, y, width, height as given; around the mask where the entry is boxless
    boxless: bool  # no bbox with a size
    mask: Mask
    crowd: bool
    area: float  # px^2, NaN where the entry has none


def read_annotation(entry: Any) -> Annotation:
    """An entry as a typed row; Fault if it is not an object, or its id or ``iscrowd`` cannot be used."""
    if not isinstance(entry, dict):
        raise Fault(MALFORMED, f"expected an object, got {short(entry)}")
    number, image, category = (number_of(entry.get(key)) for key in ("id", "image_id", "category_id"))
    crowd = is_crowd(entry.get("iscrowd"))
    if crowd is None or (number is None and entry.get("id") is not None):
        raise Fault(MALFORMED, f"expected an id as a whole number or text, and iscrowd as 0 or 1, got {short(entry)}")
    mask, box, area = read_mask(entry.get("segmentation")), read_box(entry.get("bbox")), entry.get("area")
    boxless = box is None or not (0 < box[2] < math.inf and 0 < box[3] < math.inf)
    if boxless:
        box = mask.bounds() or box
    area = area if is_number(area) and area > 0 else math.nan
    return Annotation(number, image, category, box, boxless, mask, crowd, area)


def read_score(entry: Mapping[str, Any]) -> float | None:
    """The ``score`` of a detector's result, None without one; Fault if it is not a number."""
    score = entry.get("score")
    if "score" in entry and not is_number(score):
        raise Fault("score that is no number", f"expected a score as a finite number, got {short(score)}")
    return None if score is None else float(score)


def read_box(value: Any) -> Corners | None:
    """The four numbers of a ``bbox``; None if there are not four."""
    try:
        x, y, width, height = map(float, value if isinstance(value, list | tuple) else ())
    except (TypeError, ValueError, OverflowError):
        return None
    return x, y, width, height


def annotated_box(box: Sequence[float], width: int, height: int) -> Corners:
    """A bbox as :func:`clipped_box` makes it; Fault too for one in fractions of the image's sides."""
    x, y, w, h = box
    if x + w <= 1 and y + h <= 1 < max(width, height) and min(x, y) >= 0 < min(w, h):
        raise Fault("box that looks normalized", f"expected pixels, got {short(box)}; multiply by the image's size")
    return clipped_box(box, width, height)


def overhangs(box: Sequence[float], width: int, height: int) -> bool:
    """Whether a bbox reaches far beyond its image, as x0, y0, x1, y1 read as x, y, width, height would."""
    return box[0] + box[2] > 1.1 * width or box[1] + box[3] > 1.1 * height


def warn_of_overhang(count: int, total: int, path: Path) -> None:
    """Warn if more than a tenth of a file's boxes extend beyond their images."""
    if count > total / 10:
        told = "%s: %s of %s reach far beyond their images: COCO's are x, y, width, height, not x0, y0, x1, y1"
        log.warning(told, path, count, many(total, "box"))


def crowd_hint(rejects: Rejects) -> str:
    """Hint for a message if everything is a crowd: tools that store masks as RLE mark each as one."""
    return "; --crowds includes crowds" if rejects.counts[CROWD] else ""


def number_of(identity: Any) -> int | None:
    """An id as a number; text that is not a number gets one from 2**62 on by its hash."""
    if type(identity) is int and 0 <= identity < 1 << 63:  # nearly always
        return identity
    number = whole(identity)
    if number is None and isinstance(identity, str) and identity and is_unicode(identity):
        return int.from_bytes(blake2b(identity.encode(), digest_size=8).digest()) >> 2 | 1 << 62
    return number


def is_crowd(value: Any) -> bool | None:
    """Value of ``iscrowd``, False if missing; None if invalid."""
    known = {"none": False, "": False, "0": False, "false": False, "1": True, "true": True}
    return known.get(str(value).lower().removesuffix(".0"))


def read_mask(segmentation: Any) -> Mask:
    """The mask of an entry: rings, one flat ring, rings of points, RLE, RLE in a list; an empty ring is no mask."""
    if not segmentation:
        return Mask()
    listed = segmentation if isinstance(segmentation, list) else [segmentation]
    first = listed[0]
    if isinstance(first, dict) and len(listed) == 1 and not first.keys().isdisjoint(("size", "counts")):
        # Whole numbers where a tool has written 80.0
        lists = {key: first[key] for key in ("size", "counts") if isinstance(first.get(key), list)}
        odd = {key: given for key, given in lists.items() if any(type(each) is not int for each in given)}
        return Mask(rle={**first, **{key: [whole(each) for each in given] for key, given in odd.items()}})
    is_ring = not isinstance(first, list) or (len(first) == 2 < len(listed) and not isinstance(first[0], list))
    rings: list[array[float]] = []
    faults: list[Fault] = []
    for given in [listed] if is_ring else listed:
        try:
            ring = array("d", np.asarray(given, np.float64).tobytes())
        except (TypeError, ValueError, OverflowError):
            ring = array("d", [math.nan])
        if ring and not (math.isfinite(sum(ring)) and min(ring) >= -MAX_COORDINATE and max(ring) <= MAX_COORDINATE):
            return Mask(faults=[Fault("polygon that is not numbers", f"expected finite pixels, got {short(given)}")])
        if len(ring) % 2:
            return Mask(faults=[Fault("polygon that is not pairs", f"expected x, y, x, y, ..., got {short(given)}")])
        if len(ring) >= 6:
            rings.append(ring)
        elif ring:
            faults.append(Fault("polygon of fewer than three points", f"expected three points, got {short(given)}"))
    return Mask(rings, None, faults)


# -- Which image an entry means ----------------------------------------------------------------------------------------


def _names(entry: Mapping[str, Any]) -> list[str]:
    """Names of an entry's image, the most likely first: its file name, and the end of its URL."""
    name, url = entry.get("file_name"), entry.get("coco_url")
    address = next((text for each in (url, name) if "/" in (text := str(each or ""))), "")
    found = []
    if isinstance(name, str) and name and "://" not in name:
        on_disk = name.partition("?d=")[2].partition("&")[0]  # a path on Label Studio's server
        name = unquote(on_disk).lstrip("/") if on_disk else name.replace("\\", "/")
        found = [str(PurePosixPath(name)) if "./" in name or "//" in name else name]
    if address == url or "://" in address:  # Label Studio has addresses for file names
        ends = [part for part in unquote(address.split("?")[0]).split("/") if part][-2:]
        found += ["/".join(ends)] if ends else []
    return found


class ImageFinder:
    """The image file of an entry of an instances file, never one of the same name in another folder.

    It is the file of the ``file_name`` below the folder, then that of the end of the ``coco_url``; else, if only one
    entry has it, the file of the last part of a name.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]], folder: Path | None) -> None:
        self._folder = folder
        self._parts = () if folder is None else folder.resolve().parts
        images = {tuple(_names(each)) for each in entries} if folder else ()
        self._bearers = Counter(last for names in images for last in set(map(os.path.basename, names)))
        self.by_last_part: list[str] = []  # names found by no more than that

    def find(self, entry: Mapping[str, Any]) -> str:
        """The path below the folder, or the most likely name without a file; Fault for none, or one that leaves it."""
        names = _names(entry)
        if not names:
            raise Fault("image outside the folder", "expected a file_name or coco_url below it, got neither")
        if path := self._there(candidate for name in names for candidate in self._below(name)):
            return path
        if path := self._there(last for last in map(os.path.basename, names) if self._bearers[last] == 1):
            self.by_last_part.append(names[0])
            return path
        return image_name(names[0])

    def _there(self, names: Iterable[str]) -> str:
        """The first of some names that is a file below the folder; ``""`` if none is."""
        usable = (name for name in names if self._folder and is_unicode(name) and is_below(name))
        return next((name for name in usable if os.path.isfile(f"{self._folder}/{name}")), "")

    def _below(self, name: str) -> Iterator[str]:
        """A name as it is, and without the folders that the images' folder ends in."""
        yield name
        parts = PurePosixPath(name).parts
        for count in range(min(len(parts) - 1, len(self._parts)), 0, -1):
            if self._parts[-count:] == parts[:count]:
                yield "/".join(parts[count:])


def entry_of(images: Sequence[Mapping[str, Any]], image: str | Path, file: str) -> Mapping[str, Any]:
    """The entry of an image among those of an instances file, whose name is ``file``: the inverse of ImageFinder.

    It is the one whose name or address ends the image's path, the longest such, else the one of the same base name.
    DataError if none is, or several are.
    """
    path = PurePosixPath(Path(image).absolute().as_posix()).parts
    named = [(PurePosixPath(name).parts, entry) for entry in images for name in _names(entry)]
    whole = [each for each in named if path[-len(each[0]) :] == each[0]]
    longest = max((len(parts) for parts, _ in whole), default=1)
    best = [entry for parts, entry in whole or named if parts[-longest:] == path[-longest:]]
    if len({str(entry.get("id")) for entry in best}) != 1:
        listed = ", ".join(_names(entry)[0] for entry in best[:4])
        several = f"{len(best)} images that may be {path[-1]}: {listed}" if best else f"no image called {path[-1]}"
        raise DataError(f"{file} has {several}; give --image-id")
    if not whole:
        log.warning("%s: %s is matched to %s only by file name", file, _names(best[0])[0], image)
    return best[0]


# -- A whole file ------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One usable image of a file: its id, path below the images' folder, and size in pixels."""

    id: int
    path: str
    width: int
    height: int


class Instance(NamedTuple):
    """One usable object of a file."""

    place: int  # of its image among those of the file
    id: int  # below 0 without one
    category: int
    box: Corners  # xyxy, within the image
    area: float  # px^2, NaN where the entry has none
    crowd: bool  # a crowd that is kept apart
    mask: Mask


class Federated(NamedTuple):
    """LVIS' fields for images that are not annotated exhaustively."""

    # By image, categories known not to be there: detections of those neither annotated nor in here do not count.
    absent: Mapping[int | str, Sequence[int]]
    # By image, categories of which only some objects were annotated: unmatched detections do not count.
    partly: Mapping[int | str, Sequence[int]]
    frequency: Mapping[int, str]  # by category, "r", "c" or "f"


class InstancesFile:
    """The images, objects and category names of one file; what cannot be used is noted in ``rejects``.

    Args:
        shapes: What is wanted of each object. Without ``"box"``, an object without a sound mask is left out.
        folder: Folder of the images; None does not look for them.
        check: With a folder, whether images that are missing, or of another size too, are left out.
        crowds: Leave out groups of objects, take them for objects, or keep them apart.
        wanted: Ids of the images whose objects are read; None for all.
        known: Ids of images that earlier files had.

    Attributes:
        names: Categories by id; of two ids of one name, the first that is used stands for both.
        images, objects: In the order of their images' ids, then their own.
        groups: Image, category, box as given (x, y, width, height) and area of each crowd that is left out.
        federated: None where not every image and category has it.

    DataError where the file is missing, not JSON or not of this format.
    """

    def __init__(
        self,
        path: Path,
        rejects: Rejects,
        *,
        shapes: Shapes = "box",
        folder: Path | None = None,
        check: Literal["", "missing", "size"] = "",
        crowds: Literal["leave out", "take", "keep"] = "leave out",
        wanted: Set[int] | None = None,
        known: Set[int] = frozenset(),
    ) -> None:
        self.path = path
        self._rejects, self._shapes, self._crowds = rejects, shapes, crowds
        self._folder, self._check, self._wanted, self._known = folder, check, wanted, known
        self._texts: dict[int, str] = {}  # ids that are text
        self._categories: dict[int, dict[str, Any]] = {}
        self._entries: dict[int, dict[str, Any]] = {}  # images
        self._rows: list[Annotation] = []
        readers = {"images": self._read_image, "annotations": self._read_annotation, "categories": self._read_category}
        counts = Counter[str]()
        for key, entry in iter_arrays(path, tuple(readers)):
            with rejects.noting(path, f"{key}[{counts[key]}]"):
                readers[key](entry, counts[key])
            counts[key] += 1
        self._settle_categories()
        self._settle_images()
        self._settle_objects()

    def name_of(self, number: int) -> int | str:
        """An id as the file has it; ``annotations[7]`` for an object without one."""
        return self._texts.get(number, number) if number >= 0 else f"annotations[{number - _NO_ID}]"

    def by_image(self) -> Iterator[tuple[Frame, list[Instance]]]:
        """Each image with its objects."""
        objects = {place: list(found) for place, found in groupby(self.objects, key=lambda each: each.place)}
        for place, image in enumerate(self.images):
            yield image, objects.get(place, [])

    def record_region(self, one: Instance, region: Region) -> RecordRegion:
        """An object's box or mask as a region of a record."""
        source_id = str(self.name_of(one.id)) if one.id >= 0 else ""
        return RecordRegion(region=region, category=self.names[one.category], source_id=source_id)

    def annotation(self, one: Instance) -> "ObjectAnnotation":
        """An object with the name of its category."""
        rings, name = tuple(map(tuple, one.mask.rings)) or None, self.names[one.category]
        return ObjectAnnotation(id=one.id, category=name, box=one.box, polygons=rings, iscrowd=one.crowd)

    def _number(self, entry: Any) -> int:
        number = number_of(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            raise Fault(MALFORMED, f"expected an object with an id, got {short(entry)}")
        if number >> 62:
            self._texts[number] = entry["id"]
        return number

    def _read_category(self, entry: Any, place: int) -> None:
        number = self._number(entry)
        name = plain_text(entry.get("name"), "category name")
        known = self._categories.setdefault(number, {**entry, "name": name})["name"]
        if known != name:
            raise DataError(f"{self.path}: category {number} is both {known!r} and {name!r}; use the original file")

    def _read_image(self, entry: Any, place: int) -> None:
        number = self._number(entry)
        if number in self._entries or number in self._known:
            raise Fault("duplicate id", f"expected each image once, got {self.name_of(number)} again")
        if self._wanted is None or number in self._wanted:
            needed = ("width", "height", "file_name", "coco_url", *_LVIS)
            self._entries[number] = {key: entry[key] for key in needed if key in entry}

    def _read_annotation(self, entry: Any, place: int) -> None:
        row = read_annotation(entry)
        if self._wanted is not None and row.image is not None and row.image not in self._wanted:
            return
        if row.image is None or row.category is None or row.box is None:
            wanted = "expected image_id, category_id, and a bbox of four numbers or a segmentation"
            raise Fault(MALFORMED, f"{wanted}, got {short(entry)}")
        for number, key in ((row.id, "id"), (row.image, "image_id"), (row.category, "category_id")):
            if number is not None and number >> 62:
                self._texts[number] = entry[key]
        own_id = _NO_ID + place if row.id is None else row.id
        mask = Mask() if self._shapes == "box" and not row.boxless else row.mask
        for fault in mask.faults:
            self._leave_out(own_id, fault)
        self._rows.append(row._replace(id=own_id, mask=mask))

    def _settle_categories(self) -> None:
        """Leave out unused supercategories, and merge categories of the same name."""
        used = {row.category for row in self._rows}
        above = {number: entry.get("supercategory") for number, entry in self._categories.items()}
        roots = (None, "", "none")
        headings = {str(above[k]) for k, entry in self._categories.items() if above[k] not in (*roots, entry["name"])}
        self.names: dict[int, str] = {}
        self._alias: dict[int, int] = {}
        first: dict[str, int] = {}
        # Roboflow begins with a root category that no annotation has.
        for number in sorted(self._categories, key=lambda number: (number not in used, number)):
            name = self._categories[number]["name"]
            is_root = above[number] in roots and name in headings
            if number not in used and (is_root or name in _NO_CLASS):
                continue
            if name not in first:
                self.names[number] = name
            elif number in used:
                told = "%s: categories %s and %s are both called %r and are merged"
                log.warning(told, self.path, self.name_of(first[name]), self.name_of(number), name)
            self._alias[number] = first.setdefault(name, number)

    def _settle_images(self) -> None:
        """Find the images' files, and leave out images that cannot be used."""
        absent, partly = (
            {self.name_of(k): each[key] for k, each in self._entries.items() if type(each.get(key)) is list}
            for key in _LVIS
        )
        frequency = {number: str(self._categories[number].get("frequency")) for number in self.names}
        is_lvis = 0 < len(self._entries) == len(absent) == len(partly) and set(frequency.values()) <= {"r", "c", "f"}
        self.federated = Federated(absent, partly, frequency) if is_lvis else None
        finder = ImageFinder(self._entries.values(), self._folder)
        self.images: list[Frame] = []
        for number, entry in sorted(self._entries.items()):
            with self._rejects.noting(self.path, f"image {self.name_of(number)}"):
                self.images.append(self._frame(number, entry, finder))
        if found := finder.by_last_part:
            told = "%s: %s matched only by file name, such as %s; check --images"
            log.warning(told, self.path, many(len(found), "image"), found[0])
        self._entries.clear()

    def _frame(self, number: int, entry: Mapping[str, Any], finder: ImageFinder) -> Frame:
        stated = stated_size(entry)
        path = finder.find(entry)
        file = f"{self._folder}/{path}"
        if self._folder and self._check == "size":
            stated = check_image(file, *(stated or (None, None)))
        elif self._folder and self._check == "missing" and not os.path.isfile(file):
            raise Fault("image file missing", f"expected an image at {file}, found none")
        size = stated or (known_size(file) if self._folder else None)
        if size is None:
            raise Fault("image without size", "expected width and height, or an image that can be measured")
        return Frame(number, path, *size)

    def _settle_objects(self) -> None:
        """Check the annotations against images and categories, and sort the valid ones."""
        places = {image.id: place for place, image in enumerate(self.images)}
        seen: set[int | None] = set()
        overhung = 0
        self.groups: list[tuple[int, int, list[float], float]] = []
        self.objects: list[Instance] = []
        for number, image, given, bounds, boxless, mask, crowd, area in self._rows:
            assert number is not None and image is not None and given is not None and bounds is not None  # noqa: PT018
            with self._rejects.noting(self.path, self.name_of(number)):
                if image not in places:
                    raise Fault("annotation of an absent image", f"expected a usable image, got {self.name_of(image)}")
                if number in seen:
                    raise Fault("duplicate id", "expected each annotation once, got its id again")
                seen.add(number)
                if given not in self._alias:
                    raise Fault("unknown category", f"expected a category of the file, got {self.name_of(given)}")
                frame, category = self.images[places[image]], self._alias[given]
                if boxless and mask.rle and mask.rle.get("size") != [frame.height, frame.width]:
                    wanted = f"expected RLE of the size {[frame.height, frame.width]} of its image"
                    raise Fault(_NO_SENSE, f"{wanted}, got {short(mask.rle.get('size'))}")
                box = annotated_box(bounds, frame.width, frame.height)
                overhung += overhangs(bounds, frame.width, frame.height)
                if crowd and self._crowds == "leave out":
                    self.groups.append((image, category, list(bounds), area))
                    raise Fault(CROWD, "expected one object, got a crowd; --crowds includes it")
                apart = crowd and self._crowds == "keep"
                if self._shapes != "box":
                    mask = self._checked(mask, number, frame)
                if self._shapes != "mask" or mask.rings or mask.rle:
                    self.objects.append(Instance(places[image], number, category, box, area, apart, mask))
        self._rows.clear()
        warn_of_overhang(overhung, len(self.objects), self.path)
        self.objects.sort(key=lambda each: each[:2])

    def _leave_out(self, number: int, fault: Fault) -> None:
        self._rejects.add(fault.kind, self.path, self.name_of(number), fault.reason)

    def _checked(self, mask: Mask, number: int, frame: Frame) -> Mask:
        """An object's mask, or none where it makes no sense; Fault where one is required and there is none."""
        if self._shapes == "mask" and not (mask.rings or mask.rle or mask.faults):
            raise Fault("object without a mask", "expected a mask, got a box alone")
        if not mask.is_clear(frame.width, frame.height):
            try:
                if (region := mask.region()) is not None:
                    region.check(frame.width, frame.height, "mask")
            except RegionError as error:
                self._leave_out(number, Fault(_NO_SENSE, str(error)))
                return Mask()
        return mask


def read_captions(paths: Sequence[Path], images: Set[int], rejects: Rejects) -> dict[int, list[tuple[int, str]]]:
    """Captions of usable images with their ids, by image, in the order of their ids.

    DataError where a file is of another format, or all its captions are of other images.
    """
    captions: dict[int, list[tuple[int, str]]] = {}
    seen: set[int] = set()
    for path in paths:
        apart, before = False, len(seen)
        for place, entry in enumerate(iter_array(path, "annotations")):
            with rejects.noting(path, f"annotations[{place}]"):
                known = entry if isinstance(entry, dict) else {}
                number, image = number_of(known.get("id")), number_of(known.get("image_id"))
                if number is None or image is None:
                    raise Fault(MALFORMED, f"expected id, image_id and caption, got {short(entry)}")
                if image not in images:
                    apart = True
                    raise Fault("caption of an absent image", f"expected a usable image, got {entry['image_id']}")
                if number in seen:
                    raise Fault("duplicate id", f"expected each caption once, got {entry['id']} again")
                text = plain_text(known.get("caption"), "caption")
                seen.add(number)
                captions.setdefault(image, []).append((number, text))
        if apart and images and len(seen) == before:
            raise DataError(f"{path}: its captions are of other images; give files that belong together")
    return {image: sorted(found) for image, found in captions.items()}


# -- Several files as one list of annotated images ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectAnnotation:
    """One annotated object, or one crowd of objects, of an image."""

    id: int
    category: str
    box: Box  # half-open xyxy in pixels of the image, clipped to it
    polygons: tuple[tuple[float, ...], ...] | None = None  # flat rings (x0, y0, x1, y1, ...), None for a box or RLE
    iscrowd: bool = False  # a group annotated as one object


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAnnotations:
    """One image with its objects and captions (one sentence each), in the order of their ids."""

    path: Path
    image_id: int
    width: int
    height: int
    objects: tuple[ObjectAnnotation, ...] = ()
    captions: tuple[str, ...] = ()


class CocoSource(NamedTuple):
    """One instances file, the folder of its images, and optionally one file of captions."""

    instances: Path
    images: Path
    captions: Path | None = None


class CocoData(NamedTuple):
    """Usable images of a list of sources, by source and image id, and the number of unusable records by fault."""

    images: tuple[ImageAnnotations, ...]
    skipped: Mapping[str, int]

    def report(self) -> str:
        """One line for the log."""
        objects, captions = (sum(len(getattr(each, name)) for each in self.images) for name in ("objects", "captions"))
        faults = ", ".join(f"{count} {kind}" for kind, count in self.skipped.items()) or "nothing"
        return f"{len(self.images)} images, {objects} objects, {captions} captions; left out: {faults}"


def photo_sources(root: Path, split: str) -> list[CocoSource]:
    """The sources of one split.

    These are ``instances_<split>.json`` with ``images/`` and, where they are there, ``captions_<split>.json`` and
    ``instances_<split>_small.json`` with ``images_small/``. DataError if the folder has no such split.
    """
    instances, captions, small = (
        root / name for name in (f"instances_{split}.json", f"captions_{split}.json", f"instances_{split}_small.json")
    )
    if not instances.is_file():
        raise DataError(f"expected COCO annotations at {instances}, found none; give the folder that holds them")
    found = [CocoSource(instances, root / "images", captions if captions.is_file() else None)]
    return [*found, *([CocoSource(small, root / "images_small")] if small.is_file() else [])]


def load_coco(sources: Iterable[CocoSource]) -> CocoData:
    """Read the sources into one list: by source, then image id, then annotation id; an image comes from its first.

    DataError where a file is missing, is not JSON, or is not in COCO's format.
    """
    rejects = Rejects()
    images: list[ImageAnnotations] = []
    known: set[int] = set()
    for source in sources:
        file = InstancesFile(
            source.instances, rejects, shapes="both", folder=source.images, check="missing", crowds="keep", known=known
        )
        ids = {image.id for image in file.images}
        known |= ids
        captions = read_captions([source.captions] if source.captions else [], ids, rejects)
        for image, found in file.by_image():
            texts = tuple(filter(None, (normalise_caption(text) for _, text in captions.get(image.id, ()))))
            images.append(
                ImageAnnotations(
                    path=source.images / image.path, image_id=image.id, width=image.width, height=image.height,
                    objects=tuple(map(file.annotation, found)), captions=texts,
                )
            )  # fmt: skip
    return CocoData(tuple(images), dict(sorted(rejects.counts.items())))


def normalise_caption(text: str) -> str:
    """A human caption as one sentence, or ``""``: spaces collapsed, first letter capital, one full stop at the end."""
    text = re.split(r"(?<=[a-z)\"][.!?])\s+(?=[A-Z])", " ".join(text.split()))[0].strip(" .,;:!\"'")
    return f"{text[0].upper()}{text[1:]}." if text else ""

"""Files in COCO's format, as COCO and other tools write them; docs/data.md has the rules."""

import json
import logging
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from struct import Struct
from typing import Any, Final, Literal, NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

import numpy as np
import shapely
from numpy.typing import NDArray

from regiongpt.data.reading import (
    MALFORMED,
    TRUNCATED,
    Corners,
    check_image,
    clipped_box,
    image_name,
    is_number,
    is_unicode,
    iter_array,
    iter_arrays,
    known_size,
    plain_text,
    stated_size,
    whole,
)
from regiongpt.data.records import Record
from regiongpt.data.shards import CROWD, Fault, Rejects, many
from regiongpt.errors import DataError, RegionError, short
from regiongpt.regions import MAX_COORDINATE, MIN_AREA, Region
from regiongpt.storage import is_below, write_file

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
Indices = NDArray[np.intp]
Shapes = Literal["box", "mask", "both"]
_CROWDS: Final[dict[str | float | None, bool]] = {
    **dict.fromkeys((None, 0, "", "0", "false"), False),
    **dict.fromkeys((1, "1", "true"), True),
}
_THIN: Final = "polygon of fewer than three points"
_LVIS: Final = ("neg_category_ids", "not_exhaustive_category_ids")
_NO_CLASS: Final = ("_background_", "__background__", "background", "__ignore__")  # as LabelMe begins its categories
_NO_ID: Final = -(1 << 62)
_AT_ONCE: Final = 20_000  # polygons checked together
_PACKED: Final = Struct("<3q2?5d")  # an annotation in memory, and the same as a row of an array
_ROW: Final = np.dtype(
    [(name, "<i8") for name in ("id", "image", "category")]
    + [("crowd", "?"), ("boxless", "?"), ("box", "<f8", 4), ("area", "<f8")]
)


# ---------------------------------------------------------------------------------------------------------------------
# One annotation


class Mask(NamedTuple):
    """A ``segmentation``: rings of x, y, x, y, ..., or RLE, or neither, with what is wrong with it."""

    rings: Sequence["array[float]"] = ()
    rle: dict[str, Any] | None = None
    faults: Sequence[Fault] = ()
    sound: bool = True

    def bounds(self) -> Box | None:
        """x, y, width, height around it; None without a mask, or where it has no area."""
        x0 = y0 = x1 = y1 = 0.0
        if self.rings:
            points = np.concatenate([np.reshape(ring, (-1, 2)) for ring in self.rings])
            (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        elif self.rle:
            with suppress(RegionError):
                x0, y0, x1, y1 = Region.rle(self.rle).bounds(*self.rle["size"][::-1])
        return (x0, y0, x1 - x0, y1 - y0) if x1 > x0 else None

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
    if number is None and entry.get("id") is not None:
        raise Fault(MALFORMED, f"expected an id as a whole number or text, got {short(entry)}")
    if (crowd := is_crowd(entry.get("iscrowd"))) is None:
        raise Fault(MALFORMED, f"expected iscrowd as 0 or 1, got {short(entry)}")
    mask, box, area = read_mask(entry.get("segmentation")), read_box(entry.get("bbox")), entry.get("area")
    boxless = box is None or not (0 < box[2] < math.inf and 0 < box[3] < math.inf)
    if boxless and mask.sound:
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
        boxes = f"{count:,} of {many(total, 'box')}"
        log.warning(
            "%s: %s reach far beyond their images: COCO's are x, y, width, height, not x0, y0, x1, y1", path, boxes
        )


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
    known = value.lower() if isinstance(value, str) else value
    return _CROWDS.get(known) if known is None or isinstance(known, str | int | float) else None


def read_mask(segmentation: Any) -> Mask:
    """The mask of an entry: rings, one flat ring, rings of points, RLE, RLE in a list; an empty ring is no mask."""
    if not segmentation:
        return Mask()
    listed = segmentation if isinstance(segmentation, list) else [segmentation]
    if all(isinstance(each, dict) and "exterior" in each and not each.get("interiors") for each in listed):
        listed = [each["exterior"] for each in listed]  # kwcoco's; those with holes have no form in COCO
    if isinstance(listed[0], dict) and len(listed) == 1:
        if listed[0].keys().isdisjoint(("size", "counts")):
            wrong = Fault("segmentation of another form", f"expected polygons or RLE, got {short(segmentation)}")
            return Mask(faults=[wrong], sound=False)
        rle = dict(listed[0])
        for key in ("size", "counts"):  # whole numbers where a tool has written 80.0
            if isinstance(rle.get(key), list) and any(type(each) is not int for each in rle[key]):
                rle[key] = [whole(each) for each in rle[key]]
        return Mask(rle=rle)
    first = listed[0]
    is_ring = not isinstance(first, list) or (len(first) == 2 < len(listed) and not isinstance(first[0], list))
    rings: list[array[float]] = []
    faults: list[Fault] = []
    sound = True
    for given in [listed] if is_ring else listed:
        try:
            ring = array("d", np.asarray(given, np.float64).tobytes())
        except (TypeError, ValueError, OverflowError):
            ring = array("d", [0.0])
        if len(ring) % 2:
            reason = f"expected x, y, x, y, ..., got {short(given)}"
            faults.append(Fault("polygon that is not pairs of numbers", reason))
            sound = False
        elif ring and not (math.isfinite(sum(ring)) and min(ring) >= -MAX_COORDINATE and max(ring) <= MAX_COORDINATE):
            faults.append(Fault("polygon that is not finite", f"expected finite pixels, got {short(given)}"))
            sound = False
        elif len(ring) >= 6:
            rings.append(ring)
        elif ring:
            thin = f"expected three points or more, got {many(len(ring) // 2, 'point')}; the ring is left out"
            faults.append(Fault(_THIN, thin))
    return Mask(rings if sound else (), None, faults, sound and bool(rings or not faults))


# ---------------------------------------------------------------------------------------------------------------------
# Which image an entry means


def _names(entry: Mapping[str, Any], url_first: bool = False) -> list[str]:
    """Names of an entry's image, the most likely first: its file name, and the end of its URL."""
    name, url = entry.get("file_name"), entry.get("coco_url")
    address = next((text for each in (url, name) if "/" in (text := str(each or ""))), "")
    named, ends = [], []
    if address == url or "://" in address:  # Label Studio has addresses for file names
        ends = [part for part in unquote(address.split("?")[0]).split("/") if part][-2:]
    if isinstance(name, str) and name and "://" not in name:
        on_disk = name.partition("?d=")[2].partition("&")[0]  # a path on Label Studio's server
        name = unquote(on_disk).lstrip("/") if on_disk else name.replace("\\", "/")
        named = [str(PurePosixPath(name)) if "./" in name or "//" in name else name]
    listed = ["/".join(ends)] if ends else []
    return [*listed, *named] if url_first else [*named, *listed]


def _original(entry: Mapping[str, Any], name: str) -> str:
    """The image's name before Roboflow's suffix; ``""`` for any other name."""
    extra = entry.get("extra")
    if isinstance(extra, Mapping) and isinstance(extra.get("name"), str):
        return PurePosixPath(extra["name"]).name
    copied = re.fullmatch(r"(.+?)(?:_(\w{3,4}))?\.rf\.\w+\.(\w+)", name) if ".rf." in name else None
    return f"{copied[1]}.{copied[2] or copied[3]}" if copied else ""


def _lasts(entry: Mapping[str, Any]) -> list[str]:
    """The last parts of an entry's names, and what its image was called before Roboflow made a copy."""
    lasts = [name.rpartition("/")[2] for name in _names(entry)]
    return [*lasts, *filter(None, (_original(entry, last) for last in lasts))]


def _spellings(name: str) -> Iterator[str]:
    """A name as it is, with its suffix in other letters, without escapes, and with accents composed or not."""
    stem, suffix = os.path.splitext(name)
    yield from (name, stem + suffix.lower(), stem + suffix.upper())
    if "%" in name:
        yield unquote(name)
    if not name.isascii():
        yield from (normalize("NFC", name), normalize("NFD", name))


class ImageFinder:
    """The image file of an entry of an instances file, never one of the same name in another folder.

    It is the file of the ``file_name`` below the folder, then that of the end of the ``coco_url``; else, if only one
    entry has it, the file of the last part of a name, or of the name before Roboflow made a copy.

    Args:
        entries: All of the file.
        folder: Folder of the images; None takes the most likely name unchecked.
        url_first: The address comes before the file name, as in LVIS, whose file names are those of another split.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]], folder: Path | None, url_first: bool = False) -> None:
        self._entries, self._url_first = entries, url_first
        self._folder = None if folder is None else str(folder)
        self._parts = () if folder is None else folder.resolve().parts
        self.by_last_part: list[str] = []  # names found by no more than that

    @cached_property
    def _bearers(self) -> Counter[str]:
        """How many images have a last part."""
        images = {tuple(_names(each)): each for each in self._entries}
        return Counter(last for each in images.values() for last in set(_lasts(each)))

    def find(self, entry: Mapping[str, Any]) -> str:
        """The path below the folder, or the most likely name if no file matches.

        Raises:
            Fault: The entry has no name, or one that leaves the folder.
        """
        names = _names(entry, self._url_first)
        if not names:
            raise Fault("image outside the folder", "expected a file_name or coco_url below it, got neither")
        if self._folder is None:
            return image_name(names[0])
        if path := self._there(candidate for name in names for candidate in self._below(name)):
            return path
        if path := self._there(last for last in _lasts(entry) if self._bearers[last] == 1):
            self.by_last_part.append(names[0])
            return path
        return list(self._below(image_name(names[0])))[-1]

    def _there(self, names: Iterable[str]) -> str:
        """The first of some names, in any spelling, that is a file below the folder; ``""`` if none is."""
        spelt = (path for name in names for path in _spellings(name) if is_unicode(path) and is_below(path))
        return next((path for path in spelt if os.path.isfile(f"{self._folder}/{path}")), "")

    def _below(self, name: str) -> Iterator[str]:
        """A name as it is, and without the folders that the images' folder ends in."""
        yield name
        parts = PurePosixPath(name).parts
        for count in range(min(len(parts) - 1, len(self._parts)), 0, -1):
            if self._parts[-count:] == parts[:count]:
                yield "/".join(parts[count:])


def entry_of(images: Sequence[Mapping[str, Any]], image: str | Path, file: str) -> Mapping[str, Any]:
    """The entry of an image among those of an instances file: the inverse of :class:`ImageFinder`.

    It is the one whose name, or else address, shares the most of the image's path from its end, at least the last part
    or the name before Roboflow made a copy.

    Args:
        images: The entries.
        image: Path of the image.
        file: Name of the instances file, for messages.

    Raises:
        DataError: No entry matches, or several do.
    """
    path = PurePosixPath(Path(image).absolute().as_posix())
    ranked = []
    for entry in images:
        for k, name in enumerate(_names(entry)):
            own = PurePosixPath(name)
            same = path.name in _spellings(own.name)
            if same or _original(entry, own.name) == path.name:
                folders = own.parent.parts
                pairs = zip(folders[::-1], path.parent.parts[::-1], strict=False)
                shared = next((n for n, (a, b) in enumerate(pairs) if a != b), len(folders))
                ranked.append(((same, k == 0, shared, shared == len(folders), own.name == path.name), entry))
    most = max((rank for rank, _ in ranked), default=(False, False, 0, False, False))
    best = [entry for rank, entry in ranked if rank == most]
    if len({str(entry.get("id")) for entry in best}) != 1:
        listed = ", ".join(_names(entry)[0] for entry in best[:4])
        several = f"{len(best)} images that may be {path.name}: {listed}" if best else f"no image called {path.name}"
        raise DataError(f"{file} has {several}; give --image-id")
    if not most[3]:
        log.warning("%s: %s is matched to %s only by file name", file, _names(best[0])[0], image)
    return best[0]


# ---------------------------------------------------------------------------------------------------------------------
# A whole file


class InstancesFile:
    """The images, objects and category names of one file; what cannot be used is noted in ``rejects``.

    Args:
        path: The JSON file.
        rejects: Where faults are noted.
        shapes: What is wanted of each object. Without ``"box"``, an object without a sound mask is left out.
        folder: Folder of the images; None does not look for them.
        check: Leave out images that are missing (``"missing"``), or those of another size too (``"size"``).
        crowds: ``"leave out"`` groups of objects, ``"take"`` them for objects, or ``"keep"`` them apart by ``crowd``.
        wanted: Ids of the images whose objects are read; None for all.
        known: Ids of images that earlier files had.

    Attributes:
        names: Categories by id; of two ids of one name, the first that is used stands for both.
        images: Ids in ascending order, with ``widths``, ``heights`` and ``paths`` beside them.
        ids: Objects in the order of their images and ids, below 0 without one; beside them the ``places`` of their
            images, ``categories`` (ids), ``boxes`` (N, 4), xyxy in the image, ``areas`` (NaN if unknown), ``crowd``.
        groups: Image, category, box as given (x, y, width, height) and area of each crowd that is left out.
        faulty: Ids of annotations that cannot be used.
        federated: What LVIS' rules go by, None where not every image and category has it.

    Raises:
        DataError: The file is missing, not JSON or not of this format.
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
        self._then = "the object is left out" if shapes == "mask" else "its box is kept"
        self._texts: dict[int, str] = {}  # ids that are text
        self._categories: dict[int, dict[str, Any]] = {}
        self._entries: dict[int, dict[str, Any]] = {}  # images
        self._left_out: set[int] = set()  # images
        self._rows = bytearray()  # packed annotations, since a million tuples would take a gigabyte
        self._masks: list[Mask] = []
        breaks = rejects.counts[TRUNCATED]
        readers = {"images": self._read_image, "annotations": self._read_annotation, "categories": self._read_category}
        counts = dict.fromkeys(readers, 0)
        for key, entry in iter_arrays(path, tuple(readers), rejects):
            try:
                readers[key](entry, counts[key])
            except Fault as fault:
                rejects.add(fault.kind, path, f"{key}[{counts[key]}]", fault.reason)
            counts[key] += 1
        if not self._categories and rejects.counts[TRUNCATED] > breaks:
            raise DataError(f"{path}: truncated before its categories: {rejects.last}")
        self._settle_categories()
        self._settle_images()
        self._settle_objects()

    def name_of(self, number: int) -> int | str:
        """An id as the file has it; ``annotations[7]`` for an object without one."""
        return self._texts.get(number, number) if number >= 0 else f"annotations[{number - _NO_ID}]"

    def size(self, place: int) -> tuple[int, int]:
        """Width and height of one of the images in pixels."""
        return int(self.widths[place]), int(self.heights[place])

    def mask(self, index: int) -> Region | None:
        """The mask of one of the objects, polygons or RLE; None without a sound one."""
        return self._masks[index].region()

    def rings(self, index: int) -> list[NDArray[np.float64]]:
        """The rings of one of the objects, each (N, 2) xy in pixels; none unless it has sound polygons."""
        return [np.reshape(ring, (-1, 2)) for ring in self._masks[index].rings]

    def _number(self, entry: Any, what: str) -> int:
        """The id of an image or category."""
        number = number_of(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            raise Fault(MALFORMED, f"expected {what}, got {short(entry)}")
        if number >> 62:
            self._texts[number] = entry["id"]
        return number

    def _read_category(self, entry: Any, place: int) -> None:
        number = self._number(entry, "id and name")
        name = plain_text(entry.get("name"), "category name")
        known = self._categories.setdefault(number, {**entry, "name": name})["name"]
        if known != name:
            raise DataError(
                f"{self.path}: expected one name for category {number}, got {known!r} and {name!r}; "
                "use the original file"
            )

    def _read_image(self, entry: Any, place: int) -> None:
        number = self._number(entry, "an image's id")
        if number in self._known:
            self._left_out.add(number)
        if number in self._entries or number in self._known:
            raise Fault("duplicate id", f"expected each image once, got {self.name_of(number)} again")
        if self._wanted is None or number in self._wanted:
            needed = ("width", "height", "file_name", "coco_url", "extra", *_LVIS)
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
        mask = row.mask
        for fault in mask.faults:
            self._leave_out(own_id, fault, self._then if fault.kind != _THIN else "")
        if self._shapes == "box":  # only the size of RLE matters, which must be the image's
            mask = Mask(rle={"size": mask.rle.get("size")}) if mask.rle else Mask()
        self._rows += _PACKED.pack(own_id, row.image, row.category, row.crowd, row.boxless, *row.box, row.area)
        self._masks.append(mask)

    def _settle_categories(self) -> None:
        """Leave out unused supercategories, and merge categories of the same name."""
        used = set(np.frombuffer(self._rows, _ROW)["category"].tolist())
        above = {number: entry.get("supercategory") for number, entry in self._categories.items()}
        roots = (None, "", "none")
        headings = {str(above[k]) for k, entry in self._categories.items() if above[k] not in (*roots, entry["name"])}
        first: dict[str, int] = {}
        self._alias: dict[int, int] = {}
        # Roboflow begins with a root category that no annotation has.
        for number in sorted(self._categories, key=lambda number: (number not in used, number)):
            name = self._categories[number]["name"]
            is_root = above[number] in roots and name in headings
            if name in first and number in used:
                told = "%s: categories %s and %s are both called %r and are merged"
                log.warning(told, self.path, self.name_of(first[name]), self.name_of(number), name)
            if name in first or number in used or not (is_root or name in _NO_CLASS):
                self._alias[number] = first.setdefault(name, number)
        self.names = {
            number: entry["name"] for number, entry in self._categories.items() if self._alias.get(number) == number
        }

    def _settle_images(self) -> None:
        """Find the images' files, and leave out images that cannot be used."""
        listed = [
            {self.name_of(k): each[key] for k, each in self._entries.items() if type(each.get(key)) is list}
            for key in _LVIS
        ]
        is_lvis = all(0 < len(self._entries) == len(each) for each in listed)
        frequency = {number: self._categories[number].get("frequency") for number in self.names}
        self.federated: dict[str, Any] | None = None
        if is_lvis and all(each in ("r", "c", "f") for each in frequency.values()):
            self.federated = {"absent": listed[0], "partly": listed[1], "frequency": frequency}
        finder = ImageFinder(list(self._entries.values()), self._folder, is_lvis)
        frames: dict[int, tuple[int, int, str]] = {}
        for number, entry in self._entries.items():
            try:
                frames[number] = self._frame(entry, finder)
            except Fault as fault:
                self._left_out.add(number)
                self._rejects.add(fault.kind, self.path, f"image {self.name_of(number)}", fault.reason)
        if found := finder.by_last_part:
            told = "%s: %s matched only by file name, such as %s; check --images"
            log.warning(told, self.path, many(len(found), "image"), found[0])
        self._entries.clear()
        self.images: NDArray[np.int64] = np.array(sorted(frames), np.int64)
        ordered = [frames[number] for number in self.images.tolist()]
        self.widths = np.array([frame[0] for frame in ordered], np.int64)
        self.heights = np.array([frame[1] for frame in ordered], np.int64)
        self.paths = [frame[2] for frame in ordered]

    def _frame(self, entry: Mapping[str, Any], finder: ImageFinder) -> tuple[int, int, str]:
        """Width, height and path of an image; Fault where it cannot be used."""
        width, height = stated_size(entry) or (None, None)
        path = finder.find(entry)
        file = None if self._folder is None else f"{self._folder}/{path}"
        if file is not None and self._check == "size":
            width, height = check_image(file, width, height)
        elif file is not None and self._check == "missing" and not os.path.isfile(file):
            raise Fault("image file missing", f"expected an image at {file}, found none")
        if not (width and height):
            if file is None or (measured := known_size(file)) is None:
                raise Fault("image without size", "expected width and height, or an image that can be measured")
            width, height = measured
        return width, height, path

    def _settle_objects(self) -> None:
        """Check the annotations against images and categories, and sort the valid ones."""
        image_places = {number: place for place, number in enumerate(self.images.tolist())}
        sizes = list(zip(self.widths.tolist(), self.heights.tolist(), strict=True))
        seen: set[int] = set()
        overhung = 0
        self.faulty: set[int] = set()
        self.groups: list[tuple[int, int, list[float], float]] = []
        kept, places, boxes = array("q"), array("q"), array("d")
        masks: list[Mask] = []
        for k, row in enumerate(_PACKED.iter_unpack(self._rows)):
            number, image, given, crowd, boxless, *bounds, area = row
            mask, place, category = self._masks[k], image_places.get(image, -1), self._alias.get(given, -1)
            width, height = sizes[place] if place >= 0 else (0, 0)
            fits = mask.rle is None or mask.rle.get("size") == [height, width]
            repeated = number in seen
            seen.add(number)
            try:
                if place < 0:
                    absent = "an image left out" if image in self._left_out else "an absent image"
                    raise Fault(f"annotation of {absent}", f"expected a usable image, got {self.name_of(image)}")
                if repeated:
                    raise Fault("duplicate id", "expected each annotation once, got its id again")
                if category not in self.names:
                    raise Fault("unknown category", f"expected a category of the file, got {self.name_of(given)}")
                if boxless and not fits:
                    raise Fault("RLE of another size", "expected the size of its image, or a bbox")
                try:
                    box = annotated_box(bounds, width, height)
                except Fault:  # a mask alone is asked about, and has a box of its own
                    if self._shapes != "mask" or not fits or (around := mask.bounds()) is None:
                        raise
                    box = annotated_box(around, width, height)
            except Fault as fault:
                self._leave_out(number, fault)
                self.faulty.update([number] if place >= 0 else [])
                continue
            overhung += overhangs(bounds, width, height)
            if crowd and self._crowds == "leave out":
                self._leave_out(number, Fault(CROWD, "expected one object, got a crowd; --crowds includes it"))
                self.groups.append((image, category, bounds, area))
                continue
            if mask.rle and not fits and self._crowds != "keep":
                reason = f"expected the size {[height, width]} of its image, got {short(mask.rle.get('size'))}"
                self._leave_out(number, Fault("RLE of another size", reason), self._then)
                mask = Mask(sound=False)
            kept.append(k)
            places.append(place)
            boxes.extend(box)
            masks.append(mask)
        warn_of_overhang(overhung, len(kept), self.path)
        rows = np.frombuffer(self._rows, _ROW)[np.array(kept, np.intp)]
        if self._shapes != "box":
            self._check_masks(rows["id"].tolist(), masks, [sizes[place] for place in places])
        order = np.lexsort((rows["id"], np.array(places, np.int64)))
        if self._shapes == "mask":
            order = order[[bool(masks[k].rings or masks[k].rle) for k in order]]
        rows, self.places = rows[order], np.array(places, np.int64)[order]
        self.ids, self.areas = rows["id"].copy(), rows["area"].copy()
        self.categories = np.array([self._alias[number] for number in rows["category"].tolist()], np.int64)
        self.crowd = rows["crowd"] & (self._crowds == "keep")
        self.boxes = np.array(boxes).reshape(-1, 4)[order]
        self._masks = [masks[k] for k in order]
        del self._rows

    def _leave_out(self, number: int, fault: Fault, then: str = "") -> None:
        reason = f"{fault.reason}; {then}" if then else fault.reason
        self._rejects.add(fault.kind, self.path, self.name_of(number), reason)

    def _check_masks(self, ids: Sequence[int], masks: list[Mask], sizes: Sequence[tuple[int, int]]) -> None:
        """Drop invalid masks, and note objects that lack a required one."""
        for start in range(0, len(masks), _AT_ONCE):
            part = range(start, min(start + _AT_ONCE, len(masks)))
            clear = _clear_polygons([(masks[k].rings, sizes[k]) for k in part])
            for k, is_clear in zip(part, clear, strict=True):
                try:
                    if not is_clear and (region := masks[k].region()) is not None:
                        region.check(*sizes[k], "mask")
                except RegionError as error:
                    self._leave_out(ids[k], Fault("mask that makes no sense", str(error)), self._then)
                    masks[k] = Mask(sound=False)
                if self._shapes == "mask" and masks[k].sound and not (masks[k].rings or masks[k].rle):
                    reason = "expected a mask, got a box alone; convert boxes, or both"
                    self._leave_out(ids[k], Fault("object without a mask", reason))


def _clear_polygons(drawn: "Sequence[tuple[Sequence[array[float]], tuple[int, int]]]") -> NDArray[np.bool_]:
    """Which masks are certainly valid polygons in an image of that size, many at a time.

    Only the first ring is looked at: if it is sound and inside, so is the whole.
    """
    clear = np.zeros(len(drawn), bool)
    chosen = [k for k, (rings, _) in enumerate(drawn) if rings]
    if chosen:
        first = [np.reshape(drawn[k][0][0], (-1, 2)) for k in chosen]
        owners = np.repeat(np.arange(len(first)), [len(ring) for ring in first])
        polygons = shapely.polygons(shapely.linearrings(np.concatenate(first), indices=owners))
        bounds, limits = shapely.bounds(polygons), np.array([drawn[k][1] for k in chosen])
        inside = (bounds[:, :2] >= 0).all(axis=1) & (bounds[:, 2:] <= limits).all(axis=1)
        inside &= (bounds[:, 2:] > 1).any(axis=1)  # else it looks normalized
        clear[chosen] = inside & (shapely.area(polygons) >= 2 * MIN_AREA) & shapely.is_valid(polygons)
    return clear


def read_captions(paths: Sequence[Path], images: Set[int], rejects: Rejects) -> dict[int, list[tuple[int, str]]]:
    """Captions of usable images with their ids, by image, in the order of their ids.

    Raises:
        DataError: A file is of another format, or all its captions are of other images.
    """
    captions: dict[int, list[tuple[int, str]]] = {}
    seen: set[int] = set()
    for path in paths:
        apart, before = False, len(seen)
        for place, entry in enumerate(iter_array(path, "annotations", rejects)):
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
            raise DataError(
                f"{path}: no caption is of an image that can be used and is in the instances file; "
                "give files that belong together"
            )
    return {image: sorted(found) for image, found in captions.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Several files as one list of annotated images


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
        objects = sum(len(image.objects) for image in self.images)
        captions = sum(len(image.captions) for image in self.images)
        faults = ", ".join(f"{count} {kind}" for kind, count in self.skipped.items()) or "nothing"
        return f"{len(self.images)} images, {objects} objects, {captions} captions; left out: {faults}"


def photo_sources(root: Path, split: str) -> list[CocoSource]:
    """The sources of one split.

    These are ``instances_<split>.json`` with ``images/`` and, where they are there, ``captions_<split>.json`` and
    ``instances_<split>_small.json`` with ``images_small/``.

    Raises:
        DataError: The folder has no such split.
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

    Raises:
        DataError: A file is missing, is not JSON, or is not in COCO's format.
    """
    rejects = Rejects()
    images: list[ImageAnnotations] = []
    known: set[int] = set()
    for source in sources:
        file = InstancesFile(
            source.instances, rejects, shapes="both", folder=source.images, check="missing", crowds="keep", known=known
        )
        ids = file.images.tolist()
        known.update(ids)
        captions = read_captions([source.captions] if source.captions else [], set(ids), rejects)
        objects: list[list[ObjectAnnotation]] = [[] for _ in ids]
        for k, place in enumerate(file.places.tolist()):
            objects[place].append(
                ObjectAnnotation(
                    id=int(file.ids[k]),
                    category=file.names[int(file.categories[k])],
                    box=tuple(file.boxes[k].tolist()),
                    polygons=tuple(tuple(ring.ravel().tolist()) for ring in file.rings(k)) or None,
                    iscrowd=bool(file.crowd[k]),
                )
            )
        for place, number in enumerate(ids):
            width, height = file.size(place)
            sentences = filter(None, (normalise_caption(text) for _, text in captions.get(number, ())))
            images.append(
                ImageAnnotations(
                    path=source.images / file.paths[place],
                    image_id=number,
                    width=width,
                    height=height,
                    objects=tuple(objects[place]),
                    captions=tuple(sentences),
                )
            )
    return CocoData(tuple(images), dict(sorted(rejects.counts.items())))


def normalise_caption(text: str) -> str:
    """A human caption as one sentence, or ``""``: spaces collapsed, first letter capital, one full stop at the end."""
    text = re.split(r"(?<=[a-z)\"][.!?])\s+(?=[A-Z])", " ".join(text.split()))[0].strip(" .,;:!\"'")
    return f"{text[0].upper()}{text[1:]}." if text else ""


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_coco(records: Iterable[Record], path: str | Path) -> dict[str, int]:
    """Write the regions of records as COCO instances, which pycocotools and the source ``coco`` read.

    Boxes and polygons stay what they are; every other region becomes RLE; one without a category is a ``region``. A
    region that several records of an image share is written once. Turns, and records without an image, are left out.

    Returns:
        How many ``images``, ``annotations`` and ``categories`` were written.

    Raises:
        DataError: The file cannot be written.
        RegionError: A region makes no sense in its image.
    """
    images: dict[str, dict[str, Any]] = {}
    categories: dict[str, int] = {}
    annotations: dict[tuple[int, str, str, str], dict[str, Any]] = {}
    for record in records:
        if not record.image:
            continue
        entry = {"file_name": record.image, "width": record.width, "height": record.height}
        image = images.setdefault(record.image, {"id": len(images) + 1, **entry})
        for each in record.regions:
            category = categories.setdefault(each.category or "region", len(categories) + 1)
            drawn = each.region.to_coco(record.width, record.height)
            head = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category, "iscrowd": 0}
            annotations.setdefault((image["id"], each.source_id, each.category, json.dumps(drawn)), head | drawn)
    content = {
        "images": list(images.values()),
        "annotations": list(annotations.values()),
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }
    write_file(path, json.dumps(content, ensure_ascii=False))
    return {name: len(listed) for name, listed in content.items()}

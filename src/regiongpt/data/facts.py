"""Facts about the objects of annotated images, in English, and whether a claim about them is true.

Where a fact is not clear beyond a threshold, there is none:

* an object keeps its facts while at least 30 % of its box is left in a crop; below that its class is only *maybe*
  present, and nothing is counted or asked about the class;
* a colour holds at least 45 % of the sampled pixels (black and grey 60 %) and 1.6 times the second;
* a side relation needs boxes that overlap by at most 20 % of the smaller one along that axis, and centres at least
  twice as far apart along it as along the other.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regiongpt.data.coco import Box, ImageAnnotations, ObjectAnnotation
from regiongpt.errors import DataError
from regiongpt.images import load_image
from regiongpt.prompts import COCO_80

T = TypeVar("T")
MIN_VISIBLE = 0.3
MIN_AREA = 4.0
COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
# Neighbouring names that two people may give to the same paint: never used to tell two objects apart.
CONFUSABLE = {
    frozenset(pair)
    for pair in (
        ("black", "grey"), ("white", "grey"), ("red", "orange"), ("red", "pink"), ("red", "brown"), ("orange", "brown"),
        ("orange", "yellow"), ("yellow", "brown"), ("yellow", "green"), ("purple", "pink"), ("purple", "blue"),
        ("black", "brown"), ("black", "blue"), ("grey", "blue"), ("grey", "brown"), ("yellow", "white"),
        ("orange", "pink"), ("green", "blue"), ("black", "green"), ("grey", "green"), ("pink", "white"),
        ("black", "purple"),
    )
}  # fmt: skip
# What shows in the middle of these boxes is mostly something else; people are not described by a colour at all.
COLOURLESS = frozenset({"person", "dining table", "wine glass", "zebra"})
SEE_THROUGH = frozenset(
    (
        "airplane", "baseball bat", "bed", "bench", "bicycle", "boat", "chair", "fork", "kite", "knife",
        "motorcycle", "potted plant", "scissors", "skateboard", "skis", "snowboard", "spoon", "surfboard",
        "tennis racket", "tie", "toothbrush", "umbrella",
    )
)  # fmt: skip
SIZES = ((0.004, "tiny"), (0.03, "small"), (0.13, "medium-sized"), (0.4, "large"), (1.01, "huge"))


LIMITS = {-1: (-np.inf, 0.31), 0: (0.37, 0.63), 1: (0.69, np.inf), -0.5: (-np.inf, 0.42), 0.5: (0.58, np.inf)}
"""Where a centre clearly lies in a third (-1, 0, 1) or a half of a side, as shares of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewObject:
    """One object as a view shows it; ``box`` is clipped, in the view's pixels."""

    id: int
    category: str
    box: Box
    iscrowd: bool
    source: ObjectAnnotation

    @property
    def area(self) -> float:
        """Area of the clipped box in px^2."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


class View:
    """An annotated image after an optional crop (half-open xyxy in its pixels), then an optional horizontal flip.

    Attributes:
        objects: What is left in sight, crowds included, in annotation order.
        maybe: Classes of which a piece too small to judge is left; neither present nor absent.
    """

    def __init__(self, annotations: ImageAnnotations, crop: Box | None = None, flip: bool = False) -> None:
        x0, y0, x1, y1 = crop if crop is not None else (0.0, 0.0, float(annotations.width), float(annotations.height))
        if not (0 <= x0 < x1 <= annotations.width and 0 <= y0 < y1 <= annotations.height):
            raise DataError(
                f"{annotations.path.name}: expected a crop inside {annotations.width}x{annotations.height}, got {crop}"
            )
        self.annotations, self.crop, self.flip = annotations, (x0, y0, x1, y1), flip
        self.width, self.height = x1 - x0, y1 - y0
        objects: list[ViewObject] = []
        maybe: set[str] = set()
        for source in annotations.objects:
            a0, b0, a1, b1 = source.box
            left, top, right, bottom = max(a0, x0), max(b0, y0), min(a1, x1), min(b1, y1)
            if right <= left or bottom <= top:
                continue
            if (right - left) * (bottom - top) / ((a1 - a0) * (b1 - b0)) < MIN_VISIBLE:
                maybe.add(source.category)
                continue
            left, right = (x1 - right, x1 - left) if flip else (left - x0, right - x0)
            box = (left, top - y0, right, bottom - y0)
            objects.append(
                ViewObject(id=source.id, category=source.category, box=box, iscrowd=source.iscrowd, source=source)
            )
        self.objects = tuple(objects)
        self.maybe = frozenset(maybe)

    @property
    def coverage(self) -> float:
        """Share of the original image's area that the crop keeps."""
        return self.width * self.height / (self.annotations.width * self.annotations.height)

    @cached_property
    def by_category(self) -> dict[str, list[ViewObject]]:
        """Objects and crowds by class."""
        groups: dict[str, list[ViewObject]] = {}
        for each in self.objects:
            groups.setdefault(each.category, []).append(each)
        return groups

    @cached_property
    def askable(self) -> tuple[ViewObject, ...]:
        """Single objects large enough to be pointed at."""
        return tuple(each for each in self.objects if not each.iscrowd and each.area >= MIN_AREA)

    def rings(self, each: ViewObject) -> list[list[float]]:
        """The object's polygon rings, flat ``[x, y, x, y, ...]`` in view pixels, not clipped; none for a bare box."""
        x0, y0, x1, _ = self.crop
        rings = []
        for flat in each.source.polygons or ():
            points = np.array(flat)
            points[0::2] = x1 - points[0::2] if self.flip else points[0::2] - x0
            points[1::2] -= y0
            rings.append(points.tolist())
        return rings

    def count(self, category: str) -> int | None:
        """How many of a class are in sight, or None where a crowd or a cut piece leaves it open."""
        group = self.by_category.get(category, [])
        return None if category in self.maybe or any(each.iscrowd for each in group) else len(group)


def colour_name(pixels_N3: NDArray[np.uint8]) -> str | None:
    """The one of :data:`COLOURS` that clearly dominates uint8 RGB pixels (N, 3), or None.

    Pixels between two names (beige, teal, dark red) count against all.
    """
    if len(pixels_N3) == 0:
        return None
    rgb = pixels_N3.astype(np.float32) / 255.0
    high, low = rgb.max(axis=1), rgb.min(axis=1)
    span = high - low
    sat = span / np.maximum(high, 1e-6)
    r, g, b = rgb.T
    safe = np.maximum(span, 1e-6)
    hue = 60.0 * np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    red = (hue < 14) | (hue >= 345)
    warm = (hue >= 14) & (hue < 42)
    rules = (
        ("black", (high < 0.2) | ((high < 0.28) & (sat < 0.35))),
        ("white", (sat < 0.14) & (high > 0.8)),
        ("grey", (sat < 0.18) & (high >= 0.28) & (high <= 0.8)),
        ("pink", (red & (sat >= 0.2) & (sat < 0.5) & (high > 0.7)) | ((hue >= 310) & (hue < 345) & (high > 0.5))),
        ("red", red & (sat >= 0.5) & (high >= 0.35)),
        ("orange", warm & (hue < 40) & (sat >= 0.68) & (high >= 0.6)),
        ("brown", (hue >= 8) & (hue < 40) & (sat >= 0.28) & (sat < 0.8) & (high < 0.55)),
        ("yellow", (hue >= 44) & (hue < 68) & (sat >= 0.4) & (high >= 0.55)),
        ("green", (hue >= 72) & (hue < 165) & (sat >= 0.2)),
        ("blue", (hue >= 192) & (hue < 255) & (sat >= 0.35)),
        ("purple", (hue >= 262) & (hue < 310) & (sat >= 0.2)),
    )
    named = np.full(len(rgb), len(COLOURS))
    for name, rule in reversed(rules):  # the first rule that fits a pixel wins
        named[rule] = COLOURS.index(name)
    counts = np.bincount(named, minlength=len(COLOURS) + 1)
    best = int(np.argmax(counts[:-1]))
    share, second = counts[best] / len(rgb), np.delete(counts, best).max() / len(rgb)
    # Windows and shadows make much of a bright thing black or grey.
    needed = 0.6 if COLOURS[best] in ("black", "grey") else 0.45
    return COLOURS[best] if share >= needed and share >= 1.6 * second else None


def colours_of(annotations: ImageAnnotations, image: Image.Image | NDArray[np.uint8]) -> dict[int, str]:
    """The clear colours of an image's objects, by annotation id.

    Looks at the pixels inside the polygon, or inside the central ellipse of the box (0.7 of its sides), less those of
    smaller boxes over it. People, objects under 64 px^2 and box-only objects one can see through have no colour.

    Raises:
        DataError: The image has another size than the annotations.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.shape != (annotations.height, annotations.width, 3):
        raise DataError(
            f"{annotations.path.name}: expected RGB pixels of shape {(annotations.height, annotations.width, 3)}, "
            f"got {pixels.shape}"
        )
    unit = (np.arange(40) + 0.5) / 40
    us, vs = (grid.ravel() for grid in np.meshgrid(unit, unit))
    ellipse = (us - 0.5) ** 2 + (vs - 0.5) ** 2 <= 0.35**2
    boxes = np.array([each.box for each in annotations.objects]).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    colours: dict[int, str] = {}
    for k, each in enumerate(annotations.objects):
        x0, y0, x1, y1 = each.box
        hidden = each.category in COLOURLESS or (each.polygons is None and each.category in SEE_THROUGH)
        if hidden or each.iscrowd or areas[k] < 64 or min(x1 - x0, y1 - y0) < 6:
            continue
        xs, ys = x0 + us * (x1 - x0), y0 + vs * (y1 - y0)
        inside = ellipse if each.polygons is None else _inside(xs, ys, each.polygons)
        xs, ys = xs[inside], ys[inside]
        over = boxes[(areas < 0.8 * areas[k]) & (boxes[:, 0] < x1) & (boxes[:, 2] > x0)
                     & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)]  # fmt: skip
        clear = np.ones(len(xs), dtype=bool)
        for a0, b0, a1, b1 in over:
            clear &= ~((xs >= a0) & (xs < a1) & (ys >= b0) & (ys < b1))
        if clear.sum() < max(0.4 * len(xs), 40):
            continue
        name = colour_name(pixels[ys[clear].astype(int), xs[clear].astype(int)])
        if name is not None:
            colours[each.id] = name
    return colours


def read_colours(annotations: ImageAnnotations) -> dict[int, str]:
    """:func:`colours_of` an image's file; none where that cannot be read or has another size."""
    try:
        image = load_image(annotations.path)
    except DataError:
        return {}
    return colours_of(annotations, image) if image.size == (annotations.width, annotations.height) else {}


def _inside(xs: NDArray[Any], ys: NDArray[Any], rings: Sequence[Sequence[float]]) -> NDArray[np.bool_]:
    """Which points lie in any of the rings, by the even-odd rule."""
    found = np.zeros(len(xs), dtype=bool)
    for flat in rings:
        px, py = np.asarray(flat).reshape(-1, 2).T
        qx, qy = np.roll(px, -1), np.roll(py, -1)
        rise = np.where(qy == py, 1.0, qy - py)
        crosses = (py > ys[:, None]) != (qy > ys[:, None])
        at = px + (ys[:, None] - py) * (qx - px) / rise
        found |= (crosses & (xs[:, None] < at)).sum(axis=1) % 2 == 1
    return found


def size_name(box: Box, width: float, height: float) -> str:
    """The share of the image in a box: tiny < 0.4 %, small < 3 %, medium-sized < 13 %, large < 40 %, huge."""
    share = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    return next(name for limit, name in SIZES if share < limit)


def place_name(box: Box, width: float, height: float) -> str | None:
    """Where in the image a box lies, as coarsely as it must be to be clearly true; ``"of the image"`` can follow.

    The centre falls in one cell of a 3x3 grid with gaps between the cells. In a gap only the other axis is named, or
    the half; a box spanning three quarters of a side is 'across' it.
    """
    u, v = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    wide, tall = box[2] - box[0] > 0.75 * width, box[3] - box[1] > 0.75 * height
    if wide and tall:
        return "across most"
    column, row = _third(u), _third(v)
    if wide:
        return None if row is None else ("across the middle", "across the bottom", "across the top")[row]
    if tall:
        return None if column is None else ("in the middle", "on the right side", "on the left side")[column]
    if column is not None and row is not None:
        return CELLS[row, column]
    if row is not None and row != 0:
        return "in the upper part" if row < 0 else "in the lower part"
    if column is not None and column != 0:
        return "on the left side" if column < 0 else "on the right side"
    if row is None and abs(v - 0.5) > 0.08:
        return "in the upper half" if v < 0.5 else "in the lower half"
    if column is None and abs(u - 0.5) > 0.08:
        return "in the left half" if u < 0.5 else "in the right half"
    return None


CELLS = {
    (-1, -1): "in the upper left", (-1, 0): "at the top", (-1, 1): "in the upper right",
    (0, -1): "on the left", (0, 0): "in the centre", (0, 1): "on the right",
    (1, -1): "in the lower left", (1, 0): "at the bottom", (1, 1): "in the lower right",
}  # fmt: skip
# A phrase's claim about the centre's column and row (keys of LIMITS, None for nothing).
PLACES: Mapping[str, tuple[float | None, float | None]] = {
    "in the upper left": (-1, -1), "at the top": (None, -1), "in the upper right": (1, -1),
    "on the left": (-1, None), "in the centre": (0, 0), "on the right": (1, None),
    "in the lower left": (-1, 1), "at the bottom": (None, 1), "in the lower right": (1, 1),
    "on the left side": (-1, None), "in the middle": (0, 0), "on the right side": (1, None),
    "in the upper part": (None, -1), "in the lower part": (None, 1),
    "in the upper half": (None, -0.5), "in the lower half": (None, 0.5),
    "in the left half": (-0.5, None), "in the right half": (0.5, None),
    "across the top": (None, -1), "across the middle": (None, 0), "across the bottom": (None, 1),
    "across most": (None, None),
}  # fmt: skip


def _third(share: float) -> int | None:
    return next((k for k in (-1, 0, 1) if LIMITS[k][0] < share < LIMITS[k][1]), None)


def relation(a: Box, b: Box) -> str | None:
    """Relation of ``a`` to ``b`` in the image plane, a key of :data:`RELATIONS`, or None when that is not clear.

    A vertical and a horizontal one are joined by ``" and "`` when the boxes are apart along both axes. ``"inside"`` is
    90 % of ``a`` in ``b`` and at most 60 % of its size, ``"around"`` the reverse, ``"overlapping"`` a quarter of the
    smaller box shared.
    """
    aw, ah, bw, bh = a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    apart_x, apart_y = across <= 0.2 * min(aw, bw), down <= 0.2 * min(ah, bh)
    side, level = "to the left of" if dx < 0 else "to the right of", "above" if dy < 0 else "below"
    if apart_x and abs(dx) >= 2 * abs(dy):
        return side
    if apart_y and abs(dy) >= 2 * abs(dx):
        return level
    if apart_x and apart_y:
        return f"{level} and {side}"
    shared = max(across, 0.0) * max(down, 0.0)
    area, other = aw * ah, bw * bh
    if shared >= 0.9 * area and area <= 0.6 * other:
        return "inside"
    if shared >= 0.9 * other and other <= 0.6 * area:
        return "around"
    return "overlapping" if shared >= 0.25 * min(area, other) else None


def clashing(colour: str | None, other: str | None) -> bool:
    """Whether two objects could pass for the same colour; an unknown colour could be any."""
    return colour is None or other is None or colour == other or frozenset((colour, other)) in CONFUSABLE


VAGUE = frozenset({"overlapping", "inside", "around"})


# ---------------------------------------------------------------------------------------------------------------------
# Claims


@dataclass(frozen=True)
class Claim:
    """One claim of a sentence.

    Attributes:
        kind: ``class``, ``colour``, ``size``, ``place``, ``relation`` or ``presence``.
        value: Such as ``"dog"``, ``"animal"``, ``"another"`` (than the class asked for), ``"red"``, ``"large"``,
            ``"at the top"``, ``"above"``, ``"yes"``.
        about: The class that is related to or said to be there; of presence, empty for the one asked about.
        region: Number of the region it is about, 0 for the whole image.
        to: Number of the region that a relation is to, 0 where that is any object of the class.
    """

    kind: str
    value: str
    about: str = ""
    region: int = 1
    to: int = 0


def holds(
    claim: Claim, view: View, regions: Sequence[ViewObject], colours: Mapping[int, str], asked: str = ""
) -> bool | None:
    """Whether a claim is true, or None where annotations and pixels do not decide that.

    A side, half or relation is undecided in the gaps between clear cases, and a colour where none is clear or the two
    could pass for each other.

    Args:
        claim: What was said.
        view: The image that the claim is about.
        regions: Objects that region 1, region 2, ... stand for.
        colours: As :func:`colours_of` gives.
        asked: The class that a question asked for.
    """
    if max(claim.region, claim.to) > len(regions) or 0 < claim.region == claim.to:
        return False  # a region that does not exist, or a region and itself
    name, each = claim.about or asked, regions[claim.region - 1] if claim.region else None
    if claim.kind == "presence":
        return None if name in view.maybe else (name in view.by_category) == (claim.value == "yes")
    assert each is not None
    if claim.kind == "class":
        if claim.value == "another":
            return each.category != name if name else None
        return each.category in GROUPS.get(claim.value, (claim.value,))
    if claim.kind == "colour":
        known = colours.get(each.id)
        return True if known == claim.value else None if clashing(known, claim.value) else False
    if claim.kind == "size":
        return size_name(each.box, view.width, view.height) == claim.value
    if claim.kind == "place":
        return _lies(claim.value, each.box, view.width, view.height)
    others = [o for o in view.objects if o.id != each.id and o.category == name]
    found = [_relates(claim.value, each.box, o.box) for o in ([regions[claim.to - 1]] if claim.to else others)]
    return True if True in found else None if None in found or name in view.maybe else False


def _lies(place: str, box: Box, width: float, height: float) -> bool | None:
    spans = (box[2] - box[0] > 0.75 * width, box[3] - box[1] > 0.75 * height)
    if place.startswith("across") and not (all(spans) if place == "across most" else spans[0]):
        return False
    centre = ((box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height)
    found: list[bool | None] = []
    for part, share in zip(PLACES[place], centre, strict=True):
        if part is not None:
            (low, high), gap = LIMITS[part], 0.06 if part in (-1, 0, 1) else 0.16
            found.append(True if low < share < high else None if low - gap <= share <= high + gap else False)
    return False if False in found else None if None in found else True


def _relates(how: str, a: Box, b: Box) -> bool | None:
    times = (a[2] - a[0]) * (a[3] - a[1]) / ((b[2] - b[0]) * (b[3] - b[1]))
    if how in ("bigger than", "smaller than"):
        times = times if how == "bigger than" else 1 / times
        return True if times >= 1.3 else None if times > 1 / 1.3 else False
    if how == "about as big as":
        return True if 1 / 1.3 < times < 1.3 else None if 1 / 1.6 < times < 1.6 else False
    found = relation(a, b)
    if found is None:
        return None
    return set(how.split(" and ")) <= {*found.split(" and "), *(["overlapping"] if found in VAGUE else [])}


# ---------------------------------------------------------------------------------------------------------------------
# Facts in English: one table of templates, filled to write and matched to read. A random generator picks among the
# wordings; each sentence stands alone.


GROUPS = {
    "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    "vehicle": ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    "food": ("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
    "furniture": ("chair", "couch", "bed", "dining table", "bench"),
    "tableware": ("wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    "sports equipment": (
        "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
        "surfboard", "tennis racket",
    ),
    "electronic device": ("tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    "bag": ("backpack", "handbag", "suitcase"),
}  # fmt: skip
"""Wider words for classes that are easily taken for each other."""
OBJECT = "object"
"""A word for anything, which claims no class."""
HEADS = {"skis": "pair of", "scissors": "pair of", "broccoli": "piece of"} | dict.fromkeys(
    ("food", "furniture", "tableware", "sports equipment"), "piece of"
)
PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"} | {word: word for word in HEADS}
FRAMES = ("the image", "the image", "the picture", "the photo")
RELATIONS = {
    "to the left of": ("to the left of", "left of", "on the left of"),
    "to the right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
    "inside": ("within the area of",),
    "around": ("around",),
    "overlapping": ("overlapping", "partly overlapping"),
}
CALLED, UNNAMED = "It is {a}.", "It is something I can't name."
BRIEF = ("{A}.", "{A} {place}.")
OPENINGS = (
    "{A} {place}.",
    "{A}.",
    "There is {a} {place}.",
    "This is {a} {place}.",
    "This is {a}.",
    "It is {a} {place}.",
    "The region shows {a}.",
)
PLACED, COLOURED = "It is {place}.", "It is {colour}."
SIZED = {
    "tiny": "It takes up a tiny part of the image.",
    "small": "It takes up a small part of the image.",
    "medium-sized": "It takes up a fair part of the image.",
    "large": "It takes up a large part of the image.",
    "huge": "It fills much of the image.",
}
CHECKED = {"yes": "Yes, it is {a}.", "no": "No, it is {a}."}
OTHER = "No, it is something else."
COMPARED = {
    "bigger than": "Yes, it is bigger in the image.",
    "smaller than": "No, it is smaller in the image.",
    "about as big as": "No, they are about the same size in the image.",
}
APART = (
    "The {first} is {how} the {second}.",
    "It is {how} the {second}.",
    "Region [{i}] is {how} Region [{j}].",
    "The {first} in Region [{i}] is {how} the {second} in Region [{j}].",
)
ALIKE = (
    "Region [{i}] is {how} Region [{j}].",
    "Both are {boths}; Region [{i}] is {how} Region [{j}].",
    "The {first} in Region [{i}] is {how} the {second} in Region [{j}].",
)
OVERLAP = (
    "The {first} and the {second} {overlap}.",
    "Region [{i}] and Region [{j}] {overlap}.",
    "The {first} in Region [{i}] and the {second} in Region [{j}] {overlap}.",
)
YES = ("Yes.", "Yes.", "Yes, there is {some} in {frame}.", "Yes, I can see {some}.")
NO = ("No.", "No.", "No, there is no {none} in {frame}.", "No, I can't see any {nones}.")
SHOWN = (
    "There is {some}.",
    "There is {some} and {second_thing}.",
    "There is {some}, {second_thing} and {third_thing}.",
)
UNKNOWN = "I can't tell."
"""The answer to what cannot be known from an image, or by this model."""


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely."""
    return options[int(rng.random() * len(options))]


def plural(category: str) -> str:
    """``"dogs"``, ``"people"``, ``"pairs of skis"``."""
    word = PLURALS.get(category) or category + ("es" if category.endswith(("s", "x", "ch", "sh")) else "s")
    head = HEADS.get(category)
    return f"{head.replace(' ', 's ')} {word}" if head else word


def noun(category: str, *adjectives: str) -> str:
    """The class with its adjectives and no article: ``"small red car"``, ``"pair of black skis"``."""
    words = " ".join((*filter(None, adjectives), category))
    return f"{HEADS[category]} {words}" if category in HEADS else words


def with_article(phrase: str) -> str:
    """Puts ``a`` or ``an`` before a noun phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_SINGULAR = {noun(name): name for name in COCO_80}
_PLURAL = {plural(name): name for name in COCO_80}
_HOW = {words: how for how, wordings in RELATIONS.items() for words in wordings} | {
    each: each
    for level in ("above", "below")
    for side in ("left", "right")
    for each in [f"{level} and to the {side} of"]
}
_PHRASE = re.compile(
    rf"(?:{_any(HEADS.values())} )?(?:(?P<size>{_any(name for _, name in SIZES)}) )?"
    rf"(?:(?P<colour>{_any(COLOURS)}) )?(?P<name>{_any([*COCO_80, *GROUPS, OBJECT])})"
)
_N, _NS = _any(_SINGULAR), _any(_PLURAL)
_A = rf"[Aa]n? {re.sub('P<[a-z]+>', ':', _PHRASE.pattern)}"
_SLOTS = dict.fromkeys(("a", "A"), _A)
_SLOTS |= dict.fromkeys(("first", "second", "none"), _N) | dict.fromkeys(("boths", "nones"), _NS)
_SLOTS |= {"how": _any(_HOW), "frame": _any(FRAMES), "some": rf"an? {_N}", "colour": _any(COLOURS)}
_SLOTS |= {"n": _any([*_SINGULAR, *COCO_80]), "place": rf"{_any(PLACES)}(?: of {_any(FRAMES)})?"}
_SLOTS |= dict.fromkeys(("second_thing", "third_thing"), _SLOTS["some"])
_SLOTS |= {"i": r"[1-9]\d*", "j": r"[1-9]\d*", "overlap": "overlap"}


@cache
def _grammar(task: str) -> list[tuple[re.Pattern[str], tuple[Claim, ...]]]:
    """Patterns of a task's sentences, each with the claims that stand in no slot."""
    sized: list[tuple[str, tuple[Claim, ...]]] = [(each, (Claim("size", size),)) for size, each in SIZED.items()]
    described = [*((each, ()) for each in (*OPENINGS, "There is {a}.", PLACED)), *sized]
    tables: dict[str, list[tuple[str, tuple[Claim, ...]]]] = {
        "describe": described,
        "classify": [("{n}", ()), (CALLED, ()), (UNNAMED, ()), *described],
        "relation": [(each, ()) for each in (*APART, *ALIKE, *OVERLAP)],
        "presence": [(each, ()) for each in (*YES, *NO, *SHOWN) if "{" in each]
        + [(f"{word.capitalize()}.", (Claim("presence", word, region=0),)) for word in ("yes", "no")],
        "image_caption": [(each, ()) for each in SHOWN],
        "where": [(PLACED, ())],
        "size": sized,
        "colour": [(COLOURED, ())],
        "check": [*((each, ()) for each in CHECKED.values()), (OTHER, (Claim("class", "another"),))],
        "compare": [(each, (Claim("relation", how, to=2),)) for how, each in COMPARED.items()],
    }

    def compiled(template: str) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", template)
        return re.compile("".join(rf"(?P<{p}>{_SLOTS[p]})" if k % 2 else re.escape(p) for k, p in enumerate(parts)))

    return [(compiled(template), claims) for template, claims in [*tables.get(task, []), (UNKNOWN, ())]]


def read(task: str, text: str) -> tuple[list[Claim], list[str]]:
    """The claims of an answer, each once, and those of its sentences that no template of the task writes.

    Args:
        task: ``describe`` (of brief ones too), ``classify`` (with or without the closed set), ``relation``,
            ``presence``, ``image_caption``, or a key of ``prompts.COMMON``.
        text: The answer.
    """
    claims: dict[Claim, None] = {}
    unread = []
    for sentence in re.split(r"(?<=\.) ", text.strip()):
        found = next(((m, more) for each, more in _grammar(task) if (m := each.fullmatch(sentence))), None)
        if found is None:
            unread.append(sentence)
        else:
            claims |= dict.fromkeys([*found[1], *_meant(found[0].groupdict())])
    return list(claims), unread


def _meant(found: Mapping[str, str]) -> Iterator[Claim]:
    """The claim made by the words in a template's slots."""
    i, j = int(found.get("i", 1)), int(found.get("j", 2))
    for slot, words in found.items():
        if slot in ("a", "A", "first", "second", "n"):
            match = _PHRASE.fullmatch(words.split(" ", 1)[1] if slot in ("a", "A") else words)
            assert match
            if match["name"] != OBJECT:
                yield Claim("class", match["name"], region=j if slot == "second" else i)
            yield from (Claim(kind, match[kind]) for kind in ("size", "colour") if match[kind])
        elif slot == "boths":
            yield from (Claim("class", _PLURAL[words], region=k) for k in (i, j))
        elif slot == "place":
            yield Claim("place", words.split(" of the ")[0])
        elif slot == "colour":
            yield Claim("colour", words)
        elif slot in ("how", "overlap"):
            yield Claim("relation", _HOW.get(words, "overlapping"), region=i, to=j)
        elif slot in ("none", "nones", "some", "second_thing", "third_thing"):
            yield Claim("presence", "no" if slot.startswith("none") else "yes", _named(words), region=0)


def _named(words: str) -> str:
    """The class in a phrase that ends in it."""
    known = {**_SINGULAR, **_PLURAL}
    return known[max((each for each in known if words.endswith(each)), key=len)]

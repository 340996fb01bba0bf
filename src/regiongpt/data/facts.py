"""Facts about the objects of annotated images, and whether a claim about them is true.

Where a fact is not clear beyond a threshold, there is none:

* an object keeps its facts while at least 30 % of its box is left in a crop; below that its class is only *maybe*
  present, and nothing is counted or asked about the class;
* a colour holds at least 45 % of the sampled pixels (black and grey 60 %) and 1.6 times the second;
* a side relation needs boxes that overlap by at most 20 % of the smaller one along that axis, and centres at least
  twice as far apart along it as along the other;
* a superlative needs 6 % of the image side, or 1.6 times the area, over every rival.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regiongpt.data.coco import Box, ImageAnnotations, ObjectAnnotation
from regiongpt.errors import DataError
from regiongpt.images import load_image

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
    """One object as a view shows it: ``box`` is clipped, in the view's pixels; ``visible`` is the share of box left."""

    id: int
    category: str
    box: Box
    visible: float
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
            visible = (right - left) * (bottom - top) / ((a1 - a0) * (b1 - b0))
            if visible < MIN_VISIBLE:
                maybe.add(source.category)
                continue
            left, right = (x1 - right, x1 - left) if flip else (left - x0, right - x0)
            objects.append(
                ViewObject(
                    id=source.id,
                    category=source.category,
                    box=(left, top - y0, right, bottom - y0),
                    visible=visible,
                    iscrowd=source.iscrowd,
                    source=source,
                )
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
        return _CELLS[row + 1][column + 1]
    if row is not None and row != 0:
        return "in the upper part" if row < 0 else "in the lower part"
    if column is not None and column != 0:
        return "on the left side" if column < 0 else "on the right side"
    if row is None and abs(v - 0.5) > 0.08:
        return "in the upper half" if v < 0.5 else "in the lower half"
    if column is None and abs(u - 0.5) > 0.08:
        return "in the left half" if u < 0.5 else "in the right half"
    return None


_CELLS = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the centre", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
# What a phrase claims of the centre's column and row (keys of LIMITS, None for nothing).
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
    """How ``a`` lies to ``b`` in the image plane, a key of :data:`RELATIONS`, or None when that is not clear.

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


def neighbours(view: View, each: ViewObject, limit: int = 3) -> list[tuple[ViewObject, str]]:
    """The nearest objects of different classes to which an object clearly relates, with its relation to each."""
    x0, y0, x1, y1 = each.box
    ranked = []
    for other in view.objects:
        if other.id != each.id and other.area >= 0.001 * view.width * view.height:
            a0, b0, a1, b1 = other.box
            gap = max(a0 - x1, x0 - a1, 0.0) + max(b0 - y1, y0 - b1, 0.0)
            ranked.append((gap / (other.area**0.5), other.id, other))
    found: list[tuple[ViewObject, str]] = []
    classes: set[str] = set()
    for _, _, other in sorted(ranked)[:12]:
        how = relation(each.box, other.box) if other.category not in classes else None
        if how is not None:
            found.append((other, how))
            classes.add(other.category)
            if len(found) == limit:
                break
    return found


def clashing(colour: str | None, other: str | None) -> bool:
    """Whether two objects could pass for the same colour; an unknown colour could be any."""
    return colour is None or other is None or colour == other or frozenset((colour, other)) in CONFUSABLE


def distinctions(view: View, each: ViewObject, colours: Mapping[int, str]) -> list[tuple[str, str]]:
    """All facts that single out an object among everything in the image.

    Returns:
        (kind, value) pairs that :func:`express` takes; none when a crowd or a cut piece of the class leaves it open.
    """
    count = view.count(each.category)
    if count is None or each.iscrowd:
        return []
    rivals = [other for other in view.by_category[each.category] if other.id != each.id]
    if not rivals:
        return [("class", "")]
    if len(rivals) > 7:  # beyond this the annotators may have left some out
        return []
    facts: list[tuple[str, str]] = []
    colour = colours.get(each.id)
    if colour is not None and not any(clashing(colour, colours.get(other.id)) for other in rivals):
        facts.append(("colour", colour))
    place = place_name(each.box, view.width, view.height)
    if place in _EXACT_PLACES and all(_elsewhere(place, other, view) for other in rivals):
        facts.append(("place", place))
    facts.extend(("most", which) for which in _superlatives(view, each, rivals))
    for anchor, how in neighbours(view, each):
        if anchor.category == each.category or anchor.iscrowd or view.count(anchor.category) != 1 or how in _VAGUE:
            continue
        words = set(how.split(" and "))
        others = [relation(other.box, anchor.box) for other in rivals]
        if all(other is not None and not words & set(other.split(" and ")) for other in others):
            facts.append(("relation", f"{how}|{anchor.category}"))
    return facts


_VAGUE = frozenset({"overlapping", "inside", "around"})
_EXACT_PLACES = frozenset(name for row in _CELLS for name in row)


def _elsewhere(place: str, other: ViewObject, view: View) -> bool:
    """Whether a rival is clearly out of a cell: its centre at least 8 % of a side beyond the cell's limits."""
    row, column = next((r, c) for r, names in enumerate(_CELLS) for c, name in enumerate(names) if name == place)
    centre = ((other.box[0] + other.box[2]) / 2 / view.width, (other.box[1] + other.box[3]) / 2 / view.height)
    return any(
        share < LIMITS[k - 1][0] - 0.08 or share > LIMITS[k - 1][1] + 0.08
        for share, k in zip(centre, (column, row), strict=True)
    )


def _superlatives(view: View, each: ViewObject, rivals: Sequence[ViewObject]) -> list[str]:
    found = []
    for axis, side, names in ((0, view.width, ("left", "right")), (1, view.height, ("top", "bottom"))):
        low, high = each.box[axis], each.box[axis + 2]
        margin = 0.12 * side  # twice the 6 %, since sums of two edges are compared
        if all(o.box[axis] + o.box[axis + 2] - low - high >= margin and o.box[axis] >= low for o in rivals):
            found.append(names[0])
        if all(low + high - o.box[axis] - o.box[axis + 2] >= margin and o.box[axis + 2] <= high for o in rivals):
            found.append(names[1])
    if all(each.area >= 1.6 * o.area for o in rivals):
        found.append("large")
    if all(1.6 * each.area <= o.area for o in rivals):
        found.append("small")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Claims


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "many")


@dataclass(frozen=True)
class Claim:
    """One thing that a sentence says.

    Attributes:
        kind: ``class``, ``colour``, ``size``, ``place``, ``count``, ``relation`` or ``presence``.
        value: Such as ``"dog"``, ``"red"``, ``"large"``, ``"at the top"``, ``"one"``, ``"above"``, ``"yes"``.
        about: The class that is counted, related to or said to be there; of presence, empty for the one asked about.
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

    A side, half or relation is undecided in the gaps between clear cases, a count where there is a crowd, and a colour
    where none is clear or the two could pass for each other.

    Args:
        claim: What was said.
        view: Of what.
        regions: Objects that region 1, region 2, ... stand for.
        colours: As :func:`colours_of` gives.
        asked: The class that a question about presence asked for.
    """
    if max(claim.region, claim.to) > len(regions) or 0 < claim.region == claim.to:
        return False  # of a region that there is not, or of a region and itself
    name, each = claim.about or asked, regions[claim.region - 1] if claim.region else None
    if claim.kind == "presence":
        return None if name in view.maybe else (name in view.by_category) == (claim.value == "yes")
    if claim.kind == "count":
        if each is not None and each.category != name:
            return False
        count = view.count(name)
        return None if count is None else NUMBERS[min(count, len(NUMBERS) - 1)] == claim.value
    assert each is not None
    if claim.kind == "class":
        return each.category == claim.value
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
    found = relation(a, b)
    if found is None:
        return None
    return set(how.split(" and ")) <= {*found.split(" and "), *(["overlapping"] if found in _VAGUE else [])}

"""Drawings of regions, outlined, numbered and captioned on their image, with Pillow and numpy."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from regiongpt.errors import ConfigError, DataError, short
from regiongpt.images import ImageSource, load_image
from regiongpt.regions import Region
from regiongpt.storage import check_writable, reason, write_file

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

# Okabe and Ito's palette, which people with every kind of colour vision can tell apart, in the order that keeps
# neighbours furthest apart. Numbers, not colours, carry the meaning: from the eighth region on, colours repeat.
COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
    (240, 228, 66),
)
MIN_SIDE = 640  # images smaller than this are enlarged, or neither outline nor number could be read
FILL_OPACITY = 0.15
MOST_CELLS = 2**20  # largest grid on which a region is measured
INK: Colour = (33, 33, 33)
FAINT: Colour = (112, 112, 112)
PAPER: Colour = (255, 255, 255)


def draw_regions(
    image: ImageSource,
    regions: Sequence[Region],
    captions: Sequence[str | None] | None = None,
    *,
    dialogue: Sequence[tuple[str, str]] = (),
) -> Image.Image:
    """Draw numbered regions on their image, with captions on a white panel beneath it.

    Every region gets a translucent fill, an outline with a dark rim, and a tag with its number, the N of its
    ``<regionN>``. An image whose longer side is under 640 pixels is enlarged to that.

    Args:
        image: What :func:`regiongpt.load_image` takes.
        regions: Regions in pixels of that image, in the order of their numbers.
        captions: One text a region, ``None`` or empty for no caption; the list may be left out.
        dialogue: Questions and their answers, written beneath the captions; ``<regionN>`` in them becomes ``[N]``.

    Raises:
        DataError: The image cannot be read.
        RegionError: A region does not fit the image.
        ConfigError: Captions or dialogue are no texts, or not one a region.
    """
    photo, regions = load_image(image), Region.list_of(regions)
    listed = isinstance(captions, list | tuple | None) and all(isinstance(text, str | None) for text in captions or ())
    if not listed or not isinstance(dialogue, list | tuple) or not all(map(_is_turn, dialogue)):
        got = short(captions if not listed else dialogue)
        raise ConfigError(f"expected captions as a list of texts and dialogue as a list of pairs of texts, got {got}")
    if captions is not None and len(captions) != len(regions):
        raise ConfigError(f"expected one caption a region, got {len(captions)} captions for {len(regions)} regions")
    scale = max(1.0, MIN_SIDE / max(photo.size))
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    picture = photo.resize(size, Image.Resampling.BICUBIC) if scale > 1 else photo.copy()
    stroke = max(3, round(max(size) / 260))  # thickness of an outline
    drawn = [_measure(region, k, photo.size, picture.size, scale, stroke) for k, region in enumerate(regions, 1)]
    # Large regions first, and every fill before the first line: nothing hides the outline of anything smaller, and
    # nothing at all hides a number.
    order = sorted(drawn, key=lambda each: -each.area)
    for each in order:
        _paint(picture, each, [(each.inside, each.colour, FILL_OPACITY)])
    for each in order:
        reach = stroke * each.fine // 2
        rim = _band(each.inside, reach + 3 * each.fine // 2)
        _paint(picture, each, [(rim, INK, 0.55), (_band(each.inside, reach), each.colour, 1.0)])
    taken: list[Box] = []
    for each in drawn:
        _tag(picture, each, taken)
    entries = [(number, text) for number, text in enumerate(captions or (), 1) if text]
    return _with_panel(picture, entries, dialogue) if entries or dialogue else picture


def check_picture(path: str | Path) -> None:
    """Raise ConfigError unless a picture can be written to the path."""
    path = Path(path)
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except Exception:  # an unknown suffix, a format that Pillow only reads, one without colours
        raise ConfigError(f"{path}: not a picture that can be written; end its name in .png or .jpg") from None
    check_writable(path)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a picture atomically, in the format of its suffix; DataError if that fails."""
    try:
        write_file(path, picture.save)
    except DataError:
        raise
    except Exception as error:  # each format has its own limits and its own exceptions for them
        raise DataError(f"{path}: cannot be written: {reason(error)}; try .png") from None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


@dataclass(frozen=True, kw_only=True)
class _Outline:
    """A region on the picture."""

    number: int
    kind: str
    area: float
    bounds: Box
    window: tuple[int, int, int, int]  # around it, with room for its outline
    inside: Image.Image  # the window, with ``fine`` samples per pixel side
    fine: int

    @property
    def colour(self) -> Colour:
        return COLOURS[(self.number - 1) % len(COLOURS)]


def _measure(
    region: Region, number: int, size: tuple[int, int], drawn: tuple[int, int], scale: float, stroke: int
) -> _Outline:
    """Cover the pixels of a region's window, exactly; sizes are (W, H) of the image and of the picture."""
    region.check(*size, f"<region{number}>")
    x0, y0, x1, y1 = (value * scale for value in region.bounds(*size))
    margin = 2 * stroke + 2
    left, top = max(0, int(x0) - margin), max(0, int(y0) - margin)
    right, bottom = min(drawn[0], int(x1) + margin + 1), min(drawn[1], int(y1) + margin + 1)
    fine = 2 if max(right - left, bottom - top) <= 2048 else 1  # drawn larger and shrunk, edges are smooth
    width, height = (right - left) * fine, (bottom - top) * fine
    coarse = math.ceil((width * height / MOST_CELLS) ** 0.5)  # the memory for long strokes grows with the cells
    rows = np.linspace(top, bottom, -(-height // coarse) + 1) / scale
    columns = np.linspace(left, right, -(-width // coarse) + 1) / scale
    shares = region.coverage(rows, columns, *size) / ((rows[1] - rows[0]) * (columns[1] - columns[0]))
    inside = Image.fromarray(np.rint(np.minimum(shares, 1) * 255).astype(np.uint8))
    return _Outline(
        number=number,
        kind=region.kind,
        area=region.area(*size),
        bounds=(x0, y0, x1, y1),
        window=(left, top, right, bottom),
        inside=inside.resize((width, height), Image.Resampling.BILINEAR),
        fine=fine,
    )


def _paint(picture: Image.Image, region: _Outline, layers: Sequence[tuple[Image.Image, Colour, float]]) -> None:
    """Lay masks of a region's window over the picture, each in its colour and opacity."""
    patch = picture.crop(region.window)
    for layer, colour, opacity in layers:
        alpha = layer.reduce(region.fine).point([round(value * opacity) for value in range(256)])
        patch.paste(colour, (0, 0, *patch.size), alpha)
    picture.paste(patch, region.window[:2])


def _band(inside: Image.Image, reach: int) -> Image.Image:
    """The pixels within ``reach`` of the edge of a mask, which is closed at the border, as an image of 0 and 255."""
    solid = ImageOps.expand(inside.point([0] * 128 + [255] * 128), reach)
    near = solid.filter(ImageFilter.BoxBlur(reach)).point([0] + [255] * 254 + [0])
    return ImageOps.crop(near, reach)


def _tag(picture: Image.Image, region: _Outline, taken: list[Box]) -> None:
    """Put the region's number at its edge, at the first free place."""
    x0, y0, x1, y1 = region.bounds
    font = _font(max(14, round(max(picture.size) / 36)))
    width, height = _tag_size(font, region.number)
    if x1 - x0 < 2 * width or y1 - y0 < 2 * height:  # beside a small region, lest the tag hide it
        places = [(x0 - width, y0 - height), (x1, y0 - height), (x0 - width, y1), (x1, y1)]
    elif region.kind == "box":
        places = [(x0, y0), (x1 - width, y0), (x0, y1 - height), (x1 - width, y1 - height)]
    else:  # the corners of the bounds may be far from the region: its topmost, bottommost, left- and rightmost point
        rows, columns = np.nonzero(np.asarray(region.inside) > 127)
        picks = {rows.argmin(), rows.argmax(), columns.argmin(), columns.argmax()} if rows.size else ()
        ends = [
            (region.window[0] + (columns[k] + 0.5) / region.fine, region.window[1] + (rows[k] + 0.5) / region.fine)
            for k in sorted(picks)
        ]
        places = [(x - width / 2, y - height / 2) for x, y in ends]
    places.append(((x0 + x1 - width) / 2, (y0 + y1 - height) / 2))
    room_x, room_y = max(0.0, picture.width - width), max(0.0, picture.height - height)
    within = [(min(max(0.0, x), room_x), min(max(0.0, y), room_y)) for x, y in places]
    boxes = [(x, y, x + width, y + height) for x, y in within]
    place = next((box for box in boxes if not any(_overlap(box, other) for other in taken)), boxes[0])
    taken.append(place)
    _draw_tag(ImageDraw.Draw(picture), place[:2], region.number, font)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _with_panel(
    picture: Image.Image, entries: Sequence[tuple[int, str]], dialogue: Sequence[tuple[str, str]]
) -> Image.Image:
    """The picture with a white panel of wrapped text beneath it: numbered captions, then questions and answers."""
    font = _font(max(16, round(picture.width / 40)))
    leading, pad = round(font.size * 1.35), round(font.size * 0.7)
    indent = max((_tag_size(font, number)[0] for number, _ in entries), default=0) + pad
    room = picture.width - 2 * pad
    rows: list[tuple[int | None, int, str, Colour, int]] = []  # tag or none, indent, text, colour, gap above
    for number, text in entries:
        for index, line in enumerate(_wrap(text, font, room - indent)):
            rows.append((None if index else number, indent, line, INK, 0 if index else pad // 2))
    for turn in dialogue:
        for text, colour, gap in zip(turn, (FAINT, INK), (pad, 0), strict=True):
            lines = _wrap(re.sub(r"<region(\d+)>", r"[\1]", text), font, room)
            rows += [(None, 0, line, colour, 0 if index else gap) for index, line in enumerate(lines)]
    height = picture.height + 2 * pad + sum(leading + row[-1] for row in rows)
    sheet = Image.new("RGB", (picture.width, height), PAPER)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    y = picture.height + pad // 2
    for tag, shift, line, colour, gap in rows:
        y += gap
        if tag is not None:
            _draw_tag(draw, (pad, y - _tag_size(font, tag)[1] / 2 + font.size / 2), tag, font)
        draw.text((pad + shift, y + font.size / 2), line, fill=colour, font=font, anchor="lm")
        y += leading
    return sheet


def _wrap(text: str, font: Any, room: float) -> list[str]:
    """Lines of at most ``room`` pixels, broken between words, and inside a word only where it is wider than a line."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= room:
            line = joined
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word) > room:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= room)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines


def _draw_tag(draw: ImageDraw.ImageDraw, place: tuple[float, float], number: int, font: Any) -> None:
    x, y = place
    width, height = _tag_size(font, number)
    colour = COLOURS[(number - 1) % len(COLOURS)]
    box = (x, y, x + width - 1, y + height - 1)
    draw.rounded_rectangle(box, radius=height / 5, fill=colour, outline=INK, width=max(1, height // 20))
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = INK if bright > 110 else PAPER
    draw.text((x + width / 2, y + height / 2), str(number), fill=ink, font=font, anchor="mm")


def _tag_size(font: Any, number: int) -> tuple[int, int]:
    height = round(font.size * 1.3)
    return max(height, round(font.getlength(str(number)) + 0.7 * font.size)), height


def _font(size: int) -> Any:
    return ImageFont.load_default(size)

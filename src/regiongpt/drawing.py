"""Drawings of regions, outlined, numbered and captioned on their image; and web pages that need no other file."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from regiongpt.errors import ConfigError, DataError
from regiongpt.images import ImageSource, load_image
from regiongpt.regions import Region
from regiongpt.storage import check_writable, reason, write_file

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
Rows = list[list[str]]
"""A table of text, its header first."""

# Okabe and Ito's palette, which people with every kind of colour vision can tell apart, in the order that keeps
# neighbours furthest apart. Numbers, not colours, carry the meaning: from the eighth region on, colours repeat.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (204, 121, 167), (0, 114, 178), (240, 228, 66))
MIN_SIDE = 640  # images smaller than this are enlarged, or neither outline nor number could be read
INK: Colour = (33, 33, 33)
PAPER: Colour = (255, 255, 255)


def draw_regions(
    image: ImageSource,
    regions: Sequence[Region],
    captions: Sequence[str | None] | None = None,
    *,
    dialogue: Sequence[tuple[str, str]] = (),
    plain: bool = False,
) -> Image.Image:
    """Draw numbered regions on their image, with captions on a white panel beneath it.

    Every region gets a translucent fill, an outline with a dark rim, and a tag with its number, the N of its
    ``<regionN>``. An image whose longer side is under 640 pixels is enlarged to that.

    Args:
        image: What :func:`regiongpt.load_image` takes.
        regions: Regions in pixels of that image, in the order of their numbers.
        captions: One text a region, ``None`` or empty for no caption.
        dialogue: Questions and their answers, written beneath the captions; ``<regionN>`` in them becomes ``[N]``.
        plain: Outlines alone, with numbers only where there are several.
    """
    photo, regions = load_image(image), Region.list_of(regions)
    if captions is not None and len(captions) != len(regions):
        raise ConfigError(f"expected one caption a region, got {len(captions)} captions for {len(regions)} regions")
    scale = max(1.0, MIN_SIDE / max(photo.size))
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    picture = photo.resize(size, Image.Resampling.BICUBIC) if scale > 1 else photo.copy()
    reach = max(2, round(max(size) / 520))  # half the thickness of an outline
    drawn = [_measure(region, k, photo.size, picture.size, reach) for k, region in enumerate(regions, 1)]
    # Large regions first, and every fill before the first line: nothing hides the outline of anything smaller, and
    # nothing at all hides a number.
    order = sorted(drawn, key=lambda each: -each.area)
    for each in () if plain else order:
        _paint(picture, each, each.inside, each.colour, 0.15)
    for each in order:
        _paint(picture, each, _band(each.inside, reach + 1), INK, 0.55)
        _paint(picture, each, _band(each.inside, reach), each.colour, 1.0)
    taken: list[tuple[float, float]] = []
    for each in () if plain and len(drawn) == 1 else drawn:
        _tag(picture, each, taken)
    lines = [f"[{number}] {text}" for number, text in enumerate(captions or (), 1) if text]
    lines += [re.sub(r"<region(\d+)>", r"[\1]", text) for turn in dialogue for text in turn]
    return _with_panel(picture, lines) if lines else picture


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


@dataclass(frozen=True)
class _Outline:
    number: int
    colour: Colour
    area: float
    bounds: Box
    window: Box  # around it, with room for its outline
    inside: Image.Image  # its pixels in the window, 0..255


def _measure(region: Region, number: int, size: tuple[int, int], drawn: tuple[int, int], reach: int) -> _Outline:
    """Find a region on the picture; sizes are (W, H) of the image and of the picture."""
    region.check(*size, f"<region{number}>")
    inside = Image.fromarray(region.to_mask(*size).astype(np.uint8) * 255)
    if drawn != size:
        inside = inside.resize(drawn, Image.Resampling.BILINEAR)
    x0, y0, x1, y1 = bounds = inside.getbbox() or (0, 0, 1, 1)
    margin = 2 * reach + 2
    window = (max(0, x0 - margin), max(0, y0 - margin), min(drawn[0], x1 + margin), min(drawn[1], y1 + margin))
    colour = COLOURS[(number - 1) % len(COLOURS)]
    return _Outline(number, colour, region.area(*size), bounds, window, inside.crop(window))


def _paint(picture: Image.Image, region: _Outline, mask: Image.Image, colour: Colour, opacity: float) -> None:
    """Lay a mask of a region's window over the picture."""
    picture.paste(colour, region.window, mask.point([round(value * opacity) for value in range(256)]))


def _band(inside: Image.Image, reach: int) -> Image.Image:
    """The pixels within ``reach`` of the edge of a mask, which is closed at the border, as an image of 0 and 255."""
    solid = ImageOps.expand(inside.point([0] * 128 + [255] * 128), reach)
    near = solid.filter(ImageFilter.BoxBlur(reach)).point([0] + [255] * 254 + [0])
    return ImageOps.crop(near, reach)


def _tag(picture: Image.Image, region: _Outline, taken: list[tuple[float, float]]) -> None:
    """Put the region's number at its edge, at the first free place."""
    x0, y0, x1, y1 = region.bounds
    font: Any = ImageFont.load_default(max(14, round(max(picture.size) / 36)))
    height = round(font.size * 1.3)
    width = max(height, round(font.getlength(str(region.number)) + 0.7 * font.size))
    if x1 - x0 < 2 * width or y1 - y0 < 2 * height:  # beside a small region, lest the tag hide it
        places = [(x0 - width, y0 - height), (x1, y0 - height), (x0 - width, y1), (x1, y1)]
    else:  # on its topmost, bottommost, left- and rightmost point, which corners of the bounds may be far from
        rows, columns = np.nonzero(np.asarray(region.inside) > 127)
        ends = sorted({rows.argmin(), rows.argmax(), columns.argmin(), columns.argmax()} if rows.size else ())
        left, top = region.window[0] - width / 2, region.window[1] - height / 2
        places = [(left + columns[k], top + rows[k]) for k in ends]
    places.append(((x0 + x1 - width) / 2, (y0 + y1 - height) / 2))
    room_x, room_y = max(0.0, picture.width - width), max(0.0, picture.height - height)
    within = [(min(max(0.0, x), room_x), min(max(0.0, y), room_y)) for x, y in places]
    # Tags before this one are as high, and no wider.
    free = ((x, y) for x, y in within if not any(abs(x - a) < width and abs(y - b) < height for a, b in taken))
    left, top = next(free, within[0])
    taken.append((left, top))
    draw, colour, rim = ImageDraw.Draw(picture), region.colour, (left, top, left + width - 1, top + height - 1)
    draw.rounded_rectangle(rim, radius=height / 5, fill=colour, outline=INK, width=max(1, height // 20))
    ink = INK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 110 else PAPER
    draw.text((left + width / 2, top + height / 2), str(region.number), fill=ink, font=font, anchor="mm")


def _with_panel(picture: Image.Image, texts: Sequence[str]) -> Image.Image:
    """The picture with a white panel of wrapped texts beneath it."""
    font: Any = ImageFont.load_default(max(16, round(picture.width / 40)))
    pad = round(font.size * 0.7)
    lines = [line for text in texts for line in _wrap(text, font, picture.width - 2 * pad)]
    leading = round(font.size * 1.35)
    sheet = Image.new("RGB", (picture.width, picture.height + 2 * pad + leading * len(lines)), PAPER)
    sheet.paste(picture, (0, 0))
    for number, line in enumerate(lines):
        place = (pad, picture.height + pad + leading * (number + 0.5))
        ImageDraw.Draw(sheet).text(place, line, fill=INK, font=font, anchor="lm")
    return sheet


def _wrap(text: str, font: Any, room: float) -> list[str]:
    """Lines of at most ``room`` pixels, broken between words, and inside a word only where it is wider than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= room:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > room:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


# -- pages, and tables as text -----------------------------------------------------------------------------------------


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Render a template that extends ``base.html`` into a file; DataError where it cannot be written.

    Args:
        path: The file; its folder must exist.
        template: Its name, such as ``evaluation.html``.
        values: ``title``, ``made`` (a line on what made the page) and the template's own.
    """
    write_file(path, render(template, **values))


def render(template: str, **values: Any) -> Markup:
    """Fill in a template; text is escaped, Markup is HTML already."""
    return Markup(_environment().get_template(template).render(values))


def picture(image: Image.Image, alt: str, side: int = 900) -> Markup:
    """An image inside the page, its longest side at most ``side`` pixels; ``alt`` says what it shows."""
    shown = image.convert("RGB")
    shown.thumbnail((side, side))
    data = io.BytesIO()
    shown.save(data, "JPEG", quality=85)
    return Markup('<img src="data:image/jpeg;base64,{}" width="{}" height="{}" alt="{}">').format(
        base64.b64encode(data.getvalue()).decode(), shown.width, shown.height, alt
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

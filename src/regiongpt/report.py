"""Web pages that need no other file: Jinja templates with one layout."""

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from regiongpt.drawing import COLOURS
from regiongpt.prompts import PLACEHOLDER
from regiongpt.storage import write_file


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


def chip(number: int) -> Markup:
    """The number of a region in the region's colour; in templates ``{{ number | chip }}``."""
    red, green, blue = COLOURS[(number - 1) % len(COLOURS)]
    ink = "#212121" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "#fff"
    return Markup(f'<b class="chip" style="background:rgb({red},{green},{blue});color:{ink}">{number}</b>')


def chips(text: str) -> Markup:
    """Text with a chip for every placeholder ``<regionN>``; in templates ``{{ text | chips }}``."""
    parts, end = [], 0
    for match in PLACEHOLDER.finditer(text):
        parts += [escape(text[end : match.start()]), chip(int(match[1])) if match[1] else escape(match[0])]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"chip": chip, "chips": chips}
    return environment

"""Web pages that need no other file: Jinja templates with one layout; and tables as text."""

import base64
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

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


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

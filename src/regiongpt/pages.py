"""Pages built from pieces of HTML, for the ablations until they have a template of their own."""

import html
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from regiongpt.report import render
from regiongpt.storage import write_file


def page(title: str, made: str, body: str) -> str:
    """A whole page of HTML."""
    return render("base.html", title=title, made=made, body=Markup(body))


def write_page(text: str, path: Path, option: str = "") -> None:
    """Write a page."""
    write_file(path, text)


def card(body: str, heading: str = "", meta: str = "") -> str:
    """A framed part of the page: HTML under a heading and a line of text."""
    return Markup('<article><h2>{}</h2><p class="meta">{}</p>{}</article>').format(heading, meta, Markup(body))


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table, its header first."""
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{lines}</table></div>'

"""Pieces of pages as HTML, for pages whose templates are still to be written; new ones use :mod:`regiongpt.report`.

Every function takes plain text and escapes it, unless it says that it takes HTML.
"""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from markupsafe import Markup

from regiongpt.errors import ConfigError, DataError
from regiongpt.report import PICTURE_SIDE, chip, chips, picture, render
from regiongpt.storage import write_file

__all__ = ["PICTURE_SIDE", "beside", "card", "chip", "chips", "columns", "facts", "fault", "page", "picture",
           "region_list", "table", "turn", "write_page"]  # fmt: skip
_BLOCKS: Final = " █▉▊▋▌▍▎▏"
_SHARE: Final = re.compile(rf"\s*(\d+(?:\.\d+)?) %[{_BLOCKS}]*$")


def page(title: str, made: str, body: str, style: str = "") -> str:
    """A whole page of HTML, with CSS of its own besides that of all pages."""
    return render("base.html", title=title, made=made, body=Markup(f"<style>{style}</style>{body}"))


def write_page(text: str, path: Path, option: str = "--html") -> None:
    """Write a page.

    Raises:
        ConfigError: It cannot be written; the message names the option that gave the path.
    """
    try:
        write_file(path, text)
    except DataError as error:
        raise ConfigError(f"{option}: {error}") from None


def card(body: str, heading: str = "", meta: str = "") -> str:
    """A framed part of the page: HTML under a heading and a line of text."""
    top = f"<h2>{html.escape(heading)}</h2>" if heading else ""
    if meta:
        top += f'<p class="meta">{html.escape(meta)}</p>'
    return f"<article>{top}{body}</article>"


def columns(blocks: Iterable[str]) -> str:
    """Blocks of HTML side by side in one frame, where the screen is wide enough."""
    return f'<section class="columns">{"".join(f"<div>{block}</div>" for block in blocks)}</section>'


def table(rows: Sequence[Sequence[str]], heading: str = "") -> str:
    """A table, its header first.

    The first column stands left, all others right. A column whose header is empty holds shares, such as ``12.5 %``, or
    remarks: a share is followed by a bar, the longest of the column being the largest share; what else is written
    behind it, a bar of blocks for a terminal, is left out.
    """
    header, *body = rows
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    most = [
        None if name else max((_share(row[place]) or 0.0 for row in body), default=0.0)
        for place, name in enumerate(header)
    ]
    lines = "".join(f"<tr>{''.join(map(_cell, row, most))}</tr>" for row in body)
    title = f"<h3>{html.escape(heading)}</h3>" if heading else ""
    return f'{title}<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _share(cell: str) -> float | None:
    found = _SHARE.match(cell)
    return float(found[1]) if found else None


def _cell(cell: str, most: float | None) -> str:
    if most is None:
        return f"<td>{html.escape(cell)}</td>"
    share = _share(cell)
    if share is None:
        return f'<td class="bar">{html.escape(cell)}</td>'
    width = 100 * share / most if most else 0.0
    text = cell.rstrip(_BLOCKS).strip()
    return f'<td class="bar"><span><b>{text}</b><i style="width:calc({width:.1f} * var(--unit))"></i></span></td>'


def facts(pairs: Iterable[tuple[str, str]], heading: str = "") -> str:
    """Names with what they stand for, one pair a line."""
    title = f"<h3>{html.escape(heading)}</h3>" if heading else ""
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in pairs)
    return f'{title}<dl class="facts">{lines}</dl>'


def beside(image: str, talk: str) -> str:
    """A picture and what is said of it, both HTML, side by side where the screen is wide enough."""
    return f'<div class="pair">{image}<div class="talk">{talk}</div></div>'


def turn(question: str, answer: str) -> str:
    """A question and its answer."""
    return f"<p class='q'>{chips(question)}</p><p class='a'>{chips(answer)}</p>"


def region_list(regions: Sequence[tuple[str, str]]) -> str:
    """The regions of a picture by number, each with its name and its kind."""
    items = [
        f"<li>{chip(number)} {html.escape(name)} <small>{html.escape(kind)}</small></li>"
        for number, (name, kind) in enumerate(regions, 1)
    ]
    return f'<ul class="regions">{"".join(items)}</ul>' if items else ""


def fault(reason: str) -> str:
    """Why something cannot be shown, in its place."""
    return f'<p class="fault">{html.escape(reason)}</p>'

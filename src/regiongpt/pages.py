"""Web pages that need no other file: one shape and style for all, in light and dark, readable on a narrow screen.

Every function takes plain text and escapes it, unless it says that it takes HTML.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from regiongpt.drawing import COLOURS
from regiongpt.errors import ConfigError
from regiongpt.prompts import PLACEHOLDER

PICTURE_SIDE: Final = 900
_BLOCKS: Final = " █▉▊▋▌▍▎▏"
_SHARE: Final = re.compile(rf"\s*(\d+(?:\.\d+)?) %[{_BLOCKS}]*$")


def page(title: str, made: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: Its heading.
        made: One line beneath it: of what, and by what, the page was made.
        body: HTML.
        style: CSS beside that of all pages.
    """
    return _PAGE.format(title=html.escape(title), made=html.escape(made), body=body, style=_STYLE + style)


def write_page(text: str, path: Path, option: str = "--html") -> None:
    """Writes a page.

    Args:
        text: The page.
        path: Of its file.
        option: What the person has said the file by, for the message.

    Raises:
        ConfigError: It cannot be written there.
    """
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"expected {option} to be a file that can be written, got {str(path)!r}: {error}") from None


def card(body: str, heading: str = "", meta: str = "") -> str:
    """A framed part of the page.

    Args:
        body: HTML.
        heading: Of the part.
        meta: One line beneath the heading.
    """
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


def picture(image: Image.Image, alt: str, side: int = PICTURE_SIDE) -> str:
    """A picture within the page.

    Args:
        image: Shrunk where it is larger.
        alt: What it shows, for those who do not see it.
        side: Its longest side in pixels.
    """
    shown = image.convert("RGB")
    shown.thumbnail((side, side))
    data = io.BytesIO()
    shown.save(data, "JPEG", quality=85)
    coded = base64.b64encode(data.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{coded}" width="{shown.width}" height="{shown.height}" '
        f'alt="{html.escape(alt)}">'
    )


def beside(image: str, talk: str) -> str:
    """A picture and what is said of it, both HTML, side by side where the screen is wide enough."""
    return f'<div class="pair">{image}<div class="talk">{talk}</div></div>'


def chip(number: int) -> str:
    """The number of a region in the region's colour."""
    red, green, blue = COLOURS[(number - 1) % len(COLOURS)]
    ink = "#212121" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "#fff"
    return f'<b class="chip" style="background:rgb({red},{green},{blue});color:{ink}">{number}</b>'


def chips(text: str) -> str:
    """Text in which every placeholder ``<regionN>`` is a chip."""
    parts: list[str] = []
    end = 0
    for match in PLACEHOLDER.finditer(text):
        parts.append(html.escape(text[end : match.start()]))
        parts.append(chip(int(match[1])) if match[1] else html.escape(match[0]))
        end = match.end()
    return "".join([*parts, html.escape(text[end:])]).replace("\n", "<br>")


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


_STYLE: Final = """
:root { color-scheme: light dark; --line: #d5d8dc; --faint: #5f6773; --card: #fff; --page: #f3f4f6; --ink: #1f2937;
  --learnt: #c7ecd4; --learnt-ink: #0b4f27; --asked: #eef1f5;
  --filled: #4b83b5; --unit: 1px; }
@media (prefers-color-scheme: dark) { :root { --line: #3a414b; --faint: #9aa3af; --card: #1c2128; --page: #12161b;
  --ink: #e5e7eb; --learnt: #14532d; --learnt-ink: #d1fae5;
  --asked: #272e38; --filled: #5b93c4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 24px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; overflow-wrap: anywhere; }
h3 { margin: 16px 0 4px; font-size: 14px; }
.meta { margin: 0 0 12px; color: var(--faint); font-size: 13px; overflow-wrap: anywhere; }
article, .columns { margin: 20px 0; padding: 18px 20px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.columns { columns: 2 480px; column-gap: 40px; }
.columns > div { margin-bottom: 14px; break-inside: avoid; }
.columns > div > h3:first-child, article > h3:first-child { margin-top: 0; }
h2 + .facts, h2 + .wide { margin-top: 10px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 18px 2px 0; text-align: right; white-space: pre; }
th:last-child, td:last-child { padding-right: 0; }
th { color: var(--faint); font-weight: 600; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td.bar { text-align: left; }
td.bar { min-width: 170px; white-space: normal; } .bar span { display: flex; align-items: center; gap: 8px; }
.bar b { flex: 0 0 50px; font-weight: 400; text-align: right; }
.bar i { height: 11px; border-radius: 2px; background: var(--filled); }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 18px; margin: 0;
  font-size: 13px; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.pair { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
.pair > img { flex: 1 1 420px; width: 420px; max-width: min(620px, 100%); height: auto; border-radius: 6px; }
.talk { flex: 1 1 340px; min-width: 0; }
.talk p { margin: 0 0 6px; padding: 6px 12px; border-radius: 10px; overflow-wrap: anywhere; width: fit-content; }
.q { background: var(--asked); }
.talk .a { margin: 0 0 12px 28px; background: var(--learnt); color: var(--learnt-ink); }
.regions { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0 0 12px; padding: 0; list-style: none;
  font-size: 13px; }
.regions small { color: var(--faint); }
.chip { padding: 1px 6px; border-radius: 5px; font: 600 12px/1.5 system-ui, sans-serif; }
.fault { padding: 10px 12px; border: 1px solid #d55e00; border-radius: 8px; overflow-wrap: anywhere; }
@media (max-width: 600px) { :root { --unit: 0.5px; } body { padding: 12px; }
  article, .columns { margin: 12px 0; padding: 12px; } th, td { padding-right: 10px; } td.bar { min-width: 116px; }
  .talk { flex-basis: 100%; }
  .facts { grid-template-columns: fit-content(45%) minmax(0, 1fr); } .facts dt { overflow-wrap: anywhere; } }
"""

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1><p class="meta">{made}</p>
{body}
</body></html>
"""

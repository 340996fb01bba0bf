"""Web pages that need no other file: Jinja templates with one layout, and charts in the page's own colours."""

import base64
import io
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
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
    environment.globals["has_charts"] = find_spec("matplotlib") is not None
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# Charts

_GREY: Final = "#808890"  # on a light page and on a dark one
_SETTINGS: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regiongpt",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _GREY),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
}
_POINTS: Final = 300
_SMOOTHED_FROM: Final = 60


def line_chart(title: str, curves: Mapping[str, Mapping[int, Any]], x_label: str = "step") -> Markup:
    """Curves, each y by x, over one axis as a ``<figure>``; empty where there is nothing to draw, or no matplotlib.

    A measurement of many points is drawn faint under its moving average.
    """
    known = [(name, np.array(list(curve), float), np.array([*curve.values()], float)) for name, curve in curves.items()]
    drawn = [(name, xs[np.isfinite(ys)], ys[np.isfinite(ys)]) for name, xs, ys in known if np.isfinite(ys).any()]
    if not drawn or find_spec("matplotlib") is None:
        return Markup("")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        figure = Figure((4.6, 2.5 + 0.2 * -(-len(drawn) // 2)), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, xs, ys) in enumerate(drawn):
            colour, some = f"C{number}", slice(None, None, -(-len(xs) // _POINTS))
            if len(ys) >= _SMOOTHED_FROM:
                axes.plot(xs[some], ys[some], color=colour, alpha=0.28, linewidth=0.8)
                span = np.ones(2 * max(2, len(ys) // 40) + 1)
                ys = np.convolve(ys, span, "same") / np.convolve(np.ones(len(ys)), span, "same")
            told, marker = f"{name} {ys[-1]:.4g}", "." if len(ys) == 1 else ""
            axes.plot(xs[some], ys[some], color=colour, linewidth=1.5, label=told, marker=marker)
        axes.set_xlabel(x_label)
        axes.locator_params(axis="x", nbins=5, integer=all(float(x).is_integer() for _, xs, _ in drawn for x in xs))
        axes.grid(axis="y", alpha=0.3)
        figure.legend(loc="outside lower left", ncols=2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(title), 1)
    return Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(title, Markup(svg))


def short(value: float) -> str:
    """A number in few characters: ``1.23k``, ``0.034``, ``2e-05``."""
    for least, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if least <= abs(value) < math.inf:
            return f"{value / least:.3g}{prefix}"
    return f"{value:.3g}"

"""Charts as SVG inside a page, drawn by matplotlib in the page's own colours, so that they turn dark with it."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from typing import Any, Final

import numpy as np
from markupsafe import Markup

_INK, _FAINT, _LINE = "#000001", "#000002", "#000003"
_COLOURS: Final = [f"#00001{k}" for k in range(8)]
_VARIABLES: Final = {_INK: "ink", _FAINT: "faint", _LINE: "line", **{each: f"c{k}" for k, each in enumerate(_COLOURS)}}
_SETTINGS: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regiongpt",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "grid.color": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
}
_POINTS: Final = 300
_SMOOTHED_FROM: Final = 60


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve of a line chart.

    Attributes:
        name: In the legend.
        xs: In rising order.
        ys: As many; what is not finite is left out.
        exact: Draw it as it is: a schedule rather than a measurement, which varies by chance.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a bar chart.

    Attributes:
        value: At least 0; None where there was nothing to measure.
        interval: Both ends, drawn as a whisker.
        of: How many items it is about, written behind it.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    of: int = 0


def line_chart(title: str, curves: Sequence[Curve], x_label: str = "step", *, logarithmic: bool = False) -> Markup:
    """Curves over one axis, each named in the legend with its last value.

    A measurement of many points is drawn faint under its moving average; a few outliers do not flatten the rest.

    Returns:
        A ``<figure>``; empty where there is nothing to draw, or matplotlib is not installed.
    """
    drawn = []
    for curve in curves:
        xs, ys = np.asarray(curve.xs, float), np.asarray(curve.ys, float)
        kept = np.isfinite(ys) & (ys > 0 if logarithmic else True)
        if kept.any():
            drawn.append((curve, xs[kept], ys[kept]))
    if not drawn or find_spec("matplotlib") is None:
        return Markup("")
    to, back = (np.log, np.exp) if logarithmic else (np.asarray, np.asarray)
    legend = 0.2 * -(-len(drawn) // 2)  # inches
    # Placed by hand: to have matplotlib find the room that labels take would draw everything twice.
    from matplotlib.ticker import MaxNLocator

    with _figure(title, 4.6, 2.5 + legend, (0.6, 0.55 + legend, 0.1, 0.2)) as (axes, parts):
        for number, (curve, xs, ys) in enumerate(drawn):
            colour, scaled = _COLOURS[number % len(_COLOURS)], to(ys)
            if not curve.exact and len(ys) >= _SMOOTHED_FROM:
                axes.plot(*_thinned(xs, scaled, back), color=colour, alpha=0.28, linewidth=0.8)
                span = np.ones(2 * max(2, len(ys) // 40) + 1)
                scaled = np.convolve(scaled, span, "same") / np.convolve(np.ones(len(ys)), span, "same")
            name, marker = f"{curve.name} {back(scaled)[-1]:.4g}", "." if len(ys) == 1 else ""
            axes.plot(*_thinned(xs, scaled, back), color=colour, linewidth=1.5, label=name, marker=marker)
        values = np.concatenate([ys for _, _, ys in drawn])
        most = np.percentile(values, 99.5)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            if values.max() < 30 * values.min():
                axes.yaxis.set_major_locator(MaxNLocator(5))
        elif 0 < 5 * most < values.max():
            axes.set_ylim(min(0.0, values.min()), 1.5 * most)
        axes.set_xlabel(x_label)
        axes.locator_params(axis="x", nbins=5, integer=all(float(x).is_integer() for _, xs, _ in drawn for x in xs))
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.25), ncols=2, borderpad=0)
    return parts[0]


def bar_chart(
    title: str, groups: Sequence[tuple[str, Sequence[Bar]]], series: Sequence[str], unit: str = "%", reach: float = 1.0
) -> Markup:
    """Groups of horizontal bars, one below the other.

    Args:
        title: Title of the chart.
        groups: Each a label with a bar for every series.
        series: Names, for the legend where there are several.
        unit: Behind the numbers of the axis.
        reach: The axis goes at least this far, so that charts beside each other have the same one.

    Returns:
        A ``<figure>``; empty without groups, or where matplotlib is not installed.
    """
    if not groups or find_spec("matplotlib") is None:
        return Markup("")
    size = 0.8 / len(series)
    with _figure(title, 4.6, 0.5 + 0.15 * len(groups) * (len(series) + 0.5)) as (axes, parts):
        for number in range(len(series)):
            bars = [own[number] for _, own in groups]
            places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * size
            values = [bar.value or 0.0 for bar in bars]
            axes.barh(places, values, 0.9 * size, color=_COLOURS[number % len(_COLOURS)], label=series[number])
            for place, bar in zip(places, bars, strict=True):
                if bar.interval is not None:
                    axes.plot(bar.interval, (place, place), color=_INK, linewidth=0.9, marker="|", markersize=4)
                end = max(bar.value or 0.0, bar.interval[1] if bar.interval else 0.0)
                shown = "–" if bar.value is None else f"{bar.value:.1f}" + (f" ({bar.of:,})" if bar.of else "")
                axes.annotate(
                    shown, (end, place), (4, 0), textcoords="offset points", va="center", size=7.5, color=_FAINT
                )
        axes.set_yticks(range(len(groups)), [name if len(name) < 24 else f"{name[:23]}…" for name, _ in groups])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlim(0, max([reach, *(end for _, own in groups for bar in own for end in (bar.interval or ()))]))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}{unit}")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        if len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.3 / axes.figure.get_figheight()), borderpad=0)
    return parts[0]


def short(value: float) -> str:
    """A number in few characters: ``1.23k``, ``0.034``, ``2e-05``."""
    for least, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if least <= abs(value) < math.inf:
            return f"{value / least:.3g}{prefix}"
    return f"{value:.3g}"


@contextmanager
def _figure(
    title: str, width: float, height: float, margins: tuple[float, float, float, float] | None = None
) -> Iterator[tuple[Any, list[Markup]]]:
    """Axes to draw on, and a list that holds the chart when the block ends.

    Args:
        title: Title of the chart.
        width: In inches, as all here.
        height: Height of the whole, with the margins.
        margins: Left, below, right and above; as much as labels take where None.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    parts: list[Markup] = []
    with rc_context(_SETTINGS):
        figure = Figure((width, height))
        axes = figure.add_subplot()
        if margins is not None:
            left, below, right, above = margins
            box = (left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height)
            axes.set_position(box)
        yield axes, parts
        drawn = StringIO()
        fit: dict[str, Any] = {} if margins is not None else {"bbox_inches": "tight"}
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None}, **fit)
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"#0000\d\d", lambda match: f"var(--{_VARIABLES[match[0]]})", svg)
    svg = svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(title), 1)
    parts.append(Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(title, Markup(svg)))


def _thinned(xs: Any, ys: Any, back: Callable[[Any], Any]) -> tuple[Any, Any]:
    """At most 300 points, each the mean of its neighbours; the last one stays."""
    if len(xs) > _POINTS:
        starts = np.arange(_POINTS) * len(xs) // _POINTS
        counts = np.diff([*starts, len(xs)])
        xs, ys = (np.append(np.add.reduceat(each, starts) / counts, each[-1]) for each in (xs, ys))
    return xs, back(ys)

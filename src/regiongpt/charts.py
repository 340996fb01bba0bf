"""Curves as SVG within a page, in the page's own colours, so that they change with it from light to dark."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 38
_Place = Callable[[float, float], tuple[float, float]]
_POINTS: Final = 300
_SMOOTHED_FROM: Final = 60
_TINY: Final = 1e-3
_PREFIXES: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

COLOURS: Final = 8
"""Curves that can be told apart in one chart."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: In the legend.
        xs: In rising order.
        ys: As many; what is not a finite number is left out.
        exact: Whether it is drawn as it is, however many points it has: not a measurement, which varies by chance.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    exact: bool = False


def line_chart(title: str, curves: Sequence[Curve], x_label: str = "step", *, logarithmic: bool = False) -> str:
    """Curves over one axis, with a legend that gives the last value of each.

    A curve of many points is drawn faint, with its moving average in full colour; the legend then gives the average's.

    Args:
        title: Of the chart.
        curves: At least one; from the ninth on, colours repeat.
        x_label: Beneath the axis.
        logarithmic: Whether the y axis is; what is not above 0 is then left out.

    Returns:
        A ``<figure>``; ``""`` where there is nothing to draw.
    """
    drawn = [(curve, _points(curve, logarithmic)) for curve in curves]
    drawn = [(curve, points) for curve, points in drawn if points]
    if not drawn:
        return ""
    every = [point for _, points in drawn for point in points]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = _range([y for _, y in every], logarithmic)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        if logarithmic:
            y, bottom, top = math.log10(y), math.log10(low), math.log10(high)
        else:
            bottom, top = low, high
        up = (y - bottom) / (top - bottom)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(at, (left, right), (low, high), x_label, logarithmic)]
    legend = []
    for number, (curve, points) in enumerate(drawn):
        colour = f"c{number % COLOURS}"
        line, value = _line(curve, points, at, colour, logarithmic)
        parts.append(line)
        legend.append(f'<li><i class="{colour}"></i>{html.escape(curve.name)} <small>{short(value)}</small></li>')
    described = html.escape(
        f"{title}: {drawn[0][0].name} from {short(drawn[0][1][0][1])} to {short(drawn[0][1][-1][1])}"
    )
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg>'
        f"<ul>{''.join(legend)}</ul></figure>"
    )


def short(value: float, digits: int = 3) -> str:
    """A number in few characters: ``1.2k``, ``0.034``, ``2e-05``.

    Args:
        value: The number.
        digits: Most that are given; one less of numbers below a thousandth.
    """
    size = abs(value)
    if not math.isfinite(value) or size == 0:
        return f"{value:g}"
    if size < _TINY:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{float(mantissa):g}e{exponent}"
    for least, prefix in _PREFIXES:
        if size >= least:
            return f"{value / least:.{digits}g}{prefix}"
    return f"{value:.{digits}g}"


def _points(curve: Curve, logarithmic: bool) -> list[tuple[float, float]]:
    return [
        (x, y) for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(y) and not (logarithmic and y <= 0)
    ]


def _range(ys: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """The bounds of the y axis: of all values but the few that would flatten the rest."""
    ordered = sorted(ys)
    low, high = ordered[0], ordered[-1]
    most = ordered[math.ceil(0.995 * len(ordered)) - 1]
    if not logarithmic and most > 0 and high > 5 * most:
        high = 1.5 * most
    if logarithmic:
        return (low / 1.2, high * 1.2)
    if low == high:
        return (low - abs(low) / 2 - 1e-12, high + abs(high) / 2 + 1e-12)
    # From 0 on where that costs little of the height.
    low = 0.0 if 0 < low < 0.4 * high else low
    room = 0.05 * (high - low)
    return (low - (room if low else 0.0), high + room)


def _axes(at: _Place, xs: tuple[float, float], ys: tuple[float, float], x_label: str, logarithmic: bool) -> str:
    parts = []
    heights = _powers(*ys) if logarithmic else _ticks(*ys, 5)
    for y, label in zip(heights, _labels(heights), strict=True):
        _, down = at(xs[0], y)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {down:.1f}H{WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>'
        )
    places = _ticks(*xs, 5, whole=all(float(x).is_integer() for x in xs))
    for x, label in zip(places, _labels(places), strict=True):
        across, _ = at(x, ys[0])
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{label}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    return "".join(parts)


def _line(
    curve: Curve, points: Sequence[tuple[float, float]], at: _Place, colour: str, logarithmic: bool
) -> tuple[str, float]:
    """The curve, and the last value of what is in full colour."""
    if len(points) == 1:
        across, down = at(*points[0])
        return f'<circle class="{colour} dot" cx="{across:.1f}" cy="{down:.1f}" r="3"/>', points[0][1]
    title = f"<title>{html.escape(curve.name)}</title>"
    thinned = _thinned(points, _POINTS)
    if curve.exact or len(points) < _SMOOTHED_FROM:
        return f'<path class="{colour}" d="{_path(thinned, at)}">{title}</path>', points[-1][1]
    smooth = _averaged(points, max(2, len(points) // 40), logarithmic)
    return (
        f'<path class="{colour} raw" d="{_path(thinned, at)}"/>'
        f'<path class="{colour}" d="{_path(_thinned(smooth, _POINTS), at)}">{title}</path>'
    ), smooth[-1][1]


def _path(points: Sequence[tuple[float, float]], at: _Place) -> str:
    placed = [at(x, y) for x, y in points]
    # What lies outside the axes is drawn at their edge.
    return "M" + "L".join(f"{x:.1f} {min(max(y, _TOP), HEIGHT - _BOTTOM):.1f}" for x, y in placed)


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours; the last one stays."""
    if len(points) <= most:
        return list(points)
    groups = [points[len(points) * k // most : len(points) * (k + 1) // most] for k in range(most)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means[:-1], points[-1]]


def _averaged(points: Sequence[tuple[float, float]], span: int, logarithmic: bool) -> list[tuple[float, float]]:
    """The mean of each point and up to ``span`` others on either side; the geometric one for a logarithmic axis."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + (math.log(y) if logarithmic else y))
    found = []
    for place, (x, _) in enumerate(points):
        first, last = max(0, place - span), min(len(points), place + span + 1)
        mean = (sums[last] - sums[first]) / (last - first)
        found.append((x, math.exp(mean) if logarithmic else mean))
    return found


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About ``count`` round numbers between two others; whole ones if asked for."""
    if high <= low:
        return [low]
    rough = max((high - low) / count, 1.0 if whole else 0.0)
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * next(each for each in (1, 2, 5, 10) if each * unit >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """Ticks in few characters, all with as many digits as tell each from the next."""
    step = min((abs(right - left) for left, right in pairwise(ticks)), default=math.inf)

    def is_told(tick: float, digits: int) -> bool:
        return abs(float(f"{tick:.{digits - (abs(tick) < _TINY)}g}") - tick) <= 0.01 * step

    digits = next((count for count in range(3, 12) if all(is_told(each, count) for each in ticks)), 12)
    return [short(each, digits) for each in ticks]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers, with their 2 and 5 times where those are few, or else round numbers."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**each for each in exponents if low <= 10.0**each <= high]
    if len(tens) > 2:
        return tens[:: max(1, len(tens) // 5)]
    more = [k * 10.0**each for each in exponents for k in (1, 2, 5) if low <= k * 10.0**each <= high]
    return more if len(more) > 1 else _ticks(low, high, 4)


STYLE: Final = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b5568f; --c4: #a67c00; --c5: #3a95cf; --c6: #7a5fc0;
  --c7: #5f6773; }
@media (prefers-color-scheme: dark) { :root { --c0: #56b4e9; --c1: #f28c4a; --c2: #2fc79b; --c3: #dd8fbc;
  --c4: #e6b422; --c5: #8fd0f7; --c6: #b39df0; --c7: #9aa3af; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 18px 28px; }
.chart { margin: 0; min-width: 0; max-width: 620px; } .chart figcaption { font-size: 14px; font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.chart text { fill: var(--faint); } .chart path { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.chart .grid { stroke: var(--line); stroke-width: 1; } .chart .raw { opacity: 0.28; stroke-width: 1; }
.chart ul { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 0; padding: 0; list-style: none;
  font-size: 13px; }
.chart small { color: var(--faint); font-variant-numeric: tabular-nums; }
.chart i { display: inline-block; width: 12px; height: 3px; margin: 0 6px 4px 0; border-radius: 2px; }
""" + "".join(
    f".chart path.c{k} {{ stroke: var(--c{k}); }} .chart .dot.c{k} {{ fill: var(--c{k}); }} "
    f".chart i.c{k} {{ background: var(--c{k}); }}\n"
    for k in range(COLOURS)
)
"""Belongs to every page that has a chart."""

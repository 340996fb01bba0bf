"""Bars with their intervals as SVG within a page, in the page's own colours."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_WIDTH: Final = 440
_LABEL: Final = 130
_NUMBER: Final = 76
_BAR, _GAP, _TOP, _BOTTOM = 13, 8, 6, 20
_LETTERS: Final = 19
"""Of a label, that fit its place."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        value: At least 0; None where there was nothing to measure.
        interval: Both ends, drawn as a line across the bar's end.
        of: How many items it is about, written behind it.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    of: int = 0


def bar_chart(
    title: str, groups: Sequence[tuple[str, Sequence[Bar]]], series: Sequence[str], unit: str = "%", reach: float = 1.0
) -> str:
    """Groups of bars one below the other.

    Args:
        title: Of the chart.
        groups: Each with its label and a bar for every series.
        series: Names, for the legend where there are several.
        unit: Behind the numbers of the axis.
        reach: The axis goes as far as this at least, so that charts beside each other can have the same one.

    Returns:
        A ``<figure>``; ``""`` without groups.
    """
    if not groups:
        return ""
    step, top = _scale(max(reach, furthest(groups)))
    scale = (_WIDTH - _LABEL - _NUMBER) / top
    parts: list[str] = []
    y = float(_TOP)
    for label, bars in groups:
        middle = y + len(bars) * _BAR / 2
        short = label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…"
        parts.append(
            f'<text x="{_LABEL - 8}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(short)}'
            f"<title>{html.escape(label)}</title></text>"
        )
        for place, bar in enumerate(bars):
            parts.append(_drawn(bar, y + place * _BAR, scale, f"c{place % 8}"))
        y += len(bars) * _BAR + _GAP
    axis = [
        f'<path class="grid" d="M{_LABEL + x * scale:.1f} {_TOP}V{y:.1f}"/>'
        f'<text x="{_LABEL + x * scale:.1f}" y="{y + 14:.1f}" text-anchor="middle">{x:g}{unit}</text>'
        for x in (k * step for k in range(round(top / step) + 1))
    ]
    legend = "".join(f'<li><i class="c{k % 8}"></i>{html.escape(name)}</li>' for k, name in enumerate(series))
    spoken = "; ".join(f"{label} {', '.join(_number(bar.value) for bar in bars)}" for label, bars in groups)
    return (
        f'<figure class="chart bars"><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {y + _BOTTOM:.0f}" role="img" aria-label="{html.escape(f"{title}: {spoken}")}">'
        f"{''.join(axis)}{''.join(parts)}</svg>{f'<ul>{legend}</ul>' if len(series) > 1 else ''}</figure>"
    )


def furthest(groups: Sequence[tuple[str, Sequence[Bar]]]) -> float:
    """The highest value or end of an interval; 0 without any."""
    ends = [x for _, bars in groups for bar in bars for x in (bar.value, *(bar.interval or ()))]
    return max((x for x in ends if x is not None), default=0.0)


def _drawn(bar: Bar, y: float, scale: float, colour: str) -> str:
    middle = y + _BAR / 2
    if bar.value is None:
        return f'<text x="{_LABEL + 4}" y="{middle + 4:.1f}">–</text>'
    parts = [
        f'<rect class="{colour}" x="{_LABEL}" y="{y + 1:.1f}" width="{max(0.5, bar.value * scale):.1f}" '
        f'height="{_BAR - 2}" rx="2"/>'
    ]
    end = bar.value
    if bar.interval is not None:
        low, high = (_LABEL + each * scale for each in bar.interval)
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}m0 -3v6M{low:.1f} {middle - 3:.1f}v6"/>'
        )
        end = max(end, bar.interval[1])
    text = f"{_number(bar.value)} ({bar.of:,})" if bar.of else _number(bar.value)
    parts.append(f'<text class="value" x="{_LABEL + end * scale + 6:.1f}" y="{middle + 4:.1f}">{text}</text>')
    return "".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _scale(highest: float) -> tuple[float, float]:
    """Distance of the lines of the axis, and its end."""
    rough = highest / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(each for each in (1, 2, 2.5, 5, 10) if each * unit >= rough * (1 - 1e-9))
    return step, step * math.ceil(highest / step - 1e-9)


STYLE: Final = """
.bars svg { font-size: 11px; } .bars .value { fill: var(--faint); } .bars text { fill: var(--ink); }
.bars .whisker { stroke: var(--ink); stroke-width: 1.2; opacity: 0.75; } .bars i { height: 10px; margin-bottom: 0; }
""" + "".join(f".bars rect.c{k} {{ fill: var(--c{k}); }}\n" for k in range(8))
"""Goes beside that of :mod:`regiongpt.charts`."""

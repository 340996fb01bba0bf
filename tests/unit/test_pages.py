"""Pages that need no other file, and the charts in them."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from regiongpt import report
from regiongpt.errors import DataError
from regiongpt.report import Curve, line_chart


class Nesting(HTMLParser):
    """Every element that is opened is closed, in order; no attribute fetches anything."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert all((value or "").startswith(("data:", "#")) for name, value in attrs if name.endswith(("src", "href")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_needs_nothing_else_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "page.html").touch()
    parts = report._environment().get_template("parts.html").module
    body = Markup("").join(
        [
            parts.table([["a<b", "n"], ["<i>", "<td>"]], "<h>"),  # type: ignore[attr-defined]
            parts.facts([("<name>", "<text>")]),  # type: ignore[attr-defined]
            parts.turn("Is <region1> <b>?", "no <region2"),  # type: ignore[attr-defined]
            report.picture(Image.new("RGBA", (2000, 1000), "red"), '"alt"'),
            line_chart("<t>", [Curve(name="<c>", xs=[1, 2], ys=[1.0, 2.0])]),
        ]
    )
    report.write_page(tmp_path / "page.html", "base.html", title="<title>", made="<made>", body=body)
    text = (tmp_path / "page.html").read_text()
    Nesting(text)
    for word in ("<i>", "<td>", "<h>", "<name>", "<text>", "<b>", "<region2", "<c>", "<title>", "<made>"):
        assert str(Markup.escape(word)) in text, word
    assert "&lt;region1&gt;" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'width="900" height="450" alt="&#34;alt&#34;"' in text
    with pytest.raises(DataError, match="cannot be written"):
        report.write_page(tmp_path / "nowhere" / "page.html", "base.html", title="", made="", body="")


def test_a_page_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    monkeypatch.setitem(report._environment().globals, "has_charts", False)
    assert line_chart("t", [Curve(name="n", xs=[1], ys=[1.0])]) == ""
    assert "matplotlib" in report.render("base.html", title="t", made="m", body="")


def paths(chart: str) -> list[np.ndarray]:
    """The points (x, y) of every curve, downwards as in SVG."""
    found = re.findall(r'<path d="(M [^"]*)" clip-path="[^"]*" style="fill: none; stroke: #1f77b4', chart)
    return [np.array(re.findall(r"[ML] (\S+) (\S+)", each), float) for each in found]


def test_noisy_curves_are_averaged_and_schedules_are_not() -> None:
    xs = list(range(2000))
    raw, smooth = paths(line_chart("t", [Curve(name="n", xs=xs, ys=[2 + (-1) ** x for x in xs])]))
    assert max(len(raw), len(smooth)) <= 301
    assert np.ptp(smooth[:, 1]) < np.ptp(raw[:, 1])
    assert len(paths(line_chart("t", [Curve(name="n", xs=xs, ys=[x / 1000 for x in xs], exact=True)]))) == 1


@pytest.mark.parametrize(
    "ys", [[math.nan, math.inf], [1.0, 1.0], [0.0, 0.0], [-1.0, -2.0], [1e-30, 2e30], [3.0], [5.0, math.nan, 6.0], []]
)
def test_any_values_can_be_drawn(ys: list[float]) -> None:
    chart = line_chart("t", [Curve(name="n", xs=list(range(len(ys))), ys=ys)])
    assert bool(chart) == any(map(math.isfinite, ys))
    Nesting(chart)

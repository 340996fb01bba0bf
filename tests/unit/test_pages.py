"""Pages that need no other file, and the curves in them."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from regiongpt import charts, pages
from regiongpt.charts import Curve, line_chart, short
from regiongpt.errors import ConfigError


class Nesting(HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_needs_nothing_else_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    body = pages.card(
        pages.table([["a<b", ""], ["<i>", "12.5 % ██▌"], ["x", "<remark>"]], "<h>")
        + pages.facts([("<name>", "<text>")], "<facts>")
        + pages.beside(
            pages.picture(Image.new("RGBA", (2000, 1000), "red"), '"alt"'), pages.turn("Is <region1> <b>?", "no")
        )
        + pages.region_list([("<cat>", "box")])
        + pages.fault("<why>"),
        "<heading>",
        "<meta>",
    )
    text = pages.page("<title>", "<made>", body + pages.columns(["one", "two"]))
    Nesting(text)
    plain = re.sub(r"<(style)>.*?</\1>", "", text, flags=re.DOTALL)
    for word in ("a<b", "<i>", "<remark>", "<h>", "<name>", "<text>", "<facts>", "<cat>", "<why>", "<heading>"):
        assert word.replace("<", "&lt;").replace(">", "&gt;") in plain
    assert "&lt;title&gt;" in plain
    assert "&lt;made&gt;" in plain
    assert "&lt;region1&gt;" not in plain
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    assert "prefers-color-scheme: dark" in text
    assert 'width="900" height="450"' in text
    pages.write_page(text, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == text
    with pytest.raises(ConfigError, match="expected --html to be a file that can be written"):
        pages.write_page(text, tmp_path)


def test_shares_are_bars_of_the_largest_one() -> None:
    text = pages.table(
        [["kind", "n", ""], ["box", "3", " 75.0 %  ██████"], ["mask", "1", "25.0 % ██"], ["...", "", "rest"]]
    )
    assert re.findall(r"<b>(.*?)</b><i style=\"width:calc\(([\d.]+)", text) == [("75.0 %", "100.0"), ("25.0 %", "33.3")]
    assert "█" not in text
    assert '<td class="bar">rest</td>' in text
    assert "width:calc(0.0" in pages.table([["kind", ""], ["box", "0.0 %"]])


def paths(figure: str) -> list[list[tuple[float, float]]]:
    """The points of every curve."""
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.DOTALL)[0])  # type: ignore[index]
    lines = [each for each in svg.iter("path") if "grid" not in each.get("class", "")]
    return [[tuple(map(float, pair.split())) for pair in each.get("d", "")[1:].split("L")] for each in lines]  # type: ignore[misc]


def test_a_curve_is_where_its_values_are() -> None:
    figure = line_chart("Loss & more", [Curve(name="a<b", xs=[0, 5, 10], ys=[4.0, 2.0, 0.0])])
    Nesting(figure)
    ((first, middle, last),) = paths(figure)
    assert first[0] < middle[0] < last[0]
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert first[1] < middle[1] < last[1]
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.1)
    assert "a&lt;b" in figure
    assert "Loss &amp; more" in figure


def test_equal_ratios_are_equal_steps_on_a_logarithmic_axis() -> None:
    figure = line_chart("norm", [Curve(name="n", xs=[1, 2, 3, 4], ys=[0.1, 1.0, 10.0, -1.0])], logarithmic=True)
    ((first, middle, last),) = paths(figure)
    assert middle[1] - first[1] == pytest.approx(last[1] - middle[1], abs=0.2)


def test_noisy_curves_are_averaged_and_schedules_are_not() -> None:
    xs = list(range(2000))
    noisy = [2 + (-1) ** x for x in xs]
    raw, smooth = paths(line_chart("t", [Curve(name="n", xs=xs, ys=noisy)]))
    assert len(raw) <= 300
    assert len(smooth) <= 300
    assert max(y for _, y in smooth) - min(y for _, y in smooth) < 5
    (exact,) = paths(line_chart("t", [Curve(name="n", xs=xs, ys=[x / 1000 for x in xs], exact=True)]))
    assert exact[0][1] > exact[-1][1] + 150


@pytest.mark.parametrize(
    "ys",
    [[math.nan, math.inf], [1.0, 1.0], [0.0, 0.0], [-1.0, -2.0], [1e-30, 2e30], [3.0], [5.0, math.nan, 6.0], []],
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_values_can_be_drawn(ys: list[float], logarithmic: bool) -> None:
    figure = line_chart("t", [Curve(name="n", xs=list(range(len(ys))), ys=ys)], logarithmic=logarithmic)
    if figure:
        Nesting(figure)
        for x, y in (point for path in paths(figure) for point in path):
            assert 0 <= x <= charts.WIDTH
            assert 0 <= y <= charts.HEIGHT
    else:
        assert not any(math.isfinite(y) and (y > 0 or not logarithmic) for y in ys)


def test_a_spike_does_not_flatten_the_rest() -> None:
    ys = [1.0 + 0.5 * (x % 2) for x in range(400)]
    ys[200] = 1e6
    raw, _ = paths(line_chart("t", [Curve(name="n", xs=list(range(400)), ys=ys)]))
    assert max(y for _, y in raw) - sorted(y for _, y in raw)[2] > 20


@pytest.mark.parametrize(
    ("ys", "logarithmic", "labels"),
    [
        ([6.2002, 6.2134], False, ["6.2", "6.205", "6.21"]),
        ([1.2e-4, 2.1e-4], False, ["1.2e-04", "1.4e-04", "1.6e-04", "1.8e-04", "2e-04"]),
        ([100_120, 100_210], False, ["100.12k", "100.14k", "100.16k", "100.18k", "100.2k"]),
        ([0.0, 1.0], False, ["0", "0.5", "1"]),
        ([3.13, 4.51], True, ["3", "4", "5"]),
        ([0.1, 10.0], True, ["0.1", "1", "10"]),
    ],
)
def test_an_axis_has_some_numbers_and_they_differ(ys: list[float], logarithmic: bool, labels: list[str]) -> None:
    figure = line_chart("t", [Curve(name="n", xs=[1, 2], ys=ys)], logarithmic=logarithmic)
    assert re.findall(r'text-anchor="end">([^<]*)<', figure) == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1234, "1.23k"), (2e-5, "2e-05"), (3.2e9, "3.2G"), (math.nan, "nan"), (-1500, "-1.5k")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text

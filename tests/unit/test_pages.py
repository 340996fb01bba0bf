"""Pages that need no other file, and the charts in them."""

import math
import re
from pathlib import Path

import pytest
from markupsafe import Markup
from PIL import Image

from regiongpt import report
from regiongpt.errors import DataError
from regiongpt.report import line_chart


def test_a_page_needs_nothing_else_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "page.html").touch()
    parts = report._environment().get_template("parts.html").module
    body = Markup("").join(
        [
            parts.table([["a<b", "n"], ["<i>", "<td>"]], "<h>"),  # type: ignore[attr-defined]
            parts.facts([("<name>", "<text>")]),  # type: ignore[attr-defined]
            parts.turn("Is <region1> <b>?", "no <region2"),  # type: ignore[attr-defined]
            report.picture(Image.new("RGBA", (2000, 1000), "red"), '"alt"'),
            line_chart("<t>", {"<c>": {1: 1.0, 2: 2.0}}),
        ]
    )
    report.write_page(tmp_path / "page.html", "base.html", title="<title>", made="<made>", body=body)
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
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
    assert line_chart("t", {"n": {1: 1.0}}) == ""
    assert "matplotlib" in report.render("base.html", title="t", made="m", body="")


@pytest.mark.parametrize(
    "ys", [[math.nan, math.inf], [1.0, 1.0], [0.0, 0.0], [-1.0, -2.0], [1e-30, 2e30], [3.0], [5.0, math.nan, 6.0], []]
)
def test_any_values_can_be_drawn(ys: list[float]) -> None:
    assert bool(line_chart("t", {"n": dict(enumerate(ys))})) == any(map(math.isfinite, ys))

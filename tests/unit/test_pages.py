"""Pages that need no other file."""

import re
from pathlib import Path

import pytest
from markupsafe import Markup
from PIL import Image

from regiongpt import drawing
from regiongpt.errors import DataError


def test_a_page_needs_nothing_else_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "page.html").touch()
    parts = drawing._environment().get_template("parts.html").module
    body = Markup("").join(
        [
            parts.table([["a<b", "n"], ["<i>", "<td>"]], "<h>"),  # type: ignore[attr-defined]
            parts.facts([("<name>", "<text>")]),  # type: ignore[attr-defined]
            parts.turn("Is <region1> <b>?", "no <region2"),  # type: ignore[attr-defined]
            drawing.picture(Image.new("RGBA", (2000, 1000), "red"), '"alt"'),
        ]
    )
    drawing.write_page(tmp_path / "page.html", "base.html", title="<title>", made="<made>", body=body)
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    for word in ("<i>", "<td>", "<h>", "<name>", "<text>", "<b>", "<region2", "<title>", "<made>"):
        assert str(Markup.escape(word)) in text, word
    assert "prefers-color-scheme: dark" in text
    assert 'width="900" height="450" alt="&#34;alt&#34;"' in text
    with pytest.raises(DataError, match="cannot be written"):
        drawing.write_page(tmp_path / "nowhere" / "page.html", "base.html", title="", made="", body="")

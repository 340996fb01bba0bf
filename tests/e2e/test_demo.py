"""``make demo``: every question is answered, the cat is named, and one picture shows it all."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[str, Path]:
    """What the demo prints, and its picture."""
    capture = pytest.MonkeyPatch()
    lines: list[str] = []
    picture = tmp_path_factory.mktemp("demo") / "demo.png"
    capture.setattr("builtins.print", lambda *words, **_: lines.extend(" ".join(map(str, words)).split("\n")))
    try:
        assert runpy.run_path(str(DEMO))["main"](["--out", str(picture)]) == 0
    finally:
        capture.undo()
    return "\n".join(lines), picture


def exchanges(printed: str) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers under each photograph's name."""
    found: dict[str, list[tuple[str, str]]] = {}
    question = name = ""
    for line in printed.split("\n"):
        if line.endswith(".png"):
            name = line
        elif line.startswith("  Q: "):
            question = line[5:]
        elif line.startswith("  A: "):
            found.setdefault(name, []).append((question, line[5:]))
    return found


def test_every_question_has_an_answer(demo):
    found = exchanges(demo[0])
    assert len(found) == 4
    assert all(answer.strip() for asked in found.values() for _, answer in asked)


def test_the_cat_is_named(demo):
    question, answer = exchanges(demo[0])["chelsea.png"][0]
    assert "<region1>" in question
    assert answer == "cat"


def test_one_picture_shows_the_four_scenes(demo):
    with Image.open(demo[1]) as picture:
        assert picture.width >= 1000
        assert picture.height >= 800

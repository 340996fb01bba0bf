"""``make demo``: every question is answered, the cat is named, and one picture shows it all."""

import runpy
from pathlib import Path

from PIL import Image

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_every_question_is_answered_the_cat_is_named_and_one_picture_shows_all_scenes(tmp_path, capsys):
    assert runpy.run_path(str(DEMO))["main"](["--out", str(tmp_path / "demo.png")]) == 0
    found: dict[str, list[tuple[str, str]]] = {}
    question = name = ""
    for line in capsys.readouterr().out.split("\n"):
        if line.endswith(".png"):
            name = line
        elif line.startswith("  Q: "):
            question = line[5:]
        elif line.startswith("  A: "):
            found.setdefault(name, []).append((question, line[5:]))
    assert len(found) == 4
    assert all(answer.strip() for asked in found.values() for _, answer in asked)
    assert ("Is <region1> a cat?", "Yes, it is a cat.") in found["chelsea.png"]
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width >= 1000
        assert picture.height >= 800

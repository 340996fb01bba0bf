"""V3Det: names of the closed set, and caps by category."""

import json
from collections import Counter
from pathlib import Path

import pytest
from converting import DATA, annotation, run

from regiongpt.data.closed_sets import V3DetConverter

NAMES = ["ashtray", "cash machine", "popper"]


def write(folder: Path, names: list[str], each: int = 150) -> Path:
    """Instances in V3Det's layout: ``each`` boxes of every category, ten an image."""
    categories = [{"id": k, "name": name, "name_zh": "", "novel": False} for k, name in enumerate(names, 1)]
    count = each * len(names)
    boxes = [
        annotation(k + 1, [k % 10 * 9, 3, 8, 7], image=k // 10 + 1, category=k % len(names) + 1) for k in range(count)
    ]
    images = [
        {"id": k, "file_name": f"images/n01/{k}.jpg", "width": 100, "height": 80}
        for k in range(1, (count + 9) // 10 + 1)
    ]
    path = folder / "v3det_2023_v1_train.json"
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": boxes}))
    return path


def counts(converter: V3DetConverter) -> dict[str, int]:
    records, rejects = run(converter)
    assert rejects == {}
    return dict(Counter(turn.answer for record in records for turn in record.turns))


def test_the_papers_caps_are_exact(tmp_path):
    options = {"images": tmp_path, "instances": (write(tmp_path, NAMES),), "check_images": False}
    assert counts(V3DetConverter(**options)) == dict.fromkeys(NAMES, 100)
    assert counts(V3DetConverter(**options, boxes_per_category=10)) == dict.fromkeys(NAMES, 10)
    assert counts(V3DetConverter(**options, boxes_per_category=0)) == dict.fromkeys(NAMES, 150)


def test_the_released_names(tmp_path):
    names = DATA / "fixtures" / "v3det" / "category_name_13204_v3det_2023_v1.txt"
    if not names.is_file():
        pytest.skip(f"no names at {names}; set REGIONGPT_DATA to the folder that holds fixtures")
    listed = names.read_text().splitlines()
    assert len(listed) == 13204
    path = write(tmp_path, listed, 1)
    found = counts(V3DetConverter(images=tmp_path, instances=(path,), check_images=False))
    assert found == dict.fromkeys((" ".join(name.split()) for name in listed), 1)  # one has two blanks in a row

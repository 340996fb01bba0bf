"""V3Det: names of the closed set, caps by category, and a list of names that must fit."""

import json
import os
from pathlib import Path

import pytest

from regiongpt.data.closed_sets import V3DetConverter
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError

DATA = Path(os.environ.get("REGIONGPT_DATA", Path(__file__).parents[3] / "shared" / "data"))
NAMES = ["ashtray", "cash machine", "popper"]


def write(folder: Path, names: list[str], each: int = 150) -> Path:
    """Instances in V3Det's layout: ``each`` boxes of every category, ten an image."""
    categories = [
        {"id": k, "name": name, "name_zh": "", "cat_info": "", "novel": False} for k, name in enumerate(names, 1)
    ]
    images, annotations = [], []
    for number in range(each * len(names)):
        image = number // 10 + 1
        if number % 10 == 0:
            images.append({"id": image, "file_name": f"images/n01/{image}.jpg", "width": 100, "height": 80})
        box = [number % 10 * 9, 3, 8, 7]
        annotations.append(
            {"id": number + 1, "image_id": image, "category_id": number % len(names) + 1, "bbox": box, "iscrowd": 0}
        )
    path = folder / "v3det_2023_v1_train.json"
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return path


def counts(converter: V3DetConverter) -> dict[str, int]:
    rejects = Rejects()
    found: dict[str, int] = {}
    for record in converter.records(rejects):
        record.check()
        for turn in record.turns:
            found[turn.answer] = found.get(turn.answer, 0) + 1
    assert rejects.counts == {}
    return found


def test_the_papers_caps_are_exact(tmp_path):
    options = {"images": tmp_path, "instances": (write(tmp_path, NAMES),), "check_images": False}
    assert counts(V3DetConverter(**options)) == dict.fromkeys(NAMES, 100)
    assert counts(V3DetConverter(**options, boxes_per_category=10)) == dict.fromkeys(NAMES, 10)
    assert counts(V3DetConverter(**options, boxes_per_category=0)) == dict.fromkeys(NAMES, 150)


def test_the_question_names_the_closed_set(tmp_path):
    converter = V3DetConverter(images=tmp_path, instances=(write(tmp_path, NAMES, 2),), check_images=False)
    record = next(converter.records(Rejects()))
    assert (record.id, record.image) == ("v3det/1", "images/n01/1.jpg")
    assert record.turns[0].text(0).endswith("Answer the question using V3Det category names.")


def test_a_list_of_other_names_does_not_belong(tmp_path):
    (tmp_path / "names.txt").write_text("ashtray\ncash machine\n")
    path = write(tmp_path, NAMES, 2)
    options = {"images": tmp_path, "instances": (path,), "check_images": False, "names": tmp_path / "names.txt"}
    with pytest.raises(DataError, match=r"'popper' is not in names\.txt"):
        counts(V3DetConverter(**options))
    with pytest.raises(DataError, match=r"none\.txt"):
        counts(V3DetConverter(**{**options, "names": tmp_path / "none.txt"}))
    (tmp_path / "names.txt").write_text("\n".join([*NAMES, "compass"]))
    converter = V3DetConverter(**options)
    assert counts(converter) == dict.fromkeys(NAMES, 2)
    assert converter.inputs() == [path, tmp_path / "names.txt"]


def test_the_released_names(tmp_path):
    names = DATA / "fixtures" / "v3det" / "category_name_13204_v3det_2023_v1.txt"
    if not names.is_file():
        pytest.skip(f"no names at {names}; set REGIONGPT_DATA to the folder that holds fixtures")
    listed = names.read_text().splitlines()
    assert len(listed) == 13204
    path = write(tmp_path, listed, 1)
    found = counts(V3DetConverter(images=tmp_path, instances=(path,), check_images=False, names=names))
    assert found == dict.fromkeys((" ".join(name.split()) for name in listed), 1)  # one has two blanks in a row

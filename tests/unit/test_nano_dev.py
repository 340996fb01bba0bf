"""The benchmark of expressions, presence and small boxes: its questions have right answers, and its scores count."""

import json
from types import SimpleNamespace

import nano_dev
import pytest
from pictures import draw_pictures
from tiny_checkpoint import make_checkpoint

from regiongpt.data.coco import load_coco, photo_sources
from regiongpt.prompts import closed_set_suffix

NAMES = ["person", "dog", "cat", "hot dog", "car", "bus"]


@pytest.fixture
def data(tmp_path):
    draw_pictures(tmp_path, 2, "instances_dev.json")
    content = json.loads((tmp_path / "instances_dev.json").read_text())
    content["categories"] = [{"id": k, "name": name} for k, name in enumerate(NAMES)]
    boxes = [{"category_id": k, "bbox": [14 * k, 8 * k, 12, 10 + k]} for k in range(len(NAMES))]
    boxes[0]["bbox"] = [0, 0, 7, 7]
    content["annotations"] = [{"id": 10 * n + k, "image_id": n, **box} for n in (1, 2) for k, box in enumerate(boxes)]
    (tmp_path / "instances_dev.json").write_text(json.dumps(content))
    return tmp_path


class Oracle:
    """Knows what the annotations say: boxes go down and to the right in the order of NAMES."""

    def set_image(self, photo):
        pass

    def locate(self, expressions, regions, **options):
        return [SimpleNamespace(index=self.fits(each, regions)) for each in expressions]

    def fits(self, expression, regions):
        left = [region.bounds(96, 64)[0] for region in regions]
        there = [NAMES[round(each / 14)] for each in left]
        named = [k for k, name in enumerate(there) if name in expression]
        return max(named, key=lambda k: len(there[k]), default=None)

    def ask_many(self, questions, **options):
        return [SimpleNamespace(text=self.answer(each)) for each in questions]

    def answer(self, question):
        if question.regions:
            assert question.text.endswith(closed_set_suffix())
            return "person"
        return "Yes." if any(f" {name} " in question.text for name in NAMES) else "No."


def test_someone_who_knows_is_right_in_everything(data):
    images = load_coco(photo_sources(data, "dev")).images
    found = nano_dev.scores(nano_dev.measure(Oracle(), images, "fast", 0))
    assert {name: each["value"] for name, each in found.items()} == dict.fromkeys(found, 1.0)
    assert found["small boxes"]["of"] == 2
    assert found["presence"]["of"] == 8
    assert found["locate by words"]["of"] == found["no match by both"]["of"] == 6


def test_presence_counts_both_answers_alike():
    rows = [(image, right, truth) for image in (1, 2) for right, truth in ((True, "yes"), (True, "yes"), (False, "no"))]
    assert nano_dev.scores({"presence": rows}) == {"presence": {"value": 0.5, "interval": (0.5, 0.5), "of": 6}}


def test_a_checkpoint_is_measured_and_stamped(data, capsys):
    command = ["--data", data, "--model", make_checkpoint(data), "--out", data / "out.json", "--limit", "1"]
    assert nano_dev.main([*map(str, command)]) == 0
    report = json.loads((data / "out.json").read_text())
    assert {"commit", "date", "arguments", "machine", "packages", "files"} <= set(report)
    assert len(report["files"]["instances_dev.json"]) == 64
    assert report["results"].keys() >= {"locate by both", "no match by answer", "presence", "small boxes"}
    assert "locate by both" in capsys.readouterr().out

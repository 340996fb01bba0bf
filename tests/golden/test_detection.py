"""The COCO API's own example, against pycocotools; and LVIS' results."""

import json
import os
import random
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from regiongpt.data.coco import Federated
from regiongpt.evaluate.detection import detection_scores

FIXTURES = Path(os.environ.get("REGIONGPT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "fixtures"
DATA = FIXTURES / "cocoapi"


def test_reproduces_the_figures_of_the_coco_api() -> None:
    if not DATA.is_dir():
        pytest.skip(f"no fixtures at {DATA}; set REGIONGPT_DATA to the folder that holds fixtures")
    truth = json.loads((DATA / "instances_val2014_100.json").read_text())
    results = json.loads((DATA / "instances_val2014_fakebbox100_results.json").read_text())
    found = [statistic.value() for statistic in detection_scores(truth, results).values()]
    objects = COCO(DATA / "instances_val2014_100.json")
    theirs = COCOeval(objects, objects.loadRes(results), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert found == pytest.approx(theirs.stats[:6], abs=1e-12)


def test_keeps_lvis_figures() -> None:
    file = FIXTURES / "lvis" / "lvis_val_100.json"
    if not file.is_file():
        pytest.skip(f"no fixtures at {file}; set REGIONGPT_DATA to the folder that holds fixtures")
    truth = json.loads(file.read_text())
    for each in truth["annotations"]:
        each["iscrowd"] = 0
    rng = random.Random(0)
    categories = [each["id"] for each in truth["categories"]]
    drawn = []
    for each in truth["annotations"]:
        x, y, width, height = each["bbox"]
        for _ in range(3):
            category = each["category_id"] if rng.random() < 0.6 else rng.choice(categories)
            box = [x + rng.random() * width * 0.3, y, width, height]
            drawn.append({"image_id": each["image_id"], "category_id": category, "bbox": box, "score": rng.random()})
    rules = Federated(
        absent={each["id"]: each["neg_category_ids"] for each in truth["images"]},
        partly={each["id"]: each["not_exhaustive_category_ids"] for each in truth["images"]},
        frequency={each["id"]: each["frequency"] for each in truth["categories"]},
    )
    found = detection_scores(truth, drawn, federated=rules)
    assert {name: statistic.value() for name, statistic in found.items()} == pytest.approx(
        {
            "AP": 0.5143594860309642,
            "AP50": 0.8977160019002022,
            "AP75": 0.4650436701439935,
            "AP_small": 0.532852610194402,
            "AP_medium": 0.5476748705917617,
            "AP_large": 0.5362959939488134,
            "AP_rare": 0.7499999999999999,
            "AP_common": 0.4798105720370572,
            "AP_frequent": 0.5193961332375563,
        },
        abs=1e-12,
    )

"""The COCO API's own example: all 24 figures of its boxes and masks."""

import json
import os
import re
from pathlib import Path

import pytest

from regiongpt.evaluate.metrics.detection import detection_scores

DATA = Path(os.environ.get("REGIONGPT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "fixtures" / "cocoapi"


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_reproduces_the_figures_of_the_coco_api(kind: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no fixtures at {DATA}; set REGIONGPT_DATA to the folder that holds fixtures")
    truth = json.loads((DATA / "instances_val2014_100.json").read_text())
    results = json.loads((DATA / f"instances_val2014_fake{kind}100_results.json").read_text())
    part = (DATA / "val2014_fake_eval_res.txt").read_text().split(f"type={kind}")[1].split("type=")[0]
    wanted = [float(number) for number in re.findall(r"= (\d\.\d{3})", part)]
    scores = detection_scores(truth, results, kind)  # type: ignore[arg-type]
    assert [round(value, 3) for value in scores.figures.values()] == wanted
    assert len(wanted) == 12
    for name, statistic in scores.statistics.items():
        assert statistic.value() == pytest.approx(scores.figures[name], abs=1e-12)

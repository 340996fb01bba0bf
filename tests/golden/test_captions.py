"""Caption metrics against what the reference tools gave."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import need_java

from regiongpt.evaluate.caption_metrics import caption_scores, tokenized

DATA = Path(os.environ.get("REGIONGPT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "fixtures"
FILE = DATA / "golden_captions" / "refcocog_umd_val_first1000_hyp_is_expr0.json"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    need_java()
    if not FILE.is_file():
        pytest.skip(f"no fixtures at {FILE}; set REGIONGPT_DATA to the folder that holds fixtures")
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def sides(golden: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return [item["hyp"] for item in golden["items"]], [item["refs"] for item in golden["items"]]


def test_finds_the_same_words(golden: dict[str, Any]) -> None:
    said, wanted = tokenized(*sides(golden))
    assert said == [item["tok_hyp"] for item in golden["items"]]
    assert wanted == [item["tok_refs"] for item in golden["items"]]


def test_scores_every_caption_alike(golden: dict[str, Any]) -> None:
    found = caption_scores(*sides(golden), metrics=("CIDEr", "ROUGE_L", "BLEU"))
    for name, each in found.items():
        assert each.statistic.value() == pytest.approx(golden["scores"][name.replace("BLEU", "Bleu")], abs=1e-6)
    for name in ("CIDEr", "ROUGE_L"):
        assert np.abs(found[name].items - [item[name] for item in golden["items"]]).max() < 1e-6


@pytest.mark.slow
def test_scores_every_caption_alike_by_meteor(golden: dict[str, Any]) -> None:
    need_java()
    found = caption_scores(*sides(golden), metrics=("METEOR",))["METEOR"]
    assert found.statistic.value() == pytest.approx(golden["scores"]["METEOR"], abs=1e-6)
    assert np.abs(found.items - [item["METEOR"] for item in golden["items"]]).max() < 1e-6

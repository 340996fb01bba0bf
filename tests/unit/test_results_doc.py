"""The document of results is made of what runs have written, and of nothing else."""

import json
from pathlib import Path

import pytest
import results_doc
from evaluating import Drawn, register
from pictures import draw_pictures

from regiongpt.evaluate.run import evaluate
from regiongpt.evaluate.task import RunOptions

CELL = {"mean": 12.34, "interval": [10.0, 15.0], "gain": None, "gain_interval": None, "too_few": False}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    register(monkeypatch)
    draw_pictures(tmp_path, 2, "instances_dev.json")
    task, given = Drawn(data=tmp_path), tmp_path / "given.jsonl"
    lines = [json.dumps({"id": item.id, "text": "cat", "scores": [3, 2, 1]}) for item in task.items()]
    given.write_text("\n".join(lines))
    evaluate([task], RunOptions(out=tmp_path / "run", gallery=0, predictions=given))
    return tmp_path / "run"


@pytest.fixture
def ablation(tmp_path, run) -> Path:
    (tmp_path / "ablation").mkdir()
    found = {
        **{"ablation": "refinement", "task": "drawn", "items": 4, "seeds": [0, 1]},
        "variants": [{"name": "none"}, {"name": "deconv"}],
        "protocols": {"choices": {"AP": {"none": CELL, "deconv": {**CELL, "mean": 20.0, "gain": 7.66}}}},
        "manifests": {"none": [json.loads((run / "drawn" / "manifest.json").read_text())]},
    }
    (tmp_path / "ablation" / "result.json").write_text(json.dumps(found))
    return tmp_path / "ablation"


def test_figures_go_between_the_marks_and_the_rest_stays(run, ablation, tmp_path, capsys):
    document = tmp_path / "results.md"
    document.write_text(f"before\n\n{results_doc.BEGIN}\n\nold\n\n{results_doc.END}\n\nafter\n")
    words = ["--runs", str(run), "--ablations", str(ablation), "--document", str(document)]
    assert results_doc.main(words) == 0
    assert "2 sections" in capsys.readouterr().out
    text = document.read_text()
    assert (text[:6], text[-6:], "old" in text) == ("before", "after\n", False)
    for part in ("| accuracy | 50.0 | 50.0 to 50.0 | 4 | 80.61 |", "(10.0 to 15.0) | 20.0 (10.0 to 15.0), +7.7 |"):
        assert part in text
    assert "instances_dev.json" in text
    results_doc.main(words)
    assert document.read_text() == text


def test_what_cannot_be_written_is_said(run, tmp_path, capsys):
    document = tmp_path / "results.md"
    document.write_text("no marks")
    for words, part in (
        (["--runs", run], "one of them missing"),
        ([], "at least one folder"),
        (["--ablations", run / "drawn"], "expected the folder of `regiongpt ablate`"),
    ):
        assert results_doc.main([*map(str, words), "--document", str(document)]) == 2
        assert part in capsys.readouterr().err
    assert document.read_text() == "no marks"

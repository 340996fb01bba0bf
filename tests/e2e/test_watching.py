"""A run that is watched learns what it would have learnt, and its page tells of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import draw_pictures
from tiny_checkpoint import make_checkpoint

from regiongpt.cli import main
from regiongpt.data.sources import convert, load_converter
from regiongpt.model import weights
from regiongpt.train.watch import read_lines

RECIPE = Path(__file__).parents[2] / "configs" / "finetune_records.toml"
STAGE = ("batch_size=4", "micro_batch_size=2", "save_steps=2", "epochs=2")
SMALL = ["--from-scratch", *(f"--stage2.{each}" for each in STAGE)]
WATCHED = ["--watch.dev_steps=4", "--stage2.log_steps=2"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root, 8, "instances.json")
    coco: Any = load_converter("coco")
    convert(coco(instances=(root / "instances.json",), images=root / "images"), root / "records")
    return root / "records"


@pytest.fixture(scope="module")
def runs(records: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run, not watched and watched."""
    start = make_checkpoint(tmp_path_factory.mktemp("parts"))
    out = tmp_path_factory.mktemp("runs")
    for name, words in (("plain", []), ("watched", [*WATCHED, f"--data.dev_mixture={records}"])):
        given = [f"--model.init={start}", f"--out={out / name}", f"--data.mixture={records}", *SMALL, *words]
        assert main(["train", str(RECIPE), *given]) == 0
    return {name: out / name for name in ("plain", "watched")}


def test_watching_changes_nothing_that_is_learnt(runs: dict[str, Path]) -> None:
    plain, watched = (read_lines(runs[name] / "stage2" / "log.jsonl") for name in ("plain", "watched"))
    assert len(plain) == 4
    for name in ("step", "loss", "tasks", "lr", "grad_norm", "examples", "tokens", "targets"):
        assert [line[name] for line in plain] == [line[name] for line in watched], name
    states = [weights.load(runs[name] / "stage2" / "model")[0].state_dict() for name in ("plain", "watched")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_page_tells_of_the_run_and_needs_no_other_file(runs: dict[str, Path]) -> None:
    page = (runs["watched"] / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)
    assert "stage2 is finished" in page
    for title in ("Loss", "Loss by task", "Gradient norm", "Recipe", "Data"):
        assert title in page
    assert page.count("<svg") >= 3
    notes = json.loads((runs["watched"] / "run.json").read_text())
    assert notes["starts"][0]["packages"]["torch"] in page
    assert notes["data"]["dev"]["records"] == "8 records an epoch: records 8 of 8"
    assert notes["data"]["dev"]["records"] in page
    for field in ("micro_batch_size", "init", "packing", "rank"):
        assert f"<dt>{field}</dt>" in page


@pytest.mark.parametrize("notes", [None, "[]", "{", '{"starts": 3}'])
def test_the_page_of_a_run_that_was_killed_is_made_of_what_there_is(
    notes: str | None, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (runs["watched"] / "stage2" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "log.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    if notes is not None:
        (tmp_path / "run.json").write_text(notes)
    assert main(["train", "--report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert "stage2 has done step 2 of 4" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "not the folder of a run"),
        ('{"step": 1, "of": 2, "loss": [], "tasks": 3}\n', "damaged"),
        ('{"step": 1', ""),
    ],
)
def test_a_folder_that_holds_no_run_is_named_and_one_without_a_step_has_a_page(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "stage1").mkdir()
        (tmp_path / "stage1" / "log.jsonl").write_text(text)
    assert main(["train", "--report", str(tmp_path)]) == (2 if said else 0)
    assert said in capsys.readouterr().err
    assert said or "stage1 has not started" in (tmp_path / "report.html").read_text()

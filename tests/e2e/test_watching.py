"""A run that is watched learns what it would have learnt, and notes what it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import draw_pictures
from tiny_checkpoint import make_checkpoint

from regiongpt.cli import main
from regiongpt.data.sources import convert, load_converter
from regiongpt.model import weights
from regiongpt.train.recipe import Recipe
from regiongpt.train.watch import note_run, read_lines

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


def test_a_run_notes_its_recipe_records_and_starts_whatever_was_there(runs: dict[str, Path], tmp_path: Path) -> None:
    notes = json.loads((runs["watched"] / "run.json").read_text())
    assert notes["data"]["dev"]["records"] == "8 records an epoch: records 8 of 8"
    assert notes["config"]["stage2"]["micro_batch_size"] == 2
    assert "torch" in notes["starts"][0]["packages"]
    for number, torn in enumerate(["", "[]", "{", '{"starts": 3}', None], 1):
        if torn is not None:
            (tmp_path / "run.json").write_text(torn)
        note_run(tmp_path, Recipe(**notes["config"]), {})
        starts = json.loads((tmp_path / "run.json").read_text())["starts"]
        assert len(starts) == (1 if torn is not None else 2), number

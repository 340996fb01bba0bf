"""Converted records train a checkpoint: drawn pictures from end to end, stages, interruptions, and what is refused."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import draw_pictures
from tiny_checkpoint import make_checkpoint

from regiongpt import Region, RegionPredictor
from regiongpt.cli import main
from regiongpt.data.inspection import check, load_processor
from regiongpt.data.records import Record, Turn
from regiongpt.data.shards import RecordSet, Rejects, write_records
from regiongpt.data.sources import convert, load_converter
from regiongpt.model import weights
from regiongpt.train.debug import debug_size
from regiongpt.train.recipe import Recipe

ROOT = Path(__file__).parents[2]
TOWER = "google/siglip-so400m-patch14-384"
RECIPE = ROOT / "configs" / "finetune_records.toml"
SMALL = ["--stage2.batch_size=4", "--stage2.micro_batch_size=2", "--stage2.save_steps=1", "--stage2.log_steps=1"]
FIRST = [word.replace("stage2", "stage1") for word in SMALL]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures with a red cat and a blue dog each, as rectangles, in COCO's format; and the records of them."""
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root, 10, "instances.json")
    coco: Any = load_converter("coco")
    convert(coco(instances=(root / "instances.json",), images=root / "images"), root / "coco")
    empty: Any = {"source": "jsonl", "image": "", "width": 0, "height": 0, "regions": ()}
    empty["turns"] = (Turn(task="chat", question="Two and two?", answer="Four."),)
    texts = [Record(id=f"talk/{n}", **empty) for n in range(3)]
    write_records(root / "talk", texts, Rejects(), source="jsonl", images=".", inputs=[], arguments={})
    (root / "both.toml").write_text('[[parts]]\nrecords = "coco"\ncap = 6\n[[parts]]\nrecords = "talk"\n')
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint."""
    return make_checkpoint(tmp_path_factory.mktemp("parts"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = weights.load(folder)[0].state_dict()
    return state


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def run(start: Path, out: Path, *words: str | Path) -> int:
    return main(["train", str(RECIPE), f"--model.init={start}", f"--out={out}", "--from-scratch", *map(str, words)])


@pytest.fixture(scope="module")
def finished(pictures: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the second stage, with all of its checkpoints."""
    out = tmp_path_factory.mktemp("run")
    assert run(start, out, f"--data.mixture={pictures / 'both.toml'}", "--stage2.epochs=2", *SMALL) == 0
    return out


def test_pictures_are_converted_inspected_and_trained_on(
    pictures: Path, start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    records = RecordSet(pictures / "coco")
    assert len(records) == 10
    assert list(check(records, load_processor(start))) == []
    words = [f"--data.mixture={pictures / 'coco'}", "--stage2.lr=0.01", "--stage2.epochs=4", *SMALL]
    with caplog.at_level(logging.INFO):
        assert run(start, tmp_path, *words) == 0
    assert "stage2: 10 records an epoch: coco 10 of 10" in caplog.text
    losses = [float(loss) for loss in re.findall(r"stage2: step \d+ of 10, loss ([0-9.]+)", caplog.text)]
    assert len(losses) == 10
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    model = tmp_path / "stage2" / "model"
    assert capsys.readouterr().out.strip() == str(model)
    assert changed(tensors(start), tensors(model)) == {"refinement", "connector", "language_model"}
    predictor = RegionPredictor.from_pretrained(model)
    predictor.set_image(pictures / "images" / "1.png")
    assert isinstance(predictor.ask("What is <region1>?", [Region.box(4, 4, 30, 40)]).text, str)


def test_stages_one_by_one_are_both_at_once_and_a_finished_one_is_not_run_again(
    pictures: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [f"--data.pretrain_mixture={pictures / 'coco'}", f"--data.mixture={pictures / 'both.toml'}", *FIRST, *SMALL]
    assert run(start, tmp_path / "once", *both) == 0
    assert run(start, tmp_path / "twice", *both, "--steps=stage1") == 0
    assert not (tmp_path / "twice" / "stage2").exists()
    assert run(start, tmp_path / "twice", *both, "--steps=stage2") == 0
    first, once, twice = (tensors(tmp_path / out / "model") for out in ("once/stage1", "once/stage2", "twice/stage2"))
    assert changed(tensors(start), first) == {"refinement", "connector"}
    assert changed(first, once) == {"refinement", "connector", "language_model"}
    assert not changed(once, twice)
    written = (tmp_path / "once" / "stage2" / "model" / "model.safetensors").stat().st_mtime_ns
    assert run(start, tmp_path / "once", *both, "--steps=stage2") == 0
    assert (tmp_path / "once" / "stage2" / "model" / "model.safetensors").stat().st_mtime_ns == written
    texts = [f"--data.{name}={pictures / 'both.toml'}" for name in ("mixture", "pretrain_mixture")]
    assert run(start, tmp_path / "texts", *texts) == 2
    assert "talk: 3 of 3 records have no image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("--seed=1", "seed = 1, it has 0"),
        ("--data.mixture=coco", "other records"),
        ("--data.pretrain_mixture=coco", "other records"),
        ("--lora.rank=2", "other lora"),
    ],
)
def test_a_run_does_not_go_on_with_other_records_seed_or_adapters(
    word: str, what: str, pictures: Path, start: Path, finished: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(pictures)
    assert run(start, finished, "--data.mixture=both.toml", "--stage2.epochs=2", *SMALL, word) == 2
    assert what in capsys.readouterr().err


def test_the_second_stage_of_a_new_model_is_refused_before_the_model_is_made(
    tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = ROOT / "configs" / "vicuna7b_stage2.toml"
    made = debug_size(Recipe.load(config, [f"--out={tmp_path / 'made'}"]))
    recipe = ["train", str(config), f"--out={tmp_path / 'run'}", f"--model.language={made.model.language}", *SMALL]
    recipe += [f"--model.vision={made.model.vision}", "--model.image_size=0", f"--data.mixture={made.data.mixture}"]
    for init, told in ((tmp_path / "none", "no checkpoint there; run stage 1 first"), ("", "give --from-scratch")):
        assert main([*recipe, f"--model.init={init}"]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "run" / "start").exists()
    new = [*recipe, "--model.init=", "--from-scratch", "--engine.workers=0"]
    with caplog.at_level(logging.WARNING):
        assert main(new) == 0
    assert "are untrained" in caplog.text
    start = tmp_path / "run" / "start" / "model.safetensors"
    before = start.read_bytes()
    shutil.rmtree(tmp_path / "run" / "stage2")
    assert main([*new, "--seed=1"]) == 0
    assert start.read_bytes() != before


def test_a_start_of_another_shape_is_refused_with_every_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "configs" / "vicuna7b_stage2.toml"
    made = debug_size(Recipe.load(recipe, [f"--out={tmp_path / 'made'}", "--model.image_marks=true"]))
    model = {"init": made.model.init, "vision": made.model.vision, "language": made.model.language, "image_size": 0}
    words = [f"--model.{name}={value}" for name, value in model.items()]
    words += [f"--data.mixture={made.data.mixture}", f"--out={tmp_path / 'run'}"]
    assert main(["train", str(recipe), *words, "--model.refinement=none"]) == 2
    error = capsys.readouterr().err
    assert "refinement is deconv there and none here; image_marks is True there and False here; " in error
    assert main(["train", str(recipe), *words, "--model.image_marks=true", f"--model.vision={TOWER}"]) == 2
    error = capsys.readouterr().err
    assert "vision.hidden_size is 32 there and 1152 here" in error
    assert "image_marks" not in error

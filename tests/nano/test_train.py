"""The whole recipe on drawn pictures: it trains, survives being killed, what is frozen stays; its settings."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import steps
import torch
from pictures import TINY, draw_pictures
from recipe import RECIPE, NanoRecipe
from steps import train
from train import main

from regiongpt import Region, RegionPredictor
from regiongpt.cli import main as regiongpt_main
from regiongpt.errors import ConfigError
from regiongpt.model import weights

SMALL = {
    **TINY,
    "language.epochs": 0.5,
    "align.micro_batch_size": 4,
    "align.log_steps": 1,
    "stage1.epochs": 2,
    "stage1.micro_batch_size": 4,
    "stage1.save_steps": 1,
    "stage1.log_steps": 1,
    "stage2.epochs": 3,
    "stage2.micro_batch_size": 4,
    "stage2.save_steps": 1,
    "stage2.log_steps": 1,
    "polish.epochs": 2,
    "polish.micro_batch_size": 4,
    "polish.log_steps": 1,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Sixteen pictures with a red cat and a blue dog each, as rectangles, in COCO's format."""
    root = tmp_path_factory.mktemp("pictures")
    images = draw_pictures(root, 16, "instances_train.json")
    captions = [{"id": each["id"], "image_id": each["id"], "caption": "A red cat and a blue dog."} for each in images]
    (root / "captions_train.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return root


def overrides(pictures: Path, out: Path) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SMALL, "data.root": pictures, "out": out}.items()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return weights.load(folder)[0].state_dict()


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert train(NanoRecipe.load(RECIPE, overrides(pictures, out))) == out / "polish" / "model"
    return out


def test_each_stage_changes_what_it_should_and_the_tower_stays_to_the_bit(run):
    folders = ("start", "align/model", "stage1/model", "stage2/model", "polish/model")
    states = [tensors(run / folder) for folder in folders]
    learning = ("connector.linear", "refinement")
    whole = (*learning, "language_model")
    for learns, before, after in zip((learning, learning, whole, whole), states[:-1], states[1:], strict=True):
        for name, value in before.items():
            assert torch.equal(value, after[name]) != name.startswith(learns), name


def test_the_finished_model_answers(run, pictures):
    predictor = RegionPredictor.from_pretrained(run / "polish" / "model")
    predictor.set_image(pictures / "images" / "1.png")
    assert isinstance(predictor.ask("What is <region1>?", [Region.box(4, 4, 30, 40)]).text, str)


def test_a_finished_run_is_not_run_again_and_says_so(run, pictures, caplog):
    before = (run / "polish" / "model" / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        train(NanoRecipe.load(RECIPE, [*overrides(pictures, run), "--seed=9"]))
    for step in ("language", "align", "stage1", "stage2", "polish"):
        assert f"{step}: already finished, in {run}" in caplog.text
    assert (run / "polish" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_killed_run_goes_on_to_the_same_weights(run, pictures, tmp_path):
    command = [sys.executable, str(RECIPE.with_name("train.py")), *overrides(pictures, tmp_path / "run")]
    checkpoint = tmp_path / "run" / "stage2" / "checkpoint-2"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the run did not reach its second step"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "stage2" / "model").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == str(tmp_path / "run" / "polish" / "model")
    expected, got = tensors(run / "polish" / "model"), tensors(tmp_path / "run" / "polish" / "model")
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_the_start_of_another_recipe_is_refused(run, pictures, capsys):
    assert main([*overrides(pictures, run), "--features.seed=5"]) == 2
    assert main([*overrides(pictures, run), "--model.image_marks=false"]) == 2
    error = capsys.readouterr().err
    assert "image_marks is True there and False here" in error
    assert "give another --out" in error


def test_the_language_model_alone_makes_no_features_and_the_steps_make_the_whole(run, pictures, tmp_path):
    words = overrides(pictures, tmp_path)
    assert main([*words, "--steps=language"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["language", "language-checkpoints"]
    assert main([*words, "--steps=stage2"]) == 2
    assert main([*words, "--steps=align,stage1"]) == 0
    assert main([*words, "--steps=stage2"]) == 0
    assert main([*words, "--steps=polish"]) == 0
    ours, theirs = (tensors(out / "polish" / "model") for out in (tmp_path, run))
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def test_it_is_watched_on_held_out_images(tmp_path):
    words = ["--debug", f"--out={tmp_path / 'run'}", "--data.dev_split=dev", "--watch.dev_steps=2"]
    assert main(words) == 0
    run = tmp_path / "run-debug" / "run"
    assert [json.loads(line)["step"] for line in (run / "stage2" / "dev.jsonl").read_text().splitlines()] == [2, 3]
    assert [each["command"] for each in json.loads((run / "run.json").read_text())["starts"]]


@pytest.mark.parametrize("name", ["nano", "configs/nano.toml", str(RECIPE)])
def test_the_package_runs_the_script_beside_a_recipe(name, tmp_path):
    command = [sys.executable, "-m", "regiongpt.cli", "train", name, "--data.root", "nowhere"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("nano: error: ")
    assert "COCO annotations at nowhere" in ran.stderr
    assert regiongpt_main(["train", name, "--plan"]) == 2


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        *("align.lr=0", "language.lr=inf", "align.alignment=0", "steps=stage3", "isolated_share=2", "features.views=0"),
        *("features.min_crop=0", "data.outline_share=-1", "data.mix.classify=nan", "data.mix.classify=1e9"),
        *("data.mix.dance=1", "data.split=", "model.layers=0", "model.heads=0", "model.heads=3", "model.hidden_size=0"),
        *("model.hidden_size=12", "model.mlp_size=0", "model.vocab_size=10", "model.comparing_layers=-1"),
        *("model.max_length=8", "model.image_grid=32"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(word):
    with pytest.raises(ConfigError) as error:
        NanoRecipe.load(RECIPE, [f"--{word}"])
    table, _, field = word.partition("=")[0].partition(".")
    assert str(error.value).startswith((table, f"model: {field}", "model: max_length"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.init=nano"], "goes with a recipe on records"),
        (["--data.mixture=m"], "goes with a recipe on records"),
        (["--plan.gpus=2"], "goes with a recipe on records"),
        (["--lora.alpha=8"], "lora.rank is 0"),
        (["--steps=align", "--lora.rank=8"], "adapters need stage 2"),
        (["--data.dev_split=dev"], "nothing is measured on it"),
        (["--watch.dev_steps=5"], "there is no dev data"),
        (["--model.chat_template=plain"], "give model.language too"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        NanoRecipe.load(RECIPE, words)


def test_a_mix_without_any_turn_is_refused():
    with pytest.raises(ConfigError, match="give a number above 0"):
        NanoRecipe(data={"mix": {"classify": 0}})


def test_help_and_mistakes_load_nothing_heavy():
    script = "import sys; from train import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", script, "--data.root=nowhere"]
    ran = subprocess.run(command, cwd=RECIPE.parent, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["2", "False"]
    assert ran.stderr.startswith("nano: error: ")
    assert "COCO annotations" in ran.stderr


def test_caching_beside_the_language_step_ends_with_a_killed_run(pictures, tmp_path):
    script = """
import os, signal, sys, steps, torch
from recipe import RECIPE, NanoRecipe
steps.WORTH_A_PROCESS, torch.get_num_threads = 1, lambda: 2
with steps.caching_features(NanoRecipe.load(RECIPE, sys.argv[1:]), 16):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script, *overrides(pictures, tmp_path)]
    killed = subprocess.run(command, cwd=RECIPE.parent, capture_output=True, check=False)  # until both have ended
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "features").exists()


def test_features_that_were_cached_beside_the_language_step_are_taken_over(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "WORTH_A_PROCESS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    config = NanoRecipe.load(RECIPE, overrides(pictures, tmp_path))
    progress = tmp_path / "features" / "progress.json"
    with steps.caching_features(config, 16):
        deadline = time.monotonic() + 120
        while not (progress.exists() and json.loads(progress.read_text())["done"] == 16):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not multiprocessing.active_children()
    written = progress.stat().st_mtime_ns
    assert train(config.replace(steps=("language", "align"))) == tmp_path / "align" / "model"
    assert progress.stat().st_mtime_ns == written

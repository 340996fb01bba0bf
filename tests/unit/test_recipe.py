"""Recipes are checked where they are read: what makes no sense, or would not be read, is refused in one line."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest

from regiongpt.errors import ConfigError
from regiongpt.model.configuration import REFINEMENTS
from regiongpt.train.recipe import ModelConfig, Recipe

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
NEW = ["--model.language=a", "--data.mixture=m", "--data.pretrain_mixture=p"]


@pytest.mark.parametrize(
    "word",
    [
        *("stage2.lr=fast", "stage2.lr=nan", "stage1.lr=-1", "stage2.epochs=0", "stage2.weight_decay=-0.1"),
        *("stage1.batch_size=9", "stage1.micro_batch_size=0", "stage1.warmup_ratio=1", "stage1.save_steps=0"),
        *("seed=-1", "seed=1.5", "seed.a=1", "seed=99999999999", "steps=stage3", "out=", "out=a\0b"),
        *("engine.precision=fp8", "engine.sharding=none", "engine.workers=-1", "watch.keep=0"),
        *("model.image_size=-32", "model.refinement=cubic", "model.vision="),
        *("plan.gpu=a100", "plan.gpus=0"),
        *("lora.rank=-1", "lora.alpha=0", "lora.dropout=1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(word: str) -> None:
    rank = ["--lora.rank=4"] if word.startswith("lora") and "rank" not in word else []
    with pytest.raises(ConfigError) as error:
        Recipe.load(None, [*NEW, *rank, f"--{word}"])
    table, _, field = word.partition("=")[0].partition(".")
    assert str(error.value).startswith((table, f"--{table}", f"model: {field}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("finetune_records", ["--lora.alpha=8"], "lora.rank is 0"),
        ("finetune_records", ["--data.dev_mixture=dev"], "nothing is measured on it"),
        ("vicuna7b_stage1", ["--lora.rank=8"], "adapters need stage 2"),
        ("finetune_records", ["--watch.dev_steps=5", "--data.dev_mixture="], "there is no dev data"),
        ("finetune_records", ["--stage2.alignment=1"], "unknown setting 'stage2.alignment'"),
        ("finetune_records", ["--stage1.lr=1"], "give data.pretrain_mixture too"),
        ("finetune_records", ["--model.refinement=none"], "the checkpoint nano brings its own shape"),
        ("finetune_records", ["--model.init="], "give model.init, or model.vision and model.language"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(name: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.load(CONFIGS / f"{name}.toml", words)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_read_and_survives_json(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe(**json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("seed = 7\n[data]\nmixture = 'records'\n[model]\ninit = 'nano'\n", "utf-8-sig")
    assert Recipe.load(tmp_path / "own.toml").seed == 7


def test_the_refinements_are_those_of_the_model() -> None:
    assert set(get_args(ModelConfig.model_fields["refinement"].annotation)) == set(REFINEMENTS)


def test_a_bare_name_finds_what_ships_and_a_misspelt_one_the_nearest(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    name = "finetune_records"
    assert Recipe.load(name) == Recipe.load(f"configs/{name}.toml") == Recipe.load(CONFIGS / f"{name}.toml")
    assert Path(Recipe.load("vicuna7b_stage1").data.pretrain_mixture).is_file()
    (tmp_path / name).mkdir()
    (tmp_path / f"{name}.toml").write_text("seed = 7\n[data]\nmixture = 'records'\n[model]\ninit = 'nano'\n")
    assert Recipe.load(f"{name}.toml").seed == 7
    assert Recipe.load(name).seed == 0
    for name, told in (("table6_non", "did you mean 'table6_none'"), ("/", "a folder"), ("nano", "recipes/nano")):
        with pytest.raises(ConfigError, match=told):
            Recipe.load(name)


def test_a_wheel_holds_every_recipe(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("weights", "*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    listed = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for path in CONFIGS.rglob("*.toml"):
        assert f"regiongpt/configs/{path.relative_to(CONFIGS).as_posix()}" in listed

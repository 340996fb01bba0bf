"""nano's settings: what makes no sense, or would not be read, is refused in one line."""

import subprocess
import sys

import pytest
from recipe import RECIPE, NanoRecipe

from regiongpt.errors import ConfigError


@pytest.mark.parametrize(
    "word",
    [
        *("align.lr=0", "language.lr=inf", "align.alignment=0", "steps=stage3", "isolated_share=2", "features.views=0"),
        *("features.min_crop=0", "data.outline_share=-1", "data.mix.classify=nan", "data.mix.classify=1e9"),
        *("data.mix.dance=1", "data.split=", "model.layers=0", "model.heads=0", "model.heads=3", "model.hidden_size=0"),
        *("model.hidden_size=12", "model.mlp_size=0", "model.vocab_size=10", "model.comparing_layers=-1"),
        *("model.max_length=8", "model.image_grid=32", "model.region_grid=5"),
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
        (["--steps=align", "--lora.rank=8"], "adapters belong to stage 2"),
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

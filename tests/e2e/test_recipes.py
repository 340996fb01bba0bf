"""Every recipe that ships is read, planned and run at debug size; the plan is held to what the run measures."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from regiongpt import Region, RegionPredictor
from regiongpt.cli import main
from regiongpt.data.shards import open_mixture
from regiongpt.errors import ConfigError
from regiongpt.model import weights
from regiongpt.storage import locked
from regiongpt.train.dataset import DataCollator, RecordDataset, answer_loss
from regiongpt.train.debug import debug_size
from regiongpt.train.plan import StagePlan, make_plan
from regiongpt.train.recipe import Recipe, language_shape, tower_shape
from regiongpt.train.stages import choose_learners, train

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The recipe of a name at debug size, what it was planned to take, and the checkpoint that it made."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def run(name: str) -> tuple[Recipe, tuple[StagePlan, ...], Path]:
        config = debug_size(Recipe.load(CONFIGS / f"{name}.toml", [f"--out={root / name}"]))
        return config, make_plan(config), train(config)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_at_debug_size_as_planned(name: str, runs: Any) -> None:
    config, plan, finished = runs(name)
    assert [stage.name for stage in plan] == [step for step in config.all_steps if config.runs(step)]
    model, _ = weights.load(finished)
    for part, (parameters, _) in plan[-1].parameters.items():
        if part != "adapters":
            assert parameters == sum(tensor.numel() for tensor in getattr(model, part).parameters()), part
    for stage in plan:
        folder = config.out / stage.name
        assert max(int(each.name.split("-")[1]) for each in folder.glob("checkpoint-*")) == stage.steps


def test_adapters_are_merged_into_a_checkpoint_like_any_other(runs: Any) -> None:
    config, plan, finished = runs("vicuna7b_stage2_lora")
    before, after = (weights.load(folder)[0].state_dict() for folder in (config.model.init, finished))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    language = {name for name in changed if name.startswith("language_model.")}
    assert before.keys() == after.keys()
    assert language
    assert all(".layers." in name and name.endswith("proj.weight") for name in language)
    assert plan[0].parameters["language_model"][1] == 0
    predictor = RegionPredictor.from_pretrained(finished)
    predictor.set_image(next((config.out.parent / "made" / "images").iterdir()))
    assert isinstance(predictor.ask("What is <region1>?", [Region.box(4, 4, 30, 40)]).text, str)


@pytest.mark.parametrize(
    ("language", "vision"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "facebook/dinov2-large"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "efficientnet-lite2"),
    ],
)
def test_other_towers_and_language_models(language: str, vision: str, tmp_path: Path) -> None:
    words = [f"--out={tmp_path}", f"--model.language={language}", f"--model.vision={vision}", "--model.image_size=0"]
    words += ["--lora.rank=4"]
    config = debug_size(Recipe.load(CONFIGS / "table7_openai_vit_l_336.toml", words))
    plan, finished = make_plan(config), train(config)
    model, _ = weights.load(finished)
    assert model.config.text_config.model_type == language_shape(language).model_type
    assert model.config.vision_config.model_type == tower_shape(vision).model_type
    for part, (parameters, _) in plan[0].parameters.items():
        assert parameters == sum(tensor.numel() for tensor in getattr(model, part).parameters()), part


def test_a_debug_run_deletes_neither_other_files_nor_a_run_that_goes_on(tmp_path: Path) -> None:
    recipe, other = Recipe.load("finetune_records", [f"--out={tmp_path / 'a'}"]), tmp_path / "b-debug" / "thesis.txt"
    with locked(tmp_path / "a-debug" / "run"), pytest.raises(ConfigError, match="is writing there"):
        debug_size(recipe)
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(ConfigError, match="not a debug run"):
        debug_size(recipe.replace(out=tmp_path / "b"))
    assert other.read_text() == "mine"


def test_the_command_plans(capsys: Any) -> None:
    words = ["--plan.gpu=h100-sxm", "--plan.gpus=4"]
    assert main(["train", str(CONFIGS / "vicuna7b_stage1.toml"), "--plan", *words]) == 0
    told = capsys.readouterr().out
    assert "vision tower 303.5 M frozen, refinement 8.4 M trained, connector 21.0 M trained" in told
    assert "language model 6,738.4 M frozen" in told
    assert "on 4 x h100-sxm" in told
    (stage,) = make_plan(Recipe.load(CONFIGS / "vicuna7b_stage1.toml", words))
    # CLIP ViT-L/14 at 336 px is known to take 191 G multiply-adds an image (its authors' count is for 224 px: 81).
    assert stage.flops["tower"] / 923_000 / 2 == pytest.approx(191e9, rel=0.01)
    # 2 multiply-adds forward and 1 back for each weight of the layers and each token, since these weights do not learn.
    assert stage.flops["language"] == pytest.approx(4 * 32 * 202_383_360 * stage.items * stage.tokens, rel=0.05)
    assert stage.steps == 3606


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan.gpu=a100-80"], "did you mean 'a100-80gb'?"),
        (["--plan.gpus=7"], "stage1.batch_size: 256 is not a multiple of micro_batch_size=32 times 7 GPUs"),
        (["--plan.stage1.records=0", "--data.root=nowhere"], "nowhere"),
        (["--model.vision=some/tower"], "model.vision: the shape of 'some/tower' is not known here"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["train", str(CONFIGS / "vicuna7b_stage1.toml"), "--plan", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("regiongpt: error:")
    assert message in error


@pytest.mark.parametrize(
    "words",
    [
        ["--engine.precision=fp32", "--engine.gradient_checkpointing=false"],
        ["--engine.precision=fp32"],
        ["--engine.gradient_checkpointing=false"],
        ["--lora.rank=4"],
    ],
    ids=["plain", "checkpointing", "bf16", "adapters"],
)
def test_a_plan_is_about_what_training_measures(words: list[str], tmp_path: Path) -> None:
    recipe = CONFIGS / "vicuna7b_stage2.toml"
    config = debug_size(Recipe.load(recipe, [f"--out={tmp_path / 'run'}", "--engine.packing=false", *words]))
    model, processor = weights.load(config.model.init)
    choose_learners("stage2", model.train(), config.lora)
    if config.engine.gradient_checkpointing:
        # The name that the newest release has for it, or else the older one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    mixture = open_mixture(config.data.mixture, "", config.seed)
    records = RecordDataset(mixture, processor, len(mixture), 512)
    micro = config.stage2.micro_batch_size
    examples = sorted((records[k] for k in range(len(mixture))), key=lambda each: -len(each["input_ids"]))[:micro]
    size = {"text_tokens": len(examples[0]["input_ids"]) - model.config.num_image_tokens}
    size["answer_tokens"] = sum(int((each["labels"] != -100).sum()) for each in examples) // micro
    (plan,) = make_plan(config.replace(plan=config.plan.replace(stage2=size)))
    assert plan.items == len(mixture)
    total, learning = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (False, True))
    assert sum(parameters for parameters, _ in plan.parameters.values()) == total
    assert sum(trained for _, trained in plan.parameters.values()) == learning
    assert plan.memory == {"weights": 4 * total, "gradients": 4 * learning, "optimiser": 8 * learning}
    batch = DataCollator(processor)(examples)
    batch.pop("tasks")
    # Attention as plain products: the CPU's fused kernel is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.engine.precision == "bf16"):
            loss = answer_loss(model, batch, 1)
        loss.backward()
    assert counter.get_total_flops() / micro == pytest.approx(sum(plan.flops.values()) / plan.items, rel=0.05)

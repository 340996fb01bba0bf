"""Every recipe that ships is read, planned and run at debug size; the plan is held to what the run measures."""

import json
import shutil
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regiongpt import Region, RegionPredictor
from regiongpt.cli import main
from regiongpt.data.shards import open_mixture
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import weights
from regiongpt.storage import locked
from regiongpt.train.dataset import DataCollator, RecordDataset, answer_loss
from regiongpt.train.debug import debug_size
from regiongpt.train.known import language_shape, tower_shape
from regiongpt.train.plan import Plan, make_plan
from regiongpt.train.recipe import Recipe
from regiongpt.train.stages import choose_learners, train

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The recipe of a name at debug size, what it was planned to take, and the checkpoint that it made."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def run(name: str) -> tuple[Recipe, Plan, Path]:
        config = debug_size(Recipe.load(CONFIGS / f"{name}.toml", [f"--out={root / name}"]))
        plan = make_plan(config)
        return config, plan, train(config)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_at_debug_size_as_planned(name: str, runs: Any) -> None:
    config, plan, finished = runs(name)
    assert [stage.name for stage in plan.stages] == [step for step in config.all_steps if config.runs(step)]
    model, _ = weights.load(finished)
    for part, (parameters, _) in plan.stages[-1].parameters.items():
        if part != "adapters":
            assert parameters == sum(tensor.numel() for tensor in getattr(model, part).parameters()), part
    for stage in plan.stages:
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
    assert plan.stages[0].parameters["language_model"][1] == 0
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
def test_other_towers_language_models_and_region_grids(language: str, vision: str, tmp_path: Path) -> None:
    words = [f"--out={tmp_path}", f"--model.language={language}", f"--model.vision={vision}", "--model.image_size=0"]
    words += ["--lora.rank=4", "--model.region_grid=2"]
    config = debug_size(Recipe.load(CONFIGS / "table7_openai_vit_l_336.toml", words))
    plan, finished = make_plan(config), train(config)
    model, processor = weights.load(finished)
    assert len(processor.region_inputs([Region.box(4, 4, 30, 40), Region.box(50, 4, 90, 60)], 96, 64)) == 8
    assert model.config.text_config.model_type == language_shape(language).model_type
    assert model.config.vision_config.model_type == tower_shape(vision).model_type
    for part, (parameters, _) in plan.stages[0].parameters.items():
        assert parameters == sum(tensor.numel() for tensor in getattr(model, part).parameters()), part


def test_a_debug_run_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regiongpt.train.debug.write_records", write)
    with pytest.raises(DataError, match="No space left"):
        debug_size(Recipe.load("finetune_records", [f"--out={tmp_path / 'run'}"]))
    assert not list(tmp_path.iterdir())


def test_a_debug_run_deletes_neither_other_files_nor_a_run_that_goes_on(tmp_path: Path) -> None:
    recipe, other = Recipe.load("finetune_records", [f"--out={tmp_path / 'a'}"]), tmp_path / "b-debug" / "thesis.txt"
    with locked(tmp_path / "a-debug" / "run"), pytest.raises(ConfigError, match="is writing there"):
        debug_size(recipe)
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(ConfigError, match="not a debug run"):
        debug_size(recipe.replace(out=tmp_path / "b"))
    assert other.read_text() == "mine"


def test_the_command_plans_in_words_and_in_json(capsys: Any) -> None:
    words = ["train", str(CONFIGS / "vicuna7b_stage1.toml"), "--plan", "--gpu", "h100-sxm", "--gpus", "4"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "vision tower 303.5 M frozen, refinement 8.4 M trained, connector 21.0 M trained" in told
    assert "language model 6,738.4 M frozen" in told
    assert "on 4 x h100-sxm" in told
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (stage,) = plan["stages"]
    # CLIP ViT-L/14 at 336 px is known to take 191 G multiply-adds an image (its authors' count is for 224 px: 81).
    assert stage["flops"]["tower"] / 923_000 / 2 == pytest.approx(191e9, rel=0.01)
    # 2 multiply-adds forward and 1 back for each weight of the layers and each token, since these weights do not learn.
    tokens, layers = stage["data"]["tokens"], 32 * 202_383_360
    assert stage["flops"]["language"] == pytest.approx(4 * layers * tokens, rel=0.05)
    assert stage["steps"] == 3606


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "--gpu", "a100-80"], "did you mean 'a100-80gb'?"),
        (["--plan", "--gpus", "7"], "stage1.batch_size: 256 is not a multiple of micro_batch_size=32 times 7 GPUs"),
        (["--plan", "--plan.stage1.records", "0"], "the data of stage1 cannot be read here"),
        (["--plan", "--model.vision", "some/tower"], "model.vision: the shape of 'some/tower' is not known here"),
        (["--gpus", "8"], "--gpu, --gpus and --json go with --plan"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["train", str(CONFIGS / "vicuna7b_stage1.toml"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("regiongpt: error:")
    assert message in error


class _Living(TorchDispatchMode):
    """Bytes of the tensors that are alive at a time, but for those that were there before."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    size, key = storage.nbytes(), storage._cdata
                    self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
                    self.now += size
                    self.most = max(self.most, self.now)
        return outputs

    def _gone(self, key: int, size: int) -> None:
        self.known.pop(key)
        self.now -= size


@pytest.mark.parametrize(
    ("words", "flops_within", "memory_within"),
    [
        # Without gradient checkpointing the arithmetic is exactly the planned one.
        (["--engine.precision=fp32", "--engine.gradient_checkpointing=false"], 1e-9, 0.05),
        # The last products of a layer are not needed again, and PyTorch stops before them.
        (["--engine.precision=fp32"], 0.03, 0.05),
        (["--engine.gradient_checkpointing=false"], 1e-9, 0.05),
        (["--lora.rank=4"], 0.03, 0.12),
    ],
    ids=["plain", "checkpointing", "bf16", "adapters"],
)
def test_a_plan_is_what_training_measures(
    words: list[str], flops_within: float, memory_within: float, tmp_path: Path
) -> None:
    recipe = Recipe.load(
        CONFIGS / "vicuna7b_stage2.toml", [f"--out={tmp_path / 'run'}", "--engine.packing=false", *words]
    )
    config = debug_size(recipe)
    (plan,) = make_plan(config).stages
    model, processor = weights.load(config.model.init)
    choose_learners("stage2", model.train(), config.lora)
    if config.engine.gradient_checkpointing:
        # The name that the newest release has for it, or else the older one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    mixture = open_mixture(config.data.mixture, "", config.seed)
    records = RecordDataset(mixture, processor, len(mixture), 512)
    micro = config.stage2.micro_batch_size
    examples = [[records[k] for k in range(i, i + micro)] for i in range(0, len(mixture), micro)]
    assert plan.data.tokens == sum(len(each["input_ids"]) for batch in examples for each in batch)
    assert plan.data.targets == sum(int((each["labels"] != -100).sum()) for batch in examples for each in batch)
    assert sum(total for total, _ in plan.parameters.values()) == sum(p.numel() for p in model.parameters())
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sum(trained for _, trained in plan.parameters.values()) == sum(p.numel() for p in learning)

    batches = [DataCollator(processor)(batch) for batch in examples]
    for batch in batches:
        batch.pop("tasks", None)

    def learn(batch: dict[str, Any]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.engine.precision == "bf16"):
            loss = answer_loss(model, dict(batch), 1)
        loss.backward()

    # Attention as plain products: the CPU's fused kernel is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for batch in batches:
            learn(batch)
    assert counter.get_total_flops() == pytest.approx(sum(plan.flops.values()), rel=flops_within)

    model.zero_grad()
    largest = max(batches, key=lambda batch: batch["input_ids"].shape[1])
    optimiser = torch.optim.AdamW(learning, foreach=False)
    before = [*model.parameters(), *model.buffers(), *largest.values()]
    with _Living(before) as living:
        learn(largest)
        optimiser.step()
        living.most = living.now
        learn(largest)
    measured = 4 * sum(p.numel() for p in model.parameters()) + living.most
    assert sum(plan.memory.values()) == pytest.approx(measured, rel=memory_within)


@pytest.mark.parametrize("content", [b"{", b"[]"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "processor_config.json"])
def test_a_plan_names_a_damaged_checkpoint(file: str, content: bytes, runs: Any, tmp_path: Path, capsys: Any) -> None:
    _, _, finished = runs("finetune_records")
    shutil.copytree(finished, tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_bytes(content)
    assert main(["train", "finetune_records", "--plan", f"--model.init={tmp_path / 'damaged'}"]) == 2
    assert f"of {tmp_path / 'damaged'}" in capsys.readouterr().err

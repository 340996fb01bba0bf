"""One stage of training: the same however it is spread, packed or stopped; its logs and checkpoints; mistakes."""

import logging
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning import Examples, collate, example, full_disk, learn, settings
from tiny import text_config, tiny_inputs, tiny_model

from regiongpt.environment import Processes
from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.model import RegionGPTForConditionalGeneration
from regiongpt.train.checkpoint import Checkpoints
from regiongpt.train.dataset import TASKS, answer_loss, task_numbers
from regiongpt.train.loop import StepBatches, targets_in
from regiongpt.train.packing import PackedCollate, attend_in_units
from regiongpt.train.recipe import EngineConfig, LoraConfig, WatchConfig
from regiongpt.train.stages import choose_learners, merge_adapters
from regiongpt.train.watch import DEV, LOG, Watch, read_lines

SCRIPT = Path(__file__).parents[1] / "learning.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / LOG)]


# -- which conversation comes when -------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [1, 7, 8, 9, 24, 29])
@pytest.mark.parametrize(("micro", "processes"), [(8, 1), (1, 1), (2, 2), (1, 4), (4, 2)])
def test_a_step_takes_the_same_items_however_they_are_spread(items: int, micro: int, processes: int) -> None:
    each = [list(StepBatches(items, 8, micro, number, processes)) for number in range(processes)]
    assert {len(batches) for batches in each} == {len(StepBatches(items, 8, micro, 0, processes))}
    accumulation = 8 // micro // processes
    for step in range(-(-items // 8)):
        rounds = slice(step * accumulation, (step + 1) * accumulation)
        together = [item for batches in each for batch in batches[rounds] for item in batch]
        assert sorted(item for item in together if item >= 0) == list(range(8 * step, min(8 * step + 8, items)))
        assert all(-1 - item == 8 * step for item in together if item < 0)


# -- packing -----------------------------------------------------------------------------------------------------------


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = answer_loss(model, {name: value for name, value in batch.items() if name != "tasks"}, targets_in(batch))
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("texts", [(), (1, 4), range(8)])
def test_packed_loss_and_gradients_are_those_of_the_padded_batch(texts: Any) -> None:
    model = tiny_model(text_config=text_config(num_key_value_heads=2)).train()
    isolated = [k for k in (0, 2, 3) if k not in texts]
    examples = [example(k, model.config, k in texts, k in isolated) for k in range(8)]
    packed = PackedCollate(collate)(examples)
    assert packed["packed_from"].shape == (1, sum(len(each["input_ids"]) for each in examples))
    # Isolated turns are held to the padded form of a conversation by itself, by the mask of all its turns.
    alone = {k: {**collate([examples[k]]), "turns": examples[k]["turns"][None]} for k in isolated}
    plain = collate([each for k, each in enumerate(examples) if k not in isolated])
    targets = int(targets_in(packed))
    total, sums = 0.0, {}
    for batch in [plain, *(alone[k] for k in isolated)]:
        loss, grads = gradients(model, batch)
        share = int(targets_in(batch)) / targets
        total += share * loss
        for name, gradient in grads.items():
            sums[name] = sums.get(name, 0) + share * gradient
    attend_in_units(model.language_model)
    loss, grads = gradients(model, packed)
    assert loss == pytest.approx(total, rel=1e-5)
    assert_close(grads, sums)
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options", [{"sliding_window": 64}, {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}]
)
def test_a_language_model_with_a_window_is_not_packed(options: dict[str, Any]) -> None:
    def language(supported: bool = True, **given: Any) -> Any:
        config = SimpleNamespace(_attn_implementation="sdpa", **given)
        config.get_text_config = lambda: config
        return SimpleNamespace(config=config, _supports_attention_backend=supported)

    attend_in_units(language())
    attend_in_units(language(sliding_window=64, use_sliding_window=False))
    with pytest.raises(ConfigError, match=r"attend to all earlier tokens"):
        attend_in_units(language(**options))
    with pytest.raises(ConfigError, match=r"with torch's attention"):
        attend_in_units(language(supported=False))


# -- a stage in one process --------------------------------------------------------------------------------------------


def test_eight_at_once_are_one_at_a_time_and_packed_and_with_less_memory(tmp_path: Path) -> None:
    expected, trainer = learn(tmp_path / "8", items=29, stage=settings(micro_batch_size=8), texts=(3, 9, 10, 28))
    assert trainer.progress.step == 4
    for name, micro, engine in (
        ("1", 1, EngineConfig()),
        ("packed", 4, EngineConfig(packing=True)),
        ("checkpointed", 2, EngineConfig(gradient_checkpointing=True, workers=1)),
    ):
        stage = settings(micro_batch_size=micro)
        model, _ = learn(tmp_path / name, items=29, stage=stage, engine=engine, texts=(3, 9, 10, 28))
        assert_close(weights_of(model), weights_of(expected))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "8"), rel=1e-5)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_what_is_frozen_stays_to_the_bit_and_all_else_learns(name: str, tmp_path: Path) -> None:
    before = weights_of(tiny_model())
    model, _ = learn(tmp_path, items=16, name=name)
    frozen = ("vision_tower.", "connector.mean", "connector.std") + (("language_model.",) if name == "stage1" else ())
    for tensor, value in weights_of(model).items():
        moves = not tensor.startswith(frozen)
        assert torch.equal(value, before[tensor]) != moves, tensor


def test_bfloat16_learns_about_the_same_and_keeps_its_weights_in_float32(tmp_path: Path) -> None:
    model, _ = learn(tmp_path / "16", engine=EngineConfig(precision="bf16"))
    learn(tmp_path / "32")
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert losses(tmp_path / "16") == pytest.approx(losses(tmp_path / "32"), rel=0.05)
    assert losses(tmp_path / "16") != losses(tmp_path / "32")


def test_the_weights_with_the_lowest_dev_loss_are_taken_and_kept(tmp_path: Path) -> None:
    watch = WatchConfig(keep=1, dev_steps=2, dev_items=5)
    model, trainer = learn(tmp_path, stage=settings(lr=0.3, save_steps=100), watch=watch, dev=5)
    measured = {line["step"]: line["loss"] for line in read_lines(tmp_path / DEV)}
    best = min(measured, key=measured.__getitem__)
    assert sorted(measured) == [2, 4]
    assert trainer.progress.best_step == best
    assert (tmp_path / f"checkpoint-{best}").is_dir()
    assert trainer.evaluate() == pytest.approx(measured[best], rel=1e-6)
    examples = [Examples(model.config, 5)[k] for k in range(5)]
    with torch.no_grad():
        batch = collate(examples)
        expected = float(answer_loss(model, {k: v for k, v in batch.items() if k != "tasks"}, targets_in(batch)))
    assert measured[best] == pytest.approx(expected, rel=1e-5)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint*"))


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, Processes())
    for step in (5, 10, 15, 100):
        checkpoints.write(step, lambda path: None, best=5)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-15", "checkpoint-5"]
    assert checkpoints.newest() == tmp_path / "checkpoint-100"


@pytest.mark.parametrize(("room", "told"), [(300, "log.jsonl: cannot be"), (20_000, "checkpoint-2: cannot be")])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_before(room: int, told: str, tmp_path: Path) -> None:
    learn(tmp_path / "enough")
    with full_disk(room), pytest.raises(DataError, match=f"{told} written: .*File too large"):
        learn(tmp_path / "full")
    assert not names(tmp_path / "full")
    learn(tmp_path / "full")
    assert losses(tmp_path / "full") == losses(tmp_path / "enough")


DROPOUT: dict[str, Any] = {"text_config": text_config(attention_dropout=0.1), "watch": WatchConfig(keep=9)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of four steps, whose dropout draws random numbers, with all of its checkpoints; and its weights."""
    out = tmp_path_factory.mktemp("whole")
    model, _ = learn(out, stage=settings(save_steps=1), texts=(4, 5), **DROPOUT)
    return out, weights_of(model)


def stopped(finished: tuple[Path, Any], out: Path, step: int) -> Path:
    """The same run as it was after a step, killed as it wrote the next checkpoint."""
    shutil.copytree(finished[0], out)
    (out / f"checkpoint-{step + 1}").rename(out / ".unfinished-1-checkpoint")
    for later in range(step + 2, 5):
        shutil.rmtree(out / f"checkpoint-{later}")
    return out


@pytest.mark.parametrize("step", [1, 3])
def test_going_on_is_as_if_it_had_not_stopped(step: int, finished: Any, tmp_path: Path, caplog: Any) -> None:
    out = stopped(finished, tmp_path / "run", step)
    with caplog.at_level(logging.INFO):
        model, _ = learn(out, stage=settings(save_steps=1), texts=(4, 5), **DROPOUT)
    assert f"going on from {out}/checkpoint-{step}" in caplog.text
    assert_close(weights_of(model), finished[1], 0)
    assert losses(out) == losses(finished[0])
    assert not list(out.glob(".unfinished-*"))
    assert {path.suffix for path in (out / "checkpoint-4").iterdir()} == {".json", ".safetensors"}  # nothing that runs


def test_some_settings_may_change_on_going_on(finished: Any, tmp_path: Path, caplog: Any) -> None:
    out = stopped(finished, tmp_path / "run", 2)
    stage = settings(save_steps=3, log_steps=4, micro_batch_size=4)
    with caplog.at_level(logging.INFO):
        learn(out, stage=stage, dev=3, **{**DROPOUT, "watch": WatchConfig(keep=1, dev_steps=3)})
    assert names(out) == ["checkpoint-3", "checkpoint-4"]
    assert [line["step"] for line in read_lines(out / DEV)] == [3, 4]
    told = [text.split(",")[0] for text in caplog.messages if text.startswith("stage2: step")]
    assert told == ["stage2: step 4 of 4"]


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"stage": settings(lr=0.02)}, ConfigError, r"other settings: lr = 0.02, it has 0.01; use those"),
        ({"items": 40}, ConfigError, "items = 40, it has 32"),
        ({"text_config": text_config(hidden_size=64)}, CheckpointError, r"linear_1.weight: expected \[64, 32\], got"),
    ],
)
def test_other_settings_data_or_models_are_refused(changed: Any, error: Any, told: str, finished: Any) -> None:
    with pytest.raises(error, match=told):
        learn(finished[0], **{"stage": settings(save_steps=1), **DROPOUT, **changed})


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("stage.json", each) for each in (b"", b'{"step": 2}', b"[]")),
        ("random-0.json", b""),
        *(("tensors.safetensors", each) for each in (b"", b"\x10\0\0\0\0\0\0\0{}")),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(file: str, content: bytes, finished: Any, tmp_path: Path) -> None:
    out = stopped(finished, tmp_path / "run", 2)
    (out / "checkpoint-2" / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-2"):
        learn(out, stage=settings(save_steps=1), **DROPOUT)


# -- the log -----------------------------------------------------------------------------------------------------------


def test_every_step_has_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        learn(tmp_path, items=45, stage=settings(log_steps=3, save_steps=100, warmup_ratio=0.0))
    lines = read_lines(tmp_path / LOG)
    assert [(line["step"], line["of"]) for line in lines] == [(step, 6) for step in range(1, 7)]
    for line in lines:
        parts = line["tasks"].values()
        assert line["loss"] == pytest.approx(sum(each["loss"] * each["targets"] for each in parts) / line["targets"])
        assert sum(each["targets"] for each in parts) == line["targets"] == 4 * line["examples"]
        assert set(line["tasks"]) == {TASKS[0], TASKS[1]}
        assert line["examples"] == line["images"] == (8 if line["step"] < 6 else 5)
        assert line["grad_norm"] > 0
        assert 0 <= line["wait"] <= line["seconds"]
    rates = [0.01, 0.00933, 0.0075, 0.005, 0.0025, 0.00067]
    assert [line["lr"]["visual"] for line in lines] == pytest.approx(rates, abs=5e-6)
    told = [text for text in caplog.messages if text.startswith("stage2: step")]
    assert [text.split(",")[0] for text in told] == [f"stage2: step {step} of 6" for step in (1, 3, 6)]
    assert "tokens/s" in told[2]
    assert told[2].endswith("00:00 left")


@pytest.mark.parametrize("tail", ["", '{"step": 4, "loss": 1', '{"step"', "\0\0\0\0", "\n\n", '{"step": 4}'])
def test_a_log_is_cut_to_the_step_that_is_gone_on_from(tail: str, tmp_path: Path) -> None:
    path, watch = tmp_path / DEV, Watch("stage2", tmp_path, 1)
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + tail)
    watch.start(3)
    watch.measured(4, float("nan"))
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "loss": None}]
    watch.start(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("length", "tasks", "expected"),
    [
        (10, ["caption", "presence", "riddle"], "--cc-p----"),
        (5, ["caption", "presence"], "--cc-"),  # the last turns may not have fitted
        (2, ["caption"], "--"),
        (10, ["caption"], "--cc------"),
    ],
)
def test_targets_know_their_task(length: int, tasks: list[str], expected: str) -> None:
    labels = torch.tensor([-100, -100, 5, 6, -100, 7, -100, -100, 8, 9])[:length]
    numbers = {"-": -1, "c": TASKS.index("caption"), "p": TASKS.index("presence")}
    assert task_numbers(labels, tasks).tolist() == [numbers[each] for each in expected]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_no_number_stops_and_names_the_records(packing: bool, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        learn(tmp_path, stage=settings(save_steps=1), endless=21, engine=EngineConfig(packing=packing))
    message = str(error.value)
    assert "stage2, step 3: a loss of" in message
    assert f"the last good checkpoint is {tmp_path}/checkpoint-2" in message
    assert "record-20, record-21," in message
    assert "checkpoint-3" not in names(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_cannot_be_used_is_told_in_its_own_words(workers: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^record 3: expected sense, got none$"):
        learn(tmp_path, items=8, broken=3, engine=EngineConfig(workers=workers))


# -- real processes ----------------------------------------------------------------------------------------------------


def command(out: Path, *words: Any, processes: int = 1) -> list[str]:
    """Ten steps, the last one short."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] if processes > 1 else []
    return [str(word) for word in (sys.executable, *launcher, SCRIPT, out, "--items", 77, *words)]


def run(out: Path, *words: Any, processes: int = 1) -> dict[str, torch.Tensor]:
    given: Any = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run(command(out, *words, processes=processes), check=False, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    state: dict[str, torch.Tensor] = torch.load(out / "weights.pt")
    return state


TEXTS = ("--texts", *range(16, 24), 30, 31, 75, 76)
"""A step of texts alone, a micro-batch of them, and the last step's."""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Ten steps of one process."""
    out = tmp_path_factory.mktemp("one")
    return out, run(out, *TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--sharding", "ddp"], ["--sharding", "fsdp", "--packing"]])
def test_two_processes_learn_what_one_does(
    words: list[str], one_process: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Ten steps, one of them of texts alone and the last one short; with gloo, on a CPU."""
    out, expected = one_process
    got = run(tmp_path, *words, *TEXTS, processes=2)
    assert_close(got, expected)
    assert losses(tmp_path) == pytest.approx(losses(out), rel=1e-5)
    assert len(losses(tmp_path)) == 10
    for processes in (2, 1) if "fsdp" in words else ():  # a checkpoint of two processes is one of any number
        for later in (9, 10):
            shutil.rmtree(tmp_path / f"checkpoint-{later}")
        assert_close(run(tmp_path, *(words if processes == 2 else ()), *TEXTS, processes=processes), expected)


@pytest.mark.slow
def test_a_run_killed_anywhere_goes_on_to_the_same_losses(
    one_process: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    out, expected = one_process
    drawn, kills = random.Random(4), 0
    for _ in range(2):
        process = subprocess.Popen(command(tmp_path, *TEXTS), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        before = {*tmp_path.glob("checkpoint-*")}
        while process.poll() is None and before.issuperset(tmp_path.glob("checkpoint-*")):
            time.sleep(0.001)
        time.sleep(drawn.uniform(0.0, 0.2))
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills
    assert_close(run(tmp_path, *TEXTS), expected, 0)
    assert losses(tmp_path) == losses(out)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_merged_model_answers_as_its_adapters_did(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(text_config=text_config(tie_word_embeddings=tied)).eval().double()
    language = model.language_model
    inputs = tiny_inputs(model.config, [1, 2])
    words = language.get_input_embeddings().weight.detach().clone()
    assert choose_learners("stage2", model, LoraConfig(rank=2))
    for name, parameter in language.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        adapted = model(**inputs).logits
        merge_adapters(language)
        assert torch.equal(language.get_input_embeddings().weight, words)
        torch.testing.assert_close(model(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = RegionGPTForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(again(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)
    head = again.get_output_embeddings().weight
    assert (head is again.get_input_embeddings().weight) == tied


def test_tensorboard_has_the_same_numbers_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options: dict[str, Any] = {"watch": WatchConfig(tensorboard=True, keep=9, dev_steps=2), "dev": 3}
    learn(tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoint-4")
    learn(tmp_path, **options)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_lines(tmp_path / "log.jsonl")
    assert [event.step for event in events.Scalars("loss/all")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("dev/loss")] == [2, 4]
    assert [event.value for event in events.Scalars("loss/all")] == pytest.approx([line["loss"] for line in lines])

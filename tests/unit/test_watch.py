"""What is written down of a stage, whatever happens to it; and that watching changes nothing."""

import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from regiongpt.train.processes import Processes
from regiongpt.train.watch_cost import StageCost, matmul_rate, named_peak, peak_flops
from regiongpt.train.watch_log import StepLog, read_lines
from regiongpt.train.watch_tally import TASKS, StepSums, Tally, task_numbers
from torch.utils.data import Dataset
from transformers import AutoConfig, Trainer, TrainingArguments

from regiongpt.errors import ConfigError, DataError
from regiongpt.model import weights
from regiongpt.train import watch_log
from regiongpt.train.watch import StepMeter, Watch, learning_rates


class Points(Dataset[dict[str, torch.Tensor]]):
    """Pairs on a line, made of their number alone."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(np.random.default_rng((3, item)).normal(size=4)).float()
        return {"x": x, "y": x.sum(), "task": torch.tensor(item % 2)}


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = torch.nn.Linear(4, 1), torch.nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(x))[:, 0]


class LineTrainer(Trainer):
    """Tells its tally what it does, as the trainer of stages does."""

    def __init__(self, tally: Tally, **options: Any) -> None:
        super().__init__(**options)
        self.tally = tally

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> torch.Tensor:
        losses = (model(inputs["x"]) - inputs["y"]) ** 2
        loss = losses.sum() / 8
        self.tally.add(loss, losses, inputs["task"], examples=len(losses), tokens=5 * len(losses), images=1)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.tally.norm(norm)
        return norm


class Tenfold:
    def flops(self, step: StepSums) -> float:
        return 1e5 * step.tokens


def train(out: Path, watch: Watch, resume: str | None = None, **options: Any) -> None:
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        save_steps=2,
        logging_steps=100,
        logging_first_step=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=True,
        **options,
    )
    LineTrainer(watch.tally, model=Line(), args=arguments, train_dataset=Points(), callbacks=[watch]).train(
        resume_from_checkpoint=resume
    )


def test_every_step_has_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(tmp_path, Watch("stage1", tmp_path, log_steps=3, cost=Tenfold()))
    lines = read_lines(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(each["loss"] * each["targets"] for each in line["tasks"].values()) / 8)
        assert sum(each["targets"] for each in line["tasks"].values()) == 8
        assert set(line["tasks"]) <= {TASKS[0], TASKS[1]}
        assert (line["examples"], line["tokens"], line["images"], line["of"]) == (8, 40, 2, 6)
        assert line["grad_norm"] > 0
        assert 0 < line["mfu"] < 1
        assert 0 <= line["wait"] <= line["seconds"]
    # Linear decay: the first step goes at the full rate, the last at a sixth of it.
    assert [line["lr"]["group 0"] for line in lines] == pytest.approx([0.05 * k / 6 for k in (6, 5, 4, 3, 2, 1)])
    told = [text for text in caplog.messages if text.startswith("stage1: step")]
    assert len(told) == 2
    assert told[1].startswith("stage1: step 6 of 6, loss ")
    assert "examples a second" in told[1]
    assert told[1].endswith("0:00 left")


def test_losses_are_those_of_the_trainer(tmp_path: Path) -> None:
    told: dict[str, float] = {}

    class Told(Watch):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.update(logs)

    train(tmp_path, Told("stage1", tmp_path, log_steps=3))
    lines = read_lines(tmp_path / "log.jsonl")
    # transformers halves a loss that already counts both micro-batches.
    assert told["train_loss"] == pytest.approx(np.mean([line["loss"] for line in lines]) / 2, rel=1e-5)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from unit.test_watch import Watch, train

class Dies(Watch):
    def on_step_end(self, args, state, control, **given):
        super().on_step_end(args, state, control, **given)
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1])
train(out, Dies("stage1", out, log_steps=1))
"""


def test_after_a_kill_each_step_is_there_once(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", Watch("stage1", tmp_path / "whole", log_steps=4))
    out = tmp_path / "killed"
    out.mkdir()
    tests = Path(__file__).parents[1]
    died = subprocess.run([sys.executable, "-c", KILLED, str(out), str(tests)], capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    assert [line["step"] for line in read_lines(out / "log.jsonl")] == [1, 2, 3, 4, 5]
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(out, Watch("stage1", out, log_steps=4), resume=str(out / "checkpoints" / "checkpoint-4"))
    expected, got = (read_lines(path / "log.jsonl") for path in (tmp_path / "whole", out))
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "tasks", "lr", "grad_norm", "tokens"):
        assert [line[name] for line in got] == [line[name] for line in expected], name


def test_lines_are_there_before_the_checkpoint_that_needs_them(tmp_path: Path) -> None:
    seen: dict[int, int] = {}

    class Looks(Watch):
        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seen[state.global_step] = len(read_lines(tmp_path / "log.jsonl"))
            super().on_save(args, state, control, **given)

    train(tmp_path, Looks("stage1", tmp_path, log_steps=100))
    assert seen == {2: 2, 4: 4, 6: 6}


def test_tensorboard_has_the_same_figures_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, Watch("stage1", tmp_path, log_steps=2, tensorboard=True))
    checkpoint = str(tmp_path / "checkpoints" / "checkpoint-4")
    train(tmp_path, Watch("stage1", tmp_path, log_steps=2, tensorboard=True), resume=checkpoint)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_lines(tmp_path / "log.jsonl")
    assert [event.step for event in events.Scalars("loss/all")] == [1, 2, 3, 4, 5, 6]
    for name, values in (
        ("loss/all", [line["loss"] for line in lines]),
        (f"loss/{TASKS[1]}", [line["tasks"][TASKS[1]]["loss"] for line in lines]),
        ("gradient/norm", [line["grad_norm"] for line in lines]),
        ("lr/group 0", [line["lr"]["group 0"] for line in lines]),
    ):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values)


def test_tensorboard_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watch_log, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'regiongpt\[train\]'"):
        Watch("stage1", tmp_path, tensorboard=True)


# ---------------------------------------------------------------------------------------------------------------------
# The log


@pytest.mark.parametrize("tail", ["", '{"step": 4, "loss": 1', '{"step"', "\0\0\0\0", "\n\n", '{"step": 4}'])
def test_a_torn_last_line_is_left_out(tail: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + tail)
    kept = StepLog(path).cut(3)
    assert [line["step"] for line in kept] == [1, 2, 3]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_log_is_cut_to_the_step_that_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = StepLog(path)
    log.write({"step": step, "loss": float("nan") if step == 2 else 0.5} for step in range(1, 6))
    assert read_lines(path)[1]["loss"] == "nan"
    assert [line["step"] for line in log.cut(2)] == [1, 2]
    log.write([{"step": 3}])
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    log.cut(0)
    assert read_lines(path) == []


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2: expected a line of JSON with its step, got 'nonsense'"):
        read_lines(path)


def test_a_full_disk_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:5]))

    path = tmp_path / "log.jsonl"
    log = StepLog(path)
    log.write([{"step": 1}])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode, buffering: Full(open(self, mode, buffering)))  # noqa: SIM115
        log.write([{"step": 2}])
        log.write([{"step": 3}])
    assert [text for text in caplog.messages if "tried again" in text and "No space left" in text]
    assert len(caplog.messages) == 1
    assert [line["step"] for line in read_lines(path)] == [1]
    log.write([{"step": 4}])
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Sums


def test_targets_know_their_task() -> None:
    labels = torch.tensor([-100, -100, 5, 6, -100, 7, -100, -100, 8, 9])
    found = task_numbers(labels, ["caption", "presence", "riddle"])
    caption, presence = TASKS.index("caption"), TASKS.index("presence")
    assert found.tolist() == [-1, -1, caption, caption, -1, presence, -1, -1, -1, -1]
    # The last turns may not have fitted; answers may be left out.
    assert task_numbers(labels[:5], ["caption", "presence"]).tolist() == [-1, -1, caption, caption, -1]
    assert task_numbers(torch.full((3,), -100), ["caption"]).tolist() == [-1, -1, -1]
    assert task_numbers(labels, ["caption"]).tolist()[2:6] == [caption, caption, -1, -1]


def test_micro_batches_add_up() -> None:
    tally = Tally()
    tally.add(torch.tensor(0.5), torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), examples=2, tokens=9, images=2)
    tally.add(torch.tensor(0.25), torch.tensor([3.0, 4.0]), torch.tensor([2, -1]), examples=1, tokens=torch.tensor(3))
    tally.norm(torch.tensor(2.0))
    tally.close()
    tally.add(torch.tensor(1.0), examples=1, tokens=1)
    tally.close()
    first, second = tally.take()
    assert (first.loss, first.examples, first.tokens, first.images, first.targets) == (0.75, 3, 12, 2, 4)
    assert first.grad_norm == 2.0
    assert first.tasks == {TASKS[0]: (1.0, 1), TASKS[2]: (5.0, 2)}
    assert (second.loss, second.tasks, second.grad_norm) == (1.0, {}, None)
    assert tally.take() == []


def test_sums_go_over_all_processes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def summed(self: Processes, values: torch.Tensor) -> torch.Tensor:
        asked.append(values.clone())
        return values * 2

    monkeypatch.setattr(Processes, "summed", summed)
    tally = Tally()
    for step in range(3):
        tally.add(torch.tensor(0.5), torch.tensor([1.0 + step]), torch.tensor([1]), examples=1, tokens=7)
        tally.norm(1.5)
        tally.close()
    assert [(each.loss, each.examples, each.grad_norm) for each in tally.take()] == [(1.0, 2, 1.5)] * 3
    assert len(asked) == 1


def test_groups_of_one_name_share_a_rate() -> None:
    groups = [{"name": "visual", "lr": 0.1}, {"name": "visual", "lr": 0.1}, {"name": "language", "lr": 2e-5}, {"lr": 1}]
    assert learning_rates(groups) == {"visual": 0.1, "language": 2e-5, "group 3": 1.0}


def test_a_matrix_product_has_a_rate() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e15


def test_a_device_that_is_slow_in_bfloat16_is_held_to_its_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 5e10, torch.bfloat16: 1e9}
    monkeypatch.setattr("regiongpt.train.watch_cost.matmul_rate", lambda _, precision: rates[precision])
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == 5e10
    rates[torch.bfloat16] = 4e11
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == 4e11
    assert peak_flops(torch.device("cpu"), torch.float32) == 5e10


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("NVIDIA A10G", 0),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 0),
    ],
)
def test_known_gpus_have_their_makers_peak(name: str, tflops: float) -> None:
    assert named_peak(name, torch.bfloat16) == 1e12 * tflops


def test_a_steps_arithmetic_is_counted_of_what_it_had() -> None:
    config = AutoConfig.from_pretrained(weights.nano_path())
    step = StepSums(loss=1.0, examples=4, tokens=400, images=4, targets=30)
    costs = {
        name: StageCost.of(name, config, cached=name == "align").flops(step) for name in ("align", "stage1", "stage2")
    }
    assert costs["align"] < costs["stage1"] < costs["stage2"]
    layers = 5 * (4 * config.text_config.hidden_size**2 + 3 * 256 * 704)
    weights_of_all = layers * 400 + config.text_config.vocab_size * 256 * 30
    tower = StageCost.of("stage1", config, cached=False).costs.tower
    # A frozen language model is passed once forward and once back, one that learns once more.
    assert (costs["stage2"] - costs["stage1"]) / (2 * weights_of_all) == pytest.approx(1, rel=0.05)
    assert costs["stage1"] - costs["align"] == pytest.approx(4 * tower + 4 * weights_of_all, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def test_the_line_on_a_terminal_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = StepMeter("stage2", 40, 100)
    assert meter.line() == "stage2: step 40 of 100"
    meter.step, meter.note = 50, "loss 1.2345"
    monkeypatch.setattr(StepMeter, "seconds", 20.0)
    assert meter.line() == "stage2: step 50 of 100, 0.5 a second, loss 1.2345, 1:40 left"


def test_lines_of_the_log_do_not_run_into_the_one_that_changes() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        with StepMeter("stage2", 0, 10, stream):
            stream.write("a line that changes")
            logging.getLogger("regiongpt").warning("beware")
        assert "a line that changes\r\x1b[Kbeware\n" in stream.getvalue()
        stream.write("x")
        logging.getLogger("regiongpt").warning("again")
        assert "xagain\n" in stream.getvalue()
    finally:
        logging.getLogger().removeHandler(handler)

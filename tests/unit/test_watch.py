"""What is written down of a stage, whatever happens to it."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import full_disk, learn, settings

from regiongpt.errors import ConfigError, DataError
from regiongpt.train import watch
from regiongpt.train.dataset import TASKS, task_numbers
from regiongpt.train.recipe import WatchConfig
from regiongpt.train.watch import StepLog, read_lines


def test_every_step_has_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        learn(tmp_path, items=45, stage=settings(log_steps=3, save_steps=100, warmup_ratio=0.0))
    lines = read_lines(tmp_path / "log.jsonl")
    assert [(line["step"], line["of"]) for line in lines] == [(step, 6) for step in range(1, 7)]
    for line in lines:
        parts = line["tasks"].values()
        assert line["loss"] == pytest.approx(sum(each["loss"] * each["targets"] for each in parts) / line["targets"])
        assert sum(each["targets"] for each in parts) == line["targets"] == 4 * line["examples"]
        assert set(line["tasks"]) == {TASKS[0], TASKS[1]}
        assert line["examples"] == line["images"] == (8 if line["step"] < 6 else 5)
        assert line["grad_norm"] > 0
        assert 0 <= line["wait"] <= line["seconds"]
    assert [line["lr"]["visual"] for line in lines] == pytest.approx(
        [0.01, 0.00933, 0.0075, 0.005, 0.0025, 0.00067], abs=5e-6
    )
    told = [text for text in caplog.messages if text.startswith("stage2: step")]
    assert [text.split(",")[0] for text in told] == [f"stage2: step {step} of 6" for step in (1, 3, 6)]
    assert "tokens/s" in told[2]
    assert told[2].endswith("00:00 left")


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
    for name, values in (
        ("loss/all", [line["loss"] for line in lines]),
        (f"loss/{TASKS[1]}", [line["tasks"][TASKS[1]]["loss"] for line in lines]),
        ("gradient/norm", [line["grad_norm"] for line in lines]),
        ("lr/visual", [line["lr"]["visual"] for line in lines]),
    ):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values)


def test_tensorboard_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed"):
        learn(tmp_path, watch=WatchConfig(tensorboard=True))


# -- the log -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["", '{"step": 4, "loss": 1', '{"step"', "\0\0\0\0", "\n\n", '{"step": 4}'])
def test_a_log_is_cut_to_the_step_that_is_gone_on_from(tail: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + tail)
    log = StepLog(path)
    log.cut(3)
    log.write({"step": 4, "loss": float("nan")})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "loss": "nan"}]
    log.cut(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with full_disk(300), pytest.raises(DataError, match="cannot be written: File too large"):
        learn(tmp_path)


# -- sums --------------------------------------------------------------------------------------------------------------


def test_targets_know_their_task() -> None:
    labels = torch.tensor([-100, -100, 5, 6, -100, 7, -100, -100, 8, 9])
    found = task_numbers(labels, ["caption", "presence", "riddle"])
    caption, presence = TASKS.index("caption"), TASKS.index("presence")
    assert found.tolist() == [-1, -1, caption, caption, -1, presence, -1, -1, -1, -1]
    # The last turns may not have fitted; answers may be left out.
    assert task_numbers(labels[:5], ["caption", "presence"]).tolist() == [-1, -1, caption, caption, -1]
    assert task_numbers(torch.full((3,), -100), ["caption"]).tolist() == [-1, -1, -1]
    assert task_numbers(labels, ["caption"]).tolist()[2:6] == [caption, caption, -1, -1]

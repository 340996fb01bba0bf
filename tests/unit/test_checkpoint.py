"""Checkpoints: what they hold, who can read them; reading one runs nothing."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learn, settings
from safetensors.torch import load_file
from tiny import text_config

from regiongpt.errors import CheckpointError
from regiongpt.train.recipe import WatchConfig

KEPT = WatchConfig(keep=9)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, whose dropout draws random numbers, with all of its checkpoints."""
    out = tmp_path_factory.mktemp("whole")
    learn(out, stage=settings(save_steps=1), watch=KEPT, text_config=text_config(attention_dropout=0.1))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The same run as it was after its second step."""
    shutil.copytree(finished, tmp_path / "run")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def go_on(out: Path, **options: Any) -> None:
    options = {"stage": settings(save_steps=1), "watch": KEPT, **options}
    learn(out, text_config=text_config(attention_dropout=0.1), **options)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "tensors.safetensors")


def assert_equal(ours: Path, theirs: Path) -> None:
    got, expected = tensors(ours), tensors(theirs)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_dropout_goes_on_with_the_random_numbers_it_would_have_drawn(finished: Path, run: Path) -> None:
    go_on(run)
    assert_equal(run / "checkpoint-4", finished / "checkpoint-4")


def test_settings_that_may_change_do_on_going_on(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = settings(save_steps=3, log_steps=4, micro_batch_size=4)
    with caplog.at_level(logging.INFO):
        go_on(run, stage=stage, watch=WatchConfig(keep=1, dev_steps=3), dev=3)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert [json.loads(line)["step"] for line in (run / "dev.jsonl").read_text().splitlines()] == [3, 4]
    told = [text.split(",")[0] for text in caplog.messages if text.startswith("stage2: step")]
    assert told == ["stage2: step 4 of 4"]


def test_reading_a_checkpoint_runs_no_code(run: Path) -> None:
    assert {path.suffix for path in (run / "checkpoint-2").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("stage.json", each) for each in (b"", b'{"step": 2}', b"[]")),
        ("random-0.json", b""),
        *(("tensors.safetensors", each) for each in (b"", b"\x10\0\0\0\0\0\0\0{}")),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(file: str, content: bytes, run: Path) -> None:
    (run / "checkpoint-2" / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-2"):
        go_on(run)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(finished: Path, run: Path) -> None:
    shutil.copytree(run / "checkpoint-2", run / ".unfinished-1-checkpoint-3")
    go_on(run)
    assert_equal(run / "checkpoint-4", finished / "checkpoint-4")
    assert not list(run.glob(".unfinished-*"))

"""Checkpoints: what they hold, who can read them; reading one runs nothing, and nothing damaged is gone on from."""

import json
import logging
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learn, settings
from safetensors.torch import load_file
from tiny import text_config

from regiongpt.errors import CheckpointError
from regiongpt.train.checkpoint import LIST
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


def seal(folder: Path) -> None:
    """List the files as they are now."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LIST]
    listed = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, sha256(path.read_bytes()).hexdigest())
        for path in files
    }
    (folder / LIST).write_text(json.dumps(listed))


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


def test_the_last_weights_are_kept_where_the_best_checkpoint_is_damaged(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = json.loads((run / "checkpoint-2" / "stage.json").read_text())
    (run / "checkpoint-2" / "stage.json").write_text(json.dumps({**stage, "best_step": 1, "best_loss": 0.0}))
    seal(run / "checkpoint-2")
    path = run / "checkpoint-1" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    go_on(run, watch=WatchConfig(keep=9, dev_steps=2), dev=2)
    assert "checkpoint-1: the best checkpoint is lost (tensors.safetensors is damaged" in caplog.text


def test_reading_a_checkpoint_runs_no_code(run: Path) -> None:
    assert {path.suffix for path in (run / "checkpoint-2").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("stage.json", each) for each in (b"", b'{"settings": {}', b'{"step": 2}', b"[]")),
        *(("random-0.json", each) for each in (None, b"", b"null", b"{}", b'{"python": [3, [1e400], null]}')),
        *(("tensors.safetensors", each) for each in (b"", b"\x10\0\0\0\0\0\0\0{}")),
        *((LIST, each) for each in (None, b"[]", b'{"a": [0, ""]}')),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_damaged_file_is_never_gone_on_from(
    listed: bool, file: str, content: bytes | None, finished: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Found by its hash, and the checkpoint before is taken; or, listed as it is, refused in one line."""
    (run / "checkpoint-2" / file).unlink() if content is None else (run / "checkpoint-2" / file).write_bytes(content)
    if listed and file != LIST:
        seal(run / "checkpoint-2")
        with pytest.raises(CheckpointError, match=r"checkpoint-2.*delete the folder"):
            go_on(run)
    else:
        go_on(run)
        assert f"{file} " in caplog.text
        assert "aside-1-checkpoint-2, and the one before is taken" in caplog.text
        assert_equal(run / "checkpoint-4", finished / "checkpoint-4")

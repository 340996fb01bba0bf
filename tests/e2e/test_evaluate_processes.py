"""One evaluation in two real processes, stopped by a kill and gone on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import draw_pictures
from tiny_checkpoint import make_checkpoint

from regiongpt.evaluate.report import read_run
from regiongpt.storage import Store

PICTURES = 60


def start(root: Path, name: str, *launcher: str) -> subprocess.Popen:
    words = ["evaluate", "coco_cls", "--data", root, "--split", "dev", "--model", root / "checkpoint"]
    words += ["--out", root / name, "--resamples", "20", "--gallery", "2"]
    command = [sys.executable, *launcher, "-m", "regiongpt.cli", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux lists them")
def test_two_processes_answer_as_one_does_and_go_on_after_a_kill(tmp_path):
    draw_pictures(tmp_path, PICTURES, "instances_dev.json")
    make_checkpoint(tmp_path)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(tmp_path, "two", *launcher)
    answers = tmp_path / "two" / "answers"
    deadline = time.monotonic() + 240
    while not Store(answers).keys():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # The launcher gives each of its processes a session of its own, so that killing it alone would leave them running.
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 2
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}/fd").exists() and os.listdir(f"/proc/{pid}/fd") for pid in workers):
        time.sleep(0.01)
    kept = len(Store(answers).keys())

    said, told = start(tmp_path, "two", *launcher).communicate()
    before = int(re.search(rf"{2 * PICTURES} questions, (\d+) answered before", told)[1])
    assert before == kept < 2 * PICTURES
    assert said.count("results written to") == 1
    assert sorted(path.name for path in answers.iterdir()) == ["00000.sqlite", "00001.sqlite"]

    start(tmp_path, "one").communicate()
    found = []
    for (run,) in (read_run(tmp_path / "two"), read_run(tmp_path / "one")):
        rows = map(json.loads, (run.folder / "items.jsonl").read_text().splitlines())
        found.append(([row["answer"] for row in rows], run.result["protocols"]["generate and match"]))
    assert found[0] == found[1]

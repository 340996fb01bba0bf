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

from regiongpt.evaluate.report import read_run
from regiongpt.storage import Store

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from tiny_checkpoint import make_checkpoint

PICTURES = 60


def command(root: Path, out: Path, processes: int) -> list[str]:
    words = ["evaluate", "coco_cls", "--data", str(root), "--split", "dev", "--model", str(root / "checkpoint")]
    words += ["--out", str(out), "--resamples", "20", "--gallery", "2"]
    if processes == 1:
        return [sys.executable, "-m", "regiongpt.cli", *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, "-m", "regiongpt.cli", *words]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux lists them")
def test_two_processes_answer_as_one_does_and_go_on_after_a_kill(tmp_path):
    draw_pictures(tmp_path, PICTURES, "instances_dev.json")
    make_checkpoint(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    process = subprocess.Popen(command(tmp_path, tmp_path / "two", 2), env=environment, stderr=subprocess.PIPE)
    answers = tmp_path / "two" / "answers"
    deadline = time.monotonic() + 240
    while not Store(answers).keys():
        assert process.poll() is None, process.stderr.read().decode()
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

    done = subprocess.run(command(tmp_path, tmp_path / "two", 2), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = int(re.search(rf"{2 * PICTURES} questions, (\d+) answered before", done.stderr)[1])
    assert before == kept < 2 * PICTURES
    assert done.stdout.count("results written to") == 1
    assert sorted(path.name for path in answers.iterdir()) == ["00000.sqlite", "00001.sqlite"]

    single = subprocess.run(command(tmp_path, tmp_path / "one", 1), env=environment, capture_output=True, text=True)
    assert single.returncode == 0, single.stderr
    (two,), (one,) = read_run(tmp_path / "two"), read_run(tmp_path / "one")
    answers = [
        [json.loads(line)["answer"] for line in (run.folder / "items.jsonl").read_text().splitlines()]
        for run in (two, one)
    ]
    assert answers[0] == answers[1]
    assert json.dumps(two.result["protocols"]["generate and match"]) == json.dumps(
        one.result["protocols"]["generate and match"]
    )

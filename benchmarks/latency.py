"""Time a cold `regiongpt ask`: CPU seconds of the whole process beside those of importing torch alone.

    python benchmarks/latency.py --runs 5 --other /path/to/other/src

The three take turns; the other build answers the same question by the same command.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from skimage import data
from stamp import stamp

from regiongpt.environment import progress, progress_shown
from regiongpt.model import weights
from regiongpt.storage import finite, write_json


def cpu_seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """CPU seconds, user and system, of a process that succeeds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--other", type=Path, help="src folder of another build to measure beside this one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, progress_shown():
        image = Path(folder) / "cat.png"
        Image.fromarray(data.chelsea()).save(image)
        asked = [str(image), "What is <region1>?", "--box", "120,15,440,290"]
        ask = [sys.executable, "-m", "regiongpt.cli", "ask", *asked]
        source = Path(__file__).resolve().parents[1] / "src"
        work = {"importing torch": ([sys.executable, "-c", "import torch"], {})}
        work["this build"] = (ask, {"PYTHONPATH": str(source)})
        if options.other:
            work["the other"] = (ask, {"PYTHONPATH": str(options.other.resolve())})
        taken: dict[str, list[float]] = {name: [] for name in work}
        for _ in progress(range(options.runs), "cold", "rounds"):
            for name, (command, environment) in work.items():
                taken[name].append(cpu_seconds(command, environment))
    for name, seconds in taken.items():
        deviation = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
        print(f"{name:<16}{statistics.mean(seconds):6.2f} ± {deviation:.2f} s of CPU")
    if options.out:
        files = {"model": weights.nano_path()}
        write_json(options.out, finite({"benchmark": "latency", "results": taken, **stamp(vars(options), files)}))


if __name__ == "__main__":
    main()

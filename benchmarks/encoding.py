"""Time image encoding of nano, this build beside another: CPU seconds an image, one at a time and in batches.

    python benchmarks/encoding.py --other /path/to/other/src

The two builds run in turn, each in a process of its own. Without ``--other``, this build alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

MEASURE = """
import sys, time, torch
from regiongpt.model import weights
threads, batch = map(int, sys.argv[1:])
torch.set_num_threads(threads)
tower = weights.load()[0].vision_tower
side = tower.config.image_size
pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    for work in ([pixels[:1]] * batch, [pixels]):
        tower(pixels[:1])
        began = time.process_time()
        features = torch.cat([tower(each).last_hidden_state for each in work])
        print((time.process_time() - began) / batch)
print(*features[:1].flatten()[::997].tolist())
"""


def measure(source: Path, threads: int, batch: int) -> tuple[float, float, torch.Tensor]:
    """CPU seconds an image, alone and in a batch, and a sample of the features; torch reports on stderr."""
    command = [sys.executable, "-c", MEASURE, str(threads), str(batch)]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    alone, together, sample = done.stdout.splitlines()[-3:]
    return float(alone), float(together), torch.tensor([float(value) for value in sample.split()])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="src folder of another build to measure beside this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    sources = {"this build": Path(__file__).resolve().parents[1] / "src"}
    if options.other:
        sources["other"] = options.other.resolve()
    taken: dict[str, list[float]] = {}
    samples = {}
    for _ in range(options.rounds):
        for name, source in sources.items():
            alone, together, samples[name] = measure(source, options.threads, options.batch)
            taken.setdefault(f"{name}, one at a time", []).append(alone)
            taken.setdefault(f"{name}, in batches of {options.batch}", []).append(together)
    for name, seconds in taken.items():
        deviation = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
        print(f"{name:<32}{1000 * statistics.mean(seconds):8.0f} ± {1000 * deviation:.0f} ms of CPU an image")
    if options.other:
        ours, theirs = samples.values()
        print(f"features differ by {float((ours - theirs).norm() / theirs.norm()):.1e} of their norm")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time what a person waits for: ``regiongpt ask`` from a cold start, and answers of a predictor that is loaded.

    python benchmarks/latency.py --out latency.json
    python benchmarks/latency.py --cold 5 --warm 0 --other /path/to/other/src

A cold run is a process of its own, from the command to its exit: imports, weights, image, answer. The files it reads
may be in the system's cache from the run before, so the first run is also given apart. CPU seconds are those of the
process, user and system, beside those of one that imports torch and ends and of the other build. Warm answers come from
one predictor, which has answered once before the clock runs.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stamp import Progress, stamp

from regiongpt import Region, RegionGPTError, RegionPredictor
from regiongpt.model import weights
from regiongpt.storage import finite, write_json

CHELSEA_BOX = "120,15,440,290"


def photograph(folder: Path) -> Path:
    """The cat that scikit-image carries, as a file."""
    from PIL import Image
    from skimage import data

    path = folder / "chelsea.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


def ask_command(image: Path, question: str, box: str, model: Path | None, device: str | None) -> list[str]:
    """The command a person types; through the interpreter where the entry point is not installed beside it."""
    script = shutil.which("regiongpt", path=str(Path(sys.executable).parent))
    start = [script] if script else [sys.executable, "-m", "regiongpt.cli"]
    command = [*start, "ask", str(image), question, "--box", box]
    for option, value in (("--model", model), ("--device", device)):
        command += [option, str(value)] if value else []
    return command


def cold(command: Sequence[str], runs: int, other: Path | None = None) -> dict[str, Any]:
    """Seconds of each run, the answer, and CPU seconds of each run and, in turn with it, of importing torch alone.

    With the ``src`` folder of another build, of the same command by that one too.

    Raises:
        RuntimeError: the command failed.
    """
    commands: list[tuple[str, Sequence[str], dict[str, str]]] = [
        ("torch_", [sys.executable, "-c", "import torch"], {}),
        *([("other_", command, {"PYTHONPATH": str(other)})] if other else []),
        ("", command, {}),
    ]
    taken: dict[str, list[float]] = {"seconds": [], **{f"{name}cpu_seconds": [] for name, *_ in commands}}
    progress = Progress("cold", runs, "runs")
    for _ in range(runs):
        for name, words, settings in commands:
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **settings})
            seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            taken[f"{name}cpu_seconds"].append(used)
        taken["seconds"].append(seconds)
        progress.add()
    cpu = {name: statistics.mean(values) for name, values in taken.items() if name != "seconds"}
    return {**summary(taken["seconds"]), **cpu, "cpu_each": taken, "answer": done.stdout.strip()}


def warm(image: Path, question: str, box: str, model: Path | None, device: str | None, runs: int) -> dict[str, Any]:
    """Seconds of each kind of warm work, after one unmeasured round."""
    began = time.perf_counter()
    # No image is kept, so that each call that is given one encodes it.
    predictor = RegionPredictor.from_pretrained(model, device=device, images=0)
    load = time.perf_counter() - began
    region = Region.box(*(float(edge) for edge in box.split(",")))
    work: dict[str, Callable[[], Any]] = {
        "set_image": lambda: predictor.set_image(image),
        "ask": lambda: predictor.ask(question, [region]),
        "set_image_and_ask": lambda: predictor.set_image(image).ask(question, [region]),
        "describe": lambda: predictor.describe(region),
        "classify_80": lambda: predictor.classify(region),
        "locate_2": lambda: predictor.locate("the cat", [region, Region.box(0, 0, 60, 60)]),
    }
    result: dict[str, Any] = {"load": summary([load])}
    progress = Progress("warm", runs * len(work), "calls")
    for name, call in work.items():
        said = call()
        taken = []
        for _ in range(runs):
            began = time.perf_counter()
            said = call()
            taken.append(time.perf_counter() - began)
            progress.add()
        # How long an answer takes depends on how long it is.
        result[name] = {**summary(taken), "answer": getattr(said, "text", None)}
    return result


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """All measurements, with the first, the median and the largest."""
    return {
        "first": seconds[0],
        "median": statistics.median(seconds),
        "largest": max(seconds),
        "seconds": list(seconds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a photograph (default: scikit-image's cat; needs that package)")
    parser.add_argument("--box", default=CHELSEA_BOX, metavar="X0,Y0,X1,Y1", help="the region, in pixels of the image")
    parser.add_argument("--question", default="What is <region1>?")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the model of the package)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    parser.add_argument("--cold", type=int, default=3, metavar="N", help="cold runs (default: 3)")
    parser.add_argument("--warm", type=int, default=10, metavar="N", help="warm runs of each kind (default: 10)")
    parser.add_argument("--other", type=Path, help="src folder of another build whose cold runs to time in turn")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(argv)
    if options.cold < 0 or options.warm < 0:
        parser.error(f"expected --cold and --warm of at least 0, got {options.cold} and {options.warm}")
    try:
        run(options)
    except (RegionGPTError, RuntimeError) as error:
        print(f"latency: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Measure, print and write.

    Raises:
        RegionGPTError: the checkpoint or the image cannot be read, or the region does not fit it.
        RuntimeError: the command failed.
    """
    results: dict[str, Any] = {}
    asked = {"question": options.question, "box": options.box, "model": options.model, "device": options.device}
    with tempfile.TemporaryDirectory() as folder:
        image = options.image or (photograph(Path(folder)) if options.cold + options.warm else Path())
        if options.cold:
            results["cold_ask"] = found = cold(ask_command(image, **asked), options.cold, options.other)
            whose = {"": "this build", "other_": "the other", "torch_": "importing torch"}
            told = (f"{each} {found[f'{k}cpu_seconds']:.2f}" for k, each in whose.items() if f"{k}cpu_seconds" in found)
            print(f"CPU seconds: {', '.join(told)}")
        if options.warm:
            results["warm"] = warm(image, runs=options.warm, **asked)
    if results:
        print(f"{'seconds':<24}{'first':>9}{'median':>9}{'largest':>9}")
    for name, figure in {"cold_ask": results.get("cold_ask"), **results.get("warm", {})}.items():
        if figure:
            print(f"{name:<24}{figure['first']:>9.3f}{figure['median']:>9.3f}{figure['largest']:>9.3f}")
    if options.out:
        files = {"model": options.model or weights.nano_path(), "image": options.image}
        write_json(options.out, finite({"benchmark": "latency", "results": results, **stamp(vars(options), files)}))


if __name__ == "__main__":
    raise SystemExit(main())

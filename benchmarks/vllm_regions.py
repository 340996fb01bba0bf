"""Regions of one image described a second: this package's own batch beside vLLM.

    build/vllm/bin/python benchmarks/vllm_regions.py --out vllm_regions.json

`make test-vllm` makes that environment. Both do the same work on the same cores: this package encodes the image, pools
the regions and embeds the questions; then its own scheduler or vLLM (prompt embeddings, prefix caching) writes greedy
answers, all of the same length, on the same untrained weights. They take turns, the first of a round changes, and each
round has an image of its own, which neither has read. Times are from the image to the last answer.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from many_regions import RANDOM, boxes, photograph, random_model
from PIL import Image
from stamp import stamp

from regiongpt import Region, RegionGPTError, RegionPredictor
from regiongpt.inference.engine import Engine, pick_device, pick_dtype, question_turns
from regiongpt.inference.options import Options
from regiongpt.inference.scheduler import Scheduler
from regiongpt.prompts import question
from regiongpt.serve.options import ServeOptions
from regiongpt.serve.vllm import VllmEngine, VllmScheduler
from regiongpt.storage import finite, write_json

TEXT = question("describe", regions=[1])


class Way:
    """One engine with a scheduler that ends no answer early."""

    def __init__(self, engine: Engine, rows: int, tokens: int) -> None:
        self.engine, self.tokens = engine, tokens
        self.scheduler = Scheduler(engine.decoder, engine.model.get_input_embeddings(), [], [], None, rows)
        if isinstance(engine, VllmEngine):
            self.scheduler = VllmScheduler(self.scheduler, engine.scheduler.llm)

    def describe(self, photo: Image.Image, regions: Sequence[Region]) -> dict[str, Any]:
        """Seconds of the encoding and of everything, and the tokens written of each region."""
        engine, began = self.engine, time.perf_counter()
        scene = engine.encode_image(photo)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        encoded = time.perf_counter()
        pooled = engine.pool_each(scene, regions)
        prompt = engine.prompt(question_turns((), TEXT), pooled[0], 1, self.tokens)
        jobs = [engine.job(scene, replace(prompt, pooled=each), Options(max_new_tokens=self.tokens)) for each in pooled]
        for _ in self.scheduler.run(jobs):
            pass
        seconds = time.perf_counter() - began
        answers = [job.tokens for job in jobs]
        assert {len(answer) for answer in answers} == {self.tokens}
        return {"seconds": seconds, "encode": encoded - began, "answers": answers}


def measure(ways: dict[str, Way], count: int, rounds: int, first_image: int) -> dict[str, Any]:
    """Means and deviations over rounds in which the ways take turns."""
    regions, found = boxes(count), []
    for number in range(rounds):
        photo = Image.fromarray(photograph(first_image + number))
        order = list(ways)[:: 1 if number % 2 else -1]
        found.append({name: ways[name].describe(photo, regions) for name in order})
    row: dict[str, Any] = {"regions": count, "rounds": found}
    for key, values in {
        **{name: [count / each[name]["seconds"] for each in found] for name in ways},
        "times_vllm": [each["vllm"]["seconds"] / each["regiongpt"]["seconds"] for each in found],
        "encode_seconds": [each[name]["encode"] for each in found for name in ways],
    }.items():
        row[key] = {"mean": statistics.mean(values), "deviation": statistics.pstdev(values)}
    answers = [pair for each in found for pair in zip(*(each[name].pop("answers") for name in ways), strict=True)]
    row["equal_answers"] = sum(ours == theirs for ours, theirs in answers) / len(answers)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'regions':>8}{'regions/s':>16}{'vLLM':>16}{'times':>14}{'encode s':>14}{'equal answers':>15}"]
    for row in rows:
        spread = (f"{row[key]['mean']:.2f}±{row[key]['deviation']:.2f}" for key in ("regiongpt", "vllm", "times_vllm"))
        ours, theirs, times = spread
        encode = f"{row['encode_seconds']['mean']:.2f}±{row['encode_seconds']['deviation']:.2f}"
        lines.append(f"{row['regions']:>8}{ours:>16}{theirs:>16}{times:>14}{encode:>14}{row['equal_answers']:>15.0%}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and write.

    Raises:
        RegionGPTError: vLLM is missing or does not start, or an option is wrong.
    """
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)  # vLLM's processes inherit it
    torch.set_num_threads(len(cores))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    most, device = max(options.regions), pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, processor = random_model(options.model, folder, device, dtype)
        own = RegionPredictor(model.to(device, dtype), processor).engine
        own.model.save_pretrained(folder / "checkpoint")
        os.environ["XDG_CACHE_HOME"] = name  # where VllmEngine writes the language model
        served = VllmEngine(own, folder / "checkpoint", ServeOptions(engine="vllm", rows=most))
        try:
            ways = {name: Way(each, most, options.tokens) for name, each in (("regiongpt", own), ("vllm", served))}
            for count in dict.fromkeys((most, *options.regions)):  # once unmeasured
                measure(ways, count, 1, first_image=0)
            rows = [
                measure(ways, count, options.rounds, first_image=1 + place * options.rounds)
                for place, count in enumerate(options.regions)
            ]
            reused = ways["vllm"].scheduler.reused
        finally:
            served.scheduler.llm.engine_core.shutdown()
    import vllm

    report = {
        "benchmark": "vllm_regions",
        "cores": len(cores),
        "vllm": vllm.__version__,
        "vllm_reused_tokens": reused,
        "results": rows,
        **stamp(vars(options), {}),
    }
    print(
        f"{options.model}, {options.tokens} new tokens a region, {dtype}, {len(cores)} cores, vLLM {vllm.__version__}"
    )
    print(table(rows))
    if options.out:
        write_json(options.out, finite(report))
    return report


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RANDOM, default="clip-b-llama-160m")
    parser.add_argument("--regions", type=int, nargs="+", default=[1, 16, 64], metavar="N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="new tokens of each answer (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of each (default: 5)")
    parser.add_argument("--cores", type=int, metavar="N", help="cores for either (default: all that this may use)")
    parser.add_argument("--device", help="cuda or cpu (default: the first of these that is there)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(argv)
    for name in ("tokens", "rounds", "cores"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"expected --{name} of at least 1, got {value}")
    if min(options.regions) < 1:
        parser.error(f"expected --regions of at least 1, got {min(options.regions)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse(argv))
    except RegionGPTError as error:
        print(f"vllm_regions: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time an evaluation of nano, ``coco_cls`` and ``pope`` together, beside asking the same questions one by one.

    python benchmarks/evaluation.py --data data/nano --other /path/to/other/src

CPU seconds of one thread. Both ways, and both builds where ``--other`` names one, take turns in every round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pope_questions

MEASURE = """
import json, sys, time, torch
from pathlib import Path
from regiongpt import RegionPredictor
from regiongpt.evaluate.detection import CocoClassification
from regiongpt.evaluate.pope import Pope
from regiongpt.evaluate.run import answer_image

data, split, limit, questions = sys.argv[1:]
torch.set_num_threads(1)
by_image = {}
for item in CocoClassification(data=Path(data), split=split, limit=int(limit), choices=False).items():
    by_image.setdefault(item.image.resolve(), []).append(item)
for item in Pope(data=Path(questions), images=Path(data) / "images").items():
    if item.image.resolve() in by_image:
        by_image[item.image.resolve()].append(item)
predictor = RegionPredictor.from_pretrained(images=0)

def together():
    return [answer["text"] for items in by_image.values() for answer in answer_image(predictor, items)]

def alone():
    texts = []
    for image, items in by_image.items():
        predictor.set_image(image)
        texts += [predictor.ask(each.question, each.regions, max_new_tokens=each.max_new_tokens).text for each in items]
    return texts

def encoding():
    for image in by_image:
        predictor.set_image(image)

for _ in sys.stdin:  # a line asks for a round
    found = {}
    for work in (together, alone, encoding):
        began = time.process_time()
        texts = work()
        found[work.__name__] = time.process_time() - began
        if texts:
            found[work.__name__ + "_said"] = texts
    print(json.dumps({"images": len(by_image), **found}), flush=True)
"""


def start(source: Path, words: Sequence[str]) -> "subprocess.Popen[str]":
    """A process of a build that measures a round for every line that it is sent."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", MEASURE, *words], env=environment, stdin=pipe, stdout=pipe, text=True
    )


def one_round(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Ask for a round and read what it took."""
    assert process.stdin
    assert process.stdout
    print(file=process.stdin, flush=True)
    if not (line := process.stdout.readline()):
        raise SystemExit(f"evaluation: a build ended with {process.wait()}")
    return dict(json.loads(line))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and instances_<split>.json")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int, default=10, help="images (default: 10)")
    parser.add_argument("--other", type=Path, help="src folder of another build to measure beside this one")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    sources = {"this build": Path(__file__).resolve().parents[1] / "src"}
    if options.other:
        sources["other"] = options.other.resolve()
    with tempfile.TemporaryDirectory() as folder:
        pope_questions.main(["--data", str(options.data), "--split", options.split, "--out", folder])
        words = [str(options.data), options.split, str(options.limit), folder]
        builds = {name: start(source, words) for name, source in sources.items()}
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in builds}
        for _ in range(options.rounds):
            for name, process in builds.items():
                rounds[name].append(one_round(process))
        for process in builds.values():
            process.communicate()
    said = {way: rounds["this build"][0][f"{way}_said"] for way in ("together", "alone")}
    print(f"{len(said['alone'])} questions about {rounds['this build'][0]['images']} images, CPU seconds")
    for name, found in rounds.items():
        ways = ", ".join(f"{way} {spread([each[way] for each in found])}" for way in ("together", "alone", "encoding"))
        ratio = spread([each["alone"] / each["together"] for each in found])
        same = sum(a == b for a, b in zip(found[0]["together_said"], said["alone"], strict=True))
        print(f"{name}: {ways}; {ratio} times as fast together; {same} answers as this build's one by one")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

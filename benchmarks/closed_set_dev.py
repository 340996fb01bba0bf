"""How often the most probable of COCO's 80 names is right, with and without int8 weights.

    python benchmarks/closed_set_dev.py --data ../shared/data/coco_photos --limit 80 --int8

Every box of the development images is classified by the likelihoods of all 80 answers.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stamp import Progress, stamp

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.facts import DevQuestion, dev_questions
from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.inference.choices import answer_scores
from regiongpt.inference.engine import Engine, question_turns, to_int8
from regiongpt.model import weights
from regiongpt.prompts import COCO_80, question
from regiongpt.storage import finite, write_json


def likelihoods(
    engine: Engine, images: Sequence[ImageAnnotations], asked: Sequence[DevQuestion], name: str
) -> tuple[torch.Tensor, float]:
    """Log likelihoods of all names for every box, and the seconds they took."""
    turns, rows, seconds = question_turns((), question("classify", regions=[1])), [], 0.0
    progress = Progress(name, len(images), "images")
    for image in images:
        regions = [each.regions[0] for each in asked if each.image.image_id == image.image_id]
        progress.add()
        if not regions:
            continue
        scene = engine.encode_image(load_image(image.path))
        pooled = engine.pool_each(scene, regions)
        began = time.perf_counter()
        rows.append(answer_scores(engine, scene, turns, pooled, COCO_80))
        seconds += time.perf_counter() - began
    return torch.cat(rows), seconds


def measure(scores: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    """Shares of boxes named right."""
    right = (scores.argmax(1) == truth).float()
    person = truth == COCO_80.index("person")
    return {
        "all": float(right.mean()),
        "class_average": float(torch.stack([right[truth == kind].mean() for kind in truth.unique()]).mean()),
        "without_person": float(right[~person].mean()) if bool((~person).any()) else None,
    }


def run(options: argparse.Namespace) -> None:
    """Measure, print and write.

    Raises:
        RegionGPTError: data, model or options are wrong.
    """
    data = load_coco(photo_sources(options.data, "dev"))
    images = data.images[: options.limit]
    if not images:
        raise ConfigError(f"expected annotated images in {options.data}, found none")
    asked = dev_questions(images, "classify", 0, {})
    asked.sort(key=lambda each: [image.image_id for image in images].index(each.image.image_id))
    truth = torch.tensor([COCO_80.index(each.answer) for each in asked])
    engine = Engine(*weights.load(options.model))
    results: dict[str, Any] = {"boxes": len(asked), "images": len(images)}
    plain = None
    for name in ("float32", "int8") if options.int8 else ("float32",):
        if name == "int8":
            to_int8(engine.model)
        rows, seconds = likelihoods(engine, images, asked, name)
        found = measure(rows, truth)
        results[name] = {"right": found, "seconds": seconds}
        if plain is not None:
            results[name]["same_answer"] = float((rows.argmax(1) == plain.argmax(1)).float().mean())
            results[name]["mean_change_of_log_likelihood"] = float((rows - plain).abs().mean())
        plain = rows
        shares = "  ".join(f"{key} {100 * value:.1f} %" for key, value in found.items() if value is not None)
        print(f"{name:<8} {shares}; {seconds:.1f} s for {len(asked)} boxes")
    if options.int8:
        same, change = results["int8"]["same_answer"], results["int8"]["mean_change_of_log_likelihood"]
        print(
            f"int8: the same answer for {100 * same:.1f} % of boxes; log likelihoods change by {change:.3f} on average"
        )
    if options.out:
        files = {"model": options.model or weights.nano_path()}
        write_json(
            options.out, finite({"benchmark": "closed_set_dev", "results": results, **stamp(vars(options), files)})
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and instances_dev.json")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the model of the package)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--int8", action="store_true", help="also with int8 weights")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        parser.error(f"expected --limit of at least 1, got {options.limit}")
    try:
        run(options)
    except RegionGPTError as error:
        print(f"closed_set_dev: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

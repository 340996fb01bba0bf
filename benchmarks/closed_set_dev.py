"""How often the most probable of COCO's 80 names is right.

    python benchmarks/closed_set_dev.py --data ../shared/data/coco_photos --limit 80

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
from regiongpt.inference.engine import Engine, question_turns
from regiongpt.model import weights
from regiongpt.prompts import COCO_80, question
from regiongpt.storage import finite, write_json


def likelihoods(
    engine: Engine, images: Sequence[ImageAnnotations], asked: Sequence[DevQuestion]
) -> tuple[torch.Tensor, float]:
    """Log likelihoods of all names for every box, and the seconds they took."""
    turns, rows, seconds = question_turns((), question("classify", regions=[1])), [], 0.0
    progress = Progress("scoring", len(images), "images")
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
    rows, seconds = likelihoods(engine, images, asked)
    found = measure(rows, truth)
    shares = "  ".join(f"{key} {100 * value:.1f} %" for key, value in found.items() if value is not None)
    print(f"{shares}; {seconds:.1f} s for {len(asked)} boxes")
    if options.out:
        files = {"model": options.model or weights.nano_path()}
        results = {"boxes": len(asked), "images": len(images), "right": found, "seconds": seconds}
        write_json(
            options.out, finite({"benchmark": "closed_set_dev", "results": results, **stamp(vars(options), files)})
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and instances_dev.json")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the model of the package)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
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

"""How often the likeliest of COCO's 80 names is right, for each way of handling length, with and without int8 weights.

    python benchmarks/closed_set_dev.py --data ../shared/data/coco_photos --limit 80 --int8

Every box of the development photographs is classified by the likelihoods of all 80 answers. With ``--int8`` the same
boxes go through the quantized model too, from the same image features. With ``--references`` scores are also calibrated
against other things of which nothing is known, wholly and by a quarter.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from stamp import Progress, stamp

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.sampling import DevQuestion, dev_questions
from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.inference.choices import closed_set, content_free, log_likelihoods
from regiongpt.inference.engine import Engine, Scene, question_turns
from regiongpt.inference.quantization import to_int8
from regiongpt.model import weights
from regiongpt.prompts import COCO_80, question
from regiongpt.regions import Region
from regiongpt.storage import finite, write_json

WORDS = ("N/A", "region", "thing")
"""Words that say nothing, in a region's stead."""


def content_free_regions(engine: Engine, scene: Scene, every: bool) -> dict[str, list[torch.Tensor]]:
    """Features that stand for no region of the image, by the name of the way they are made."""
    blank = content_free(engine)
    found = {"calibrated": [blank]}
    if every:
        table, encode = engine.model.get_input_embeddings().weight.detach(), engine.processor.tokenizer.encode
        words = [table[encode(text, add_special_tokens=False)].mean(0).expand_as(blank) for text in WORDS]
        whole = engine.pool_each(scene, [Region.box(0, 0, scene.width, scene.height)])
        found |= {"zeros": [torch.zeros_like(blank)], "words": words, "whole image": whole}
    return found


def likelihoods(
    engine: Engine, images: Sequence[ImageAnnotations], asked: Sequence[DevQuestion], name: str, every: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
    """Of every box the log likelihoods of all names, those about nothing in its image, and the seconds they took."""
    closed = closed_set(engine, question_turns((), question("classify", regions=[1])), 1, COCO_80)
    rows, nothing, seconds = [], defaultdict(list), 0.0
    progress = Progress(name, len(images), "images")
    for image in images:
        regions = [each.regions[0] for each in asked if each.image.image_id == image.image_id]
        progress.add()
        if not regions:
            continue
        scene = engine.encode_image(load_image(image.path))
        pooled, blanks = engine.pool_each(scene, regions), content_free_regions(engine, scene, every)
        began = time.perf_counter()
        found = log_likelihoods(engine, scene, closed, [*pooled, *(each for kind in blanks.values() for each in kind)])
        seconds += time.perf_counter() - began
        sizes = [len(pooled), *map(len, blanks.values())]
        boxes, *others = torch.split(found, sizes)
        rows.append(boxes)
        for kind, scores in zip(blanks, others, strict=True):
            nothing[kind].append(scores.mean(0).expand(len(regions), -1))
    return torch.cat(rows), {kind: torch.cat(scores) for kind, scores in nothing.items()}, seconds


def ways(
    rows: torch.Tensor, nothing: dict[str, torch.Tensor], lengths: torch.Tensor, every: bool
) -> dict[str, torch.Tensor]:
    """Scores by way."""
    found = {"sum": rows, "mean": rows / lengths, **{kind: rows - blank for kind, blank in nothing.items()}}
    if every:
        batch = rows.softmax(-1).mean(0).log().expand_as(rows)
        found["all boxes"] = rows - batch
        for kind, blank in {**nothing, "all boxes": batch}.items():
            found[f"{kind}, a quarter"] = rows - blank / 4
    return found


def measure(scores_by_way: dict[str, torch.Tensor], truth: torch.Tensor) -> dict[str, Any]:
    """Shares of boxes named rightly, by way."""
    results = {}
    for way, scores in scores_by_way.items():
        right = (scores.argmax(1) == truth).float()
        person = truth == COCO_80.index("person")
        results[way] = {
            "all": float(right.mean()),
            "class_average": float(torch.stack([right[truth == kind].mean() for kind in truth.unique()]).mean()),
            "without_person": float(right[~person].mean()) if bool((~person).any()) else None,
        }
    return results


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
    tree = closed_set(engine, question_turns((), question("classify", regions=[1])), 1, COCO_80).tree
    lengths = torch.from_numpy(tree.lengths)
    results: dict[str, Any] = {"boxes": len(asked), "images": len(images)}
    plain = None
    for name in ("float32", "int8") if options.int8 else ("float32",):
        if name == "int8":
            to_int8(engine.model)
        rows, nothing, seconds = likelihoods(engine, images, asked, name, options.references)
        scores = ways(rows, nothing, lengths, options.references)
        results[name] = {"ways": measure(scores, truth), "seconds": seconds}
        if plain is not None:
            results[name]["same_answer"] = float((rows.argmax(1) == plain.argmax(1)).float().mean())
            results[name]["mean_change_of_log_likelihood"] = float((rows - plain).abs().mean())
        plain = rows
        for way, found in results[name]["ways"].items():
            shares = "  ".join(f"{key} {100 * value:.1f} %" for key, value in found.items() if value is not None)
            print(f"{name:<8} {way:<22} {shares}")
        print(f"{name:<8} {seconds:.1f} s for {len(asked)} boxes")
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
    parser.add_argument("--references", action="store_true", help="also calibrated against other references")
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

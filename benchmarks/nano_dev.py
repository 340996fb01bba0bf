"""Measure a model on expressions, presence and small boxes of annotated images.

    python benchmarks/nano_dev.py --data data/nano --detail careful --out nano_dev.json

- `locate by ...`: the one of five boxes that an expression fits, up to three times an image
- `no match by ...`: among the same boxes, a class that is not in the image
- `presence`: "Is there a ...?"; the mean of the accuracies for present and for absent classes
- `small boxes`: the COCO-80 class of boxes under 1 % of their image
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from stamp import stamp

from regiongpt import Question, Region, RegionPredictor
from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.facts import View, colours_of, noun
from regiongpt.environment import keep_freed_memory, progress, progress_shown
from regiongpt.errors import RegionGPTError
from regiongpt.evaluate.bootstrap import mean_statistic, resample
from regiongpt.evaluate.pope import read_answer
from regiongpt.images import load_image
from regiongpt.inference.options import By, Detail
from regiongpt.model import weights
from regiongpt.prompts import question
from regiongpt.storage import finite, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "nano"))

from conversations import ClassStatistics
from expressions import fitting_expression

AMONG = 5
"""Boxes that an expression is held against."""
SMALL = 0.01
"""Share of the image below which a box is small."""

Rows = dict[str, list[tuple[int, bool, str]]]
"""By measure: the image, whether the answer is right, and a group; the result is the mean of the groups' means."""


def expressions(
    rng: np.random.Generator, view: View, colours: Mapping[int, str]
) -> Iterator[tuple[list[Region], str, int]]:
    """Boxes, an expression, and the place of the one box that it fits."""
    for _ in range(3 if len(view.askable) >= AMONG else 0):
        options = [view.askable[k] for k in rng.permutation(len(view.askable))[:AMONG]]
        target = int(rng.integers(AMONG))
        fitting = fitting_expression(rng, view, options[target], options, colours)
        if fitting is not None:
            yield [Region.box(*each.box) for each in options], fitting[1], target


def presence(
    rng: np.random.Generator, view: View, statistics: ClassStatistics
) -> Iterator[tuple[str, Literal["yes", "no"]]]:
    """Up to two classes that are there, and after each one that is not: first a tempting one, then any."""
    here = sorted(view.by_category)
    for turn, k in enumerate(rng.permutation(len(here))[:2]):
        yield here[k], "yes"
        absent = statistics.absent(rng, view, "any" if turn else "tempting")
        if absent is not None:
            yield absent, "no"


def measure(predictor: RegionPredictor, images: Sequence[ImageAnnotations], detail: Detail, seed: int) -> Rows:
    """Ask all questions about all images."""
    rows: Rows = defaultdict(list)
    statistics = ClassStatistics.of(images)
    for index, image in enumerate(progress(images, "nano_dev", "images")):
        photo, view = load_image(image.path), View(image)
        predictor.set_image(photo)
        rng, others = (np.random.default_rng((seed, index, *more)) for more in ((), (1,)))
        for regions, expression, target in expressions(rng, view, colours_of(image, photo)):
            absent = statistics.absent(others, view, "common")
            asked = [expression, *([f"the {noun(absent)}"] if absent else [])]
            for by in get_args(By):
                found = predictor.locate(asked, regions, by=by, detail=detail)
                rows[f"locate by {by}"].append((index, found[0].index == target, ""))
                rows[f"no match by {by}"] += [(index, each.index is None, "") for each in found[1:]]

        classes = list(presence(np.random.default_rng((seed, index)), view, statistics))
        questions = [Question(text=question("presence", category=name)) for name, _ in classes]
        for (_, truth), answer in zip(classes, predictor.ask_many(questions, max_new_tokens=8), strict=True):
            rows["presence"].append((index, read_answer(answer.text) == truth, truth))

        least = SMALL * image.width * image.height
        small = [each for each in view.objects if not each.iscrowd and each.area < least]
        text = question("classify", regions=[1])
        questions = [Question(text=text, regions=[Region.box(*each.box)]) for each in small]
        answers = predictor.ask_many(questions, max_new_tokens=16, detail=detail)
        for each, answer in zip(small, answers, strict=True):
            rows["small boxes"].append((index, answer.text == each.category, ""))
    return rows


def scores(rows: Rows) -> dict[str, dict[str, Any]]:
    """Each measure's result as a fraction, with the middle 95 % of 1,000 bootstrap resamples of the images."""
    found = {}
    for name, each in rows.items():
        images, right, groups = zip(*each, strict=True)
        sampled = resample(mean_statistic(images, right, groups), 1000)
        found[name] = {"value": sampled.value, "interval": sampled.interval, "of": len(each)}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and instances_<split>.json")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the model of the package)")
    parser.add_argument("--detail", choices=get_args(Detail), default="fast", help="careful: with each region's crop")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(argv)
    keep_freed_memory()
    try:
        sources = photo_sources(options.data, options.split)
        images = load_coco(sources).images[: options.limit]
        predictor = RegionPredictor.from_pretrained(options.model, dtype="float32")
        with progress_shown():
            results = scores(measure(predictor, images, options.detail, options.seed))
    except RegionGPTError as error:
        print(f"nano_dev: error: {error}", file=sys.stderr)
        return 2
    for name, each in results.items():
        low, high = each["interval"] or (each["value"], each["value"])
        print(f"{name:<20}{each['value']:7.1%}  {low:.1%} to {high:.1%}, {each['of']} questions")
    if options.out:
        files = {source.instances.name: source.instances for source in sources}
        stamped = stamp(vars(options), {"model": options.model or weights.nano_path(), **files})
        write_json(options.out, finite({"images": len(images), "results": results, **stamped}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Measure a checkpoint on the development photographs: classes, expressions, presence, descriptions.

    python benchmarks/nano_dev.py --data ../shared/data/coco_photos --out nano_dev.json

Answers are generated greedily and read as text; nothing holds the model to a list. Each image goes through the tower
once and each set of regions is pooled once; then all questions, image by image, are answered in one batch that they
enter and leave. The tables' rules are in ``nano_metrics.py``.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from nano_metrics import (
    Answered,
    classify_right,
    classify_scores,
    locate_scores,
    naming_scores,
    presence_scores,
)
from stamp import Progress, stamp

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.facts import View, colours_of
from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.inference.choices import locate_expressions
from regiongpt.inference.engine import Engine, Prompt, Scene, pick_device, pick_dtype
from regiongpt.inference.options import By, Detail, Options
from regiongpt.model import weights
from regiongpt.prompts import COCO_80, NO_MATCH, question, region_answer
from regiongpt.storage import finite, write_json
from regiongpt.train.stages import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "nano"))

from conversations import ClassStatistics
from expressions import DevQuestion, dev_questions

TASKS = ("classify", "locate", "presence", "describe", "caption")
# The longest answer read, in tokens. Of a yes/no answer only the first word counts; closed answers get more room where
# a tokenizer needs it.
ROOM = {"classify": 8, "locate": 10, "presence": 8, "describe": 60, "caption": 40}
CLOSED = {"classify": COCO_80, "locate": (*map(region_answer, range(1, 6)), NO_MATCH)}


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A question with all that the language model needs of its image.

    Args:
        asked: The question.
        scene: The image's tokens; its feature map has been dropped.
        pooled: Features (R, D) of the question's regions.
        ids: Prompt tokens.
        rows: For each region token in them, the row of ``pooled``.
    """

    asked: DevQuestion
    scene: Scene
    pooled: torch.Tensor
    ids: list[int]
    rows: list[int]


def build_questions(
    images: Sequence[ImageAnnotations], tasks: Sequence[str], seed: int, describe_limit: int | None
) -> dict[str, list[DevQuestion]]:
    """The questions of each task; the descriptions', if limited, are a seeded choice of boxes, the same for both."""
    colours: dict[int, str] = {}
    for image in images if "locate" in tasks else ():
        colours |= colours_of(image, load_image(image.path))
    questions = {
        task: presence_questions(images, seed) if task == "presence" else dev_questions(images, task, seed, colours)
        for task in tasks
    }
    for task in {"describe", "caption"} & set(tasks):
        kept = described_boxes(len(questions[task]), describe_limit, seed)
        questions[task] = [questions[task][k] for k in kept]
    return questions


def presence_questions(images: Sequence[ImageAnnotations], seed: int) -> list[DevQuestion]:
    """As many present classes as absent ones, at most two of each an image.

    Every second absent one is drawn by how often it comes with the classes there.
    """
    statistics = ClassStatistics.of(images)
    found = []
    for index, image in enumerate(images):
        rng, view = np.random.default_rng((seed, index)), View(image)
        here = sorted(view.by_category)
        for turn, k in enumerate(rng.permutation(len(here))[:2]):
            absent = statistics.absent(rng, view, "any" if turn else "tempting")
            kinds = ("present", "tempting" if turn == 0 else "random")
            for category, answer, kind in zip((here[k], absent), ("yes", "no"), kinds, strict=True):
                if category is not None:
                    text = question("presence", 0, category=category)
                    asked: Any = {"image": image, "task": "presence", "text": text, "regions": [], "answer": answer}
                    found.append(DevQuestion(**asked, category=category, kind=kind))
    return found


def described_boxes(boxes: int, limit: int | None, seed: int) -> list[int]:
    """Which of the boxes to describe, in ascending order."""
    if limit is None or limit >= boxes:
        return list(range(boxes))
    return sorted(np.random.default_rng(seed).permutation(boxes)[:limit].tolist())


def prepare(
    engine: Engine, images: Sequence[ImageAnnotations], questions: dict[str, list[DevQuestion]], detail: Detail
) -> dict[str, list[Ready]]:
    """Run the tower once for each image and pool the regions of all its questions."""
    of_image: dict[int, list[tuple[str, int, DevQuestion]]] = {image.image_id: [] for image in images}
    for task, asked in questions.items():
        for place, each in enumerate(asked):
            of_image[each.image.image_id].append((task, place, each))
    encoded: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    ready: dict[str, dict[int, Ready]] = {task: {} for task in questions}
    progress = Progress("images", len(images), "images")
    for image in images:
        scene = engine.encode_image(load_image(image.path))
        regions = [region for *_, each in of_image[image.image_id] for region in each.regions]
        pooled = engine.pool(scene, regions, detail)
        scene = replace(scene, map_1Chw=torch.empty(0))
        for task, place, each in of_image[image.image_id]:
            key = (each.text, len(each.regions))
            if key not in encoded:
                prompt = engine.encode_text([{"role": "user", "content": f"<image>\n{each.text}"}], len(each.regions))
                encoded[key] = (prompt["input_ids"].tolist(), prompt["region_ids"].tolist())
            ids, rows = encoded[key]
            size = len(each.regions) * engine.processor.tokens_per_region
            own, pooled = pooled[:size], pooled[size:]
            ready[task][place] = Ready(asked=each, scene=scene, pooled=own, ids=ids, rows=rows)
        progress.add()
    return {task: [found[place] for place in range(len(found))] for task, found in ready.items()}


def image_by_image(ready: Sequence[Ready]) -> Iterator[Ready]:
    """The questions, which come image by image; what was begun of an image is given up behind its last."""
    for before, each in zip([None, *ready], ready, strict=False):
        if before is not None and before.scene is not each.scene:
            before.scene.prefixes.kept.clear()
        yield each


def answer_all(engine: Engine, task: str, ready: Sequence[Ready]) -> list[str]:
    """Greedy answers, in the order of the questions."""
    tokenize = engine.processor.tokenizer
    room = max([ROOM[task], *(len(tokenize(text)["input_ids"]) + 2 for text in CLOSED.get(task, ()))])
    texts = [""] * len(ready)
    progress = Progress(task, len(ready), "answers")

    def asked() -> Iterator[tuple[Scene, Prompt, Options]]:
        for each in image_by_image(ready):
            n_regions, fits = len(each.asked.regions), engine.room(len(each.ids), room)
            prompt = Prompt(ids=each.ids, rows=each.rows, pooled=each.pooled, n_regions=n_regions, room=fits)
            yield each.scene, prompt, Options(max_new_tokens=fits)

    for place, answer in engine.answers(asked()):
        texts[place] = answer.text
        progress.add()
    return texts


def locate_all(engine: Engine, ready: Sequence[Ready], by: By) -> list[str]:
    """What ``RegionPredictor.locate`` chooses, in the order of the questions."""
    texts = []
    progress = Progress(f"locate by {by}", len(ready), "choices")
    for each in image_by_image(ready):
        pooled = torch.split(each.pooled, engine.processor.tokens_per_region)
        texts.append(locate_expressions(engine, each.scene, pooled, [each.asked.expression], by)[0].text)
        progress.add()
    return texts


def answered(questions: Sequence[DevQuestion], texts: Sequence[str]) -> list[Answered]:
    """What the metrics need of questions and answers."""
    return [
        Answered(
            image=each.image.image_id,
            truth=each.answer,
            text=text,
            share=each.share,
            kind=each.kind,
            options=len(each.regions),
        )
        for each, text in zip(questions, texts, strict=True)
    ]


def measure(rows: dict[str, list[Answered]], describe_limit: int | None, seed: int) -> dict[str, Any]:
    """The scores of every task that was asked."""
    results: dict[str, Any] = {}
    for task, asked in rows.items():
        if task == "classify":
            results[task] = classify_scores(asked, seed)
        elif task.startswith("locate"):
            results[task] = locate_scores(asked, seed)
        elif task == "presence":
            results[task] = presence_scores(asked, seed)
        else:
            right = classify_right(rows["classify"])
            same = [right[k] for k in described_boxes(len(right), describe_limit, seed)]
            results[task] = naming_scores(asked, same, seed)
    return results


def tables(results: dict[str, Any]) -> str:
    """The scores as text."""
    lines: list[str] = []

    def head(title: str) -> None:
        lines.extend(["", title])

    def row(name: str, figure: dict[str, Any], points: bool = False) -> None:
        if figure["value"] is None:
            return
        scale, unit = (1, "pt") if points else (100, "%")
        value = f"{scale * figure['value']:{'+' if points else ''}.1f} {unit}"
        edges = [f"{scale * edge:.1f}" for edge in figure.get("interval", ())]
        lines.append(f"  {name:<34}{value:>9}  {'95 %: ' + ' to '.join(edges) if edges else '':<22}n = {figure['of']}")

    if found := results.get("classify"):
        head("COCO-80 class of a box (exact match of the generated answer)")
        row("all boxes", found["accuracy"])
        row(f"average over {found['class_average']['classes']} classes", found["class_average"])
        row("without person", found["without_person"])
        for name, figure in found["by_area"].items():
            row(f"box {name} of the image", figure)
        row("valid answers", found["valid_answers"])
        for pair in found["confusions"][:10]:
            lines.append(f"    {pair['truth']} called {pair['answer']}: {pair['count']} of {pair['of_truth']}")
        for other in found["off_list"][:5]:
            lines.append(f"    off the list: {other['answer']!r} ({other['count']})")
    for task, how in (
        ("locate", "generated answer"),
        *((f"locate_by_{by}", f"locate(by={by!r})") for by in get_args(By)),
    ):
        if not (found := results.get(task)):
            continue
        head(f"Region chosen by an expression: {how}")
        row("all expressions", found["accuracy"])
        row("chance", found["chance"])
        for name, figure in found["by_kind"].items():
            row(f"expression: {name}", figure)
        row("answers: invalid", found["invalid"])
        row("answers: no match", found["no_match"])
    if found := results.get("presence"):
        head("Is there a ...?")
        row("balanced accuracy", found["balanced_accuracy"])
        row("accuracy", found["accuracy"])
        for name, figure in found["by_kind"].items():
            row(f"right on: {name}", figure)
        row("answers: yes", found["yes_ratio"])
        row("answers: neither yes nor no", found["unparsable"])
    for task in ("describe", "caption"):
        if found := results.get(task):
            head(f"Class named by: {task}")
            row("first class named is right", found["names_class"])
            row("right class named anywhere", found["mentions_class"])
            row("no class named", found["names_none"])
            row("classifier on the same boxes", found["classify"])
            row("first named less classifier", found["names_less_classify_points"], points=True)
            row("named anywhere less classifier", found["mentions_less_classify_points"], points=True)
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and instances_<split>.json")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the model of the package)")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"some of {','.join(TASKS)}")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--describe-limit", type=int, metavar="N", help="describe only N boxes, chosen by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and of the bootstrap (default: 0)")
    parser.add_argument("--batch", type=int, default=64, help="questions at a time (default: 64)")
    parser.add_argument(
        "--detail", choices=get_args(Detail), default="fast", help="careful: also each region's own crop"
    )
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write every question and answer, a JSON a line")
    options = parser.parse_args(argv)
    tasks = [task for task in TASKS if task in options.tasks.split(",")]
    unknown = sorted(set(options.tasks.split(",")) - set(TASKS))
    if unknown:
        parser.error(f"expected --tasks among {','.join(TASKS)}, got {','.join(unknown)}")
    for name in ("limit", "describe_limit", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"expected --{name.replace('_', '-')} of at least 1, got {getattr(options, name)}")
    if {"describe", "caption"} & set(tasks) and "classify" not in tasks:
        print("descriptions are set beside the classifier: adding the task classify", file=sys.stderr)
        tasks.insert(0, "classify")
    options.tasks = tasks
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and write.

    Raises:
        RegionGPTError: data, model or options are wrong.
    """
    began = time.monotonic()
    keep_freed_memory()
    sources = photo_sources(options.data, options.split)
    data = load_coco(sources)
    print(f"{options.split}: {data.report()}", file=sys.stderr)
    images = data.images[: options.limit]
    if not images:
        raise ConfigError(f"expected annotated images in {options.data}, found none; see what was left out above")
    device = pick_device(options.device)
    model, processor = weights.load(options.model, device=device, dtype=pick_dtype(options.dtype, device))
    engine = Engine(model, processor, rows=options.batch)
    questions = build_questions(images, options.tasks, options.seed, options.describe_limit)
    ready = prepare(engine, images, questions, options.detail)
    seconds = {"load_and_encode": time.monotonic() - began}
    rows: dict[str, list[Answered]] = {}
    for task in options.tasks:
        began_task = time.monotonic()
        rows[task] = answered(questions[task], answer_all(engine, task, ready[task]))
        seconds[task] = time.monotonic() - began_task
    for by in get_args(By) if "locate" in options.tasks else ():
        began_task, name = time.monotonic(), f"locate_by_{by}"
        questions[name] = questions["locate"]
        rows[name] = answered(questions[name], locate_all(engine, ready["locate"], by))
        seconds[name] = time.monotonic() - began_task
    results = measure(rows, options.describe_limit, options.seed)
    seconds["all"] = time.monotonic() - began
    files = {source.instances.name: source.instances for source in sources}
    report = {
        "benchmark": "nano_dev",
        "data": {"split": options.split, "images": len(images), "of_images": len(data.images)},
        "results": results,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        **stamp(vars(options), {"model": options.model or weights.nano_path(), **files}),
    }
    print(tables(results))
    print(f"\n{len(images)} of {len(data.images)} images in {seconds['all']:.0f} s")
    if options.out:
        write_json(options.out, finite(report))
    if options.answers:
        write_answers(options.answers, questions, rows)
    return report


def write_answers(path: Path, questions: dict[str, list[DevQuestion]], rows: dict[str, list[Answered]]) -> None:
    """One JSON object a line: task, image, question, regions, kind, truth and answer."""
    with path.open("w", encoding="utf-8") as file:
        for task, asked in questions.items():
            for each, row in zip(asked, rows[task], strict=True):
                record = {
                    "task": task,
                    "image": each.image.path.name,
                    "question": each.text,
                    "regions": [region.to_dict() for region in each.regions],
                    "kind": each.kind,
                    "truth": each.answer,
                    "answer": row.text,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse(argv))
    except RegionGPTError as error:
        print(f"nano_dev: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

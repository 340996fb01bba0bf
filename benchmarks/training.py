"""Time training on this machine: packed against padded batches, waiting for data, and the share of the arithmetic.

    python benchmarks/training.py --data data/nano --out training.json

The model is the small one of the package, in its second stage; the conversations are those of its recipe about the
photographs' annotations. The tower's features, which the recipe keeps in a file, are made up, in a file of that kind:
time does not depend on what they are. The measurements:

- ``packing``: forward and backward pass of the same conversations, padded and packed by turns; in the order drawn, as
  records come, and padded once more in the recipe's groups of like numbers of objects;
- ``waiting``: share of a step of real training that goes by until its batch has come;
- ``utilisation``: arithmetic that learning needs, without padding, in the time that a plain matrix product of this
  machine would take for it.

``--threads 1`` where something else is running: threads that wait for each other measure the others' work.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from many_regions import measure_machine
from stamp import stamp

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.environment import keep_freed_memory, progress, progress_shown
from regiongpt.model import weights
from regiongpt.storage import finite, write_json
from regiongpt.train.dataset import DataCollator
from regiongpt.train.loop import Loop, targets_in
from regiongpt.train.packing import PackedCollate, attend_in_units
from regiongpt.train.plan import costs_of
from regiongpt.train.recipe import EngineConfig, StageConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "nano"))

from alignment import ClassWords, visual_loss
from dataset import EXTRAS, ConversationDataset
from features import FeatureStore
from reading import sampler_of
from recipe import RECIPE, NanoRecipe

CACHED = 64
"""Rows of made-up features, read one after the other: enough that they do not stay in the processor's cache."""


def features(folder: Path, images: int, shape: tuple[int, ...]) -> FeatureStore:
    """A file of made-up features, and rows of it for any number of images."""
    path = folder / "features.npy"
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(CACHED, 1, *shape))
    for row in range(CACHED):
        rows[row] = np.random.default_rng(row).standard_normal((1, *shape), np.float32)
    rows.flush()

    class Store(FeatureStore):
        def row(self, index: int, view: int) -> torch.Tensor:
            return super().row(index % CACHED, 0)

    return Store(features=np.lib.format.open_memmap(path, mode="r"), colours=[{}] * images)


def conversations(
    recipe: NanoRecipe, images: Any, store: FeatureStore, model: Any, processor: Any, group: int
) -> ConversationDataset:
    sampler = sampler_of(recipe, images)
    shape = (recipe.features, recipe.seed, len(images), group, recipe.isolated_share, model.config.image_grid)
    return ConversationDataset(images, store, sampler, processor, *shape)


# ---------------------------------------------------------------------------------------------------------------------
# Packed against padded


def measure_packing(
    recipe: NanoRecipe, images: Any, store: FeatureStore, model: Any, processor: Any, rounds: int
) -> dict[str, Any]:
    """Tokens a second of each way, and ratios with their deviation over the rounds; the ways take turns."""
    size = recipe.stage2.micro_batch_size
    padded = DataCollator(processor, EXTRAS)
    packed = PackedCollate(padded)
    loss = partial(visual_loss, ClassWords(processor.tokenizer), recipe.stage2.alignment, True)
    drawn = conversations(recipe, images, store, model, processor, 1)
    grouped = conversations(recipe, images, store, model, processor, size)
    count = 3
    # Both orders go through the same share of the photographs; that of the recipe sorts within windows of 16 batches.
    batches = [[drawn[k] for k in range(b * size, (b + 1) * size)] for b in range(count)]
    groups = [[grouped[k] for k in range(b * size, (b + 1) * size)] for b in range(0, 16, 6)]
    ways = {
        "padded": (batches, padded),
        "padded_in_groups": (groups, padded),
        "packed": (batches, packed),
    }
    ready = {name: [collate(batch) for batch in chosen] for name, (chosen, collate) in ways.items()}
    seconds = {name: np.zeros(rounds) for name in ways}
    sums: dict[str, list[float]] = {name: [0.0] * count for name in ways}
    attend_in_units(model.language_model)
    for turn in progress(range(rounds * count), "packing", "turns of all ways"):
        number = turn % count
        for name in ways:
            batch = {key: value for key, value in ready[name][number].items() if key != "tasks"}
            began = time.perf_counter()
            model.zero_grad()
            value = loss(model, batch, targets_in(batch))
            value.backward()
            sums[name][number] = float(value.detach())
            seconds[name][turn // count] += time.perf_counter() - began
    result: dict[str, Any] = {"conversations": size * count, "micro_batch_size": size, "ways": {}}
    for name, (chosen, _) in ways.items():
        lengths = [[len(each["input_ids"]) for each in batch] for batch in chosen]
        tokens = sum(map(sum, lengths))
        padding = sum(max(row) * len(row) for row in lengths) / tokens
        result["ways"][name] = {
            "tokens": tokens,
            "tokens_computed": tokens if name == "packed" else round(padding * tokens),
            "tokens_a_second": tokens * rounds / seconds[name].sum(),
            "seconds": seconds[name].tolist(),
            "loss": sum(sums[name]) / count,
        }
    for other in ("padded", "padded_in_groups"):
        tokens = result["ways"]["packed"]["tokens"] / result["ways"][other]["tokens"]
        times = tokens * seconds[other] / seconds["packed"]
        result[f"packed_over_{other}"] = [float(times.mean()), float(times.std())]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Real steps


def measure_steps(
    recipe: NanoRecipe, images: list[ImageAnnotations], store: FeatureStore, model: Any, processor: Any, steps: int
) -> dict[str, Any]:
    """Waiting and utilisation of real training, packed, but for the first step."""
    stage = recipe.stage2
    dataset = conversations(recipe, images[: steps * stage.batch_size], store, model, processor, 1)
    collate = DataCollator(processor, EXTRAS)
    loss = partial(visual_loss, ClassWords(processor.tokenizer), stage.alignment, True)
    config = StageConfig(batch_size=stage.batch_size, micro_batch_size=stage.micro_batch_size, log_steps=1, lr=1e-5)
    with tempfile.TemporaryDirectory() as out:
        Loop("stage2", model, dataset, collate, loss, config, Path(out), 0, engine=EngineConfig(packing=True)).run()
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()][1:]
    seconds = sum(line["seconds"] for line in lines)
    costs, flops = costs_of(model), 0.0
    for line in lines:  # without padding and regions; the tower's features are made up
        tokens = line["tokens"]
        flops += tokens * (costs.token + costs.square * tokens / line["examples"])
        flops += line["images"] * costs.image + line["targets"] * costs.target
    peak = measure_machine(torch.device("cpu"), torch.float32, "wall")["flops"]
    return {
        "steps": len(lines),
        "seconds_a_step": seconds / len(lines),
        "tokens_a_second": sum(line["tokens"] for line in lines) / seconds,
        "waiting_for_data": sum(line["wait"] for line in lines) / seconds,
        "utilisation": flops / (seconds * peak),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of annotated images, as for the recipe")
    parser.add_argument("--micro-batch", type=int, default=0, help="conversations in a batch; the recipe's where 0")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way of batching is measured")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of real training")
    parser.add_argument("--threads", type=int, default=0, help="of the arithmetic; as many as PyTorch takes where 0")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    result: dict[str, Any] = stamp(vars(options), {"recipe": RECIPE, "weights": weights.nano_path()})
    size = options.micro_batch
    recipe = NanoRecipe.load(
        RECIPE, [f"--stage2.{k}={size}" for k in ("batch_size", "micro_batch_size")] if size else []
    )
    model, processor = weights.load(weights.nano_path(), dtype=torch.float32)
    model.train()
    found = list(load_coco(photo_sources(options.data, "train")).images)
    wanted = max(options.steps, 16) * recipe.stage2.batch_size
    images = random.Random(0).sample(found, min(len(found), wanted))
    with tempfile.TemporaryDirectory() as folder, progress_shown():
        shape = (model.config.vision_config.hidden_size, *model.config.tower_grid)
        store = features(Path(folder), len(images), shape)
        result["packing"] = packing = measure_packing(recipe, images, store, model, processor, options.rounds)
        for name, way in packing["ways"].items():
            print(f"{name:18}{way['tokens_a_second']:10,.0f} tokens a second, loss {way['loss']:.4f}")
        for name in ("packed_over_padded", "packed_over_padded_in_groups"):
            print("{}: {:.2f} +- {:.2f}".format(name, *packing[name]))
        result["training"] = measure_steps(recipe, images, store, model, processor, options.steps)
        for name, value in result["training"].items():
            print(f"{name}: {value:.4g}")
    if options.out:
        write_json(options.out, finite(result))


if __name__ == "__main__":
    main()

"""Time training on this machine: packed against padded batches, waiting for data, and the share of the arithmetic.

    python benchmarks/training.py --data ../shared/data/coco_photos --out training.json

The model is the small one of the package, in its second stage; the conversations are those of its recipe about the
photographs' annotations. The tower's features, which the recipe keeps in a file, are made up, in a file of that kind:
time does not depend on what they are. The measurements:

- ``packing``: forward and backward pass of the same conversations, padded and packed by turns; in the order drawn, as
  records come, and padded once more in the recipe's groups of like numbers of objects; ``packing_mixed`` the same of
  a mixture in which every other conversation is a single question;
- ``waiting``: share of a step of real training that goes by until its batch has come;
- ``utilisation``: arithmetic that learning needs, without padding, in the time that a plain matrix product of this
  machine would take for it;
- ``large``, with a GPU: a language model of 1.2 billion parameters in bfloat16, on conversations of 2,048 tokens.

``--threads 1`` where something else is running: threads that wait for each other measure the others' work.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stamp import Progress, stamp
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, LlamaConfig

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration, weights
from regiongpt.storage import finite, write_json
from regiongpt.train.dataset import DataCollator, answer_loss
from regiongpt.train.loop import Loop, targets_in
from regiongpt.train.packing import PackedCollate, attend_in_units
from regiongpt.train.plan import costs_of
from regiongpt.train.recipe import EngineConfig, StageConfig
from regiongpt.train.stages import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "nano"))

from alignment import ClassWords, visual_loss
from conversations import ConversationSampler
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


class EveryOtherShort:
    """Draws as the recipe does, and leaves every other image one turn: conversations and single questions, mixed."""

    def __init__(self, sampler: ConversationSampler) -> None:
        self.sampler, self.regions_per_image = sampler, sampler.regions_per_image

    def sample(self, view: Any, colours: Any, seed: int, index: int, epoch: int, words: Any = None) -> Any:
        """A conversation, or its first question."""
        drawn = self.sampler.sample(view, colours, seed, index, epoch, words)
        return replace(drawn, messages=drawn.messages[:2], tasks=drawn.tasks[:1]) if index % 2 else drawn


def conversations(
    recipe: NanoRecipe, images: Any, store: FeatureStore, model: Any, processor: Any, group: int, mixed: bool = False
) -> ConversationDataset:
    sampler: Any = sampler_of(recipe, images)
    sampler = EveryOtherShort(sampler) if mixed else sampler
    shape = (recipe.features, recipe.seed, len(images), group, recipe.isolated_share, model.config.image_grid)
    return ConversationDataset(images, store, sampler, processor, *shape)


# ---------------------------------------------------------------------------------------------------------------------
# Packed against padded


def measure_packing(
    recipe: NanoRecipe, images: Any, store: FeatureStore, model: Any, processor: Any, rounds: int, mixed: bool
) -> dict[str, Any]:
    """Tokens a second of each way, and ratios with their deviation over the rounds; the ways take turns."""
    size = recipe.stage2.micro_batch_size
    padded = DataCollator(processor, EXTRAS)
    packed = PackedCollate(padded)
    loss = partial(visual_loss, ClassWords(processor.tokenizer), recipe.stage2.alignment, True)
    drawn = conversations(recipe, images, store, model, processor, 1, mixed)
    grouped = conversations(recipe, images, store, model, processor, size, mixed)
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
    progress = Progress("packing", rounds * len(ways) * count, "steps")
    for turn in range(rounds * count):
        number = turn % count
        for name in ways:
            batch = {key: value for key, value in ready[name][number].items() if key != "tasks"}
            began = time.perf_counter()
            model.zero_grad()
            value = loss(model, batch, targets_in(batch))
            value.backward()
            sums[name][number] = float(value.detach())
            seconds[name][turn // count] += time.perf_counter() - began
            progress.add()
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
    return timed(model, dataset, collate, loss, config, EngineConfig(packing=True), 1)


def timed(
    model: Any, dataset: Any, collate: Any, loss: Any, config: StageConfig, engine: EngineConfig, skip: int
) -> dict[str, Any]:
    """Rates of a stage by its own log, without the first ``skip`` steps."""
    with tempfile.TemporaryDirectory() as out:
        Loop("stage2", model, dataset, collate, loss, config, Path(out), 0, engine=engine).run()
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()][skip:]
    seconds = sum(line["seconds"] for line in lines)
    costs, flops = costs_of(model), 0.0
    for line in lines:  # without padding and regions; the tower's features are made up
        tokens = line["tokens"]
        flops += tokens * (costs.token + costs.square * tokens / line["examples"])
        flops += line["images"] * costs.image + line["targets"] * costs.target
    peak = matmul_rate(next(model.parameters()).device, engine.precision)
    return {
        "steps": len(lines),
        "seconds_a_step": seconds / len(lines),
        "tokens_a_second": sum(line["tokens"] for line in lines) / seconds,
        "waiting_for_data": sum(line["wait"] for line in lines) / seconds,
        "utilisation": flops / (seconds * peak),
    }


def matmul_rate(device: Any, precision: str) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32
    left, right = (torch.ones(side, side, dtype=kind, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


# ---------------------------------------------------------------------------------------------------------------------
# A large model


class Talk(Dataset[dict[str, Any]]):
    """Made-up conversations of one length about made-up features, two thirds of it answers."""

    def __init__(self, config: RegionGPTConfig, length: int, items: int) -> None:
        self.config, self.length, self.items = config, length, items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(item)
        ids = torch.randint(10, 1000, (self.length,), generator=generator)
        ids[1 : 1 + self.config.num_image_tokens] = self.config.image_token_id
        labels = ids.clone()
        labels[: self.length // 3] = -100
        shape = (self.config.vision_config.hidden_size, *self.config.tower_grid)
        return {"input_ids": ids, "labels": labels, "vision_features": torch.randn(shape, generator=generator)}


def stacked(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def large_config(width: int, layers: int) -> RegionGPTConfig:
    """The shape of a language model of ``width`` and ``layers``; 2,048 and 16 are 1.2 billion parameters."""
    heads = max(1, width // 64)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    text = LlamaConfig(
        vocab_size=32_000, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, **shape
    )
    small = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **small)
    return RegionGPTConfig(vision_config=vision, text_config=text, image_token_id=3, region_token_id=4)


def measure_large(width: int, layers: int, length: int, batch: int, steps: int) -> dict[str, Any]:
    """Utilisation of a language model in bfloat16, without the steps that warm up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = large_config(width, layers)
    with torch.device(device):
        model = RegionGPTForConditionalGeneration(config).train()
    stage = StageConfig(batch_size=batch, micro_batch_size=batch, log_steps=1, lr=1e-5, save_steps=10**6)
    engine = EngineConfig(precision="bf16", workers=4 if device == "cuda" else 0)
    rates = timed(model, Talk(config, length, steps * batch), stacked, answer_loss, stage, engine, steps // 3)
    parameters = sum(p.numel() for p in model.language_model.parameters())
    return {"parameters": parameters, "length": length, "batch": batch, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of annotated photographs, as for `regiongpt train`")
    parser.add_argument("--micro-batch", type=int, default=0, help="conversations in a batch; the recipe's where 0")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way of batching is measured")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of real training")
    parser.add_argument("--threads", type=int, default=0, help="of the arithmetic; as many as PyTorch takes where 0")
    parser.add_argument("--large", action="store_true", help="measure the large model, for which a GPU is needed")
    parser.add_argument("--large-width", type=int, default=2048)
    parser.add_argument("--large-layers", type=int, default=16)
    parser.add_argument("--large-length", type=int, default=2048)
    parser.add_argument("--large-batch", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.large and not options.data:
        parser.error("give --data, a folder of annotated photographs, or --large")
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    result: dict[str, Any] = stamp(vars(options), {"recipe": RECIPE, "weights": weights.nano_path()})
    if options.large:
        shape = (options.large_width, options.large_layers, options.large_length, options.large_batch)
        result["large"] = measure_large(*shape, max(3, options.steps))
        print(f"large: {result['large']['utilisation']:.0%} of the device's arithmetic")
    if options.data:
        size = options.micro_batch
        recipe = NanoRecipe.load(
            RECIPE, [f"--stage2.{k}={size}" for k in ("batch_size", "micro_batch_size")] if size else []
        )
        model, processor = weights.load(weights.nano_path(), dtype=torch.float32)
        model.train()
        found = list(load_coco(photo_sources(options.data, "train")).images)
        wanted = max(options.steps, 16) * recipe.stage2.batch_size
        images = random.Random(0).sample(found, min(len(found), wanted))
        with tempfile.TemporaryDirectory() as folder:
            shape = (model.config.vision_config.hidden_size, *model.config.tower_grid)
            store = features(Path(folder), len(images), shape)
            for part, mixed in (("packing", False), ("packing_mixed", True)):
                found_here = measure_packing(recipe, images, store, model, processor, options.rounds, mixed)
                result[part] = found_here
                print(part)
                for name, way in found_here["ways"].items():
                    print(f"  {name:18}{way['tokens_a_second']:10,.0f} tokens a second, loss {way['loss']:.4f}")
                for name in ("packed_over_padded", "packed_over_padded_in_groups"):
                    print("  {}: {:.2f} +- {:.2f}".format(name, *found_here[name]))
            result["training"] = measure_steps(recipe, images, store, model, processor, options.steps)
            for name, value in result["training"].items():
                print(f"{name}: {value:.4g}")
    if options.out:
        write_json(options.out, finite(result))


if __name__ == "__main__":
    main()

"""What a recipe takes, before anything is spent: ``regiongpt train CONFIG.toml --plan --gpu a100-80gb --gpus 8``.

The figures come from the recipe and from the network's own code, run without numbers (:mod:`regiongpt.train.sizes`), so
that no weights are loaded and nothing is fetched. Parameters are exact. Tokens are exact where the data is at hand and
not larger than ``plan.sample``, and else counted on a sample or supposed. Arithmetic is that of the shapes that will be
computed, padding included. Memory is the sum of what is there at once, without what allocator and libraries keep to
themselves. Time is arithmetic divided by an assumed share of the GPU's peak: what waits for data is not in it.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, SiglipImageProcessorPil

from regiongpt.data.coco import load_coco, photo_sources
from regiongpt.data.mixture import open_mixture
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration, RegionGPTProcessor
from regiongpt.model.processing import prepare_tokenizer
from regiongpt.train.dataset import ConversationDataset
from regiongpt.train.features import FeatureStore
from regiongpt.train.gpus import GPUS, Gpu
from regiongpt.train.lora import choose_learners
from regiongpt.train.photographs import (
    Colours,
    language_of,
    reading_of,
    sampler_of,
    texts_of,
    tokenizer_of,
)
from regiongpt.train.plan_data import (
    Item,
    Reading,
    local_tokenizer,
    of_photographs,
    of_records,
    read,
    row_limit,
    suppose,
    vocabulary,
)
from regiongpt.train.recipe import ModelConfig, Recipe, StageConfig
from regiongpt.train.shapes import language_shape, tower_shape
from regiongpt.train.sizes import Costs, LayerCosts, kept_by_image, kept_bytes, language_costs, visual_costs
from regiongpt.train.starts import check_shape, checkpoint_folder, new_shape, read_shape
from regiongpt.train.text import LENGTH

GIB = 2**30
_PARTS = ("vision_tower", "refinement", "connector", "language_model")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of one part of the model.

    Attributes:
        name: Of the part; ``adapters`` for those of LoRA.
        parameters: How many there are.
        trained: How many of these learn.
    """

    name: str
    parameters: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        weights: In float32; with FSDP a share, and what is put together of it at a time.
        gradients: Likewise.
        optimiser: Both moments of AdamW, in float32.
        activations: What the forward pass of a micro-batch keeps; the largest micro-batch that was counted.
    """

    weights: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one step of a recipe takes.

    Attributes:
        name: Of the step.
        parts: Of the model.
        reading: The data.
        steps: Of the optimiser.
        batch: How a step is made up, in words.
        flops: By what it is for: ``tower``, ``visual``, ``language``, ``head``, and ``again``, the forward passes that
            gradient checkpointing repeats.
        memory: On each GPU.
        seconds: On the GPUs named.
    """

    name: str
    parts: tuple[Part, ...]
    reading: Reading
    steps: int
    batch: str
    flops: dict[str, float]
    memory: Memory
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe takes.

    Attributes:
        stages: Its steps that compute.
        gpu: Name of the GPU.
        gpus: How many.
        sharding: ``ddp`` or ``fsdp``.
        precision: ``bf16`` or ``fp32``.
        utilisation: Share of the peak that is assumed.
        peak: Of one GPU in this precision, FLOP/s.
        capacity: Of one GPU's memory, in bytes.
    """

    stages: tuple[StagePlan, ...]
    gpu: str
    gpus: int
    sharding: str
    precision: str
    utilisation: float
    peak: float
    capacity: float

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def text(self) -> str:
        """The plan for a person."""
        lines = [line for stage in self.stages for line in self._stage(stage)]
        seconds = sum(stage.seconds for stage in self.stages)
        lines += [
            f"in all: {_time(seconds)} on {self.gpus} x {self.gpu}, {_time(seconds * self.gpus)} of one GPU, at "
            f"{self.utilisation:.0%} (assumed) of its {self.peak / 1e12:g} TFLOP/s in {self.precision}"
        ]
        return "\n".join(lines)

    def _stage(self, stage: StagePlan) -> list[str]:
        reading, memory = stage.reading, stage.memory
        parts = [
            f"{part.name.replace('_', ' ')} {_short(part.parameters)} "
            + ("trained" if part.trained == part.parameters else "frozen" if not part.trained else "in part")
            for part in stage.parts
        ]
        trained = sum(part.trained for part in stage.parts)
        flops = [f"{name} {_flops(value)}" for name, value in stage.flops.items() if value]
        fits = "" if memory.total <= self.capacity else ": more than it has"
        spread = self.sharding if self.gpus > 1 else "one GPU"
        told = [f"{name} {_bytes(value)}" for name, value in asdict(memory).items()]
        return [
            stage.name,
            f"  parameters  {', '.join(parts)}; {_short(trained)} trained",
            f"  data        {reading.items:,} items, {_short(reading.tokens)} tokens, {_short(reading.targets)} "
            f"of them targets ({reading.how})",
            f"  steps       {stage.steps:,} of {stage.batch}",
            f"  arithmetic  {_flops(sum(stage.flops.values()))}: {', '.join(flops)}",
            f"  memory      {_bytes(memory.total)} of {self.capacity / GIB:g} GiB on each GPU ({spread}){fits}: "
            + ", ".join(told),
            f"  time        {_time(stage.seconds)}",
            "",
        ]


def make_plan(config: Recipe) -> Plan:
    """Works out what a recipe takes.

    Args:
        config: The recipe.

    Raises:
        ConfigError: A GPU or a shape is not known, the data is neither at hand nor supposed, or a batch cannot be
            divided among the GPUs.
        CheckpointError: The checkpoint that the recipe goes on from is another than it says.
        DataError: Records cannot be used.
    """
    gpu = GPUS[config.plan.gpu]
    stages = _records_stages(config, gpu) if config.data.on_records else _photograph_stages(config, gpu)
    return Plan(
        stages=tuple(stages),
        gpu=config.plan.gpu,
        gpus=config.plan.gpus,
        sharding=config.engine.sharding,
        precision=config.engine.precision,
        utilisation=config.plan.utilisation or gpu.utilisation,
        peak=gpu.peak(config.engine.precision),
        capacity=gpu.memory * GIB,
    )


def _records_stages(config: Recipe, gpu: Gpu) -> list[StagePlan]:
    shape, processor = _shape_on_records(config)
    limit = row_limit(config.engine, shape.text_config)
    longest = getattr(shape.text_config, "max_position_embeddings", None)
    plans = []
    for name, stage, mixture, size in (
        ("stage1", config.stage1, config.data.pretrain_mixture, config.plan.stage1),
        ("stage2", config.stage2, config.data.mixture, config.plan.stage2),
    ):
        if not config.runs(name):
            continue
        try:
            opened = open_mixture(mixture, config.data.root, config.seed) if processor else None
        except (ConfigError, DataError):
            if not size.records:
                raise
            opened = None
        if opened and processor:
            items = max(1, round(stage.epochs * len(opened)))
            item = of_records(opened, processor, longest, config.data.suffixes)
            reading = read(items, stage.micro_batch_size, item, config.plan.sample, *limit)
        else:
            reading = suppose(size, stage.epochs, stage.micro_batch_size, shape.num_image_tokens, *limit, name)
        plans.append(_plan_stage(config, gpu, name, stage, shape, reading, cached=False))
    return plans


def _shape_on_records(config: Recipe) -> tuple[RegionGPTConfig, RegionGPTProcessor | None]:
    """The model's shape, and its processor where the tokenizer is at hand."""
    model = config.model
    folder = checkpoint_folder(model)
    if model.init and (folder / "config.json").exists():
        check_shape(model, folder)
        return read_shape(folder), RegionGPTProcessor.from_pretrained(folder, local_files_only=True)
    if not model.language:
        raise ConfigError(
            f"--plan: expected the checkpoint {folder}, found none; give its shape by --model.vision and "
            "--model.language, and the rest of [model]"
        )
    text = language_shape(model.language)
    text.vocab_size = vocabulary(model, text)
    found = local_tokenizer(model)
    shape = new_shape(model, tower_shape(model.vision), text)
    return shape, _processor(model, shape, *found) if found else None


def _processor(model: ModelConfig, shape: RegionGPTConfig, tokenizer: Any, template: str) -> RegionGPTProcessor:
    """A processor that tokenises; it is not for images."""
    return RegionGPTProcessor(
        SiglipImageProcessorPil(),
        tokenizer,
        image_size=shape.image_size,
        num_image_tokens=shape.num_image_tokens,
        refined_grid=list(shape.refined_grid),
        region_format=model.region_format,
        chat_template=template,
        region_grid=model.region_grid,
    )


def _photograph_stages(config: Recipe, gpu: Gpu) -> list[StagePlan]:
    if not config.data.root:
        raise ConfigError("data.root: expected the folder of the annotated photographs; give --data.root DIR")
    images = load_coco(photo_sources(Path(config.data.root), config.data.split)).images
    sampler = sampler_of(config, images)
    texts, done = texts_of(config, images, sampler), Path(config.model.language or config.out / "language")
    if (done / "config.json").exists():
        tokenizer, text_config = AutoTokenizer.from_pretrained(done), AutoConfig.from_pretrained(done)
    elif config.model.language:
        raise ConfigError(f"model.language: expected a folder, got {done}, which holds no language model")
    else:
        tokenizer = tokenizer_of(texts, config.model)
        text_config = language_of(config.model, tokenizer)
    if config.model.language:
        prepare_tokenizer(tokenizer, config.model.chat_template or "plain")
        text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    shape = new_shape(config.model, tower_shape(config.model.vision), text_config)
    plans = []
    if config.runs("language"):
        items = len(reading_of(config, texts, tokenizer))
        # The head runs at every token, whether or not it is a target.
        each = Item(tokens=LENGTH, targets=LENGTH, regions=0, image=False)
        reading = read(items, config.language.micro_batch_size, lambda _: each, 1, 0, 0.0)
        reading = replace(reading, how="counted on all")
        plans.append(_plan_stage(config, gpu, "language", config.language, shape, reading, cached=True))
    template = config.model.chat_template or "plain"
    processor = _processor(config.model, shape, tokenizer, template)
    store = FeatureStore(np.empty(0), Colours(images))
    for name, stage in (("align", config.align), ("stage1", config.stage1), ("stage2", config.stage2)):
        if not config.runs(name):
            continue
        items = round(stage.epochs * len(images))
        micro = stage.micro_batch_size
        dataset = ConversationDataset(
            images, store, sampler, processor, config.features, config.seed, items, micro, 0.0, (1, 1)
        )
        limit = row_limit(config.engine, text_config)
        reading = read(items, micro, of_photographs(dataset.draw, processor), config.plan.sample, *limit)
        plans.append(_plan_stage(config, gpu, name, stage, shape, reading, cached=True))
    return plans


def _plan_stage(
    config: Recipe, gpu: Gpu, name: str, stage: StageConfig, shape: Any, reading: Reading, cached: bool
) -> StagePlan:
    """One step of the recipe; ``cached`` where the tower has been run beforehand."""
    engine, plan = config.engine, config.plan
    accumulation, rest = divmod(stage.batch_size, stage.micro_batch_size * plan.gpus)
    if rest:
        raise ConfigError(
            f"{name}.batch_size: expected a multiple of micro_batch_size={stage.micro_batch_size} times {plan.gpus} "
            f"GPUs, got {stage.batch_size}; give another --{name}.micro_batch_size or --gpus"
        )
    with torch.device("meta"):
        model = RegionGPTForConditionalGeneration(shape)
        choose_learners(name, model, config.lora)
    parts = tuple(part for part in _parts(model) if name != "language" or part.name == "language_model")
    reads, sees = name != "align", name != "language"
    trained = name in ("language", "stage2")
    lora = config.lora if name == "stage2" else None
    visual = visual_costs(model, with_tower=not cached) if sees else {}
    layers, head = language_costs(shape.text_config, trained, lora) if reads else (LayerCosts(), 0.0)
    costs = Costs(**visual, layers=layers, head=head)
    kept = kept_bytes(shape.text_config, trained, engine.precision, lora) if reads else None
    twice = engine.gradient_checkpointing
    flops = {
        "tower": 0.0 if cached else reading.images * costs.tower,
        "visual": reading.images * costs.image + reading.regions * costs.region,
        "language": sum(rows * layers.row(width) for rows, width in reading.rows),
        "head": reading.targets * costs.head,
        "again": sum(rows * (layers.row(width, twice) - layers.row(width)) for rows, width in reading.rows),
    }
    sharded = engine.sharding == "fsdp" and plan.gpus > 1
    tokens, images, targets = reading.widest
    activations = images * kept_by_image(shape, engine.precision) if sees else 0.0
    if kept is not None:
        activations += kept.language(tokens, twice, sharded) + kept.target * targets
    utilisation = plan.utilisation or gpu.utilisation
    return StagePlan(
        name=name,
        parts=parts,
        reading=reading,
        steps=math.ceil(reading.items / stage.batch_size),
        batch=f"{stage.batch_size} conversations: {plan.gpus} GPU(s) x {stage.micro_batch_size} x {accumulation}",
        flops=flops,
        memory=replace(_states(parts, model, config, sharded, accumulation), activations=activations),
        seconds=sum(flops.values()) / (plan.gpus * utilisation * gpu.peak(engine.precision)),
    )


def _parts(model: Any) -> list[Part]:
    """The model's parameters by part; a tied one counts once."""
    found = []
    for name in _PARTS:
        own = dict(getattr(model, name).named_parameters())
        adapters = {key: value for key, value in own.items() if "lora_" in key}
        plain = [value for key, value in own.items() if key not in adapters]
        for part, tensors in ((name, plain), ("adapters", list(adapters.values()))):
            if tensors:
                learning = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
                total = sum(tensor.numel() for tensor in tensors)
                found.append(Part(name=part, parameters=total, trained=learning))
    return found


def _states(parts: tuple[Part, ...], model: Any, config: Recipe, sharded: bool, accumulation: int) -> Memory:
    """Weights, gradients and optimiser on one GPU."""
    gpus = config.plan.gpus
    total, trained = sum(part.parameters for part in parts), sum(part.trained for part in parts)
    held, gradients = 4.0 * total, 4.0 * trained
    if sharded:
        wide = 2 if config.engine.precision == "bf16" else 4
        language = model.language_model
        layers = sum(p.numel() for name, p in language.named_parameters() if ".layers." in name)
        count = max(1, language.config.num_hidden_layers)
        # All but the layers is put together for the whole pass; of the layers one, while the next is fetched.
        held = held / gpus + wide * (total - layers + 2 * layers / count)
        # Gradients are summed over the GPUs once in a step; until then each holds them whole.
        gradients = gradients / gpus + (gradients if accumulation > 1 else wide * 2 * layers / count)
    elif gpus > 1:
        gradients *= 2  # DDP's buckets
    return Memory(
        weights=held, gradients=gradients, optimiser=8.0 * trained / (gpus if sharded else 1), activations=0.0
    )


def _short(number: float) -> str:
    for unit, size in (("B", 1e10), ("M", 1e5)):
        if number >= size:
            return f"{number / (1e9 if unit == 'B' else 1e6):,.1f} {unit}"
    return f"{number:,.0f}"


def _flops(number: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12)):
        if number >= size:
            return f"{number / size:.3g} {unit}FLOP"
    return f"{number / 1e9:.3g} GFLOP"


def _bytes(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"

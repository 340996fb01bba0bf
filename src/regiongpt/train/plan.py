"""What a recipe takes, before anything is spent: ``regiongpt train RECIPE --plan --gpu a100-80gb --gpus 8``.

No weights are loaded and nothing is fetched. Parameters are exact; tokens too if the data is at hand and not larger
than ``plan.sample``. FLOPs include padding. Time is FLOPs divided by an assumed share of the GPU's peak.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, SiglipImageProcessorPil

from regiongpt.data.mixture import open_mixture
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration, RegionGPTProcessor, weights
from regiongpt.model.processing import IGNORED, prepare_tokenizer
from regiongpt.prompts import template_family
from regiongpt.train.costs import Costs, kept_by_image, kept_bytes, language_costs, visual_costs
from regiongpt.train.dataset import RecordDataset
from regiongpt.train.known import GPUS, LANGUAGE_MODELS, PADDED_TOKENS, language_shape, tower_shape
from regiongpt.train.lora import choose_learners
from regiongpt.train.packing import plan_rows, width_cost
from regiongpt.train.recipe import ModelConfig, Recipe, StageConfig
from regiongpt.train.start import check_shape, new_shape, read_shape

GIB = 2**30
_PARTS = ("vision_tower", "refinement", "connector", "language_model")
_ADDED_TOKENS = 2  # <image> and <region>


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of one part of the model, ``adapters`` for those of LoRA, and how many of them are trained."""

    name: str
    parameters: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU.

    Weights, gradients and both moments of AdamW are in float32; with FSDP they are a share, and what is gathered at a
    time. Activations are what the forward pass of the largest counted micro-batch saves.
    """

    weights: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimiser + self.activations


class Item(NamedTuple):
    """Size of one conversation: its tokens with those of image and regions, supervised tokens, region embeddings."""

    tokens: int
    targets: int
    regions: int
    image: bool = True


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Size of a stage's data."""

    items: int  # conversations
    how: str  # what the numbers rest on, in words
    tokens: float
    targets: float  # supervised tokens
    rows: tuple[tuple[float, float], ...]  # of the language model's input: (number of rows, tokens in each)
    images: float  # that go through the tower; a text among images takes a blank one along
    regions: float  # region embeddings
    widest: tuple[float, float, float]  # tokens with padding, images and targets of the largest micro-batch


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage takes; among ``flops``, ``again`` is what gradient checkpointing repeats."""

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
    """What a recipe takes."""

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
        """The plan in words."""
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
    """Work out what a recipe takes.

    Raises:
        ConfigError: A shape is not known, the data is neither at hand nor assumed, or a batch cannot be divided among
            the GPUs.
        CheckpointError: The checkpoint that the recipe continues from is not what the recipe says.
        DataError: Records cannot be used.
    """
    gpu = GPUS[config.plan.gpu]
    return Plan(
        stages=tuple(_stages(config)),
        gpu=config.plan.gpu,
        gpus=config.plan.gpus,
        sharding=config.engine.sharding,
        precision=config.engine.precision,
        utilisation=config.plan.utilisation or gpu.utilisation,
        peak=gpu.peak(config.engine.precision),
        capacity=gpu.memory * GIB,
    )


def _stages(config: Recipe) -> list[StagePlan]:
    shape, processor = _find_shape(config.model)
    text, engine = shape.text_config, config.engine
    context = getattr(text, "max_position_embeddings", None)
    packing = (engine.pack_length or int(context or 4096), width_cost(text)) if engine.packing else (0, 0.0)
    plans = []
    for name, stage, path, size in (
        ("stage1", config.stage1, config.data.pretrain_mixture, config.plan.stage1),
        ("stage2", config.stage2, config.data.mixture, config.plan.stage2),
    ):
        if not config.runs(name):
            continue
        mixture, micro = None, stage.micro_batch_size
        try:
            mixture = open_mixture(path, config.data.root, config.seed) if processor else None
        except (ConfigError, DataError):
            if not size.records:
                raise
        if mixture and processor:
            items = max(1, round(stage.epochs * len(mixture)))
            dataset = RecordDataset(mixture, processor, items, context, config.data.suffixes)

            def count(number: int, dataset: RecordDataset = dataset) -> Item:
                """A record, tokenized and cut as in training, its image not opened."""
                record, example = dataset.words(dataset.mixture.draw(number))
                regions = len(record.regions) * dataset.processor.tokens_per_region
                targets = int((example["labels"] != IGNORED).sum())
                return Item(len(example["input_ids"]), targets, regions, bool(record.image))

            reading = _read(items, micro, count, config.plan.sample, *packing)
        elif size.records and size.answer_tokens:
            each = Item(shape.num_image_tokens + size.text_tokens, size.answer_tokens, 1)
            items = max(1, round(stage.epochs * size.records))
            reading = _read(items, micro, lambda _, each=each: each, micro, *packing)  # type: ignore[misc]
            reading = replace(reading, how="supposed, see [plan]")
        else:
            raise ConfigError(
                f"--plan: the data of {name} cannot be read here; give its folder, or --plan.{name}.records, "
                f"--plan.{name}.text_tokens and --plan.{name}.answer_tokens"
            )
        plans.append(_plan_stage(config, name, stage, shape, reading))
    return plans


def _find_shape(model: ModelConfig) -> tuple[RegionGPTConfig, RegionGPTProcessor | None]:
    """The model's shape, and its processor if the tokenizer is at hand."""
    if model.init and (model.folder / "config.json").exists():
        check_shape(model, model.folder)
        with weights.reading(f"the processor of {model.folder}"):
            processor = RegionGPTProcessor.from_pretrained(model.folder, local_files_only=True)
        return read_shape(model.folder), processor
    if not model.language:
        raise ConfigError(
            f"--plan: no checkpoint in {model.folder}; give its shape by --model.vision and --model.language, and the "
            "rest of [model]"
        )
    text = language_shape(model.language)
    known = not Path(model.language).is_dir() and model.language in LANGUAGE_MODELS
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.language, local_files_only=True)
    # Nothing in the cache, a hub that cannot be reached, a folder without one: each has an exception of its own.
    except Exception:
        tokenizer = None
    template = model.chat_template or (template_family(tokenizer) if tokenizer else "")
    if tokenizer:
        prepare_tokenizer(tokenizer, template)
    tokens = PADDED_TOKENS.get(model.language, text.vocab_size) + _ADDED_TOKENS
    text.vocab_size = max(int(text.vocab_size), len(tokenizer) if tokenizer and not known else tokens)
    shape = new_shape(model, tower_shape(model.vision), text)
    if not tokenizer:
        return shape, None
    processor = RegionGPTProcessor(  # tokenizes, and is not for images
        SiglipImageProcessorPil(),
        tokenizer,
        image_size=shape.image_size,
        num_image_tokens=shape.num_image_tokens,
        refined_grid=list(shape.refined_grid),
        region_format=model.region_format,
        chat_template=template,
        region_grid=model.region_grid,
    )
    return shape, processor


def _read(items: int, micro: int, item: Callable[[int], Item], sample: int, packing: int, cost: float) -> Reading:
    """Count micro-batches of at most ``sample`` conversations, in rows of ``packing`` tokens or padded (0)."""
    batches = -(-items // micro)
    counted = min(batches, max(1, sample // micro))
    numbers = [n * batches // counted for n in range(counted)]
    found = [[item(i) for i in range(n * micro, min((n + 1) * micro, items))] for n in numbers]
    seen = sum(len(batch) for batch in found)
    scale = items / seen
    rows: list[tuple[float, float]] = []
    images = regions = 0.0
    widest = (0.0, 0.0, 0.0)
    for batch in found:
        lengths = [each.tokens for each in batch]
        packed = plan_rows(lengths, packing, cost) if packing else [[k] for k in range(len(batch))]
        width = max(sum(lengths[k] for k in row) for row in packed)
        rows.append((scale * len(packed), float(width)))
        shown = len(batch) if any(each.image for each in batch) else 0
        images += scale * shown
        regions += scale * len(batch) * max(each.regions for each in batch)
        widest = max(widest, (len(packed) * width, shown, sum(each.targets for each in batch)))
    every = [each for batch in found for each in batch]
    return Reading(
        items=items,
        how="counted on all" if seen == items else f"counted on {seen:,} of them",
        tokens=scale * sum(each.tokens for each in every),
        targets=scale * sum(each.targets for each in every),
        rows=tuple(rows),
        images=images,
        regions=regions,
        widest=widest,
    )


def _plan_stage(config: Recipe, name: str, stage: StageConfig, shape: Any, reading: Reading) -> StagePlan:
    engine, plan, gpu = config.engine, config.plan, GPUS[config.plan.gpu]
    accumulation, rest = divmod(stage.batch_size, stage.micro_batch_size * plan.gpus)
    if rest:
        raise ConfigError(
            f"{name}.batch_size: expected a multiple of micro_batch_size={stage.micro_batch_size} times {plan.gpus} "
            f"GPUs, got {stage.batch_size}; give another --{name}.micro_batch_size or --gpus"
        )
    with torch.device("meta"):
        model = RegionGPTForConditionalGeneration(shape)
        choose_learners(name, model, config.lora)
    parts = tuple(_parts(model))
    trained = name == "stage2"
    lora = config.lora if trained else None
    layers, head = language_costs(shape.text_config, trained, lora)
    costs = Costs(**visual_costs(model, with_tower=True), layers=layers, head=head)
    twice = engine.gradient_checkpointing
    flops = {
        "tower": reading.images * costs.tower,
        "visual": reading.images * costs.image + reading.regions * costs.region,
        "language": sum(rows * layers.row(width) for rows, width in reading.rows),
        "head": reading.targets * costs.head,
        "again": sum(rows * (layers.row(width, twice) - layers.row(width)) for rows, width in reading.rows),
    }
    sharded = engine.sharding == "fsdp" and plan.gpus > 1
    tokens, images, targets = reading.widest
    kept = kept_bytes(shape.text_config, trained, engine.precision, lora)
    activations = images * kept_by_image(shape, engine.precision)
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
        # All but the layers is gathered for the whole pass; of the layers one, while the next is fetched.
        held = held / gpus + wide * (total - layers + 2 * layers / count)
        # Gradients are summed over the GPUs once per step; until then each holds them whole.
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
    size, unit = next((each for each in ((1e18, "E"), (1e15, "P"), (1e12, "T")) if number >= each[0]), (1e9, "G"))
    return f"{number / size:.3g} {unit}FLOP"


def _bytes(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= 0.1 * GIB else f"{number / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    size, unit = next((each for each in units if seconds >= each[0]), (1.0, "seconds"))
    return f"{seconds / size:.1f} {unit}"

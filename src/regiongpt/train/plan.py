"""Estimated cost of a recipe: ``regiongpt train RECIPE --plan --gpu a100-80gb --gpus 8``.

No weights are loaded and nothing is fetched. Parameters are exact; tokens too if at most 256 records are at hand.
FLOPs include padding. Time is FLOPs divided by an assumed share of the GPU's peak.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, SiglipImageProcessorPil

from regiongpt.data.shards import open_mixture
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration, RegionGPTProcessor, weights
from regiongpt.model.processing import IGNORED, prepare_tokenizer
from regiongpt.prompts import template_family
from regiongpt.train.dataset import RecordDataset
from regiongpt.train.known import GPUS, LANGUAGE_MODELS, language_shape, tower_shape
from regiongpt.train.packing import plan_rows, width_cost
from regiongpt.train.recipe import ModelConfig, Recipe
from regiongpt.train.stages import check_shape, choose_learners, new_shape, read_shape

SAMPLE = 256
"""Most records to count tokens on."""
_PARTS = ("vision_tower", "refinement", "connector", "language_model")
_FLOPS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
_BYTES = ((0.1 * 2**30, "GiB"), (0.0, "MiB"))
_TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Size of a stage's data; sums over all its conversations."""

    items: int  # conversations
    how: str  # what the numbers rest on, in words
    tokens: float
    targets: float  # supervised tokens
    widths: float  # tokens of the language model's rows, with padding
    squares: float  # the sum of the squares of these rows' lengths
    images: float  # images through the tower; a text in a batch with images adds a blank one
    regions: float  # region embeddings
    widest: tuple[int, int, int, int]  # largest micro-batch: tokens with padding, per row; images; targets


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Cost of one stage; in ``flops``, ``again`` is what gradient checkpointing recomputes."""

    name: str
    parameters: dict[str, tuple[int, int]]  # by part of the model: all, and trained
    data: Data
    steps: int
    batch: str
    flops: dict[str, float]
    memory: dict[str, float]  # bytes on each GPU
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cost of a recipe."""

    stages: tuple[StagePlan, ...]
    gpu: str
    gpus: int
    sharding: str
    precision: str

    def text(self) -> str:
        """The plan as text."""
        gpu, seconds = GPUS[self.gpu], sum(stage.seconds for stage in self.stages)
        lines = []
        for stage in self.stages:
            data, parts, memory = stage.data, [], sum(stage.memory.values())
            for name, (total, trained) in stage.parameters.items():
                how = "trained" if trained == total else "partly trained" if trained else "frozen"
                parts.append(f"{name.replace('_', ' ')} {_millions(total)} {how}")
            lines += [
                stage.name,
                f"  parameters  {', '.join(parts)}; {_millions(sum(n for _, n in stage.parameters.values()))} trained",
                f"  data        {data.items:,} conversations, {_millions(data.tokens)} tokens, "
                f"{_millions(data.targets)} of them supervised ({data.how})",
                f"  steps       {stage.steps:,} of {stage.batch}",
                f"  compute     {_parts(stage.flops, _FLOPS)}",
                f"  memory      {_parts(stage.memory, _BYTES)}; each GPU has {gpu.memory:g} GiB"
                + (": too little" if memory > gpu.memory * 2**30 else ""),
                f"  time        {_in_units(stage.seconds, _TIMES)}",
                "",
            ]
        lines += [
            f"total: {_in_units(seconds, _TIMES)} on {self.gpus} x {self.gpu} "
            f"({self.sharding if self.gpus > 1 else 'one GPU'}), {_in_units(seconds * self.gpus, _TIMES)} on one GPU, "
            f"at {gpu.utilisation:.0%} (assumed) of its {gpu.peak(self.precision) / 1e12:g} TFLOP/s in {self.precision}"
        ]
        return "\n".join(lines)


def _millions(number: float) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,.0f}"


def _in_units(number: float, units: Sequence[tuple[float, str]]) -> str:
    least, unit = next((each for each in units if number >= each[0]), units[-1])
    return f"{number / {'GiB': 2**30, 'MiB': 2**20}.get(unit, least):.1f} {unit}"


def _parts(values: dict[str, float], units: Sequence[tuple[float, str]]) -> str:
    each = ", ".join(f"{name} {_in_units(value, units)}" for name, value in values.items() if value)
    return f"{_in_units(sum(values.values()), units)}: {each}"


def make_plan(config: Recipe) -> Plan:
    """Estimate what a recipe takes.

    Raises:
        ConfigError: A shape is not known, the data is neither at hand nor assumed, or a batch cannot be divided among
            the GPUs.
        CheckpointError: The checkpoint that the recipe continues from is not what the recipe says.
        DataError: Records cannot be used.
    """
    plan, engine = config.plan, config.engine
    shape, processor = _find_shape(config.model)
    stages = tuple(_plan_stage(config, name, shape, processor) for name in config.all_steps if config.runs(name))
    return Plan(stages=stages, gpu=plan.gpu, gpus=plan.gpus, sharding=engine.sharding, precision=engine.precision)


def _find_shape(model: ModelConfig) -> tuple[RegionGPTConfig, RegionGPTProcessor | None]:
    """The model's shape, and its processor if the tokenizer is at hand."""
    if model.init and (model.folder / "config.json").exists():
        check_shape(model, model.folder)
        with weights.reading(f"the processor of {model.folder}"):
            processor = RegionGPTProcessor.from_pretrained(model.folder, local_files_only=True)
        return read_shape(model.folder), processor
    if not model.language:
        raise ConfigError(f"--plan: no checkpoint in {model.folder}; give --model.vision and --model.language")
    text = language_shape(model.language)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.language, local_files_only=True)
    # Nothing in the cache, a hub that cannot be reached, a folder without one: each has an exception of its own.
    except Exception:
        tokenizer = None
    template = model.chat_template or (template_family(tokenizer) if tokenizer else "")
    if tokenizer:
        prepare_tokenizer(tokenizer, template)
    if model.language not in LANGUAGE_MODELS:
        text.vocab_size = max(int(text.vocab_size), len(tokenizer) if tokenizer else text.vocab_size + 2)
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


def _size_data(config: Recipe, name: str, shape: RegionGPTConfig, processor: RegionGPTProcessor | None) -> Data:
    """Count a stage's records, tokenized and cut as in training, or take the recipe's numbers."""
    stage, size = getattr(config, name), getattr(config.plan, name)
    path = config.data.pretrain_mixture if name == "stage1" else config.data.mixture
    context = getattr(shape.text_config, "max_position_embeddings", None)
    row = (config.engine.pack_length or int(context or 4096)) if config.engine.packing else 0
    how = (stage.micro_batch_size, row, width_cost(shape.text_config))
    if processor:
        try:
            mixture = open_mixture(path, config.data.root, config.seed)
            items = max(1, round(stage.epochs * len(mixture)))
            dataset = RecordDataset(mixture, processor, items, context, config.data.suffixes)

            def count(number: int) -> tuple[int, int, int, bool]:
                record, example = dataset.words(mixture.draw(number))
                targets = int((example["labels"] != IGNORED).sum())
                regions = len(record.regions) * processor.tokens_per_region
                return len(example["input_ids"]), targets, regions, bool(record.image)

            return _count_batches(items, count, SAMPLE, *how)
        except (ConfigError, DataError):
            if not size.records:
                raise
    if not (size.records and size.answer_tokens):
        raise ConfigError(
            f"--plan: the data of {name} cannot be read here; give its folder, or --plan.{name}.records, "
            f"--plan.{name}.text_tokens and --plan.{name}.answer_tokens"
        )
    each = (shape.num_image_tokens + size.text_tokens, size.answer_tokens, 1, True)
    items = max(1, round(stage.epochs * size.records))
    return replace(_count_batches(items, lambda _: each, 1, *how), how="assumed, see [plan]")


def _count_batches(
    items: int, item: Callable[[int], tuple[int, int, int, bool]], sample: int, micro: int, packing: int, cost: float
) -> Data:
    """Count micro-batches of about ``sample`` conversations, in rows of ``packing`` tokens or padded (0).

    An item is its tokens with those of image and regions, supervised tokens, region embeddings, and whether it has an
    image.
    """
    batches = -(-items // micro)
    counted = min(batches, max(1, sample // micro))
    sums, seen, widest = np.zeros(6), 0, (0, 0, 0, 0)
    for number in (n * batches // counted for n in range(counted)):
        batch = [item(i) for i in range(number * micro, min((number + 1) * micro, items))]
        lengths, targets, regions, shown = zip(*batch, strict=True)
        rows = plan_rows(lengths, packing, cost) if packing else [[k] for k in range(len(batch))]
        width, images = max(sum(lengths[k] for k in row) for row in rows), len(batch) * any(shown)
        widest = max(widest, (len(rows) * width, width, images, sum(targets)))
        sums += [sum(lengths), sum(targets), len(rows) * width, len(rows) * width**2, images, len(batch) * max(regions)]
        seen += len(batch)
    names = ("tokens", "targets", "widths", "squares", "images", "regions")
    how = "counted on all" if seen == items else f"counted on {seen:,} of them"
    return Data(items=items, how=how, widest=widest, **dict(zip(names, (sums * items / seen).tolist(), strict=True)))


def _plan_stage(config: Recipe, name: str, shape: RegionGPTConfig, processor: RegionGPTProcessor | None) -> StagePlan:
    data, stage = _size_data(config, name, shape, processor), getattr(config, name)
    engine, gpus, gpu = config.engine, config.plan.gpus, GPUS[config.plan.gpu]
    accumulation, rest = divmod(stage.batch_size, stage.micro_batch_size * gpus)
    if rest:
        raise ConfigError(
            f"{name}.batch_size: {stage.batch_size} is not a multiple of micro_batch_size={stage.micro_batch_size} "
            f"times {gpus} GPUs; give another --{name}.micro_batch_size or --gpus"
        )
    with torch.device("meta"):
        model: Any = RegionGPTForConditionalGeneration(shape)
        choose_learners(name, model, config.lora)
    parameters = {}
    for part in _PARTS:
        own = list(getattr(model, part).named_parameters())  # a tied one comes once
        for title, adapters in ((part, False), ("adapters", True)):
            tensors = [tensor for key, tensor in own if ("lora_" in key) == adapters]
            if tensors:
                sizes = [(tensor.numel(), tensor.numel() * tensor.requires_grad) for tensor in tensors]
                parameters[title] = (sum(total for total, _ in sizes), sum(trained for _, trained in sizes))
    costs = costs_of(model)
    flops = {
        "tower": data.images * costs.tower,
        "visual": data.images * costs.image + data.regions * costs.region,
        "language": data.widths * costs.token + data.squares * costs.square,
        "head": data.targets * costs.target,
    }
    if engine.gradient_checkpointing:
        flops["again"] = data.widths * costs.forward_token + data.squares * costs.square / 3
    return StagePlan(
        name=name,
        parameters=parameters,
        data=data,
        steps=math.ceil(data.items / stage.batch_size),
        batch=f"{stage.batch_size} conversations: {gpus} GPU(s) x {stage.micro_batch_size} x {accumulation}",
        flops=flops,
        memory=_memory(config, model, data.widest, accumulation),
        seconds=sum(flops.values()) / (gpus * gpu.utilisation * gpu.peak(engine.precision)),
    )


# -- FLOPs and memory


class Costs(NamedTuple):
    """FLOPs of training a model, forward and backward, for one of each.

    A row of T tokens of the language model takes ``token * T + square * T**2``; of these, the forward pass, which
    gradient checkpointing repeats, takes ``forward_token`` and a third of ``square``.
    """

    tower: float
    image: float
    region: float
    token: float
    square: float
    forward_token: float
    target: float


def costs_of(model: Any) -> Costs:
    """Costs of a RegionGPT model whose parameters already have or have no gradients; it may be on ``meta``."""
    config, text = model.config, model.config.text_config
    with torch.device("meta"):
        copy: Any = RegionGPTForConditionalGeneration(config)
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        features = torch.zeros(1, config.vision_config.hidden_size, *config.tower_grid)
        areas = torch.zeros(1, 1, *config.weights_grid)
    refined = copy.refine(features).detach().requires_grad_()
    forward = both = 0.0
    for name, part in model.language_model.named_modules():
        if isinstance(part, nn.Linear) and ".layers." in name:
            size = 2.0 * part.in_features * part.out_features
            forward += size
            # Backward once for the input, and once more for the weight if that is trained.
            both += size * (3 if part.weight.requires_grad else 2)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    trained = model.get_output_embeddings().weight.requires_grad
    return Costs(
        tower=_count(lambda: copy.encode_image(pixels)),
        image=_count(lambda: copy.image_features(copy.refine(features)).sum().backward()),
        region=_count(lambda: copy.region_features(refined, areas).sum().backward()),
        token=both,
        # Query by key, and by value; forward, and back for both.
        square=3 * 4.0 * text.num_hidden_layers * text.num_attention_heads * width,
        forward_token=forward,
        target=2.0 * text.hidden_size * text.vocab_size * (3 if trained else 2),
    )


def _count(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _memory(config: Recipe, model: Any, widest: tuple[int, int, int, int], accumulation: int) -> dict[str, float]:
    """Bytes on one GPU: weights, gradients and both moments of AdamW in float32, and what the forward pass saves.

    With FSDP each GPU has a share, and what is gathered at a time.
    """
    gpus, half = config.plan.gpus, 2 if config.engine.precision == "bf16" else 4
    sharded = config.engine.sharding == "fsdp" and gpus > 1
    total = sum(each.numel() for each in model.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    text, language = model.config.text_config, model.language_model
    count = text.num_hidden_layers
    layer = sum(p.numel() for name, p in language.named_parameters() if ".layers." in name) / count
    held, gradients, optimiser = 4.0 * total, 4.0 * trained, 8.0 * trained
    if sharded:
        # All but the layers is gathered for the whole pass; of the layers one, while the next is fetched.
        held = held / gpus + half * (total - (count - 2) * layer)
        # Gradients are summed over the GPUs once per step; until then each holds them whole.
        gradients = gradients / gpus + (gradients if accumulation > 1 else half * 2 * layer)
        optimiser /= gpus
    elif gpus > 1:
        gradients *= 2  # DDP's buckets
    tokens, width, images, targets = widest
    activations: float = tokens * _kept_of_layer(language, width, half)
    if half == 2 and not sharded:
        activations += 2 * layer  # its weights in bfloat16
    if config.engine.gradient_checkpointing:
        activations += count * tokens * 4 * text.hidden_size
    else:
        activations *= count
    activations += tokens * 4 * 4 * text.hidden_size  # word embeddings, what is seen in their place, the last norm
    activations += targets * 3 * 4 * text.vocab_size  # the logits' logarithms and gradients
    return {
        "weights": held,
        "gradients": gradients,
        "optimiser": optimiser,
        "activations": activations + images * _kept_of_image(model),
    }


def _kept_of_layer(language: Any, width: int, half: int) -> float:
    """Bytes that a layer saves per token for its backward pass: what comes into norms, products and attention."""
    text = language.config.get_text_config()
    layer = [(name, part) for name, part in language.named_modules() if ".layers.0." in name]
    linear = {name: part for name, part in layer if isinstance(part, nn.Linear) and part.weight.requires_grad}
    whole = language.get_input_embeddings().weight.requires_grad
    norms = 2 * 4 * text.hidden_size * (2 if whole else 1)
    # In bfloat16 each product has a copy of its input, as adapters have; in float32 those of the same input share it.
    shared = whole and half == 4
    inputs = 3 * text.hidden_size + text.intermediate_size if shared else sum(x.in_features for x in linear.values())
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 4 * text.num_attention_heads * head + width  # query, key, value, result; a row of the mask
    return float(norms + half * (inputs + attention + 3 * text.intermediate_size))


def _kept_of_image(model: Any) -> float:
    """Bytes that refinement and connector save for an image: what comes into norms, products and activations."""
    config, connector = model.config, model.connector
    cells = math.prod(config.tower_grid) * config.feature_channels
    refined = 16 * cells * 2.75 if model.refinement.deconvolves else cells
    return float(
        4 * (refined + config.num_image_tokens * (config.feature_channels + 2 * connector.linear_1.out_features))
    )

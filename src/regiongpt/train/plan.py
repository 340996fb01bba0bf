"""Estimated cost of a recipe: ``regiongpt train RECIPE --plan``. Nothing is downloaded and no weights are loaded.

Parameters and their memory are exact; so is the number of records if they are at hand. Tokens per record are those of
the recipe's [plan]. FLOPs leave out padding; time is FLOPs divided by an assumed share of the GPU's peak.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regiongpt.data.shards import open_mixture
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration
from regiongpt.model.weights import read_shape
from regiongpt.train.recipe import GPUS, Recipe, language_shape, tower_shape
from regiongpt.train.stages import check_shape, choose_learners, new_shape


class StagePlan(NamedTuple):
    """Cost of one stage; in ``flops``, ``again`` is what gradient checkpointing recomputes."""

    name: str
    parameters: dict[str, tuple[int, int]]  # by part of the model: all, and trained
    items: int  # conversations of all epochs
    tokens: int  # of a conversation, on average
    targets: int  # how many of these are supervised
    steps: int
    flops: dict[str, float]
    memory: dict[str, float]  # bytes on each GPU, activations aside
    seconds: float


def make_plan(config: Recipe) -> tuple[StagePlan, ...]:
    """Estimate what each stage of a recipe takes; a RegionGPTError if a shape or the number of records is not known."""
    model = config.model
    if model.init and (model.folder / "config.json").exists():
        check_shape(model, model.folder)
        shape = read_shape(model.folder)
    elif model.language:
        shape = new_shape(model, tower_shape(model.vision), language_shape(model.language))
    else:
        raise ConfigError(f"--plan: no checkpoint in {model.folder}; give --model.vision and --model.language")
    return tuple(_plan_stage(config, name, shape) for name in config.all_steps if config.runs(name))


def plan_text(config: Recipe, stages: Sequence[StagePlan]) -> str:
    """The plan as text."""
    gpus, gpu, precision = config.plan.gpus, GPUS[config.plan.gpu], config.engine.precision
    lines = []
    for stage in stages:
        parts = []
        for name, (total, trained) in stage.parameters.items():
            how = "trained" if trained == total else "partly trained" if trained else "frozen"
            parts.append(f"{name.replace('_', ' ')} {total / 1e6:,.1f} M {how}")
        lines += [
            stage.name,
            f"  parameters  {', '.join(parts)}",
            f"  data        {stage.items:,} conversations of {stage.tokens:,} tokens, {stage.targets:,} supervised",
            f"  steps       {stage.steps:,} of {getattr(config, stage.name).batch_size} conversations",
            f"  compute     {_listed(stage.flops, 1e15, 'PFLOP')}",
            f"  memory      {_listed(stage.memory, 2.0**30, 'GiB')}; activations in the rest of {gpu.memory:g} GiB"
            + (": too little" if sum(stage.memory.values()) > gpu.memory * 2**30 else ""),
            f"  time        {stage.seconds / 3600:,.1f} hours",
            "",
        ]
    hours, kind = sum(stage.seconds for stage in stages) / 3600, config.engine.sharding if gpus > 1 else "one GPU"
    return "\n".join(lines) + (
        f"\ntotal: {hours:,.1f} hours on {gpus} x {config.plan.gpu} ({kind}), "
        f"at {gpu.utilisation:.0%} (assumed) of its {gpu.peak(precision) / 1e12:g} TFLOP/s in {precision}"
    )


def _listed(values: dict[str, float], size: float, unit: str) -> str:
    each = ", ".join(f"{name} {value / size:,.1f}" for name, value in values.items())
    return f"{sum(values.values()) / size:,.1f} {unit}: {each}"


def _plan_stage(config: Recipe, name: str, shape: RegionGPTConfig) -> StagePlan:
    stage, size = getattr(config, name), getattr(config.plan, name)
    try:
        path = config.data.pretrain_mixture if name == "stage1" else config.data.mixture
        records = len(open_mixture(path, config.data.root, config.seed))
    except (ConfigError, DataError):
        if not (records := size.records):
            raise
    items, tokens = max(1, round(stage.epochs * records)), shape.num_image_tokens + size.text_tokens
    engine, gpus, gpu = config.engine, config.plan.gpus, GPUS[config.plan.gpu]
    if stage.batch_size % (stage.micro_batch_size * gpus):
        told = f"{stage.batch_size} is not a multiple of micro_batch_size={stage.micro_batch_size} times {gpus} GPUs"
        raise ConfigError(f"{name}.batch_size: {told}; give another --{name}.micro_batch_size or --plan.gpus")
    with torch.device("meta"):
        model: Any = RegionGPTForConditionalGeneration(shape)
        choose_learners(name, model, config.lora)
    parameters = {}
    for part, module in model.named_children():
        own = list(module.named_parameters())  # a tied one comes once
        for title, adapters in ((part, False), ("adapters", True)):
            if tensors := [tensor for key, tensor in own if ("lora_" in key) == adapters]:
                sizes = [(tensor.numel(), tensor.numel() * tensor.requires_grad) for tensor in tensors]
                parameters[title] = (sum(total for total, _ in sizes), sum(trained for _, trained in sizes))
    costs, attention = costs_of(model), items * tokens**2
    flops = {
        "tower": items * costs.tower,
        "visual": items * costs.image,
        "language": items * tokens * costs.token + attention * costs.square,
        "head": items * size.answer_tokens * costs.target,
    }
    if engine.gradient_checkpointing:
        flops["again"] = items * tokens * costs.forward_token + attention * costs.square / 3
    weights, trained = map(sum, zip(*parameters.values(), strict=True))
    # Weights, gradients and both moments of AdamW in float32; FSDP spreads all of them over the GPUs.
    share = 4.0 / (gpus if engine.sharding == "fsdp" else 1)
    memory = {"weights": share * weights, "gradients": share * trained, "optimiser": share * 2 * trained}
    steps = math.ceil(items / stage.batch_size)
    seconds = sum(flops.values()) / (gpus * gpu.utilisation * gpu.peak(engine.precision))
    return StagePlan(name, parameters, items, tokens, size.answer_tokens, steps, flops, memory, seconds)


# -- FLOPs -------------------------------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """FLOPs of training a model, forward and backward: T tokens take ``token * T + square * T**2``."""

    tower: float
    image: float
    token: float
    square: float
    target: float
    forward_token: float  # the part of ``token`` that gradient checkpointing repeats


def costs_of(model: Any) -> Costs:
    """Costs of a RegionGPT model whose parameters already have or have no gradients; it may be on ``meta``."""
    config, text = model.config, model.config.text_config
    with torch.device("meta"):
        copy: Any = RegionGPTForConditionalGeneration(config)
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        features = torch.zeros(1, config.vision_config.hidden_size, *config.tower_grid)
    linear = [p for name, p in model.language_model.named_modules() if isinstance(p, nn.Linear) and ".layers." in name]
    trained = model.get_output_embeddings().weight.requires_grad
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    with FlopCounterMode(display=False) as tower:
        copy.encode_image(pixels)
    with FlopCounterMode(display=False) as visual:
        copy.image_features(copy.refine(features)).sum().backward()
    return Costs(
        tower=float(tower.get_total_flops()),
        image=float(visual.get_total_flops()),
        # Backward once for the input, and once more for the weight if that is trained.
        token=sum(2.0 * each.weight.numel() * (3 if each.weight.requires_grad else 2) for each in linear),
        # Query by key, and by value; forward, and back for both.
        square=3 * 4.0 * text.num_hidden_layers * text.num_attention_heads * head,
        target=2.0 * text.hidden_size * text.vocab_size * (3 if trained else 2),
        forward_token=sum(2.0 * each.weight.numel() for each in linear),
    )

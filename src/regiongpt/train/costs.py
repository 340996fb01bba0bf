"""FLOPs and memory per image, region, token and target, found by running the network's own code without numbers.

The language model is run with one and two layers, at two lengths: its layers are alike, and its cost is a polynomial of
the length.
"""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from regiongpt.errors import ConfigError
from regiongpt.model.modeling import Connector
from regiongpt.model.refinement import Refinement
from regiongpt.train.lora import add_adapters
from regiongpt.train.recipe import LoraConfig

_SHORT, _LONG = _LENGTHS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """FLOPs of the language model over a row of T tokens, all layers: ``linear * T + square * T**2``.

    ``again`` and ``again_square`` are the forward parts, which gradient checkpointing repeats.
    """

    linear: float = 0.0
    square: float = 0.0
    again: float = 0.0
    again_square: float = 0.0

    def row(self, tokens: float, twice: bool = False) -> float:
        """FLOPs of a row of so many tokens; ``twice`` with gradient checkpointing."""
        extra = self.again * tokens + self.again_square * tokens**2 if twice else 0.0
        return self.linear * tokens + self.square * tokens**2 + extra


@dataclass(frozen=True, kw_only=True)
class Costs:
    """FLOPs of a stage, forward and backward, for one of each; ``head`` is that of a target token."""

    tower: float = 0.0
    image: float = 0.0
    region: float = 0.0
    layers: LayerCosts = LayerCosts()
    head: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that the forward pass saves for the backward pass."""

    layer: float  # per layer, whatever the tokens: copies of its weights in another precision
    layer_token: float  # per token and layer
    outside: float  # like ``layer``, outside the layers
    outside_token: float  # per token, outside the layers
    between: float  # per token between two layers: all that gradient checkpointing saves of a layer
    target: float  # per target, in the head
    layers: int

    def language(self, tokens: float, checkpointing: bool, sharded: bool) -> float:
        """Bytes at the end of the forward pass of all rows together; sharded copies of weights are given up again."""
        one = self.layer_token * tokens + (0.0 if sharded else self.layer)
        outside = self.outside_token * tokens + self.outside
        return outside + (self.layers * self.between * tokens + one if checkpointing else self.layers * one)


def visual_costs(model: Any, with_tower: bool) -> dict[str, float]:
    """``tower``, ``image`` and ``region`` of :class:`Costs`, by RegionGPT on the meta device."""
    config = model.config
    pixels = torch.zeros(1, 3, config.image_size, config.image_size, device="meta")
    features = torch.zeros(1, config.vision_config.hidden_size, *config.tower_grid, device="meta")
    with torch.no_grad():
        refined = model.refine(features)
    refined.requires_grad_()
    weights = torch.zeros(1, 1, *config.refined_grid, device="meta")
    return {
        "tower": _count(lambda: model.encode_image(pixels)) if with_tower else 0,
        "image": _count(lambda: model.image_features(model.refine(features)).sum().backward()),
        "region": _count(lambda: model.region_features(refined, weights).sum().backward()),
    }


def language_costs(text_config: Any, trained: bool, lora: LoraConfig | None = None) -> tuple[LayerCosts, float]:
    """``layers`` and ``head`` of :class:`Costs`.

    Args:
        text_config: Configuration of the language model.
        trained: Whether its own weights are trained.
        lora: Its adapters, if they are trained instead.
    """
    return _language_costs(_shape_of(text_config), trained, lora)


@cache
def _language_costs(shape: str, trained: bool, lora: LoraConfig | None) -> tuple[LayerCosts, float]:
    text_config = AutoConfig.for_model(**json.loads(shape))
    forward: dict[tuple[int, int], int] = {}
    both: dict[tuple[int, int], int] = {}
    for layers in (1, 2):
        with torch.device("meta"):
            model = _shallow(text_config, layers, trained, lora)
        for tokens in _LENGTHS:
            embeds = torch.zeros(1, tokens, text_config.hidden_size, device="meta", requires_grad=True)
            with FlopCounterMode(display=False) as counter:
                hidden = _hidden(model, embeds)
                forward[layers, tokens] = counter.get_total_flops()
                torch.autograd.backward(hidden.sum())
                both[layers, tokens] = counter.get_total_flops()
    linear, square = _polynomial(both, text_config.num_hidden_layers)
    again, again_square = _polynomial(forward, text_config.num_hidden_layers)
    costs = LayerCosts(linear=linear, square=square, again=again, again_square=again_square)
    # A target's row of logits, its gradient, and the gradient of the head if that is trained.
    return costs, 2.0 * text_config.hidden_size * text_config.vocab_size * (3 if trained else 2)


def kept_bytes(text_config: Any, trained: bool, precision: str, lora: LoraConfig | None = None) -> Kept:
    """Bytes that the language model saves; arguments as for :func:`language_costs`."""
    return _kept_bytes(_shape_of(text_config), trained, precision, lora)


@cache
def _kept_bytes(shape: str, trained: bool, precision: str, lora: LoraConfig | None) -> Kept:
    text_config = AutoConfig.for_model(**json.loads(shape))
    slope, constant = {}, {}
    for layers in (1, 2):
        with torch.device("meta"):
            model = _shallow(text_config, layers, trained, lora)
        head = model.get_output_embeddings()
        with FakeTensorMode():
            _put_on_cpu(model)
            runs = [
                partial(_hidden, model, torch.zeros(1, tokens, text_config.hidden_size, requires_grad=True))
                for tokens in _LENGTHS
            ]
            short, long = (_saved(model, precision, run) for run in runs)
            few, many = (_saved(head, precision, partial(_answer, head, targets)) for targets in _LENGTHS)
        slope[layers] = (long - short) / (_LONG - _SHORT)
        constant[layers] = short - slope[layers] * _SHORT
        target = (many - few) / (_LONG - _SHORT)
    return Kept(
        layer=max(0.0, constant[2] - constant[1]),
        layer_token=slope[2] - slope[1],
        outside=max(0.0, 2 * constant[1] - constant[2]) + few - target * _SHORT,
        outside_token=max(0.0, 2 * slope[1] - slope[2]),
        between=4.0 * text_config.hidden_size,
        # The gradient of the logits exists together with what was saved.
        target=target + 4 * text_config.vocab_size,
        layers=text_config.num_hidden_layers,
    )


def kept_by_image(config: Any, precision: str) -> float:
    """Bytes that refinement and connector save for one image and one region in it."""
    with FakeTensorMode():
        refinement, connector = Refinement(config), Connector(config)
        features = torch.zeros(1, config.vision_config.hidden_size, *config.tower_grid)
        weights = torch.zeros(1, 1, *config.refined_grid)

        def run() -> Tensor:
            refined = refinement(features)
            image, region = refinement.pool_image(refined), refinement.pool_regions(refined, weights)
            total: Tensor = connector(image).sum() + connector(region).sum()
            return total

        return float(_saved(nn.ModuleList([refinement, connector]), precision, run))


def _count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _polynomial(flops: dict[tuple[int, int], int], layers: int) -> tuple[float, float]:
    """Coefficients of T and T**2 for so many layers, of the FLOPs by layers and tokens."""
    short, long = (flops[1, t] + (layers - 1) * (flops[2, t] - flops[1, t]) for t in _LENGTHS)
    square = (long / _LONG - short / _SHORT) / (_LONG - _SHORT)
    return short / _SHORT - square * _SHORT, square


def _shallow(text_config: Any, layers: int, trained: bool, lora: LoraConfig | None) -> Any:
    """The language model with so few of its layers, which are alike, on the device at hand."""
    config = copy.deepcopy(text_config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(trained)
    if lora is not None and lora.rank:
        add_adapters(model, lora)
    return model.train()


def _put_on_cpu(module: nn.Module) -> None:
    """Give a module on the meta device CPU tensors without content: autocast knows no other device's.

    ``Module.to`` does not take such tensors.
    """
    for part in module.modules():
        for name, tensor in part.named_parameters(recurse=False):
            fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            part.register_parameter(name, nn.Parameter(fresh, requires_grad=tensor.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _hidden(model: Any, embeds: Tensor) -> Tensor:
    """What the head gets. The mask is given whole: without one, the library looks at the numbers of the positions."""
    tokens = embeds.shape[1]
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=embeds.device)
    base = getattr(model, model.base_model_prefix)
    try:
        hidden: Tensor = base(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    except RuntimeError as error:
        raise ConfigError(f"--plan: {type(base).__name__} cannot be run without numbers: {error}") from error
    return hidden


def _shape_of(text_config: Any) -> str:
    return json.dumps({**text_config.to_dict(), "_name_or_path": ""}, sort_keys=True, default=str)


def _answer(head: Any, targets: int) -> Tensor:
    hidden = torch.zeros(targets, head.in_features, requires_grad=True)
    return F.cross_entropy(head(hidden).float(), torch.zeros(targets, dtype=torch.long), reduction="sum")


def _saved(module: nn.Module, precision: str, run: Callable[[], Tensor]) -> int:
    """Bytes that a function saves for its backward pass, without the module's own weights."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # else another storage could take its place
        return tensor

    half = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    with saved_tensors_hooks(note, lambda tensor: tensor), half:
        result = run()
    del result
    return sum(found.values())

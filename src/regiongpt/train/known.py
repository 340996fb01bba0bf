"""Known GPUs, towers and language models, to plan a recipe where none of them is; and the FLOPs of a model."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from regiongpt.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    bf16: float  # peak of dense matrix products in bfloat16 that are summed in float32, in TFLOP/s
    fp32: float  # the same in float32, without TF32
    memory: float  # GiB
    driver: str = "-"  # pattern of its driver's name for it
    utilisation: float = 0.4  # share of the peak that a well-run training reaches; assumed, not measured here

    def peak(self, precision: str) -> float:
        """FLOP/s in ``bf16`` or ``fp32``."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


GPUS: Final[dict[str, Gpu]] = {
    "a100-40gb": Gpu(312, 19.5, 40, r"\bA100\b.*\b40GB\b"),
    "a100-80gb": Gpu(312, 19.5, 80, r"\bA100\b.*\b80GB\b"),
    "h100-pcie": Gpu(756, 51, 80, r"\bH100 PCIe\b", 0.35),
    "h100-sxm": Gpu(989, 67, 80, r"\bH100\b.*\bHBM3\b", 0.35),
    "h200": Gpu(989, 67, 141, r"\bH200\b", 0.35),
    "b200": Gpu(2250, 75, 180, r"\bB200\b", 0.35),
    "l40s": Gpu(362, 91.6, 48, r"\bL40S\b"),
    "l4": Gpu(121, 30.3, 24, r"\bL4\b"),
    "a10": Gpu(125, 31.2, 24, r"\bA10\b"),
    "a6000": Gpu(155, 38.7, 48, r"\bRTX A6000\b"),
    "rtx3090": Gpu(71, 35.6, 24, r"\bRTX 3090\b"),
    "rtx4090": Gpu(165, 82.6, 24, r"\bRTX 4090\b"),
    "mi300x": Gpu(1307, 163.4, 192, r"\bMI300X\b", 0.3),
    "laptop": Gpu(0.1, 0.1, 16),
}
"""By the name that ``--gpu`` takes. ``laptop`` is no GPU: two cores of a CPU, for the small recipes."""


def named_peak(name: str, precision: str) -> float:
    """FLOP/s of a GPU by its driver's name for it, 0 if it is not known."""
    return next((gpu.peak(precision) for gpu in GPUS.values() if re.search(gpu.driver, name)), 0.0)


# -- towers and language models ----------------------------------------------------------------------------------------


def _tower(kind: str, image_size: int, patch_size: int, width: int, layers: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": width // 64, "image_size": image_size, "patch_size": patch_size}
    return {"model_type": kind, **shape, **more}


def _language(kind: str, words: int, width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": kind, "vocab_size": words, "max_position_embeddings": 32768, **shape, **more}


_CLIP: Final = {"hidden_act": "quick_gelu", "projection_dim": 768}
_LLAMA: Final = {"max_position_embeddings": 4096}
_TINY: Final = {"num_key_value_heads": 4, "max_position_embeddings": 2048}
_TIED: Final = {"num_key_value_heads": 2, "tie_word_embeddings": True}
_SO400M: Final = {"intermediate_size": 4304, "num_attention_heads": 16}

TOWERS: Final[dict[str, dict[str, Any]]] = {
    "openai/clip-vit-large-patch14-336": _tower("clip_vision_model", 336, 14, 1024, 24, **_CLIP),
    "openai/clip-vit-large-patch14": _tower("clip_vision_model", 224, 14, 1024, 24, **_CLIP),
    "google/siglip-base-patch16-512": _tower("siglip_vision_model", 512, 16, 768, 12),
    "google/siglip-large-patch16-384": _tower("siglip_vision_model", 384, 16, 1024, 24),
    "google/siglip-so400m-patch14-384": _tower("siglip_vision_model", 384, 14, 1152, 27, **_SO400M),
    "facebook/dinov2-large": _tower("dinov2", 518, 14, 1024, 24, mlp_ratio=4),
}
"""Vision towers by hub name, as ``AutoConfig.for_model`` takes them."""

LANGUAGE_MODELS: Final[dict[str, dict[str, Any]]] = {
    "lmsys/vicuna-7b-v1.5": _language("llama", 32000, 4096, 11008, 32, 32, **_LLAMA),
    "lmsys/vicuna-13b-v1.5": _language("llama", 32000, 5120, 13824, 40, 40, **_LLAMA),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _language("llama", 32000, 2048, 5632, 22, 32, **_TINY),
    "Qwen/Qwen2.5-0.5B-Instruct": _language("qwen2", 151936, 896, 4864, 24, 14, **_TIED),
    "Qwen/Qwen2.5-7B-Instruct": _language("qwen2", 152064, 3584, 18944, 28, 28, num_key_value_heads=4),
}
"""Language models by hub name, as they are before ``<image>`` and ``<region>`` are added to them."""

PADDED_TOKENS: Final = {"Qwen/Qwen2.5-0.5B-Instruct": 151665, "Qwen/Qwen2.5-7B-Instruct": 151665}
"""Tokens of language models whose embeddings are padded beyond them."""


def tower_shape(name: str) -> Any:
    """Configuration of a tower: a key of :data:`TOWERS`, an EfficientNet-Lite variant, or a folder or fetched hub name.

    Raises:
        ConfigError: It is none of them.
    """
    from regiongpt.model.configuration import EFFICIENTNET_LITE_CHANNELS, EfficientNetLiteConfig

    if name in EFFICIENTNET_LITE_CHANNELS:
        return EfficientNetLiteConfig(variant=name)
    config = _shape(name, TOWERS, "model.vision")
    return getattr(config, "vision_config", config)


def language_shape(name: str) -> Any:
    """Configuration of a language model, with the vocabulary of its folder; otherwise as :func:`tower_shape`."""
    return _shape(name, LANGUAGE_MODELS, "model.language")


def _shape(name: str, known: dict[str, dict[str, Any]], field: str) -> Any:
    from transformers import AutoConfig

    if name in known:
        fields = dict(known[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    # A hub name that was never fetched, a folder of something else, a torn file: each has an exception of its own.
    except Exception as error:
        kind = "folder" if Path(name).exists() else "name"
        raise ConfigError(
            f"{field}: the shape of '{name}' is not known here, a {kind} that could not be read; give a folder with "
            f"config.json, or one of {', '.join(known)}"
        ) from error


# -- FLOPs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Costs:
    """FLOPs of training a model, forward and backward, for one of each.

    A row of T tokens of the language model takes ``token * T + square * T**2``; the ``forward`` pair is the part that
    gradient checkpointing repeats.
    """

    tower: float
    image: float
    region: float
    token: float
    square: float
    forward_token: float
    forward_square: float
    target: float

    @classmethod
    def of(cls, model: Any) -> "Costs":
        """Costs of a RegionGPT model whose parameters already have or have no gradients; it may be on ``meta``."""
        import torch

        from regiongpt.model import RegionGPTForConditionalGeneration

        config, text = model.config, model.config.text_config
        with torch.device("meta"):
            copy: Any = RegionGPTForConditionalGeneration(config)
            pixels = torch.zeros(1, 3, config.image_size, config.image_size)
            features = torch.zeros(1, config.vision_config.hidden_size, *config.tower_grid)
            weights = torch.zeros(1, 1, *config.weights_grid)
        refined = copy.refine(features).detach().requires_grad_()
        forward = both = 0.0
        for name, part in model.language_model.named_modules():
            if isinstance(part, torch.nn.Linear) and ".layers." in name:
                size = 2.0 * part.in_features * part.out_features
                forward += size
                # Backward once for the input, and once more for the weight if that is trained.
                both += size * (3 if part.weight.requires_grad else 2)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        square = 4.0 * text.num_hidden_layers * text.num_attention_heads * width  # query by key, and by value
        trained = model.get_output_embeddings().weight.requires_grad
        return cls(
            tower=_count(lambda: copy.encode_image(pixels)),
            image=_count(lambda: copy.image_features(copy.refine(features)).sum().backward()),
            region=_count(lambda: copy.region_features(refined, weights).sum().backward()),
            token=both,
            square=3 * square,
            forward_token=forward,
            forward_square=square,
            target=2.0 * text.hidden_size * text.vocab_size * (3 if trained else 2),
        )

    def step(self, line: Mapping[str, Any]) -> float:
        """FLOPs of a step by its line of the log, without padding, repeats and regions (each little)."""
        images, tokens, rows = line["images"], line["tokens"], max(1, line["examples"])
        language = tokens * (self.token + self.square * tokens / rows)
        return float(images * (self.tower + self.image) + language + line["targets"] * self.target)


def _count(run: Callable[[], Any]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())

"""Known GPUs, towers and language models, so that a recipe can be planned where none of them is."""

import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from regiongpt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    bf16: float  # peak of dense matrix products in bfloat16 that are summed in float32, in TFLOP/s
    fp32: float  # the same in float32, without TF32
    memory: float  # GiB
    utilisation: float = 0.4  # share of the peak that a well-run training reaches; assumed, not measured here
    driver: tuple[str, ...] = ()  # words in its driver's name for it

    def peak(self, precision: str) -> float:
        """FLOP/s in ``bf16`` or ``fp32``."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


GPUS: Final[dict[str, Gpu]] = {
    "a100-40gb": Gpu(bf16=312, fp32=19.5, memory=40, driver=("A100", "40GB")),
    "a100-80gb": Gpu(bf16=312, fp32=19.5, memory=80, driver=("A100", "80GB")),
    "h100-pcie": Gpu(bf16=756, fp32=51, memory=80, utilisation=0.35, driver=("H100", "PCIe")),
    "h100-sxm": Gpu(bf16=989, fp32=67, memory=80, utilisation=0.35, driver=("H100", "HBM3")),
    "h200": Gpu(bf16=989, fp32=67, memory=141, utilisation=0.35, driver=("H200",)),
    "b200": Gpu(bf16=2250, fp32=75, memory=180, utilisation=0.35, driver=("B200",)),
    "l40s": Gpu(bf16=362, fp32=91.6, memory=48, driver=("L40S",)),
    "l4": Gpu(bf16=121, fp32=30.3, memory=24, driver=("L4",)),
    "a10": Gpu(bf16=125, fp32=31.2, memory=24, driver=("A10",)),
    "a6000": Gpu(bf16=155, fp32=38.7, memory=48, driver=("RTX A6000",)),
    "rtx3090": Gpu(bf16=71, fp32=35.6, memory=24, driver=("RTX 3090",)),
    "rtx4090": Gpu(bf16=165, fp32=82.6, memory=24, driver=("RTX 4090",)),
    "mi300x": Gpu(bf16=1307, fp32=163.4, memory=192, utilisation=0.3, driver=("MI300X",)),
    "laptop": Gpu(bf16=0.1, fp32=0.1, memory=16),
}
"""By the name that ``--gpu`` takes. ``laptop`` is no GPU: two cores of a CPU, for the small recipes."""


def peak_flops(device: Any, precision: str) -> float:
    """FLOP/s of one device: its maker's if it is known, else the measured rate of a large matrix product.

    A device that is slower in bfloat16, as most CPUs are, is measured in float32.
    """
    import torch

    known = named_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else 0.0
    return known or max(matmul_rate(device, each) for each in {precision, "fp32"})


def named_peak(name: str, precision: str) -> float:
    """FLOP/s of a GPU by its driver's name for it, 0 if it is not known."""
    for gpu in GPUS.values():
        if gpu.driver and all(re.search(rf"\b{word}\b", name) for word in gpu.driver):
            return gpu.peak(precision)
    return 0.0


@cache
def matmul_rate(device: Any, precision: str) -> float:
    """FLOP/s of a large matrix product, the best of three measurements of a tenth of a second."""
    import torch

    side = {"cpu": 1024, "cuda": 8192}.get(device.type, 2048)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.ones(side, side, dtype=kind, device=device) for _ in range(2))
    best = 0.0
    for _ in range(3):
        began, count = time.perf_counter(), 0
        while not count or time.perf_counter() - began < 0.1:
            left @ right
            count += 1
            if device.type != "cpu" and count % 8 == 0:  # a GPU takes orders faster than it carries them out
                torch.accelerator.synchronize()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = max(best, 2 * side**3 * count / (time.perf_counter() - began))
        if count == 1:  # a single product took all the time there is
            break
    return best


def _tower(kind: str, image_size: int, patch_size: int, width: int, layers: int, **more: Any) -> dict[str, Any]:
    mlp = more.pop("mlp", 4 * width)
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": width // 64, "image_size": image_size, "patch_size": patch_size}
    return {"model_type": kind, **shape, **more}


def _language(kind: str, words: int, width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": kind, "vocab_size": words, "max_position_embeddings": 32768, **shape, **more}


_CLIP: Final = {"hidden_act": "quick_gelu", "projection_dim": 768}
_SIGLIP: Final = "siglip_vision_model"
_LLAMA: Final = {"max_position_embeddings": 4096}
_TINY: Final = {"num_key_value_heads": 4, "max_position_embeddings": 2048}
_TIED: Final = {"num_key_value_heads": 2, "tie_word_embeddings": True}

TOWERS: Final[dict[str, dict[str, Any]]] = {
    "openai/clip-vit-large-patch14-336": _tower("clip_vision_model", 336, 14, 1024, 24, **_CLIP),
    "openai/clip-vit-large-patch14": _tower("clip_vision_model", 224, 14, 1024, 24, **_CLIP),
    "google/siglip-base-patch16-512": _tower(_SIGLIP, 512, 16, 768, 12),
    "google/siglip-large-patch16-384": _tower(_SIGLIP, 384, 16, 1024, 24),
    "google/siglip-so400m-patch14-384": _tower(_SIGLIP, 384, 14, 1152, 27, mlp=4304, num_attention_heads=16),
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

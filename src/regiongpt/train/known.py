"""Known GPUs, towers and language models, to plan a recipe where none of them is at hand."""

from typing import Any, Final, NamedTuple

from regiongpt.errors import ConfigError


class Gpu(NamedTuple):
    """One kind of GPU."""

    bf16: float  # peak of dense matrix products in bfloat16 that are summed in float32, in TFLOP/s
    fp32: float  # the same in float32, without TF32
    memory: float  # GiB
    utilisation: float = 0.4  # share of the peak that a well-run training reaches; assumed, not measured here

    def peak(self, precision: str) -> float:
        """FLOP/s in ``bf16`` or ``fp32``."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


GPUS: Final[dict[str, Gpu]] = {
    "a100-40gb": Gpu(312, 19.5, 40),
    "a100-80gb": Gpu(312, 19.5, 80),
    "h100-sxm": Gpu(989, 67, 80, 0.35),
    "h200": Gpu(989, 67, 141, 0.35),
    "b200": Gpu(2250, 75, 180, 0.35),
    "l40s": Gpu(362, 91.6, 48),
    "rtx4090": Gpu(165, 82.6, 24),
}
"""By the name that ``plan.gpu`` takes."""

_VISION: Final = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_TEXT: Final = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers")
_HEADS, _KEYS = "num_attention_heads", "num_key_value_heads"


def _shape(kind: str, names: tuple[str, ...], sizes: tuple[int, ...], heads: int, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **dict(zip(names, sizes, strict=True)), _HEADS: heads, **more}


TOWERS: Final[dict[str, dict[str, Any]]] = {
    "openai/clip-vit-large-patch14-336": _shape("clip_vision_model", _VISION, (336, 14, 1024, 4096, 24), 16),
    "openai/clip-vit-large-patch14": _shape("clip_vision_model", _VISION, (224, 14, 1024, 4096, 24), 16),
    "google/siglip-base-patch16-512": _shape("siglip_vision_model", _VISION, (512, 16, 768, 3072, 12), 12),
    "google/siglip-large-patch16-384": _shape("siglip_vision_model", _VISION, (384, 16, 1024, 4096, 24), 16),
    "google/siglip-so400m-patch14-384": _shape("siglip_vision_model", _VISION, (384, 14, 1152, 4304, 27), 16),
    "facebook/dinov2-large": _shape("dinov2", _VISION, (518, 14, 1024, 4096, 24), 16, mlp_ratio=4),
}
"""Vision towers by hub name, as ``AutoConfig.for_model`` takes them."""

LANGUAGE_MODELS: Final[dict[str, dict[str, Any]]] = {
    "lmsys/vicuna-7b-v1.5": _shape("llama", _TEXT, (32002, 4096, 4096, 11008, 32), 32),
    "lmsys/vicuna-13b-v1.5": _shape("llama", _TEXT, (32002, 4096, 5120, 13824, 40), 40),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _shape("llama", _TEXT, (32002, 2048, 2048, 5632, 22), 32, **{_KEYS: 4}),
    "Qwen/Qwen2.5-0.5B-Instruct": _shape(
        "qwen2", _TEXT, (151936, 32768, 896, 4864, 24), 14, tie_word_embeddings=True, **{_KEYS: 2}
    ),
    "Qwen/Qwen2.5-7B-Instruct": _shape("qwen2", _TEXT, (152064, 32768, 3584, 18944, 28), 28, **{_KEYS: 4}),
}
"""Language models by hub name, with room for ``<image>`` and ``<region>``."""


def tower_shape(name: str) -> Any:
    """Configuration of a tower: a key of :data:`TOWERS`, an EfficientNet-Lite variant, or a folder or fetched hub name.

    Raises:
        ConfigError: It is none of them.
    """
    from regiongpt.model.configuration import EFFICIENTNET_LITE_CHANNELS, EfficientNetLiteConfig

    if name in EFFICIENTNET_LITE_CHANNELS:
        return EfficientNetLiteConfig(variant=name)
    config = _find(name, TOWERS, "model.vision")
    return getattr(config, "vision_config", config)


def language_shape(name: str) -> Any:
    """Configuration of a language model; otherwise as :func:`tower_shape`."""
    return _find(name, LANGUAGE_MODELS, "model.language")


def _find(name: str, known: dict[str, dict[str, Any]], field: str) -> Any:
    from transformers import AutoConfig

    if name in known:
        fields = dict(known[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    # A hub name that was never fetched, a folder of something else, a torn file: each has an exception of its own.
    except Exception as error:
        told = f"{field}: the shape of '{name}' is not known here; give a folder with config.json, or one of"
        raise ConfigError(f"{told} {', '.join(known)}") from error

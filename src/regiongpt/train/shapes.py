"""Shapes of towers and language models: those of the shipped recipes by heart, any other from its folder.

So a recipe can be planned, and made small, where its models are not, and no hub can be reached.
"""

from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig

from regiongpt.errors import ConfigError
from regiongpt.model.configuration import EFFICIENTNET_LITE_CHANNELS, EfficientNetLiteConfig

_VIT_L: Final = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_VIT_B: Final = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SO400M: Final = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_CLIP_L: Final = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "projection_dim": 768, **_VIT_L}

TOWERS: Final[dict[str, dict[str, Any]]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336, "patch_size": 14},
    "openai/clip-vit-large-patch14": {**_CLIP_L, "image_size": 224, "patch_size": 14},
    "google/siglip-base-patch16-512": {
        "model_type": "siglip_vision_model",
        "image_size": 512,
        "patch_size": 16,
        **_VIT_B,
    },
    "google/siglip-large-patch16-384": {
        "model_type": "siglip_vision_model",
        "image_size": 384,
        "patch_size": 16,
        **_VIT_L,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "image_size": 384,
        "patch_size": 14,
        **_SO400M,
    },
    "facebook/dinov2-large": {"model_type": "dinov2", "image_size": 518, "patch_size": 14, "mlp_ratio": 4, **_VIT_L},
}
"""Vision towers by hub name, as ``AutoConfig.for_model`` takes them."""

LANGUAGE_MODELS: Final[dict[str, dict[str, Any]]] = {
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    },
    "lmsys/vicuna-13b-v1.5": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "max_position_embeddings": 4096,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    },
}
"""Language models by hub name, likewise, as they are before ``<image>`` and ``<region>`` are added to them."""

ADDED_TOKENS: Final = 2


def tower_shape(name: str) -> Any:
    """Configuration of a tower.

    Args:
        name: A key of :data:`TOWERS`, an EfficientNet-Lite variant, or a folder or a hub name that has been fetched.

    Raises:
        ConfigError: It is none of them.
    """
    if name in EFFICIENTNET_LITE_CHANNELS:
        return EfficientNetLiteConfig(variant=name)
    config = _shape(name, TOWERS, "model.vision")
    return getattr(config, "vision_config", config)


def language_shape(name: str) -> Any:
    """Configuration of a language model, likewise; with its vocabulary as it is in its folder."""
    return _shape(name, LANGUAGE_MODELS, "model.language")


def _shape(name: str, known: dict[str, dict[str, Any]], field: str) -> Any:
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

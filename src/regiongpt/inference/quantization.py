"""A language model with int8 weights, by PyTorch's own dynamic quantization.

The linear layers of the language model, its head among them, keep their weights as int8 with one scale an output
channel, a quarter of the memory; their inputs are rounded to int8 as they come, with one scale a call, and the sums are
taken in integers. Tower, refinement, connector, word embeddings and norms stay as they are. Because a call's scale
depends on all that is in the call, an answer may depend a little on what else is in its batch.

Figures: ``docs/performance.md``.
"""

import warnings
from typing import Any

import torch
from torch import nn

from regiongpt.errors import ConfigError


def to_int8(model: Any) -> Any:
    """Quantize the language model of a RegionGPT model in float32 on the CPU, in place.

    It can answer afterwards, but be neither trained nor saved.

    Raises:
        ConfigError: the model is elsewhere or of another type, it has no linear layers, or this PyTorch cannot do it.
    """
    if model.device.type != "cpu":
        raise ConfigError(f"expected device cpu with int8 weights, got {model.device}; use bfloat16 on an accelerator")
    if model.dtype != torch.float32:
        raise ConfigError(f"expected dtype float32 with int8 weights, got {str(model.dtype)[6:]}; leave dtype out")
    kinds = {type(module) for module in model.language_model.modules()}
    if nn.Linear not in kinds:
        raise ConfigError(
            f"{type(model.language_model).__name__} has no linear layers for int8 weights, none; leave int8 out"
        )
    try:
        from torch.ao import quantization
    except ImportError:
        raise ConfigError(f"PyTorch {torch.__version__} has no dynamic quantization; leave int8 out") from None
    engine = torch.backends.quantized.engine
    if engine in ("none", None):
        raise ConfigError("this build of PyTorch has no int8 kernels for this processor; leave int8 out")
    # The kernels for ARM know one scale a layer alone.
    per_channel = engine in ("x86", "fbgemm", "onednn")
    config = quantization.per_channel_dynamic_qconfig if per_channel else quantization.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announces torchao, whose int8 is slower than float32 on a CPU
        quantize: Any = quantization.quantize_dynamic
        quantize(model.language_model, {nn.Linear: config}, inplace=True)
    return model

"""Network, processor and checkpoints (paper §3.1); an import registers them with transformers' Auto classes."""

from transformers import AutoProcessor

from regiongpt.model.configuration import RegionGPTConfig
from regiongpt.model.modeling import RegionGPTForConditionalGeneration
from regiongpt.model.processing import RegionGPTProcessor

AutoProcessor.register(RegionGPTConfig, RegionGPTProcessor)

__all__ = ["RegionGPTConfig", "RegionGPTForConditionalGeneration", "RegionGPTProcessor"]

"""Neural network, processor and checkpoints (paper section 3.1).

Importing this package registers RegionGPT with transformers' Auto classes.
"""

from transformers import AutoProcessor

from regiongpt.model.configuration import EfficientNetLiteConfig, RegionGPTConfig
from regiongpt.model.modeling import EfficientNetLiteModel, RegionGPTForConditionalGeneration
from regiongpt.model.processing import RegionGPTProcessor

AutoProcessor.register(RegionGPTConfig, RegionGPTProcessor)

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "RegionGPTConfig",
    "RegionGPTForConditionalGeneration",
    "RegionGPTProcessor",
]

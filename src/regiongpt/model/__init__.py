"""Neural network, processor and checkpoints (paper section 3.1).

Importing this package registers RegionGPT with transformers' Auto classes.
"""

from transformers import AutoProcessor

from regiongpt.model.configuration import EfficientNetLiteConfig, RegionGPTConfig
from regiongpt.model.modeling import RegionGPTForConditionalGeneration
from regiongpt.model.processing import RegionGPTProcessor
from regiongpt.model.towers import EfficientNetLiteModel

AutoProcessor.register(RegionGPTConfig, RegionGPTProcessor)

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "RegionGPTConfig",
    "RegionGPTForConditionalGeneration",
    "RegionGPTProcessor",
]

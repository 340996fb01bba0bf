"""Neural network, processor and checkpoints (paper section 3.1).

Importing this package registers RegionGPT with transformers' Auto classes.
"""

from regiongpt.model.configuration import EfficientNetLiteConfig, RegionGPTConfig
from regiongpt.model.modeling import RegionGPTForConditionalGeneration
from regiongpt.model.towers import EfficientNetLiteModel

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "RegionGPTConfig",
    "RegionGPTForConditionalGeneration",
]

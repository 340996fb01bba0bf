"""Ask about any region of an image: a region-level vision language model (RegionGPT).

The public names below are imported on first use, so that ``import regiongpt`` and ``regiongpt --help`` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "RegionGPTError": "errors",
    "RegionError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
    "load_image": "images",
    "Region": "regions",
    "RegionGPTConfig": "model",
    "RegionGPTForConditionalGeneration": "model",
    "RegionGPTProcessor": "model",
    "RegionPredictor": "inference",
    "Question": "inference",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from regiongpt.errors import CheckpointError as CheckpointError
    from regiongpt.errors import ConfigError as ConfigError
    from regiongpt.errors import DataError as DataError
    from regiongpt.errors import RegionError as RegionError
    from regiongpt.errors import RegionGPTError as RegionGPTError
    from regiongpt.images import load_image as load_image
    from regiongpt.inference import Question as Question
    from regiongpt.inference import RegionPredictor as RegionPredictor
    from regiongpt.model import RegionGPTConfig as RegionGPTConfig
    from regiongpt.model import RegionGPTForConditionalGeneration as RegionGPTForConditionalGeneration
    from regiongpt.model import RegionGPTProcessor as RegionGPTProcessor
    from regiongpt.regions import Region as Region


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("regiongpt")
    if name not in _HOMES:
        raise AttributeError(f"module 'regiongpt' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(f"regiongpt.{_HOMES[name]}"), name)

"""Ask about any region of an image: a region-level vision language model (RegionGPT).

The public names below are imported on first use, so that ``import regiongpt`` and ``regiongpt --help`` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError, RegionGPTError
    from regiongpt.images import load_image
    from regiongpt.inference import Question, RegionPredictor
    from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration, RegionGPTProcessor
    from regiongpt.regions import Region

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "Question", "Region", "RegionError", "RegionGPTConfig",
    "RegionGPTError", "RegionGPTForConditionalGeneration", "RegionGPTProcessor", "RegionPredictor", "load_image",
]  # fmt: skip
_HOMES = {"load_image": "images", "Region": "regions", "RegionPredictor": "inference", "Question": "inference"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("regiongpt")
    if name not in __all__:
        raise AttributeError(f"module 'regiongpt' has no attribute '{name}'; it has {', '.join(__all__)}")
    home = _HOMES.get(name) or ("errors" if name.endswith("Error") else "model")
    return getattr(import_module(f"regiongpt.{home}"), name)

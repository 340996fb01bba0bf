"""Asking a trained model about regions. Names are imported on first use so that the command line starts fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Answer": "engine",
    "Classified": "choices",
    "Conversation": "predictor",
    "Located": "choices",
    "Question": "predictor",
    "RegionPredictor": "predictor",
    "pick_device": "engine",
    "pick_dtype": "engine",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from regiongpt.inference.choices import Classified as Classified
    from regiongpt.inference.choices import Located as Located
    from regiongpt.inference.engine import Answer as Answer
    from regiongpt.inference.engine import pick_device as pick_device
    from regiongpt.inference.engine import pick_dtype as pick_dtype
    from regiongpt.inference.predictor import Conversation as Conversation
    from regiongpt.inference.predictor import Question as Question
    from regiongpt.inference.predictor import RegionPredictor as RegionPredictor


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regiongpt.inference' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(f"regiongpt.inference.{_HOMES[name]}"), name)

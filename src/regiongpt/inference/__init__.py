"""Asking a trained model about regions. The names are imported on first use: the command line must start fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Answer": "engine",
    "Classified": "choices",
    "Conversation": "conversation",
    "Located": "choices",
    "Question": "predictor",
    "RegionPredictor": "predictor",
    "pick_device": "engine",
    "pick_dtype": "engine",
}
__all__ = [
    "Answer",
    "Classified",
    "Conversation",
    "Located",
    "Question",
    "RegionPredictor",
    "pick_device",
    "pick_dtype",
]

if TYPE_CHECKING:
    from regiongpt.inference.choices import Classified, Located
    from regiongpt.inference.conversation import Conversation
    from regiongpt.inference.engine import Answer, pick_device, pick_dtype
    from regiongpt.inference.predictor import Question, RegionPredictor


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regiongpt.inference' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(f"regiongpt.inference.{_HOMES[name]}"), name)

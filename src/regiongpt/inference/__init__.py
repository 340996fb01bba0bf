"""Asking a trained model about regions. Names are imported on first use so that the command line starts fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regiongpt.inference.predictor import Conversation as Conversation
    from regiongpt.inference.predictor import Question as Question
    from regiongpt.inference.predictor import RegionPredictor as RegionPredictor

__all__ = ["Conversation", "Question", "RegionPredictor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'regiongpt.inference' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module("regiongpt.inference.predictor"), name)

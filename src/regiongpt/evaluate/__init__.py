"""Benchmarks: one module per task, and the code that runs, scores and reports them."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Final

from regiongpt.errors import ConfigError
from regiongpt.settings import nearest

if TYPE_CHECKING:
    from regiongpt.evaluate.task import Task

TASKS: Final[Mapping[str, str]] = {
    "coco_cls": "detection:CocoClassification",
    "refcocog_caption": "referring:RefCocogCaption",
    "vg_caption": "referring:VisualGenomeCaption",
    "refcocog_rec": "referring:RefCocogRec",
    "pope": "pope:Pope",
    "facts": "facts:Facts",
}
"""Class of each task by its command-line name, in the order of the paper's tables."""


def task_class(name: str) -> "type[Task]":
    """Import the class of a task; ConfigError if there is none."""
    if name not in TASKS:
        raise ConfigError(f"no task {name!r}; {nearest(name, TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(f"{__name__}.{module}"), kind)
    return found

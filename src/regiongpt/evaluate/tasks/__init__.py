"""The benchmarks, one module each."""

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from regiongpt.errors import ConfigError
from regiongpt.evaluate.task import Task
from regiongpt.settings import nearest

TASKS: Final[Mapping[str, str]] = {
    "coco_cls": "coco_cls:CocoClassification",
    "refcocog_caption": "captions:RefCocogCaption",
    "vg_caption": "captions:VisualGenomeCaption",
    "refcocog_rec": "choosing:RefCocogRec",
    "coco_rec": "choosing:CocoRec",
    "pope": "pope:Pope",
    "facts": "facts:Facts",
}
"""Where each task is, by its name on the command line, in the order of the paper's tables."""


def task_class(name: str) -> type[Task]:
    """The class of a task, imported now.

    Raises:
        ConfigError: There is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"no task {name!r}; {nearest(name, TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(f"regiongpt.evaluate.tasks.{module}"), kind)
    return found

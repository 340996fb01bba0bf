"""A small benchmark for tests of what runs benchmarks, and Java for those that score captions."""

import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from regiongpt import Region, evaluate
from regiongpt.errors import ConfigError
from regiongpt.evaluate.bootstrap import mean_statistic
from regiongpt.evaluate.caption_metrics import find_java, find_package
from regiongpt.evaluate.task import OURS, TABLES, Answer, Item, Measured, PaperTable, Scored, Task, images_of

CHOICES = ("cat", "dog", "bird")


class Drawn(Task):
    """The class of a box, by the free answer and by the best choice."""

    name: ClassVar[str] = "drawn"
    summary: ClassVar[str] = "the class of every box of drawn pictures"
    by: ClassVar[tuple[str, ...]] = ("size", "category")

    wording: str = "What is <region1>?"
    """The question."""

    def inputs(self) -> list[Path]:
        return [self.data / "instances_dev.json"]

    def read_items(self) -> list[Item]:
        content = json.loads(self.inputs()[0].read_text())
        names = {each["id"]: each["name"] for each in content["categories"]}
        files = {each["id"]: each["file_name"] for each in content["images"]}
        asked = {"question": self.wording, "choices": CHOICES, "sure": True, "max_new_tokens": 4}
        found = []
        for each in content["annotations"]:
            (x, y, w, h), category, image_id = each["bbox"], names[each["category_id"]], each["image_id"]
            place = {"image": self.data / "images" / files[image_id], "image_id": image_id}
            groups = {"size": "small" if w < 24 else "large", "category": category}
            box = Region.box(x, y, x + w, y + h)
            found.append(Item(id=str(each["id"]), regions=(box,), truth=category, groups=groups, **place, **asked))
        return found

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        given = [answers.get(item.id, Answer()) for item in items]
        said = {
            "generated": [answer.text for answer in given],
            "choices": [CHOICES[each.scores.index(max(each.scores))] if each.scores else None for each in given],
        }
        protocols = {}
        for protocol, chosen in said.items():
            right = [float(name == item.truth) for name, item in zip(chosen, items, strict=True)]
            statistics = {"accuracy": mean_statistic(images_of(items), right)}
            protocols[protocol] = Scored(statistics=statistics, scores={"accuracy": right})
        return Measured(protocols=protocols, pinned={"split": "dev"}, tables={"Confusions": [["truth"], ["cat"]]})


def register(patch: pytest.MonkeyPatch) -> None:
    """Makes the benchmark known as ``drawn``."""
    module = types.ModuleType("regiongpt.evaluate.drawn")
    module.Drawn = Drawn  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module.__name__, module)
    patch.setitem(evaluate.TASKS, "drawn", "drawn:Drawn")  # type: ignore[arg-type]
    paper = PaperTable("Table 0", "Drawn", "drawings", ("accuracy",), {OURS: [80.61]}, "", "drawn", "generated")
    patch.setitem(TABLES, "drawn", paper)


def need_java() -> None:
    """Skip the test where captions cannot be scored."""
    try:
        find_package()
        find_java()
    except ConfigError as error:
        pytest.skip(str(error))

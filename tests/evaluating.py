"""A small benchmark for tests of what runs benchmarks: the class of every box of drawn pictures."""

import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from regiongpt import Region
from regiongpt.evaluate import tasks
from regiongpt.evaluate.metrics.bootstrap import interval, mean_statistic
from regiongpt.evaluate.task import RESAMPLES, Answer, Figure, Item, Result, Table, Task

CHOICES = ("cat", "dog", "bird")


class Drawn(Task):
    """The class of a box, by the free answer and by the best choice."""

    name: ClassVar[str] = "drawn"
    summary: ClassVar[str] = "the class of every box of drawn pictures"
    item_id: ClassVar[str] = "annotation id"
    reads: ClassVar[tuple[str, ...]] = ("text", "scores")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {"generated": {"accuracy": 0.8061}}
    paper_source: ClassVar[str] = "Table 3, COCO val2017"

    wording: str = "What is <region1>?"
    """The question."""

    def inputs(self) -> list[Path]:
        return [self.data / "instances_dev.json"]

    def items(self) -> list[Item]:
        content = json.loads(self.inputs()[0].read_text())
        names = {each["id"]: each["name"] for each in content["categories"]}
        files = {each["id"]: each["file_name"] for each in content["images"][: self.limit or None]}
        found = []
        for each in content["annotations"]:
            x, y, w, h = each["bbox"]
            if each["image_id"] in files:
                found.append(
                    Item(
                        id=str(each["id"]),
                        image=self.data / "images" / files[each["image_id"]],
                        image_id=each["image_id"],
                        question=self.wording,
                        regions=(Region.box(x, y, x + w, y + h),),
                        choices=CHOICES,
                        max_new_tokens=4,
                        truth=names[each["category_id"]],
                        groups={"size": "small" if w < 24 else "large", "category": names[each["category_id"]]},
                    )
                )
        return found

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        rows: list[dict[str, Any]] = []
        for item in items:
            answer = answers.get(item.id)
            best = CHOICES[answer.scores.index(max(answer.scores))] if answer and answer.scores else None
            said = answer.text if answer else None
            scores = {"generated.accuracy": float(said == item.truth), "choices.accuracy": float(best == item.truth)}
            known = {"id": item.id, "image_id": item.image_id, "truth": item.truth, "groups": dict(item.groups)}
            rows.append({**known, "answer": said, "missing": answer is None, "scores": scores})
        images = [item.image_id for item in items]
        protocols = ("generated", "choices")
        statistics = {
            p: {"accuracy": mean_statistic(images, [row["scores"][f"{p}.accuracy"] for row in rows])} for p in protocols
        }
        figures = {
            p: {
                "accuracy": Figure(
                    value=statistics[p]["accuracy"].value(),
                    of=len(items),
                    interval=interval(statistics[p]["accuracy"], resamples, seed) if resamples else None,
                )
            }
            for p in protocols
        }
        return Result(
            task=self.name,
            pinned={"split": "dev"},
            protocols=figures,
            breakdowns={p: {by: self._groups(rows, p, by) for by in ("size", "category")} for p in protocols},
            rows=tuple(rows),
            tables=(Table(title="Confusions", columns=("truth", *CHOICES), rows=(("cat", 1, 2, None),)),),
            notes=(f"{sum(row['missing'] for row in rows)} answers are missing",),
            statistics=statistics,
        )

    def _groups(self, rows: list[dict[str, Any]], protocol: str, by: str) -> dict[str, dict[str, Figure]]:
        found: dict[str, list[float]] = {}
        for row in rows:
            found.setdefault(row["groups"][by], []).append(row["scores"][f"{protocol}.accuracy"])
        return {
            group: {"accuracy": Figure(value=sum(each) / len(each), of=len(each), interval=(0.1, 0.9))}
            for group, each in found.items()
        }


def register(patch: pytest.MonkeyPatch) -> None:
    """Makes the benchmark known as ``drawn``."""
    module = types.ModuleType("regiongpt.evaluate.tasks.drawn")
    module.Drawn = Drawn  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module.__name__, module)
    patch.setitem(tasks.TASKS, "drawn", "drawn:Drawn")  # type: ignore[arg-type]

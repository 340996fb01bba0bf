"""Is there such an object in the image? The POPE benchmark of objects that models make up.

Paper: §4.4, Table 8
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from regiongpt.data.convert.base import option
from regiongpt.data.instances import InstancesFile
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.bootstrap import Statistic
from regiongpt.evaluate.metrics.yes_no import Said, first_word, pope_script, yes_no_statistics
from regiongpt.evaluate.paper import TABLES
from regiongpt.evaluate.task import RESAMPLES, Answer, Figure, Item, Result, Task
from regiongpt.evaluate.tasks.pope_questions import STRATEGIES, Asked, build_questions, read_questions
from regiongpt.evaluate.tasks.scoring import (
    by_group,
    check_choice,
    figures,
    find_file,
    find_folder,
    images_of,
    limited,
    mean_figure,
    missing_notes,
    rows_of,
)

READINGS: Final = {
    "first word": "an answer is its first word, yes or no; any other is unparsable and wrong, and no yes",
    "published script": "an answer is no if its first sentence has the word no or not, and yes whatever else it says",
}
_COLUMNS: Final = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1", "yes_ratio": "Yes"}


@dataclass(frozen=True, kw_only=True)
class Pope(Task):
    """Yes-or-no questions, half of them about absent classes, which are chosen in three ways.

    The published questions are read where they are given or lie in the folder (``coco_pope_random.json`` and so on);
    otherwise they are built by the same rules from the annotations.
    """

    name: ClassVar[str] = "pope"
    summary: ClassVar[str] = "is there such an object? accuracy, precision, recall, F1, share of yes (Table 8)"
    item_id: ClassVar[str] = "question id"
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        f"published script, {strategy}": {
            name: TABLES[f"pope_{strategy}"].figure(column) / 100 for name, column in _COLUMNS.items()
        }
        for strategy in STRATEGIES
    }
    paper_source: ClassVar[str] = "Table 8, the published questions on 500 images of COCO val2014"

    strategy: str = option("random, popular, adversarial, or all", default="all")
    questions: tuple[Path, ...] = option("published question files, wherever they are", default=())
    split: str = option("of the annotations to build questions from: instances_SPLIT.json", default="val2014")
    annotations: Path | None = option("the annotations file, wherever it is", default=None)
    images: Path | None = option("folder of the images, wherever it is", default=None)
    image_count: int = option("images to build questions for", default=500)
    pairs: int = option("questions of either answer for an image, when building", default=3)
    suffix: str = option("text to end every question with, such as 'Answer yes or no.'", default="")

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, (*STRATEGIES, "all"))

    @property
    def _strategies(self) -> tuple[str, ...]:
        return STRATEGIES if self.strategy == "all" else (self.strategy,)

    def _published(self) -> dict[str, Path]:
        """The question files by strategy; none where questions are to be built."""
        if self.questions:
            found = {next((s for s in STRATEGIES if s in path.name), path.stem): path for path in self.questions}
            if len(found) < len(self.questions):
                raise DataError(f"questions: expected files of different strategies, got {', '.join(found)} twice")
            if self.strategy != "all" and set(found) != {self.strategy}:
                raise ConfigError(
                    f"questions: expected a file of the strategy {self.strategy!r} alone, got {', '.join(found)}; "
                    "leave out --strategy or give its file"
                )
            return found
        there = {strategy: Path(self.data) / f"coco_pope_{strategy}.json" for strategy in self._strategies}
        return there if self.annotations is None and all(path.is_file() for path in there.values()) else {}

    @property
    def _annotations(self) -> Path:
        names = [f"annotations/instances_{self.split}.json", f"instances_{self.split}.json"]
        what = "the annotations, or coco_pope_<strategy>.json,"
        return find_file(self.annotations, self.data, names, what, "annotations")

    @property
    def split_read(self) -> str:
        """Of the annotations that questions are built from."""
        return "" if self._published() or self.annotations is not None else self.split

    def inputs(self) -> list[Path]:
        """The question files, or the annotations."""
        return list(self._published().values()) or [self._annotations]

    def load(self) -> list[Item]:
        """The questions of one strategy after the other."""
        self.left_out.counts.clear()
        folder = find_folder(self.images, self.data, [self.split, "images", "."], "the images", "images")
        published = self._published()
        if published:
            asked = {
                strategy: [(_number(each.image), each) for each in read_questions(path, self.left_out)]
                for strategy, path in published.items()
            }
        else:
            asked = self._build(folder)
        several = len(asked) > 1
        items = [
            self._item(strategy, number, each, folder, several)
            for strategy, those in asked.items()
            for number, each in those
        ]
        return limited(items, self.limit)

    def _build(self, folder: Path) -> dict[str, list[tuple[int | str, Asked]]]:
        path = self._annotations
        file = InstancesFile(path, self.left_out, folder=folder, crowds="keep")  # a crowd of people is people there
        classes: dict[int, list[str]] = {number: [] for number in file.images.tolist()}
        for place, category in zip(file.places.tolist(), file.categories.tolist(), strict=True):
            classes[int(file.images[place])].append(file.names[category])
        names = dict(zip(file.images.tolist(), file.paths, strict=True))
        return {
            strategy: list(
                build_questions(
                    classes, names, strategy, images=self.image_count, pairs=self.pairs, seed=self.seed
                )
            )
            for strategy in self._strategies
        }  # fmt: skip

    def _item(self, strategy: str, number: int | str, asked: Asked, folder: Path, several: bool) -> Item:
        path = folder / asked.image
        if not path.is_file() and (bare := re.search(r"(\d+\.\w+)$", asked.image)) and (folder / bare[1]).is_file():
            path = folder / bare[1]  # the images of 2017 are called by their numbers alone
        return Item(
            id=f"{strategy}-{asked.number}" if several else asked.number,
            image=path,
            image_id=number,
            question=f"{asked.text} {self.suffix}".strip(),
            max_new_tokens=8,
            truth=asked.label,
            groups={"strategy": strategy, **({"category": asked.category} if asked.category else {})},
        )

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        """Each strategy by itself, under both readings of the answers."""
        texts = [a.text if (a := answers.get(item.id)) is not None else None for item in items]
        statistics: dict[str, dict[str, Statistic]] = {}
        protocols: dict[str, dict[str, Figure]] = {}
        scores: dict[str, list[float | None]] = {}
        breakdowns = {}
        for reading, read in (("first word", first_word), ("published script", pope_script)):
            said: list[Said] = [read(text) if text is not None else None for text in texts]
            right = [float(answer == item.truth) for answer, item in zip(said, items, strict=True)]
            for strategy in dict.fromkeys(item.groups["strategy"] for item in items):
                places = [k for k, item in enumerate(items) if item.groups["strategy"] == strategy]
                own = [items[k] for k in places]
                name = f"{reading}, {strategy}"
                statistics[name] = dict(
                    yes_no_statistics(images_of(own), [item.truth for item in own], [said[k] for k in places])
                )
                protocols[name] = figures(statistics[name], len(own), resamples, seed)
                kept = set(places)
                scores[f"{name}.accuracy"] = [right[k] if k in kept else None for k in range(len(items))]

                def measure(
                    within: list[int], own: Sequence[Item] = own, scored: Sequence[float] = [right[k] for k in places]
                ) -> dict[str, Figure]:
                    return {"accuracy": mean_figure(own, scored, within)}

                breakdowns[name] = {"category": by_group(own, "category", measure)}
        notes = missing_notes(items, answers, self.item_id)
        if self.left_out.counts:
            notes.append(self.left_out.summary())
        published = self._published()
        source = ", ".join(path.name for path in published.values())
        rule = f"built by POPE's rules from {self.split}, {self.pairs} pairs an image, seed {self.seed}"
        return Result(
            task=self.name,
            pinned={
                "questions": source or rule,
                "prompt": f"the question{f' and {self.suffix!r}' if self.suffix else ' alone'}",
                "yes_ratio": "of the predictions",
                **{f"protocol {name}": text for name, text in READINGS.items()},
            },
            protocols=protocols,
            breakdowns=breakdowns,
            rows=rows_of(items, answers, scores),
            notes=tuple(notes),
            statistics=statistics,
        )


def _number(image: str) -> int | str:
    """The image id that a file name ends in, or the name."""
    found = re.search(r"(\d+)\.\w+$", image)
    return int(found[1]) if found else image

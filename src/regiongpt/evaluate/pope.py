"""Is there such an object in the image? POPE's questions. Paper: §4.4, Table 8."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal

import numpy as np

from regiongpt.data.reading import TRUNCATED, image_name, iter_lines, plain_text
from regiongpt.data.shards import Fault
from regiongpt.errors import DataError, short
from regiongpt.evaluate.bootstrap import Floats, Statistic, ratio, sum_statistic
from regiongpt.evaluate.task import Answer, Item, Measured, Scored, Task, find, given, images_of

STRATEGIES: Final = ("random", "popular", "adversarial")
"""How absent classes are chosen: any; the most common; the ones that most often occur with the present one."""
FORMULAS: Final[dict[str, Callable[[Floats], Floats]]] = {
    "accuracy": lambda s: ratio(s[:, 0] + s[:, 3], s[:, :4].sum(axis=1)),
    "precision": lambda s: ratio(s[:, 0], s[:, 0] + s[:, 1]),
    "recall": lambda s: ratio(s[:, 0], s[:, 0] + s[:, 2]),
    "f1": lambda s: ratio(2 * s[:, 0], 2 * s[:, 0] + s[:, 1] + s[:, 2]),
    "yes_ratio": lambda s: ratio(s[:, 0] + s[:, 1], s[:, :4].sum(axis=1)),
    "unparsable": lambda s: ratio(s[:, 4], s[:, :4].sum(axis=1)),
}
"""Results of counts: yes to yes, yes to no, no to yes, no to no, and among these answers without a yes or no."""


class Pope(Task):
    """Yes-or-no questions, half of them about absent classes, which are chosen in three ways."""

    name: ClassVar[str] = "pope"
    summary: ClassVar[str] = "object hallucination: accuracy, precision, recall, F1, share of yes (Table 8)"

    images: Path | None = None
    """Folder of the images, if not in the folder."""

    def inputs(self) -> list[Path]:
        """The question files that there are."""
        files = [self.data / f"coco_pope_{strategy}.json" for strategy in STRATEGIES]
        return [path for path in files if path.is_file()]

    def read_items(self) -> list[Item]:
        """The questions, strategy by strategy: ``question_id``, ``image``, ``text`` and ``label`` a line."""
        if not self.inputs():
            raise DataError(f"{self.data}: found none of coco_pope_{{{','.join(STRATEGIES)}}}.json; check --data")
        folder = find(self.images, self.data, ["val2014", "images", "."], "images", file=False)
        items: dict[str, Item] = {}
        for path in self.inputs():
            strategy = path.stem.rpartition("_")[2]
            for number, entry in iter_lines(path, self.left_out):
                with self.left_out.noting(path, number):
                    key, label = f"{strategy}-{entry.get('question_id', number)}", str(entry.get("label")).lower()
                    if label not in ("yes", "no"):
                        raise Fault("question of another form", f"expected the label yes or no, got {short(entry)}")
                    if key in items:
                        raise Fault("duplicate id", f"expected each question_id once, got {key} again")
                    image = image_name(entry.get("image"))
                    ends = re.search(r"(\d+)\.\w+$", image)  # in the image's id
                    # Images of 2017 are called by their numbers alone.
                    there = [folder / image, folder / image.rpartition("_")[2]]
                    items[key] = Item(
                        id=key,
                        image=next((path for path in there if path.is_file()), there[0]),
                        image_id=int(ends[1]) if ends else image,
                        question=plain_text(entry.get("text"), "question"),
                        max_new_tokens=8,
                        truth=label,
                        groups={"strategy": strategy},
                    )
            if self.left_out.counts[TRUNCATED]:
                raise DataError(f"{path}: ends within a line; download it again")
        return list(items.values())

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """Each strategy by itself."""
        texts = given(items, answers, "text")
        protocols = {}
        for strategy in dict.fromkeys(item.groups["strategy"] for item in items):
            part = {k: item for k, item in enumerate(items) if item.groups["strategy"] == strategy}
            protocols[strategy] = Scored(
                statistics=yes_no_statistics(list(part.values()), [texts[k] for k in part]),
                scores={
                    "accuracy": [
                        float(read_answer(text) == part[k].truth) if k in part else None for k, text in enumerate(texts)
                    ]
                },
            )
        return Measured(
            protocols=protocols,
            pinned={
                "questions": ", ".join(path.name for path in self.inputs()),
                "reading": "as POPE's published script: no if the first sentence has the word no or not, else yes; no "
                "answer is wrong; unparsable is the share of answers that begin with neither yes nor no",
            },
        )


def read_answer(text: str | None) -> Literal["yes", "no"] | None:
    """The answer as POPE's published script reads it: no where the first sentence says ``no`` or ``not``, else yes."""
    if text is None:
        return None
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no_statistics(items: Sequence[Item], texts: Sequence[str | None]) -> dict[str, Statistic]:
    """The results of :data:`FORMULAS`, yes being the positive answer."""
    counts = np.zeros((len(items), 5))
    for row, item, text in zip(counts, items, texts, strict=True):
        said = read_answer(text) or ("no" if item.truth == "yes" else "yes")  # no answer is a wrong one
        row[2 * (said == "no") + (item.truth == "no")] = 1
        row[4] = not re.match(r"\W*(yes|no)\b(?!['-])", text or "", re.IGNORECASE)
    return {name: sum_statistic(images_of(items), counts, formula) for name, formula in FORMULAS.items()}

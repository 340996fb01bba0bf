"""Is there such an object in the image? POPE's questions, as published or built by its rules.

Paper: §4.4, Table 8
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal, NamedTuple

import numpy as np
from pydantic import Field

from regiongpt.data.coco import InstancesFile
from regiongpt.data.reading import image_name, iter_lines, plain_text
from regiongpt.data.shards import Fault, Rejects, many
from regiongpt.errors import DataError, short
from regiongpt.evaluate.bootstrap import Floats, Statistic, ratio, sum_statistic
from regiongpt.evaluate.task import Answer, InstancesTask, Item, Measured, Scored, given, images_of, printed
from regiongpt.prompts import indefinite

STRATEGIES: Final = ("random", "popular", "adversarial")
"""How absent classes are chosen: any; the most common; the ones that most often occur with the present one."""
PAIRS: Final = 3
"""Questions per answer and image, when building."""
READINGS: Final = {
    "first word": "an answer is its first word, yes or no; any other is unparsable and wrong, and no yes",
    "published script": "an answer is no if its first sentence has the word no or not, and yes whatever else it says",
}
Said = Literal["yes", "no"] | None
FORMULAS: Final[dict[str, Callable[[Floats], Floats]]] = {
    "accuracy": lambda s: ratio(s[:, 0] + s[:, 3], s[:, 5]),
    "precision": lambda s: ratio(s[:, 0], s[:, 0] + s[:, 1]),
    "recall": lambda s: ratio(s[:, 0], s[:, 0] + s[:, 2]),
    "f1": lambda s: ratio(2 * s[:, 0], 2 * s[:, 0] + s[:, 1] + s[:, 2]),
    "yes_ratio": lambda s: ratio(s[:, 0] + s[:, 1], s[:, 5]),
    "unparsable": lambda s: ratio(s[:, 4], s[:, 5]),
}
"""Results of counts: yes to yes, yes to no, not yes to yes, no to no, neither, all."""


class Asked(NamedTuple):
    """One yes-or-no question."""

    number: str
    image: str
    image_id: int | str
    text: str
    label: str
    category: str = ""


class Pope(InstancesTask):
    """Yes-or-no questions, half of them about absent classes, which are chosen in three ways.

    The published questions are read if they are in the folder (``coco_pope_random.json`` and so on), else they are
    built by the same rules from the annotations.
    """

    name: ClassVar[str] = "pope"
    summary: ClassVar[str] = "object hallucination: accuracy, precision, recall, F1, share of yes (Table 8)"
    item_id: ClassVar[str] = "question id"
    wanted: ClassVar[str] = "annotations or coco_pope_<strategy>.json"
    by: ClassVar[tuple[str, ...]] = ("category",)
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        f"published script, {strategy}": printed(
            f"pope_{strategy}", accuracy="Accuracy", precision="Precision", recall="Recall", f1="F1", yes_ratio="Yes"
        )
        for strategy in STRATEGIES
    }

    strategy: Literal["random", "popular", "adversarial", "all"] = "all"
    """How absent classes are chosen."""
    split: str = "val2014"
    """Split of the annotations to build questions from: instances_SPLIT.json."""
    image_count: int = Field(default=500, ge=1)
    """Images to build questions for."""
    suffix: str = ""
    """Text added to every question, such as 'Answer yes or no.'."""

    @property
    def _strategies(self) -> tuple[str, ...]:
        return STRATEGIES if self.strategy == "all" else (self.strategy,)

    def _published(self) -> list[Path]:
        """The question files; none where questions are to be built."""
        there = [self.data / f"coco_pope_{strategy}.json" for strategy in self._strategies]
        return there if self.annotations is None and all(path.is_file() for path in there) else []

    def inputs(self) -> list[Path]:
        """The question files, or the annotations."""
        return self._published() or [self.file]

    def read_items(self) -> list[Item]:
        """The questions, strategy by strategy."""
        folder = self.folder
        asked = [read_questions(path, self.left_out) for path in self._published()] or self._build(folder)
        return [
            Item(
                id=f"{strategy}-{each.number}" if len(asked) > 1 else each.number,
                image=_image_file(folder, each.image),
                image_id=each.image_id,
                question=f"{each.text} {self.suffix}".strip(),
                max_new_tokens=8,
                truth=each.label,
                groups={"strategy": strategy, **({"category": each.category} if each.category else {})},
            )
            for strategy, those in zip(self._strategies, asked, strict=True)
            for each in those
        ]

    def _build(self, folder: Path) -> list[list[Asked]]:
        file = InstancesFile(self.file, self.left_out, folder=folder, crowds="keep")  # a crowd is there too
        classes = {image.id: [file.names[each.category] for each in found] for image, found in file.by_image()}
        names = {image.id: image.path for image in file.images}
        try:
            return [
                build_questions(classes, names, each, images=self.image_count, seed=self.seed)
                for each in self._strategies
            ]
        except DataError as error:
            raise DataError(f"{file.path}: {error}; {self.left_out.summary()}") from None

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """Each strategy by itself, with both ways of reading answers."""
        texts = given(items, answers, "text")
        kinds = [item.groups["strategy"] for item in items]
        protocols = {}
        for reading, read in (("first word", first_word), ("published script", pope_script)):
            said: list[Said] = [read(text) if text is not None else None for text in texts]
            right = [float(each == item.truth) for each, item in zip(said, items, strict=True)]
            for strategy in dict.fromkeys(kinds):
                own = [(item, each) for item, each, kind in zip(items, said, kinds, strict=True) if kind == strategy]
                protocols[f"{reading}, {strategy}"] = Scored(
                    statistics=yes_no_statistics([item for item, _ in own], [each for _, each in own]),
                    scores={"accuracy": [each if kinds[k] == strategy else None for k, each in enumerate(right)]},
                )
        built = f"built by POPE's rules from {self.split}, {PAIRS} pairs an image, seed {self.seed}"
        return Measured(
            protocols=protocols,
            pinned={
                "questions": ", ".join(path.name for path in self._published()) or built,
                "prompt": f"the question{f' and {self.suffix!r}' if self.suffix else ' alone'}",
                "yes_ratio": "of the predictions",
                **{f"protocol {name}": text for name, text in READINGS.items()},
            },
        )


def _image_file(folder: Path, name: str) -> Path:
    """The image; those of 2017 are called by their numbers alone."""
    path, bare = folder / name, folder / name.rpartition("_")[2]
    return bare if bare.is_file() and not path.is_file() else path


def first_word(text: str) -> Said:
    """The answer by its first word; None if it is neither yes nor no."""
    words = "".join(c if c.isalpha() or c in "'-" else " " for c in text.lower()).split()
    return "yes" if words[:1] == ["yes"] else "no" if words[:1] == ["no"] else None


def pope_script(text: str) -> Said:
    """The answer as POPE's published script reads it: no where the first sentence says ``no`` or ``not``, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no_statistics(items: Sequence[Item], said: Sequence[Said]) -> dict[str, Statistic]:
    """The results of :data:`FORMULAS`, yes being the positive answer; an answer that is neither is wrong."""
    asked = np.array([item.truth == "yes" for item in items], bool)
    yes, no = (np.array([each == word for each in said], bool) for word in ("yes", "no"))
    counts = np.column_stack((asked & yes, ~asked & yes, asked & ~yes, ~asked & no, ~yes & ~no, np.ones(len(asked))))
    return {name: sum_statistic(images_of(items), counts.astype(np.float64), each) for name, each in FORMULAS.items()}


def read_questions(path: Path, rejects: Rejects) -> list[Asked]:
    """The JSON lines ``question_id``, ``image``, ``text`` and ``label`` of a file; DataError where none can be used."""
    found: dict[str, Asked] = {}
    for number, entry in iter_lines(path, rejects):
        with rejects.noting(path, number):
            key, label = entry.get("question_id", number), str(entry.get("label")).lower()
            if not isinstance(key, int | str) or label not in ("yes", "no"):
                wanted = "question_id, image, text and the label yes or no"
                raise Fault("question of another form", f"expected {wanted}, got {short(entry)}")
            if str(key) in found:
                raise Fault("duplicate id", f"expected each question_id once, got {key} again")
            image = image_name(entry.get("image"))
            ends = re.search(r"(\d+)\.\w+$", image)  # in the image's id
            image_id = int(ends[1]) if ends else image
            found[str(key)] = Asked(str(key), image, image_id, plain_text(entry.get("text"), "question"), label)
    if not found:
        raise DataError(f"{path}: no questions with image, text and label; {rejects.summary()}")
    return list(found.values())


def build_questions(
    classes: Mapping[int, Sequence[str]],
    names: Mapping[int, str],
    strategy: str,
    *,
    images: int = 500,
    pairs: int = PAIRS,
    seed: int = 0,
) -> list[Asked]:
    """Questions by POPE's rules: as many with the answer yes as with no, for images of more than ``pairs`` classes.

    For each of an image's ``pairs`` classes that are there, one that is not: by ``random`` any; by ``popular`` the one
    that most images of the set have; by ``adversarial`` the one that comes in most images together with the class that
    is there. No class is asked for twice in an image; where the strategy has none left, any other is drawn.

    Args:
        classes: Classes in each annotated image.
        names: File name of each image.
        strategy: One of :data:`STRATEGIES`.
        images: Most images that are asked about, drawn by the seed.
        pairs: Questions of either answer for an image.
        seed: Random seed.
    """
    there = {number: sorted(set(those)) for number, those in sorted(classes.items())}
    often = Counter(name for those in there.values() for name in those)
    together: dict[str, Counter[str]] = {name: Counter() for name in often}
    for those in there.values():
        for name in those:
            together[name].update(other for other in those if other != name)
    usable = [number for number, those in there.items() if len(those) > pairs and len(often) - len(those) >= pairs]
    if not usable:
        raise DataError(
            f"no image has more than {many(pairs, 'class')} and lacks {pairs} others, among "
            f"{many(len(there), 'image')} of {many(len(often), 'class')}; give other annotations"
        )
    drawn = np.random.default_rng((seed, 0)).permutation(len(usable))[:images]
    found = []
    for number in sorted(usable[k] for k in drawn.tolist()):
        rng = np.random.default_rng((seed, 1, number))
        own = there[number]
        absent = sorted(name for name in often if name not in own)
        for turn, k in enumerate(rng.permutation(len(own))[:pairs].tolist()):
            counts = {"popular": often, "adversarial": together[own[k]]}.get(strategy, Counter[str]())
            if ranked := [name for name in absent if counts[name]]:
                no = min(ranked, key=lambda name: (-counts[name], name))
            else:
                no = absent[int(rng.integers(len(absent)))]
            absent.remove(no)
            for half, (name, label) in enumerate(((own[k], "yes"), (no, "no")), 2 * turn + 1):
                text = f"Is there {indefinite(name)} in the image?"
                found.append(Asked(f"{number}-{half}", names[number], number, text, label, name))
    return found

"""Which region does an expression mean? RefCOCOg among proposals, and expressions written from COCO's annotations.

Paper: §4.3, Table 5
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from pydantic import Field

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.facts import View, colours_of
from regiongpt.data.reading import known_size
from regiongpt.data.sampling import LOCATED_AMONG, dev_questions
from regiongpt.data.shards import many
from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.bootstrap import mean_statistic
from regiongpt.evaluate.metrics.detection import ENOUGH, overlaps
from regiongpt.evaluate.paper import TABLES
from regiongpt.evaluate.task import Answer, Item, Measured, Scored, Task
from regiongpt.evaluate.tasks.proposals import candidates_of, read_proposals
from regiongpt.evaluate.tasks.refcocog_files import RefCocogTask, each_expression
from regiongpt.evaluate.tasks.scoring import box_area, find, given, images_of, size_name
from regiongpt.images import load_image
from regiongpt.prompts import NO_MATCH, parse_region_answer, question, region_answer
from regiongpt.regions import Region

GENERATED: Final = "generate"
SCORED: Final = "score all choices"
CALLED: Final = "call each region"
RULES: Final = {
    GENERATED: "the generated answer must be Region [x] of a candidate; other answers, and that none fits, are wrong",
    SCORED: "the likeliest of Region [x] for every candidate and the sentence that none fits",
    CALLED: "the candidate that the model is likeliest to call by the expression, each asked about by itself",
}

INJECTED: Final = "ground truth injected"
BARE: Final = "without injection"


class ChoosingTask(Task):
    """Asks which of an image's regions an expression means."""

    item_id: ClassVar[str] = "question id"
    reads: ClassVar[tuple[str, ...]] = ("text", "scores", "called")

    guided: bool = True
    """End the question with the template of the answer."""
    choices: bool = True
    """Score all candidates too."""
    calls: bool = True
    """Ask of each candidate by itself, too, how likely it is called so."""

    def item(self, regions: Sequence[Region], expression: str, **values: Any) -> Item:
        """A question about regions."""
        choices = (*map(region_answer, range(1, len(regions) + 1)), NO_MATCH) if self.choices else ()
        return Item(regions=tuple(regions), choices=choices, expression=expression if self.calls else "", **values)


def chosen(items: Sequence[Item], answers: Mapping[str, Answer]) -> dict[str, list[int | str | None]]:
    """The regions that were chosen, for each protocol that the answers allow.

    Returns:
        By protocol, for each item the number of the region from 1, ``"none"``, ``"invalid"``, or None without answer.

    Raises:
        DataError: There is no answer, or an answer's scores are not as many as the choices.
    """
    found: dict[str, list[int | str | None]] = {}
    for protocol, kind, read in ((GENERATED, "text", _read), (SCORED, "scores", _best), (CALLED, "called", _likeliest)):
        said = given(items, answers, kind)
        if any(each is not None for each in said):
            found[protocol] = [
                None if each is None else read(each, item) for each, item in zip(said, items, strict=True)
            ]
    if not found:
        raise DataError("no item has an answer with a text or with scores")
    return found


def _read(text: str, item: Item) -> int | str:
    number = parse_region_answer(text)
    if number is None:
        return "none"
    return number if isinstance(number, int) and number <= len(item.regions) else "invalid"


def _best(scores: Sequence[float], item: Item) -> int | str:
    if len(scores) != len(item.regions) + 1:
        raise DataError(f"item {item.id}: {len(scores)} scores for {len(item.regions)} regions and none of them")
    best = int(np.argmax(scores))
    return best + 1 if best < len(item.regions) else "none"


def _likeliest(called: Sequence[float], item: Item) -> int | str:
    if len(called) != len(item.regions):
        raise DataError(f"item {item.id}: {len(called)} likelihoods for {len(item.regions)} regions")
    return int(np.argmax(called)) + 1


def scored(items: Sequence[Item], picked: Sequence[int | str | None], right: Sequence[bool]) -> Scored:
    """Accuracy, what chance would give, and the shares of answers that choose nothing."""
    shares: dict[str, list[float]] = {
        "accuracy": [float(each) for each in right],
        "chance": [item.detail["chance"] for item in items],
        "no_match": [float(each == "none") for each in picked],
        "invalid": [float(each == "invalid" or each is None) for each in picked],
    }
    statistics = {name: mean_statistic(images_of(items), values) for name, values in shares.items()}
    return Scored(statistics=statistics, scores={"accuracy": shares["accuracy"]})


class RefCocogRec(RefCocogTask, ChoosingTask):
    """One question an expression, among the proposals for its image.

    Where no proposal reaches an overlap of 0.5 with the object, the object's own box is added, as in the paper.
    Without that injection such questions count as wrong; all others are the same, so one run measures both.
    """

    name: ClassVar[str] = "refcocog_rec"
    summary: ClassVar[str] = "the box that an expression means, among proposals (Table 5)"
    item_id: ClassVar[str] = "sentence id"
    by: ClassVar[tuple[str, ...]] = ("size", "injected")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        f"generate, {INJECTED}": {"accuracy": TABLES["rec"].figure("val") / 100}
    }
    paper_source: ClassVar[str] = "Table 5, RefCOCOg val (test: 86.96), ground truth injected; proposals not published"

    proposals: Path | None = None
    """Json array of detections: image_id, bbox (x, y, w, h), score."""
    top: int = Field(default=20, ge=0)
    """Most proposals an image, the best by score; 0 for all."""
    min_score: float = 0.0
    """Least score of a proposal; 0 for all."""

    @property
    def _proposals(self) -> Path:
        names = [f"proposals_{self.split}.json", "proposals.json"]
        return find(self.proposals, self.data, names, "proposals", "proposals")

    def inputs(self) -> list[Path]:
        """Expressions, objects and proposals."""
        return [*super().inputs(), self._proposals]

    def read_items(self) -> list[Item]:
        """One item an expression, in the order of the file."""
        objects, folder = self.objects(), self.folder
        images = {each.image_id: folder / each.file for each in objects}
        size = cache(lambda number: known_size(images[number]))
        found = read_proposals(self._proposals, set(images), self.top, self.min_score, self.left_out, size)
        items = []
        for each, number, text in each_expression(objects):
            proposed = found.boxes.get(each.image_id, ())
            boxes, lacking = candidates_of(each.box, proposed, True, (self.seed, each.image_id, number))
            agreement = overlaps(each.box, boxes)
            right = [k for k, overlap in enumerate(agreement.tolist(), 1) if overlap >= ENOUGH]
            numbers = range(1, len(boxes) + 1)
            items.append(
                self.item(
                    [Region.box(*box) for box in boxes],
                    text,
                    id=str(number),
                    image=images[each.image_id],
                    image_id=each.image_id,
                    size=each.size,
                    question=question("locate", 0, regions=numbers, expression=text, guided=self.guided),
                    truth=region_answer(int(agreement.argmax()) + 1),
                    groups={
                        "size": size_name(box_area(each.box)),
                        "injected": "yes" if lacking else "no",
                    },
                    detail={"right": right, "injected": lacking, "chance": len(right) / len(boxes), "expression": text},
                )
            )
        if not items:
            raise DataError(f"{self.inputs()[0]}: no expressions; {self.left_out.summary()}")
        return items

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """Right is a candidate whose overlap with the object is at least 0.5."""
        injected = [bool(item.detail["injected"]) for item in items]
        share = mean_statistic(images_of(items), [float(each) for each in injected])
        protocols = {}
        for protocol, picked in chosen(items, answers).items():
            right = [number in item.detail["right"] for item, number in zip(items, picked, strict=True)]
            with_object = scored(items, picked, right)
            bare = scored(items, picked, [ok and not own for ok, own in zip(right, injected, strict=True)])
            statistics = {**with_object.statistics, "injected_share": share}
            protocols[f"{protocol}, {INJECTED}"] = replace(with_object, statistics=statistics)
            statistics = {name: each for name, each in bare.statistics.items() if name != "chance"}
            protocols[f"{protocol}, {BARE}"] = replace(bare, statistics=statistics)
        candidates = sum(len(item.regions) for item in items) / len(items)
        note = (
            f"{sum(injected)} of {many(len(items), 'question')} had no candidate with an overlap of {ENOUGH}; "
            f"{candidates:.1f} candidates a question on average"
        )
        these = f"at most {self.top} an image" if self.top else "all"
        if self.min_score:
            these += f" of a score of {self.min_score:g} or more"
        return Measured(
            protocols=protocols,
            pinned={
                "split": f"RefCOCOg {self.partition} {self.split}",
                "candidates": f"{self._proposals.name}, {these}, order drawn by seed {self.seed}",
                "right": f"overlap with the object of at least {ENOUGH}",
                **{f"protocol {name}": rule for name, rule in RULES.items()},
                f"variant {INJECTED}": "the object's box is added where no candidate overlaps it enough",
                f"variant {BARE}": "the same questions, of which those count as wrong",
            },
            notes=[note],
        )


class CocoRec(ChoosingTask):
    """Up to three questions an image: a class, place, size or colour that is true of one of five objects alone."""

    name: ClassVar[str] = "coco_rec"
    summary: ClassVar[str] = "the box that an expression means, among five of an annotated image; needs no RefCOCOg"
    by: ClassVar[tuple[str, ...]] = ("kind", "category")

    split: str = "dev"
    """instances_SPLIT.json in the folder, with images/."""
    colours: bool = True
    """Let expressions name a colour, found in the pixels."""

    def inputs(self) -> list[Path]:
        """The annotations."""
        return [source.instances for source in photo_sources(self.data, self.split)]

    def read_items(self) -> list[Item]:
        """Questions by image, in their first wording."""
        data = load_coco(photo_sources(self.data, self.split))
        self.left_out.counts.update(data.skipped)
        images: Sequence[ImageAnnotations] = data.images
        if self.limit:  # up to the last that is asked about; its questions follow from its place among all
            usable = (place for place, image in enumerate(images, 1) if len(View(image).askable) >= LOCATED_AMONG)
            images = images[: max(islice(usable, self.limit), default=0)]
        colours = {k: v for image in images if self.colours for k, v in _colours(image).items()}
        guide = _guide()
        items = []
        turn: Counter[int] = Counter()
        for each in dev_questions(images, "locate", self.seed, colours):
            image = each.image
            turn[image.image_id] += 1
            items.append(
                self.item(
                    each.regions,
                    each.expression,
                    id=f"{image.image_id}-{turn[image.image_id]}",
                    image=image.path,
                    image_id=image.image_id,
                    size=(image.width, image.height),
                    question=each.text if self.guided else each.text.removesuffix(guide),
                    truth=each.answer,
                    groups={"kind": each.kind, "category": each.category},
                    detail={"right": parse_region_answer(each.answer), "chance": 1 / len(each.regions)},
                )
            )
        if not items:
            raise DataError(f"{self.data}: no image has five objects or more; {data.report()}")
        return items

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """Right is the region that the expression was written of."""
        protocols = {
            name: scored(items, picked, [k == item.detail["right"] for item, k in zip(items, picked, strict=True)])
            for name, picked in chosen(items, answers).items()
        }
        return Measured(
            protocols=protocols,
            pinned={
                "split": self.split,
                "expressions": f"of annotations, seed {self.seed}, {'with' if self.colours else 'no'} colours",
                "candidates": "five objects of the image, drawn by the seed, crowds aside",
                **{f"protocol {name}": RULES[name] for name in protocols},
            },
        )


def _colours(image: ImageAnnotations) -> dict[int, str]:
    try:
        photo = load_image(image.path)
    except DataError:  # noted when it is asked about
        return {}
    return colours_of(image, photo) if photo.size == (image.width, image.height) else {}


def _guide() -> str:
    """The suffix that fixes the form of an answer."""
    plain, guided = (question("locate", 0, regions=[1], expression="x", guided=each) for each in (False, True))
    return guided.removeprefix(plain)

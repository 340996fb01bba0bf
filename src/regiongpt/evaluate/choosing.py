"""Regions that expressions refer to: RefCOCOg among proposals, and expressions made from COCO's annotations.

Paper: §4.3, Table 5
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
from pydantic import Field

from regiongpt.data.coco import annotated_box, read_annotation, read_score
from regiongpt.data.facts import LOCATED_AMONG, View, dev_questions, read_colours
from regiongpt.data.reading import (
    APART,
    MALFORMED,
    Corners,
    Expression,
    Row,
    Whole,
    Xywh,
    clipped_box,
    image_name,
    iter_array,
    iter_lines,
    known_size,
)
from regiongpt.data.refcoco import read_instances, read_json, read_pickle
from regiongpt.data.shards import Fault, Rejects, many
from regiongpt.errors import ConfigError, DataError, short
from regiongpt.evaluate.bootstrap import mean_statistic
from regiongpt.evaluate.detection import ENOUGH, overlaps
from regiongpt.evaluate.task import (
    AnnotatedTask,
    Answer,
    Item,
    Measured,
    Scored,
    Task,
    find,
    given,
    images_of,
    printed,
    size_name,
)
from regiongpt.prompts import NO_MATCH, parse_region_answer, question, region_answer
from regiongpt.regions import MAX_COORDINATE, Region

GENERATED: Final = "generate"
SCORED: Final = "score all choices"
CALLED: Final = "call each region"
RULES: Final = {
    GENERATED: "the generated answer must be Region [x] of a candidate; other answers, and that none fits, are wrong",
    SCORED: "the most probable of Region [x] for every candidate and the sentence that none fits",
    CALLED: "the candidate whose name, asked for by itself, is most probably the expression",
}
INJECTED: Final = "ground truth injected"
BARE: Final = "without injection"
_REFS: Final = ("refcocog/refs(umd).p", "refs(umd).p", "refcocog/refs(google).p", "refs(google).p")
_INSTANCES: Final = ("refcocog/instances.json", "instances.json")
_FOLDERS: Final = ("train2014", "images/mscoco/images/train2014", "coco/train2014", "images", ".")
_ENDLESS = int(MAX_COORDINATE)  # pixels of an image whose size is unknown


class ChoosingTask(Task):
    """Asks which of an image's regions an expression refers to."""

    item_id: ClassVar[str] = "question id"
    reads: ClassVar[tuple[str, ...]] = ("text", "scores", "called")

    def item(self, regions: Sequence[Region], **values: Any) -> Item:
        """A question about regions."""
        choices = (*map(region_answer, range(1, len(regions) + 1)), NO_MATCH)
        return Item(regions=tuple(regions), choices=choices, **values)


def chosen(items: Sequence[Item], answers: Mapping[str, Answer]) -> dict[str, list[int | str]]:
    """By protocol, for each item the region chosen: its number from 1, "none", or "invalid", also without an answer."""
    found: dict[str, list[int | str]] = {}
    for protocol, kind in ((GENERATED, "text"), (SCORED, "scores"), (CALLED, "called")):
        said = given(items, answers, kind)
        if any(each is not None for each in said):
            found[protocol] = [_choice(each, len(item.regions)) for each, item in zip(said, items, strict=True)]
    return found


def _choice(said: str | Sequence[float] | None, count: int) -> int | str:
    if said is None:
        return "invalid"
    number = parse_region_answer(said) if isinstance(said, str) else int(np.argmax(said)) + 1
    if number is None or (number == count + 1 and not isinstance(said, str)):  # the last score is of none
        return "none"
    return number if isinstance(number, int) and number <= count else "invalid"


def scored(items: Sequence[Item], picked: Sequence[int | str], right: Sequence[bool]) -> Scored:
    """Accuracy, chance level, and the shares of answers that choose nothing."""
    shares: dict[str, list[float]] = {
        "accuracy": [float(each) for each in right],
        "chance": [item.detail["chance"] for item in items],
        "no_match": [float(each == "none") for each in picked],
        "invalid": [float(each == "invalid") for each in picked],
    }
    statistics = {name: mean_statistic(images_of(items), values) for name, values in shares.items()}
    return Scored(statistics=statistics, scores={"accuracy": shares["accuracy"]})


# ---------------------------------------------------------------------------------------------------------------------
# RefCOCOg


class Referred(NamedTuple):
    """One object with the expressions that refer to it, each with its id."""

    image_id: int
    file: str
    size: tuple[int, int] | None
    ann_id: int
    box: Corners
    category: str
    expressions: Sequence[tuple[int, str]]


class RefCocogTask(Task):
    """A benchmark on the files of RefCOCOg."""

    split: str = "val"
    """Split of refs(...).p; a JSON file holds only one, which this names."""
    refs: Path | None = None
    """refs(umd).p, a JSON file in COCO's format or JSON lines, if not in the folder."""
    instances: Path | None = None
    """instances.json, if not in the folder; only for refs(...).p."""
    images: Path | None = None
    """Folder of the images, if not in the folder."""

    def inputs(self) -> list[Path]:
        """Expressions and objects."""
        if self._refs.suffix != ".p" and self.instances is None:
            return [self._refs]
        return [self._refs, find(self.instances, self.data, _INSTANCES, "objects", "instances")]

    @property
    def _refs(self) -> Path:
        return find(self.refs, self.data, _REFS, "expressions", "refs")

    @cached_property
    def folder(self) -> Path:
        """The folder of the images."""
        return find(self.images, self.data, _FOLDERS, "images", "images", file=False)

    @property
    def part(self) -> str:
        """The split and its file."""
        return f"RefCOCOg {self.split} of {self._refs.name}"

    def objects(self) -> list[Referred]:
        """The objects of the split, in the order of the file; DataError if there are none."""
        path, *instances = RefCocogTask.inputs(self)
        rejects = self.left_out
        if path.suffix == ".jsonl":
            return _read_lines(path, self.folder, rejects)
        if path.suffix == ".p":
            refs = read_pickle(path, self.split, rejects)
        else:
            refs, scenes = read_json(path, "refcocog", rejects)
        if instances:
            scenes = read_instances(instances[0], set(refs), rejects)
        found: list[Referred] = []
        for image_id, ann_id, said in ((k, *each) for k, those in refs.items() for each in those.items()):
            scene = scenes.get(image_id)
            if scene is None or ann_id not in scene.objects:
                rejects.add(APART, path, ann_id, "expected the object in the instances, found none")
                continue
            box, category, _ = scene.objects[ann_id]
            size = (scene.width, scene.height)
            found.append(Referred(image_id, scene.path, size, ann_id, box, category, said))
        if not found:
            raise DataError(f"{path}: no objects of the split {self.split!r}; {rejects.summary()}")
        return found


class _Line(Row):
    image_id: Whole
    ann_id: Whole
    sent_id: Whole | None = None
    sent: Expression
    bbox_xywh: Xywh
    file_name: str = ""
    category: Any = ""


def _read_lines(path: Path, folder: Path, rejects: Rejects) -> list[Referred]:
    """``{"image_id", "ann_id", "bbox_xywh", "sent"}`` a line; further: ``sent_id``, ``file_name``, ``category``."""
    found: dict[int, Referred] = {}
    seen: set[int] = set()
    for number, entry in iter_lines(path, rejects):
        with rejects.noting(path, number):
            line = _Line.read(entry)
            name = image_name(line.file_name or f"COCO_train2014_{line.image_id:012d}.jpg")
            box = clipped_box(line.bbox_xywh, *(known_size(folder / name) or (_ENDLESS, _ENDLESS)))
            sent_id = number if line.sent_id is None else line.sent_id
            if sent_id in seen:
                raise Fault("duplicate id", f"expected each sent_id once, got {sent_id} again")
            seen.add(sent_id)
            new = Referred(line.image_id, name, None, line.ann_id, box, str(line.category), ())
            kept = found.setdefault(line.ann_id, new)
            if (kept.image_id, kept.box) != (line.image_id, box):
                raise Fault(APART, f"expected one image and box of ann_id {line.ann_id}, got another")
            found[line.ann_id] = kept._replace(expressions=[*kept.expressions, (sent_id, line.sent)])
    return list(found.values())


class RefCocogRec(RefCocogTask, ChoosingTask):
    """One question per expression, among the proposals of its image.

    Where none overlaps the object by 0.5, the object's own box is added, as in the paper. Without that injection such
    questions count as wrong; all others are the same, so one run measures both.
    """

    name: ClassVar[str] = "refcocog_rec"
    summary: ClassVar[str] = "the box that an expression refers to, among proposals (Table 5)"
    item_id: ClassVar[str] = "sentence id"
    by: ClassVar[tuple[str, ...]] = ("size", "injected")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {f"{GENERATED}, {INJECTED}": printed("rec", accuracy="val")}

    proposals: Path | None = None
    """JSON array of detections: image_id, bbox (x, y, w, h), score."""
    top: int = Field(default=20, ge=0)
    """Most proposals per image, the best by score; 0 for all."""

    @property
    def _proposals(self) -> Path:
        names = [f"proposals_{self.split}.json", "proposals.json"]
        return find(self.proposals, self.data, names, "proposals", "proposals")

    def inputs(self) -> list[Path]:
        """Expressions, objects and proposals."""
        return [*super().inputs(), self._proposals]

    def read_items(self) -> list[Item]:
        """One item per expression, in the order of the file."""
        objects = self.objects()
        images = {each.image_id: self.folder / each.file for each in objects}
        proposed = read_proposals(self._proposals, images, self.top, self.left_out)
        items = []
        for each, (number, text) in [(one, said) for one in objects for said in one.expressions]:
            own = proposed.get(each.image_id, ())
            boxes, lacking = candidates_of(each.box, own, (self.seed, each.image_id, number))
            agreement = overlaps(each.box, boxes)
            right = (np.flatnonzero(agreement >= ENOUGH) + 1).tolist()
            items.append(
                self.item(
                    [Region.box(*box) for box in boxes],
                    expression=text,
                    id=str(number),
                    image=images[each.image_id],
                    image_id=each.image_id,
                    size=each.size,
                    question=question("locate", 0, regions=range(1, len(boxes) + 1), expression=text),
                    truth=region_answer(int(agreement.argmax()) + 1),
                    groups={"size": size_name(each.box), "injected": "yes" if lacking else "no"},
                    detail={"right": right, "injected": lacking, "chance": len(right) / len(boxes)},
                )
            )
        if not items:
            raise DataError(f"{self.inputs()[0]}: no expressions; {self.left_out.summary()}")
        return items

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """A candidate with an IoU of at least 0.5 with the object is correct."""
        injected = [bool(item.detail["injected"]) for item in items]
        share = mean_statistic(images_of(items), [float(each) for each in injected])
        protocols = {}
        for protocol, picked in chosen(items, answers).items():
            right = [number in item.detail["right"] for item, number in zip(items, picked, strict=True)]
            whole = scored(items, picked, right)
            bare = scored(items, picked, [ok and not own for ok, own in zip(right, injected, strict=True)])
            with_share = {**whole.statistics, "injected_share": share}
            without = {name: each for name, each in bare.statistics.items() if name != "chance"}
            protocols[f"{protocol}, {INJECTED}"] = whole._replace(statistics=with_share)
            protocols[f"{protocol}, {BARE}"] = bare._replace(statistics=without)
        these = f"at most {self.top} an image" if self.top else "all"
        return Measured(
            protocols=protocols,
            pinned={
                "split": self.part,
                "candidates": f"{self._proposals.name}, {these}, order drawn by seed {self.seed}",
                "right": f"overlap with the object of at least {ENOUGH}",
                **{f"protocol {name}": rule for name, rule in RULES.items()},
                f"variant {INJECTED}": "the object's box is added where no candidate overlaps it enough",
                f"variant {BARE}": "the same questions, of which those count as wrong",
            },
            notes=[f"{sum(injected)} of {many(len(items), 'question')} had no candidate with an overlap of {ENOUGH}"],
        )


def read_proposals(path: Path, images: Mapping[int, Path], top: int, rejects: Rejects) -> dict[int, list[Corners]]:
    """Candidate boxes (xyxy in pixels) by image id, the best score first, from a json array of detection results.

    Args:
        path: The file, with a ``score`` in every entry or in none.
        images: The images that are asked about; a candidate is clipped to its image if that can be read.
        top: Most candidates an image, by score; 0 for all.
        rejects: Where unusable entries are noted.
    """
    found: dict[int, list[tuple[float | None, Corners]]] = {}
    for place, entry in enumerate(iter_array(path)):
        with rejects.noting(path, place):
            row = read_annotation(entry)
            if row.image is None or row.box is None:
                wanted = "expected image_id, and a bbox of four numbers or a segmentation"
                raise Fault(MALFORMED, f"{wanted}, got {short(entry)}")
            if row.image in images:
                box = annotated_box(row.box, *(known_size(images[row.image]) or (_ENDLESS, _ENDLESS)))
                found.setdefault(row.image, []).append((read_score(entry), box))
    if not found:
        asked = f"the {many(len(images), 'image')} that are asked about"
        raise DataError(f"{path}: no candidates of {asked}; {rejects.summary()}; is the file of another split?")
    lacking = [score is None for those in found.values() for score, _ in those]
    if any(lacking) and not all(lacking):
        raise DataError(
            f"{path}: {sum(lacking):,} of {len(lacking):,} candidates have no score; give a score to all or none"
        )
    if all(lacking) and top:
        raise ConfigError(f"{path}: no scores to rank candidates; give a file with scores, or --top 0 for all")
    for those in found.values():
        those.sort(key=lambda each: -(each[0] or 0.0))
    return {number: [box for _, box in those[: top or None]] for number, those in found.items()}


def candidates_of(truth: Corners, proposed: Sequence[Corners], seed: tuple[int, ...]) -> tuple[list[Corners], bool]:
    """The boxes to choose among, in drawn order, and whether none overlapped the truth by 0.5, which was then added.

    Paper: §4.3
    """
    lacking = not proposed or bool(overlaps(truth, proposed).max() < ENOUGH)
    boxes = [*proposed, truth] if lacking else list(proposed)
    order = np.random.default_rng(seed).permutation(len(boxes)).tolist()
    return [boxes[k] for k in order], lacking


# ---------------------------------------------------------------------------------------------------------------------
# COCO


class CocoRec(AnnotatedTask, ChoosingTask):
    """Up to three questions per image: a class, place, size or colour that is true of only one of five objects."""

    name: ClassVar[str] = "coco_rec"
    summary: ClassVar[str] = "the box that an expression refers to, among five annotated ones; needs no RefCOCOg"
    by: ClassVar[tuple[str, ...]] = ("kind", "category")

    def read_items(self) -> list[Item]:
        """Questions by image, in their first wording."""
        images = self.annotated()
        if self.limit:  # up to the last that is asked about; its questions follow from its place among all
            usable = (place for place, image in enumerate(images, 1) if len(View(image).askable) >= LOCATED_AMONG)
            images = images[: max(islice(usable, self.limit), default=0)]
        colours = {k: v for image in images for k, v in read_colours(image).items()}
        items = []
        turn: Counter[int] = Counter()
        for each in dev_questions(images, "locate", self.seed, colours):
            image = each.image
            turn[image.image_id] += 1
            items.append(
                self.item(
                    each.regions,
                    expression=each.expression,
                    id=f"{image.image_id}-{turn[image.image_id]}",
                    image=image.path,
                    image_id=image.image_id,
                    size=(image.width, image.height),
                    question=each.text,
                    truth=each.answer,
                    groups={"kind": each.kind, "category": each.category},
                    detail={"right": parse_region_answer(each.answer), "chance": 1 / len(each.regions)},
                )
            )
        if not items:
            raise DataError(f"{self.data}: no image has at least five objects; {self.left_out.summary()}")
        return items

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """The region that the expression was made from is correct."""
        protocols = {
            name: scored(items, picked, [k == item.detail["right"] for item, k in zip(items, picked, strict=True)])
            for name, picked in chosen(items, answers).items()
        }
        return Measured(
            protocols=protocols,
            pinned={
                "split": self.split,
                "expressions": f"of annotations, seed {self.seed}, with colours",
                "candidates": "five objects of the image, drawn by the seed, crowds aside",
                **{f"protocol {name}": RULES[name] for name in protocols},
            },
        )

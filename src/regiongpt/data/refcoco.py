"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that single out one object of an image.

Read from ``refs(...).p`` with its ``instances.json``, or from JSON in COCO's layout. Paper: §3.2, Table 1
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

import numpy as np
from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator

from regiongpt.data.coco import InstancesFile, ObjectAnnotation, is_crowd
from regiongpt.data.reading import (
    APART,
    Expression,
    ImageName,
    Row,
    Side,
    Whole,
    Xywh,
    check_image,
    clipped_box,
    iter_arrays,
    load_plain_pickle,
    overlaps,
    plain_text,
)
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Fault, Rejects
from regiongpt.data.sources import Converter
from regiongpt.environment import progress
from regiongpt.errors import DataError, short
from regiongpt.prompts import NO_MATCH, region_answer
from regiongpt.regions import Region

PARTITIONS: Final = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
"""Partitions of each data set, the most common one first. An image may be in ``train`` of one and in
``val`` of another, so a conversion reads one partition, and its name is part of every record's id."""
SAME_OBJECT: Final = 0.9
"""Intersection over union from which two boxes count as one object annotated twice."""


Refs = dict[int, dict[int, list[tuple[int, str]]]]
"""The ids and words of expressions, by image and by the object that they refer to."""


class Scene(NamedTuple):
    """An image with its annotated objects by their ids."""

    path: str
    width: int
    height: int
    objects: dict[int, ObjectAnnotation]


class _RefRow(Row):
    split: str
    ref_id: Whole
    ann_id: Whole
    image_id: Whole
    sentences: list[Any]


class _SentenceRow(Row):
    sent_id: Whole
    sent: Expression


class _ExpressionRow(Row):
    """An "image" of the layout of COCO: one expression."""

    id: Whole
    original_id: Whole | None = None
    file_name: ImageName
    width: Side
    height: Side
    caption: Expression
    dataset_name: str = ""


class _ObjectRow(Row):
    image_id: Whole
    id: Whole
    original_id: Whole | None = None
    category_id: Whole
    bbox: Xywh
    iscrowd: Any = None


class _CategoryRow(Row):
    id: Whole
    name: Annotated[str, BeforeValidator(lambda value: plain_text(value, "category name"))]


def read_pickle(path: Path, split: str, rejects: Rejects) -> Refs:
    """The objects of one split that a ``refs(...).p`` refers to; DataError if there are none."""
    entries = load_plain_pickle(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of references, got {short(entries)}; give a refs(...).p")
    refs: Refs = {}
    seen: set[int] = set()
    splits: set[str] = set()
    for place, entry in enumerate(entries):
        with rejects.noting(path, place):
            row = _RefRow.read(entry)
            splits.add(row.split)
            if row.split != split:
                continue
            if row.ref_id in seen:
                raise Fault("duplicate id", f"expected each ref_id once, got {row.ref_id} again")
            seen.add(row.ref_id)
            for k, given in enumerate(row.sentences):
                with rejects.noting(path, f"{row.ref_id}[{k}]"):
                    said = _SentenceRow.read(given)
                    refs.setdefault(row.image_id, {}).setdefault(row.ann_id, []).append((said.sent_id, said.sent))
    if split not in splits:
        raise DataError(f"{path}: no references of the split {split!r}; give --split {'|'.join(sorted(splits))}")
    return refs


def read_json(path: Path, dataset: str, rejects: Rejects) -> tuple[Refs, dict[int, Scene]]:
    """The objects that a JSON file in COCO's layout refers to, and what the file says of the images.

    Each of its ``images`` is one expression, its ``caption``; the image's id is ``original_id``. Its annotation is the
    object, whose id in COCO is ``original_id`` too. DataError if the file is of another layout or data set.
    """
    said: dict[int, _ExpressionRow] = {}
    shown: dict[int, _ObjectRow] = {}
    categories: dict[int, _CategoryRow] = {}
    tables: dict[str, tuple[type[Row], dict[int, Any], str]] = {
        "images": (_ExpressionRow, said, "id"),
        "annotations": (_ObjectRow, shown, "image_id"),
        "categories": (_CategoryRow, categories, "id"),
    }
    for key, entry in iter_arrays(path, tuple(tables)):
        kind, known, name = tables[key]
        with rejects.noting(path, key):
            row = kind.read(entry)
            number = getattr(row, name)
            if number in known:
                raise Fault("duplicate id", f"expected {name} {number} once in {key}, got it again")
            known[number] = row
            if isinstance(row, _ExpressionRow) and row.dataset_name not in ("", dataset):
                got = short(row.dataset_name)
                raise DataError(f"{path}: expected expressions of {dataset!r}, got {got}; give --dataset")
    refs: Refs = {}
    scenes: dict[int, Scene] = {}
    for number, expression in said.items():
        with rejects.noting(path, number):
            drawn = shown.get(number)
            if drawn is None or drawn.category_id not in categories:
                raise Fault(APART, "expected the annotation of an expression, with a category of the file, found none")
            image_id = number if expression.original_id is None else expression.original_id
            ann_id = drawn.id if drawn.original_id is None else drawn.original_id
            frame = (expression.file_name, expression.width, expression.height)
            box = clipped_box(drawn.bbox, *frame[1:])
            name, crowd = categories[drawn.category_id].name, bool(is_crowd(drawn.iscrowd))
            one = ObjectAnnotation(id=ann_id, category=name, box=box, iscrowd=crowd)
            scenes.setdefault(image_id, Scene(*frame, {})).objects.setdefault(ann_id, one)
            refs.setdefault(image_id, {}).setdefault(ann_id, []).append((number, expression.caption))
    return refs, scenes


def read_instances(path: Path, wanted: set[int], rejects: Rejects) -> dict[int, Scene]:
    """The wanted images of an ``instances.json`` with their objects, by their ids."""
    file = InstancesFile(path, rejects, crowds="keep", wanted=wanted)
    scenes: dict[int, Scene] = {}
    for image, found in file.by_image():
        objects = {each.id: file.annotation(each) for each in found}
        scenes[image.id] = Scene(image.path, image.width, image.height, objects)
    return scenes


class RefCocoConverter(Converter):
    """One split of one of the three data sets.

    ``caption`` asks for an expression of each object: a dialogue an image, with a second and third for the further
    expressions. ``locate`` asks which of several regions an expression means: a record an expression, whose regions are
    the object and others of its image in a random order. Among the others there is never a crowd, nor what the
    expression might mean as well: an object annotated twice, or one that somebody referred to by the same words.
    """

    name: ClassVar[str] = "refcoco"
    summary: ClassVar[str] = "RefCOCO, RefCOCO+, RefCOCOg: captions of regions, and expressions to choose a region by"

    refs: Path
    """refs(unc).p, refs(google).p or refs(umd).p, or a JSON file such as finetune_refcocog_train.json."""
    instances: Path | None = None
    """instances.json of the data set; required with refs(...).p."""
    dataset: Literal["refcoco", "refcoco+", "refcocog"] = "refcocog"
    """refcoco, refcoco+ or refcocog."""
    partition: str = ""
    """unc, google or umd, if the file name of refs(...).p does not say."""
    split: str = "train"
    """The one split to convert: train, val, test, testA or testB."""
    task: Literal["caption", "locate", "both"] = "both"
    """caption, locate or both."""
    candidates: Annotated[int, Field(ge=2)] = 8
    """Most regions to choose among."""
    no_match_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of questions without the correct region among the choices."""
    seed: NonNegativeInt = 0
    """Random seed."""
    check_images: bool = True
    """Skip images that are missing or have another size."""

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if not self._is_json and self.instances is None:
            raise ValueError(f"instances: give the instances.json that belongs to {self.refs.name}")
        if self._partition not in PARTITIONS[self.dataset]:
            wanted, got = " and ".join(PARTITIONS[self.dataset]), f"{self._partition or 'none'} (file {self.refs.name})"
            raise ValueError(f"partition: {self.dataset} has {wanted}, got {got}; give --dataset, or --partition")
        # A json holds one split, which its name alone tells.
        named = re.search(r"_(train|val|test[AB]?)(?=[_.])", self.refs.name) if self._is_json else None
        if named and named[1] != self.split:
            raise ValueError(f"split: the file {self.refs.name} holds {named[1]}, got {self.split}")
        return self

    @property
    def _is_json(self) -> bool:
        return self.refs.suffix.lower() == ".json"

    @property
    def _partition(self) -> str:
        if self.partition or self._is_json:
            return self.partition or PARTITIONS[self.dataset][0]
        named = re.search("unc|google|umd", self.refs.name)
        return named[0] if named else ""

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """The records of each image, in the order in which images come up in ``refs``."""
        scenes: dict[int, Scene] = {}
        if self._is_json:
            refs, scenes = read_json(self.refs, self.dataset, rejects)
        else:
            refs = read_pickle(self.refs, self.split, rejects)
        if self.instances is not None:
            scenes = read_instances(self.instances, set(refs), rejects)
        frame = (self.instances or self.refs).name
        matched = not refs
        for number, of_image in progress(refs.items(), self.name, "images", len(refs)):
            with rejects.noting(self.refs, number):
                if (scene := scenes.get(number)) is None:
                    raise Fault(APART, f"expected image {number} in {frame}, found none")
                usable: dict[int, list[tuple[int, str]]] = {}
                for ann_id, expressions in of_image.items():
                    with rejects.noting(self.refs, ann_id):
                        if ann_id not in scene.objects:
                            raise Fault(APART, f"expected annotation {ann_id} of image {number} in {frame}, found none")
                        usable[ann_id] = expressions
                matched |= bool(usable)
                if self.check_images:
                    check_image(self.images / scene.path, scene.width, scene.height)
                if self.task != "locate":
                    yield from self._captions(number, scene, usable)
                if self.task != "caption":
                    yield from self._choices(number, scene, usable, rejects)
        if not matched:
            raise DataError(f"{self.refs}: {frame} has none of its objects; give the instances.json of the same data")

    def _captions(self, number: int, scene: Scene, refs: dict[int, list[tuple[int, str]]]) -> Iterator[Record]:
        for turn in range(max(map(len, refs.values()), default=0)):
            asked = {ann_id: said[turn][1] for ann_id, said in refs.items() if len(said) > turn}
            turns = [Turn(task="caption", answer=text, regions=(k,)) for k, text in enumerate(asked.values(), 1)]
            yield self._record(f"{number}-{turn + 1}/caption", scene, list(asked), turns)

    def _choices(
        self, number: int, scene: Scene, refs: dict[int, list[tuple[int, str]]], rejects: Rejects
    ) -> Iterator[Record]:
        meant: dict[str, set[int]] = {}
        for ann_id, expressions in refs.items():
            for _, text in expressions:
                meant.setdefault(text.lower(), set()).add(ann_id)
        for ann_id, expressions in refs.items():
            rest = [each for each, one in sorted(scene.objects.items()) if not one.iscrowd and each != ann_id]
            shared = overlaps(scene.objects[ann_id].box, [scene.objects[each].box for each in rest])
            apart = [each for each, share in zip(rest, shared, strict=True) if share < SAME_OBJECT]
            for sent_id, text in expressions:
                others = [each for each in apart if each not in meant[text.lower()]]
                if not others:
                    reason = f"expected another object in image {number} beside {ann_id}, found none"
                    rejects.add("no other region to choose", self.refs, sent_id, reason)
                    continue
                rng = np.random.default_rng((self.seed, number, ann_id, sent_id))
                matches = bool(rng.random() >= self.no_match_share)
                drawn = rng.permutation(others).tolist()[: self.candidates - matches]
                options = rng.permutation([ann_id, *drawn] if matches else drawn).tolist()
                answer = region_answer(options.index(ann_id) + 1) if matches else NO_MATCH
                numbers = tuple(range(1, len(options) + 1))
                turn = Turn(task="locate", answer=answer, regions=numbers, expression=text, guided=True)
                yield self._record(f"{sent_id}/locate", scene, options, [turn])

    def _record(self, key: str, scene: Scene, ann_ids: list[int], turns: list[Turn]) -> Record:
        regions = []
        for number in ann_ids:
            one, source_id = scene.objects[number], str(number) if number >= 0 else ""
            regions.append(RecordRegion(region=Region.box(*one.box), category=one.category, source_id=source_id))
        place = f"{self.dataset}-{self._partition}/{self.split}"
        return self.record(f"{place}/{key}", scene.path, (scene.width, scene.height), regions, turns)

"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that single out one object of an image.

Read from the original ``refs(...).p`` with its ``instances.json``, or from the json files in COCO's layout that later
work made of them, in which each expression is an "image" of its own. They say two things: how a region is captioned,
and which of several regions an expression means.

Paper: §3.2, Table 1
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from regiongpt.console import progress
from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.images import check_image
from regiongpt.data.convert.refcoco_files import Expression, Ref, Scene, read_instances, read_json, read_pickle
from regiongpt.data.convert.values import APART, Corners
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Fault, Rejects
from regiongpt.errors import DataError
from regiongpt.prompts import NO_MATCH, region_answer
from regiongpt.regions import Region

PARTITIONS: Final = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
"""Who divided each data set into splits, the one in common use first.

An image may be in ``train`` of one and in ``val`` of another, so a conversion reads one partition, and its name is part
of every record's id.
"""
SAME_OBJECT: Final = 0.9
"""Intersection over union from which two boxes count as one object annotated twice."""


class RefCocoConverter(Converter):
    """One split of one of the three data sets.

    ``caption`` asks for an expression of each object: a dialogue an image, in which every object comes once; objects
    with further expressions get a second and third dialogue. ``locate`` asks which of several regions an expression
    means: a record an expression, whose regions are the object and others of its image in an order drawn by the seed.
    Among the others there is never a crowd, nor what the expression might mean as well: an object that was annotated
    twice, or one that somebody referred to by the same words.
    """

    name: ClassVar[str] = "refcoco"
    summary: ClassVar[str] = "RefCOCO, RefCOCO+, RefCOCOg: captions of regions, and expressions to choose a region by"

    refs: Path
    """refs(unc).p, refs(google).p or refs(umd).p; or a json such as finetune_refcocog_train.json."""
    instances: Path | None = None
    """instances.json of the data set; a refs(...).p needs it, a json takes all objects from it."""
    dataset: Literal["refcoco", "refcoco+", "refcocog"] = "refcocog"
    """refcoco, refcoco+ or refcocog."""
    partition: str = ""
    """unc, google or umd, where the name of a refs(...).p does not say it."""
    split: str = "train"
    """The one split to convert: train, val, test, testA or testB."""
    task: Literal["caption", "locate", "both"] = "both"
    """caption, locate or both."""
    candidates: Annotated[int, Field(ge=2)] = 8
    """Most regions to choose among."""
    no_match_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the choices from which the right region is left out."""
    check_images: bool = True
    """Leave out images that are missing or of another size."""

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if not self._is_json and self.instances is None:
            raise ValueError(f"instances: give the instances.json that belongs to {self.refs.name}")
        if self._partition not in PARTITIONS[self.dataset]:
            raise ValueError(
                f"partition: {self.dataset} has {' and '.join(PARTITIONS[self.dataset])}, got "
                f"{self._partition or 'none'} (file {self.refs.name}); give --dataset, or --partition"
            )
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

    def inputs(self) -> list[Path]:
        """The files that are given."""
        return [self.refs] if self.instances is None else [self.refs, self.instances]

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """The records of each image, in the order in which images come up in ``refs``."""
        scenes: dict[int, Scene] = {}
        if self._is_json:
            refs, scenes = read_json(self.refs, self.dataset, rejects)
        else:
            refs = read_pickle(self.refs, self.split, rejects)
        frame = self.refs
        if self.instances is not None:
            frame = self.instances
            scenes = read_instances(frame, set(refs), rejects)
        matched = False
        for number, of_image in progress(refs.items(), self.name, "images", len(refs)):
            with rejects.noting(self.refs, number):
                if number not in scenes:
                    found = f"found none; it has {len(of_image)} object(s)"
                    raise Fault(APART, f"expected image {number} in {frame.name}, {found}")
                scene = scenes[number]
                usable: list[Ref] = []
                for ref in of_image:
                    with rejects.noting(self.refs, ref.ann_id):
                        if ref.ann_id in scene.faulty:
                            reason = f"expected annotation {ref.ann_id} to be usable, but {frame.name} is at fault"
                            raise Fault("expression of an unusable annotation", reason)
                        if ref.ann_id not in scene.objects:
                            reason = f"expected annotation {ref.ann_id} of image {number} in {frame.name}, found none"
                            raise Fault(APART, reason)
                        usable.append(ref)
                matched = matched or any(r.ann_id in scene.faulty or r.ann_id in scene.objects for r in of_image)
                if self.check_images:
                    check_image(self.images / scene.path, scene.width, scene.height)
                if self.task != "locate":
                    yield from self._captions(number, scene, usable)
                if self.task != "caption":
                    yield from self._choices(number, scene, usable, rejects)
        if refs and not matched:
            raise DataError(
                f"{self.refs}: expected its objects in {frame}, which has none of them; "
                "give the instances.json of the same data set"
            )

    def _captions(self, number: int, scene: Scene, refs: list[Ref]) -> Iterator[Record]:
        for turn in range(max((len(ref.expressions) for ref in refs), default=0)):
            asked = [ref for ref in refs if len(ref.expressions) > turn]
            turns = [
                Turn(task="caption", answer=ref.expressions[turn].text, regions=(place,))
                for place, ref in enumerate(asked, 1)
            ]
            yield self._record(f"{number}-{turn + 1}/caption", scene, [ref.ann_id for ref in asked], turns)

    def _choices(self, number: int, scene: Scene, refs: list[Ref], rejects: Rejects) -> Iterator[Record]:
        meant: dict[str, set[int]] = {}
        for ref in refs:
            for expression in ref.expressions:
                meant.setdefault(expression.text.lower(), set()).add(ref.ann_id)
        for ref in refs:
            box = scene.objects[ref.ann_id].box
            apart = [
                each
                for each, other in sorted(scene.objects.items())
                if not other.crowd and each != ref.ann_id and _overlap(box, other.box) < SAME_OBJECT
            ]
            for expression in ref.expressions:
                others = [each for each in apart if each not in meant[expression.text.lower()]]
                if others:
                    yield self._choice(number, scene, ref, expression, others)
                else:
                    reason = f"expected another object in image {number} beside {ref.ann_id}, found none"
                    rejects.add("no other region to choose", self.refs, expression.id, reason)

    def _choice(self, number: int, scene: Scene, ref: Ref, expression: Expression, others: list[int]) -> Record:
        rng = np.random.default_rng((self.seed, number, ref.ann_id, expression.id))
        matches = bool(rng.random() >= self.no_match_share)
        drawn = rng.permutation(others).tolist()[: self.candidates - matches]
        options = rng.permutation([ref.ann_id, *drawn] if matches else drawn).tolist()
        turn = Turn(
            task="locate",
            answer=region_answer(options.index(ref.ann_id) + 1) if matches else NO_MATCH,
            regions=tuple(range(1, len(options) + 1)),
            expression=expression.text,
            guided=True,
        )
        return self._record(f"{expression.id}/locate", scene, options, [turn])

    def _record(self, key: str, scene: Scene, ann_ids: list[int], turns: list[Turn]) -> Record:
        return Record(
            id=f"{self.name}/{self.dataset}-{self._partition}/{self.split}/{key}",
            source=self.name,
            image=scene.path,
            width=scene.width,
            height=scene.height,
            regions=tuple(
                RecordRegion(
                    region=Region.box(*scene.objects[ann_id].box),
                    category=scene.objects[ann_id].category,
                    source_id=str(ann_id),
                )
                for ann_id in ann_ids
            ),
            turns=tuple(turns),
        )


def _overlap(one: Corners, other: Corners) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (one, other)]
    return width * height / (sum(areas) - width * height)

"""Class of a region: ground-truth boxes or masks of COCO, LVIS or any file in COCO's format.

Paper: §4.1, Table 3
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np

from regiongpt.data.coco import InstancesFile, crowd_hint
from regiongpt.data.shards import many
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.bootstrap import Statistic, mean_statistic
from regiongpt.evaluate.detection import FREQUENCIES, MOST_RESAMPLES, Federated, detection_scores
from regiongpt.evaluate.task import (
    Answer,
    InstancesTask,
    Item,
    Measured,
    Rows,
    Scored,
    given,
    images_of,
    listed,
    printed,
    size_name,
)
from regiongpt.prompts import LABEL_SETS, question
from regiongpt.regions import Region

MATCH: Final = "generate and match"
PROBABLE: Final = "generate with probability"
SCORED: Final = "score all choices"
RULES: Final = {
    MATCH: "the generated answer must be a name of the list as it stands; off the list it is wrong and no detection; "
    "every detection has the score 1",
    PROBABLE: "the same answers, each detection with the probability that the model gave to the text",
    SCORED: "the likelihoods of all names, normalised over the list; every name is a detection with its probability",
}
"""Protocols."""


class CocoClassification(InstancesTask):
    """One question for each annotated object, crowds aside, about its box or its mask alone.

    The names are the file's categories in the order of their ids. With ``label_set`` the question names the closed
    set, as in training.
    """

    name: ClassVar[str] = "coco_cls"
    summary: ClassVar[str] = "classes of ground-truth regions: accuracy and AP by three protocols (Table 3)"
    item_id: ClassVar[str] = "annotation id"
    reads: ClassVar[tuple[str, ...]] = ("text", "scores")
    by: ClassVar[tuple[str, ...]] = ("size", "category")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {MATCH: printed("classification", AP="mAP", accuracy="Acc")}

    region: Literal["box", "mask"] = "box"
    """Regions to ask about; with mask, objects without one are skipped."""
    crowds: bool = False
    """Include crowds (some tools mark every mask as one)."""
    label_set: str = "COCO-80"
    """Name of the closed set in the question."""
    guided: bool = True
    """End the question by naming the closed set."""
    choices: bool = True
    """Also score all names; slow for a long list."""

    def inputs(self) -> list[Path]:
        """The annotations."""
        return [self.file]

    def read_items(self) -> list[Item]:
        """One item per object, by image and annotation id."""
        folder = self.folder
        crowds: Literal["take", "leave out"] = "take" if self.crowds else "leave out"
        file = InstancesFile(self.file, self.left_out, shapes=self.region, folder=folder, crowds=crowds)
        ids = sorted(file.names)
        names = [file.names[number] for number in ids]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ConfigError(f"{file.path}: categories of the same name: {', '.join(repeated)}; rename them")
        known = LABEL_SETS.get(self.label_set)
        if self.guided and known and (foreign := sorted(set(names) - set(known))):
            raise ConfigError(
                f"{file.path}: {self.label_set} has no category {listed(foreign, 3)}; name the closed set with "
                "--label-set"
            )
        groups: dict[int, list[dict[str, Any]]] = {}
        for number, category, bbox, area in file.groups:
            group = {"bbox": bbox, "category_id": category, "area": bbox[2] * bbox[3] if isnan(area) else area}
            groups.setdefault(number, []).append(group)
        shared = {"ids": dict(zip(names, ids, strict=True)), "federated": file.federated}
        text = question("classify", 0, regions=[1], label_set=self.label_set, guided=self.guided)
        items = []
        for place, number, category, box, area, _, mask in file.objects:
            region = Region.box(*box) if self.region == "box" else mask.region()
            if region is None:
                continue
            x0, y0, x1, y1 = box
            area = (x1 - x0) * (y1 - y0) if isnan(area) else area
            image, name = file.images[place], file.names[category]
            items.append(
                Item(
                    id=str(file.name_of(number)),
                    image=folder / image.path,
                    image_id=file.name_of(image.id),
                    size=(image.width, image.height),
                    question=text,
                    regions=(region,),
                    choices=tuple(names) if self.choices else (),
                    max_new_tokens=16,
                    truth=name,
                    groups={"category": name, "size": size_name(area)},
                    detail={
                        "box": [x0, y0, x1 - x0, y1 - y0],
                        "area": area,
                        "crowds": groups.get(image.id, []),
                        **shared,
                    },
                )
            )
        if not items:
            hint = crowd_hint(self.left_out)
            raise DataError(f"{file.path}: no objects to ask about; {self.left_out.summary()}{hint}")
        return items

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """All protocols that the answers allow: only the first without probabilities and scores."""
        ids: dict[str, int] = items[0].detail["ids"]
        names, rules = list(ids), items[0].detail["federated"]
        texts, sure, rated = (given(items, answers, kind) for kind in ("text", "probability", "scores"))
        said = [read_name(text or "", ids) for text in texts]
        unsure = [item.id for item, text, p in zip(items, texts, sure, strict=True) if text is not None and p is None]
        worded = sum(text is not None for text in texts)
        found: dict[str, tuple[list[str | None], list[dict[str, Any]]]] = {}
        if worded:
            named = [(item, ids[name], p) for item, name, p in zip(items, said, sure, strict=True) if name]
            found[MATCH] = said, [_detection(item, number, 1.0) for item, number, _ in named]
            if not unsure:
                found[PROBABLE] = said, [_detection(*each) for each in named]
        if any(scores is not None for scores in rated):
            found[SCORED] = (
                [names[int(np.argmax(scores))] if scores else None for scores in rated],
                [
                    _detection(item, number, score)
                    for item, scores in zip(items, rated, strict=True)
                    for number, score in zip(ids.values(), scores or (), strict=bool(scores))
                ],
            )
        truth, of = _truth(items, ids), _counts(items, ids)
        protocols = {}
        for protocol, (answered, detections) in found.items():
            right = [float(name == item.truth) for name, item in zip(answered, items, strict=True)]
            precision = detection_scores(truth, detections, federated=Federated(**rules) if rules is not None else None)
            protocols[protocol] = Scored(
                statistics={**_accuracies(items, right, answered), **precision.statistics},
                scores={"accuracy": right},
                of=of,
                by_group={"category": {name: {"AP": precision.by_category.get(ids[name])} for name in names}},
            )
        notes = []
        if 0 < len(unsure) < worded:
            count = many(len(unsure), "answer")
            notes.append(
                f"{PROBABLE!r} is not measured: {count} without a probability ({self.item_id}s {listed(unsure)})"
            )
        off = Counter(text for text, name in zip(texts, said, strict=True) if text is not None and name is None)
        if off:
            most = ", ".join(f"{text!r} ({count})" for text, count in off.most_common(5))
            notes.append(f"{many(off.total(), 'answer')} not in the list, most often {most}")
        return Measured(
            protocols=protocols,
            pinned=self._pinned(len(names), rules is not None),
            tables={
                f"Confusion matrix, {name}": _confusions(items, answered)
                for name, (answered, _) in found.items()
                if name != PROBABLE
            },
            notes=notes,
        )

    def _pinned(self, names: int, lvis: bool) -> dict[str, str]:
        rules = "by LVIS' rules, restated on COCOeval of pycocotools," if lvis else "COCOeval of pycocotools"
        return {
            "split": self.split if self.annotations is None else self.annotations.name,
            "regions": f"ground-truth {'boxes' if self.region == 'box' else 'masks'}, one a question, crowds "
            f"{'among them' if self.crowds else 'aside'}",
            "prompt": f"guided, {self.label_set}" if self.guided else "not guided",
            "closed set": f"{names} categories of the annotations",
            "matching": "as it stands",
            "scorer": f"{rules} on the boxes; at most {MOST_RESAMPLES} resamples for its intervals",
            **{f"protocol {name}": rule for name, rule in RULES.items()},
        }


def read_name(text: str, names: Mapping[str, object]) -> str | None:
    """The name in an answer, without spaces and a final full stop; None if it is not in the list."""
    answer = " ".join(text.split())
    # A name may end in a full stop of its own.
    return next((form for form in (answer, answer.removesuffix(".").strip()) if form in names), None)


def _detection(item: Item, category: int, score: float) -> dict[str, Any]:
    return {"image_id": item.image_id, "category_id": category, "bbox": item.detail["box"], "score": score}


def _truth(items: Sequence[Item], ids: Mapping[str, int]) -> dict[str, Any]:
    """The objects asked about, and the crowds of their images, as the COCO API takes them."""
    annotations = [
        {**_detection(item, ids[item.truth], 1.0), "area": item.detail["area"], "iscrowd": 0} for item in items
    ]
    for image_id, crowds in {item.image_id: item.detail["crowds"] for item in items}.items():
        annotations += [{**crowd, "image_id": image_id, "iscrowd": 1} for crowd in crowds]
    return {
        "images": [{"id": image_id} for image_id in dict.fromkeys(images_of(items))],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def _accuracies(items: Sequence[Item], right: Sequence[float], answered: Sequence[str | None]) -> dict[str, Statistic]:
    images = images_of(items)
    result: dict[str, Statistic] = {
        "accuracy": mean_statistic(images, right),
        "class_average": mean_statistic(images, right, [item.truth for item in items]),
        "valid_answers": mean_statistic(images, [float(name is not None) for name in answered]),
    }
    others = [k for k, item in enumerate(items) if item.truth != "person"]
    if 0 < len(others) < len(items):
        result["without_person"] = mean_statistic([images[k] for k in others], [right[k] for k in others])
    return result


def _counts(items: Sequence[Item], ids: Mapping[str, int]) -> dict[str, int]:
    """Number of items of a result, if not all."""
    found = Counter(f"AP_{item.groups['size']}" for item in items)
    found["without_person"] = sum(item.truth != "person" for item in items)
    if (known := items[0].detail["federated"]) is not None:
        found.update(FREQUENCIES[known["frequency"][ids[item.truth]]] for item in items)
    names = ("AP_small", "AP_medium", "AP_large", "without_person", *FREQUENCIES.values())
    return {name: found[name] for name in names}


def _confusions(items: Sequence[Item], said: Sequence[str | None]) -> Rows:
    """Confusion matrix: a row per category that occurs, a column per answered name."""
    counts = Counter((item.truth, name) for item, name in zip(items, said, strict=True))
    down, across = (
        [name for name in items[0].detail["ids"] if name in those] for those in map(set, zip(*counts, strict=True))
    )
    return [
        ["category", *across, "off the list"],
        *([name, *(str(counts[name, other]) for other in (*across, None))] for name in down),
    ]

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
from regiongpt.evaluate.bootstrap import mean_statistic
from regiongpt.evaluate.detection import FREQUENCIES, MOST_RESAMPLES, Federated, detection_scores
from regiongpt.evaluate.task import (
    Answer,
    Item,
    Measured,
    Scored,
    Task,
    find,
    given,
    images_of,
    listed,
    size_name,
)
from regiongpt.prompts import LABEL_SETS, question
from regiongpt.regions import Region

MATCH: Final = "generate and match"
PROBABLE: Final = "generate with probability"
SCORED: Final = "score all choices"


class CocoClassification(Task):
    """One question for each annotated object, crowds aside, about its box or its mask alone.

    The names are the file's categories in the order of their ids. With ``label_set`` the question names the closed
    set, as in training.
    """

    name: ClassVar[str] = "coco_cls"
    summary: ClassVar[str] = "classes of ground-truth regions: accuracy and AP by three protocols (Table 3)"
    by: ClassVar[tuple[str, ...]] = ("size", "category")

    split: str = "val2017"
    """Split of the annotations: instances_SPLIT.json."""
    annotations: Path | None = None
    """Annotations file, if not in the folder."""
    images: Path | None = None
    """Folder of the images, if not in the folder."""
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
        names = [f"annotations/instances_{self.split}.json", f"instances_{self.split}.json", f"{self.split}.json"]
        return [find(self.annotations, self.data, names, "annotations")]

    def read_items(self) -> list[Item]:
        """One item per object, by image and annotation id."""
        folder = find(self.images, self.data, [self.split, "images", "."], "images", file=False)
        crowds: Literal["take", "leave out"] = "take" if self.crowds else "leave out"
        file = InstancesFile(self.inputs()[0], self.left_out, shapes=self.region, folder=folder, crowds=crowds)
        ids = sorted(file.names)
        names = [file.names[number] for number in ids]
        known = LABEL_SETS.get(self.label_set)
        if self.guided and known and (foreign := sorted(set(names) - set(known))):
            wrong = f"{self.label_set} has no category {listed(foreign, 3)}"
            raise ConfigError(f"{file.path}: {wrong}; name the closed set with --label-set")
        groups: dict[int, list[dict[str, Any]]] = {}  # crowds by image
        for number, category, bbox, area in file.groups:
            group = {"bbox": bbox, "category_id": category, "area": bbox[2] * bbox[3] if isnan(area) else area}
            groups.setdefault(number, []).append(group)
        shared = {"ids": dict(zip(names, ids, strict=True)), "federated": file.federated}
        text = question("classify", 0, regions=[1], label_set=self.label_set, guided=self.guided)
        items = []
        for place, number, category, box, area, _, mask in file.objects:
            region = Region.box(*box) if self.region == "box" else mask.region()
            assert region is not None, "objects without a mask are left out"
            width, height = box[2] - box[0], box[3] - box[1]
            area = width * height if isnan(area) else area
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
                    sure=True,
                    max_new_tokens=16,
                    truth=name,
                    groups={"category": name, "size": size_name(area)},
                    detail={
                        "object": {"category_id": category, "bbox": [*box[:2], width, height], "area": area},
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
        names, federated = list(ids), items[0].detail["federated"]
        texts, sure, rated = (given(items, answers, kind) for kind in ("text", "probability", "scores"))
        said = [read_name(text or "", ids) for text in texts]
        named = [(item, ids[name], p) for item, name, p in zip(items, said, sure, strict=True) if name]
        unsure = [item.id for item, _, p in named if p is None]
        found: dict[str, tuple[list[str | None], list[dict[str, Any]]]] = {}
        if any(text is not None for text in texts):
            found[MATCH] = said, [_detection(item, number, 1.0) for item, number, _ in named]
            if named and not unsure:
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
        truth, images = _truth(items, ids), images_of(items)
        rules = Federated(**federated) if federated is not None else None
        of = Counter(dict.fromkeys(("AP_small", "AP_medium", "AP_large", *FREQUENCIES.values()), 0))
        of.update(f"AP_{item.groups['size']}" for item in items)
        if rules:
            of.update(FREQUENCIES[rules.frequency[ids[item.truth]]] for item in items)
        protocols = {}
        for protocol, (answered, detections) in found.items():
            right = [float(name == item.truth) for name, item in zip(answered, items, strict=True)]
            statistics = {
                "accuracy": mean_statistic(images, right),
                "class_average": mean_statistic(images, right, [item.truth for item in items]),
                "valid_answers": mean_statistic(images, [float(name is not None) for name in answered]),
                **detection_scores(truth, detections, rules).statistics,
            }
            protocols[protocol] = Scored(statistics=statistics, scores={"accuracy": right}, of=of)
        notes = []
        if 0 < len(unsure) < len(named):
            without = f"{many(len(unsure), 'answer')} without a probability ({listed(unsure)})"
            notes.append(f"{PROBABLE!r} is not measured: {without}")
        off = Counter(text for text, name in zip(texts, said, strict=True) if text is not None and name is None)
        if off:
            most = ", ".join(f"{text!r} ({count})" for text, count in off.most_common(5))
            notes.append(f"{many(off.total(), 'answer')} not in the list, most often {most}")
        answered = next(iter(found.values()))[0] if found else []
        pairs = Counter((item.truth, name) for item, name in zip(items, answered, strict=bool(found)) if name)
        if wrong := [f"{a} as {b} ({count})" for (a, b), count in pairs.most_common() if a != b]:
            notes.append(f"most often confused: {', '.join(wrong[:5])}")
        scorer = "by LVIS' rules, restated on COCOeval of pycocotools," if rules else "COCOeval of pycocotools"
        regions = f"ground-truth {'boxes' if self.region == 'box' else 'masks'}, one a question"
        pinned = {
            "split": self.split if self.annotations is None else self.annotations.name,
            "regions": f"{regions}, crowds {'among them' if self.crowds else 'aside'}",
            "prompt": f"guided, {self.label_set}" if self.guided else "not guided",
            "closed set": f"{len(names)} categories of the annotations",
            "scorer": f"{scorer} on the boxes; at most {MOST_RESAMPLES} resamples for its intervals",
        }
        return Measured(protocols=protocols, pinned=pinned, notes=notes)


def read_name(text: str, names: Mapping[str, object]) -> str | None:
    """The name in an answer, without spaces and a final full stop; None if it is not in the list."""
    answer = " ".join(text.split())
    # A name may end in a full stop of its own.
    return next((form for form in (answer, answer.removesuffix(".").strip()) if form in names), None)


def _detection(item: Item, category: int, score: float) -> dict[str, Any]:
    return {"image_id": item.image_id, "category_id": category, "bbox": item.detail["object"]["bbox"], "score": score}


def _truth(items: Sequence[Item], ids: Mapping[str, int]) -> dict[str, Any]:
    """The objects asked about, and the crowds of their images, as the COCO API takes them."""
    annotations = [{"image_id": item.image_id, **item.detail["object"], "iscrowd": 0} for item in items]
    for image_id, crowds in {item.image_id: item.detail["crowds"] for item in items}.items():
        annotations += [{**crowd, "image_id": image_id, "iscrowd": 1} for crowd in crowds]
    return {
        "images": [{"id": image_id} for image_id in dict.fromkeys(images_of(items))],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }

"""What class is a region: ground-truth boxes or masks of COCO, LVIS or any file of COCO's form.

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
from regiongpt.evaluate.metrics.bootstrap import Statistic, mean_statistic
from regiongpt.evaluate.metrics.detection import FREQUENCIES, DetectionScores, Federated, detection_scores
from regiongpt.evaluate.metrics.labels import Labels, Reading
from regiongpt.evaluate.paper import COCO, TABLES
from regiongpt.evaluate.task import (
    MOST_PRECISIONS,
    Answer,
    Figure,
    Item,
    Measured,
    Scored,
    Table,
    by_group,
    listed,
    mean_figure,
)
from regiongpt.evaluate.tasks.scoring import InstancesTask, box_area, given, images_of, size_name
from regiongpt.prompts import LABEL_SETS, question
from regiongpt.regions import Region

MATCH: Final = "generate and match"
PROBABLE: Final = "generate with probability"
SCORED: Final = "score all choices"
_RULES: Final = {
    MATCH: "the generated answer must be a name of the list as it stands; off the list it is wrong and no detection; "
    "every detection has the score 1",
    PROBABLE: "the same answers, each detection with the probability that the model gave to the text",
    SCORED: "the likelihoods of all names, normalised over the list; every name is a detection with its probability",
}
"""What each protocol counts."""


class CocoClassification(InstancesTask):
    """One question for each annotated object, crowds aside, about its box or its mask alone.

    The names are the file's categories in the order of their ids. With ``label_set`` the question names the closed
    set, as in training.
    """

    name: ClassVar[str] = "coco_cls"
    summary: ClassVar[str] = "classes of ground-truth regions: accuracy and AP under three protocols (Table 3)"
    item_id: ClassVar[str] = "annotation id"
    reads: ClassVar[tuple[str, ...]] = ("text", "scores")
    by: ClassVar[tuple[str, ...]] = ("size",)
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        MATCH: {
            "AP": TABLES["classification"].figure("mAP") / 100,
            "accuracy": TABLES["classification"].figure("Acc") / 100,
        }
    }
    paper_source: ClassVar[str] = f"Table 3, {COCO}; the paper does not say what score its detections have"

    region: Literal["box", "mask"] = "box"
    """What marks an object; one without a mask is not asked about by mask."""
    crowds: bool = False
    """Ask about what is marked as a crowd too, as some tools mark every mask."""
    label_set: str = "COCO-80"
    """Name of the closed set in the question."""
    guided: bool = True
    """End the question by naming the closed set."""
    choices: bool = True
    """Score all names too; of a long list this takes most of the time."""
    rules: Literal["auto", "coco", "lvis"] = "auto"
    """Rules of AP; auto takes LVIS' where the annotations have what these need."""
    synonyms: str = ""
    """Forgive answers: case, plural, or json files of synonyms, by commas; counted, and nothing by default."""

    def inputs(self) -> list[Path]:
        """The annotations, and the files of synonyms."""
        words = [word.strip() for word in self.synonyms.split(",")]
        return [self.file, *(Path(word) for word in words if Path(word).is_file())]

    def read_items(self) -> list[Item]:
        """One item an object, by image and annotation id."""
        folder = self.folder
        crowds: Literal["take", "leave out"] = "take" if self.crowds else "leave out"
        file = InstancesFile(self.file, self.left_out, shapes=self.region, folder=folder, crowds=crowds)
        ids = sorted(file.names)
        names = [file.names[number] for number in ids]
        Labels(names, self.synonyms)
        known = LABEL_SETS.get(self.label_set)
        if self.guided and known and (foreign := sorted(set(names) - set(known))):
            raise ConfigError(
                f"{file.path}: {self.label_set} has no category {listed(foreign, 3)}; name the closed set with "
                "--label-set"
            )
        federated = file.federated if self.rules != "coco" else None
        if self.rules == "lvis" and federated is None:
            raise DataError(
                f"{file.path}: LVIS' rules need neg_category_ids and not_exhaustive_category_ids of every image and "
                "the frequency of every category; leave out --rules lvis"
            )
        groups: dict[int, list[dict[str, Any]]] = {}
        for image, category, box, area in file.groups:
            group = {"bbox": box, "category_id": category, "area": box[2] * box[3] if isnan(area) else area}
            groups.setdefault(image, []).append(group)
        shared = {"names": names, "ids": ids, **({"federated": federated} if federated is not None else {})}
        text = question("classify", 0, regions=[1], label_set=self.label_set, guided=self.guided)
        items = []
        columns = (file.ids, file.places, file.categories, file.boxes, file.areas)
        for k, (number, place, category, box, area) in enumerate(
            zip(*(each.tolist() for each in columns), strict=True)
        ):
            region = Region.box(*box) if self.region == "box" else file.mask(k)
            if region is None:
                continue
            x0, y0, x1, y1 = box
            area = box_area(box) if isnan(area) else area
            crowd = groups.get(int(file.images[place]), [])
            items.append(
                Item(
                    id=str(file.name_of(number)),
                    image=folder / file.paths[place],
                    image_id=file.name_of(int(file.images[place])),
                    size=(int(file.widths[place]), int(file.heights[place])),
                    question=text,
                    regions=(region,),
                    choices=tuple(names) if self.choices else (),
                    max_new_tokens=16,
                    truth=file.names[category],
                    groups={"category": file.names[category], "size": size_name(area)},
                    detail={"box": [x0, y0, x1 - x0, y1 - y0], "area": area, "crowds": crowd, **shared},
                )
            )
        if not items:
            hint = crowd_hint(self.left_out)
            raise DataError(f"{file.path}: no objects to ask about; {self.left_out.summary()}{hint}")
        return items

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """All protocols that the answers allow: without probabilities and scores, the first alone."""
        names: list[str] = items[0].detail["names"]
        ids = _category_ids(items)
        labels = Labels(names, self.synonyms)
        texts, sure, rated = (given(items, answers, kind) for kind in ("text", "probability", "scores"))
        for item, scores in zip(items, rated, strict=True):
            if scores is not None and len(scores) != len(names):
                raise DataError(f"item {item.id}: {len(scores)} scores for {len(names)} names")
        readings = [labels.read(text) if text is not None else None for text in texts]
        said = [reading.name if reading else None for reading in readings]
        chosen: dict[str, list[str | None]] = {}
        detections: dict[str, list[dict[str, Any]]] = {}
        if any(text is not None for text in texts):
            chosen[MATCH] = said
            named = [(item, ids[name], p) for item, name, p in zip(items, said, sure, strict=True) if name]
            detections[MATCH] = [_detection(item, number, 1.0) for item, number, _ in named]
            if all(p is not None for text, p in zip(texts, sure, strict=True) if text is not None):
                chosen[PROBABLE] = said
                detections[PROBABLE] = [_detection(*each) for each in named]
        if any(scores is not None for scores in rated):
            chosen[SCORED] = [names[max(range(len(names)), key=s.__getitem__)] if s else None for s in rated]
            detections[SCORED] = [
                _detection(item, number, score)
                for item, scores in zip(items, rated, strict=True)
                for number, score in zip(ids.values(), scores or (), strict=bool(scores))
            ]
        if not chosen:
            raise DataError("no item has an answer with a text or with scores")
        truth, federated = _truth(items), _federated(items)
        protocols, tables = {}, []
        for protocol, answered in chosen.items():
            right = [float(name == item.truth) for name, item in zip(answered, items, strict=True)]
            found = detection_scores(truth, detections[protocol], federated=federated)
            protocols[protocol] = Scored(
                statistics=_statistics(items, right, answered, found),
                scores={"accuracy": right},
                of=lambda name: _count(items, name),
                breakdowns={"category": _by_category(items, right, found)},
            )
            if protocol != PROBABLE:
                tables.append(_confusions(items, answered, f"Confusion matrix, {protocol}"))
        return Measured(
            protocols=protocols,
            pinned=self._pinned(len(names), federated is not None),
            tables=tables,
            notes=self._notes(items, texts, sure, readings),
        )

    def _pinned(self, names: int, lvis: bool) -> dict[str, str]:
        rules = "by LVIS' rules, restated on COCOeval of pycocotools," if lvis else "COCOeval of pycocotools"
        return {
            "split": self.split if self.annotations is None else self.annotations.name,
            "regions": f"ground-truth {'boxes' if self.region == 'box' else 'masks'}, one a question, crowds "
            f"{'among them' if self.crowds else 'aside'}",
            "prompt": f"guided, {self.label_set}" if self.guided else "not guided",
            "closed set": f"{names} categories of the annotations",
            "matching": f"as it stands{f', forgiving {self.synonyms}' if self.synonyms else ''}",
            "scorer": f"{rules} on the boxes; at most {MOST_PRECISIONS} resamples for its intervals",
            **{f"protocol {name}": rule for name, rule in _RULES.items()},
        }

    def _notes(
        self,
        items: Sequence[Item],
        texts: Sequence[str | None],
        sure: Sequence[float | None],
        readings: Sequence[Reading | None],
    ) -> list[str]:
        notes = []
        forgiven = [reading for reading in readings if reading and reading.by not in ("", "as it stands")]
        kinds = {"case": "letters' case", "plural": "the plural", "synonym": "a synonym"}
        for (by, taken), count in sorted(Counter((each.by, each.name is not None) for each in forgiven).items()):
            what, answers = kinds.get(by, "letters' case and the plural"), many(count, "answer")
            if taken:
                notes.append(f"{answers} taken for a name that differs by {what} (--synonyms)")
            else:
                notes.append(f"{answers} off the list but for {what}; --synonyms {by} accepts that")
        unsure = [item.id for item, text, p in zip(items, texts, sure, strict=True) if text is not None and p is None]
        if 0 < len(unsure) < sum(text is not None for text in texts):
            notes.append(
                f"{PROBABLE!r} is not measured: {many(len(unsure), 'answer')} without a probability "
                f"({self.item_id}s {listed(unsure)})"
            )
        off = Counter(text for text, reading in zip(texts, readings, strict=True) if reading and reading.name is None)
        if off:
            most = [f"{text!r} ({count})" for text, count in off.most_common(5)]
            notes.append(f"{many(off.total(), 'answer')} off the list, most often {', '.join(most)}")
        return notes


def _federated(items: Sequence[Item]) -> Federated | None:
    known = items[0].detail.get("federated")
    if known is None:
        return None
    asked = {item.image_id for item in items}
    absent, partly = ({i: those for i, those in known[name].items() if i in asked} for name in ("absent", "partly"))
    return Federated(absent=absent, partly=partly, frequency=known["frequency"])


def _category_ids(items: Sequence[Item]) -> dict[str, int]:
    """Category id of every name of the closed set."""
    return dict(zip(items[0].detail["names"], items[0].detail["ids"], strict=True))


def _detection(item: Item, category: int, score: float) -> dict[str, Any]:
    return {"image_id": item.image_id, "category_id": category, "bbox": item.detail["box"], "score": score}


def _truth(items: Sequence[Item]) -> dict[str, Any]:
    """The objects asked about, and the crowds of their images, as the COCO API takes them."""
    ids = _category_ids(items)
    annotations = [
        {
            "image_id": item.image_id,
            "category_id": ids[item.truth],
            "bbox": item.detail["box"],
            "area": item.detail["area"],
            "iscrowd": 0,
        }
        for item in items
    ]
    for image_id, crowds in {item.image_id: item.detail["crowds"] for item in items}.items():
        annotations += [{**crowd, "image_id": image_id, "iscrowd": 1} for crowd in crowds]
    return {
        "images": [{"id": image_id} for image_id in dict.fromkeys(item.image_id for item in items)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }


def _statistics(
    items: Sequence[Item], right: Sequence[float], answered: Sequence[str | None], found: DetectionScores
) -> dict[str, Statistic]:
    images = images_of(items)
    result: dict[str, Statistic] = {
        "accuracy": mean_statistic(images, right),
        "class_average": mean_statistic(images, right, [item.truth for item in items]),
        "valid_answers": mean_statistic(images, [float(name is not None) for name in answered]),
        **found.statistics,
    }
    others = [k for k, item in enumerate(items) if item.truth != "person"]
    if 0 < len(others) < len(items):
        result["without_person"] = mean_statistic([images[k] for k in others], [right[k] for k in others])
    return result


def _count(items: Sequence[Item], name: str) -> int:
    """How many items a figure is about."""
    if name == "without_person":
        return sum(item.truth != "person" for item in items)
    if not name.startswith("AP_"):
        return len(items)
    if name in FREQUENCIES.values():
        often = items[0].detail["federated"]["frequency"]
        ids = _category_ids(items)
        return sum(FREQUENCIES[often[ids[item.truth]]] == name for item in items)
    return sum(item.groups["size"] == name.removeprefix("AP_") for item in items)


def _by_category(
    items: Sequence[Item], right: Sequence[float], found: DetectionScores
) -> dict[str, Mapping[str, Figure]]:
    ids = _category_ids(items)

    def measure(places: list[int]) -> dict[str, Figure]:
        precision = found.by_category.get(ids[items[places[0]].truth])
        return {
            "accuracy": mean_figure(items, right, places),
            "AP": Figure(value=precision, of=len(places)),
        }

    return by_group(items, "category", measure)


def _confusions(items: Sequence[Item], said: Sequence[str | None], title: str) -> Table:
    """How often each category was taken for each other: a row a category that occurs, a column a name that was said."""
    names = items[0].detail["names"]
    place = {name: k for k, name in enumerate(names)}
    counts = np.zeros((len(names), len(names) + 1), np.int64)
    for item, answer in zip(items, said, strict=True):
        counts[place[item.truth], len(names) if answer is None else place[answer]] += 1
    across = np.flatnonzero(counts[:, :-1].any(axis=0)).tolist()
    down = np.flatnonzero(counts.any(axis=1)).tolist()
    return Table(
        title=title,
        columns=("category", *(names[k] for k in across), "off the list"),
        rows=tuple((names[k], *counts[k, [*across, -1]].tolist()) for k in down),
    )

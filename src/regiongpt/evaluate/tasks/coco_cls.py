"""What class is a region: ground-truth boxes or masks of COCO, LVIS or any file of COCO's form.

Paper: §4.1, Table 3
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, cast

from regiongpt.data.convert.base import option
from regiongpt.data.instances import InstancesFile, Shapes, crowd_hint
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.bootstrap import Statistic, mean_statistic
from regiongpt.evaluate.metrics.detection import FREQUENCIES, DetectionScores, Federated, detection_scores
from regiongpt.evaluate.metrics.labels import Labels, Reading
from regiongpt.evaluate.paper import COCO, TABLES
from regiongpt.evaluate.task import RESAMPLES, Answer, Figure, Item, Result, Task
from regiongpt.evaluate.tasks.scoring import (
    MOST_PRECISIONS,
    SIZES,
    by_group,
    check_choice,
    confusion_table,
    figure,
    find_file,
    find_folder,
    images_of,
    limited,
    listed,
    mean_figure,
    missing_notes,
    rows_of,
    size_name,
)
from regiongpt.prompts import LABEL_SETS, question
from regiongpt.regions import Region

MATCH: Final = "generate and match"
PROBABLE: Final = "generate with probability"
SCORED: Final = "score all choices"
PROTOCOLS: Final = {
    MATCH: "the generated answer must be a name of the list as it stands; off the list it is wrong and no detection; "
    "every detection has the score 1",
    PROBABLE: "the same answers, each detection with the probability that the model gave to the text",
    SCORED: "the likelihoods of all names, normalised over the list; every name is a detection with its probability",
}
"""The protocols, and what each counts."""
_PRECISIONS: Final = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@dataclass(frozen=True, kw_only=True)
class CocoClassification(Task):
    """One question for each annotated object, crowds aside, about its box or its mask alone.

    The names are the file's categories in the order of their ids. With ``label_set`` the question names the closed
    set, as in training.
    """

    name: ClassVar[str] = "coco_cls"
    summary: ClassVar[str] = "classes of ground-truth regions: accuracy and AP under three protocols (Table 3)"
    item_id: ClassVar[str] = "annotation id"
    reads: ClassVar[tuple[str, ...]] = ("text", "scores")
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        MATCH: {
            "AP": TABLES["classification"].figure("mAP") / 100,
            "accuracy": TABLES["classification"].figure("Acc") / 100,
        }
    }
    paper_source: ClassVar[str] = f"Table 3, {COCO}; the paper does not say what score its detections have"

    split: str = option("of the annotations: instances_SPLIT.json", default="val2017")
    annotations: Path | None = option("the annotations file, wherever it is", default=None)
    images: Path | None = option("folder of the images, wherever it is", default=None)
    region: str = option("what marks an object: box or mask; without a mask it is not asked about", default="box")
    crowds: bool = option("ask about what is marked as a crowd too, as some tools mark every mask", default=False)
    label_set: str = option("name of the closed set in the question", default="COCO-80")
    guided: bool = option("end the question by naming the closed set", default=True)
    choices: bool = option("score all names too; of a long list this takes most of the time", default=True)
    rules: str = option("of AP: coco, lvis, or auto for LVIS' where the annotations have what it needs", default="auto")
    synonyms: str = option(
        "forgiven of answers: case, plural, or json files of synonyms, by commas; counted, and nothing by default",
        default="",
    )

    def __post_init__(self) -> None:
        check_choice("region", self.region, ("box", "mask"))
        check_choice("rules", self.rules, ("auto", "coco", "lvis"))

    @property
    def split_read(self) -> str:
        """Of the annotations that are looked for."""
        return self.split if self.annotations is None else ""

    @property
    def _file(self) -> Path:
        names = [f"annotations/instances_{self.split}.json", f"instances_{self.split}.json", f"{self.split}.json"]
        return find_file(self.annotations, self.data, names, "the annotations", "annotations")

    def inputs(self) -> list[Path]:
        """The annotations, and the files of synonyms."""
        words = [word.strip() for word in self.synonyms.split(",")]
        return [self._file, *(Path(word) for word in words if Path(word).is_file())]

    def load(self) -> list[Item]:
        """One item an object, by image and annotation id."""
        self.left_out.counts.clear()
        folder = find_folder(self.images, self.data, [self.split, "images", "."], "the images", "images")
        crowds: Literal["take", "leave out"] = "take" if self.crowds else "leave out"
        file = InstancesFile(self._file, self.left_out, shapes=cast(Shapes, self.region), folder=folder, crowds=crowds)
        names = [file.names[number] for number in sorted(file.names)]
        Labels(names, self.synonyms)
        known = LABEL_SETS.get(self.label_set)
        if self.guided and known and (foreign := sorted(set(names) - set(known))):
            raise ConfigError(
                f"{file.path}: expected category names of {self.label_set}, got {listed(foreign, 3)}; name the closed "
                "set with --label-set"
            )
        groups: dict[int, list[dict[str, Any]]] = {}
        for image, category, box, area in file.groups:
            group = {"bbox": box, "category_id": category, "area": box[2] * box[3] if isnan(area) else area}
            groups.setdefault(image, []).append(group)
        federated = file.federated if self.rules != "coco" else None
        if self.rules == "lvis" and federated is None:
            raise DataError(
                f"{self._file}: expected neg_category_ids and not_exhaustive_category_ids of every image and the "
                "frequency of every category, as LVIS has them, found none; leave out --rules lvis"
            )
        text = question("classify", 0, regions=[1], label_set=self.label_set, guided=self.guided)
        items = []
        columns = (file.ids, file.places, file.categories, file.boxes, file.areas)
        for k, (number, place, category, box, area) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            region = Region.box(*box) if self.region == "box" else file.mask(k)
            if region is None:
                continue
            image_id = file.name_of(int(file.images[place]))
            area = (box[2] - box[0]) * (box[3] - box[1]) if isnan(area) else area
            items.append(
                Item(
                    id=str(file.name_of(number)),
                    image=folder / file.paths[place],
                    image_id=image_id,
                    size=(int(file.widths[place]), int(file.heights[place])),
                    question=text,
                    regions=(region,),
                    choices=tuple(names) if self.choices else (),
                    max_new_tokens=16,
                    truth=file.names[category],
                    groups={"category": file.names[category], "size": size_name(area)},
                    detail={
                        "names": names,
                        "box": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": area,
                        "crowds": groups.get(int(file.images[place]), []),
                        "ids": sorted(file.names),
                        **({"federated": federated} if federated is not None else {}),
                    },
                )
            )
        if not items:
            raise DataError(
                f"{file.path}: expected objects to ask about, found none; {self.left_out.summary()}"
                f"{crowd_hint(self.left_out)}"
            )
        return limited(items, self.limit)

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        """All protocols that the answers allow: without probabilities and scores, the first alone."""
        names: list[str] = items[0].detail["names"]
        ids = _category_ids(items)
        labels = Labels(names, self.synonyms)
        texts = [a.text if (a := answers.get(item.id)) is not None else None for item in items]
        readings = [labels.read(text) if text is not None else None for text in texts]
        said = [reading.name if reading else None for reading in readings]
        generated = any(text is not None for text in texts)
        sure = [a.probability if (a := answers.get(item.id)) is not None else None for item in items]
        rated = [a.scores if (a := answers.get(item.id)) is not None else None for item in items]
        for item, scores in zip(items, rated, strict=True):
            if scores is not None and len(scores) != len(names):
                raise DataError(f"item {item.id}: expected scores of {len(names)} names, got {len(scores)}")

        chosen: dict[str, list[str | None]] = {}
        detections: dict[str, list[dict[str, Any]]] = {}
        if generated:
            chosen[MATCH] = said
            detections[MATCH] = [
                _detection(item, ids[name], 1.0) for item, name in zip(items, said, strict=True) if name
            ]
            unsure = [
                item.id for item, text, p in zip(items, texts, sure, strict=True) if text is not None and p is None
            ]
            if not unsure:
                chosen[PROBABLE] = said
                detections[PROBABLE] = [
                    _detection(item, ids[name], p)
                    for item, name, p in zip(items, said, sure, strict=True)
                    if name and p is not None
                ]
        if any(scores is not None for scores in rated):
            chosen[SCORED] = [names[max(range(len(names)), key=s.__getitem__)] if s else None for s in rated]
            detections[SCORED] = [
                _detection(item, number, score)
                for item, scores in zip(items, rated, strict=True)
                for number, score in zip(ids.values(), scores or (), strict=bool(scores))
            ]
        if not chosen:
            raise DataError("expected answers with a text or with scores, got neither for any item")

        protocols: dict[str, dict[str, Figure]] = {}
        statistics: dict[str, dict[str, Statistic]] = {}
        breakdowns: dict[str, Any] = {}
        tables = []
        scores_of: dict[str, list[float | None]] = {}
        truth, federated = _truth(items), _federated(items)
        for protocol, answered in chosen.items():
            right = [float(name == item.truth) for name, item in zip(answered, items, strict=True)]
            found = detection_scores(truth, detections[protocol], federated=federated)
            statistics[protocol] = _statistics(items, right, answered, found)
            protocols[protocol] = {
                name: figure(each, _count(items, name), resamples, seed) for name, each in statistics[protocol].items()
            }
            breakdowns[protocol] = _breakdowns(items, right, found)
            scores_of[f"{protocol}.accuracy"] = list(right)
            if protocol != PROBABLE:
                title = f"Confusion matrix, {protocol}"
                tables.append(confusion_table([item.truth for item in items], answered, names, title))
        return Result(
            task=self.name,
            pinned=self._pinned(len(names), federated is not None),
            protocols=protocols,
            breakdowns=breakdowns,
            rows=rows_of(items, answers, scores_of),
            tables=tuple(tables),
            notes=tuple(self._notes(items, answers, texts, readings)),
            statistics=statistics,
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
            **{f"protocol {name}": rule for name, rule in PROTOCOLS.items()},
        }

    def _notes(
        self,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        texts: Sequence[str | None],
        readings: Sequence[Reading | None],
    ) -> list[str]:
        notes = missing_notes(items, answers, self.item_id)
        if self.left_out.counts:
            notes.append(f"annotations not asked about: {self.left_out.summary()}")
        ways = Counter(reading.by for reading in readings if reading and reading.by not in ("", "as it stands"))
        for by, count in sorted(ways.items()):
            taken = next(reading.name for reading in readings if reading and reading.by == by)
            ways_of = {"case": "letters' case", "plural": "the plural", "synonym": "a synonym"}
            what = ways_of.get(by, "letters' case and the plural")
            if taken is None:
                notes.append(
                    f"{count} answers off the list differ from a name on it by {what}; --synonyms {by} takes them"
                )
            else:
                notes.append(f"{count} answers were taken for a name from which they differ by {what} (--synonyms)")
        unsure = [
            item.id for item in items if (a := answers.get(item.id)) and a.text is not None and a.probability is None
        ]
        if 0 < len(unsure) < sum(text is not None for text in texts):
            notes.append(
                f"{PROBABLE!r} is not measured: {len(unsure)} answers are without their probability "
                f"({self.item_id}s {listed(unsure)})"
            )
        off = Counter(text for text, reading in zip(texts, readings, strict=True) if reading and reading.name is None)
        if off:
            most = [f"{text!r} ({count})" for text, count in off.most_common(5)]
            notes.append(f"{off.total()} answers are off the list, most often {', '.join(most)}")
        return notes


def _federated(items: Sequence[Item]) -> Federated | None:
    known = items[0].detail.get("federated")
    if known is None:
        return None
    asked = {item.image_id for item in items}
    absent, partly = ({i: those for i, those in known[name].items() if i in asked} for name in ("absent", "partly"))
    return Federated(absent=absent, partly=partly, frequency=known["frequency"])


def _category_ids(items: Sequence[Item]) -> dict[str, int]:
    """Of every name of the closed set."""
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


def _breakdowns(items: Sequence[Item], right: Sequence[float], found: DetectionScores) -> dict[str, Any]:
    ids = _category_ids(items)

    def category(places: list[int]) -> dict[str, Figure]:
        precision = found.by_category.get(ids[items[places[0]].truth])
        return {"accuracy": mean_figure(items, right, places), "AP": Figure(value=precision, of=len(places))}

    def size(places: list[int]) -> dict[str, Figure]:
        return {"accuracy": mean_figure(items, right, places)}

    return {
        "size": by_group(items, "size", size, [name for name, _ in SIZES]),
        "category": by_group(items, "category", category),
    }

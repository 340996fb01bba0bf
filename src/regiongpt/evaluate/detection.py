"""Classes of regions: accuracy, and average precision by COCO's or LVIS' rules. Paper: §4.1, Table 3."""

import io
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regiongpt.data.coco import Federated, InstancesFile, crowd_hint
from regiongpt.data.shards import many
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.bootstrap import Floats, Statistic, known_mean, mean_statistic, ratio
from regiongpt.evaluate.task import Answer, Item, Measured, Scored, Task, find, given, images_of, listed, size_name
from regiongpt.prompts import LABEL_SETS, question
from regiongpt.regions import Region

MATCH: Final = "generate and match"
PROBABLE: Final = "generate with probability"
SCORED: Final = "score all choices"
FREQUENCIES: Final = {"r": "AP_rare", "c": "AP_common", "f": "AP_frequent"}
"""LVIS' groups of categories, by the letter in its annotations, and the precision of each."""
MOST_RESAMPLES: Final = 200
"""Most resamples of an average precision."""
_AREAS: Final = {"AP": 0, "AP50": 0, "AP75": 0, "AP_small": 1, "AP_medium": 2, "AP_large": 3}
_LVIS_MOST: Final = 300  # detections of an image that LVIS looks at, over all categories


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
        choices = tuple(names) if self.choices else ()
        asked: Any = {"question": text, "choices": choices, "sure": True, "max_new_tokens": 16}
        items = []
        for at, number, category, box, area, _, mask in file.objects:
            region = Region.box(*box) if self.region == "box" else mask.region()
            assert region is not None, "objects without a mask are left out"
            width, height = box[2] - box[0], box[3] - box[1]
            area = width * height if isnan(area) else area
            image, name = file.images[at], file.names[category]
            size = (image.width, image.height)
            place: Any = {"image": folder / image.path, "image_id": file.name_of(image.id), "size": size}
            one = {"category_id": category, "bbox": [*box[:2], width, height], "area": area}
            right: Any = {"truth": name, "groups": {"category": name, "size": size_name(area)}}
            detail = {"object": one, "crowds": groups.get(image.id, []), **shared}
            items.append(
                Item(id=str(file.name_of(number)), **place, **asked, **right, regions=(region,), detail=detail)
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
        unsure = [item.id for item, name, p in zip(items, said, sure, strict=True) if name and p is None]
        # By protocol, the name that answers each item, and the names that are detected there with their scores.
        found: dict[str, tuple[list[str | None], list[dict[str, float]]]] = {}
        if any(text is not None for text in texts):
            found[MATCH] = said, [{name: 1.0} if name else {} for name in said]
            if any(said) and not unsure:
                found[PROBABLE] = said, [{name: p} if name else {} for name, p in zip(said, sure, strict=True)]
        if any(scores is not None for scores in rated):
            rates = [dict(zip(names, scores, strict=True)) if scores else {} for scores in rated]
            found[SCORED] = [max(each, key=each.__getitem__) if each else None for each in rates], rates
        truth, images = _truth(items, ids), images_of(items)
        of = Counter(dict.fromkeys(("AP_small", "AP_medium", "AP_large", *FREQUENCIES.values()), 0))
        of.update(f"AP_{item.groups['size']}" for item in items)
        if rules:
            of.update(FREQUENCIES[rules.frequency[ids[item.truth]]] for item in items)
        protocols = {}
        for protocol, (answered, rates) in found.items():
            detections = [
                {"image_id": item.image_id, "category_id": ids[name], "bbox": item.detail["object"]["bbox"], "score": p}
                for item, each in zip(items, rates, strict=True)
                for name, p in each.items()
            ]
            right = [float(name == item.truth) for name, item in zip(answered, items, strict=True)]
            statistics = {
                "accuracy": mean_statistic(images, right),
                "class_average": mean_statistic(images, right, [item.truth for item in items]),
                "valid_answers": mean_statistic(images, [float(name is not None) for name in answered]),
                **detection_scores(truth, detections, rules),
            }
            protocols[protocol] = Scored(statistics=statistics, scores={"accuracy": right}, of=of)
        notes = []
        if unsure and len(unsure) < len(said) - said.count(None):
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


# -- Average precision -------------------------------------------------------------------------------------------------


def detection_scores(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], federated: Federated | None = None
) -> dict[str, Statistic]:
    """Score boxes against annotations: COCO's six precisions, by LVIS' rules those of :data:`FREQUENCIES` too.

    Args:
        truth: COCO's json: ``images``, ``annotations`` with ``area`` and ``iscrowd``, ``categories``.
        detections: ``image_id``, ``category_id``, ``score`` and ``bbox`` (x, y, width, height).
        federated: Score by the rules of LVIS, whose own package does not run with numpy 1.24 or later.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if federated is not None:
        detections = _looked_for(truth, detections, federated)
    with redirect_stdout(io.StringIO()):  # it reports its progress there
        objects, found = COCO(), COCO()
        # COCOeval takes the annotation of id 0 for none, and writes into what it is given.
        numbered = [{**each, "id": number} for number, each in enumerate(truth["annotations"], 1)]
        objects.dataset = {**truth, "annotations": numbered}
        objects.createIndex()
        if detections:
            found = objects.loadRes([dict(each) for each in detections])
        else:
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(objects, found, "bbox")
        if federated is not None:
            evaluation.params.maxDets = [_LVIS_MOST]
        evaluation.evaluate()
    partly = federated.partly if federated is not None else {}
    for each in evaluation.evalImgs:
        if each is not None and each["category_id"] in partly.get(each["image_id"], ()):
            each["dtIgnore"] = np.asarray(each["dtIgnore"], bool) | (each["dtMatches"] == 0)
    return _precisions(evaluation, detections, federated)


def _looked_for(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], federated: Federated
) -> list[Mapping[str, Any]]:
    """The best detections of each image, of the categories annotated in it."""
    known = {image: set(those) for image, those in federated.absent.items()}
    for each in truth["annotations"]:
        known.setdefault(each["image_id"], set()).add(each["category_id"])
    taken = Counter[Any]()
    best = []
    for each in sorted(detections, key=lambda each: -each["score"]):
        taken[each["image_id"]] += 1
        if taken[each["image_id"]] <= _LVIS_MOST and each["category_id"] in known.get(each["image_id"], ()):
            best.append(each)
    return best


# -- Resampled images --------------------------------------------------------------------------------------------------


class _Category(NamedTuple):
    """D detections of one category in one range of areas, the best score first; C images, T thresholds of overlap."""

    id: int
    hits: NDArray[np.bool_]  # (T, D) found an object
    misses: NDArray[np.bool_]  # (T, D) found none; a detection that does not count is neither
    image: NDArray[np.intp]  # (D,) place of its image
    objects: Floats  # (C,) objects to find


@dataclass(frozen=True, kw_only=True)
class PrecisionStatistic(Statistic):
    """One of the precisions, from what COCOeval matched. Counted once each, the images give its own result."""

    clusters: tuple[Hashable, ...]
    found: tuple[int, ...]  # a checksum of what was detected in each image
    categories: tuple[_Category, ...]
    recalls: Floats
    most_resamples: int = MOST_RESAMPLES

    def values(self, times: Floats) -> Floats:
        """See :meth:`Statistic.values`."""
        if not self.categories:
            return np.full(len(times), np.nan)
        return known_mean(np.stack([self._of(category, times) for category in self.categories], axis=1))

    def parts(self) -> list[int | None]:
        """See :meth:`Statistic.parts`; only images with objects to find have one."""
        objects = sum((each.objects for each in self.categories), np.zeros(len(self.clusters)))
        return [found if count else None for found, count in zip(self.found, objects, strict=True)]

    def _of(self, category: _Category, times: Floats) -> Floats:
        """The precision (N,) of one category, averaged over thresholds and recalls; NaN without objects."""
        total, weights = times @ category.objects, times[:, category.image]
        found = np.zeros(len(times))
        # Most thresholds match alike, above all where the regions were given.
        kinds = Counter(zip(map(bytes, category.hits), map(bytes, category.misses), strict=True))
        for (hits, misses), count in kinds.items():
            best = np.zeros((len(times), len(self.recalls) + 1))
            at = np.flatnonzero(np.frombuffer(hits, bool))
            right = np.cumsum(weights[:, at], axis=1)
            # Between hits precision only falls, so only the hits need to be looked at.
            wrong = np.cumsum(weights * np.frombuffer(misses, bool), axis=1)[:, at]
            reached = np.searchsorted(self.recalls, ratio(right, total[:, None]), side="right")
            precision = right / (right + wrong + np.spacing(1))
            np.maximum.at(best, (np.arange(len(times))[:, None], reached), precision)
            # What counts at a recall is the best precision of all detections that reach it.
            found += count * np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1][:, 1:].mean(axis=1)
        return np.where(total > 0, found / kinds.total(), np.nan)


def _precisions(
    evaluation: Any, detections: Sequence[Mapping[str, Any]], federated: Federated | None
) -> dict[str, Statistic]:
    p = evaluation.params
    seen: dict[Hashable, int] = dict.fromkeys(p.imgIds, 0)
    for each in detections:
        seen[each["image_id"]] += hash((each["category_id"], each["score"], *each["bbox"]))
    by_area = [_categories(evaluation, area) for area in range(len(p.areaRng))]
    wanted = {name: by_area[area] for name, area in _AREAS.items()}
    if federated is not None:
        for letter, name in FREQUENCIES.items():
            wanted[name] = [each for each in by_area[0] if federated.frequency.get(each.id) == letter]
    found: dict[str, Statistic] = {}
    for name, categories in wanted.items():
        rows = np.isclose(p.iouThrs, {"AP50": 0.5, "AP75": 0.75}.get(name, p.iouThrs))
        found[name] = PrecisionStatistic(
            clusters=tuple(p.imgIds),
            found=tuple(each & 0xFFFFFFFF for each in seen.values()),
            categories=tuple(each._replace(hits=each.hits[rows], misses=each.misses[rows]) for each in categories),
            recalls=p.recThrs,
        )
    return found


def _categories(evaluation: Any, area: int) -> list[_Category]:
    """The categories that have objects in a range of areas."""
    p, found = evaluation.params, []
    images, most = len(p.imgIds), p.maxDets[-1]
    for k, number in enumerate(p.catIds):
        start = (k * len(p.areaRng) + area) * images
        own = [(i, e) for i, e in enumerate(evaluation.evalImgs[start : start + images]) if e is not None]
        objects = np.zeros(images)
        for i, each in own:
            objects[i] = np.count_nonzero(~np.asarray(each["gtIgnore"], bool))
        if not objects.any():
            continue
        order = np.argsort(-np.concatenate([each["dtScores"][:most] for _, each in own]), kind="mergesort")
        matched, ignored = (
            np.concatenate([np.asarray(each[name])[:, :most] for _, each in own], axis=1)[:, order].astype(bool)
            for name in ("dtMatches", "dtIgnore")
        )
        image = np.repeat([i for i, _ in own], [len(each["dtScores"][:most]) for _, each in own])[order]
        counts = ~ignored.all(axis=0)
        hits, misses = (matched & ~ignored)[:, counts], (~matched & ~ignored)[:, counts]
        found.append(_Category(int(number), hits, misses, image[counts], objects))
    return found

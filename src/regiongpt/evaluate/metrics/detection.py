"""Overlap of boxes; average precision as the COCO API computes it, also by LVIS' rules and for resampled images."""

import io
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from regiongpt.evaluate.metrics.bootstrap import Floats, Statistic, ratio

FIGURES: Final = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""The twelve figures of the COCO API, in its order. Small is below 32^2 px^2 of object area, large from 96^2."""
_AREAS: Final = {"AP": 0, "AP50": 0, "AP75": 0, "AP_small": 1, "AP_medium": 2, "AP_large": 3}
ENOUGH: Final = 0.5
"""Intersection over union from which a box counts as the object (paper §4.3)."""
_AT_ONCE = 1 << 20  # numbers held at a time
FREQUENCIES: Final = {"r": "AP_rare", "c": "AP_common", "f": "AP_frequent"}
"""LVIS' groups of categories, by the letter in its annotations, and the precision of each."""
_LVIS_MOST: Final = 300
"""Detections of an image that LVIS looks at, over all categories."""


def overlaps(box: Sequence[float], others: Sequence[Sequence[float]] | Floats) -> Floats:
    """Intersection over union (n,) of a box with each of n others (n, 4), all xyxy; 0 for a box without area."""
    rest = np.asarray(others, np.float64).reshape(-1, 4)
    own = np.asarray(box, np.float64)
    sides = np.minimum(own[2:], rest[:, 2:]) - np.maximum(own[:2], rest[:, :2])
    shared = np.clip(sides, 0, None).prod(axis=1)
    areas = np.clip(rest[:, 2:] - rest[:, :2], 0, None).prod(axis=1)
    return np.nan_to_num(ratio(shared, areas + np.clip(own[2:] - own[:2], 0, None).prod() - shared))


@dataclass(frozen=True, kw_only=True)
class Federated:
    """What LVIS' annotations say of images in which not everything was looked for.

    Attributes:
        absent: By image, categories known not to be there. Detections of categories that are neither annotated nor in
            this list do not count.
        partly: By image, categories of which only some objects were annotated: unmatched detections do not count.
        frequency: By category, ``r``, ``c`` or ``f``.
    """

    absent: Mapping[int, Collection[int]]
    partly: Mapping[int, Collection[int]]
    frequency: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class DetectionScores:
    """What the COCO API says of detections.

    Attributes:
        figures: :data:`FIGURES`, or by LVIS' rules the six precisions and those of :data:`FREQUENCIES`; in [0, 1], NaN
            where there is nothing to find.
        statistics: Of the precisions.
        by_category: AP of each category that has objects, by its id.
    """

    figures: Mapping[str, float]
    statistics: Mapping[str, Statistic]
    by_category: Mapping[int, float]


def detection_scores(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    kind: Literal["bbox", "segm"] = "bbox",
    federated: Federated | None = None,
) -> DetectionScores:
    """Scores detections against annotations through pycocotools.

    Args:
        truth: COCO's json: ``images``, ``annotations`` with ``area`` and ``iscrowd``, ``categories``.
        detections: ``image_id``, ``category_id``, ``score`` and ``bbox`` (x, y, width, height) or ``segmentation``.
        kind: What is compared.
        federated: Score by the rules of LVIS, whose own package does not run with numpy 1.24 or later.
    """
    from pycocotools.coco import COCO

    if federated is not None:
        detections = _looked_for(truth, detections, federated)
    with redirect_stdout(io.StringIO()):  # it reports its progress there
        found = COCO()
        # The API takes the annotation of id 0 for none, and writes into what it is given.
        numbered = [{**each, "id": number} for number, each in enumerate(truth["annotations"], 1)]
        found.dataset = {**truth, "annotations": numbered}
        found.createIndex()
        if kind == "bbox":
            results = _boxes(found, detections)
        else:
            # Without any detection the API fails; one of no score in a category of its own stands for none.
            results = found.loadRes([dict(each) for each in detections]) if detections else _boxes(found, ())
        evaluation = _evaluation()(found, results, kind)
        if federated is not None:
            evaluation.params.maxDets = [_LVIS_MOST]
            evaluation.partly = {(image, each) for image, those in federated.partly.items() for each in those}
        evaluation.evaluate()
        evaluation.accumulate()
        if federated is None:
            evaluation.summarize()
    matches = _Matches.of(evaluation, detections)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    each_category = [(int(number), precision[:, :, k]) for k, number in enumerate(evaluation.params.catIds)]
    per_category = {number: float(own[own > -1].mean()) for number, own in each_category if (own > -1).any()}
    statistics = {name: PrecisionStatistic(matches=matches, figure=name) for name in _AREAS}
    if federated is None:
        figures = {
            name: float("nan") if value < 0 else float(value)
            for name, value in zip(FIGURES, evaluation.stats, strict=True)
        }
    else:
        for letter, name in FREQUENCIES.items():
            only = frozenset(each for each, its in federated.frequency.items() if its == letter)
            statistics[name] = PrecisionStatistic(matches=matches, figure=name, only=only)
        figures = {name: statistic.value() for name, statistic in statistics.items()}
    return DetectionScores(figures=figures, statistics=statistics, by_category=per_category)


@cache
def _evaluation() -> Any:
    """COCOeval, to the same figures in less time where most categories are in few images."""
    from pycocotools.cocoeval import COCOeval

    class Evaluation(COCOeval):  # type: ignore[misc]
        partly: Collection[tuple[int, int]] = ()
        _sorted: tuple[Any, Any] = (None, None)

        def computeIoU(self, imgId: int, catId: int) -> Any:
            if not self._gts.get((imgId, catId)):
                return []
            return super().computeIoU(imgId, catId)

        def evaluateImg(self, imgId: int, catId: int, aRng: Any, maxDet: int) -> Any:
            if self._gts.get((imgId, catId)):
                found = super().evaluateImg(imgId, catId, aRng, maxDet)
            elif self._dts.get((imgId, catId)):
                found = self._alone(imgId, catId, aRng, maxDet)
            else:
                return None
            if (imgId, catId) in self.partly:
                found["dtIgnore"] = found["dtIgnore"] | (found["dtMatches"] == 0)
            return found

        def _alone(self, image: int, category: int, area: Any, most: int) -> Any:
            """Detections where there is nothing to find: none is matched, and those of other sizes do not count."""
            if self._sorted[0] != category:
                self._sorted = (category, {})
            kept = self._sorted[1]
            if image not in kept:
                those = self._dts[image, category]
                scores = np.array([each["score"] for each in those])
                order = np.argsort(-scores, kind="mergesort")[:most]
                kept[image] = scores[order], np.array([each["area"] for each in those])[order]
            scores, areas = kept[image]
            shape = (len(self.params.iouThrs), len(scores))
            return {
                "dtScores": scores,
                "dtMatches": np.zeros(shape),
                "dtIgnore": np.broadcast_to((areas < area[0]) | (areas > area[1]), shape),
                "gtIgnore": np.zeros(0),
            }

    return Evaluation


def _looked_for(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], federated: Federated
) -> list[Mapping[str, Any]]:
    """The best detections of each image, of the categories that were looked for in it."""
    known = {image: set(those) for image, those in federated.absent.items()}
    for each in truth["annotations"]:
        known.setdefault(each["image_id"], set()).add(each["category_id"])
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for each in detections:
        by_image.setdefault(each["image_id"], []).append(each)
    return [
        each
        for image, those in by_image.items()
        for each in sorted(those, key=lambda each: -each["score"])[:_LVIS_MOST]
        if each["category_id"] in known.get(image, ())
    ]


def _boxes(found: Any, detections: Sequence[Mapping[str, Any]]) -> Any:
    """What the API makes of detections of boxes, without the outlines that it draws around them."""
    from pycocotools.coco import COCO

    results = COCO()
    annotations = [
        {**each, "id": number, "area": each["bbox"][2] * each["bbox"][3]} for number, each in enumerate(detections, 1)
    ]
    images, categories = found.dataset["images"], found.dataset["categories"]
    results.dataset = {"images": images, "annotations": annotations, "categories": categories}
    results.createIndex()
    return results


@dataclass(frozen=True, kw_only=True)
class _Category:
    """D detections of one category in one range of areas, the best score first; C images, T thresholds of overlap."""

    id: int
    hits: NDArray[np.bool_]  # (T, D) found an object
    misses: NDArray[np.bool_]  # (T, D) found none; a detection that does not count is neither
    image: NDArray[np.intp]  # (D,) place of its image
    objects: Floats  # (C,) objects to find


@dataclass(frozen=True, kw_only=True)
class _Matches:
    """What the COCO API matched, kept for counting images more or less often."""

    images: tuple[Hashable, ...]
    found: tuple[int, ...]  # a hash of what was detected in each image
    thresholds: Floats
    recalls: Floats
    areas: tuple[tuple[_Category, ...], ...]

    @classmethod
    def of(cls, evaluation: Any, detections: Sequence[Mapping[str, Any]]) -> "_Matches":
        p = evaluation.params
        images = len(p.imgIds)
        found: dict[Hashable, int] = dict.fromkeys(p.imgIds, 0)
        for each in detections:
            found[each["image_id"]] += hash((each["category_id"], each["score"], *each.get("bbox", ())))
        areas = []
        for a in range(len(p.areaRng)):
            categories = []
            for k in range(len(p.catIds)):
                start = (k * len(p.areaRng) + a) * images
                own = [(i, e) for i, e in enumerate(evaluation.evalImgs[start : start + images]) if e is not None]
                if category := _category(int(p.catIds[k]), own, images, p.maxDets[-1]):
                    categories.append(category)
            areas.append(tuple(categories))
        return cls(
            images=tuple(p.imgIds),
            found=tuple(found.values()),
            thresholds=p.iouThrs,
            recalls=p.recThrs,
            areas=tuple(areas),
        )


def _category(number: int, own: Sequence[tuple[int, Any]], images: int, most: int) -> _Category | None:
    objects = np.zeros(images)
    for i, each in own:
        objects[i] = np.count_nonzero(~np.asarray(each["gtIgnore"], bool))
    if not objects.any():
        return None
    scores = np.concatenate([each["dtScores"][:most] for _, each in own])
    order = np.argsort(-scores, kind="mergesort")
    matched = np.concatenate([each["dtMatches"][:, :most] for _, each in own], axis=1)[:, order] > 0
    ignored = np.concatenate([each["dtIgnore"][:, :most] for _, each in own], axis=1)[:, order].astype(bool)
    image = np.concatenate([np.full(len(each["dtScores"][:most]), i) for i, each in own]).astype(np.intp)[order]
    counts = ~ignored.all(axis=0)
    hits, misses = (matched & ~ignored)[:, counts], (~matched & ~ignored)[:, counts]
    return _Category(id=number, hits=hits, misses=misses, image=image[counts], objects=objects)


@dataclass(frozen=True, kw_only=True)
class PrecisionStatistic(Statistic):
    """One of the precisions. Counted once each, the images give the API's own figure."""

    matches: _Matches
    figure: str
    only: frozenset[int] | None = None  # categories that it is about

    @property
    def clusters(self) -> tuple[Hashable, ...]:  # type: ignore[override]
        """The images."""
        return self.matches.images

    def values(self, times: Floats) -> Floats:
        """See :meth:`Statistic.values`."""
        wanted = {"AP50": 0.5, "AP75": 0.75}.get(self.figure)
        rows = slice(None) if wanted is None else np.isclose(self.matches.thresholds, wanted)
        categories = self._categories()
        if not categories:
            return np.full(len(times), np.nan)
        found = np.stack([self._of(category, rows, times) for category in categories])
        there = ~np.isnan(found)
        return ratio(np.where(there, found, 0.0).sum(axis=0), there.sum(axis=0))

    def parts(self) -> list[Hashable]:
        """The detections in each image that has objects to find."""
        objects = sum((each.objects for each in self._categories()), np.zeros(len(self.matches.images)))
        return [found if count else None for found, count in zip(self.matches.found, objects, strict=True)]

    def _categories(self) -> list[_Category]:
        counted = self.matches.areas[_AREAS.get(self.figure, 0)]
        return [each for each in counted if self.only is None or each.id in self.only]

    def _of(self, category: _Category, rows: Any, times: Floats) -> Floats:
        """The precision (N,) of one category, averaged over thresholds and recalls; NaN without objects."""
        # Most thresholds match alike, above all where the regions were given.
        kinds: dict[bytes, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
        counts: Counter[bytes] = Counter()
        for hits, misses in zip(category.hits[rows], category.misses[rows], strict=True):
            key = hits.tobytes() + misses.tobytes()
            kinds[key] = (hits, misses)
            counts[key] += 1
        size = max(1, _AT_ONCE // max(1, len(category.image)))
        found = np.zeros(len(times))
        for key, (hits, misses) in kinds.items():
            parts = [self._curve(category, hits, misses, times[k : k + size]) for k in range(0, len(times), size)]
            found += counts[key] * np.concatenate(parts)
        result: Floats = found / counts.total()
        return result

    def _curve(self, category: _Category, hits: NDArray[np.bool_], misses: NDArray[np.bool_], times: Floats) -> Floats:
        total = times @ category.objects
        best = np.zeros((len(times), len(self.matches.recalls) + 1))
        at = np.flatnonzero(hits)
        if len(at):
            weights = times[:, category.image]
            right = np.cumsum(weights[:, at], axis=1)
            # Between hits precision only falls, so the hits are all there is to look at.
            wrong = np.cumsum(weights * misses, axis=1)[:, at]
            precision = right / (right + wrong + np.spacing(1))
            reached = np.searchsorted(self.matches.recalls, ratio(right, total[:, None]), side="right")
            np.maximum.at(best, (np.arange(len(times))[:, None], reached), precision)
        # What counts at a recall is the best precision of all detections that reach it.
        best = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1][:, 1:]
        return np.where(total > 0, best.mean(axis=1), np.nan)

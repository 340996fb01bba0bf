"""Overlap of boxes; average precision by pycocotools' COCOeval, also by LVIS' rules and for resampled images."""

import io
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regiongpt.evaluate.bootstrap import Floats, Statistic, known_mean, ratio

FIGURES: Final = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""The twelve results of the COCO API, in its order. Small is below 32^2 px^2 of object area, large from 96^2."""
FREQUENCIES: Final = {"r": "AP_rare", "c": "AP_common", "f": "AP_frequent"}
"""LVIS' groups of categories, by the letter in its annotations, and the precision of each."""
MOST_RESAMPLES: Final = 200
"""Most resamples of an average precision."""
_AREAS: Final = {"AP": 0, "AP50": 0, "AP75": 0, "AP_small": 1, "AP_medium": 2, "AP_large": 3}
_THRESHOLDS: Final = {"AP50": 0.5, "AP75": 0.75}
_LVIS_MOST: Final = 300  # detections of an image that LVIS looks at, over all categories


def overlaps(box: Sequence[float], others: Sequence[Sequence[float]] | Floats) -> Floats:
    """Intersection over union (n,) of a box with each of n others (n, 4), all xyxy."""
    rest = np.asarray(others, np.float64).reshape(-1, 4)
    own = np.asarray(box, np.float64)
    shared = np.clip(np.minimum(own[2:], rest[:, 2:]) - np.maximum(own[:2], rest[:, :2]), 0, None).prod(axis=1)
    areas = (rest[:, 2:] - rest[:, :2]).prod(axis=1)
    return ratio(shared, areas + (own[2:] - own[:2]).prod() - shared)


@dataclass(frozen=True, kw_only=True)
class Federated:
    """LVIS' fields for images that are not annotated exhaustively."""

    # By image, categories known not to be there: detections of those neither annotated nor in here do not count.
    absent: Mapping[int, Collection[int]]
    # By image, categories of which only some objects were annotated: unmatched detections do not count.
    partly: Mapping[int, Collection[int]]
    frequency: Mapping[int, str]  # by category, "r", "c" or "f"


class DetectionScores(NamedTuple):
    """COCOeval's results for detections."""

    # FIGURES, or by LVIS' rules the six precisions and those of FREQUENCIES; NaN where there is nothing to find.
    figures: Mapping[str, float]
    statistics: Mapping[str, Statistic]  # the precisions


def detection_scores(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], federated: Federated | None = None
) -> DetectionScores:
    """Score boxes against annotations.

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
        if federated is None:
            evaluation.accumulate()
            evaluation.summarize()
    statistics = _precisions(evaluation, detections, federated)
    if federated is not None:
        return DetectionScores({name: statistic.value() for name, statistic in statistics.items()}, statistics)
    stats = [float("nan") if value < 0 else float(value) for value in evaluation.stats]
    return DetectionScores(dict(zip(FIGURES, stats, strict=True)), statistics)


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


# ---------------------------------------------------------------------------------------------------------------------
# Resampled images


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
    """The statistics of all precisions, by name."""
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
        rows = np.isclose(p.iouThrs, _THRESHOLDS[name]) if name in _THRESHOLDS else np.full(len(p.iouThrs), True)
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

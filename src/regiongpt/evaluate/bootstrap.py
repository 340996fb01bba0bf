"""Confidence intervals and paired comparisons: bootstrap over images, since items of an image are not independent."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FEWEST_IMAGES: Final = 30
FEWEST_DIFFERENT: Final = 6
TOO_FEW: Final = "too few to tell"
_AT_ONCE: Final = 100  # resamples held at a time


class Statistic(ABC):
    """A result as a function of the images' weights."""

    clusters: tuple[Hashable, ...]  # the images, each once
    most: float = 1.0  # the largest value that it can have; the smallest is 0
    most_resamples: int = 1_000_000  # fewer where each is expensive

    @abstractmethod
    def values(self, times: Floats) -> Floats:
        """The result (N,) for weights (N, C) of the C images; NaN if undefined."""

    @abstractmethod
    def parts(self) -> list[int | None]:
        """A checksum of each image's contribution, equal for equal answers; None for an image without one."""

    def value(self) -> float:
        """The result itself; NaN if undefined."""
        return float(self.values(np.ones((1, len(self.clusters))))[0])


@dataclass(frozen=True)
class SumStatistic(Statistic):
    """A result of sums over items: shares, averages over classes, F1, METEOR, BLEU."""

    clusters: tuple[Hashable, ...]
    sums: Floats  # (C, K) what each image adds to each of K sums
    combine: Callable[[Floats], Floats]  # from (N, K) sums to (N,) results; a division by 0 gives NaN
    most: float = 1.0

    def values(self, times: Floats) -> Floats:
        """See :meth:`Statistic.values`."""
        return self.combine(times @ self.sums)

    def parts(self) -> list[int | None]:
        """See :meth:`Statistic.parts`."""
        return [crc32(row.tobytes()) if row.any() else None for row in self.sums]


def sum_statistic(
    clusters: Sequence[Hashable], sums: Sequence[Sequence[float]] | Floats, combine: Callable[[Floats], Floats]
) -> SumStatistic:
    """A :class:`SumStatistic` of the images (n,) of items and of what each *item* adds to the sums (n, K)."""
    place = {name: k for k, name in enumerate(dict.fromkeys(clusters))}
    added = np.asarray(sums, np.float64).reshape(len(clusters), -1)
    gathered = np.zeros((len(place), added.shape[1]))
    np.add.at(gathered, np.array([place[name] for name in clusters], np.intp), added)
    return SumStatistic(tuple(place), gathered, combine)


def mean_statistic(
    clusters: Sequence[Hashable], scores: Sequence[float], groups: Sequence[Hashable] | None = None
) -> SumStatistic:
    """The mean of the items' scores, given the image of each; with groups, the mean over groups of each group's mean.

    A group that a resample lacks is left out of that resample's mean.
    """
    names = list(groups) if groups is not None else [None] * len(scores)
    column = {name: k for k, name in enumerate(dict.fromkeys(names))}
    width = len(column)
    sums = np.zeros((len(scores), 2 * width))
    for row, (name, score) in enumerate(zip(names, scores, strict=True)):
        sums[row, [column[name], column[name] + width]] = score, 1.0
    return sum_statistic(clusters, sums, lambda totals: known_mean(ratio(totals[:, :width], totals[:, width:])))


def known_mean(values: Floats) -> Floats:
    """The mean (N,) of the values (N, K) that are no NaN; NaN where all are."""
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0.0).sum(axis=1), there.sum(axis=1))


def ratio(above: NDArray[np.generic], below: NDArray[np.generic]) -> Floats:
    """``above / below``, NaN where that is a division by 0."""
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    result: Floats = np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0)
    return result


class Sampled(NamedTuple):
    """A result and its bootstrap; that of another system on the same images has drawn the same images."""

    value: float
    values: Floats  # (R,) of the resamples, around the value
    parts: Sequence[int | None]  # of each image, see Statistic.parts
    most: float = 1.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """The middle 95 % of the resamples, within 0 and ``most``."""
        return ends(np.clip(self.values, 0.0, self.most))


def resample(statistic: Statistic, resamples: int, seed: int = 0) -> Sampled:
    """A result with its values where the images are drawn with replacement; without those for a single image.

    An average over classes, such as a mean AP, is biased in resamples, since rare classes fall out of some; so the
    values are moved to have the result as their mean.
    """
    count, value = len(statistic.clusters), statistic.value()
    rng = np.random.default_rng((seed, count))
    found = [np.empty(0)]
    left = min(resamples, statistic.most_resamples) if count > 1 else 0
    for start in range(0, left, _AT_ONCE):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(_AT_ONCE, left - start))
        found.append(statistic.values(times.astype(np.float64)))
    values = np.concatenate(found)
    values += value - known_mean(values[None])[0]
    return Sampled(value, values, statistic.parts(), statistic.most)


def ends(values: Floats) -> tuple[float, float] | None:
    """Where the middle 95 % of the values lie; None where none is a number."""
    if np.isnan(values).all():
        return None
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)


def too_few(a: Sampled, b: Sampled) -> bool:
    """Whether two systems were compared on fewer than 30 images, or differ on 1 to 5 of them only.

    Even if all five favour one system, a fair coin would do so once in 16, where the bootstrap claims p = 0.01.
    """
    pairs = [(x, y) for x, y in zip(a.parts, b.parts, strict=True) if x is not None or y is not None]
    return len(pairs) < FEWEST_IMAGES or 0 < sum(x != y for x, y in pairs) < FEWEST_DIFFERENT


class Paired(NamedTuple):
    """Two systems on the same items; interval and p are None where they cannot be computed.

    The two-sided p is twice the share of resamples in which the difference has the other sign or is 0.
    """

    a: float
    b: float
    difference: float  # b - a
    interval: tuple[float, float] | None  # 95 % of the resampled differences
    p: float | None
    too_few: bool


def paired(a: Sampled, b: Sampled) -> Paired:
    """The paired bootstrap: each resample has the same images for both systems."""
    few, count = too_few(a, b), min(len(a.values), len(b.values))
    differences = b.values[:count] - a.values[:count]
    differences = differences[~np.isnan(differences)]
    interval = p = None
    if not few and len(differences):
        beyond = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
        p = min(1.0, 2 * (int(beyond) + 1) / (len(differences) + 1)) if differences.any() else 1.0
        interval = ends(differences)
    return Paired(a.value, b.value, b.value - a.value, interval, p, few)

"""Confidence intervals and paired comparisons: bootstrap over images, since items of an image are not independent."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FEWEST_IMAGES: Final = 30
FEWEST_DIFFERENT: Final = 6
TOO_FEW: Final = "too few to tell"
_AT_ONCE = 1 << 22  # multiplicities held at a time


class Statistic(ABC):
    """A result as a function of the images' weights."""

    clusters: tuple[Hashable, ...]  # the images, each once
    most: float = 1.0  # the largest value that it can have; the smallest is 0
    most_resamples: int = 1_000_000  # fewer where each is expensive

    @abstractmethod
    def values(self, times: Floats) -> Floats:
        """The result (N,) for weights (N, C) of the C images; NaN if undefined."""

    @abstractmethod
    def parts(self) -> list[Hashable]:
        """Each image's contribution, equal for two systems with equal answers; None for an image without one."""

    def value(self) -> float:
        """The result itself; NaN if undefined."""
        return float(self.values(np.ones((1, len(self.clusters))))[0])


@dataclass(frozen=True)
class SumStatistic(Statistic):
    """A result computed from sums over items: shares, averages over classes, F1, METEOR, BLEU."""

    clusters: tuple[Hashable, ...]
    sums: Floats  # (C, K) what each image adds to each of K sums
    combine: Callable[[Floats], Floats]  # from (N, K) sums to (N,) results; a division by 0 gives NaN
    most: float = 1.0

    def values(self, times: Floats) -> Floats:
        """See :meth:`Statistic.values`."""
        return self.combine(times @ self.sums)

    def parts(self) -> list[Hashable]:
        """The sums of each image."""
        return [row.tobytes() if row.any() else None for row in self.sums]


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

    def combine(totals: Floats) -> Floats:
        means = ratio(totals[:, :width], totals[:, width:])
        there = ~np.isnan(means)
        return ratio(np.where(there, means, 0.0).sum(axis=1), there.sum(axis=1))

    return sum_statistic(clusters, sums, combine)


def ratio(above: NDArray[np.generic], below: NDArray[np.generic]) -> Floats:
    """``above / below``, NaN where that is a division by 0."""
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    result: Floats = np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0)
    return result


def interval(statistic: Statistic, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of a result; NaN where nothing can be measured."""
    return around(resampled((statistic,), resamples, seed)[0], statistic.value(), statistic.most)


def too_few(a: Statistic, b: Statistic) -> bool:
    """Whether two systems were compared on fewer than 30 images, or differ on 1 to 5 of them only.

    Even if all five favour one system, a fair coin would do so once in 16, where the bootstrap claims p = 0.01.
    """
    pairs = [(x, y) for x, y in zip(a.parts(), b.parts(), strict=True) if x is not None or y is not None]
    return len(pairs) < FEWEST_IMAGES or 0 < sum(x != y for x, y in pairs) < FEWEST_DIFFERENT


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two systems on the same items; interval and p are None where they cannot be computed.

    The two-sided p is twice the share of resamples in which the difference has the other sign or is 0.
    """

    a: float
    b: float
    difference: float  # b - a
    interval: tuple[float, float] | None = None  # 95 % of the resampled differences, as in interval()
    p: float | None = None
    too_few: bool = False


def paired(a: Statistic, b: Statistic, resamples: int = 1000, seed: int = 0) -> Paired:
    """The paired bootstrap: each resample counts the same images for both systems, whose images must be the same."""
    difference = b.value() - a.value()
    result = Paired(a=a.value(), b=b.value(), difference=difference, too_few=too_few(a, b))
    if result.too_few:
        return result
    first, second = resampled((a, b), resamples, seed)
    differences = centred(second - first, difference)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return result
    beyond = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p = min(1.0, 2 * (int(beyond) + 1) / (len(differences) + 1)) if differences.any() else 1.0
    return replace(result, interval=ends(differences), p=p)


def resampled(statistics: Sequence[Statistic], resamples: int, seed: int) -> list[Floats]:
    """Each statistic (resamples,) on the same resamples of its images, drawn with replacement."""
    count = len(statistics[0].clusters)
    size = max(1, _AT_ONCE // count)
    parts: list[list[Floats]] = []
    for part, start in enumerate(range(0, resamples, size)):
        rng = np.random.default_rng((seed + part * 1_000_003, count))
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(size, resamples - start)).astype(np.float64)
        parts.append([statistic.values(times) for statistic in statistics])
    return [np.concatenate(found) for found in zip(*parts, strict=True)]


def centred(values: Floats, result: float) -> Floats:
    """Resampled values, moved so that their mean is the result where it differs by more than chance.

    An average over classes, such as a mean AP, is biased in resamples, since rare classes fall out of some.
    """
    there = values[~np.isnan(values)]
    if len(there) < 2:
        return values
    bias = float(there.mean()) - result
    return values if abs(bias) <= 3 * float(there.std()) / len(there) ** 0.5 else values - bias


def around(values: Floats, result: float, most: float) -> tuple[float, float]:
    """The interval of a result by its resampled values, within 0 and ``most``."""
    return ends(np.clip(centred(values, result), 0.0, most))


def ends(values: Floats) -> tuple[float, float]:
    """Where the middle 95 % of the values lie; NaN where none is a number."""
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)

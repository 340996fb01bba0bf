"""Yes-or-no questions such as POPE's: reading the answers, and the figures."""

from collections.abc import Hashable, Sequence
from typing import Final, Literal

import numpy as np

from regiongpt.evaluate.metrics.bootstrap import Floats, SumStatistic, ratio, sum_statistic

Said = Literal["yes", "no"] | None
FIGURES: Final = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsable")


def first_word(text: str) -> Said:
    """The answer by its first word, None where that is neither yes nor no."""
    words = "".join(c if c.isalpha() or c in "'-" else " " for c in text.lower()).split()
    return "yes" if words[:1] == ["yes"] else "no" if words[:1] == ["no"] else None


def pope_script(text: str) -> Said:
    """The answer as POPE's published script reads it: no where the first sentence says ``no`` or ``not``, else yes.

    Nothing is unparsable to it: an empty answer and any other text without those words are a yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def yes_no_statistics(
    clusters: Sequence[Hashable], truth: Sequence[str], said: Sequence[Said]
) -> dict[str, SumStatistic]:
    """The figures of :data:`FIGURES`, yes being the positive answer.

    An answer that is neither is wrong: it lowers accuracy, and recall where yes was right, and is no yes for precision
    and for ``yes_ratio``, the share of yes among *all answers given* (not among the right ones).

    Args:
        clusters: Image of each question.
        truth: ``"yes"`` or ``"no"``.
        said: What each answer was read as.
    """
    asked = np.array([each == "yes" for each in truth], bool)
    yes = np.array([each == "yes" for each in said], bool)
    no = np.array([each == "no" for each in said], bool)
    counts = np.column_stack((asked & yes, ~asked & yes, asked & ~yes, ~asked & no, ~yes & ~no, np.ones(len(asked))))
    return {name: sum_statistic(clusters, counts.astype(np.float64), _FORMULAS[name]) for name in FIGURES}


def _accuracy(s: Floats) -> Floats:
    return ratio(s[:, 0] + s[:, 3], s[:, 5])


def _precision(s: Floats) -> Floats:
    return ratio(s[:, 0], s[:, 0] + s[:, 1])


def _recall(s: Floats) -> Floats:
    return ratio(s[:, 0], s[:, 0] + s[:, 2])


def _f1(s: Floats) -> Floats:
    return ratio(2 * s[:, 0], 2 * s[:, 0] + s[:, 1] + s[:, 2])


def _yes_ratio(s: Floats) -> Floats:
    return ratio(s[:, 0] + s[:, 1], s[:, 5])


def _unparsable(s: Floats) -> Floats:
    return ratio(s[:, 4], s[:, 5])


_FORMULAS: Final = {
    "accuracy": _accuracy,
    "precision": _precision,
    "recall": _recall,
    "f1": _f1,
    "yes_ratio": _yes_ratio,
    "unparsable": _unparsable,
}

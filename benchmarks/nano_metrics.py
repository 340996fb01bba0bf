"""Scores of answers about boxes, without a model: what counts as right, and how sure the figures are.

All shares are fractions of 1. A score is ``{"value", "of"}``, ``of`` being the number of questions; where there is an
``interval`` it holds 95 % of 1,000 bootstrap resamples of the images, for the boxes of one image are not independent.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from regiongpt.data.facts import plural
from regiongpt.prompts import COCO_80, parse_region_answer

RESAMPLES = 1000
AREAS = (("under 1 %", 0.0, 0.01), ("1-10 %", 0.01, 0.1), ("over 10 %", 0.1, float("inf")))
"""Shares of the image that a box takes: name, from, below (exactly 10 % counts as the last)."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question with what the model said.

    Args:
        image: Id of the image.
        truth: The right answer, or the class that a description must name.
        text: The model's answer.
        share: Area of the box as a share of the image.
        kind: Kind of expression, ``present``, or kind of negative.
        options: Number of regions to choose from.
    """

    image: Hashable
    truth: str
    text: str
    share: float = 0.0
    kind: str = ""
    options: int = 0


def parse_class(text: str) -> str:
    """The class name an answer consists of: blanks around it, one final full stop and upper case are forgiven."""
    return text.strip().removesuffix(".").strip().lower()


def parse_yes_no(text: str) -> Literal["yes", "no"] | None:
    """The answer's first word, if it is yes or no; None for anything else, which counts as wrong."""
    match = re.match(r"\s*([\w'-]+)", text)
    word = match[1].lower() if match else ""
    return "yes" if word == "yes" else "no" if word == "no" else None


def parse_number(text: str, options: int) -> int | Literal["invalid"] | None:
    """The number of the region chosen; None for the no-match sentence; invalid where no such region was offered."""
    number = parse_region_answer(text)
    return "invalid" if isinstance(number, int) and number > options else number


# A multi-word name counts before the single word in it ("teddy bear" is no bear, "hot dog" no dog).
_FORMS = {form: name for name in COCO_80 for form in (name, plural(name))}
_NAMES = re.compile(
    r"(?<![\w-])(?:" + "|".join(re.escape(f).replace(r"\ ", r"[\s-]+") for f in sorted(_FORMS, key=len)[::-1])
    + r")(?![\w-])",
    re.IGNORECASE,
)  # fmt: skip


def named_classes(text: str) -> list[str]:
    """The COCO-80 classes that a text names, in order of mention, repeats included.

    A name counts as a whole word, in the singular or plural, in any case, with the longest name first. "orange"
    directly before another class name is a colour ("an orange cat"). Synonyms (man, bike) and parts of compounds joined
    by a hyphen (cat-like) do not count.
    """
    found = []
    matches = list(_NAMES.finditer(text))
    for match, following in zip_longest(matches, matches[1:]):
        name = _FORMS[re.sub(r"[\s-]+", " ", match[0].lower())]
        adjoining = following is not None and text[match.end() : following.start()].isspace()
        if not (match[0].lower() == "orange" and adjoining):
            found.append(name)
    return found


def macro_mean(groups: Sequence[Hashable], scores: Sequence[float]) -> float:
    """The mean over groups of each group's mean score; the plain mean where there is one group."""
    by_group: dict[Hashable, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        by_group.setdefault(group, []).append(float(score))
    return float(np.mean([np.mean(values) for values in by_group.values()])) if by_group else float("nan")


def interval(
    images: Sequence[Hashable], groups: Sequence[Hashable], scores: Sequence[float], seed: int = 0
) -> list[float]:
    """The 95 % bootstrap interval of :func:`macro_mean` when images are drawn with replacement.

    Args:
        images: Image of each question; all questions of an image come or stay together.
        groups: Group of each question. One that no image of a resample has is left out of that resample's mean.
        scores: Score of each question.
        seed: Seed of the resampling.

    Returns:
        The 2.5th and 97.5th percentile.
    """
    image_index = {image: k for k, image in enumerate(dict.fromkeys(images))}
    group_index = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    total = np.zeros((len(image_index), len(group_index)))
    gained = np.zeros_like(total)
    for image, group, score in zip(images, groups, scores, strict=True):
        total[image_index[image], group_index[group]] += 1
        gained[image_index[image], group_index[group]] += score
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), size=RESAMPLES)
    count, sums = times @ total, times @ gained
    means = np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0)
    return [float(edge) for edge in np.percentile(np.nanmean(means, axis=1), (2.5, 97.5))]


def score(
    rows: Sequence[Answered],
    scores: Sequence[float],
    group: Callable[[Answered], Hashable] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """One figure: its value (None without questions), the number of questions, and with a seed its interval."""
    groups = [group(row) if group else None for row in rows]
    if not rows:
        return {"value": None, "of": 0}
    result: dict[str, Any] = {"value": macro_mean(groups, scores), "of": len(rows)}
    if seed is not None:
        result["interval"] = interval([row.image for row in rows], groups, scores, seed)
    return result


def _split(
    rows: Sequence[Answered],
    scores: Sequence[float],
    key: Callable[[Answered], str],
    names: Iterable[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """A plain score for each value of ``key``, in the order of ``names``, or the most frequent first."""
    order = names if names is not None else [name for name, _ in Counter(map(key, rows)).most_common()]
    result = {}
    for name in order:
        chosen = [k for k, row in enumerate(rows) if key(row) == name]
        result[name] = score([rows[k] for k in chosen], [scores[k] for k in chosen])
    return result


def area_name(share: float) -> str:
    """Which of :data:`AREAS` a box belongs to."""
    return next(name for name, low, high in AREAS if low <= share < high)


def classify_right(rows: Sequence[Answered]) -> list[bool]:
    """Whether each answer is exactly the right class name."""
    return [parse_class(row.text) == row.truth for row in rows]


def classify_scores(rows: Sequence[Answered], seed: int = 0) -> dict[str, Any]:
    """Exact-match classification of all boxes; an answer that is no COCO-80 name is wrong like any other."""
    right = classify_right(rows)
    answers = [parse_class(row.text) for row in rows]
    off = Counter(row.text for row, answer in zip(rows, answers, strict=True) if answer not in COCO_80)
    wrong = Counter((row.truth, a) for row, a, ok in zip(rows, answers, right, strict=True) if not ok and a in COCO_80)
    boxes = Counter(row.truth for row in rows)
    others = [k for k, row in enumerate(rows) if row.truth != "person"]
    return {
        "accuracy": score(rows, right, seed=seed),
        "class_average": {**score(rows, right, group=lambda row: row.truth, seed=seed), "classes": len(boxes)},
        "without_person": score([rows[k] for k in others], [right[k] for k in others], seed=seed),
        "by_area": _split(rows, right, lambda row: area_name(row.share), [name for name, *_ in AREAS]),
        "valid_answers": score(rows, [answer in COCO_80 for answer in answers]),
        "off_list": [{"answer": text, "count": count} for text, count in off.most_common(20)],
        "confusions": [
            {"truth": truth, "answer": answer, "count": count, "of_truth": boxes[truth]}
            for (truth, answer), count in wrong.most_common(20)
        ],
        "by_class": _split(rows, right, lambda row: row.truth),
    }


def locate_scores(rows: Sequence[Answered], seed: int = 0) -> dict[str, Any]:
    """Choice of a region by an expression; the no-match answer and answers that name no option are wrong."""
    chosen = [parse_number(row.text, row.options) for row in rows]
    right = [number == parse_number(row.truth, row.options) for number, row in zip(chosen, rows, strict=True)]
    return {
        "accuracy": score(rows, right, seed=seed),
        "chance": score(rows, [1 / row.options for row in rows]),
        "by_kind": _split(rows, right, lambda row: row.kind),
        "invalid": score(rows, [number == "invalid" for number in chosen]),
        "no_match": score(rows, [number is None for number in chosen]),
        "chosen": dict(sorted(Counter(map(str, chosen)).items())),
    }


def presence_scores(rows: Sequence[Answered], seed: int = 0) -> dict[str, Any]:
    """Is-there-a questions: the mean of the accuracy on those to be answered yes and on those to be answered no."""
    said = [parse_yes_no(row.text) for row in rows]
    right = [answer == row.truth for answer, row in zip(said, rows, strict=True)]
    return {
        "balanced_accuracy": score(rows, right, group=lambda row: row.truth, seed=seed),
        "accuracy": score(rows, right),
        "yes_ratio": score(rows, [answer == "yes" for answer in said]),
        "unparsable": score(rows, [answer is None for answer in said]),
        "by_kind": _split(rows, right, lambda row: row.kind),
    }


def naming_scores(rows: Sequence[Answered], classified: Sequence[bool], seed: int = 0) -> dict[str, Any]:
    """How often a description names the class of its region, against the classifier on the same boxes.

    Args:
        rows: Descriptions, ``truth`` being the class.
        classified: Whether the classifier was right about each of the same boxes.
        seed: Seed of the resampling.

    Returns:
        ``names_class``: the *first* class named is the right one, which a neighbour's name cannot earn.
        ``mentions_class``: the right class is named anywhere. ``names_none``: no class is named. ``classify``: the
        classifier's accuracy. The differences are ours less the classifier's, in points.
    """
    found = [named_classes(row.text) for row in rows]
    first = [names[:1] == [row.truth] for names, row in zip(found, rows, strict=True)]
    anywhere = [row.truth in names for names, row in zip(found, rows, strict=True)]

    def ahead(ours: Sequence[bool]) -> dict[str, Any]:
        return score(rows, [100.0 * (a - b) for a, b in zip(ours, classified, strict=True)], seed=seed)

    return {
        "names_class": score(rows, first, seed=seed),
        "mentions_class": score(rows, anywhere, seed=seed),
        "names_none": score(rows, [not names for names in found]),
        "classify": score(rows, classified, seed=seed),
        "names_less_classify_points": ahead(first),
        "mentions_less_classify_points": ahead(anywhere),
        "different_texts": len({row.text for row in rows}),
    }

"""What the tasks of referring expressions share: a region is chosen by an answer, its likelihood, or what it is called.

Paper: §4.3, Table 5
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.bootstrap import Statistic, mean_statistic
from regiongpt.evaluate.task import Answer, Item
from regiongpt.evaluate.tasks.scoring import given, images_of
from regiongpt.prompts import NO_MATCH, parse_region_answer, region_answer

GENERATED: Final = "generate"
SCORED: Final = "score all choices"
CALLED: Final = "call each region"
RULES: Final = {
    GENERATED: "the generated answer must be Region [x] of a candidate; other answers, and that none fits, are wrong",
    SCORED: "the likeliest of Region [x] for every candidate and the sentence that none fits",
    CALLED: "the candidate that the model is likeliest to call by the expression, each asked about by itself",
}

READS: Final = ("text", "scores", "called")
"""Of an answer, one for each of these."""


def choices_of(candidates: int) -> tuple[str, ...]:
    """The answers to choose from: each region, and that none of them fits."""
    return (*map(region_answer, range(1, candidates + 1)), NO_MATCH)


def chosen(items: Sequence[Item], answers: Mapping[str, Answer]) -> dict[str, list[int | str | None]]:
    """What was chosen, for each protocol that the answers allow.

    Returns:
        By protocol, for each item the number of the region from 1, ``"none"`` for the sentence that none fits,
        ``"invalid"`` for anything else, None where there is no answer.

    Raises:
        DataError: There is no answer with a text or scores, or the scores are not as many as the choices.
    """
    found: dict[str, list[int | str | None]] = {}
    for protocol, kind, read in ((GENERATED, "text", _read), (SCORED, "scores", _best), (CALLED, "called", _likeliest)):
        said = given(items, answers, kind)
        if any(each is not None for each in said):
            found[protocol] = [
                None if each is None else read(each, item) for each, item in zip(said, items, strict=True)
            ]
    if not found:
        raise DataError("no item has an answer with a text or with scores")
    return found


def _read(text: str, item: Item) -> int | str:
    number = parse_region_answer(text)
    if number is None:
        return "none"
    return number if isinstance(number, int) and number <= len(item.regions) else "invalid"


def _best(scores: Sequence[float], item: Item) -> int | str:
    if len(scores) != len(item.regions) + 1:
        raise DataError(f"item {item.id}: {len(scores)} scores for {len(item.regions)} regions and none of them")
    best = int(np.argmax(scores))
    return best + 1 if best < len(item.regions) else "none"


def _likeliest(called: Sequence[float], item: Item) -> int | str:
    if len(called) != len(item.regions):
        raise DataError(f"item {item.id}: {len(called)} likelihoods for {len(item.regions)} regions")
    return int(np.argmax(called)) + 1


def choice_statistics(
    items: Sequence[Item], picked: Sequence[int | str | None], right: Sequence[bool]
) -> dict[str, Statistic]:
    """Accuracy, what chance would give, and the shares of answers that choose nothing."""
    images = images_of(items)
    shares: dict[str, list[float]] = {
        "accuracy": [float(each) for each in right],
        "chance": [item.detail["chance"] for item in items],
        "no_match": [float(each == "none") for each in picked],
        "invalid": [float(each == "invalid" or each is None) for each in picked],
    }
    return {name: mean_statistic(images, values) for name, values in shares.items()}

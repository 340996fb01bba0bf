"""Which of several regions an expression refers to: by the model's answer, by its words for each region, or by both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regiongpt.inference.closed_set import answer_scores, closed_set, log_likelihoods
from regiongpt.inference.engine import Engine, Scene, question_turns
from regiongpt.inference.options import By
from regiongpt.prompts import NO_MATCH, question, region_answer


@dataclass(frozen=True, kw_only=True)
class Located:
    """Which of several regions fits an expression.

    Attributes:
        index: 0-based position in the list of regions given; None where none of them fits.
        number: the same, 1-based, as the model says it; None likewise.
        text: the answer in the paper's words, ``Region [N]`` or the no-match sentence.
        probability: of that answer, given that the answer is one of the regions or none.
        probabilities: of each region, in the order given, and last of none; they sum to 1.
    """

    index: int | None
    number: int | None
    text: str
    probability: float
    probabilities: tuple[float, ...]


def locate_expressions(
    engine: Engine, scene: Scene, pooled: Sequence[Tensor], expressions: Sequence[str], by: By
) -> list[Located]:
    """What :meth:`RegionPredictor.locate` does, with checked arguments.

    Args:
        engine: the model.
        scene: the image.
        pooled: the features (K, D) of each region, at least one.
        expressions: what to find, each by itself.
        by: one of :data:`~regiongpt.inference.options.WAYS`.

    Raises:
        TooLong: an expression and the regions do not fit the model's context.
    """
    numbers = range(1, len(pooled) + 1)
    answers = [*map(region_answer, numbers), NO_MATCH]
    asked = [question("locate", regions=numbers, expression=each) for each in expressions if by != "words"]
    # All made ready before the first is scored: what is too long is known at once.
    ready = [closed_set(engine, question_turns((), text), len(pooled), answers) for text in asked]
    called_ER = called(engine, scene, pooled, expressions) if by != "answer" and expressions else torch.empty(0)
    features = torch.cat(list(pooled))
    results = []
    for row in range(len(expressions)):
        if by == "words":
            shares = torch.cat([called_ER[row].softmax(-1), torch.zeros(1)])
        else:
            shares = log_likelihoods(engine, scene, ready[row], [features])[0].softmax(-1)
        if by == "both":
            none = shares[-1:]
            shares = torch.cat([(1 - none) * called_ER[row].softmax(-1), none])
        # Two regions that fit equally share their probability; that does not make it likelier that none fits.
        best = int(shares.argmax()) if by == "answer" or shares[-1] > 0.5 else int(shares[:-1].argmax())
        found = best if best < len(pooled) else None
        results.append(
            Located(
                index=found,
                number=None if found is None else found + 1,
                text=answers[best],
                probability=float(shares[best]),
                probabilities=tuple(shares.tolist()),
            )
        )
    return results


def called(engine: Engine, scene: Scene, pooled: Sequence[Tensor], expressions: Sequence[str]) -> Tensor:
    """Log likelihood (E, R) of each expression as what the model calls a region, each region by itself.

    Raises:
        TooLong: an expression does not fit the model's context.
    """
    turns = question_turns((), question("refer", regions=[1]))
    different = list(dict.fromkeys(expressions))
    scores_RE = answer_scores(engine, scene, turns, pooled, different)
    return scores_RE.T[[different.index(each) for each in expressions]]

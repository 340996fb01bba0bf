"""The class of a region from a closed set, as an answer that can be sorted, cut short and told apart."""

from collections.abc import Sequence
from dataclasses import dataclass

from regiongpt.inference.closed_set import answer_scores
from regiongpt.inference.engine import LEAST_ROOM, Engine, Scene, question_turns
from regiongpt.inference.options import ClassifyOptions, Options
from regiongpt.prompts import question
from regiongpt.regions import Region


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The class of one region, chosen from a closed set.

    Attributes:
        label: the likeliest choice.
        probability: of that choice, given that the answer is one of the choices.
        probabilities: of every choice, in the order given, summing to 1; or with ``top_k`` of the likeliest alone, the
            likeliest first.
        text: the answer as generated freely, without holding the model to the choices; None unless it was asked for.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    text: str | None = None

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` likeliest choices with their probabilities, the likeliest first."""
        return sorted(self.probabilities.items(), key=lambda choice: -choice[1])[: max(0, k)]


def classify_regions(
    engine: Engine, scene: Scene, regions: Sequence[Region], names: Sequence[str], options: ClassifyOptions
) -> list[Classified]:
    """What :meth:`RegionPredictor.classify` does, with names that :func:`regiongpt.prompts.check_choices` has checked.

    Raises:
        RegionError: a region does not fit the image.
    """
    text = question("classify", regions=[1], label_set=options.label_set)
    scores_BA = answer_scores(
        engine,
        scene,
        question_turns((), text),
        engine.pool_each(scene, regions),
        names,
        length_normalized=options.length_normalized,
        calibrated=options.calibrated,
    )
    short = Options(max_new_tokens=LEAST_ROOM)
    free = engine.answer_each(scene, text, regions, short) if options.generate else []
    results = []
    # A row at a time: of thousands of names and hundreds of regions, only what is asked for is kept.
    for index, scores_A in enumerate(scores_BA):
        shares_A = scores_A.softmax(-1)
        if options.top_k is None:
            kept = dict(zip(names, shares_A.tolist(), strict=True))
        else:
            best = shares_A.topk(min(options.top_k, len(names)))
            kept = {names[k]: share for k, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        label = max(kept, key=kept.__getitem__)
        answer = free[index].text if free else None
        results.append(Classified(label=label, probability=kept[label], probabilities=kept, text=answer))
    return results

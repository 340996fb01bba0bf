"""The class of a region from a closed set, as an answer that can be sorted, cut short and told apart."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from regiongpt.errors import ConfigError
from regiongpt.inference.closed_set import answer_scores
from regiongpt.inference.engine import LEAST_ROOM, Engine, Options, Scene, question_turns
from regiongpt.prompts import LABEL_SETS
from regiongpt.prompts import question as task_question
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
    engine: Engine,
    scene: Scene,
    regions: Sequence[Region],
    names: Sequence[str],
    *,
    label_set: str,
    generate: bool,
    length_normalized: bool,
    calibrated: bool,
    top_k: int | None,
) -> list[Classified]:
    """What :meth:`RegionPredictor.classify` does, of checked names.

    Raises:
        RegionError: a region does not fit the image.
        ConfigError: ``top_k`` is below 1, or both ways of handling length are asked for.
    """
    if top_k is not None and top_k < 1:
        raise ConfigError(f"expected top_k of at least 1, got {top_k}")
    text = task_question("classify", regions=[1], label_set=label_set)
    turns, pooled = question_turns((), text), engine.pool_each(scene, regions)
    scores_BA = answer_scores(
        engine, scene, turns, pooled, names, length_normalized=length_normalized, calibrated=calibrated
    )
    free = engine.answer_each(scene, text, regions, Options(max_new_tokens=LEAST_ROOM)) if generate else []
    results = []
    # A row at a time: of thousands of names and hundreds of regions, only what is asked for is kept.
    for index, scores_A in enumerate(scores_BA):
        shares_A = scores_A.softmax(-1)
        if top_k is None:
            kept = dict(zip(names, shares_A.tolist(), strict=True))
        else:
            best = shares_A.topk(min(top_k, len(names)))
            kept = {names[k]: share for k, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        label = max(kept, key=kept.__getitem__)
        answer = free[index].text if generate else None
        results.append(Classified(label=label, probability=kept[label], probabilities=kept, text=answer))
    return results


def check_choices(choices: Sequence[str] | None, label_set: str) -> list[str]:
    """The names to choose from, without blanks around them.

    Raises:
        ConfigError: they are none, blank, repeated or one string; or there are none and the label set is unknown.
    """
    if choices is None:
        if label_set not in LABEL_SETS:
            raise ConfigError(f"expected choices, or a label_set among {', '.join(LABEL_SETS)}, got {label_set!r}")
        return list(LABEL_SETS[label_set])
    if isinstance(choices, str):
        raise ConfigError(f"expected choices as a list of names, got one string: {choices!r}")
    names = [name.strip() for name in choices]
    if not names or not all(names):
        raise ConfigError(f"expected at least one choice, and none of them blank, got {list(choices)!r:.200}")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ConfigError(f"expected every choice once, got {', '.join(map(repr, repeated[:5]))} more than once")
    return names

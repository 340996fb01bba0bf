"""The worst mistakes of a task: what was answered wrong with the most confidence, drawn on its image."""

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from regiongpt.drawing import draw_regions
from regiongpt.errors import RegionGPTError
from regiongpt.evaluate.task import Answer, Item, Result
from regiongpt.pages import beside, card, fault, picture, turn

SIDE: Final = 640
_ALIKE: Final = 3
"""Most mistakes of one truth, and of one image: a page of one confusion alone would show little."""


def worst(result: Result, answers: Mapping[str, Answer], count: int) -> list[dict[str, Any]]:
    """The rows of a result that were answered worst, the worst first.

    Lowest score first, by the first figure that an item has a score of; among equals the most confident first.

    Args:
        result: The scored task.
        answers: By item id.
        count: At most so many, and at most three of one truth or of one image.
    """
    first = {row["id"]: next(iter(row["scores"].values()), 1.0) for row in result.rows}
    wrong = [row for row in result.rows if not row["missing"] and first[row["id"]] < 1.0]
    wrong.sort(key=lambda row: (first[row["id"]], -_confidence(answers.get(row["id"])), str(row["id"])))
    chosen: list[dict[str, Any]] = []
    seen: Counter[tuple[str, Any]] = Counter()
    for row in wrong:
        marks = [("truth", row["truth"]), ("image", row["image_id"])]
        if len(chosen) < count and all(seen[mark] < _ALIKE for mark in marks):
            chosen.append(row)
            seen.update(marks)
    return chosen


def _confidence(answer: Answer | None) -> float:
    """How sure the model was, as far as is known: of its choice, else of its text."""
    if answer is None:
        return 0.0
    return max(answer.scores) if answer.scores else answer.probability or 0.0


def gallery(chosen: Sequence[Mapping[str, Any]], items: Mapping[str, Item], answers: Mapping[str, Answer]) -> str:
    """Cards of HTML, each with the image, its regions, the question, the answer and the truth.

    Args:
        chosen: Rows of a result.
        items: By id.
        answers: By item id.
    """
    return "\n".join(_card(row, items[row["id"]], answers.get(row["id"])) for row in chosen)


def _card(row: Mapping[str, Any], item: Item, answer: Answer | None) -> str:
    try:
        shown: str = picture(
            draw_regions(item.image, item.regions), f"{item.image.name} with the regions asked about", SIDE
        )
    except RegionGPTError as error:
        shown = fault(str(error))
    said = turn(item.question, str(row["answer"] if row["answer"] is not None else "no answer"))
    facts = [f"<p>Right: <strong>{html.escape(item.truth)}</strong></p>"]
    if answer is not None and answer.scores and item.choices:
        ranked = sorted(zip(item.choices, answer.scores, strict=True), key=lambda pair: -pair[1])[:3]
        listed = ", ".join(f"{html.escape(name)} {score:.2f}" for name, score in ranked)
        facts.append(f"<p>Scores: {listed}</p>")
    if answer is not None and answer.probability is not None:
        facts.append(f"<p>Probability of the text: {answer.probability:.2f}</p>")
    groups = ", ".join(f"{name} {value}" for name, value in item.groups.items())
    return card(
        beside(shown, said + "".join(facts)), f"{item.id}", f"{item.image.name}{f' · {groups}' if groups else ''}"
    )

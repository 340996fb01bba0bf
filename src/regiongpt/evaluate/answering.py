"""The questions of a benchmark put to a model, image by image, and its answers as plain json."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regiongpt.errors import RegionGPTError
from regiongpt.evaluate.store import digest
from regiongpt.evaluate.task import Answer, Item
from regiongpt.images import load_image

if TYPE_CHECKING:
    from regiongpt.inference import RegionPredictor


def question_key(model: str, image: str, item: Item) -> str:
    """Of all that decides the answer to an item.

    Args:
        model: Key of the model, from :func:`regiongpt.evaluate.manifest.model_identity`.
        image: SHA-256 of the image file.
        item: The question.
    """
    regions = [region.to_dict() for region in item.regions]
    asked = [item.question, regions, list(item.choices), item.max_new_tokens if item.generate else None]
    return digest(model, image, asked)


def to_json(answer: Answer) -> dict[str, Any]:
    """An answer as plain json, without what is not known."""
    known: dict[str, Any] = {"text": answer.text, "probability": answer.probability}
    if answer.scores is not None:
        known["scores"] = list(answer.scores)
    return {name: value for name, value in known.items() if value is not None}


def from_json(values: dict[str, Any]) -> Answer:
    """The answer that :func:`to_json` was given."""
    scores = values.get("scores")
    return Answer(
        text=values.get("text"),
        probability=values.get("probability"),
        scores=tuple(map(float, scores)) if scores is not None else None,
    )


def answer_image(predictor: "RegionPredictor", items: Sequence[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Answers the items of one image, which is encoded once.

    Args:
        predictor: The model.
        items: All of the same image file.

    Yields:
        Each item with its answer as plain json; ``{"refused": why}`` where the question does not fit the model's
        context.

    Raises:
        DataError: The image cannot be read, or a question makes no sense.
        RegionError: A region does not fit the image.
    """
    from regiongpt.inference.engine import TooLong

    predictor.set_image(load_image(items[0].image))
    for item in items:
        try:
            yield item, to_json(_answer(predictor, item))
        except TooLong as error:
            yield item, {"refused": str(error)}
        except RegionGPTError as error:
            raise type(error)(f"{item.image.name}, item {item.id}: {error}") from error


def _answer(predictor: "RegionPredictor", item: Item) -> Answer:
    from regiongpt.inference.closed_set import score_answers
    from regiongpt.inference.engine import question_turns

    answer = Answer()
    if item.choices:
        engine, scene = predictor.engine, predictor._here()
        pooled = [engine.pool(scene, item.regions)]
        turns = question_turns((), item.question)
        row = score_answers(engine, scene, turns, pooled, item.choices, False)[0]
        answer = replace(answer, scores=tuple(row))
    if item.generate:
        said = predictor.ask(item.question, item.regions, max_new_tokens=item.max_new_tokens)
        answer = replace(answer, text=said.text)
    return answer

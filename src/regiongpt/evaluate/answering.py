"""The questions of a benchmark put to a model, image by image, and its answers as plain JSON."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from regiongpt.errors import DataError, RegionError, RegionGPTError
from regiongpt.evaluate.task import Answer, Item
from regiongpt.images import load_image
from regiongpt.storage import digest

if TYPE_CHECKING:
    from torch import Tensor

    from regiongpt.inference import RegionPredictor
    from regiongpt.inference.engine import Engine, Prompt, Scene

SHORT: Final = 16
"""Tokens up to which an answer is one of a closed set, whose probability is worth another pass."""


def question_key(model: str, image: str, item: Item) -> str:
    """Key of an answer: a hash of everything that determines it.

    Args:
        model: Key of the model, from :func:`regiongpt.evaluate.runs.model_identity`.
        image: SHA-256 of the image file.
        item: The question.
    """
    regions = [region.to_dict() for region in item.regions]
    asked = [item.question, regions, list(item.choices), item.max_new_tokens if item.generate else None]
    asked += [item.expression] if item.expression else []
    return digest(model, image, asked)


def answer_image(predictor: "RegionPredictor", items: Sequence[Item]) -> list[dict[str, Any]]:
    """Answer the items of one image, which is encoded once; their questions run as a batch behind it.

    Args:
        predictor: The model.
        items: All of the same image file.

    Returns:
        The answer to each as plain JSON; ``{"refused": why}`` where the image cannot be read, a region lies outside it,
        or the question does not fit the model's context: what is wrong with one item does not end a long run.

    Raises:
        DataError: A question makes no sense, or the model's numbers are not finite.
    """
    engine = predictor.engine
    try:
        photo = load_image(items[0].image)
    except DataError as error:
        return [{"refused": str(error)} for _ in items]
    image = _Image(engine, engine.look(photo), items)
    scores, texts, called = image.scores(), image.texts(), image.called()
    found = []
    for place, item in enumerate(items):
        if place in image.refused:
            found.append({"refused": image.refused[place]})
            continue
        likelihoods, text = scores.get(place), texts.get(place)
        with _naming(item):
            answer = Answer(
                text=text,
                probability=image.probability(place, text, likelihoods) if text is not None else None,
                scores=tuple(likelihoods.softmax(-1).tolist()) if likelihoods is not None else None,
                called=called.get(place),
            )
        found.append(answer.to_dict())
    return found


class _Image:
    """The items of one encoded image."""

    def __init__(self, engine: "Engine", scene: "Scene", items: Sequence[Item]) -> None:
        self.engine, self.scene, self.items = engine, scene, items
        self.refused: dict[int, str] = {}
        self.pooled = self._pool()

    def _pool(self) -> list["Tensor"]:
        """Features of each item's regions, all pooled in one go."""
        import torch

        from regiongpt.inference.engine import check_regions

        for place, item in enumerate(self.items):
            try:
                check_regions(item.regions, self.scene.width, self.scene.height)
            except RegionError as error:
                self.refused[place] = str(error)
        kept = [() if place in self.refused else item.regions for place, item in enumerate(self.items)]
        pooled = self.engine.pool(self.scene, [region for regions in kept for region in regions])
        rows = self.engine.processor.tokens_per_region
        return list(torch.split(pooled, [rows * len(regions) for regions in kept]))

    def scores(self) -> dict[int, "Tensor"]:
        """Log likelihoods of the choices, by item; items with the same question and choices run together."""
        alike: dict[tuple[str, tuple[str, ...], int], list[int]] = {}
        for place, item in enumerate(self.items):
            if item.choices and place not in self.refused:
                alike.setdefault((item.question, item.choices, len(item.regions)), []).append(place)
        found: dict[int, Tensor] = {}
        for (_, choices, _), places in alike.items():
            rows = self._likelihoods(places, choices)
            found |= dict(zip(places, rows, strict=True)) if rows is not None else {}
        return found

    def called(self) -> dict[int, tuple[float, ...]]:
        """Log likelihoods of the regions to be called by the expression, by item."""
        import torch

        from regiongpt.inference.choices import called

        found: dict[int, tuple[float, ...]] = {}
        for place, item in enumerate(self.items):
            if not item.expression or place in self.refused:
                continue
            pooled = torch.split(self.pooled[place], self.engine.processor.tokens_per_region)
            with self._asking([place]):
                found[place] = tuple(called(self.engine, self.scene, pooled, [item.expression])[0].tolist())
        return found

    def texts(self) -> dict[int, str]:
        """Free answers, by item."""
        from regiongpt.inference.engine import question_turns
        from regiongpt.inference.options import Options

        ready: dict[tuple[str, int, int], Prompt] = {}
        asked: list[tuple[Scene, Prompt, Options]] = []
        places = []
        for place, item in enumerate(self.items):
            if not item.generate or place in self.refused:
                continue
            key = (item.question, len(item.regions), item.max_new_tokens)
            if key not in ready:
                with self._asking([place]):
                    ready[key] = self.engine.prompt(
                        question_turns((), item.question), self.pooled[place], len(item.regions), item.max_new_tokens
                    )
            if place in self.refused:
                continue
            prompt = replace(ready[key], pooled=self.pooled[place])
            asked.append((self.scene, prompt, Options(max_new_tokens=item.max_new_tokens)))
            places.append(place)
        return {places[number]: answer.text for number, answer in self.engine.answers(asked)}

    def probability(self, place: int, text: str, likelihoods: "Tensor | None") -> float | None:
        """Probability of a free answer and its end; None for long ones, which no protocol asks for."""
        item = self.items[place]
        if likelihoods is not None and text in item.choices:
            return min(1.0, math.exp(float(likelihoods[item.choices.index(text)])))
        if item.max_new_tokens > SHORT or not text:
            return None
        rows = self._likelihoods([place], (text,))
        return min(1.0, math.exp(float(rows[0, 0]))) if rows is not None else None

    def _likelihoods(self, places: Sequence[int], answers: tuple[str, ...]) -> "Tensor | None":
        """Log likelihoods (B, A) of answers to items with the same question; None where it does not fit the context."""
        from regiongpt.inference.choices import answer_scores
        from regiongpt.inference.engine import question_turns

        turns = question_turns((), self.items[places[0]].question)
        with self._asking(places):
            return answer_scores(self.engine, self.scene, turns, [self.pooled[each] for each in places], answers)
        return None  # refused

    @contextmanager
    def _asking(self, places: Sequence[int]) -> Iterator[None]:
        """Refuse items whose question does not fit the model's context; other mistakes name the item."""
        from regiongpt.inference.engine import TooLong

        try:
            with _naming(self.items[places[0]]):
                yield
        except TooLong as error:
            self.refused |= dict.fromkeys(places, str(error))


@contextmanager
def _naming(item: Item) -> Iterator[None]:
    """Name the item that a mistake is in."""
    try:
        yield
    except RegionGPTError as error:
        raise type(error)(f"{item.image.name}, item {item.id}: {error}") from error

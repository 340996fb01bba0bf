"""A model's answers to the questions about one image, which is encoded once."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from regiongpt.errors import DataError, RegionError, naming
from regiongpt.evaluate.task import Answer, Item
from regiongpt.images import load_image

if TYPE_CHECKING:
    from torch import Tensor

    from regiongpt.inference import RegionPredictor

SHORT: Final = 16
"""Longest answer, in tokens, whose probability is computed when it is none of the choices; that takes another pass."""


def answer_image(predictor: "RegionPredictor", items: Sequence[Item]) -> list[dict[str, Any]]:
    """Answer the items of one image; their questions run as a batch behind it.

    Returns:
        Each answer as plain JSON; ``{"refused": why}`` where the image cannot be read, a region lies outside it, or the
        question does not fit the model's context.
    """
    try:
        photo = load_image(items[0].image)
    except DataError as error:
        return [{"refused": str(error)} for _ in items]
    questions = _Questions(predictor, photo, items)
    likelihoods, texts, called = questions.score_choices(), questions.generate(), questions.score_regions()
    found: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        if place in questions.refused:
            found.append({"refused": questions.refused[place]})
            continue
        scores, text = likelihoods.get(place), texts.get(place)
        with naming(_name(item)):
            answer = Answer(
                text=text,
                probability=None if text is None else questions.probability(place, text, scores),
                scores=None if scores is None else tuple(scores.softmax(-1).tolist()),
                called=called.get(place),
            )
        found.append(answer.to_dict())
    return found


class _Questions:
    """The items of one encoded image, by place; those that cannot be asked are refused."""

    def __init__(self, predictor: "RegionPredictor", photo: Any, items: Sequence[Item]) -> None:
        import torch

        from regiongpt.inference.engine import check_regions

        self.engine, self.items = predictor.engine, items
        self.refused: dict[int, str] = {}
        for place, item in enumerate(items):
            try:
                check_regions(item.regions, *photo.size)
            except RegionError as error:
                self.refused[place] = str(error)
        self.scene = self.engine.encode_image(photo)
        kept = [() if place in self.refused else item.regions for place, item in enumerate(items)]
        pooled = self.engine.pool(self.scene, [region for regions in kept for region in regions])
        rows = self.engine.processor.tokens_per_region
        self.pooled = torch.split(pooled, [rows * len(regions) for regions in kept])

    def score_choices(self) -> dict[int, "Tensor"]:
        """Log likelihoods of the choices; items with the same question and choices run together."""
        together: dict[tuple[str, tuple[str, ...], int], list[int]] = {}
        for place, item in enumerate(self.items):
            if item.choices and place not in self.refused:
                together.setdefault((item.question, item.choices, len(item.regions)), []).append(place)
        found: dict[int, Tensor] = {}
        for (_, choices, _), places in together.items():
            if (scores := self._likelihoods(places, choices)) is not None:
                found |= zip(places, scores, strict=True)
        return found

    def score_regions(self) -> dict[int, tuple[float, ...]]:
        """Log likelihoods that each region is called by the expression."""
        import torch

        from regiongpt.inference.choices import called

        found: dict[int, tuple[float, ...]] = {}
        for place, item in enumerate(self.items):
            if item.expression and place not in self.refused:
                pooled = torch.split(self.pooled[place], self.engine.processor.tokens_per_region)
                with self._asking([place]):
                    found[place] = tuple(called(self.engine, self.scene, pooled, [item.expression])[0].tolist())
        return found

    def generate(self) -> dict[int, str]:
        """Free answers."""
        from regiongpt.inference.engine import question_turns
        from regiongpt.inference.options import Options

        ready: dict[tuple[str, int, int], Any] = {}
        asked, places = [], []
        for place, item in enumerate(self.items):
            if not item.generate or place in self.refused:
                continue
            key = (item.question, len(item.regions), item.max_new_tokens)
            if key not in ready:
                with self._asking([place]):
                    ready[key] = self.engine.prompt(question_turns((), item.question), self.pooled[place], *key[1:])
            if key in ready:
                prompt = replace(ready[key], pooled=self.pooled[place])
                asked.append((self.scene, prompt, Options(max_new_tokens=item.max_new_tokens)))
                places.append(place)
        return {places[number]: answer.text for number, answer in self.engine.answers(asked)}

    def probability(self, place: int, text: str, scores: "Tensor | None") -> float | None:
        """Probability of a free answer and its end; None for a long one, which no protocol asks for."""
        item = self.items[place]
        if scores is not None and text in item.choices:
            return min(1.0, math.exp(float(scores[item.choices.index(text)])))
        if item.max_new_tokens > SHORT or not text:
            return None
        found = self._likelihoods([place], (text,))
        return None if found is None else min(1.0, math.exp(float(found[0, 0])))

    def _likelihoods(self, places: Sequence[int], answers: tuple[str, ...]) -> "Tensor | None":
        """Log likelihoods (B, A) of answers to items with the same question; None where it is too long."""
        from regiongpt.inference.choices import answer_scores
        from regiongpt.inference.engine import question_turns

        turns = question_turns((), self.items[places[0]].question)
        with self._asking(places):
            return answer_scores(self.engine, self.scene, turns, [self.pooled[each] for each in places], answers)
        return None

    @contextmanager
    def _asking(self, places: Sequence[int]) -> Iterator[None]:
        """Refuse items whose question does not fit the model's context."""
        from regiongpt.inference.engine import TooLong

        try:
            with naming(_name(self.items[places[0]])):
                yield
        except TooLong as error:
            self.refused |= dict.fromkeys(places, str(error))


def _name(item: Item) -> str:
    return f"{item.image.name}, item {item.id}"

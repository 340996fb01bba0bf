"""Questions with one right answer about annotated images, made of facts: always the same, in the first wording."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regiongpt.data.coco import Box, ImageAnnotations
from regiongpt.data.facts import View, ViewObject, clashing, distinctions
from regiongpt.data.wording import express, noun, pick, with_article
from regiongpt.errors import ConfigError
from regiongpt.prompts import question, region_answer
from regiongpt.regions import Region

LOCATED_AMONG = 5
"""Boxes that an expression is held against."""


@dataclass(frozen=True, kw_only=True)
class DevQuestion:
    """One question with one right answer about a whole image."""

    image: ImageAnnotations
    task: str  # a key of prompts.QUESTIONS
    text: str  # without <image>
    regions: list[Region]  # what its placeholders stand for, in pixels of the image
    answer: str  # class name or "Region [n]"; for a description the class name it must contain
    category: str  # of the object asked about
    share: float = 0.0  # area of the object's box as a share of the image
    kind: str = ""  # of expression that the answer rests on
    expression: str = ""  # what to find, for "locate"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as chat messages."""
        return [{"role": "user", "content": f"<image>\n{self.text}"}]


def dev_questions(
    images: Sequence[ImageAnnotations], task: str, seed: int = 0, colours: Mapping[int, str] | None = None
) -> list[DevQuestion]:
    """The questions of one task.

    Args:
        images: Whole images, not views.
        task: ``"classify"``, ``"describe"`` or ``"caption"``: one question for each box that is not a crowd.
            ``"locate"``: up to three an image, each among five boxes with an expression that fits one alone.
        seed: Picks candidates and expressions.
        colours: Annotation id -> colour over all images, for expressions; None leaves colours out.

    Raises:
        ConfigError: Another task.
    """

    def ask(image: ImageAnnotations, boxes: Sequence[Box], each: Any, **more: Any) -> DevQuestion:
        area = (each.box[2] - each.box[0]) * (each.box[3] - each.box[1])
        regions, share = [Region.box(*box) for box in boxes], area / (image.width * image.height)
        return DevQuestion(image=image, task=task, regions=regions, category=each.category, share=share, **more)

    if task in ("classify", "describe", "caption"):
        text = question(task, 0, regions=[1])
        return [
            ask(image, [each.box], each, text=text, answer=each.category)
            for image in images
            for each in image.objects
            if not each.iscrowd
        ]
    if task != "locate":
        raise ConfigError(f"expected classify, describe, caption or locate, got {task!r}")
    found: list[DevQuestion] = []
    for index, image in enumerate(images):
        rng, view = np.random.default_rng((seed, index)), View(image)
        for _ in range(3 if len(view.askable) >= LOCATED_AMONG else 0):
            options = [view.askable[k] for k in rng.permutation(len(view.askable))[:LOCATED_AMONG]]
            target = options[int(rng.integers(LOCATED_AMONG))]
            expression = fitting_expression(rng, view, target, options, colours or {})
            if expression is not None:
                kind, text = expression
                asked = question(task, 0, regions=range(1, LOCATED_AMONG + 1), expression=text)
                more = {"text": asked, "answer": region_answer(options.index(target) + 1)}
                found.append(ask(image, [o.box for o in options], target, kind=kind, expression=text, **more))
    return found


def fitting_expression(
    rng: np.random.Generator,
    view: View,
    target: ViewObject,
    options: Sequence[ViewObject],
    colours: Mapping[int, str],
) -> tuple[str, str] | None:
    """A kind and an expression that fits the target alone: ("the ...") in the view, ("a ...") among the options."""
    alike = [each for each in options if each.category == target.category and each.id != target.id]
    colour = colours.get(target.id)
    found = distinctions(view, target, colours)
    if not alike:
        found.append(("a class", ""))
    if colour is not None and not any(clashing(colour, colours.get(each.id)) for each in alike):
        found.append(("a colour", colour))
    if not found:
        return None
    kind, value = pick(rng, found)
    if kind.startswith("a "):
        return kind, with_article(noun(target.category, value))
    return kind, express(rng, target.category, kind, value)

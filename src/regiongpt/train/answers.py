"""What the model answers about a few fixed dev regions while it trains; asking does not change what it learns."""

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from regiongpt.data.mixture import open_mixture
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.inference import RegionPredictor
from regiongpt.prompts import IMAGE_TOKEN
from regiongpt.regions import Region
from regiongpt.train.recipe import DataConfig

log = logging.getLogger(__name__)
LONGEST: Final = 64
"""Tokens of an answer."""
PICTURES: Final = "answers"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a dev image that is asked again and again."""

    name: str  # of the record or the image
    image: Path
    regions: tuple[Region, ...]  # what its placeholders stand for, in pixels
    text: str  # without <image>
    expected: str  # the answer of the data, or the class of the region that is to be described


def load_questions(data: DataConfig, count: int, seed: int) -> list[Question]:
    """Pick questions from the dev records, each about another image: the same ones for the same seed."""
    mixture = open_mixture(data.dev_mixture, data.root if not Path(data.dev_mixture).is_dir() else "", seed)

    def found() -> Iterator[Question]:
        for item in range(len(mixture)):
            drawn = mixture.draw(item)
            record = drawn.records[drawn.index]
            path = drawn.records.image_path(record)
            if path is not None and record.regions:
                question, answer, *_ = record.messages(seed, 0, drawn.index, data.suffixes)
                yield Question(
                    name=f"{record.id} ({record.turns[0].task})",
                    image=path,
                    regions=tuple(each.region for each in record.regions),
                    text=question["content"].removeprefix(f"{IMAGE_TOKEN}\n"),
                    expected=answer["content"],
                )

    return choose_questions(found(), count, data.dev_mixture)


def choose_questions(found: Iterable[Question], count: int, where: str) -> list[Question]:
    """The first questions, each about another image; DataError if there is none in the data that ``where`` names."""
    chosen: dict[Path, Question] = {}
    for each in found:
        if each.image not in chosen:
            load_image(each.image)
            chosen[each.image] = each
        if len(chosen) == count:
            break
    if not chosen:
        raise DataError(f"{where}: no dev data with regions to ask about")
    return list(chosen.values())


def ask(model: Any, processor: Any, questions: Sequence[Question]) -> list[str]:
    """The model's answers, or why there is none; weights, modes and random numbers are afterwards as they were."""
    answers = []
    with _untouched(model):
        predictor = RegionPredictor(model, processor)
        for each in questions:
            try:
                predictor.set_image(each.image)
                answers.append(predictor.ask(each.text, each.regions, max_new_tokens=LONGEST).text)
            except (RegionGPTError, RuntimeError) as error:  # no reason to end the training
                why = " ".join(str(error).split())
                log.warning("%s: no answer: %s", each.name, why)
                answers.append(f"(no answer: {why[:200]})")
    return answers


def draw(questions: Sequence[Question], folder: Path) -> None:
    """Write the picture of each question, its regions numbered, as ``answers/K.jpg``."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(questions):
        picture = draw_regions(each.image, list(each.regions))
        picture.thumbnail((640, 640))
        picture.save(folder / PICTURES / f"{number}.jpg", quality=85)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])

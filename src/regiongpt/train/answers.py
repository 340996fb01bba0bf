"""What the model answers about a few fixed dev regions while it trains; asking does not change what it learns."""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from regiongpt.data.coco import load_coco, photo_sources
from regiongpt.data.mixture import open_mixture
from regiongpt.data.sampling import dev_questions
from regiongpt.drawing import draw_regions
from regiongpt.errors import ConfigError, DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.inference import RegionPredictor
from regiongpt.prompts import IMAGE_TOKEN
from regiongpt.regions import Region
from regiongpt.train.recipe import DataConfig

log = logging.getLogger(__name__)
LONGEST: Final = 64
"""Tokens of an answer."""
PICTURES: Final = "answers"
_TASKS = ("describe", "classify", "caption")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a dev image that is asked again and again.

    Attributes:
        name: Of the record or the image.
        image: File.
        regions: Of it, in pixels.
        text: Without ``<image>``.
        expected: What the data answer, or the class of the region that is to be described.
    """

    name: str
    image: Path
    regions: tuple[Region, ...]
    text: str
    expected: str


def load_questions(data: DataConfig, count: int, seed: int) -> list[Question]:
    """Pick questions from the dev data: the same ones for the same seed.

    Args:
        data: Of the recipe.
        count: Questions, each about another image where there are as many.
        seed: Of the choice.

    Raises:
        ConfigError: The recipe names no dev data.
        DataError: The dev data cannot be read, or hold no question about regions.
    """
    if not data.dev_mixture and not data.dev_split:
        raise ConfigError(
            "watch.answer_steps: expected dev data whose regions can be asked about, got none; give data.dev_mixture "
            "(records) or data.dev_split (photographs), or leave watch.answer_steps out"
        )
    found: dict[Path, Question] = {}
    for each in _of_records(data, seed) if data.dev_mixture else _of_annotations(data, seed):
        if each.image not in found:
            load_image(each.image)
            found[each.image] = each
        if len(found) == count:
            break
    if not found:
        raise DataError(f"{data.dev_mixture or data.dev_split}: expected dev data with regions to ask about, got none")
    return list(found.values())


def _of_records(data: DataConfig, seed: int) -> Iterator[Question]:
    mixture = open_mixture(data.dev_mixture, data.root if not Path(data.dev_mixture).is_dir() else "", seed)
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


def _of_annotations(data: DataConfig, seed: int) -> Iterator[Question]:
    images = load_coco(photo_sources(Path(data.root), data.dev_split)).images
    number = 0
    for place in np.random.default_rng((seed, 41)).permutation(len(images)).tolist():
        path, task = images[place].path, _TASKS[number % len(_TASKS)]
        if asked := dev_questions([images[place]], task):
            # The largest region: what is said of it can be held against the picture.
            one = max(asked, key=lambda each: each.share)
            name, regions = f"{path.name} ({task})", tuple(one.regions)
            yield Question(name=name, image=path, regions=regions, text=one.text, expected=one.answer)
            number += 1


def ask(model: Any, processor: Any, questions: Sequence[Question]) -> list[str]:
    """The model's answers, one a question; the reason in its place where there is none.

    Weights, modes and random numbers are afterwards as they were.
    """
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


def check_whole(model: nn.Module) -> None:
    """Raise ConfigError for a model whose weights are spread over processes, which no process can ask alone."""
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError(
            "watch.answer_steps: a model whose weights are sharded over processes cannot be asked while it trains; "
            "leave it out, or train with --engine.sharding ddp. `regiongpt ask --model` asks any finished stage"
        )


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

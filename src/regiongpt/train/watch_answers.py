"""What the model answers about a few fixed dev regions while it learns; looking does not change what it learns."""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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

if TYPE_CHECKING:
    from regiongpt.train.recipe import DataConfig

log = logging.getLogger(__name__)
LONGEST: Final = 64
"""Tokens of an answer."""
PICTURES: Final = "answers"
_TASKS = ("describe", "classify", "caption")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A question about a dev image that is asked again and again.

    Attributes:
        name: Of the record or the image.
        image: File.
        regions: Of it, in pixels.
        question: Without ``<image>``.
        expected: What the data answer, or the class of the region that is to be described.
    """

    name: str
    image: Path
    regions: tuple[Region, ...]
    question: str
    expected: str


def load_watched(data: "DataConfig", count: int, seed: int) -> list[Watched]:
    """Picks questions from the dev data: the same ones for the same seed.

    Args:
        data: Of the recipe.
        count: Questions, each about another image where there are as many.
        seed: Of the choice.

    Raises:
        ConfigError: The recipe names no dev data.
        DataError: The dev data cannot be read, or hold no question about regions.
    """
    if data.dev_mixture:
        found = _of_records(data, count, seed)
    elif data.dev_split:
        found = _of_photographs(data, count, seed)
    else:
        raise ConfigError(
            "watch.answer_steps: expected dev data whose regions can be asked about, got none; give data.dev_mixture "
            "(records) or data.dev_split (photographs), or leave watch.answer_steps out"
        )
    if not found:
        raise DataError(f"{data.dev_mixture or data.dev_split}: expected dev data with regions to ask about, got none")
    return found


def _of_records(data: "DataConfig", count: int, seed: int) -> list[Watched]:
    mixture = open_mixture(data.dev_mixture, data.root if not Path(data.dev_mixture).is_dir() else "", seed)
    found: dict[Path, Watched] = {}
    for item in range(len(mixture)):
        if len(found) == count:
            break
        drawn = mixture.draw(item)
        record = drawn.record()
        path = drawn.records.image_path(record)
        if path is None or not record.regions or path in found:
            continue
        messages = record.messages(seed, 0, drawn.index, data.suffixes)
        load_image(path)
        found[path] = Watched(
            name=f"{record.id} ({record.turns[0].task})",
            image=path,
            regions=tuple(each.region for each in record.regions),
            question=messages[0]["content"].removeprefix(f"{IMAGE_TOKEN}\n"),
            expected=messages[1]["content"],
        )
    return list(found.values())


def _of_photographs(data: "DataConfig", count: int, seed: int) -> list[Watched]:
    images = load_coco(photo_sources(Path(data.root), data.dev_split)).images
    order = np.random.default_rng((seed, 41)).permutation(len(images))
    found: list[Watched] = []
    for place in order.tolist():
        if len(found) == count:
            break
        task = _TASKS[len(found) % len(_TASKS)]
        asked = dev_questions([images[place]], task)
        if asked:
            # The largest region: what is said of it can be held against the picture.
            one = max(asked, key=lambda each: each.share)
            name = f"{images[place].path.name} ({task})"
            found.append(
                Watched(
                    name=name,
                    image=images[place].path,
                    regions=tuple(one.regions),
                    question=one.text,
                    expected=one.answer,
                )
            )
    return found


def ask(model: Any, processor: Any, watched: Sequence[Watched]) -> list[str]:
    """The model's answers, one a question; the reason in its place where there is none.

    Weights, modes and random numbers are afterwards as they were.

    Args:
        model: That is being trained.
        processor: Of it.
        watched: Questions.
    """
    answers = []
    with _untouched(model):
        predictor = RegionPredictor(model, processor)
        for each in watched:
            try:
                predictor.set_image(each.image)
                answers.append(predictor.ask(each.question, each.regions, max_new_tokens=LONGEST).text)
            except (RegionGPTError, RuntimeError) as error:  # no reason to end the training
                reason = " ".join(str(error).split())
                log.warning("%s: no answer: %s", each.name, reason)
                answers.append(f"(no answer: {reason[:200]})")
    return answers


def check_whole(model: nn.Module) -> None:
    """Raises ConfigError for a model whose weights are spread over processes, which no process can ask alone."""
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError(
            "watch.answer_steps: a model whose weights are sharded over processes cannot be asked while it trains; "
            "leave it out, or train with --engine.sharding ddp. `regiongpt ask --model` asks any finished stage"
        )


def unwrapped(model: Any) -> Any:
    """The model itself, within what computes its loss, runs it on several devices, or compiles it."""
    while not hasattr(model, "generate"):
        names = ("_orig_mod", "module", "model")
        model = next(getattr(model, name) for name in names if isinstance(getattr(model, name, None), nn.Module))
    return model


def draw(watched: Sequence[Watched], folder: Path) -> None:
    """Writes the picture of each question, its regions numbered, as ``answers/K.jpg``."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(watched):
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

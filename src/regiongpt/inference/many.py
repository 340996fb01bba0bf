"""Many questions at once, about one image or several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.images import ImageSource, load_image
from regiongpt.inference.engine import Answer, Engine, Prompt, Scene, Turn, check_regions, question_turns
from regiongpt.inference.options import Options
from regiongpt.inference.scenes import Scenes
from regiongpt.regions import Region

_PHOTOS = 8
"""Images kept in memory between their check and their encoding; further ones are read a second time."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One of many questions, for :meth:`RegionPredictor.ask_many`.

    Attributes:
        text: in it ``<regionN>`` stands for the N-th region (from 1), any number of times.
        regions: in pixels of the image.
        image: what :func:`regiongpt.load_image` takes; None for the image that is set.
        history: earlier turns, the oldest first.
        max_new_tokens: as in :meth:`RegionPredictor.ask`; None, here and below, for what all questions were given.
        temperature: see there.
        top_p: see there.
        seed: see there; one given to all questions is made another one for each.
        stop: see there.
    """

    text: str
    regions: Region | Sequence[Region] = ()
    image: ImageSource | None = None
    history: Sequence[Turn] = ()
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None


@dataclass(kw_only=True)
class _Checked:
    """A question, all of it checked but its regions."""

    place: int
    regions: list[Region]
    prompt: Prompt
    options: Options


def answers(
    engine: Engine, scenes: Scenes, here: Scene | None, questions: Sequence[Question], options: Options, began: float
) -> Iterator[tuple[int, Answer]]:
    """Answer questions in one batch, image by image.

    Everything that can be wrong with a question is found before this returns.

    Args:
        engine: the model.
        scenes: where encoded images are kept.
        here: the image set, if any.
        questions: in any order; those about one image are answered together.
        options: for what a question leaves open.
        began: when the call came in, by ``time.perf_counter``.

    Yields:
        The place of a question and its answer, as they are finished.

    Raises:
        RegionGPTError: of its kind, with the number of the question, from 1, before what is wrong with it.
    """
    groups = _group(engine, here, questions, options)
    photos: dict[Any, Any] = {}
    for key, (source, members) in groups.items():
        size = (here.width, here.height) if here else (0, 0)
        if source is not None:
            with _naming(members[0].place):
                photo = load_image(source)
            if len(photos) < _PHOTOS or not isinstance(source, str | Path):  # a stream cannot be read twice
                photos[key] = photo
            size = photo.size
        for member in members:
            with _naming(member.place):
                check_regions(member.regions, *size)
    order: list[int] = []

    def asked() -> Iterator[tuple[Scene, Prompt, Options]]:
        for key, (source, members) in groups.items():
            if source is None:
                assert here is not None
                scene = here
            else:
                scene = scenes.get(photos.pop(key, None) or load_image(source))
            regions = [region for member in members for region in member.regions]
            sizes = [len(member.regions) * engine.processor.tokens_per_region for member in members]
            if len(members) > 1 and all(member.prompt is members[0].prompt for member in members):
                for member in members:
                    member.prompt = member.prompt.for_many(engine.model.config.region_token_id)
            for member, pooled in zip(members, torch.split(engine.pool(scene, regions), sizes), strict=True):
                order.append(member.place)
                yield scene, replace(member.prompt, pooled=pooled), member.options

    return ((order[place], answer) for place, answer in engine.answers(asked(), began))


def _group(
    engine: Engine, here: Scene | None, questions: Sequence[Question], options: Options
) -> dict[Any, tuple[ImageSource | None, list[_Checked]]]:
    """The questions of each image, the images in the order of their first question."""
    groups: dict[Any, tuple[ImageSource | None, list[_Checked]]] = {}
    known: dict[Any, Prompt] = {}
    nothing = engine.model.connector.mean.new_empty(0)
    for place, question in enumerate(questions):
        with _naming(place):
            if not isinstance(question, Question):
                raise ConfigError(f"expected a Question(text=..., regions=[...]), got {type(question).__name__}")
            if question.image is None and here is None:
                raise ConfigError("expected an image; call set_image(...) first, or give the question its own")
            own = _options(question, options, place)
            turns, regions = question_turns(question.history, question.text), Region.list_of(question.regions)
            same = (repr(turns), len(regions), own.max_new_tokens)
            if same not in known:
                known[same] = engine.prompt(turns, nothing, len(regions), own.max_new_tokens)
        source = question.image
        key = str(source) if isinstance(source, str | Path) else id(source)
        checked = _Checked(place=place, regions=regions, prompt=known[same], options=own)
        groups.setdefault(key, (source, []))[1].append(checked)
    return groups


def _options(question: Question, options: Options, place: int) -> Options:
    own = {name: value for name in Options.model_fields if (value := getattr(question, name)) is not None}
    if "seed" not in own and options.seed is not None:
        digest = blake2b(f"{options.seed} {place}".encode(), digest_size=8).digest()
        own["seed"] = int.from_bytes(digest) >> 1
    return options.replace(**own) if own else options


@contextmanager
def _naming(place: int) -> Iterator[None]:
    """Say which question it was that something is wrong with."""
    try:
        yield
    except RegionGPTError as error:
        raise type(error)(f"question {place + 1}: {error}") from error

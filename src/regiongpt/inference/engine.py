"""Runs the model: encodes images once, turns questions into prompts and prompts into answers.

Shapes: R regions, K tokens of a region, T prompt tokens, N tokens behind the shared prefix, D model width.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from regiongpt.coverage import Bounds
from regiongpt.errors import ConfigError, DataError
from regiongpt.inference.options import ROWS, Detail, Options
from regiongpt.inference.scheduler import Job, Scheduler, TextReader
from regiongpt.inference.shared_prefix import Prefix, decoder_for
from regiongpt.model.modeling import CROPS
from regiongpt.prompts import check_text
from regiongpt.regions import Region

T = TypeVar("T")
POOLED = 256
"""Regions whose weights on the grid are in memory at a time."""
Turn = dict[str, str]
LEAST_ROOM = 32
"""Tokens that an answer needs in the model's context, unless fewer are requested."""


class Latest(Generic[T]):
    """Least-recently-used cache; thread-safe."""

    def __init__(self, most: int) -> None:
        self.most, self.kept, self.lock = most, dict[Hashable, T](), threading.RLock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, computed if not cached; the least recently used is evicted."""
        with self.lock:
            value = self.kept.pop(key) if key in self.kept else make()
            self.kept[key] = value
            while len(self.kept) > self.most:
                del self.kept[next(iter(self.kept))]
        return value


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The model's answer.

    Attributes:
        text: the answer.
        cited: 1-based numbers of the given regions that the answer names, as ``Region [N]``, in order of first mention.
        warnings: what the person asking should know, one line each, such as a region that was never mentioned.
        seconds: wall time from the call to the end of this answer, without encoding images.
        complete: False where the answer was cut off at ``max_new_tokens``.
        tokens: how many the model wrote, including the one that ends the answer.
        probability: of the text and its end, where it was requested and the answer was not cut off.
    """

    text: str
    cited: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    complete: bool = True
    tokens: int = 0
    probability: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One encoded image: everything that questions need of it."""

    width: int
    height: int
    map_1Chw: Tensor  # the refined map that regions are pooled from
    image_ND: Tensor  # the image's tokens for the language model
    photo: Image.Image | None = field(default=None, repr=False, compare=False)  # for a second look
    crops: dict[Bounds, Tensor] = field(default_factory=dict, repr=False, compare=False)  # features of those taken
    # By the tokens up to the image's end; there is one, unless system texts differ.
    prefixes: Latest[Prefix] = field(default_factory=lambda: Latest(4), repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question ready for the language model."""

    ids: list[int]  # tokens of the conversation up to the answer
    rows: list[int]  # for each region token in them its row of ``pooled``
    pooled: Tensor  # region features (R, D)
    n_regions: int
    room: int  # how many tokens the answer may have
    question: str = ""  # the last one, whose regions the answer names
    warnings: tuple[str, ...] = ()
    sure: bool = False  # whether the answer's probability is wanted
    repeated: bool = False  # whether the same question is asked about other regions too


class TooLong(DataError):
    """The conversation does not fit the model's context."""


class Engine:
    """A model with its processor, without state: computed features are passed as a :class:`Scene`."""

    def __init__(self, model: Any, processor: Any, token_budget: int | None = None, rows: int = ROWS) -> None:
        self.model = model.eval()
        self.processor = processor
        self.decoder = decoder_for(model.language_model)
        self.closed_sets: Latest[Any] = Latest(8)
        never = [token for token in (model.config.image_token_id, model.config.region_token_id) if token is not None]
        self.scheduler = Scheduler(
            self.decoder, model.get_input_embeddings(), processor.stop_token_ids, never, token_budget, rows
        )

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode_image(self, photo: Image.Image) -> Scene:
        """Encode an image. Paper: §3.1."""
        scene = self.encode_pixels(self.processor.pixels_of(photo), photo.width, photo.height)
        return replace(scene, photo=photo) if self.processor.crop_size else scene

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor, width: int, height: int) -> Scene:
        """Encode the pixels (1, 3, S, S) that the processor made of an image of ``width`` x ``height``."""
        refined = self.model.refine(self.model.encode_image(pixels.to(self.device, self.model.dtype)))
        return Scene(width=width, height=height, map_1Chw=refined, image_ND=self.model.image_features(refined)[0])

    @torch.inference_mode()
    def pool(self, scene: Scene, regions: Sequence[Region], detail: Detail = "fast") -> Tensor:
        """Region features (R, D)."""
        self.processor.check_detail(detail)
        pooled = []
        for start in range(0, len(regions) or 1, POOLED):
            some = regions[start : start + POOLED]
            weights_RHW = self.processor.region_inputs(some, scene.width, scene.height, start + 1).to(self.device)
            crops = self.crops(scene, some) if some and detail == "careful" else None
            pooled.append(self.model.region_features(scene.map_1Chw, weights_RHW[None], crops)[0])
        return torch.cat(pooled)

    def crops(self, scene: Scene, regions: Sequence[Region]) -> Tensor:
        """Features (1, R, C) of regions' own crops, those not yet known encoded together."""
        assert scene.photo is not None
        places = [region.bounds(scene.width, scene.height) for region in regions]
        missing = {place: region for place, region in zip(places, regions, strict=True) if place not in scene.crops}
        new = list(missing.items())
        for start in range(0, len(new), CROPS):
            some = new[start : start + CROPS]
            pixels = self.processor.crop_inputs(scene.photo, [region for _, region in some])
            scene.crops.update(zip(dict(some), self.model.encode_crops(pixels[None])[0], strict=True))
        return torch.stack([scene.crops[place] for place in places])[None]

    def pool_each(self, scene: Scene, regions: Sequence[Region], detail: Detail = "fast") -> list[Tensor]:
        """Features (1, D) of each region by itself."""
        return list(torch.split(self.pool(scene, regions, detail), 1)) if regions else []

    def encode_text(self, messages: Sequence[Turn], n_regions: int) -> Any:
        """Token ids, and what goes with them, of a conversation that awaits an answer."""
        # The features are pooled here, so the processor only needs to know how many regions there are.
        blank = torch.zeros((n_regions, 1, 1))
        return self.processor.encode_conversation(messages, region_weights=blank, add_generation_prompt=True)

    def prompt(
        self, messages: Sequence[Turn], pooled: Tensor, n_regions: int, wanted: int, notes: Sequence[str] = ()
    ) -> Prompt:
        """A question ready for the language model, with an answer of at most ``wanted`` tokens."""
        encoded = self.encode_text(messages, n_regions)
        ids, rows = encoded["input_ids"].tolist(), encoded["region_ids"].tolist()
        room, warnings = self.room(len(ids), wanted), (*notes, *encoded["warnings"])
        asked = messages[-1]["content"]
        return Prompt(
            ids=ids, rows=rows, pooled=pooled, n_regions=n_regions, room=room, question=asked, warnings=warnings
        )

    def room(self, length: int, wanted: int) -> int:
        """How many of ``wanted`` tokens the model's context has room for behind ``length`` others."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        if length + min(wanted, LEAST_ROOM) > limit:
            raise TooLong(
                f"question too long: {length} of the model's {limit} tokens; shorten it or begin a new conversation"
            )
        return min(wanted, limit - length)

    @torch.inference_mode()
    def embed(self, scene: Scene, ids: Sequence[int], rows: Sequence[int], pooled: Tensor, start: int = 0) -> Tensor:
        """Embeddings (N, D) of a prompt from its token ``start`` on, which is before all of its regions."""
        image, region = self.model.config.image_token_id, self.model.config.region_token_id
        table = self.model.get_input_embeddings()
        ids_T = torch.tensor(ids, device=table.weight.device)
        ids_N = ids_T[start:]
        embeds_ND: Tensor = table(ids_N)
        if (image_N := ids_N == image).any():
            embeds_ND[image_N] = scene.image_ND.to(embeds_ND.dtype)
        if rows:
            # A region's number stands before it, and so perhaps before the first token to embed.
            embeds_ND[ids_N == region] = self.model.add_numbers(pooled[list(rows)].to(embeds_ND.dtype), ids_T)
        return embeds_ND

    def begin(
        self, scene: Scene, ids: list[int], rows: Sequence[int], pooled: Tensor, repeated: bool = False
    ) -> tuple[Prefix | None, Tensor]:
        """The prefix that a prompt shares with others about its image, and embeddings (N, D) of the rest.

        With ``repeated``, the prefix goes on to the first region.
        """
        image, region = self.model.config.image_token_id, self.model.config.region_token_id
        end = len(ids) - ids[::-1].index(image) if image in ids else 0
        if region in ids[:end]:  # in the system text
            end = ids.index(region)
        if not 0 < end < len(ids):
            return None, self.embed(scene, ids, rows, pooled)
        head = ids[:end]
        prefix = scene.prefixes.get(tuple(head), lambda: self.decoder.read(self.embed(scene, head, (), pooled)))
        if repeated and region in ids and (first := ids.index(region)) > end:
            image_only, between = prefix, partial(self.embed, scene, ids[:first], (), pooled, start=end)
            prefix = scene.prefixes.get(tuple(ids[:first]), lambda: self.decoder.read(between(), image_only).joined())
            end = first
        return prefix, self.embed(scene, ids, rows, pooled, start=end)

    def job(self, scene: Scene, prompt: Prompt, options: Options, streams: bool = False) -> Job:
        """A prompt as the scheduler takes it."""
        prefix, embeds_ND = self.begin(scene, prompt.ids, prompt.rows, prompt.pooled, prompt.repeated)
        reader = self.reader(prompt, options) if streams or options.stop else None
        room, sure = prompt.room, prompt.sure
        return Job(prefix=prefix, embeds=embeds_ND, options=options, room=room, sure=sure, reader=reader)

    def reader(self, prompt: Prompt, options: Options) -> TextReader:
        """Reads an answer as its tokens come."""
        rewrite = partial(self.processor.read_citations, question=prompt.question)
        return TextReader(self.processor.tokenizer, options.stop, rewrite)

    def finish(self, job: Job, prompt: Prompt, began: float) -> Answer:
        """The answer that a finished job has written, asked at ``began`` by ``time.perf_counter``."""
        stops = set(self.processor.stop_token_ids)
        end = next((place for place, token in enumerate(job.tokens) if token in stops), None)
        stopped = job.reader.text if job.reader is not None and job.reader.stopped else None
        written = job.tokens[:end]
        text = self.processor.tokenizer.decode(written, skip_special_tokens=True) if stopped is None else stopped
        text = self.processor.read_citations(text, prompt.question)
        return Answer(
            text=text.strip(),
            cited=tuple(number for number in cited(text) if 1 <= number <= prompt.n_regions),
            warnings=(*prompt.warnings, *citation_warnings(text, prompt.n_regions)),
            seconds=time.perf_counter() - began,
            complete=stopped is not None or end is not None,
            tokens=len(job.tokens) if end is None else end + 1,
            probability=min(1.0, math.exp(job.likelihood)) if job.sure and end is not None else None,
        )

    def stream(self, scene: Scene, prompt: Prompt, options: Options) -> Iterator[str]:
        """Write one answer and yield it in pieces."""
        yield from self.scheduler.stream(self.job(scene, prompt, options, streams=True))

    def answers(
        self, asked: Iterable[tuple[Scene, Prompt, Options]], began: float | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Write many answers in one batch; yield each, with its place among those asked, as soon as it is finished."""
        start = time.perf_counter() if began is None else began
        places: dict[Job, tuple[int, Prompt]] = {}

        def jobs() -> Iterator[Job]:
            for place, (scene, prompt, options) in enumerate(asked):
                job = self.job(scene, prompt, options)
                places[job] = (place, prompt)
                yield job

        for job in self.scheduler.run(jobs()):
            place, prompt = places.pop(job)
            yield place, self.finish(job, prompt, start)

    def answer_each(self, scene: Scene, text: str, regions: Sequence[Region], options: Options) -> list[Answer]:
        """Ask the same question about each region, on its own as ``<region1>``, in one batch."""
        began, pooled = time.perf_counter(), self.pool_each(scene, regions, options.detail)
        if not regions:
            return []
        first = self.prompt(question_turns((), text), pooled[0], 1, options.max_new_tokens)
        first = replace(first, repeated=len(regions) > 1)
        asked = (
            (scene, replace(first, pooled=features, warnings=(*notes([region]), *first.warnings)), options)
            for region, features in zip(regions, pooled, strict=True)
        )
        return [answer for _, answer in sorted(self.answers(asked, began), key=lambda found: found[0])]


# "Region [2]" as the paper has it, and the placeholder itself, which a model may repeat from the question.
_CITATION = re.compile(r"region\s*\[\s*(\d{1,6})\s*\]|<\s*region\s*(\d{1,6})\s*>", re.IGNORECASE)


def cited(text: str) -> tuple[int, ...]:
    """Numbers of the regions that a text names, in order of first mention, whether or not they were given."""
    return tuple(dict.fromkeys(int(a or b) for a, b in _CITATION.findall(text)))


def citation_warnings(text: str, n_regions: int) -> list[str]:
    """A warning for each region that an answer names but that was not given."""
    given = {0: "no region was", 1: "1 region was"}.get(n_regions, f"{n_regions} regions were")
    wrong = [number for number in cited(text) if not 1 <= number <= n_regions]
    return [f"the answer names region {number}, but {given} given" for number in wrong]


def notes(regions: Sequence[Region]) -> tuple[str, ...]:
    """Warnings about how regions were read."""
    return tuple(f"<region{number}>: {region.note}" for number, region in enumerate(regions, 1) if region.note)


def check_regions(regions: Sequence[Region], width: int, height: int) -> None:
    """Raise RegionError, naming ``<regionN>``, if a region does not fit an image of this size."""
    for number, region in enumerate(regions, 1):
        region.check(width, height, name=f"<region{number}>")


def question_turns(history: Sequence[Turn], question: str) -> list[Turn]:
    """The conversation up to a question; DataError for an empty one or a history that is no list of turns."""
    check_text(question, "a question such as 'What is <region1>?'")
    if not isinstance(history, list | tuple) or not all(isinstance(turn, Mapping) for turn in history):
        raise DataError(f"expected history as a list of {{'role': ..., 'content': ...}}, got {history!r:.80}")
    return [*history, {"role": "user", "content": question}]


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the first of CUDA, MPS and CPU there is; raises ConfigError where it is not here."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError):
        raise ConfigError(f"expected device cuda, cuda:N, mps or cpu, if this machine has it, got {device!r}") from None
    return torch.device(device)


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default bfloat16 on CUDA devices that compute in it, else float32."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16", "int8"):
        raise ConfigError(f"expected dtype float32, bfloat16, float16 or int8, got {name!r}")
    return getattr(torch, name)  # type: ignore[no-any-return]

"""The model at work: images encoded once, prompts made of what was kept, answers generated whole or in pieces.

Shapes: B questions, R regions, T prompt tokens, N image tokens, D model width.
"""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.regions import Region

Turn = dict[str, str]
ROWS = 16
"""Questions that go through the language model at a time."""
LEAST_ROOM = 32
"""Tokens that an answer must have room for in the model's context, unless fewer are asked for."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer.
        cited: 1-based numbers of the given regions that the answer names, as ``Region [N]``, in order of first mention.
        warnings: what the person asking should know, one line each, such as a region that was never mentioned.
        seconds: wall time from question to answer; the image's encoding is not in it.
        complete: False where the answer was cut off at ``max_new_tokens``.
    """

    text: str
    cited: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    complete: bool = True


class Generation(TypedDict, total=False):
    """How to generate, as keyword arguments; see :meth:`RegionPredictor.ask` for what each means."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The same, checked and with defaults."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"expected max_new_tokens of at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"expected a temperature of 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"expected top_p above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"expected a seed from 0 to 2**63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One encoded image: what questions need of it, and nothing that would have to be computed again."""

    width: int
    height: int
    map_1Chw: Tensor
    image_ND: Tensor


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question ready for the language model.

    Attributes:
        ids: tokens of the conversation up to the answer.
        rows: for each region token in them the region it stands for, from 0.
        pooled: region features (R, D).
        room: how many tokens the answer may have.
        warnings: one line each.
    """

    ids: list[int]
    rows: list[int]
    pooled: Tensor
    room: int
    warnings: tuple[str, ...]


class TooLong(DataError):
    """The conversation does not fit the model's context."""


class Engine:
    """A model with its processor, and no memory of its own: what was computed once is handed in as a :class:`Scene`.

    Args:
        model: a :class:`RegionGPTForConditionalGeneration`, already on its device.
        processor: the :class:`RegionGPTProcessor` that belongs to it.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @torch.inference_mode()
    def look(self, photo: Image.Image) -> Scene:
        """Encode an image. Paper: §3.1."""
        pixels = self.processor.image_inputs(photo)["pixel_values"].to(self.device, self.model.dtype)
        refined = self.model.refine(self.model.encode_image(pixels))
        tokens = self.model.image_features(refined)[0]
        return Scene(width=photo.width, height=photo.height, map_1Chw=refined, image_ND=tokens)

    @torch.inference_mode()
    def pool(self, scene: Scene, regions: Sequence[Region]) -> Tensor:
        """Region features (R, D) from the kept map."""
        weights_RHW = self.processor.region_inputs(regions, scene.width, scene.height)
        pooled: Tensor = self.model.region_features(scene.map_1Chw, weights_RHW.to(self.device)[None])[0]
        return pooled

    def encode(self, messages: Sequence[Turn], n_regions: int, answered: bool = False) -> dict[str, Any]:
        """Token ids, and what goes with them, of a conversation that awaits an answer or already has it."""
        # The features are pooled here, so the processor only needs to know how many regions there are.
        blank = torch.zeros((n_regions, 1, 1))
        encoded: dict[str, Any] = self.processor.encode_conversation(
            messages, region_weights=blank, add_generation_prompt=not answered
        )
        return encoded

    def prepare(self, scene: Scene, messages: Sequence[Turn], regions: Sequence[Region], wanted: int) -> Prompt:
        """Everything that can be wrong with a question is found here, before anything is generated.

        Raises:
            RegionError: a region does not fit the image, or a placeholder stands for none.
            DataError: a turn is empty or out of order, or (as :class:`TooLong`) there are too many.
        """
        pooled = self.pool(scene, regions)
        encoded = self.encode(messages, len(pooled))
        ids = encoded["input_ids"].tolist()
        room = self.room(len(ids), wanted)
        rows = encoded["region_ids"].tolist()
        return Prompt(ids=ids, rows=rows, pooled=pooled, room=room, warnings=tuple(encoded["warnings"]))

    def room(self, length: int, wanted: int) -> int:
        """How many of ``wanted`` tokens the model's context has room for behind ``length`` others."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        if length + min(wanted, LEAST_ROOM) > limit:
            raise TooLong(
                f"expected a question that, with its image, history and answer, takes at most {limit} tokens, the "
                f"most this model reads, got {length} and an answer; shorten the question or begin a new conversation"
            )
        return min(wanted, limit - length)

    @torch.inference_mode()
    def embed(self, scene: Scene, ids: Sequence[int], rows: Sequence[int], pooled: Sequence[Tensor]) -> Tensor:
        """Embeddings (B, T, D) of one prompt for each of B sets of region features (R, D)."""
        ids_T = torch.tensor(ids, device=self.device)
        embeds_TD = self.model.get_input_embeddings()(ids_T).clone()
        embeds_TD[ids_T == self.model.config.image_token_id] = scene.image_ND.to(embeds_TD.dtype)
        embeds_BTD: Tensor = embeds_TD.repeat(len(pooled), 1, 1)
        numbers_KD = self.model.number_embeds(ids_T)
        for embeds, features in zip(embeds_BTD, pooled, strict=True):
            embeds[ids_T == self.model.config.region_token_id] = features[list(rows)].to(embeds.dtype) + numbers_KD
        return embeds_BTD

    @torch.inference_mode()
    def generate(self, embeds_BTD: Tensor, options: Options, room: int, **more: Any) -> list[list[int]]:
        """New token ids of each row."""
        config = self.model.config
        sampling = {"temperature": options.temperature, "top_p": options.top_p} if options.temperature else {}
        settings = GenerationConfig(
            max_new_tokens=room,
            do_sample=bool(sampling),
            eos_token_id=self.processor.stop_token_ids,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            suppress_tokens=[config.image_token_id, config.region_token_id],
            **sampling,
        )
        seen = torch.ones(embeds_BTD.shape[:2], dtype=torch.long, device=self.device)
        with _seeded(options.seed, self.device):
            # Of embeddings the language model alone generates; nothing visual is left to do.
            tokens: list[list[int]] = self.model.language_model.generate(
                inputs_embeds=embeds_BTD, attention_mask=seen, generation_config=settings, **more
            ).tolist()
        return tokens

    def answer(self, scene: Scene, prompt: Prompt, options: Options, began: float) -> Answer:
        """Generate a whole answer to a question that came in at ``began``, by ``time.perf_counter``."""
        embeds = self.embed(scene, prompt.ids, prompt.rows, [prompt.pooled])
        tokens = self.generate(embeds, options, prompt.room)[0]
        return self.read(tokens, len(prompt.pooled), prompt.warnings, time.perf_counter() - began)

    def answer_each(self, scene: Scene, text: str, regions: Sequence[Region], options: Options) -> list[Answer]:
        """Ask the same question about each region, on its own as ``<region1>``, in batches."""
        began = time.perf_counter()
        pooled = list(self.pool(scene, regions)[:, None])
        encoded = self.encode(question_turns((), text), 1)
        ids, rows = encoded["input_ids"].tolist(), encoded["region_ids"].tolist()
        room = self.room(len(ids), options.max_new_tokens)
        tokens: list[list[int]] = []
        for start in range(0, len(pooled), ROWS):
            tokens += self.generate(self.embed(scene, ids, rows, pooled[start : start + ROWS]), options, room)
        seconds = (time.perf_counter() - began) / max(1, len(pooled))
        return [self.read(row, 1, (), seconds) for row in tokens]

    def read(self, tokens: list[int], n_regions: int, warnings: tuple[str, ...], seconds: float) -> Answer:
        """The answer that generated tokens spell, up to the end of turn."""
        stops = set(self.processor.stop_token_ids)
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        text = self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        cited = dict.fromkeys(int(a or b) for a, b in _CITATION.findall(text))
        return Answer(
            text=text,
            cited=tuple(number for number in cited if 1 <= number <= n_regions),
            warnings=warnings,
            seconds=seconds,
            complete=end is not None,
        )

    def stream(self, scene: Scene, prompt: Prompt, options: Options) -> Iterator[str]:
        """Generate in a thread and yield what it writes, starting when first asked for a piece."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = _Stop()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                embeds = self.embed(scene, prompt.ids, prompt.rows, [prompt.pooled])
                criteria = StoppingCriteriaList([stop])
                self.generate(embeds, options, prompt.room, streamer=streamer, stopping_criteria=criteria)
            except BaseException as error:  # raised again where the caller can see it
                failures.append(error)
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        begun = False
        try:
            for piece in streamer:
                piece = piece if begun else piece.lstrip()
                if piece:
                    begun = True
                    yield piece
        finally:
            stop.asked = True
            thread.join()
        if failures:
            raise failures[0]


# "Region [2]" as the paper has it, and the placeholder itself, which a model may repeat from the question.
_CITATION = re.compile(r"region\s*\[\s*(\d{1,6})\s*\]|<\s*region\s*(\d{1,6})\s*>", re.IGNORECASE)


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Ends a generation from another thread."""

    asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device, dtype=torch.bool)


def question_turns(history: Sequence[Turn], question: str) -> list[Turn]:
    """The conversation up to a question.

    Raises:
        DataError: the question is empty.
    """
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"expected a question such as 'What is <region1>?', got {question!r}")
    return [*history, {"role": "user", "content": question}]


def region_list(regions: Region | Sequence[Region]) -> list[Region]:
    """One region or several as a list.

    Raises:
        RegionError: one of them is no region.
    """
    listed = [regions] if isinstance(regions, Region) else list(regions)
    for number, region in enumerate(listed, 1):
        if not isinstance(region, Region):
            got = type(region).__name__
            raise RegionError(f"<region{number}>: expected a Region such as Region.box(x0, y0, x1, y1), got {got}")
    return listed


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the first of CUDA, MPS and CPU there is.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"expected device cuda, cuda:N, mps or cpu, one that is here, got {str(device)!r}") from None
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default bfloat16 on CUDA devices that compute in it, else float32.

    Raises:
        ConfigError: no such dtype.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"expected dtype float32, bfloat16 or float16, got {name!r}")
    return known[name]


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a generator of this question's own, and leave the global one as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

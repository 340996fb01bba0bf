"""Captioners: whatever answers about an image and its regions, behind one small interface."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from regiongpt.data.records import RecordRegion
from regiongpt.errors import CheckpointError
from regiongpt.settings import Settings
from regiongpt.storage import digest, read_json

_SAMPLE: Final = 1 << 20


class Asking(Settings):
    """Who captions, and how it is asked."""

    captioner: str | None = None
    """address of an OpenAI-compatible endpoint, folder of a transformers or RegionGPT model, or facts (default: the
    model of this package)"""
    served_model: str | None = None
    """name of the model at an endpoint (default: the only one there)"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the endpoint's key"""
    max_new_tokens: PositiveInt = 512
    """longest answer in tokens; one that is cut off there does not count as finished"""
    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token each time"""
    concurrency: PositiveInt = 256
    """most requests under way at an endpoint; how many there are adapts below that"""
    timeout: PositiveFloat = 120.0
    """seconds until a request counts as lost"""
    patience: PositiveFloat = 600.0
    """seconds that an endpoint may be silent before the run ends"""
    batch_size: PositiveInt = 8
    """images or crops at a time, for a model on this machine"""
    device: str | None = None
    """of a model on this machine: cuda, cuda:N, mps or cpu"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of a model on this machine"""
    input_price: NonNegativeFloat | None = None
    """of a million tokens read, for --max-cost and the statistics"""
    output_price: NonNegativeFloat | None = None
    """of a million tokens written"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to ask: the global caption (``image``), one region's (``region``), or which region a caption means.

    Attributes:
        stage: Which of these.
        text: What is asked, behind the picture; ``lead`` goes before it, where there is one.
        picture: What :meth:`Captioner.picture` made of the image or the crop.
        photo: The whole image, where the captioner wants pixels.
        regions: All annotated regions of the image; ``number`` is the one asked about, from 0.
        category: The class that may be told, ``""`` where the mode tells none; ``context`` likewise the global caption.
        caption: What to find, for ``locate``; ``choices`` are the only answers allowed.
        version: Of the prompt.
        seed: Of the answer.
    """

    stage: Literal["image", "region", "locate"]
    text: str
    lead: str = ""
    picture: Any = None
    photo: Image.Image | None = None
    regions: Sequence[RecordRegion] = ()
    number: int = -1
    category: str = ""
    context: str = ""
    caption: str = ""
    version: int = 0
    seed: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished answer, with the tokens read and written, the seconds it took and the model that gave it."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    model: str = ""


class Failed(Exception):
    """A request that got no finished answer.

    Args:
        kind: A few words that are the same for all such failures.
        reason: What was expected and what came, in one line.
        again: Asking again at once may help.
        tokens: Read and written in vain.
    """

    def __init__(self, kind: str, reason: str, again: bool = False, tokens: tuple[int, int] = (0, 0)) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.again, self.tokens = kind, " ".join(reason.split())[:300], again, tokens


class Stopped(Exception):
    """The run is ending: what was not under way yet is not asked."""


class Captioner(ABC):
    """What answers requests.

    Attributes:
        identity: What decides its answers, for the keys of finished work.
        wants_photo: It looks at the whole image's pixels rather than at pictures of its own making.
        locates: It can choose a region.
    """

    identity: dict[str, Any]
    wants_photo: bool = False
    locates: bool = True
    stopping: bool = False

    async def open(self) -> None:  # noqa: B027
        """Make sure that it answers.

        Raises:
            ConfigError: It cannot be used; the message says why.
        """

    async def close(self) -> None:  # noqa: B027
        """Give back what it holds."""

    def stop(self) -> None:
        """Finish what is under way, and let everything else go."""
        self.stopping = True

    def picture(self, image: Image.Image) -> Any:
        """What a request carries of an image or a crop; called in a thread of its own."""
        return None

    @abstractmethod
    def has_room(self, begun: int) -> bool:
        """Whether another image should be begun, with so many begun and not done."""

    @abstractmethod
    async def ask(self, request: Request) -> Reply:
        """Answer one request.

        Raises:
            Failed: There is no finished answer.
            Stopped: :attr:`stopping` was set before the request was under way.
            RegionGPTError: Nothing more can be answered.
        """


class Local(Captioner):
    """A model on this machine: answers what is waiting in batches of ``batch_size``, in a thread."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._thread = ThreadPoolExecutor(1)
        self._worker: asyncio.Task[None] | None = None

    def has_room(self, begun: int) -> bool:
        """As many images as fill a batch with their global captions."""
        return begun < self.batch_size

    async def ask(self, request: Request) -> Reply:
        """Wait for a place in a batch."""
        if self.stopping:
            raise Stopped
        place: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, place))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await place

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(0.01)  # whoever got an answer asks the next thing first
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            requests, began = [request for request, _ in batch], time.perf_counter()
            outcomes: Sequence[Reply | Exception] = [Stopped()] * len(batch)
            if not self.stopping:
                try:
                    outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self.answer, requests)
                except Exception as error:
                    outcomes = [error] * len(batch)
            seconds = (time.perf_counter() - began) / len(batch)
            for (_, place), outcome in zip(batch, outcomes, strict=True):
                if place.done():
                    continue
                if isinstance(outcome, Exception):
                    place.set_exception(outcome)
                else:
                    place.set_result(replace(outcome, seconds=seconds))

    async def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(cancel_futures=True)

    @abstractmethod
    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | Exception]:
        """Answer a batch, in its order; each with a reply or with what went wrong."""


def weights_digest(folder: Path) -> str:
    """What tells a model's weights from others': the sizes of its files and samples of them, for they may be huge."""
    samples = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in (0, size // 2, max(0, size - _SAMPLE)):
                file.seek(place)
                samples.append([path.name, size, sha256(file.read(_SAMPLE)).hexdigest()])
    return digest(samples)


def open_captioner(asking: Asking, seed: int) -> Captioner:
    """The captioner that ``--captioner`` names; ``seed`` is that of the wording of facts.

    Raises:
        ConfigError: A library that it needs is missing, or an option does not go with it.
        CheckpointError: There is no such model.
    """
    name = asking.captioner
    if name == "facts":
        from regiongpt.annotate.captioners.facts import Facts

        return Facts(seed)
    if name is not None and "://" in name:
        from regiongpt.annotate.captioners.openai_endpoint import Endpoint

        return Endpoint(asking)
    if name is not None and not (Path(name) / "config.json").is_file():
        known = "an address such as http://localhost:8000/v1, a model's folder with a config.json in it, or facts"
        raise CheckpointError(f"--captioner {name}: expected {known}")
    if name is None or read_json(Path(name) / "config.json", CheckpointError).get("model_type") == "regiongpt":
        from regiongpt.annotate.captioners.regiongpt import RegionGPT

        return RegionGPT(asking)
    from regiongpt.annotate.captioners.transformers_vlm import TransformersVLM

    return TransformersVLM(asking)

"""Captioners behind one small interface."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from regiongpt.annotate.options import Options
from regiongpt.annotate.plan import Stage
from regiongpt.data.records import RecordRegion
from regiongpt.errors import CheckpointError, DataError, RegionError
from regiongpt.storage import read_json


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to ask: the global caption, one region's, or which region a caption means."""

    stage: Stage
    text: str  # behind the picture
    lead: str = ""  # the global caption, before it
    picture: Any = None  # what Captioner.picture made of the image or the crop; the image where it wants that
    regions: Sequence[RecordRegion] = ()  # all that are annotated in the image
    number: int = -1  # the one asked about, from 0
    category: str = ""  # where the mode tells it
    caption: str = ""  # what to locate
    version: int = 0  # number of the prompt
    seed: int = 0

    @property
    def choices(self) -> list[str]:
        """The only answers there are to ``locate``."""
        return [str(number) for number in range(1, len(self.regions) + 1)] if self.stage == "locate" else []

    def messages(self, picture: dict[str, Any]) -> list[dict[str, Any]]:
        """The request as a one-turn chat, with the image in the reader's format."""
        lead = [{"type": "text", "text": self.lead}] if self.lead else []
        return [{"role": "user", "content": [*lead, picture, {"type": "text", "text": self.text}]}]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, with the tokens read and written, the seconds it took and the model that gave it."""

    text: str
    ended: bool = True  # not cut off at --max-new-tokens
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    model: str = ""


class Failed(Exception):
    """A request without a finished answer; ``kind`` is the cause, ``again`` if an immediate retry may help."""

    def __init__(self, kind: str, reason: str, again: bool = False, tokens: tuple[int, int] = (0, 0)) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.again, self.tokens = kind, " ".join(reason.split())[:300], again, tokens


class Stopped(Exception):
    """The run is ending: requests not yet in flight are not sent."""


class Captioner:
    """Answers requests one by one, in ``ask``; those on this machine in batches, in ``answer``, in a thread."""

    wants_image = True
    """Whether it is shown the whole image each time, and its regions, instead of what ``picture`` makes."""

    def __init__(self, identity: dict[str, str], batch_size: int = 1, images: int = 1) -> None:
        # The identity decides its answers, and so the keys of finished work.
        self.identity, self.batch_size, self.images = identity, batch_size, images
        self._waiting: list[tuple[Request, asyncio.Future[Reply | Exception]]] = []
        self._lock, self._stopping = asyncio.Lock(), False

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | Failed]:
        """Answer a batch, in its order; a request that the model refuses fails by itself."""
        try:
            return self._answer(requests)
        except (DataError, RegionError) as error:
            if len(requests) == 1:
                return [Failed("refused by the model", str(error))]
            return [self.answer([request])[0] for request in requests]  # one of them is at fault

    def _answer(self, requests: Sequence[Request]) -> Sequence[Reply]:
        raise NotImplementedError

    def has_room(self, begun: int) -> bool:
        """Whether to start another image while ``begun`` are unfinished."""
        return begun < self.images

    def stop(self) -> None:
        """Finish requests in flight and drop the rest."""
        self._stopping = True

    def picture(self, image: Image.Image) -> Any:
        """The encoded image or crop of a request; called in a thread."""
        return image

    async def close(self) -> None:
        """Release resources."""

    async def ask(self, request: Request) -> Reply:
        """Answer; Failed or Stopped without an answer, RegionGPTError where there will be none."""
        place: asyncio.Future[Reply | Exception] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, place))
        async with self._lock:
            if not place.done():  # the longest waiting request runs a batch with the others that wait
                await asyncio.sleep(0.01)  # let requests that were just answered send their next one first
                if self._stopping:
                    raise Stopped
                batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
                began = time.perf_counter()
                outcomes: Sequence[Reply | Exception]
                try:
                    outcomes = await asyncio.to_thread(self.answer, [each for each, _ in batch])
                except Exception as error:  # fails the whole batch
                    outcomes = [error] * len(batch)
                seconds = (time.perf_counter() - began) / len(batch)
                for (_, other), outcome in zip(batch, outcomes, strict=True):
                    other.set_result(replace(outcome, seconds=seconds) if isinstance(outcome, Reply) else outcome)
        found = place.result()
        if isinstance(found, Exception):
            raise found
        return found


def make_captioner(options: Options) -> Captioner:
    """The captioner that ``--captioner`` names; ConfigError or CheckpointError where there is none."""
    name = options.captioner
    kind: Callable[[Options], Captioner]
    if name is not None and "://" in name:
        from regiongpt.annotate.captioners.endpoint import Endpoint as kind
    elif name == "facts":
        from regiongpt.annotate.captioners.facts import Facts as kind
    elif name is not None and not (Path(name) / "config.json").is_file():
        known = "an address such as http://localhost:8000/v1, a model's folder with a config.json in it, or facts"
        raise CheckpointError(f"--captioner {name}: expected {known}")
    elif name is None or read_json(Path(name) / "config.json", CheckpointError).get("model_type") == "regiongpt":
        from regiongpt.annotate.captioners.checkpoint import Checkpoint as kind
    else:
        from regiongpt.annotate.captioners.checkpoint import OtherModel as kind
    return kind(options)

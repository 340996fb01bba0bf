"""The engine: both stages of every region, each asked once, through whatever captioner there is.

What is finished is looked up by key, what is missing is asked, and each answer is stored before anything else happens
to it. An image is decoded once for all its regions.
"""

import asyncio
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from regiongpt.annotate.captioners import Asking, Captioner, Failed, Reply, Request, Stopped
from regiongpt.annotate.filters import Similarity
from regiongpt.annotate.prompts import GLOBAL, LOCATE, MODES, REGION, Closeup, Mode, context, draw, region_prompt
from regiongpt.annotate.source import Item
from regiongpt.annotate.store import Failure, key_of
from regiongpt.data.records import region_row
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.settings import Settings

TRIES: Final = 3
"""Tries of an answer that was empty, unfinished or malformed in one run; over all runs three times as many."""
_HOPELESS: Final = 20
"""Failures from the first request on, without one answer, that end a run: something is wrong with all of it."""
_MOST_TO_CHOOSE: Final = 60
"""Regions of an image up to which a caption is located back."""
_PLACEHOLDER: Final = re.compile(r"<(image|region\d*)>", re.IGNORECASE)


class Plan(Settings):
    """What is asked about each region."""

    mode: Mode = "full"
    """a region's caption from its crop alone, with the global caption (context), or with the class name too (full)"""
    seed: NonNegativeInt = 0
    """of prompt versions and answers"""
    gallery: NonNegativeInt = 12
    """regions that are captioned in all three modes, to be shown side by side"""
    locate_back: bool = False
    """ask which of all regions each caption describes"""


class Limits(Settings):
    """When a run ends early; what is under way is finished, and the same command goes on from there."""

    max_cost: PositiveFloat | None = None
    """in the currency of the prices, over all runs into --out"""
    max_time: PositiveFloat | None = None
    """seconds of this run"""
    max_failures: PositiveInt | None = None
    """failed requests in this run"""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One caption that is wanted: of a region by its place, or of the whole image (-1), in a mode and prompt version.

    ``key`` is that of its answer, ``locate`` and ``score`` those of where it is located back to and of its similarity;
    None where these are not wanted.
    """

    key: bytes
    number: int
    mode: Mode
    version: int
    locate: bytes | None = None
    score: bytes | None = None

    @property
    def keys(self) -> list[bytes]:
        """Of everything that belongs to it."""
        return [key for key in (self.key, self.locate, self.score) if key is not None]


@dataclass(kw_only=True)
class Keys:
    """Names what is wanted about an image by key: content, region, class, prompt, captioner, settings.

    Args:
        plan: What is asked.
        settings: What else decides an answer: the captioner's identity, its temperature and the crops.
        scorer: Identity of what measures similarity; None where nothing does.
        gallery: Places of images, each with a number that chooses the region shown in all modes.
    """

    plan: Plan
    settings: Mapping[str, Any]
    scorer: Mapping[str, Any] | None = None
    gallery: Mapping[int, int] = field(default_factory=dict)

    def image(self, digest: str) -> Ask:
        """The global caption of an image, which is known by its hash."""
        version = draw(self.plan.seed, digest, len(GLOBAL))
        key = key_of("image", digest, GLOBAL[version], self.settings, self.plan.seed)
        return Ask(key=key, number=-1, mode="full", version=version)

    def regions(self, digest: str, item: Item) -> list[Ask]:
        """The captions of its regions."""
        asks, shown = [], self.gallery.get(item.place)
        choosing = self.plan.locate_back and len(item.regions) <= _MOST_TO_CHOOSE
        for number, each in enumerate(item.regions):
            where = region_row(each.region)
            version = draw(self.plan.seed, f"{digest} {where} {each.category}", len(REGION))
            for mode in MODES if shown is not None and number == shown % len(item.regions) else (self.plan.mode,):
                prompt = (digest, where, each.category, mode, REGION[version])
                key = key_of("region", *prompt, self.settings, self.plan.seed)
                ask = Ask(key=key, number=number, mode=mode, version=version)
                if mode == self.plan.mode:
                    locate = key_of("locate", key.hex()) if choosing else None
                    score = key_of("score", key.hex(), self.scorer) if self.scorer else None
                    ask = replace(ask, locate=locate, score=score)
                asks.append(ask)
        return asks

    def wanted(self, digest: str, item: Item) -> list[Ask]:
        """All that is to be asked about an image, the global caption first."""
        asks = self.regions(digest, item)
        return asks if all(ask.mode == "crop" for ask in asks) else [self.image(digest), *asks]


@dataclass
class _Seen:
    """An image while it is asked about: what is known, what failed, and what its requests carry."""

    item: Item
    known: dict[bytes, Any]
    failed: Mapping[bytes, Failure]
    photo: Image.Image | None = None
    pictures: dict[int, Any] = field(default_factory=dict)  # by region; -1 the whole image
    crops: dict[int, Image.Image] = field(default_factory=dict)
    numbered: Any = None
    told: str = ""  # the global caption


@dataclass(kw_only=True)
class Work:
    """Asks what is wanted about images, one call an image.

    Args:
        keys: What is wanted.
        captioner: Who is asked.
        keeper: Where answers are kept: the store, or what a worker sends back to it.
        closeup: How crops are made.
        asking: For prices.
        images: Folder of the images.
        scorer: Measures similarity; None leaves it out.
        noted: Called with ``"answer"``, ``"region"`` or the kind and reason of a failure, as they come.
        spent: What was paid, in the currency of the prices.
    """

    keys: Keys
    captioner: Captioner
    keeper: Any
    closeup: Closeup
    asking: Asking
    images: Path
    scorer: Similarity | None = None
    noted: Callable[[str, str], None] = lambda kind, why: None
    spent: float = 0.0
    _scoring: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def image(self, digest: str, item: Item, asks: Sequence[Ask]) -> None:
        """Ask what is missing about one image; RegionGPTError where nothing more can be asked or kept."""
        keys = [key for ask in asks for key in ask.keys]
        known = self.keeper.get(keys)
        failed = {key: each for key, each in self.keeper.failures(keys).items() if key not in known}
        seen = _Seen(item, known, failed)
        wanted = [ask for ask in asks if any(key not in known for key in ask.keys)]
        try:
            await asyncio.to_thread(self._look, seen, wanted)
        except RegionGPTError as error:  # of the image or its regions
            self._failed(wanted[0].key, Failed("image that cannot be used", f"{item.name}: {error}"))
            return
        try:
            if asks[0].number < 0:
                seen.told = (await self._caption(asks[0], seen) or {}).get("text", "")
        except Stopped:
            return
        # Without its global caption a region waits for the next run.
        ready = [ask for ask in wanted if ask.number >= 0 and (seen.told or ask.mode == "crop")]
        outcomes = await asyncio.gather(*(self._region(ask, seen) for ask in ready), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Stopped):
                raise outcome
        scoring = [ask for ask in ready if ask.score and ask.score not in known and ask.key in known]
        if self.scorer is not None and scoring and not self.captioner.stopping:
            crops, captions = [seen.crops[ask.number] for ask in scoring], [known[ask.key]["text"] for ask in scoring]
            async with self._scoring:  # one batch at a time
                scores = await asyncio.to_thread(self.scorer.score, crops, captions)
            for ask, score in zip(scoring, scores, strict=True):
                self.keeper.add(ask.score, score)

    def _look(self, seen: _Seen, wanted: Sequence[Ask]) -> None:
        """Decode the image and cut out what is needed; in a thread."""
        item, own = seen.item, self.captioner.wants_photo
        photo = load_image(self.images / item.name)
        if item.width and photo.size != (item.width, item.height):
            size = f"{photo.width} x {photo.height}"
            raise DataError(f"expected {item.width} x {item.height} pixels as its regions have it, got {size}")
        seen.photo = photo if own else None
        for ask in wanted:
            asked = not own and ask.key not in seen.known
            if ask.number < 0:
                seen.pictures[-1] = self.captioner.picture(self.closeup.shrink(photo)) if asked else None
            elif ask.number not in seen.pictures and (asked or ask.score):
                crop = self.closeup.crop(photo, item.regions[ask.number].region)
                seen.pictures[ask.number] = self.captioner.picture(crop) if asked else None
                if ask.score:
                    seen.crops[ask.number] = crop
        if not own and any(ask.locate for ask in wanted):
            drawn = draw_regions(photo, [each.region for each in item.regions])
            seen.numbered = self.captioner.picture(self.closeup.shrink(drawn))

    async def _region(self, ask: Ask, seen: _Seen) -> None:
        item = seen.item
        if ask.mode == "full" and not item.regions[ask.number].category:
            why = f"{item.name}: mode full tells the class of each region; give names, or --mode context"
            self._failed(ask.key, Failed("region without class", why))
            return
        was_known = ask.key in seen.known
        answer = await self._caption(ask, seen)
        if answer is None:
            return
        if ask.mode == self.keys.plan.mode and not was_known:
            self.noted("region", "")
        if ask.locate is None or ask.locate in seen.known:
            return
        choices = tuple(str(number) for number in range(1, len(item.regions) + 1))
        request = Request(
            stage="locate", text=LOCATE.format(count=len(choices), caption=answer["text"]), picture=seen.numbered,
            photo=seen.photo, regions=item.regions, caption=answer["text"], choices=choices,
        )  # fmt: skip
        if (located := await self._asked(ask.locate, request, seen)) is not None:
            value = {"number": int(located.text)}
            self.keeper.add(ask.locate, value, self._pay(located.tokens_in, located.tokens_out))

    def _request(self, ask: Ask, seen: _Seen) -> Request:
        shared: dict[str, Any] = {
            "picture": seen.pictures.get(ask.number), "photo": seen.photo, "regions": seen.item.regions,
            "version": ask.version, "seed": draw(self.keys.plan.seed, ask.key.hex(), 2**31),
        }  # fmt: skip
        if ask.number < 0:
            return Request(stage="image", text=GLOBAL[ask.version], **shared)
        name = seen.item.regions[ask.number].category.replace("_", " ").strip()  # as LVIS and V3Det have names
        told = "" if ask.mode == "crop" else seen.told
        return Request(
            stage="region", text=region_prompt(ask.version, ask.mode, name), lead=context(told) if told else "",
            number=ask.number, category=name if ask.mode == "full" else "", context=told, **shared,
        )  # fmt: skip

    async def _caption(self, ask: Ask, seen: _Seen) -> dict[str, Any] | None:
        """The answer that is known or comes; None where it failed."""
        if ask.key in seen.known:
            return dict(seen.known[ask.key])
        request = self._request(ask, seen)
        reply = await self._asked(ask.key, request, seen)
        if reply is None:
            return None
        # No half of a surrogate pair, and nothing that a model would take for a place in its prompt.
        text = _PLACEHOLDER.sub(r"\1", reply.text.encode("utf-8", "replace").decode())
        value = {
            "text": text, "version": ask.version, "model": reply.model, "seed": request.seed,
            "seconds": round(reply.seconds, 4), "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out,
        }  # fmt: skip
        self.keeper.add(ask.key, value, self._pay(reply.tokens_in, reply.tokens_out))
        self.noted("answer", "")
        seen.known[ask.key] = value
        return value

    async def _asked(self, key: bytes, request: Request, seen: _Seen) -> Reply | None:
        if (failure := seen.failed.get(key)) is not None and failure.tries >= 3 * TRIES:
            self.noted(failure.kind, failure.reason)
            return None
        for left in reversed(range(TRIES)):
            try:
                reply = await self.captioner.ask(request)
                if not request.choices:
                    return reply
                chosen = re.search(r"\d+", reply.text)  # an endpoint may ignore that there are choices
                if chosen is not None and chosen[0] in (*request.choices, "0"):
                    return replace(reply, text=chosen[0])
                told = f"expected one of 1 to {len(request.choices)}, got {reply.text[:40]!r}"
                raise Failed("not a choice", told, tokens=(reply.tokens_in, reply.tokens_out))
            except Failed as error:
                self._failed(key, error, last=not (left and error.again))
                if not error.again:
                    break
        return None

    def _failed(self, key: bytes, error: Failed, last: bool = True) -> None:
        self.keeper.fail(key, error.kind, error.reason, self._pay(*error.tokens))
        if last:
            self.noted(error.kind, error.reason)

    def _pay(self, tokens_in: int, tokens_out: int) -> float:
        """What an answer, or a try in vain, costs."""
        cost = (tokens_in * (self.asking.input_price or 0.0) + tokens_out * (self.asking.output_price or 0.0)) / 1e6
        self.spent += cost
        return cost


class Run:
    """One run over a source: opens images as the captioner has room, and ends when there is a reason to.

    Args:
        work: What is done with an image; its ``spent`` is what earlier runs cost.
        limits: When to end early.
        tick: Called once a finished region.

    Attributes:
        failures: How many requests failed, by kind, and the ``last`` reason.
        ended: Why it ended early.
    """

    def __init__(self, work: Work, limits: Limits, tick: Callable[[], object]) -> None:
        self.work, self.limits, self.tick = work, limits, tick
        self.failures: Counter[str] = Counter()
        self.last = ""
        self.ended: Literal["", "interrupted", "max-cost", "max-time", "max-failures"] = ""
        work.noted = self.note
        self._answers = self._open = 0
        self._began = time.monotonic()
        self._change = asyncio.Event()

    async def go(self, pending: Iterable[tuple[str, Item, list[Ask]] | None]) -> None:
        """Work through images, a None among which lets others work; RegionGPTError where it cannot go on."""
        loop = asyncio.get_running_loop()
        if self.limits.max_time is not None:
            loop.call_later(self.limits.max_time + 0.01, self.is_over)
        with interruptible(loop, self._interrupt):
            try:
                async with asyncio.TaskGroup() as group:
                    for found in pending:
                        if found is None:
                            await asyncio.sleep(0)
                            continue
                        while not self.work.captioner.has_room(self._open) and not self.ended:
                            self._change.clear()
                            await self._change.wait()
                        if self.is_over():
                            break
                        self._open += 1
                        group.create_task(self._image(*found))
            except BaseExceptionGroup as errors:
                first: BaseException = errors.subgroup(RegionGPTError) or errors
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                raise first from None

    async def _image(self, digest: str, item: Item, asks: list[Ask]) -> None:
        try:
            await self.work.image(digest, item, asks)
        finally:
            self._open -= 1
            self._change.set()

    def note(self, kind: str, why: str) -> None:
        """Count an answer, a finished region, or a failure of some kind; DataError where all requests fail."""
        self._change.set()
        if kind == "region":
            self.tick()
        elif kind == "answer":
            self._answers += 1
        else:
            self.failures[kind] += 1
            self.last = why
            if not self._answers and self.failures.total() >= _HOPELESS:
                raise DataError(f"the first {_HOPELESS} requests all failed; the last: {kind}: {why}")
        self.is_over()

    def is_over(self) -> bool:
        """Whether a limit is reached, or the user had enough; then nothing new is asked."""
        limits, seconds = self.limits, time.monotonic() - self._began
        if not self.ended:
            if limits.max_time is not None and seconds > limits.max_time:
                self._end("max-time")
            elif limits.max_failures is not None and self.failures.total() >= limits.max_failures:
                self._end("max-failures")
            elif limits.max_cost is not None and self.work.spent >= limits.max_cost:
                self._end("max-cost")
        return bool(self.ended)

    def _end(self, why: Literal["interrupted", "max-cost", "max-time", "max-failures"]) -> None:
        self.ended = why
        self.work.captioner.stop()
        self._change.set()

    def _interrupt(self) -> None:
        if self.ended == "interrupted":
            raise KeyboardInterrupt
        self._end("interrupted")


@contextmanager
def interruptible(loop: asyncio.AbstractEventLoop, handler: Callable[[], None]) -> Iterator[None]:
    """Call a handler for Ctrl-C and for a scheduler's SIGTERM, where this thread may."""
    with ExitStack() as stack:
        with suppress(ValueError, RuntimeError, NotImplementedError):
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, handler)
                stack.callback(loop.remove_signal_handler, number)
        yield

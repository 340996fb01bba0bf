"""The engine: both stages of every region, each asked once, through whatever captioner there is.

Images come one after the other. What is finished is looked up by key, what is missing is asked, and each answer is
stored before anything else happens to it. An image is read and decoded once for all its regions.
"""

import asyncio
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from PIL import Image
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from regiongpt.annotate.captioners import Asking, Captioner, Failed, Reply, Request, Stopped
from regiongpt.annotate.prompts import GLOBAL, LOCATE, MODES, REGION, Closeup, Mode, context, draw, region_prompt
from regiongpt.annotate.source import Item
from regiongpt.annotate.store import Failure, key_of
from regiongpt.data.records import RecordRegion, region_row
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.settings import Settings

_TRIES: Final = 3
"""Tries of an answer that was empty, unfinished or malformed: so many in a run, and at most three times as many."""
_HOPELESS: Final = 20
"""Failures in a row, from the first answer on, that end a run: something is wrong with all of it."""
_MOST_TO_CHOOSE: Final = 60
"""Regions of an image up to which a caption is located back."""


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
    """One caption that is wanted.

    Attributes:
        key: Of its answer.
        number: Which of the image's regions, from 0; -1 for the global caption.
        mode: Of the prompt.
        version: Of the prompt.
        locate: Key of where the caption is located back to; None where that is not asked.
        score: Key of its similarity; None where that is not measured.
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


class Keeper(Protocol):
    """What finished work is kept in: the store, or what a Ray worker sends back to it."""

    def get(self, keys: Collection[bytes]) -> dict[bytes, dict[str, Any]]: ...  # noqa: D102

    def add(self, key: bytes, value: Mapping[str, Any], cost: float = 0.0) -> None: ...  # noqa: D102

    def fail(self, key: bytes, kind: str, why: str, cost: float = 0.0) -> None: ...  # noqa: D102

    def failures(self, keys: Collection[bytes]) -> dict[bytes, Failure]: ...  # noqa: D102


class Scorer(Protocol):
    """What measures how well captions fit their crops."""

    identity: Mapping[str, Any]

    def score(self, crops: Sequence[Image.Image], captions: Sequence[str]) -> list[dict[str, float]]: ...  # noqa: D102


@dataclass(kw_only=True)
class Keys:
    """Names everything that is wanted about an image, by key: content, region, class, prompt, captioner, settings.

    Args:
        plan: What is asked.
        settings: What else decides an answer: the captioner's identity, its temperature and the crops.
        scorer: Identity of the scorer; None where there is none.
        gallery: Places of images, each with a number that chooses the region shown in all modes.
    """

    plan: Plan
    settings: Mapping[str, Any]
    scorer: Mapping[str, Any] | None = None
    gallery: Mapping[int, int] = field(default_factory=dict)

    def image(self, digest: str) -> Ask:
        """The global caption of an image."""
        version = draw(self.plan.seed, digest, len(GLOBAL))
        return Ask(key=key_of("image", digest, GLOBAL[version], self._shared), number=-1, mode="full", version=version)

    def regions(self, digest: str, item: Item) -> list[Ask]:
        """The captions of its regions."""
        asks = []
        shown = self.gallery.get(item.place)
        for number, each in enumerate(item.regions):
            where = region_row(each.region)
            version = draw(self.plan.seed, f"{digest} {where} {each.category}", len(REGION))
            in_gallery = shown is not None and number == shown % len(item.regions)
            for mode in MODES if in_gallery else (self.plan.mode,):
                key = key_of("region", digest, where, each.category, mode, REGION[version], self._shared)
                main = mode == self.plan.mode
                choosing = main and self.plan.locate_back and len(item.regions) <= _MOST_TO_CHOOSE
                asks.append(
                    Ask(
                        key=key,
                        number=number,
                        mode=mode,
                        version=version,
                        locate=key_of("locate", key.hex()) if choosing else None,
                        score=key_of("score", key.hex(), self.scorer) if main and self.scorer else None,
                    )
                )
        return asks

    @property
    def _shared(self) -> Any:
        return [dict(self.settings), self.plan.seed]


@dataclass(kw_only=True)
class Work:
    """Asks what is wanted about images, one call an image.

    Args:
        keys: What is wanted.
        captioner: Who is asked.
        keeper: Where answers are kept.
        closeup: How crops are made.
        asking: For prices and lengths.
        images: Folder of the images.
        scorer: Measures similarity; None leaves it out.
        noted: Called with ``"answer"``, ``"region"`` or the kind of a failure, as they come.
        spent: What was paid, in the currency of the prices.
    """

    keys: Keys
    captioner: Captioner
    keeper: Keeper
    closeup: Closeup
    asking: Asking
    images: Path
    scorer: Scorer | None = None
    noted: Callable[[str, str], None] = lambda kind, why: None
    spent: float = 0.0
    scoring: asyncio.Lock = field(default_factory=asyncio.Lock)

    def wanted(self, digest: str, item: Item) -> list[Ask]:
        """What is to be asked about an image."""
        asks = self.keys.regions(digest, item)
        alone = all(ask.mode == "crop" for ask in asks)
        return asks if alone else [self.keys.image(digest), *asks]

    async def image(self, digest: str, item: Item, asks: Sequence[Ask]) -> None:
        """Ask what is missing about one image.

        Raises:
            RegionGPTError: Nothing more can be asked or kept.
        """
        keys = [key for ask in asks for key in ask.keys]
        known = self.keeper.get(keys)
        failed = {key: each for key, each in self.keeper.failures(keys).items() if key not in known}
        wanted = [ask for ask in asks if any(key not in known for key in ask.keys)]
        try:
            seen = await asyncio.to_thread(self._see, item, wanted, known)
        except RegionGPTError as error:  # of the image or its regions
            for ask in wanted:
                self._failed(ask.key, Failed("image that cannot be used", str(error)))
            return
        whole = next((ask for ask in asks if ask.number < 0), None)
        try:
            told = ""
            if whole is not None:
                answer = await self._caption(whole, self._request(whole, item, seen), known, failed)
                told = answer["text"] if answer is not None else ""
        except Stopped:
            return
        # Without its global caption a region waits for the next run.
        ready = [ask for ask in wanted if ask.number >= 0 and (told or ask.mode == "crop")]
        outcomes = await asyncio.gather(
            *(self._region(ask, item, seen, told, known, failed) for ask in ready), return_exceptions=True
        )
        if errors := [each for each in outcomes if isinstance(each, BaseException) and not isinstance(each, Stopped)]:
            raise errors[0]
        if self.captioner.stopping:
            return
        await self._measure([ask for ask in wanted if ask.score is not None and ask.score not in known], seen, known)

    def _see(self, item: Item, wanted: Sequence[Ask], known: Mapping[bytes, Any]) -> "_Seen":
        """Decode the image and cut out what is needed; in a thread."""
        photo = load_image(self.images / item.name)
        if item.width and photo.size != (item.width, item.height):
            raise DataError(
                f"{item.name}: expected {item.width} x {item.height} pixels as its regions have it, got "
                f"{photo.width} x {photo.height}"
            )
        for each in item.regions:
            each.region.check(*photo.size)
        seen = _Seen()
        if self.captioner.wants_photo:
            seen.photo = photo
        elif any(ask.number < 0 and ask.key not in known for ask in wanted):
            seen.pictures[-1] = self.captioner.picture(self.closeup.shrink(photo))
        for ask in wanted:
            needs = ask.key not in known and not self.captioner.wants_photo
            if ask.number >= 0 and (needs or ask.score is not None) and ask.number not in seen.pictures:
                crop = self.closeup.crop(photo, item.regions[ask.number].region)
                if needs:
                    seen.pictures[ask.number] = self.captioner.picture(crop)
                if ask.score is not None:
                    seen.crops[ask.number] = crop
        if not self.captioner.wants_photo and any(ask.locate is not None for ask in wanted):
            seen.numbered = self.captioner.picture(
                self.closeup.shrink(draw_regions(photo, [each.region for each in item.regions]))
            )
        return seen

    def _request(self, ask: Ask, item: Item, seen: "_Seen", told: str = "") -> Request:
        seed = draw(self.keys.plan.seed, ask.key.hex(), 2**31)
        if ask.number < 0:
            return Request(
                stage="image", text=GLOBAL[ask.version], picture=seen.pictures.get(-1), photo=seen.photo,
                regions=item.regions, version=ask.version, seed=seed,
            )  # fmt: skip
        category = _said(item.regions[ask.number])
        return Request(
            stage="region",
            text=region_prompt(ask.version, ask.mode, category),
            lead="" if ask.mode == "crop" else context(told),
            picture=seen.pictures.get(ask.number),
            photo=seen.photo,
            regions=item.regions,
            number=ask.number,
            category=category if ask.mode == "full" else "",
            context=told if ask.mode != "crop" else "",
            version=ask.version,
            seed=seed,
        )

    async def _region(
        self, ask: Ask, item: Item, seen: "_Seen", told: str, known: dict[bytes, Any], failed: Mapping[bytes, Failure]
    ) -> None:
        if ask.mode == "full" and not item.regions[ask.number].category:
            told_why = f"{item.name}: mode full tells the class of each region; give names, or --mode context"
            self._failed(ask.key, Failed("region without class", told_why))
            return
        answer = await self._caption(ask, self._request(ask, item, seen, told), known, failed)
        if answer is None:
            return
        if ask.mode == self.keys.plan.mode:
            self.noted("region", "")
        if ask.locate is None or ask.locate in known or not self.captioner.locates:
            return
        numbers = tuple(str(number) for number in range(1, len(item.regions) + 1))
        request = Request(
            stage="locate", text=LOCATE.format(count=len(numbers), caption=answer["text"]), picture=seen.numbered,
            photo=seen.photo, regions=item.regions, caption=answer["text"], choices=numbers,
        )  # fmt: skip
        located = await self._asked(ask.locate, request, failed)
        if located is not None:
            number = int(located.text)
            self.keeper.add(ask.locate, {"number": number}, self._pay(located.tokens_in, located.tokens_out))

    async def _caption(
        self, ask: Ask, request: Request, known: dict[bytes, Any], failed: Mapping[bytes, Failure]
    ) -> dict[str, Any] | None:
        """The answer that is known or comes; None where it failed."""
        if ask.key in known:
            return dict(known[ask.key])
        reply = await self._asked(ask.key, request, failed)
        if reply is None:
            return None
        value = {
            "text": reply.text,
            "version": ask.version,
            "model": reply.model,
            "seed": request.seed,
            "seconds": round(reply.seconds, 4),
            "tokens_in": reply.tokens_in,
            "tokens_out": reply.tokens_out,
        }
        self.keeper.add(ask.key, value, self._pay(reply.tokens_in, reply.tokens_out))
        self.noted("answer", "")
        known[ask.key] = value
        return value

    async def _asked(self, key: bytes, request: Request, failed: Mapping[bytes, Failure]) -> Reply | None:
        before = failed[key].tries if key in failed else 0
        if before >= 3 * _TRIES:
            self.noted(failed[key].kind, failed[key].reason)
            return None
        for attempt in range(_TRIES):
            try:
                reply = await self.captioner.ask(request)
                if not request.choices:
                    return reply
                chosen = re.search(r"\d+", reply.text)  # an endpoint may ignore that there are choices
                if chosen is None or chosen[0] not in (*request.choices, "0"):
                    told = f"expected one of 1 to {len(request.choices)}, got {reply.text[:40]!r}"
                    raise Failed("not a choice", told, tokens=(reply.tokens_in, reply.tokens_out))
                return Reply(**{**reply.__dict__, "text": chosen[0]})
            except Failed as error:
                self._failed(key, error, last=attempt + 1 == _TRIES or not error.again)
                if not error.again:
                    return None
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

    async def _measure(self, asks: Sequence[Ask], seen: "_Seen", known: Mapping[bytes, Any]) -> None:
        """Score the captions there are."""
        asks = [ask for ask in asks if ask.key in known]
        if self.scorer is None or not asks:
            return
        crops, captions = [seen.crops[ask.number] for ask in asks], [known[ask.key]["text"] for ask in asks]
        async with self.scoring:  # one batch at a time
            scores = await asyncio.to_thread(self.scorer.score, crops, captions)
        for ask, score in zip(asks, scores, strict=True):
            assert ask.score is not None
            self.keeper.add(ask.score, score)


@dataclass
class _Seen:
    """What is kept of a decoded image while it is asked about."""

    photo: Image.Image | None = None
    pictures: dict[int, Any] = field(default_factory=dict)
    crops: dict[int, Image.Image] = field(default_factory=dict)
    numbered: Any = None


def _said(each: RecordRegion) -> str:
    """A class name as people write it: V3Det and LVIS have underscores."""
    return each.category.replace("_", " ").strip()


@dataclass(kw_only=True)
class Progress:
    """What a run has done, and why it ended."""

    answers: int = 0
    regions: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    last: str = ""
    ended: Literal["", "interrupted", "max-cost", "max-time", "max-failures"] = ""


class Run:
    """One run over a source: opens images as the captioner has room, and ends when there is a reason to.

    Args:
        work: What is done with an image; its ``spent`` is what earlier runs cost.
        limits: When to end early.
        tick: Called once a finished region.
    """

    def __init__(self, work: Work, limits: Limits, tick: Callable[[], object]) -> None:
        self.work, self.limits, self.tick = work, limits, tick
        self.progress = Progress()
        work.noted = self.note
        self._began = time.monotonic()
        self._change = asyncio.Event()
        self._open = 0

    async def go(self, pending: Iterable[tuple[str, Item, list[Ask]] | None]) -> Progress:
        """Work through images; a None among them lets others work.

        Raises:
            RegionGPTError: The run cannot go on; everything finished is kept.
        """
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
                        while not self.work.captioner.has_room(self._open) and not self.progress.ended:
                            self._change.clear()
                            await self._change.wait()
                        if self.is_over():
                            break
                        self._open += 1
                        group.create_task(self._image(*found))
            except BaseExceptionGroup as errors:
                raise _first(errors) from None
        return self.progress

    async def _image(self, digest: str, item: Item, asks: list[Ask]) -> None:
        try:
            await self.work.image(digest, item, asks)
        finally:
            self._open -= 1
            self._change.set()

    def note(self, kind: str, why: str) -> None:
        """Count an answer, a finished region, or a failure of some kind.

        Raises:
            DataError: Nothing but failures came.
        """
        self._change.set()
        if kind == "region":
            self.progress.regions += 1
            self.tick()
        elif kind == "answer":
            self.progress.answers += 1
        else:
            self.progress.failures[kind] += 1
            self.progress.last = why
            if not self.progress.answers and self.progress.failures.total() >= _HOPELESS:
                raise DataError(f"the first {_HOPELESS} requests all failed; the last: {kind}: {why}")
        self.is_over()

    def is_over(self) -> bool:
        """Whether a limit is reached, or the user had enough; then nothing new is asked."""
        if not self.progress.ended:
            limits = self.limits
            if limits.max_time is not None and time.monotonic() - self._began > limits.max_time:
                self.progress.ended = "max-time"
            elif limits.max_failures is not None and self.progress.failures.total() >= limits.max_failures:
                self.progress.ended = "max-failures"
            elif limits.max_cost is not None and self.work.spent >= limits.max_cost:
                self.progress.ended = "max-cost"
            if self.progress.ended:
                self.work.captioner.stop()
                self._change.set()
        return bool(self.progress.ended)

    def _interrupt(self) -> None:
        if self.progress.ended == "interrupted":
            raise KeyboardInterrupt
        self.progress.ended = "interrupted"
        self.work.captioner.stop()
        self._change.set()


@contextmanager
def interruptible(loop: asyncio.AbstractEventLoop, handler: Callable[[], None]) -> Iterator[None]:
    """Call a handler for Ctrl-C and for a scheduler's SIGTERM, where this thread may."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, handler)
    except (ValueError, RuntimeError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _first(errors: BaseExceptionGroup) -> BaseException:
    """One exception of several: the user's error, if any is."""
    flat: list[BaseException] = []
    stack: list[BaseException] = [errors]
    while stack:
        error = stack.pop(0)
        if isinstance(error, BaseExceptionGroup):
            stack += error.exceptions
        else:
            flat.append(error)
    return next((error for error in flat if isinstance(error, RegionGPTError)), flat[0])

"""The engine: both stages of every region, each asked once, and stored before anything else happens to the answer."""

import asyncio
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from PIL import Image
from pydantic import PositiveFloat, PositiveInt

from regiongpt.annotate.captioners import Asking, Captioner, Failed, Reply, Request, Stopped
from regiongpt.annotate.filters import Similarity
from regiongpt.annotate.plan import WORDING, Ask, Closeup, Item, Wanted, context, draw, keys_of, region_prompt
from regiongpt.annotate.store import Failure
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.settings import Settings

TRIES: Final = 3
"""Tries of an answer that was empty, unfinished or malformed in one run; over all runs three times as many."""
_HOPELESS: Final = 20
"""Failures from the first request on, without one answer, that end a run: something is wrong with all of it."""
_PLACEHOLDER: Final = re.compile(r"<(image|region\d*)>", re.IGNORECASE)


class Limits(Settings):
    """When a run ends early; what is under way is finished, and the same command goes on from there."""

    max_cost: PositiveFloat | None = None
    """in the currency of the prices, over all runs into --out"""
    max_time: PositiveFloat | None = None
    """seconds of this run"""
    max_failures: PositiveInt | None = None
    """failed requests in this run"""


@dataclass
class _Seen:
    """An image while it is asked about: what is known, what failed, and what its requests carry."""

    item: Item
    known: dict[bytes, Any]
    failed: dict[bytes, Failure]
    photo: Image.Image | None = None
    pictures: dict[int, Any] = field(default_factory=dict)  # by region; -1 the whole image
    crops: dict[int, Image.Image] = field(default_factory=dict)
    numbered: Any = None
    told: str = ""  # the global caption


class Engine:
    """Asks what is missing about images, as many at a time as the captioner has room for.

    ``keeper`` takes the answers: the store, or what a worker sends back to it; ``tick`` is called once a region.
    """

    def __init__(
        self, wanted: Wanted, captioner: Captioner, keeper: Any, closeup: Closeup, asking: Asking, images: Path,
        scorer: Similarity | None, limits: Limits, tick: Callable[[], object],
    ) -> None:  # fmt: skip
        self.wanted, self.captioner, self.keeper, self.closeup = wanted, captioner, keeper, closeup
        self.asking, self.images, self.scorer, self.limits, self.tick = asking, images, scorer, limits, tick
        self.spent: float = keeper.cost()
        self.failures: Counter[str] = Counter()  # requests, by kind
        self.last = self.ended = ""  # failure; interrupted, max-cost, max-time or max-failures
        self._answers = self._open = 0
        self._began = time.monotonic()
        self._change, self._scoring = asyncio.Event(), asyncio.Lock()

    async def go(self, pending: Iterable[tuple[str, Item, list[Ask]] | None]) -> None:
        """Work through images, a None among which lets others work; RegionGPTError where it cannot go on."""
        loop = asyncio.get_running_loop()
        if self.limits.max_time is not None:
            loop.call_later(self.limits.max_time, self.is_over)
        with ExitStack() as stack:
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not in every thread
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, self._interrupt)
                    stack.callback(loop.remove_signal_handler, number)
            try:
                async with asyncio.TaskGroup() as group:
                    for found in pending:
                        if found is None:
                            await asyncio.sleep(0)
                            continue
                        while not self.captioner.has_room(self._open) and not self.ended:
                            self._change.clear()
                            await self._change.wait()
                        if self.is_over():
                            break
                        self._open += 1
                        group.create_task(self.image(*found))
            except BaseExceptionGroup as errors:
                first: BaseException = errors.subgroup(RegionGPTError) or errors
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                raise first from None

    async def image(self, digest: str, item: Item, asks: Sequence[Ask]) -> None:
        """Ask what is missing about one image; RegionGPTError where nothing more can be asked or kept."""
        keys = keys_of([*asks])
        known = self.keeper.get(keys)
        failed = {key: each for key, each in self.keeper.failures(keys).items() if key not in known}
        seen = _Seen(item, known, failed)
        missing = [ask for ask in asks if any(key not in known for key in keys_of([ask]))]
        try:
            try:
                await asyncio.to_thread(self._look, seen, missing)
            except RegionGPTError as error:  # of the image or its regions
                self._failed(missing[0].key, Failed("image that cannot be used", f"{item.name}: {error}"))
                return
            if asks[0].number < 0:
                seen.told = (await self._caption(asks[0], seen) or {}).get("text", "")
            # Without its global caption a region waits for the next run.
            ready = [ask for ask in missing if ask.number >= 0 and (seen.told or ask.mode == "crop")]
            outcomes = await asyncio.gather(*(self._region(ask, seen) for ask in ready), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException) and not isinstance(outcome, Stopped):
                    raise outcome
            await self._score([ask for ask in ready if ask.score and ask.score not in known and ask.key in known], seen)
        except Stopped:
            return
        finally:
            self._open -= 1
            self._change.set()

    def _look(self, seen: _Seen, missing: Sequence[Ask]) -> None:
        """Decode the image once and cut out what is needed; in a thread."""
        item, own = seen.item, self.captioner.wants_photo
        photo = load_image(self.images / item.name)
        if item.width and photo.size != (item.width, item.height):
            size = f"{photo.width} x {photo.height}"
            raise DataError(f"expected {item.width} x {item.height} pixels as its regions have it, got {size}")
        seen.photo = photo if own else None
        for ask in missing:
            asked = not own and ask.key not in seen.known
            if ask.number in seen.pictures or not (asked or ask.score):
                continue
            whole = ask.number < 0
            crop = self.closeup.shrink(photo) if whole else self.closeup.crop(photo, item.regions[ask.number].region)
            seen.pictures[ask.number] = self.captioner.picture(crop) if asked else None
            if ask.score:
                seen.crops[ask.number] = crop
        if not own and any(ask.locate for ask in missing):
            drawn = draw_regions(photo, [each.region for each in item.regions])
            seen.numbered = self.captioner.picture(self.closeup.shrink(drawn))

    async def _region(self, ask: Ask, seen: _Seen) -> None:
        """Stage 2 of one region, and where the caption is located back to."""
        item = seen.item
        if ask.mode == "full" and not item.regions[ask.number].category:
            why = f"{item.name}: mode full tells the class of each region; give names, or --mode context"
            self._failed(ask.key, Failed("region without class", why))
            return
        was_known = ask.key in seen.known
        if (answer := await self._caption(ask, seen)) is None:
            return
        if ask.mode == self.wanted.plan.mode and not was_known:
            self.note("region", "")
        if ask.locate is None or ask.locate in seen.known:
            return
        request = Request(
            stage="locate", text=WORDING["locate"].format(count=len(item.regions), caption=answer["text"]),
            picture=seen.numbered, photo=seen.photo, regions=item.regions, caption=answer["text"],
        )  # fmt: skip
        if located := await self._asked(ask.locate, request, seen):
            cost = self._pay(located.tokens_in, located.tokens_out)
            self.keeper.add(ask.locate, {"number": int(located.text)}, cost)

    async def _caption(self, ask: Ask, seen: _Seen) -> dict[str, Any] | None:
        """The caption that is known or comes; None where it failed."""
        if ask.key in seen.known:
            return dict(seen.known[ask.key])
        request = Request(
            stage="image", text=WORDING["image"][ask.version], picture=seen.pictures.get(ask.number), photo=seen.photo,
            regions=seen.item.regions, version=ask.version, seed=draw(self.wanted.plan.seed, ask.key.hex(), 2**31),
        )  # fmt: skip
        if ask.number >= 0:
            name = seen.item.regions[ask.number].category.replace("_", " ").strip()  # as LVIS and V3Det have names
            request = replace(
                request, stage="region", text=region_prompt(ask.version, ask.mode, name), number=ask.number,
                lead=context(seen.told) if ask.mode != "crop" else "", category=name if ask.mode == "full" else "",
            )  # fmt: skip
        if (reply := await self._asked(ask.key, request, seen)) is None:
            return None
        # No half of a surrogate pair, and nothing that a model would take for a place in its prompt.
        text = _PLACEHOLDER.sub(r"\1", reply.text.encode("utf-8", "replace").decode())
        value = {
            "text": text, "version": ask.version, "model": reply.model, "seed": request.seed,
            "seconds": round(reply.seconds, 4), "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out,
        }  # fmt: skip
        self.keeper.add(ask.key, value, self._pay(reply.tokens_in, reply.tokens_out))
        self.note("answer", "")
        seen.known[ask.key] = value
        return value

    async def _asked(self, key: bytes, request: Request, seen: _Seen) -> Reply | None:
        """The captioner's answer, after some tries; None where it failed, now or too often before."""
        if (before := seen.failed.get(key)) and before.tries >= 3 * TRIES:
            self.note(before.kind, before.reason)
            return None
        for left in reversed(range(TRIES)):
            try:
                reply = await self.captioner.ask(request)
                if request.stage != "locate":
                    return reply
                chosen = re.search(r"\d+", reply.text)  # an endpoint may ignore that there are choices
                if chosen is not None and chosen[0] in ("0", *request.choices):
                    return replace(reply, text=chosen[0])
                told = f"expected one of 1 to {len(request.regions)}, got {reply.text[:40]!r}"
                raise Failed("not a choice", told, tokens=(reply.tokens_in, reply.tokens_out))
            except Failed as error:
                self._failed(key, error, last=not (left and error.again))
                if not error.again:
                    break
        return None

    async def _score(self, asks: Sequence[Ask], seen: _Seen) -> None:
        if self.scorer is None or not asks or self.captioner.stopping:
            return
        crops, captions = [seen.crops[ask.number] for ask in asks], [seen.known[ask.key]["text"] for ask in asks]
        async with self._scoring:  # one batch at a time
            scores = await asyncio.to_thread(self.scorer.score, crops, captions)
        for ask, score in zip(asks, scores, strict=True):
            self.keeper.add(ask.score, score)

    def _failed(self, key: bytes, error: Failed, last: bool = True) -> None:
        self.keeper.fail(key, error.kind, error.reason, self._pay(*error.tokens))
        if last:
            self.note(error.kind, error.reason)

    def _pay(self, tokens_in: int, tokens_out: int) -> float:
        """What an answer, or a try in vain, costs."""
        cost = (tokens_in * (self.asking.input_price or 0.0) + tokens_out * (self.asking.output_price or 0.0)) / 1e6
        self.spent += cost
        return cost

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
        """Whether the run ends, after a look at its limits."""
        seconds = time.monotonic() - self._began
        found = {"max_time": seconds, "max_failures": self.failures.total(), "max_cost": self.spent}
        for name, value in found.items():
            most = getattr(self.limits, name)
            if not self.ended and most is not None and value >= most:
                self._end(name.replace("_", "-"))
        return bool(self.ended)

    def _end(self, why: str) -> None:
        self.ended = why
        self.captioner.stop()
        self._change.set()

    def _interrupt(self) -> None:
        if self.ended == "interrupted":
            raise KeyboardInterrupt
        self._end("interrupted")

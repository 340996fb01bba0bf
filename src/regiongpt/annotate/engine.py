"""The engine: both stages of every region, each asked once, and stored before anything else happens to the answer."""

import asyncio
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Final

from PIL import Image

from regiongpt.annotate.captioners import Captioner, Failed, Reply, Request, Stopped
from regiongpt.annotate.filters import Similarity
from regiongpt.annotate.options import Options
from regiongpt.annotate.plan import WORDING, Ask, Work, context, draw, region_prompt, shrink, window
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.storage import Store

TRIES: Final = 3
"""Tries of an answer that was empty, unfinished or malformed in one run; over all runs three times as many."""
_HOPELESS: Final = 20
"""Failures from the first request on, without one answer, that end a run: something is wrong with all of it."""
_PLACEHOLDER: Final = re.compile(r"<(image|region\d*)>", re.IGNORECASE)
Value = dict[str, Any]


class ImageTask:
    """Asks what is missing about one image, which is decoded once; each value goes to ``keep`` at once."""

    def __init__(
        self, work: Work, options: Options, captioner: Captioner, scorer: Similarity | None,
        keep: Callable[[str, Value], None],
    ) -> None:  # fmt: skip
        self.work, self.item, self.known, self.missing = work, work.item, work.known, work.missing
        self.options, self.captioner, self.scorer, self.keep = options, captioner, scorer, keep
        self.photo: Image.Image | None = None
        self.pictures: dict[int, Any] = {}  # by region; -1 the whole image
        self.crops: dict[int, Image.Image] = {}
        self.numbered: Any = None
        self.told = ""  # the global caption

    async def run(self) -> None:
        """Both stages; RegionGPTError where nothing more can be asked or kept."""
        asks = [ask for ask in self.work.asks if self.missing(ask.keys)]
        try:
            await asyncio.to_thread(self._look, asks)
        except RegionGPTError as error:  # of the image or its regions
            self._fail(asks[0].key, Failed("image that cannot be used", f"{self.item.name}: {error}"))
            return
        with suppress(Stopped):
            if self.work.asks[0].number < 0:
                self.told = await self._caption(self.work.asks[0])
            # Without its global caption a region waits for the next run.
            ready = [ask for ask in asks if ask.number >= 0 and (self.told or ask.mode == "crop")]
            outcomes = await asyncio.gather(*map(self._region, ready), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException) and not isinstance(outcome, Stopped):
                    raise outcome
            await self._score([ask for ask in ready if ask.score and not self.missing([ask.key])])

    def _look(self, asks: Sequence[Ask]) -> None:
        """Decode the image and cut out what is needed; in a thread."""
        item, own = self.item, self.captioner.wants_photo
        assert self.options.images
        photo = load_image(self.options.images / item.name)
        if item.width and photo.size != (item.width, item.height):
            size = f"{photo.width} x {photo.height}"
            raise DataError(f"expected {item.width} x {item.height} pixels as its regions have it, got {size}")
        self.photo = photo if own else None
        for ask in asks:
            asked = not own and self.missing([ask.key])
            if ask.number in self.pictures or not (asked or ask.score):
                continue
            cut = photo
            if ask.number >= 0:
                cut = photo.crop(window(self.options, item.regions[ask.number].region, *photo.size))
            cut = shrink(cut, self.options.crop_most)
            self.pictures[ask.number] = self.captioner.picture(cut) if asked else None
            if ask.score:
                self.crops[ask.number] = cut
        if not own and any(ask.locate for ask in asks):
            drawn = draw_regions(photo, [each.region for each in item.regions])
            self.numbered = self.captioner.picture(shrink(drawn, self.options.crop_most))

    async def _region(self, ask: Ask) -> None:
        """Stage 2 of one region, and where its caption is located back to."""
        if ask.mode == "full" and not self.item.regions[ask.number].category:
            why = f"{self.item.name}: mode full tells the class of each region; give names, or --mode context"
            self._fail(ask.key, Failed("region without class", why))
            return
        if not (caption := await self._caption(ask)) or not ask.locate or not self.missing([ask.locate]):
            return
        request = Request(
            stage="locate", text=WORDING["locate"].format(count=len(self.item.regions), caption=caption),
            picture=self.numbered, photo=self.photo, regions=self.item.regions, caption=caption,
        )  # fmt: skip
        if located := await self._ask(ask.locate, request):
            self._keep(ask.locate, (located.tokens_in, located.tokens_out), {"number": int(located.text)})

    async def _caption(self, ask: Ask) -> str:
        """The caption that is known or comes; "" where it failed."""
        if not self.missing([ask.key]):
            return str(self.known[ask.key]["text"])
        request = Request(
            stage="image", text=WORDING["image"][ask.version], picture=self.pictures.get(ask.number), photo=self.photo,
            regions=self.item.regions, version=ask.version, seed=draw(self.options.seed, ask.key, 2**31),
        )  # fmt: skip
        if ask.number >= 0:
            name = self.item.regions[ask.number].category.replace("_", " ").strip()  # as LVIS and V3Det have names
            request = replace(
                request, stage="region", text=region_prompt(ask.version, ask.mode, name), number=ask.number,
                lead=context(self.told) if ask.mode != "crop" else "", category=name if ask.mode == "full" else "",
            )  # fmt: skip
        if (reply := await self._ask(ask.key, request)) is None:
            return ""
        # No half of a surrogate pair, and nothing that a model would take for a place in its prompt.
        text = _PLACEHOLDER.sub(r"\1", reply.text.encode("utf-8", "replace").decode())
        value = {
            "text": text, "version": ask.version, "model": reply.model, "seed": request.seed,
            "seconds": round(reply.seconds, 4), "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out,
        }  # fmt: skip
        self._keep(ask.key, (reply.tokens_in, reply.tokens_out), value)
        return text

    async def _ask(self, key: str, request: Request) -> Reply | None:
        """The captioner's answer, after some tries; None where it failed, now or too often before."""
        for left in reversed(range(min(TRIES, 3 * TRIES - self.known.get(key, {}).get("tries", 0)))):
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
                self._fail(key, error, again=error.again and left > 0)
                if not error.again:
                    return None
        return None

    async def _score(self, asks: Sequence[Ask]) -> None:
        asks = [ask for ask in asks if self.missing([ask.score])]
        if self.scorer is None or not asks:
            return
        crops, captions = [self.crops[ask.number] for ask in asks], [self.known[ask.key]["text"] for ask in asks]
        scores = await asyncio.to_thread(self.scorer.score, crops, captions)
        for ask, score in zip(asks, scores, strict=True):
            self._keep(ask.score, (0, 0), score)

    def _fail(self, key: str, error: Failed, again: bool = False) -> None:
        tries = self.known.get(key, {}).get("tries", 0) + 1
        self._keep(key, error.tokens, {"error": error.kind, "reason": error.reason, "tries": tries, "again": again})

    def _keep(self, key: str, tokens: tuple[int, int], value: Value) -> None:
        cost = (tokens[0] * self.options.input_price + tokens[1] * self.options.output_price) / 1e6
        self.known[key] = {**value, "cost": cost, "at": time.time()}
        self.keep(key, self.known[key])


class Run:
    """Keeps what comes, counts it, and ends in time; ``tick`` is called with the regions of each finished image."""

    def __init__(self, options: Options, store: Store, captioner: Captioner, tick: Callable[[int], object]) -> None:
        self.options, self.store, self.captioner, self.tick = options, store, captioner, tick
        self.spent = store.total("cost") if options.max_cost else 0.0
        self.ended = ""  # interrupted, max-cost, max-time or max-failures
        self._answers = self._failures = self._open = 0
        self._began, self._change = time.monotonic(), asyncio.Event()

    def keep(self, key: str, value: Value) -> None:
        """Store a value; DataError where that fails, or where all requests do."""
        self.store.add({key: value})
        self.spent += value["cost"]
        if "error" not in value:
            self._answers += 1
        elif not value["again"]:
            self._failures += 1
            if not self._answers and self._failures >= _HOPELESS:
                told = f"{value['error']}: {value['reason']}"
                raise DataError(f"the first {_HOPELESS} requests all failed; the last: {told}")
        self._change.set()
        self.is_over()

    async def go(self, pending: Iterable[Work | None], scorer: Similarity | None) -> None:
        """Work through images, a None among which lets others work; RegionGPTError where it cannot go on."""
        loop = asyncio.get_running_loop()
        if self.options.max_time is not None:
            loop.call_later(self.options.max_time, self.is_over)
        with ExitStack() as stack:
            with suppress(ValueError, RuntimeError, NotImplementedError):  # not in every thread
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, self._interrupt)
                    stack.callback(loop.remove_signal_handler, number)
            try:
                async with asyncio.TaskGroup() as group:
                    for work in pending:
                        while work and not self.captioner.has_room(self._open) and not self.ended:
                            self._change.clear()
                            await self._change.wait()
                        if self.is_over():
                            break
                        if work:
                            self._open += 1
                            task = ImageTask(work, self.options, self.captioner, scorer, self.keep)
                            group.create_task(self._image(task))
                        await asyncio.sleep(0)
            except BaseExceptionGroup as errors:
                first: BaseException = errors.subgroup(RegionGPTError) or errors
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                raise first from None

    async def _image(self, task: ImageTask) -> None:
        try:
            await task.run()
            self.tick(len(task.item.regions))
        finally:
            self._open -= 1
            self._change.set()

    def is_over(self) -> bool:
        """Whether the run ends, after a look at its limits."""
        seconds = time.monotonic() - self._began
        found = {"max_time": seconds, "max_failures": self._failures, "max_cost": self.spent}
        for name, value in found.items():
            most = getattr(self.options, name)
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

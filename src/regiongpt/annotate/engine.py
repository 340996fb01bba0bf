"""The engine: runs both stages of every region once, and stores each answer first."""

import asyncio
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import islice, repeat
from typing import Any, Final

from PIL import Image

from regiongpt.annotate.captioners import Captioner, Failed, Reply, Request, Stopped
from regiongpt.annotate.options import Options
from regiongpt.annotate.plan import WORDING, Ask, Value, Work, context, draw, region_prompt
from regiongpt.drawing import draw_regions
from regiongpt.environment import progress
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.storage import Store

TRIES: Final = 3
"""Tries of an answer that was empty, unfinished or malformed in one run; over all runs three times as many."""
_HOPELESS: Final = 20
"""Failures from the first request on, without one answer, that end a run: something is wrong with all of it."""
Scorer = Callable[[Sequence[Image.Image], Sequence[str]], list[dict[str, float]]]
_PLACEHOLDER: Final = re.compile(r"<(image|region\d*)>", re.IGNORECASE)


class ImageTask:
    """Captions one image, decoded once; each value goes to ``keep`` at once."""

    def __init__(
        self, work: Work, options: Options, captioner: Captioner, scorer: Scorer | None,
        keep: Callable[[str, Value], None],
    ) -> None:  # fmt: skip
        self.work, self.options, self.captioner, self.scorer, self.keep = work, options, captioner, scorer, keep
        self.record, self.todo = work.record, work.todo()
        self.pictures: dict[str, Any] = {}  # what is shown with each of them
        self.lead = ""  # the global caption, as prompts of stage 2 begin

    async def run(self) -> None:
        """Both stages; RegionGPTError if no more can be requested or stored."""
        try:
            await asyncio.to_thread(self._look)
        except RegionGPTError as error:  # the image or its regions are unusable
            told = f"{self.record.image}: {error}"
            self._fail(next(iter(self.todo.values())), Failed("image that cannot be used", told))
            return
        first, *_ = self.work.asks
        with suppress(Stopped):
            if first.stage == "image" and (caption := await self._caption(first)):
                self.lead = context(caption)
        # Without its global caption a region waits for the next run.
        ready = [ask for ask in self.work.asks if ask.stage == "region" and (self.lead or ask.mode == "crop")]
        await asyncio.gather(*map(self._region, ready))
        scored = [(ask, text) for ask in self.todo.values() if ask.stage == "score" and (text := self._captioned(ask))]
        if self.scorer and scored:
            crops, captions = [self.pictures[ask.key] for ask, _ in scored], [text for _, text in scored]
            found = await asyncio.to_thread(self.scorer, crops, captions)
            for (ask, _), score in zip(scored, found, strict=True):
                self._keep(ask, score)

    def _captioned(self, ask: Ask) -> str:
        """The caption that something is asked about; "" without one."""
        return str(self.work.known.get(ask.key.partition(" ")[0], {}).get("text", ""))

    def _look(self) -> None:
        """Decode the image and make the pictures; in a thread."""
        record, most = self.record, self.options.crop_most
        assert self.options.images
        image = load_image(self.options.images / record.image)
        if image.size != (record.width, record.height):
            size = f"{image.width} x {image.height}"
            raise DataError(f"expected {record.width} x {record.height} pixels as in its regions, got {size}")

        @cache
        def cut(number: int) -> Image.Image:
            made = image.copy()
            if number >= 0:
                margin, least = self.options.crop_margin, self.options.crop_least
                made = image.crop(record.regions[number].region.close_up(*image.size, margin, least))
            made.thumbnail((most, most))
            return made

        @cache
        def picture(number: int) -> Any:
            return self.captioner.picture(cut(number))

        @cache
        def outlined() -> Any:
            drawn = draw_regions(image, [each.region for each in record.regions])
            drawn.thumbnail((most, most))
            return self.captioner.picture(drawn)

        for key, ask in self.todo.items():
            if ask.stage == "score":
                self.pictures[key] = cut(ask.number)
            elif self.captioner.wants_image:
                self.pictures[key] = image
            else:
                self.pictures[key] = outlined() if ask.stage == "locate" else picture(ask.number)

    async def _region(self, ask: Ask) -> None:
        """Stage 2 of one region, and where its caption is located back to."""
        if ask.mode == "full" and not self.record.regions[ask.number].category:
            told = f"{self.record.image}: mode full tells the class of each region; give names, or --mode context"
            self._fail(ask, Failed("region without class", told))
            return
        with suppress(Stopped):
            caption = await self._caption(ask)
            locate = self.todo.get(f"{ask.key} locate")
            if caption and locate:
                text = WORDING["locate"].format(count=len(self.record.regions), caption=caption)
                if located := await self._ask(locate, text=text, caption=caption):
                    self._keep(locate, {"number": int(located.text)}, located.tokens_in, located.tokens_out)

    async def _caption(self, ask: Ask) -> str:
        """The caption that is known or comes; "" where it failed."""
        if ask.key not in self.todo:
            return str(self.work.known[ask.key]["text"])
        told = {"text": WORDING["image"][ask.version]}
        if ask.stage == "region":
            name = self.record.regions[ask.number].category.replace("_", " ").strip()  # as LVIS and V3Det have it
            told = {
                "text": region_prompt(ask.version, ask.mode, name), "lead": self.lead if ask.mode != "crop" else "",
                "category": name if ask.mode == "full" else "",
            }  # fmt: skip
        seed = draw(self.options.seed, ask.key, 2**31)
        if (reply := await self._ask(ask, seed=seed, **told)) is None:
            return ""
        own = {"text": reply.text, "version": ask.version, "model": reply.model, "seed": seed}
        self._keep(ask, {**own, "seconds": round(reply.seconds, 4)}, reply.tokens_in, reply.tokens_out)
        return reply.text

    async def _ask(self, ask: Ask, **told: Any) -> Reply | None:
        """The captioner's answer, after some tries; None where it failed, now or too often before."""
        request = Request(
            stage=ask.stage, picture=self.pictures[ask.key], regions=self.record.regions, number=ask.number,
            version=ask.version, **told,
        )  # fmt: skip
        for left in reversed(range(min(TRIES, 3 * TRIES - self.work.known.get(ask.key, {}).get("tries", 0)))):
            try:
                return self._checked(await self.captioner.ask(request), request.choices)
            except Failed as error:
                self._fail(ask, error, again=error.again and left > 0)
                if not error.again:
                    return None
        return None

    def _checked(self, reply: Reply, choices: list[str]) -> Reply:
        """The reply with its text as it is kept; Failed unless it is finished."""
        tokens = reply.tokens_in, reply.tokens_out
        if not reply.ended:
            told = f"no end within {self.options.max_new_tokens} tokens; raise --max-new-tokens"
            raise Failed("cut off", told, tokens=tokens)
        # No half of a surrogate pair, and nothing that a model would take for a place in its prompt.
        text = _PLACEHOLDER.sub(r"\1", reply.text.strip().encode("utf-8", "replace").decode())
        if not text:
            raise Failed("empty answer", "expected words, got none", again=True, tokens=tokens)
        if choices:
            chosen = re.search(r"\d+", text)  # an endpoint may ignore that there are choices
            if chosen is None or chosen[0] not in ("0", *choices):
                told = f"expected one of 1 to {len(choices)}, got {text[:40]!r}"
                raise Failed("not a choice", told, tokens=tokens)
            text = chosen[0]
        return replace(reply, text=text)

    def _fail(self, ask: Ask, error: Failed, again: bool = False) -> None:
        tries = self.work.known.get(ask.key, {}).get("tries", 0) + 1
        self._keep(ask, {"error": error.kind, "reason": error.reason, "tries": tries, "again": again}, *error.tokens)

    def _keep(self, ask: Ask, value: Value, tokens_in: int = 0, tokens_out: int = 0) -> None:
        cost = (tokens_in * self.options.input_price + tokens_out * self.options.output_price) / 1e6
        value = {**value, "tokens_in": tokens_in, "tokens_out": tokens_out, "cost": cost, "at": time.time()}
        self.work.known[ask.key] = value
        self.keep(ask.key, value)


def scorer_of(options: Options) -> tuple[Scorer | None, str]:
    """What scores captions against crops, and what tells it from others; None and "" without ``--similarity``."""
    if options.similarity is None:
        return None, ""
    from regiongpt.inference.choices import Similarity

    scorer = Similarity(options.similarity, options.device)
    return scorer.score, scorer.identity


class Run:
    """Keeps what comes, counts it, and ends in time; ``count`` is how many regions there are."""

    def __init__(self, options: Options, store: Store, captioner: Captioner, count: int) -> None:
        self.options, self.store, self.captioner = options, store, captioner
        self._ticks = iter(progress(repeat(None), "captioning", "regions", count))
        self.spent = store.total("cost") if options.max_cost else 0.0
        self.ended = ""  # interrupted, max-cost, max-time, max-failures or error
        self._answers = self._failures = self._open = 0
        self._began, self._change = time.monotonic(), asyncio.Event()
        self._error: Exception | None = None

    def tick(self, work: Work) -> None:
        """Show that the regions of an image are done."""
        deque(islice(self._ticks, len(work.record.regions)), maxlen=0)

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

    async def go(self, works: Iterable[Work], scorer: Scorer | None) -> None:
        """Work through images; RegionGPTError where it cannot go on."""
        loop = asyncio.get_running_loop()
        if self.options.max_time is not None:
            loop.call_later(self.options.max_time, self.is_over)
        with suppress(ValueError, RuntimeError, NotImplementedError):  # not in every thread
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._interrupt)
        async with asyncio.TaskGroup() as group:
            for work in works:
                todo = work.todo()
                while todo and not self.captioner.has_room(self._open) and not self.ended:
                    self._change.clear()
                    await self._change.wait()
                if self.is_over():
                    break
                if todo:
                    self._open += 1
                    group.create_task(self._image(work, scorer))
                else:
                    self.tick(work)
                await asyncio.sleep(0)
        if self._error:
            raise self._error

    async def _image(self, work: Work, scorer: Scorer | None) -> None:
        try:
            await ImageTask(work, self.options, self.captioner, scorer, self.keep).run()
            self.tick(work)
        except Exception as error:  # what else is under way is finished and kept
            self._error = self._error or error
            self._end("error")
        self._open -= 1
        self._change.set()

    def is_over(self) -> bool:
        """Whether the run has ended, or now ends by a limit."""
        found = {"max_time": time.monotonic() - self._began, "max_failures": self._failures, "max_cost": self.spent}
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

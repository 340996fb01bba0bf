"""The one thread that runs the model: the requests of all clients in one batch, each client in its turn.

A request is a generator, moved on when there is room and its client has its turn, that yields questions and results.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from regiongpt.errors import RegionGPTError
from regiongpt.inference.engine import Engine, Latest, Prompt, Scene
from regiongpt.inference.scheduler import Job
from regiongpt.regions import Region
from regiongpt.serve.guard import ApiError
from regiongpt.serve.images import Picture

log = logging.getLogger(__name__)

FILL_SECONDS = 0.05
"""Time to make questions ready between two steps of the answers that are being written."""
CROPS = 2000
"""Regions of an image whose second look is kept, and those of one request."""


@dataclass(kw_only=True, eq=False)
class Ask:
    """A question for the batch."""

    place: int  # among the results of its request
    prompt: Prompt
    job: Job
    before: list[int] = field(default_factory=list)  # tokens written before the batch failed


Result = tuple[int, Any]
"""A finished result with its place."""
Event = tuple[str, Any]
"""Events of a request: ("piece", text), ("result", Result), at the end ("done", None) or ("error", exception)."""
Task = Callable[[Scene, Tensor], Iterator[Ask | Result]]
"""What a request does with the encoded image and its regions' features (R, D)."""


@dataclass(eq=False)
class Ticket:
    """A request that waits for its results."""

    client: str
    picture: Picture
    weights: Tensor  # (R, gh, gw), the regions' pooling weights
    boxes: list[Region] | None  # what a second look is taken at
    task: Task
    respond: Callable[[list[Any]], dict[str, Any]]  # makes the answer of all results
    stream: Callable[[AsyncIterator[Event]], AsyncIterator[dict[str, Any]]] | None = None  # or parts of it as they come
    prompt_tokens: int = 0
    cancelled: bool = False  # has failed, or nobody waits for it: its answers leave the batch at their next token
    work: Iterator[Ask | Result] | None = None  # the task, once started
    left: int = 1  # questions in the batch, and the task itself
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)


class Worker:
    """Runs the model for all requests; keeps ``scenes`` encoded images, and tells how many answers each step had."""

    def __init__(self, engine: Engine, scenes: int, on_step: Callable[[int], None]) -> None:
        self.engine, self._on_step = engine, on_step
        self.failed = False
        self.encoded = 0  # images, so far
        self._scenes: Latest[Scene] = Latest(scenes)
        self._arrived: SimpleQueue[Ticket | None] = SimpleQueue()  # at last None
        self._clients: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._running: list[tuple[Ticket, Ask]] = []
        self._suspects: deque[tuple[Ticket, Ask]] = deque()  # one of which made the batch fail
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to work for the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._arrived.put(None)
        self._thread.join(timeout=10)

    def submit(self, ticket: Ticket) -> None:
        """Hand in a request, whose events come in its queue."""
        self._arrived.put(ticket)
        if self.failed:
            raise ApiError(503, "the model has stopped working; restart the server", "model_failed")

    # What follows runs in the model's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait():
                self._take()
                self._step()
                if self.engine.scheduler.dead:
                    raise RuntimeError("what runs the language model has died")
            ended = ApiError(503, "the server is shutting down", "shutting_down", wait=5)
        except BaseException:
            log.exception("the model's thread has failed")
            ended = ApiError(503, "the model has stopped working; restart the server", "model_failed")
        self.failed = True
        left = [ticket for line in self._clients.values() for ticket in line]
        left += [ticket for ticket, _ in (*self._running, *self._suspects)]
        while not self._arrived.empty():
            left += filter(None, [self._arrived.get()])
        for ticket in left:
            self._fail(ticket, ended)

    def _wait(self) -> bool:
        """Take new requests, or wait for one; False at the end."""
        while True:
            try:
                ticket = self._arrived.get(block=not (self._clients or self._running or self._suspects))
            except Empty:
                return True
            if ticket is None:
                return False
            self._clients.setdefault(ticket.client, deque()).append(ticket)

    def _take(self) -> None:
        """Fill the batch, one question of each client in turn."""
        if self._suspects:
            if not self._running:
                self._submit(*self._suspects.popleft())
            return
        until = time.perf_counter() + FILL_SECONDS
        while self._clients and len(self._running) < self.engine.scheduler.rows:
            client, line = self._clients.popitem(last=False)
            ticket = line.popleft()
            if self._move_on(ticket):
                line.append(ticket)
            if line:
                self._clients[client] = line
            if time.perf_counter() > until:
                return

    def _move_on(self, ticket: Ticket) -> bool:
        """Have a task do its next thing; False if it has nothing more to do."""
        if ticket.cancelled:
            return False
        try:
            if ticket.work is None:
                ticket.work = self._begin(ticket)
            made = next(ticket.work, None)
            if isinstance(made, Ask):
                ticket.left += 1
                self._submit(ticket, made)
            elif made is not None:
                self._tell(ticket, "result", made)
            else:
                self._settle(ticket)
        except Exception as error:
            self._fail(ticket, error)
            return False
        return made is not None

    def _begin(self, ticket: Ticket) -> Iterator[Ask | Result]:
        """Start a task with its image, encoded once for all, and its regions."""
        engine, picture = self.engine, ticket.picture

        def encode() -> Scene:
            scene = engine.encode_pixels(picture.pixels, picture.width, picture.height)
            self.encoded += 1
            return replace(scene, photo=picture.photo)

        scene = self._scenes.get(picture.id, encode)
        if len(scene.crops) > CROPS:
            scene.crops.clear()
        crops = engine.crops(scene, ticket.boxes) if ticket.boxes else None
        pooled = engine.model.region_features(scene.map_1Chw, ticket.weights.to(engine.device)[None], crops)[0]
        return ticket.task(scene, pooled)

    def _submit(self, ticket: Ticket, ask: Ask) -> None:
        self.engine.scheduler.submit(ask.job)
        self._running.append((ticket, ask))

    def _step(self) -> None:
        """One token for every answer in the batch."""
        if not self._running:
            return
        for ticket, ask in self._running:
            ask.job.cancelled = ticket.cancelled
        self.engine.scheduler.advance()
        self._on_step(len(self._running))
        stepped, self._running = self._running, [(t, ask) for t, ask in self._running if not ask.job.finished]
        failed = sum(ask.job.error is not None for _, ask in stepped)
        if failed > 1:
            log.warning("the batch failed; its %d answers continue one by one", failed)
        for ticket, ask in stepped:
            try:
                if ask.job.error is None:
                    self._say(ticket, ask)
                elif failed == 1:
                    raise ask.job.error
                else:  # the cause is unknown: each continues, and fails, by itself
                    self._continue(ask)
                    self._suspects.append((ticket, ask))
            except Exception as error:
                self._fail(ticket, error)

    def _continue(self, ask: Ask) -> None:
        """Have an answer go on from where it was when the batch failed."""
        job, embeds = ask.job, ask.job.embeds
        if job.tokens:
            written = torch.tensor(job.tokens, device=embeds.device)
            embeds = torch.cat([embeds, self.engine.model.get_input_embeddings()(written).to(embeds.dtype)])
        room = max(1, job.room - len(job.tokens))
        ask.job = Job(prefix=job.prefix, embeds=embeds, options=job.options, room=room, reader=job.reader)
        ask.job.draws = job.draws
        ask.before += job.tokens

    def _say(self, ticket: Ticket, ask: Ask) -> None:
        """Send the new part of an answer."""
        job = ask.job
        if job.cancelled:
            return
        if job.reader is not None:
            self._tell(ticket, "piece", job.reader.take(final=job.finished))
        if job.finished:
            job.tokens = ask.before + job.tokens
            self._tell(ticket, "result", (ask.place, self.engine.finish(job, ask.prompt, began=0.0)))
            self._settle(ticket)

    def _settle(self, ticket: Ticket) -> None:
        """A question of a request, or its task, is done with."""
        ticket.left -= 1
        if not ticket.left:
            self._tell(ticket, "done")

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """End a request with an error: the client's own mistake, or a failure of the model."""
        if ticket.cancelled:
            return
        ticket.cancelled = True
        if not isinstance(error, RegionGPTError):
            log.error("the model failed on a request", exc_info=error)
            error = ApiError(500, "the model failed on this request", "model_failed")
        self._tell(ticket, "error", error)

    def _tell(self, ticket: Ticket, kind: str, value: Any = None) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(ticket.events.put_nowait, (kind, value))

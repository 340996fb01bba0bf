"""The one thread that runs the model: the requests of all clients in one batch, each client in its turn.

Everything a request needs of the model is a task: a generator that is moved on when its client has its turn and there
is room in the batch. It yields questions, which are written in the batch, and results, which it has worked out itself.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regiongpt.errors import RegionGPTError
from regiongpt.inference.engine import Answer, Engine, Latest, Prompt, Scene
from regiongpt.inference.scheduler import Job
from regiongpt.serve.errors import ApiError
from regiongpt.serve.images import Picture

log = logging.getLogger(__name__)

FILL_SECONDS = 0.05
"""Time to make questions ready between two steps of the answers that are being written."""


@dataclass(kw_only=True, eq=False)
class Ask:
    """A question for the batch."""

    place: int  # among the results of its request
    prompt: Prompt
    job: Job
    began: float = 0.0
    before: list[int] = field(default_factory=list)  # tokens written before the batch failed
    begun: bool = False  # some text was handed out


Result = tuple[int, Any]
"""A finished result with its place."""
Task = Callable[[Engine, Scene, Tensor], Iterator[Ask | Result]]
"""What a request does with the model, its encoded image and its regions' features (R * K, D)."""


@dataclass(kw_only=True, eq=False)
class Ticket:
    """A request that waits for its results: pieces of text, and values with their places."""

    client: str
    picture: Picture
    weights: Tensor  # (R * K, gh, gw), the regions' pooling weights
    task: Task
    respond: Callable[[list[Any]], dict[str, Any]]  # makes the answer of all results
    stream: Callable[[str, Any], list[dict[str, Any]]] | None = None  # makes events of each, as `results` yields them
    pieces: bool = False  # stream the text
    prompt_tokens: int = 0
    cancelled: bool = False
    work: Iterator[Ask | Result] | None = None  # the task, once started
    left: int = 1  # questions in the batch, and the task itself
    over: bool = False
    events: "asyncio.Queue[tuple[str, Any]]" = field(default_factory=asyncio.Queue)

    async def results(self) -> AsyncIterator[tuple[str, Any]]:
        """Pieces of text, as ("piece", text), and results, as ("result", (place, value)), until all are there."""
        while True:
            kind, value = await self.events.get()
            if kind == "done":
                return
            if kind == "error":
                raise value
            yield kind, value

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves the batch at its next token."""
        self.cancelled = True


class Worker:
    """Runs the model for all requests.

    Args:
        engine: the model.
        scenes: encoded images to keep.
        on_step: called with the number of answers in the batch after each step.
    """

    def __init__(self, engine: Engine, scenes: int, on_step: Callable[[int], None] = lambda rows: None) -> None:
        self.engine, self._on_step = engine, on_step
        self.failed = False
        self.encoded = 0  # images, so far
        self._scenes: Latest[tuple[Picture, Scene]] = Latest(scenes)
        self._clients: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._running: list[tuple[Ticket, Ask]] = []
        self._suspects: deque[tuple[Ticket, Ask]] = deque()  # one of which made the batch fail
        self._arrived: deque[Ticket] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: list[tuple[Ticket, str, Any]] = []
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to work for the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=10)

    def submit(self, ticket: Ticket) -> None:
        """Hand in a request; its results come by :meth:`Ticket.results`."""
        if self.failed:
            raise ApiError(503, "the model has stopped working; restart the server", "model_failed")
        with self._wake:
            self._arrived.append(ticket)
            self._wake.notify()

    # -----------------------------------------------------------------------------------------------------------------
    # In the model's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._take()
                    self._step()
                    self._hand_over()
                    if self.engine.scheduler.dead:
                        raise RuntimeError("what runs the language model has died")
        except BaseException:
            log.exception("the model's thread has failed")
            self.failed = True
        with self._wake:
            tickets = [*self._arrived, *(each for line in self._clients.values() for each in line)]
        for ticket in {*tickets, *(ticket for ticket, _ in (*self._running, *self._suspects))}:
            self._fail(ticket, ApiError(503, "the server is shutting down", "shutting_down", wait=5))
        self._hand_over()

    def _wait(self) -> bool:
        """Take new requests, or wait for one; False at the end."""
        with self._wake:
            while not (self._stopping or self._arrived or self._clients or self._running or self._suspects):
                self._wake.wait()
            while self._arrived:
                ticket = self._arrived.popleft()
                self._clients.setdefault(ticket.client, deque()).append(ticket)
            return not self._stopping

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
        if ticket.cancelled or ticket.over:
            return False
        try:
            if ticket.work is None:
                picture = ticket.picture
                _, scene = self._scenes.get(picture.id, lambda: (picture, self._encode(picture)))
                weights_1RHW = ticket.weights.to(self.engine.device)[None]
                pooled = self.engine.model.region_features(scene.map_1Chw, weights_1RHW)[0]
                ticket.work = ticket.task(self.engine, scene, pooled)
            made = next(ticket.work, None)
            if isinstance(made, Ask):
                made.began = time.perf_counter()
                ticket.left += 1
                self._submit(ticket, made)
            elif made is not None:
                self._events.append((ticket, "result", made))
            else:
                self._settle(ticket)
        except Exception as error:
            self._fail(ticket, error)
            return False
        return made is not None

    def _encode(self, picture: Picture) -> Scene:
        scene = self.engine.encode_pixels(picture.pixels, picture.width, picture.height)
        self.encoded += 1
        return scene

    def _submit(self, ticket: Ticket, ask: Ask) -> None:
        self.engine.scheduler.submit(ask.job)
        self._running.append((ticket, ask))

    def _step(self) -> None:
        """One token for every answer in the batch."""
        for ticket, ask in self._running:
            ask.job.cancelled = ticket.cancelled or ticket.over
        if not self._running:
            return
        self.engine.scheduler.advance()
        self._on_step(len(self._running))
        failed = sum(ask.job.error is not None for _, ask in self._running)
        if failed > 1:
            log.warning("the batch failed; its %d answers continue one by one", failed)
        going = [(ticket, ask) for ticket, ask in self._running if not ask.job.finished]
        for ticket, ask in self._running:
            try:
                if ask.job.error is None:
                    self._say(ticket, ask)
                elif failed == 1:
                    raise ask.job.error
                else:  # the cause is unknown: each continues, and fails, by itself
                    self._suspects.append((ticket, self._again(ask)))
            except Exception as error:
                self._fail(ticket, error)
        self._running = going

    def _again(self, ask: Ask) -> Ask:
        """Continue an answer from where it was when the batch failed."""
        job, embeds = ask.job, ask.job.embeds
        if job.tokens:
            written = torch.tensor(job.tokens, device=embeds.device)
            embeds = torch.cat([embeds, self.engine.model.get_input_embeddings()(written).to(embeds.dtype)])
        room = max(1, job.room - len(job.tokens))
        again = Job(prefix=job.prefix, embeds=embeds, options=job.options, room=room, reader=job.reader)
        again.draws = job.draws
        ask.before, ask.job = ask.before + job.tokens, again
        return ask

    def _say(self, ticket: Ticket, ask: Ask) -> None:
        """Send the new part of an answer."""
        job = ask.job
        if job.cancelled:
            return
        if ticket.pieces and job.reader is not None:
            piece = job.reader.take(final=job.finished)
            piece = piece if ask.begun else piece.lstrip()
            if piece:
                ask.begun = True
                self._events.append((ticket, "piece", piece))
        if job.finished:
            job.tokens = ask.before + job.tokens
            answer: Answer = self.engine.finish(job, ask.prompt, ask.began)
            self._events.append((ticket, "result", (ask.place, answer)))
            self._settle(ticket)

    def _settle(self, ticket: Ticket) -> None:
        """A question of a request, or its task, is done with."""
        ticket.left -= 1
        if not ticket.left and not ticket.over:
            ticket.over = True
            self._events.append((ticket, "done", None))

    def _fail(self, ticket: Ticket, error: BaseException | None) -> None:
        """End a request with an error: the client's own mistake, or a failure of the model."""
        if ticket.over:
            return
        ticket.over = True
        if not isinstance(error, RegionGPTError | ApiError):
            log.error("the model failed on a request", exc_info=error)
            error = ApiError(500, "the model failed on this request", "model_failed")
        self._events.append((ticket, "error", error))

    def _hand_over(self) -> None:
        """Pass new events to the event loop."""
        events, self._events = self._events, []
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: list[tuple[Ticket, str, Any]]) -> None:
    for ticket, kind, value in events:
        ticket.events.put_nowait((kind, value))

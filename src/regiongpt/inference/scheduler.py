"""Continuous batching: finished answers leave the batch and waiting ones enter it, for all callers.

There is no thread of its own: each caller that waits for an answer runs steps of the whole batch.

Shapes: R sequences, V vocabulary, D model width, T tokens.
"""

import itertools
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regiongpt.errors import ConfigError
from regiongpt.inference.options import ROWS, Options
from regiongpt.inference.shared_prefix import Decoder, Prefix, PrefixCache

PREFILL = 2048
"""Tokens of entering questions that go through the language model in one pass, unless a single one has more."""
CACHE_BYTES = 2**30
"""Memory for the answers' own keys and values on a CPU; on CUDA, half the free memory."""


@dataclass(kw_only=True, eq=False)
class Job:
    """One answer to be written."""

    prefix: Prefix | None  # what the question begins with
    embeds: Tensor  # (T, D), the rest of the question
    options: Options
    room: int  # most tokens to write, at least 1
    sure: bool = False  # whether the likelihood is wanted
    reader: "TextReader | None" = None  # decodes along the way, to stream and for stop strings
    tokens: list[int] = field(default_factory=list)  # those written, including the one that ended the answer
    likelihood: float = 0.0  # the logarithm of their probability
    finished: bool = False
    cancelled: bool = False
    admitted: bool = False
    error: BaseException | None = None

    def __post_init__(self) -> None:
        # A generator of its own: what is drawn for an answer does not depend on what else is in the batch.
        self.draws = random.Random(self.options.seed)

    @property
    def reserve(self) -> int:
        """Most tokens of its own that its sequence can have."""
        return len(self.embeds) + self.room


class Scheduler:
    """Writes the answers of all jobs handed to it, at most ``rows`` at a time and within the ``token_budget``.

    ``embed`` gives the word embeddings (R, D) of token ids; ``stop_ids`` end an answer; ``never`` are not written.
    """

    def __init__(
        self,
        decoder: Decoder,
        embed: Callable[[Tensor], Tensor],
        stop_ids: Sequence[int],
        never: Sequence[int],
        token_budget: int | None = None,
        rows: int = ROWS,
    ) -> None:
        self.decoder, self.rows, self.token_budget = decoder, rows, token_budget
        self._embed, self._stop_ids, self._never = embed, frozenset(stop_ids), list(never)
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self.running: list[Job] = []  # in the order of the cache's rows
        self._cache = PrefixCache()

    @property
    def dead(self) -> bool:
        """Whether it can write nothing more, whatever it is asked."""
        return False

    def run(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Write answers; take jobs as there is room, yield each as it finishes. Leaving the iteration cancels them."""
        source = iter(jobs)
        mine: list[Job] = []
        try:
            while True:
                for job in itertools.islice(source, self.rows - sum(not job.admitted for job in mine)):
                    self.submit(job)
                    mine.append(job)
                if not mine:
                    return
                self.advance(mine)
                done = [job for job in mine if job.finished]
                mine = [job for job in mine if not job.finished]
                for job in done:
                    if job.error is not None:
                        raise job.error
                    yield job
        finally:
            self._cancel(mine)

    def stream(self, job: Job) -> Iterator[str]:
        """Write one answer, whose job has a reader, and yield its text in pieces. Leaving the iteration ends it."""
        assert job.reader is not None
        self.submit(job)
        begun = False
        try:
            while not job.finished:
                self.advance([job])
                piece = job.reader.take(final=job.finished)
                if piece := (piece if begun else piece.lstrip()):
                    begun = True
                    yield piece
        finally:
            self._cancel([job])
        if job.error is not None:
            raise job.error

    def submit(self, job: Job) -> None:
        """Have an answer written by the next calls of :meth:`advance`; ConfigError if it exceeds the token budget."""
        if job.reserve > (budget := self._budget(job)):
            raise ConfigError(f"question and answer of {job.reserve} tokens: raise the token budget, {budget}")
        with self._lock:
            self._waiting.append(job)

    def advance(self, mine: Sequence[Job] = ()) -> None:
        """One step for everybody, unless another thread has meanwhile finished one of mine."""
        with self._lock:
            if any(job.finished for job in mine):
                return
            try:
                self._step()
            except BaseException as error:
                # The pass was for all of them; each caller raises it.
                interrupted = not isinstance(error, Exception)
                for job in self.running:
                    job.error = RuntimeError("the pass through the model was interrupted") if interrupted else error
                    job.finished = True
                self._abandon()
                if interrupted:
                    raise

    def _abandon(self) -> None:
        """Forget all running jobs."""
        self.running, self._cache = [], PrefixCache()

    def _cancel(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            job.cancelled = True
        # The next step frees their memory at the latest. A generator may be closed by the garbage collector in the
        # middle of a step of this very thread, so waiting for the lock could be for ever.
        if self._lock.acquire(blocking=False):
            try:
                self._drop_cancelled()
            finally:
                self._lock.release()

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self.running))):
            if self.running[row].cancelled:
                self._leave(row)

    @torch.inference_mode()
    def _step(self) -> None:
        self._drop_cancelled()
        going = list(self.running)
        entering = self._enter()
        if not self.running:
            return
        # New questions and running answers share the pass: the weights are read once.
        embeds = [job.embeds for job in entering]
        if going:
            last = torch.tensor([job.tokens[-1] for job in going], device=going[0].embeds.device)
            embeds = [self._embed(last), *embeds]
        counts = [1] * len(going) + [len(job.embeds) for job in entering]
        logits_RV = self.decoder.forward(self._cache, torch.cat(embeds), counts)
        chosen = choose(logits_RV, list(self.running), self._never)
        if sure := [row for row, job in enumerate(self.running) if job.sure]:
            for row, logs_V in zip(sure, logits_RV[sure].float().log_softmax(-1), strict=True):
                self.running[row].likelihood += float(logs_V[chosen[row]])
        for row, token in reversed(list(enumerate(chosen))):
            job = self.running[row]
            job.tokens.append(token)
            ended = token in self._stop_ids
            if job.reader is not None and not ended:
                job.reader.read(token)
                ended = job.reader.stopped
            if ended or len(job.tokens) >= job.room:
                self._leave(row)

    def _enter(self) -> list[Job]:
        """Start waiting jobs in order, as many as rows, budget and one pass allow."""
        entering: list[Job] = []
        size, tokens = max((job.reserve for job in self.running), default=0), 0
        while self._waiting and len(self.running) < self.rows:
            job = self._waiting[0]
            if job.cancelled:
                self._waiting.popleft()
                job.finished = True
                continue
            tokens, size = tokens + len(job.embeds), max(size, job.reserve)
            over_budget = self.running and size * (len(self.running) + 1) > self._budget(job)
            if over_budget or (entering and tokens > PREFILL):
                break
            self._waiting.popleft()
            job.admitted = True
            self._cache.add(job.prefix)
            self.running.append(job)
            entering.append(job)
        return entering

    def _leave(self, row: int) -> None:
        job = self.running[row]
        if job.reader is not None:
            job.reader.read(final=True)
        self._cache.remove(row)
        self.running[row] = self.running[-1]  # as in the cache
        self.running.pop()
        job.finished = True

    def _budget(self, job: Job) -> int:
        """The token budget; by default as many as there is memory for, at least one longest question's."""
        if self.token_budget is None:
            if job.prefix is None:  # no tokens to measure yet
                return ROWS * job.reserve
            device = job.embeds.device
            memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CACHE_BYTES
            context = int(getattr(self.decoder.model.config, "max_position_embeddings", None) or 0)
            fits = memory * job.prefix.length // job.prefix.nbytes
            self.token_budget = max(context, job.reserve, fits)
        return self.token_budget


def choose(logits_RV: Tensor, jobs: Sequence[Job], never: Sequence[int]) -> list[int]:
    """The next token of each sequence: the most likely, or a sampled one if the job has a temperature."""
    scores_RV = logits_RV.float()
    if never:
        scores_RV = scores_RV.index_fill(1, torch.tensor(never, device=scores_RV.device), float("-inf"))
    chosen: list[int] = scores_RV.max(-1).indices.tolist()  # three times as quick on a CPU as argmax
    for row, job in enumerate(jobs):
        if job.options.temperature:
            chosen[row] = draw(scores_RV[row], job.options.temperature, job.options.top_p, job.draws.random())
    return chosen


def draw(scores_V: Tensor, temperature: float, top_p: float, at: float) -> int:
    """The token at quantile ``at``, in [0, 1), of the most likely tokens with total probability ``top_p``."""
    below_V = scores_V.double() - scores_V.max()  # near temperature 0 the quotients overflow, but never to NaN
    likely_V, tokens_V = (below_V / temperature).softmax(-1).sort(descending=True, stable=True)
    up_to_V = likely_V.cumsum(-1)
    kept = int((up_to_V - likely_V < top_p).sum())
    place = int(torch.searchsorted(up_to_V[:kept], at * float(up_to_V[kept - 1]), right=True))
    return int(tokens_V[min(place, kept - 1)])


class TextReader:
    """The text of one answer as its tokens come, up to a stop string, in pieces that never have to be taken back.

    Pieces are given out as ``rewrite`` makes them, with numbers in brackets whole.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), rewrite: Callable[[str], str] = str) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop, self._rewrite = tokenizer, tuple(stop), rewrite
        self._ids: list[int] = []
        self._from = self._read = self._given = 0

    def read(self, *tokens: int, final: bool = False) -> None:
        """Read more tokens; ``final`` for the end of the answer, which flushes a character that was cut off."""
        self._ids += tokens
        if self.stopped:
            return
        # Some tokenizers write a token's blank only behind another token, so the last few are read again with it.
        before, after = (
            str(self._tokenizer.decode(self._ids[self._from : end], skip_special_tokens=True))
            for end in (self._read, len(self._ids))
        )
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return
        self.text += after[len(before) :]
        self._from, self._read = self._read, len(self._ids)
        if found := [place for stop in self._stop if (place := self.text.find(stop)) >= 0]:
            self.text, self.stopped = self.text[: min(found)], True

    def take(self, final: bool = False) -> str:
        """The text since the last call; holds back a possible start of a stop string, unless ``final``."""
        waits = [n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        waits += [len(cut[0]) for cut in [re.search(r"\[\d{0,6}$", self.text)] if cut]
        end = len(self.text) - (0 if final or self.stopped else max(waits, default=0))
        piece, self._given = self.text[self._given : end], max(self._given, end)
        return self._rewrite(piece)

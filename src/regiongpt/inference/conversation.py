"""Several turns about one image."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Unpack

from torch import Tensor

from regiongpt.inference.choices import common_length
from regiongpt.inference.engine import (
    Answer,
    Engine,
    Prompt,
    Scene,
    TooLong,
    Turn,
    citation_warnings,
    notes,
    question_turns,
)
from regiongpt.inference.options import Generation, Options
from regiongpt.inference.prefix import Prefix
from regiongpt.inference.scheduler import Job
from regiongpt.regions import Region


@dataclass(kw_only=True)
class Conversation:
    """Several turns about one image and one list of regions; made by :meth:`RegionPredictor.conversation`.

    It stays with the image it was begun on. Keys and values of earlier turns are kept, so a turn costs its own tokens.
    Answers are those of :meth:`RegionPredictor.ask` with the turns so far as its history. One thread at a time may use
    it.

    Attributes:
        messages: the turns so far, the oldest first, as transformers writes them.
        warnings: of the last turn, such as that the oldest turns had to be forgotten.
    """

    engine: Engine
    scene: Scene = field(repr=False)
    regions: tuple[Region, ...]
    pooled: Tensor = field(repr=False)
    messages: list[Turn] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    # What the model has read and written so far, a token's id or below 0 for a region's tokens, with its prefix.
    tokens: list[int] = field(default_factory=list, repr=False)
    prefix: Prefix | None = field(default=None, repr=False)

    def ask(self, question: str, **generation: Unpack[Generation]) -> Answer:
        """Ask the next question; it may mention every region of the conversation.

        A question that fails leaves the conversation as it was. Where the model's context is full, the oldest turns are
        forgotten, with a warning.

        Raises:
            RegionError: a placeholder stands for no region.
            DataError: the question is empty, or by itself longer than the model can read.
            ConfigError: an option is out of its range.
        """
        began, options = time.perf_counter(), Options(**generation)
        prompt = self._prepare(question, options)
        job = self._job(prompt, options)
        for _ in self.engine.scheduler.run([job]):
            self._keep(prompt, job)
        answer = self.engine.finish(job, prompt, began)
        self._remember(question, answer.text)
        return answer

    def stream(self, question: str, **generation: Unpack[Generation]) -> Iterator[str]:
        """Ask as :meth:`ask` does, which checks at once, and yield the answer in pieces."""
        options = Options(**generation)
        prompt = self._prepare(question, options)

        def pieces() -> Iterator[str]:
            said = ""
            job = self._job(prompt, options, streams=True)
            try:
                for piece in self.engine.scheduler.stream(job):
                    said += piece
                    yield piece
            finally:
                self._keep(prompt, job)
                self._remember(question, said)

        return pieces()

    def _job(self, prompt: Prompt, options: Options, streams: bool = False) -> Job:
        """The prompt behind as much of it as was read before."""
        job = self.engine.job(self.scene, prompt, options, streams)
        if self.prefix is not None:
            same = common_length(self.tokens, self._tokens(prompt)[:-1])  # the last is read again, for its logits
            cut = self.prefix.crop(same) if same > (job.prefix.length if job.prefix else 0) else None
            if cut is not None:
                job.embeds = self.engine.embed(self.scene, prompt.ids, prompt.rows, prompt.pooled, start=cut.length)
                job.prefix = cut
        job.keep, job.onto = True, job.prefix.chain[0] if job.prefix else None
        return job

    def _keep(self, prompt: Prompt, job: Job) -> None:
        if job.kept is not None:
            self.tokens, self.prefix = [*self._tokens(prompt), *job.tokens][: job.kept.length], job.kept

    def _tokens(self, prompt: Prompt) -> list[int]:
        """What each token stands for: two that are equal, behind equal ones, have the same keys and values."""
        rows, region = iter(prompt.rows), self.engine.model.config.region_token_id
        return [-1 - next(rows) if token == region else token for token in prompt.ids]

    def _prepare(self, question: str, options: Options) -> Prompt:
        kept = list(self.messages)
        while True:
            try:
                turns = question_turns(kept, question)
                prompt = self.engine.prompt(turns, self.pooled, len(self.regions), options.max_new_tokens)
                break
            except TooLong:
                if not kept:
                    raise
                del kept[:2]
        # A region not spoken of yet may be in the next turn, so nothing is said about it here.
        self.warnings = () if self.messages else notes(self.regions)
        if forgotten := (len(self.messages) - len(kept)) // 2:
            self.warnings = (f"the model's context is full; forgot the oldest turns: {forgotten}",)
        self.messages = kept
        return replace(prompt, warnings=self.warnings)

    def _remember(self, question: str, answer: str) -> None:
        self.warnings += tuple(citation_warnings(answer, len(self.regions)))
        if answer.strip():  # silence is not a turn that a template could write
            self.messages = [*question_turns(self.messages, question), {"role": "assistant", "content": answer.strip()}]

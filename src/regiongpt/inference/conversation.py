"""Several turns about one image."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Unpack

from regiongpt.inference.engine import Answer, Engine, Generation, Options, Prompt, Scene, TooLong, Turn, question_turns
from regiongpt.regions import Region


@dataclass(kw_only=True)
class Conversation:
    """Several turns about one image and one list of regions; made by :meth:`RegionPredictor.conversation`.

    It stays with the image it was begun on, even after the predictor has been given another one.

    Attributes:
        engine: who answers.
        scene: the encoded image.
        regions: what ``<regionN>`` stands for in every turn.
        messages: the turns so far, the oldest first, as transformers writes them.
        warnings: of the last turn, such as that the oldest turns had to be forgotten.
    """

    engine: Engine
    scene: Scene = field(repr=False)
    regions: tuple[Region, ...]
    messages: list[Turn] = field(default_factory=list)
    warnings: tuple[str, ...] = ()

    def ask(self, question: str, **generation: Unpack[Generation]) -> Answer:
        """Ask the next question, as :meth:`RegionPredictor.ask` does, with the turns so far as its history.

        A question that fails leaves the conversation as it was. Where the model's context is full, the oldest turns are
        forgotten, with a warning.

        Args:
            question: may mention every region of the conversation.
            **generation: ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``; see :meth:`RegionPredictor.ask`.

        Raises:
            RegionError: a placeholder stands for no region.
            DataError: the question is empty, or by itself longer than the model can read.
            ConfigError: an option is out of its range.
        """
        began, options = time.perf_counter(), Options(**generation)
        answer = self.engine.answer(self.scene, self._prepare(question, options), options, began)
        self._remember(question, answer.text)
        return answer

    def stream(self, question: str, **generation: Unpack[Generation]) -> Iterator[str]:
        """Ask the next question and yield the answer in pieces; what was yielded becomes part of the conversation.

        The arguments are those of :meth:`ask`, and are checked before this returns.
        """
        options = Options(**generation)
        prompt = self._prepare(question, options)

        def pieces() -> Iterator[str]:
            said = ""
            try:
                for piece in self.engine.stream(self.scene, prompt, options):
                    said += piece
                    yield piece
            finally:
                self._remember(question, said)

        return pieces()

    def _prepare(self, question: str, options: Options) -> Prompt:
        kept = list(self.messages)
        while True:
            try:
                turns = question_turns(kept, question)
                prompt = self.engine.prepare(self.scene, turns, self.regions, options.max_new_tokens)
                break
            except TooLong:
                if not kept:
                    raise
                del kept[:2]
        forgotten = (len(self.messages) - len(kept)) // 2
        self.messages = kept
        # A region not spoken of yet may be in the next turn, so nothing is said about it here.
        self.warnings = (f"the model's context is full; forgot the oldest turns: {forgotten}",) if forgotten else ()
        return replace(prompt, warnings=self.warnings)

    def _remember(self, question: str, answer: str) -> None:
        if answer.strip():  # silence is not a turn that a template could write
            self.messages = [*question_turns(self.messages, question), {"role": "assistant", "content": answer.strip()}]

"""Text from tokens as they come: in pieces that never have to be taken back, and up to a stop string."""

import re
from collections.abc import Sequence
from typing import Any

_BOUNDARY = re.compile(r"[\s\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]")
"""After a blank, or a character of a language that writes none, a piece may end."""
_UNFINISHED = "\ufffd"


class TextReader:
    """The text of one answer.

    Attributes:
        text: what the tokens so far spell, up to the first stop string.
        stopped: whether there was one.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from = self._read = self._given = 0

    def push(self, token: int) -> None:
        """Read one more token."""
        self._ids.append(token)
        self._advance(final=False)

    def finish(self) -> None:
        """No token will come: characters left unfinished are written as they are."""
        self._advance(final=True)

    def take(self, final: bool = False) -> str:
        """What is new since the last call, up to the last word that is surely whole; all of it at the end."""
        end = len(self.text)
        if not (final or self.stopped):
            end = max((match.end() for match in _BOUNDARY.finditer(self.text, self._given)), default=self._given)
            end = max(self._given, min(end, len(self.text) - self._pending()))
        piece, self._given = self.text[self._given : end], max(self._given, end)
        return piece

    def _advance(self, final: bool) -> None:
        if self.stopped:
            return
        # Some tokenizers write a token's blank only behind another token, so the last few are read again with it.
        before = self._decode(self._from, self._read)
        after = self._decode(self._from, len(self._ids))
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not final):
            return
        known = len(self.text)
        self.text += after[len(before) :]
        self._from, self._read = self._read, len(self._ids)
        reach = max(map(len, self._stop), default=0)
        found = [place for stop in self._stop if (place := self.text.find(stop, max(0, known - reach))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text

    def _pending(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0

"""Reads the arrays of json files that are larger than memory, element by element.

The elements are decoded by the standard library, which is as fast as the streaming parsers and, unlike them, reads the
``NaN`` and ``Infinity`` that Python and NumPy write: one such number costs its own record and not the rest of the file.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from regiongpt.console import progress
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError
from regiongpt.storage import reason

TRUNCATED: Final = "truncated json"
"""The kind of fault of a file that breaks off."""
BLOCK: Final = 1 << 20
"""Bytes read at a time; memory stays at a few blocks, or at a few times the largest element."""
_LONGEST_WORD = 16  # characters of the longest word of json, '-Infinity', or escape, with some to spare
_SPACE = " \t\n\r"


def iter_array(path: Path, key: str | None, rejects: Rejects) -> Iterator[Any]:
    """The elements of one array of a json file, each decoded when it is asked for.

    A file that breaks off, or goes wrong, inside the array yields the whole elements before the break, which is then
    counted as ``truncated json``.

    Args:
        path: Of the file.
        key: Of the array in the top-level object; None where the file is itself an array.
        rejects: Where the break is noted.

    Raises:
        DataError: The file cannot be read, is not json, or has no such array.
    """
    for _, element in iter_arrays(path, None if key is None else (key,), rejects):
        yield element


def iter_arrays(path: Path, keys: Sequence[str] | None, rejects: Rejects) -> Iterator[tuple[str, Any]]:
    """The elements of several top-level arrays of a json file in one pass, in the order of the file.

    Args:
        path: Of the file.
        keys: Of the arrays; None where the file is itself an array.
        rejects: Where a break is noted, as :func:`iter_array` does.

    Yields:
        The key of an array (``""`` for None) and one of its elements. An array that lies behind a break yields nothing,
        as long as another of the arrays came before the break.

    Raises:
        DataError: The file cannot be read, is not json, or has none of the arrays; or it is whole and lacks one.
    """
    found: set[str] = set()
    with _Text(Path(path)) as text:
        try:
            opening = text.peek()
            if opening != ("[" if keys is None else "{"):
                expected = "an array" if keys is None else f"an object with {_listed(keys)}"
                got = {"": text.end, "[": "an array", "{": "an object"}.get(opening, repr(opening))
                raise DataError(f"{path}: expected json that is {expected}, got {got}; give the right file")
            for key in ("",) if keys is None else _keys(text):
                wanted = keys is None or key in keys
                if text.peek() != "[":
                    text.value()
                    continue
                if wanted:
                    found.add(key)
                for element in _elements(text):
                    if wanted:
                        yield key, element
            if extra := text.peek():
                raise _BreakError(f"expected the end of the file, got {extra!r}", text.position)
        except _BreakError as error:
            if not found:
                raise DataError(
                    f"{path}: expected json with {_listed(keys)}, but it breaks before: {error}; fetch the file again"
                ) from None
            rejects.add(TRUNCATED, path, text.place, f"{error}; all before it is kept; fetch the file again")
            return
    if lacking := [key for key in keys or () if key not in found]:
        raise DataError(f"{path}: expected json with {_listed(keys)}, found no {_listed(lacking)[3:]}")


class _BreakError(Exception):
    """The text stops being json at a character of the file."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message}, at character {position}")


class _Text:
    """A json file as text that is decoded value by value, of which a few blocks are held."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb")
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: not a readable json file: {reason(error)}; check the path") from None
        self._path = path
        self._blocks = iter(progress(iter(partial(self._file.read, BLOCK), b""), path.name, "MB", size // BLOCK + 1))
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self.key, self.number = "", 0  # of the element that comes next
        self.end = "the end of the file"
        self._held = ""
        self._at = 0  # of the next character, in what is held
        self._before = 0  # characters of the file before what is held
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        """Characters of the file before the next one."""
        return self._before + self._at

    @property
    def place(self) -> str:
        """Of the element that comes next: ``annotations[17]``."""
        return f"{self.key}[{self.number}]"

    def peek(self) -> str:
        """The next character that is not blank, ``""`` at the end."""
        while True:
            while self._at < len(self._held):
                character = self._held[self._at]
                if character not in _SPACE:
                    return character
                self._at += 1
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Moves past the next character that is not blank, which must be one of ``expected``."""
        character = self.peek()
        if not character or character not in expected:
            got = repr(character) if character else self.end
            raise _BreakError(f"expected {' or '.join(map(repr, expected))}, got {got}", self.position)
        self._at += 1
        return character

    def value(self) -> Any:
        """Moves past one whole value and returns it."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                # What a longer text could mend is wrong at its end, or is a string that began anywhere.
                cut, place = error.msg.startswith("Unterminated"), self._before + error.pos
                got = repr(self._held[error.pos]) if error.pos < len(self._held) and not cut else ""
                if (cut or error.pos >= len(self._held) - _LONGEST_WORD) and self._more():
                    continue
                raise _BreakError(f"expected json, got {got or self.end} ({error.msg})", place) from None
            except RecursionError:
                raise _BreakError("expected json of fewer levels", self.position) from None
            except ValueError:  # a whole number of thousands of digits
                raise _BreakError("expected a number that can be read", self.position) from None
            # A number may go on in the next block, or would have in a whole file: 1 in 12, 1.5 and 1e+16.
            rest = self._held[end : end + 3]
            if isinstance(value, int | float) and rest in ("", ".", "e", "E", "e+", "e-", "E+", "E-"):
                if self._more():
                    continue
                raise _BreakError(f"expected a whole number, got {self.end}", self.position)
            self._at = end
            return value

    def _more(self) -> bool:
        """Reads on, at least as much as is held: a long value is then decoded a few times and not once a block."""
        if self._ended:
            return False
        rest = self._held[self._at :]
        try:
            data = next(self._blocks, b"")
            while 0 < len(data) < len(rest) and (more := next(self._blocks, b"")):
                data += more
            self._ended = not data
            text = self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode("utf-8")
            self._ended = True
            if error.end < len(error.object) or data:
                self.end = f"the byte 0x{error.object[error.start]:02x}, which is not UTF-8"
        except OSError as error:
            raise DataError(f"{self._path}: the file cannot be read to its end ({error.strerror})") from error
        self._before += self._at
        self._held, self._at = rest + text, 0
        return bool(text) or not self._ended


def _keys(text: _Text) -> Iterator[str]:
    """The keys of an object, with the text at the value of each; the caller moves past the value."""
    text.take("{")
    if text.peek() == "}":
        text.take("}")
        return
    while True:
        if text.peek() != '"':
            text.take('"')
        key = text.value()
        text.take(":")
        text.key, text.number = key, 0
        yield key
        if text.take(",}") == "}":
            return


def _elements(text: _Text) -> Iterator[Any]:
    """The elements of an array, with the text at the first; in the end it is past the array."""
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        element = text.value()
        text.number += 1
        yield element
        if text.take(",]") == "]":
            return


def _listed(keys: Sequence[str] | None) -> str:
    return f"an array {', '.join(map(repr, keys))}" if keys is not None else "an array"

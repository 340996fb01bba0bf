"""Source files, entry by entry: arrays of JSON larger than memory, JSON lines, and pickles of plain data."""

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from regiongpt.console import progress
from regiongpt.data.shards import Fault, Rejects, fault_of
from regiongpt.data.values import MALFORMED, unicode_text
from regiongpt.errors import DataError, RegionGPTError, short
from regiongpt.storage import reason

TRUNCATED: Final = "truncated json"
"""The kind of fault of a file that breaks off."""
BLOCK: Final = 1 << 20
"""Characters read at a time; memory stays at a few blocks, or at a few times the largest element."""
_LONGEST_WORD: Final = 16  # characters of the longest word of json, '-Infinity', or escape, with some to spare
_DECODE = json.JSONDecoder().raw_decode


def iter_array(path: Path, key: str | None, rejects: Rejects) -> Iterator[Any]:
    """The elements of one top-level array, or of the file itself where ``key`` is None; see :func:`iter_arrays`."""
    return (element for _, element in iter_arrays(path, None if key is None else (key,), rejects))


def iter_arrays(path: Path, keys: Sequence[str] | None, rejects: Rejects) -> Iterator[tuple[str, Any]]:
    """The elements of several top-level arrays of a JSON file, in one pass and in the order of the file.

    The standard library decodes each element: it is as fast as the streaming parsers and, unlike them, reads the
    ``NaN`` and ``Infinity`` that Python and NumPy write. Of a file that breaks off, or goes wrong, inside the arrays,
    what is whole before the break is yielded, and the break is a reject.

    Args:
        path: Of the file.
        keys: Of the arrays; None where the file is itself an array, whose key is ``""``.
        rejects: Where a break is noted.

    Raises:
        DataError: The file cannot be read, is not JSON, or has none of the arrays; or it is whole and lacks one.
    """
    wanted = "an array" if keys is None else f"an object with an array {', '.join(map(repr, keys))}"
    found: set[str] = set()
    place = ""
    try:
        # A byte that is not UTF-8 costs the text that it is in, and not the file.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            text = _Text(file, Path(path))
            if text.peek() != ("[" if keys is None else "{"):
                got = {"[": "an array", "{": "an object"}.get(text.peek(), text.next_shown)
                raise DataError(f"{path}: expected json that is {wanted}, got {got}; give the right file")
            for key in ("",) if keys is None else text.keys():
                if text.peek() != "[" or (keys is not None and key not in keys):
                    text.value()
                    continue
                found.add(key)
                place = f"{key}[0]"
                for number, element in enumerate(text.elements(), 1):
                    yield key, element
                    place = f"{key}[{number}]"
            if text.peek():
                raise text.error("expected the end of the file")
    except OSError as error:
        raise DataError(f"{path}: not a readable json file: {reason(error)}; check the path") from None
    except _BreakError as error:
        if not found:
            raise DataError(f"{path}: expected {wanted}, but it breaks before: {error}; fetch the file again") from None
        rejects.add(TRUNCATED, path, place, f"{error}; all before it is kept; fetch the file again")
        return
    if lacking := [key for key in keys or () if key not in found]:
        raise DataError(f"{path}: expected {wanted}, found no array {', '.join(map(repr, lacking))}")


class _BreakError(Exception):
    """The text stops being JSON at a character of the file."""


class _Text:
    """A JSON file as text that is decoded value by value, of which a few blocks are held."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.held, self.at, self.before = "", 0, 0  # the next character is held[at], with `before` before held
        # At least as much as is held: a long value is then decoded a few times and not once a block.
        blocks = iter(lambda: file.read(max(BLOCK, len(self.held) - self.at)), "")
        self.blocks = iter(progress(blocks, path.name, "MB", path.stat().st_size // BLOCK + 1))

    @property
    def next_shown(self) -> str:
        if self.at >= len(self.held):
            return "the end of the file"
        if self.held[self.at] == "\x1f":
            return "a gzip file, which must be unpacked first"
        byte = ord(self.held[self.at]) - 0xDC00
        return f"the byte 0x{byte:02x}, which is not UTF-8" if 0x80 <= byte <= 0xFF else repr(self.held[self.at])

    def error(self, message: str, at: int | None = None) -> _BreakError:
        self.at = self.at if at is None else at
        return _BreakError(f"{message}, got {self.next_shown} at character {self.before + self.at}")

    def peek(self) -> str:
        """The next character that is not blank, ``""`` at the end."""
        while True:
            while self.at < len(self.held):
                if self.held[self.at] not in " \t\n\r":
                    return self.held[self.at]
                self.at += 1
            if not self.more():
                return ""

    def take(self, expected: str) -> str:
        """Moves past the next character, which must be one of ``expected``."""
        character = self.peek()
        if not character or character not in expected:
            raise self.error(f"expected {' or '.join(map(repr, expected))}")
        self.at += 1
        return character

    def value(self) -> Any:
        """Moves past one whole value and returns it."""
        self.peek()
        while True:
            try:
                value, end = _DECODE(self.held, self.at)
            except json.JSONDecodeError as error:
                # What a longer text could mend is wrong at its end, or is a string that began anywhere.
                cut = error.msg.startswith("Unterminated")
                if (cut or error.pos >= len(self.held) - _LONGEST_WORD) and self.more():
                    continue
                raise self.error(f"expected json ({error.msg})", len(self.held) if cut else error.pos) from None
            except (RecursionError, ValueError) as error:  # a whole number of thousands of digits
                raise _BreakError(f"{reason(error)}, at character {self.before + self.at}") from None
            # A number may go on in the next block, or would have in a whole file: 1 in 12, 1.5 and 1e+16.
            if isinstance(value, int | float) and not self.held[end : end + _LONGEST_WORD].strip(".eE+-"):
                if self.more():
                    continue
                raise self.error("expected a whole number", len(self.held))
            self.at = end
            return value

    def more(self) -> bool:
        """Reads on; false at the end."""
        block = next(self.blocks, "")
        if block:
            self.before += self.at
            self.held, self.at = self.held[self.at :] + block, 0
        return bool(block)

    def keys(self) -> Iterator[str]:
        """The keys of an object, with the text at the value of each; the caller moves past the value."""
        self.take("{")
        while self.peek() != "}":
            if self.peek() != '"':
                self.take('"')
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return
        self.take("}")

    def elements(self) -> Iterator[Any]:
        """The elements of an array."""
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            if self.take(",]") == "]":
                return
        self.take("]")


@contextmanager
def noting_line(path: Path, number: int, rejects: Rejects) -> Iterator[None]:
    """Count a line that cannot be used, whatever is wrong with it, and go on behind it."""
    with rejects.noting(path, number):
        try:
            yield
        except RegionGPTError as error:
            raise Fault(fault_of(error).kind, f"{path.name}:{number}: {error}") from None


def iter_lines(path: Path, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines with the numbers of their lines; other lines are rejects, blank ones none.

    Raises:
        DataError: The file cannot be read, or has lines of which none is a json object.
    """
    found = number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(progress(file, path.name, "lines"), 1):
                if line.strip():
                    with noting_line(path, number, rejects):
                        entry = _decoded(line, number)
                        found += 1
                        yield number, entry
    except OSError as error:
        raise DataError(f"{path}: not a readable file of json lines: {reason(error)}; check the path") from None
    if number and not found:
        raise DataError(f"{path}: no line is a json object; give a file of json lines")


def _decoded(line: bytes, number: int) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        entry = json.loads(text)
        if "\\ud" in text.lower():
            unicode_text(json.dumps(entry, ensure_ascii=False))
    except UnicodeDecodeError as error:
        raise Fault("text that is not Unicode", f"expected UTF-8, got the byte 0x{line[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        # A line that is not ended is the last one, and was being written.
        kind = "line that is not json" if line.endswith(b"\n") else TRUNCATED
        raise Fault(kind, f"expected a json object: {reason(error)}") from None
    if not isinstance(entry, dict):
        raise Fault(MALFORMED, f"expected a json object, got {short(entry)}")
    return entry


_SETS = {"builtins": (set, frozenset), "__builtin__": (set, frozenset)}  # old protocols have no opcode for sets


def load_plain_pickle(path: Path) -> Any:
    """The content of a pickle of dicts, lists, tuples, sets, strings, bytes, numbers, booleans and None.

    A pickle is a program, and a download is a stranger's: whatever asks for an import is refused before it is looked
    up. Strings of Python 2 are read as Latin-1.

    Raises:
        DataError: The file cannot be read, is truncated or no pickle, or asks for anything but plain data.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"expected a pickle at {path}, got {error.strerror}; check the path") from None
    except Exception as error:  # bytes that are no pickle, or half of one, raise nearly every built-in exception
        raise DataError(f"{path}: not a whole pickle of plain data: {reason(error)}; fetch the file again") from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        for admitted in _SETS.get(module, ()):
            if name == admitted.__name__:
                return admitted
        raise DataError(
            f"not plain data: it asks for {ascii(module)[1:-1]}.{ascii(name)[1:-1]}, which reading it would import and "
            "could run; do not use this file, fetch the original"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise DataError("not plain data: it refers to objects outside of it; do not use it")

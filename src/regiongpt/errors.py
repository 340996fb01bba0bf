"""The errors a user of regiongpt can cause, by what needs fixing.

Each message is one line. The command line prints it and exits with code 2; libraries catch :class:`RegionGPTError`.
"""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class RegionGPTError(Exception):
    """Base of every error caused by user input rather than a bug; its message becomes one line."""

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__(" ".join(text.split()) if "\n" in text else text)


class RegionError(RegionGPTError):
    """A region, or a ``<regionN>`` placeholder that stands for one, is wrong."""


class ConfigError(RegionGPTError):
    """An option, or a combination of options, is wrong."""


class DataError(RegionGPTError):
    """An image, a record, a question or a data file is wrong."""


class CheckpointError(RegionGPTError):
    """A checkpoint folder lacks a file, or holds one that does not fit the others."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefix the message of such errors with a place."""
    try:
        yield
    except RegionGPTError as error:
        raise type(error)(f"{where}: {error}") from error


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: Any) -> str:
    """A value for a message: one line of at most 80 plain characters."""
    shown = " ".join(_SHORT.repr(value).encode("ascii", "backslashreplace").decode().split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."

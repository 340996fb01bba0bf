"""Reads pickles that hold plain data, and nothing else: a pickle is a program, and a download is a stranger's.

Data sets of the time of Python 2 were given out as pickles. One that holds lists, dicts, strings and numbers alone
needs no import to be read; whatever asks for one is refused before it is looked up.
"""

import pickle
from pathlib import Path
from typing import Any

from regiongpt.errors import DataError

_SETS = {"builtins": (set, frozenset), "__builtin__": (set, frozenset)}  # old protocols have no opcode for sets


def load_plain_pickle(path: Path) -> Any:
    """The content of a pickle of dicts, lists, tuples, sets, strings, bytes, numbers, booleans and None.

    Args:
        path: Of the file, of any protocol; strings of Python 2 are read as Latin-1.

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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: expected a whole pickle of plain data, got one that breaks ({reason})") from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        for admitted in _SETS.get(module, ()):
            if name == admitted.__name__:
                return admitted
        raise DataError(
            f"expected a pickle of plain data (lists, dicts, strings, numbers), got one that asks for "
            f"{ascii(module)[1:-1]}.{ascii(name)[1:-1]}, which reading it would import and could run; "
            "do not use this file, fetch the original"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise DataError("expected a pickle of plain data, got one that refers to objects outside of it; do not use it")

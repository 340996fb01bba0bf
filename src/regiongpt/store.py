"""Finished work by key, kept as it comes: a kill at any moment loses nothing that was added."""

import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from regiongpt.errors import DataError
from regiongpt.storage import reason, writing


class Store:
    """JSON values by key in a folder, which all processes of a run share.

    Each process adds to a SQLite file of its own and reads the files of all, so processes never wait for each other
    and may run on several machines.

    Args:
        folder: Made when the first value is added.
        writer: Number of this process, from 0.
    """

    def __init__(self, folder: str | Path, writer: int = 0) -> None:
        self.folder = Path(folder)
        self._file = self.folder / f"{writer:05d}.sqlite"
        self._open: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        """Open this process's file for adding; DataError where it cannot be written, or is damaged."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _one_line(self._file):
            self._open = _connect(self._file)
            self._open.execute("PRAGMA journal_mode=WAL")
            self._open.execute("PRAGMA synchronous=NORMAL")
            self._open.execute("CREATE TABLE IF NOT EXISTS done (key TEXT NOT NULL, value TEXT NOT NULL)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._open is not None
        self._open.close()
        self._open = None

    def add(self, values: Mapping[str, Any]) -> None:
        """Write values, all or none of them; a kill after it returns loses none. DataError on a full disk."""
        assert self._open is not None, "add() inside the store's with block"
        rows = [(key, json.dumps(value, allow_nan=False)) for key, value in values.items()]
        with _one_line(self._file), self._open as transaction:
            transaction.execute("BEGIN")
            transaction.executemany("INSERT INTO done VALUES (?, ?)", rows)

    def keys(self) -> set[str]:
        """The keys that any process has added; DataError where a file is damaged."""
        return {key for (key,) in self._rows("SELECT key FROM done")}

    def get(self, keys: Collection[str]) -> dict[str, Any]:
        """The values of those keys that any process has added; DataError where a file is damaged."""
        wanted = set(keys)
        found: dict[str, Any] = {}
        rows = (row for row in self._rows("SELECT key, value FROM done") if row[0] in wanted)
        with _one_line(self.folder):
            while some := list(islice(rows, 1000)):  # parsed together, which takes half the time
                names, texts = zip(*some, strict=True)
                found.update(zip(names, json.loads(f"[{','.join(texts)}]"), strict=True))
        return found

    def _rows(self, query: str) -> Iterator[tuple[str, ...]]:
        for path in sorted(self.folder.glob("*.sqlite")):
            with _one_line(path), closing(_connect(path)) as connection:
                if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'done'").fetchone():
                    yield from connection.execute(query)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=60, isolation_level=None)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError) as error:
        if isinstance(error, sqlite3.OperationalError) and "UTF-8" not in str(error):
            told = "cannot be read or written: {}; free some space or check its permissions"
        else:
            told = "damaged: {}; delete it, and its part is done again"
        raise DataError(f"{path}: {told.format(reason(error))}") from None

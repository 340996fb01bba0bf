"""Finished captions by key in one SQLite file, which only grows: a kill at any moment loses nothing that was added."""

import itertools
import json
import os
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from regiongpt.errors import ConfigError, DataError
from regiongpt.storage import locked, reason

FILE: Final = "captions.sqlite"
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS run (value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS images (path TEXT NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
                                   digest BLOB NOT NULL, PRIMARY KEY (path, size, mtime)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS done (key BLOB NOT NULL UNIQUE, value TEXT NOT NULL, cost REAL NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS failed (key BLOB NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL, cost REAL NOT NULL,
                                   at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS failures ON failed (key);
"""
_AT_ONCE: Final = 500  # keys in one query


def key_of(*parts: Any) -> bytes:
    """16 bytes that stand for plain JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class Failure(NamedTuple):
    """Why a key has no value: how often it was tried, and how the last try went."""

    tries: int
    kind: str
    reason: str


class Store:
    """What a run has finished; one process writes, any number read meanwhile.

    Args:
        folder: Of the run; made if missing.
        read_only: Only look; the folder may be in use.

    Raises:
        ConfigError: Another process writes here, or with ``read_only`` there is nothing to read.
        DataError: The file is damaged, or the folder cannot be written.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self.folder, self.path = folder, folder / FILE
        self._stack = ExitStack()
        if read_only and not self.path.is_file():
            raise ConfigError(f"{folder}: holds no captions, there is no {FILE} in it; check the path")
        if not read_only:
            self._stack.enter_context(locked(folder))
        try:
            with self._one_line():
                # Each statement is its own transaction: what is added is out of this process's hands.
                self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
                self._stack.callback(self._db.close)
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA cache_size=-32000")
                if not read_only:
                    self._db.execute("PRAGMA journal_mode=WAL")
                    self._db.executescript(_TABLES)
                self.count()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self, fingerprint: Mapping[str, Any], described: Mapping[str, Any]) -> None:
        """Note what run this is, or make sure that it is the one begun here.

        Args:
            fingerprint: What decides the captions, by name; other values are refused later.
            described: What else is worth noting; the latest counts.

        Raises:
            ConfigError: The folder holds another run; the message says what differs.
        """
        noted = self.described()
        if noted:
            there = noted["fingerprint"]
            differs = [
                f"{name} is {_short(there.get(name))} there and {_short(fingerprint.get(name))} now"
                for name in {**there, **fingerprint}
                if there.get(name) != fingerprint.get(name)
            ]
            if differs:
                raise ConfigError(f"{self.folder}: holds another run: {'; '.join(differs)}; give another --out")
        value = json.dumps({"fingerprint": fingerprint, **described}, ensure_ascii=False)
        if json.loads(value) != noted:
            self._write("INSERT INTO run VALUES (?)", (value,))

    def described(self) -> dict[str, Any]:
        """What :meth:`begin` noted last; empty in a new folder."""
        rows = self._read("SELECT value FROM run ORDER BY rowid DESC LIMIT 1")
        return dict(json.loads(rows[0][0])) if rows else {}

    def add(self, key: bytes, value: Mapping[str, Any], cost: float = 0.0) -> None:
        """Keep finished work.

        Raises:
            DataError: It cannot be written, such as to a full disk.
        """
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        self._write("INSERT OR IGNORE INTO done VALUES (?, ?, ?, ?)", (key, text, cost, time.time()))

    def fail(self, key: bytes, kind: str, why: str, cost: float = 0.0) -> None:
        """Keep a try that did not give a value; as :meth:`add`."""
        self._write("INSERT INTO failed VALUES (?, ?, ?, ?, ?)", (key, kind, why[:500], cost, time.time()))

    def get(self, keys: Collection[bytes]) -> dict[bytes, dict[str, Any]]:
        """The values of those keys that have one."""
        found: dict[bytes, dict[str, Any]] = {}
        for some in _parts(list(keys)):
            query = f"SELECT key, value, cost, at FROM done WHERE key IN ({_marks(some)})"
            for key, value, cost, at in self._read(query, some):
                found[key] = {**json.loads(value), "cost": cost, "at": at}
        return found

    def finished(self, keys: Collection[bytes]) -> set[bytes]:
        """Those keys that have a value."""
        found: set[bytes] = set()
        for some in _parts(list(keys)):
            found.update(key for (key,) in self._read(f"SELECT key FROM done WHERE key IN ({_marks(some)})", some))
        return found

    def failures(self, keys: Collection[bytes]) -> dict[bytes, Failure]:
        """The keys that were tried in vain, and have no value yet or had a failure before."""
        found: dict[bytes, Failure] = {}
        for some in _parts(list(keys)):
            query = (
                f"SELECT key, count(*), kind, reason, max(rowid) FROM failed WHERE key IN ({_marks(some)}) GROUP BY key"
            )
            found.update((key, Failure(tries, kind, why)) for key, tries, kind, why, _ in self._read(query, some))
        return found

    def image_digest(self, path: Path, name: str) -> str:
        """SHA-256 of an image's bytes, read again only where its size or time of change is another.

        Raises:
            OSError: It cannot be read.
        """
        status = os.stat(path)
        named = (name, status.st_size, status.st_mtime_ns)
        rows = self._read("SELECT digest FROM images WHERE path = ? AND size = ? AND mtime = ?", named)
        if rows:
            return bytes(rows[0][0]).hex()
        digest = sha256(path.read_bytes()).digest()
        self._write("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)", (*named, digest))
        return digest.hex()

    def count(self) -> int:
        """How many keys have a value."""
        return int(self._read("SELECT count(*) FROM done")[0][0])

    def cost(self) -> float:
        """What all tries cost, those in vain included."""
        return sum(float(self._read(f"SELECT total(cost) FROM {table}")[0][0]) for table in ("done", "failed"))

    def busy_seconds(self) -> float:
        """How long work was being finished, over all runs: gaps of more than a minute do not count."""
        times = self._read("SELECT at FROM done ORDER BY rowid")
        gaps = (float(b - a) for (a,), (b,) in itertools.pairwise(times))
        return sum(gap for gap in gaps if 0 < gap < 60)

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._one_line():
            return self._db.execute(query, values).fetchall()

    def _write(self, query: str, values: Sequence[Any]) -> None:
        with self._one_line():
            self._db.execute(query, values)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            if isinstance(error, sqlite3.OperationalError):
                raise DataError(
                    f"{self.path}: cannot be read or written: {reason(error)}; free some space or check its "
                    "permissions, and run the command again: what is finished is kept"
                ) from None
            raise DataError(f"{self.path}: damaged: {reason(error)}; choose another --out") from None


def _parts(keys: list[bytes]) -> Iterator[list[bytes]]:
    return (keys[start : start + _AT_ONCE] for start in range(0, len(keys), _AT_ONCE))


def _marks(keys: Sequence[bytes]) -> str:
    return ",".join("?" * len(keys))


def _short(value: Any) -> str:
    return "not given" if value is None else f"{value!r:.60}"

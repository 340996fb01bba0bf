"""Finished captions by key in one SQLite file, which only grows: a kill at any moment loses nothing that was added."""

import json
import os
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from regiongpt.errors import ConfigError, DataError
from regiongpt.storage import digest, locked, reason

_FILE: Final = "captions.sqlite"
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS run (value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS images (path TEXT NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
                                   digest BLOB NOT NULL, PRIMARY KEY (path, size, mtime)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS done (key BLOB NOT NULL UNIQUE, value TEXT NOT NULL, cost REAL NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS failed (key BLOB NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL, cost REAL NOT NULL,
                                   at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS failures ON failed (key);
"""


def key_of(*parts: Any) -> bytes:
    """16 bytes that stand for plain JSON values."""
    return bytes.fromhex(digest(*parts))


class Failure(NamedTuple):
    """Why a key has no value: how often it was tried, and how the last try went."""

    tries: int
    kind: str
    reason: str


class Store:
    """What a run has finished; one process writes, any number read (``read_only``) meanwhile.

    Raises:
        ConfigError: Another process writes here, or with ``read_only`` there is nothing to read.
        DataError: The file is damaged, or the folder cannot be written.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self.folder, self.path = folder, folder / _FILE
        if read_only and not self.path.is_file():
            raise ConfigError(f"{folder}: holds no captions, there is no {_FILE} in it; check the path")
        with ExitStack() as stack:
            if not read_only:
                stack.enter_context(locked(folder))
            with self._one_line():
                # Each statement is its own transaction: what is added is out of this process's hands.
                self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
                stack.callback(self._db.close)
                if not read_only:
                    self._db.executescript(f"PRAGMA journal_mode=WAL; {_TABLES}")
                self._db.executescript("PRAGMA synchronous=NORMAL; PRAGMA cache_size=-8000")
                if not self.described() and read_only:
                    raise ConfigError(f"{folder}: no run was begun there; check the path")
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def begin(self, fingerprint: Mapping[str, Any], described: Mapping[str, Any]) -> None:
        """Note what decides the captions, and what else describes the run; the latest description counts.

        Raises:
            ConfigError: The folder holds a run with another fingerprint; the message says what differs.
        """
        noted = self.described()
        there = noted.get("fingerprint", fingerprint)
        differs = [
            f"{name} is {there.get(name)!r:.60} there and {fingerprint.get(name)!r:.60} now"
            for name in {**there, **fingerprint}
            if there.get(name) != fingerprint.get(name)
        ]
        if differs:
            raise ConfigError(f"{self.folder}: holds another run: {'; '.join(differs)}; give another --out")
        value = json.dumps({"fingerprint": fingerprint, **described}, ensure_ascii=False)
        if json.loads(value) != noted:
            self._do("INSERT INTO run VALUES (?)", (value,))

    def described(self) -> dict[str, Any]:
        """What :meth:`begin` noted last; empty in a new folder."""
        rows = self._do("SELECT value FROM run ORDER BY rowid DESC LIMIT 1")
        return dict(json.loads(rows[0][0])) if rows else {}

    def add(self, key: bytes, value: Mapping[str, Any], cost: float = 0.0) -> None:
        """Keep finished work; DataError where it cannot be written, such as to a full disk."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        self._do("INSERT OR IGNORE INTO done VALUES (?, ?, ?, ?)", (key, text, cost, time.time()))

    def fail(self, key: bytes, kind: str, why: str, cost: float = 0.0) -> None:
        """Keep a try that did not give a value; as :meth:`add`."""
        self._do("INSERT INTO failed VALUES (?, ?, ?, ?, ?)", (key, kind, why, cost, time.time()))

    def get(self, keys: Collection[bytes]) -> dict[bytes, dict[str, Any]]:
        """The values of those keys that have one."""
        rows = self._of(keys, "SELECT key, value, cost, at FROM done WHERE key IN ({})")
        return {key: {**json.loads(value), "cost": cost, "at": at} for key, value, cost, at in rows}

    def has(self, keys: Collection[bytes]) -> bool:
        """Whether all keys have a value."""
        return len([*self._of(keys, "SELECT key FROM done WHERE key IN ({})")]) == len(keys)

    def failures(self, keys: Collection[bytes]) -> dict[bytes, Failure]:
        """The keys that were tried in vain, whether or not they have a value now."""
        query = "SELECT key, count(*), kind, reason, max(rowid) FROM failed WHERE key IN ({}) GROUP BY key"
        return {key: Failure(tries, kind, why) for key, tries, kind, why, _ in self._of(keys, query)}

    def image_digest(self, path: Path, name: str) -> str:
        """SHA-256 of an image's bytes, read only where its size or time of change is new; OSError if it cannot be."""
        status = os.stat(path)
        named = (name, status.st_size, status.st_mtime_ns)
        if rows := self._do("SELECT digest FROM images WHERE path = ? AND size = ? AND mtime = ?", named):
            return bytes(rows[0][0]).hex()
        found = sha256(path.read_bytes()).digest()
        self._do("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)", (*named, found))
        return found.hex()

    def count(self) -> int:
        """How many keys have a value."""
        return int(self._do("SELECT count(*) FROM done")[0][0])

    def cost(self) -> float:
        """What all tries cost, those in vain included."""
        return sum(float(self._do(f"SELECT total(cost) FROM {table}")[0][0]) for table in ("done", "failed"))

    def busy_seconds(self) -> float:
        """How long work was being finished, over all runs: gaps of more than a minute do not count."""
        gaps = "SELECT at - lag(at) OVER (ORDER BY rowid) AS gap FROM done"
        return float(self._do(f"SELECT total(gap) FROM ({gaps}) WHERE gap > 0 AND gap < 60")[0][0])

    def _of(self, keys: Collection[bytes], query: str) -> Iterator[Any]:
        listed = list(keys)
        for start in range(0, len(listed), 500):
            some = listed[start : start + 500]
            yield from self._do(query.format(",".join("?" * len(some))), some)

    def _do(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._one_line():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            if isinstance(error, sqlite3.OperationalError):
                told = f"{reason(error)}; free space or check its permissions, and go on: what is finished is kept"
                raise DataError(f"{self.path}: cannot be read or written: {told}") from None
            raise DataError(f"{self.path}: damaged: {reason(error)}; choose another --out") from None

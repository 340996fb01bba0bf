"""Files: written whole or not at all, read with one-line errors, hashed, locked; and finished work by key."""

import hashlib
import json
import math
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionGPTError


def write_file(path: str | Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file so that a kill or a full disk leaves the old one or none, never a part; DataError if it fails.

    The content is text (UTF-8), bytes, or a function that writes the file whose path it is given.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.is_dir():
        raise DataError(f"{path}: a folder; give the path of a file")
    # A device or a pipe is written to, not replaced. The suffix stays last, for writers that choose the format by it.
    special = path.exists() and not path.is_file()
    beside = path if special else path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with writing(path):
            if callable(content):
                content(beside)
            else:
                beside.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
            if not special:
                os.replace(beside, path)
    finally:
        if not special:
            beside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write plain values as JSON, atomically. NaN and infinity are a ValueError: no reader but Python's takes them."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    # A path that is no UTF-8 keeps its bytes as escapes.
    write_file(path, text.encode("utf-8", "backslashreplace"))


def finite(value: Any) -> Any:
    """A plain value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def read_json(path: str | Path, kind: type[RegionGPTError] = DataError) -> Any:
    """Read a JSON file, with or without a byte order mark; raises ``kind`` where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{path}: not a readable JSON file: {reason(error)}") from None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failed write inside the block into a DataError of one line."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers report a failed write by exceptions of their own.
        if isinstance(error, RegionGPTError) or not (isinstance(error, OSError) or "(os error" in str(error)):
            raise
        told = f"{path}: cannot be written: {reason(error)}; free some space or choose another place"
        raise DataError(told) from None


def check_writable(path: str | Path) -> None:
    """Raise ConfigError unless a file can be written, before there is anything to write."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir():
        raise ConfigError(f"{path}: a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        told = "no folder" if not folder.is_dir() else f"not writable ({reason(error)})"
        raise ConfigError(f"{path}: {told}: {folder}; create it or choose another place") from None


def check_checkpoint(folder: str | Path) -> None:
    """Raise CheckpointError for a folder that lacks a file of a checkpoint, without torch."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no checkpoint folder at this path")
    if (folder / "region_extractor").is_dir():
        how = f"regiongpt weights import spatialrgpt {folder} --out DIR"
        raise CheckpointError(f"{folder}: a SpatialRGPT checkpoint, which has to be imported first: {how}")
    weight_files(folder, "config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


def weight_files(folder: Path, *others: str) -> list[Path]:
    """The files of weights that a folder's index names; CheckpointError if one, or one of the others, is missing."""
    index, weights = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        try:
            weights = {str(name) for name in read_json(index, CheckpointError)["weight_map"].values()}
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index}: not an index of weights; copy the whole folder again") from None
    if missing := [name for name in (*others, *sorted(weights)) if not (folder / name).is_file()]:
        raise CheckpointError(f"the checkpoint {folder} lacks {', '.join(missing)}; copy the whole folder again")
    return [folder / name for name in sorted(weights)]


def check_new(folder: str | Path | None) -> None:
    """Raise ConfigError for a folder to write that has something in it, or cannot be there."""
    if folder is not None and Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ConfigError(f"{folder}: expected a new or empty folder; choose another")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill, which becomes ``path`` when the block ends and is deleted when it fails."""
    path = Path(path)
    beside = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        with writing(path):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            if path.is_dir():
                path.rmdir()  # an empty folder may have been there
            beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_below(name: str) -> bool:
    """Whether a relative path stays in its folder and uses ``/``."""
    return not re.search(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\\\0]", name)


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    return not re.search("[\ud800-\udfff]", text)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of plain JSON values; the same values give the same digits on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@contextmanager
def locked(folder: str | Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, made if it is missing, for this process; the lock ends with the block or the process.

    Where another process holds it, ``wait`` for that, or raise ConfigError with its name.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:  # Windows
            pass
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"{folder}: {holder} is writing there; wait or choose another folder") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def reason(error: BaseException) -> str:
    """An exception's message on one line, without the path."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


# -- finished work by key ----------------------------------------------------------------------------------------------


def weights_digest(folder: Path) -> str:
    """What tells a model's weights from others'."""
    return digest({path.name: sha256(path) for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]})


class Store:
    """Finished work: JSON values by key in a folder, kept as they come; a kill at any moment loses nothing added.

    Each process (``writer``, from 0) adds to a SQLite file of its own and reads the files of all, so processes never
    wait for each other and may run on several machines.
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
            self._open.execute("CREATE INDEX IF NOT EXISTS by_key ON done (key)")
        return self

    def __exit__(self, *_: object) -> None:
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
        wanted = sorted(set(keys))
        found: dict[str, Any] = {}
        for start in range(0, len(wanted), 500):
            some = wanted[start : start + 500]
            query = f"SELECT key, value FROM done WHERE key IN ({','.join('?' * len(some))}) ORDER BY rowid"
            with _one_line(self.folder):
                found |= {key: json.loads(value) for key, value in self._rows(query, some)}
        return found

    def total(self, field: str) -> float:
        """The sum of a field over all values ever added, including replaced ones."""
        query = f"SELECT total(json_extract(value, '$.{field}')) FROM done"
        return sum(float(number) for (number,) in self._rows(query))

    def _rows(self, query: str, values: Sequence[str] = ()) -> Iterator[tuple[Any, ...]]:
        for path in sorted(self.folder.glob("*.sqlite")):
            own = self._open if path == self._file else None
            with _one_line(path), nullcontext(own) if own else closing(_connect(path)) as connection:
                if own or connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'done'").fetchone():
                    yield from connection.execute(query, values)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=60, isolation_level=None)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError) as error:
        busy = isinstance(error, sqlite3.OperationalError) and "UTF-8" not in str(error)
        told = "free some space or check its permissions" if busy else "damaged; delete it to redo its part"
        raise DataError(f"{path}: {reason(error)}; {told}") from None

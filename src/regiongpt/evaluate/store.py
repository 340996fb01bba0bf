"""Answers as they come, kept in files that are only ever appended to: a kill loses none that was written.

An answer is kept under a key of all that decides it: the image's bytes, the question with its regions, the checkpoint
and the code that answers. So a run takes up where it was stopped, and an answer that could have come out otherwise is
asked for again.
"""

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from regiongpt.errors import DataError

FOLDER: Final = "answers"


def digest(*parts: Any) -> str:
    """32 hexadecimal digits of plain json values; the same values give the same digits on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class AnswerStore:
    """The answers of a run, by key.

    Every process of a run reads all files and writes one of its own, ``answers/00000.jsonl`` for the first. A line is
    ``{"key": ..., "answer": {...}}``. What a kill or a full disk left of a line is passed over, counted in
    :attr:`damaged` and written anew.

    Args:
        folder: Of the run.
        rank: Of this process, from 0.

    Raises:
        DataError: The folder cannot be read or written, or another run is writing there.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = Path(folder) / FOLDER
        self.path = self.folder / f"{rank:05d}.jsonl"
        self.damaged = 0
        self._found: dict[str, dict[str, Any]] = {}
        self._file: FileIO | None = None
        self.read()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._found[key]

    def read(self) -> None:
        """Reads all files, those that other processes have written since included.

        Raises:
            DataError: A file cannot be read.
        """
        self.damaged = 0
        self._found.clear()
        try:
            for path in sorted(self.folder.glob("*.jsonl")):
                self._found.update(self._lines(path))
        except OSError as error:
            raise DataError(f"{self.folder}: expected answers that can be read, got {error.strerror}") from None

    def _lines(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        # By bytes: half a letter of a torn line would end the reading of the whole file.
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else {}
                    yield str(row["key"]), dict(row["answer"])
                except (ValueError, TypeError, KeyError):
                    self.damaged += 1

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: whatever add() has written is out of this process's hands.
            self._file = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if not _locked(self._file):
            self._file.close()
            self._file = None
            raise DataError(f"{self.path}: another run is writing there; wait for its end, or give another --out")
        _cut_torn_line(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def damaged_report(self) -> str:
        """One line on what was passed over; empty where nothing was."""
        if not self.damaged:
            return ""
        return f"{self.folder}: lines cut short or damaged: {self.damaged}; their questions are asked again"

    def add(self, answers: Mapping[str, dict[str, Any]]) -> None:
        """Writes answers and hands them to the operating system before it returns.

        Args:
            answers: By key; plain json values.

        Raises:
            DataError: They cannot be written, the disk being full for instance. None of them is then counted as kept.
        """
        if self._file is None:
            raise RuntimeError("answers are added to a store that is open for writing, inside its with block")
        lines = [json.dumps({"key": key, "answer": each}, ensure_ascii=False) + "\n" for key, each in answers.items()]
        data = memoryview("".join(lines).encode("utf-8", "surrogatepass"))
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self._found.update(answers)


def _cut_torn_line(file: FileIO) -> None:
    """Takes away what a kill left of a last line, onto which the next one would be written."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            file.truncate(start + place + 1)
            return
        end = start
    file.truncate(0)


def _locked(file: FileIO) -> bool:
    """Takes the file for this process until it is closed; False where another has it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: expected room and the right to write answers there, got {error.strerror or error}; free some space "
        "or give another --out, then run the same command again"
    )

"""The log of a stage, a line of JSON a step: a run that goes on after a kill has each step once."""

import errno
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regiongpt.errors import ConfigError, DataError

log = logging.getLogger(__name__)

LOG, DEV, ANSWERS, EVENTS = "log.jsonl", "dev.jsonl", "answers.jsonl", "tensorboard"
"""Files of a stage's folder: every step, measurements on dev data, answers on fixed regions; and TensorBoard's."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that a kill has cut short.

    Args:
        path: Of the log; one that is not there has no lines.

    Raises:
        DataError: It cannot be read, or a line before the last is not what was written.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: expected a log that can be read, got {error.strerror}") from None
    found = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip("\0 \r"):
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError("no step")
        except ValueError:
            if number == len(lines):  # no line break behind it
                break
            raise DataError(
                f"{path}, line {number}: expected a line of JSON with its step, got {line[:60]!r}; mend or delete it"
            ) from None
        found.append(values)
    return found


class StepLog:
    """A file of JSON lines, each of a step.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._told = False

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Takes out what lies beyond a step, which will be done again, and a torn last line.

        Args:
            step: That the run goes on from; 0 for a new one.

        Returns:
            The lines that are left.
        """
        lines = read_lines(self.path)
        kept = [line for line in lines if line["step"] <= step]
        text = "".join(map(_line, kept))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            beside = self.path.with_name(self.path.name + ".tmp")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.path)
        return kept

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines, all or none; what a full disk does not take is told once and written with the next ones."""
        self._waiting += map(_line, lines)
        if not self._waiting:
            return
        data = "".join(self._waiting).encode()
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            if not self._told:
                log.warning("%s: cannot be written at the moment, and is tried again: %s", self.path, error.strerror)
            self._told = True
            return
        self._waiting, self._told = [], False


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(_plain(values), ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Numbers that JSON has no word for as strings: every reader of JSON takes the line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def open_events(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's files, which hides what an interrupted run has written beyond a step.

    Args:
        folder: Of the stage.
        step: That the run goes on from.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / EVENTS), purge_step=step + 1)


def require_tensorboard() -> None:
    """Raises ConfigError where TensorBoard is asked for and not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "watch.tensorboard: expected TensorBoard to be installed; `pip install 'regiongpt[train]'`, or leave it "
            "out: log.jsonl holds the same figures"
        )

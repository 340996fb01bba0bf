"""What every benchmark records beside its results: code, machine, packages, date, arguments and file hashes."""

import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regiongpt.environment import machine, versions
from regiongpt.storage import sha256


def stamp(arguments: Mapping[str, Any], files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Say where figures come from.

    Args:
        arguments: parsed arguments of the command.
        files: name -> file or folder that the figures depend on; None is left out.

    Returns:
        ``commit``, ``date`` (UTC), ``command``, ``arguments``, ``machine``, ``packages`` and ``files``: for each name
        its SHA-256, for a folder one for each file in it.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": Path(sys.argv[0]).name,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "machine": _machine(),
        "packages": {"python": platform.python_version(), **versions()},
        "files": {name: _hashes(path) for name, path in files.items() if path is not None},
    }


class Progress:
    """Counts work done, with its rate and the time left: one line that is rewritten on a terminal, plain lines else.

    Args:
        name: name of the task.
        total: number of pieces.
        unit: what a piece is called.
    """

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.started, self.shown = 0, time.monotonic(), 0.0

    def add(self, pieces: int = 1) -> None:
        """Report finished pieces; the last one always shows."""
        self.done += pieces
        now, live = time.monotonic(), sys.stderr.isatty()
        if self.done < self.total and now - self.shown < (0.2 if live else 10.0):
            return
        self.shown = now
        rate = self.done / max(now - self.started, 1e-9)
        line = f"{self.name}: {self.done} of {self.total} {self.unit}, {rate:.1f} a second"
        if self.done < self.total:
            line += f", {(self.total - self.done) / rate:.0f} s left"
        else:
            line += f", {self.seconds:.0f} s"
        end = "" if live and self.done < self.total else "\n"
        print(f"\r{line}\x1b[K" if live else line, end=end, file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Wall time since the beginning."""
        return time.monotonic() - self.started


def _commit() -> dict[str, Any] | None:
    """The checkout this runs from, and whether its sources differ from that commit; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "src", "benchmarks")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"hash": head, "changed": changed.split("\n") if changed else []}


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.rstrip()


def _machine() -> dict[str, Any]:
    import torch

    return {**machine(), "torch_threads": torch.get_num_threads()}


def _hashes(path: Path) -> str | dict[str, str]:
    if path.is_dir():
        return {each.name: sha256(each) for each in sorted(path.iterdir()) if each.is_file()}
    return sha256(path)

"""What every measurement here records beside its figures: code, machine, packages, date, arguments and file hashes."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "regiongpt", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "shapely",
    "efficientnet-lite-pytorch",
)  # fmt: skip


def stamp(arguments: Mapping[str, Any], files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Say where figures come from.

    Args:
        arguments: of the command, as parsed.
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
        "packages": {"python": platform.python_version(), **_versions()},
        "files": {name: _hashes(path) for name, path in files.items() if path is not None},
    }


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """Write a result whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


class Progress:
    """Counts work done, with its rate and the time left: one line that is rewritten on a terminal, plain lines else.

    Args:
        name: of the work.
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

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": usable,
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    """The processor's own name; platform knows it on few systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _hashes(path: Path) -> str | dict[str, str]:
    if path.is_dir():
        return {each.name: _sha256(each) for each in sorted(path.iterdir()) if each.is_file()}
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

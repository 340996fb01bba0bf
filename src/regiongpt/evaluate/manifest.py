"""Where figures come from: code, packages, machine, checkpoint, files and settings, hashed where they can be."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import regiongpt
from regiongpt.data.shards import file_identity
from regiongpt.errors import CheckpointError, DataError
from regiongpt.evaluate.store import digest

PACKAGES: Final = (
    "regiongpt", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy", "pillow", "pycocotools",
    "shapely",
)  # fmt: skip
"""Whose versions are noted."""

ANSWERING: Final = ("inference", "model", "prompts.py", "regions.py", "coverage.py", "images.py")
"""The part of this package that turns an image and a question into an answer."""


def manifest(settings: Mapping[str, Any], inputs: Sequence[Path], model: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is noted beside the figures of a task.

    Args:
        settings: Of the task: plain json values.
        inputs: Files that the figures depend on, annotations and predictions; images are hashed with each answer.
        model: From :func:`model_identity`; None where predictions were scored.

    Raises:
        DataError: A file cannot be read.
    """
    return {
        "settings": dict(settings),
        "inputs": [file_identity(path) for path in inputs],
        "model": dict(model) if model is not None else None,
        "code": {"commit": commit(), "answering": code_hash()},
        "packages": {"python": platform.python_version(), **versions()},
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def model_identity(path: Path, dtype: str, device: str) -> dict[str, Any]:
    """A checkpoint by the content of its files, with what else its answers depend on.

    Args:
        path: The checkpoint folder.
        dtype: It is run in.
        device: It is run on, noted but no part of the key: the same arithmetic elsewhere differs by rounding alone.

    Returns:
        ``name``, ``files`` (SHA-256 by name), ``dtype``, ``device``, and ``key``, a digest of all that decides an
        answer but the question: files, dtype, the code that answers, torch and transformers.

    Raises:
        CheckpointError: The folder is none, or a file cannot be read.
    """
    if not path.is_dir():
        raise CheckpointError(f"expected a checkpoint folder at {path}, found none; check --model")
    try:
        files = {each.name: file_identity(each)["sha256"] for each in sorted(path.iterdir()) if each.is_file()}
    except (OSError, DataError) as error:
        raise CheckpointError(f"{path}: expected checkpoint files that can be read, got {error}") from None
    libraries = {name: found for name, found in versions().items() if name in ("torch", "transformers")}
    key = digest(files, dtype, code_hash(), libraries)
    return {"name": _name(path), "files": files, "dtype": dtype, "device": device, "key": key}


def _name(path: Path) -> str:
    """The last parts of a path that tell checkpoints from one another; every run ends in ``stage2/model``."""
    parts = [part for part in path.resolve().parts[1:] if part not in ("model", "stage1", "stage2")]
    return "/".join(parts[-2:]) if parts else str(path)


@cache
def code_hash() -> str:
    """A digest of the sources that turn a question into an answer."""
    root = Path(regiongpt.__file__).parent
    sources = [
        path for name in ANSWERING for path in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    ]
    return digest({str(p.relative_to(root)): sha256(p.read_bytes()).hexdigest() for p in sorted(sources)})


@cache
def versions() -> dict[str, str]:
    """Of the packages that figures may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def commit() -> dict[str, Any] | None:
    """The commit of the checkout that this package runs from, and the sources that differ from it.

    Returns:
        ``hash`` and ``changed``, or None where the package is not a checkout of its own repository.
    """
    root = Path(regiongpt.__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():  # installed: a repository around it would be someone else's
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "src")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"hash": head, "changed": [line[3:] for line in changed.split("\n") if line]}


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.rstrip()


def machine() -> dict[str, Any]:
    """Processor, cores and accelerator."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu(), "cores": usable, "gpu": _gpu(), "system": f"{platform.system()} {platform.machine()}"}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None

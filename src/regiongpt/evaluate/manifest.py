"""Where figures come from: code, packages, machine, checkpoint, files and settings, hashed where they can be."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import regiongpt
from regiongpt.data.shards import file_identity
from regiongpt.environment import commit, machine, versions
from regiongpt.errors import CheckpointError, DataError
from regiongpt.evaluate.store import digest

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

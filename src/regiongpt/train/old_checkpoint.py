"""Reads checkpoints of releases before 0.2, running no code in them: pickles of a few known classes, and no others.

This module may go when no run that was begun with such a release is to be continued.
"""

import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regiongpt.errors import CheckpointError
from regiongpt.storage import read_json, reason

_INDEX = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        "MetadataIndex", "StorageMeta",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, each in vars(torch).items() if isinstance(each, torch.dtype))),
    "pathlib": ("PosixPath", "WindowsPath"),
}  # fmt: skip


def is_old(folder: Path) -> bool:
    """Whether a checkpoint is of such a release."""
    return (folder / "tensors").is_dir()


def progress(folder: Path) -> dict[str, Any]:
    """Values of :class:`regiongpt.train.checkpoint.Progress`."""
    state = read_json(folder / "trainer_state.json", CheckpointError)
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder}: its trainer_state.json is not that of a checkpoint; delete the folder")
    names = {"step": "global_step", "best_step": "best_global_step", "best_loss": "best_metric"}
    return {name: state.get(old) for name, old in names.items()}


def random_state(folder: Path, rank: int) -> dict[str, Any]:
    """The random state of a process; CheckpointError where the checkpoint has none."""
    path = folder / f"random-{rank}.pt"
    array: Any = np.zeros(1, np.uint32)
    harmless = [array.__reduce__()[0], np.ndarray, np.dtype, type(array.dtype)]
    try:
        with torch.serialization.safe_globals(harmless):
            return dict(torch.load(path, weights_only=True))
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path}: expected a random state: {reason(error)}") from None


def tensors(folder: Path) -> Callable[[str, int, int], Tensor]:
    """What reads some rows of a tensor by its name in :mod:`regiongpt.train.checkpoint`.

    Raises:
        CheckpointError: The index is not one.
    """
    folder = folder / "tensors"
    try:
        index: Any = _Index(io.BytesIO((folder / ".metadata").read_bytes())).load()
        parts = defaultdict(list)
        for key, place in index.storage_data.items():
            parts[key.fqn].append((key, place))
        sizes = {name: each.size for name, each in index.state_dict_metadata.items()}
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{folder}: expected tensors in PyTorch's distributed format: {reason(error)}") from None

    def read(name: str, begin: int, end: int) -> Tensor:
        part, _, parameter = name.partition("/")
        known = f"model.{parameter}" if part == "model" else f"optimizer.{parameter}:{part}"
        whole = torch.full(sizes[known], torch.nan)
        try:
            for key, place in parts[known]:
                with (folder / Path(place.relative_path).name).open("rb") as file:
                    file.seek(place.offset)
                    piece = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
                whole[tuple(slice(at, at + size) for at, size in zip(key.offset, piece.shape, strict=True))] = piece
        except Exception as error:
            raise CheckpointError(f"{folder}: {known} cannot be read: {reason(error)}") from None
        return whole[begin:end] if whole.ndim else whole

    return read


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)

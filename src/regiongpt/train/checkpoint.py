"""Atomic checkpoints of a stage; keeps the newest few and the best. Reading one runs no code in it.

``checkpoint-N``, N the optimiser steps done, holds ``tensors.safetensors`` (trained tensors, AdamW's moments),
``random-R.json`` (random state of process R) and ``stage.json`` (progress, and the settings that decide each step).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from regiongpt.environment import Processes
from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.settings import Settings
from regiongpt.storage import new_folder, read_json, reason

_STAGE, _TENSORS, _MOMENTS = "stage.json", "tensors.safetensors", ("step", "exp_avg", "exp_avg_sq")
_PREFIX, _UNFINISHED = "checkpoint-", ".unfinished-"
_DELETE = "delete the folder to continue from the checkpoint before"


class Progress(Settings):
    """How far a stage is: optimiser steps done, and the one with the lowest dev loss so far."""

    step: int = Field(default=0, ge=0)
    best_step: int | None = None
    best_loss: float | None = None


# -- what a checkpoint holds -------------------------------------------------------------------------------------------


def require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if a stage's newest checkpoint was made with other settings; each is named."""
    if not (written := _written(folder)):
        return
    checkpoint, found = written[-1], _read_stage(written[-1])["settings"]
    odd = []
    for name, ours in settings.items():
        if ours != (theirs := found.get(name)):
            plain = isinstance(ours, int | float | str) and isinstance(theirs, int | float | str)
            odd.append(f"{name} = {ours}, it has {theirs}" if plain else f"other {name}")
    if odd:
        told = f"{checkpoint}: made with other settings: {'; '.join(odd)}"
        raise ConfigError(f"{told}; use those, another --out, or delete {folder}")


@torch.no_grad()
def contents(model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> dict[str, Any]:
    """What :func:`save` writes, in the first process; all call it together."""
    mine = {}
    for name, tensor in _tensors(model, optimizer).items():
        whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if processes.is_first:
            mine[name] = whole.contiguous()
    state = {"torch": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return {"tensors": mine, "random": processes.gathered(state)}


def save(folder: Path, held: Mapping[str, Any], settings: Mapping[str, Any], progress: Progress) -> None:
    """Write what :func:`contents` has gathered into an empty folder."""
    save_file(held["tensors"], folder / _TENSORS)
    for rank, state in enumerate(held["random"]):
        (folder / f"random-{rank}.json").write_text(json.dumps(state), encoding="utf-8")
    stage = {"settings": dict(settings), **progress.model_dump()}
    (folder / _STAGE).write_text(json.dumps(stage, indent=1), encoding="utf-8")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> Progress:
    """Restore, in place, what :func:`save` has written; with more processes than before, new ones get new states."""
    _put_back(folder, _tensors(model, optimizer))
    if (path := folder / f"random-{processes.rank}.json").exists():
        state = read_json(path, CheckpointError)
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
    stage = _read_stage(folder)
    return Progress(**{name: stage[name] for name in Progress.model_fields})


def load_model(folder: Path, model: nn.Module) -> None:
    """Restore, in place, only the trained tensors."""
    _put_back(folder, {f"model/{name}": each.detach() for name, each in model.named_parameters() if each.requires_grad})


@torch.no_grad()
def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained tensors and what AdamW keeps of each; made first where no step has been taken."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            found[f"model/{name}"] = parameter.detach()
            found |= {f"{moment}/{name}": state[moment] for moment in _MOMENTS}
    return found


def _put_back(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        with safe_open(folder / _TENSORS, "pt") as file:
            for name, tensor in tensors.items():
                value = file.get_tensor(name)
                if value.shape != tensor.shape:
                    raise ValueError(f"{name}: expected {list(tensor.shape)}, got {list(value.shape)}")
                if isinstance(tensor, DTensor):
                    value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
                tensor.copy_(value)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder}: {reason(error)}; {_DELETE}") from None


def _read_stage(checkpoint: Path) -> dict[str, Any]:
    found = read_json(checkpoint / _STAGE, CheckpointError)
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise CheckpointError(f"{checkpoint}: damaged {_STAGE}; {_DELETE}")
    return found


# -- checkpoints on the disk -------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one stage in its folder: the ``keep`` newest and the best; processes write together."""

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = folder, keep, processes

    def path(self, step: int) -> Path:
        """Folder of the checkpoint at an optimiser step."""
        return self.folder / f"{_PREFIX}{step}"

    def newest(self) -> Path | None:
        """The newest checkpoint; None if there is none. What a kill has left unfinished is removed."""

        def find() -> Path | None:
            for leftover in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            return next(reversed(_written(self.folder)), None)

        return self.processes.from_first(find)

    def write(self, step: int, fill: Callable[[Path], None], best: int | None = None) -> None:
        """Write a checkpoint, atomically and in the first process by ``fill``, then remove old ones; all call it."""

        def write() -> None:
            with new_folder(self.path(step)) as unfinished:
                fill(unfinished)
                for each in (*unfinished.iterdir(), unfinished):
                    _sync(each)
            _sync(self.folder)
            for checkpoint in _written(self.folder)[: -self.keep]:
                if _step_of(checkpoint) != best:
                    # A kill in the middle of this must not leave what looks like a checkpoint.
                    gone = self.folder / f"{_UNFINISHED}{_step_of(checkpoint)}"
                    checkpoint.rename(gone)
                    shutil.rmtree(gone, ignore_errors=True)

        self.processes.from_first(write)


def _written(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

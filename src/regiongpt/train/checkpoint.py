"""Atomic, verified checkpoints of a stage; keeps the newest few and the best. Reading one runs no code in it.

A folder ``checkpoint-N``, N the optimiser steps done, holds:

- ``stage.json``: the settings that decide what is learnt, and how far the stage is;
- ``tensors-R.safetensors``: trained tensors and AdamW's moments, as process R has them. A sharded tensor is the rows
  of all processes one after the other, any other is in the first file;
- ``random-R.json``: the random state of process R;
- ``files.json``: the sizes and hashes of all these, written last.

Frozen weights are in the checkpoint that the stage began with.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regiongpt.environment import Processes
from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.settings import Settings
from regiongpt.storage import read_json, reason, sha256

log = logging.getLogger(__name__)

LIST = "files.json"

_STAGE, _MOMENTS = "stage.json", ("step", "exp_avg", "exp_avg_sq")
_PREFIX, _UNFINISHED, _ASIDE = "checkpoint-", ".unfinished-", "aside-"
_DELETE = "delete the folder to continue from the checkpoint before"


class Progress(Settings):
    """How far a stage is: optimiser steps done, and the one with the lowest dev loss so far."""

    step: int = Field(default=0, ge=0)
    best_step: int | None = None
    best_loss: float | None = None


# -- what a checkpoint holds -------------------------------------------------------------------------------------------


def require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if a stage's newest checkpoint was made with other settings; each is named."""
    for checkpoint in reversed(_written(folder)):
        with suppress(CheckpointError):  # a damaged one is not gone on from
            found = _read_stage(checkpoint)["settings"]
            break
    else:
        return
    odd = []
    for name in (name for name in settings if settings[name] != found.get(name)):
        ours, theirs = settings[name], found.get(name)
        plain = isinstance(ours, int | float | str) and isinstance(theirs, int | float | str)
        odd.append(f"{name} = {ours}, it has {theirs}" if plain else f"other {name}")
    if odd:
        raise ConfigError(
            f"{checkpoint}: it was made with other settings: {'; '.join(odd)}; give those again or another --out, or "
            f"delete {folder}"
        )


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    progress: Progress,
    processes: Processes,
) -> None:
    """Write this process's part into an empty folder; all processes call it together."""
    mine = {}
    for name, tensor in _tensors(model, optimizer).items():
        if isinstance(tensor, DTensor):
            mine[name] = tensor.to_local().contiguous()
        elif processes.is_first:
            mine[name] = tensor.contiguous()
    save_file(mine, folder / f"tensors-{processes.rank}.safetensors")
    kind, keys, *rest = cast(Any, np.random.get_state())
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    state["torch"] = torch.get_rng_state().tolist()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    (folder / f"random-{processes.rank}.json").write_text(json.dumps(state), encoding="utf-8")
    if processes.is_first:
        text = json.dumps({"settings": dict(settings), **progress.model_dump()}, indent=1)
        (folder / _STAGE).write_text(text, encoding="utf-8")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> Progress:
    """Restore, in place, what :func:`save` has written; with more processes than before, the new ones draw anew."""
    _put_back(folder, _tensors(model, optimizer))
    stage = _read_stage(folder)
    try:
        if processes.rank < len(list(folder.glob("tensors-*.safetensors"))):
            state = _read(folder / f"random-{processes.rank}.json")
            version, internal, gauss = state["python"]
            random.setstate((version, tuple(internal), gauss))
            kind, keys, *rest = state["numpy"]
            np.random.set_state((kind, np.array(keys, np.uint32), *rest))
            torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
            if torch.cuda.is_available() and "cuda" in state:
                torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
        found = Progress(**{name: stage[name] for name in Progress.model_fields})
        if found.step != _step_of(folder):
            raise ValueError(f"it is after step {found.step}, its folder says {_step_of(folder)}")
        return found
    except (ConfigError, ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: its step or its random state cannot be read: {reason(error)}; {_DELETE}"
        ) from None


def load_model(folder: Path, model: nn.Module) -> None:
    """Restore, in place, the trained tensors alone."""
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
        with ExitStack() as stack:
            paths = (folder / f"tensors-{rank}.safetensors" for rank in range(len(list(folder.glob("tensors-*")))))
            files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            parts = [(file, set(file.keys())) for file in files]
            for name, tensor in tensors.items():
                begin, end = 0, len(tensor) if tensor.ndim else 0
                if isinstance(tensor, DTensor):
                    size = -(-end // tensor.device_mesh.size())
                    begin, tensor = min(tensor.device_mesh.get_local_rank() * size, end), tensor.to_local()
                    end = begin + len(tensor)
                value = _rows([file for file, names in parts if name in names], name, begin, end)
                if value.shape != tensor.shape:
                    raise ValueError(f"{name}: expected {list(tensor.shape)}, got {list(value.shape)}")
                if value.dtype != tensor.dtype:
                    raise ValueError(f"{name}: expected {tensor.dtype}, got {value.dtype}")
                if not value.isfinite().all() or (name.startswith("exp_avg_sq/") and bool((value < 0).any())):
                    raise ValueError(f"{name}: not finite, or below zero where it is a mean of squares")
                tensor.copy_(value)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its tensors cannot be read: {reason(error)}; {_DELETE}") from None


def _rows(files: list[Any], name: str, begin: int, end: int) -> Tensor:
    """Some rows of a tensor that lies in the files one part after the other."""
    pieces, at = [], 0
    for part in (file.get_slice(name) for file in files):
        if not part.get_shape():
            return cast(Tensor, files[0].get_tensor(name))
        rows = part.get_shape()[0]
        first, last = (min(max(place - at, 0), rows) for place in (begin, end))
        pieces.append(part[first:last])
        at += rows
    return torch.cat(pieces)


def _read(path: Path) -> Any:
    try:
        return read_json(path, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_DELETE}") from None


def _read_stage(checkpoint: Path) -> dict[str, Any]:
    found = _read(checkpoint / _STAGE)
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise CheckpointError(f"{checkpoint}: its {_STAGE} is not that of a checkpoint; {_DELETE}")
    return found


# -- checkpoints on the disk -------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one stage in its folder: the ``keep`` newest and the best; processes write together."""

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = folder, keep, processes

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after so many optimiser steps."""
        return self.folder / f"{_PREFIX}{step}"

    def newest(self) -> Path | None:
        """The newest checkpoint that is as it was written; None if there is none.

        What a kill has left unfinished is removed. A damaged checkpoint is renamed, with a line in the log.
        """

        def search() -> Path | None:
            for leftover in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            found = _written(self.folder)
            while found:
                checkpoint = found.pop()
                fault = damage(checkpoint)
                if fault is None:
                    return checkpoint
                then = "the one before is taken" if found else "none is left, so the stage begins anew"
                log.warning("%s: %s; it is now %s, and %s", checkpoint, fault, _set_aside(checkpoint).name, then)
            return None

        return self.processes.from_first(search)

    def write(self, step: int, fill: Callable[[Path], None], best: int | None = None) -> bool:
        """Write a checkpoint whole, then remove those that are not kept; False if the disk is full.

        Nothing is left of it then, and the checkpoints before are untouched. All processes call it; ``fill`` writes the
        files of each into the given folder.
        """
        unfinished = self.folder / f"{_UNFINISHED}{step}"
        first = self.processes.is_first

        def begin() -> None:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()

        def finish() -> None:
            _seal(unfinished)
            shutil.rmtree(self.path(step), ignore_errors=True)
            unfinished.rename(self.path(step))
            _sync(self.folder)

        for part in (begin if first else None, lambda: fill(unfinished), finish if first else None):
            fault = ""
            try:
                if part is not None:
                    part()
            except (OSError, SafetensorError) as error:
                fault = reason(error)
            fault = next((each for each in self.processes.gathered(fault) if each), "")
            if fault:
                if first:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    newest = next(reversed(_written(self.folder)), "none")
                    told = "%s could not be written (%s); the run goes on, and the newest checkpoint is %s"
                    log.warning(told, self.path(step), fault, newest)
                return False
        if first:
            for checkpoint in _written(self.folder)[: -self.keep]:
                if _step_of(checkpoint) != best:
                    # A kill in the middle of this must not leave what looks like a checkpoint.
                    gone = self.folder / f"{_UNFINISHED}{_step_of(checkpoint)}"
                    checkpoint.rename(gone)
                    shutil.rmtree(gone, ignore_errors=True)
        return True


def _written(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's folder; None if it is as it was written."""
    try:
        listed = {name: (size, digest) for name, (size, digest) in read_json(checkpoint / LIST).items()}
    except (DataError, ValueError, AttributeError, TypeError):
        return f"it was not written to its end, or its {LIST} is damaged"
    if _STAGE not in listed:
        return f"its {LIST} is damaged: it lists no {_STAGE}"
    for name, (size, digest) in listed.items():
        path = checkpoint / name
        try:
            if (found := path.stat().st_size) != size:
                return f"{name} is damaged: expected {size} bytes, got {found}"
            if sha256(path) != digest:
                return f"{name} is damaged: its content is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {reason(error)}"
    return None


def _set_aside(path: Path) -> Path:
    """Rename a folder to ``aside-N-...`` beside it; CheckpointError if it cannot be renamed."""
    number = 1
    while (aside := path.with_name(f"{_ASIDE}{number}-{path.name}")).exists():
        number += 1
    try:
        return path.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be renamed to {aside.name}: {reason(error)}") from None


def _seal(folder: Path) -> None:
    """Flush all files to the disk, and list them with their sizes and hashes."""
    listed = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        listed[path.name] = (path.stat().st_size, sha256(path))
    (folder / LIST).write_text(json.dumps(listed, indent=1), encoding="utf-8")
    _sync(folder / LIST)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What a checkpoint holds: everything that a run needs to go on as if it had not stopped.

- the tensors that are trained, and the optimiser's of each, in PyTorch's distributed format: each process writes its
  own, and any number of processes, sharded or not, reads them;
- the scheduler, the step, the best dev loss, and every process's random state;
- the facts of the run, to which the run that goes on from it is held.

Frozen weights are not in it: they are those of the checkpoint that the stage began with. The position in the data is
the step (:mod:`regiongpt.train.batches`).
"""

import json
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.train.processes import Processes

TRAINER_STATE = "trainer_state.json"
"""The step and the best dev loss; the name is transformers' own."""

_TENSORS, _SCHEDULER, _FACTS = "tensors", "scheduler.pt", "stage.json"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a stage trains, by name; the memory is the model's own."""
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


def facts_of(name: str, settings: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on from.

    Args:
        name: Of the stage.
        settings: Those that decide what is learnt in which step.
        model: Whose parameters that require gradients are trained.
    """
    shapes = {tensor: list(each.shape) for tensor, each in trained_tensors(model).items()}
    return {"stage": name, "settings": dict(settings), "tensors": shapes}


def stage_of(checkpoint: Path) -> str:
    """The stage that a checkpoint belongs to.

    Raises:
        CheckpointError: It does not say.
    """
    try:
        return str(json.loads((checkpoint / _FACTS).read_text(encoding="utf-8"))["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of a stage, with {_FACTS}; {type(error).__name__}: {error}"
        ) from error


def require_same(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Holds a run to the checkpoint it goes on from.

    Raises:
        ConfigError: A setting differs that decides what is learnt; each is named.
        CheckpointError: The checkpoint holds other tensors, or some of other shapes; they are listed.
    """
    found = json.loads((checkpoint / _FACTS).read_text(encoding="utf-8"))
    if found["stage"] != facts["stage"]:
        raise ConfigError(f"{checkpoint}: expected a checkpoint of {facts['stage']}, got one of {found['stage']}")
    ours, theirs = facts["tensors"], found["tensors"]
    listed = [f"{name}: expected {ours[name]}, got {theirs.get(name, 'none')}" for name in ours]
    odd = [line for name, line in zip(ours, listed, strict=True) if theirs.get(name) != ours[name]]
    odd += [f"{name}: not expected, got {theirs[name]}" for name in theirs if name not in ours]
    if odd:
        more = f" and {len(odd) - 12} more" if len(odd) > 12 else ""
        raise CheckpointError(
            f"{checkpoint}: its tensors are not those of this model: {'; '.join(odd[:12])}{more}; give the recipe that "
            "it was made with, or begin anew with --resume never"
        )
    ours, theirs = facts["settings"], found["settings"]
    odd = [f"{name} = {ours.get(name)}, it has {theirs.get(name)}" for name in {**theirs, **ours} if
           ours.get(name) != theirs.get(name)]  # fmt: skip
    if odd:
        raise ConfigError(
            f"{checkpoint}: it was made with other settings, and a run that goes on from it would be neither: "
            f"{'; '.join(sorted(odd))}; give those again, or begin anew with --resume never"
        )


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    facts: Mapping[str, Any],
    processes: Processes,
) -> None:
    """Writes this process's part; all processes call it together.

    Args:
        folder: That is there, and empty.
        model: Whose parameters that require gradients are trained.
        optimizer: Of them.
        scheduler: Of its learning rates.
        facts: As of :func:`facts_of`.
        processes: That train together.
    """
    torch.save(_random_state(), folder / f"random-{processes.number}.pt")
    if processes.is_first:
        torch.save(scheduler.state_dict(), folder / _SCHEDULER)
        (folder / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    with _quiet():
        state_dict_saver.save(_tensors(model, optimizer), checkpoint_id=folder / _TENSORS)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Puts back, in place, what :func:`save` has written, but for the random state."""
    with _quiet():
        state_dict_loader.load(_tensors(model, optimizer), checkpoint_id=folder / _TENSORS)
    scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate  # a scheduler sets it at its next step only


def load_model(folder: Path, model: nn.Module) -> None:
    """Puts back, in place, the trained tensors alone."""
    with _quiet():
        state_dict_loader.load({"model": trained_tensors(model)}, checkpoint_id=folder / _TENSORS)


def load_random_state(folder: Path, processes: Processes) -> None:
    """Puts back this process's random state; with more processes than before, the new ones keep theirs."""
    path = folder / f"random-{processes.number}.pt"
    if not path.exists():
        return
    kept = torch.load(path, weights_only=False)
    random.setstate(kept["python"])
    np.random.set_state(kept["numpy"])
    torch.set_rng_state(kept["torch"])
    if torch.cuda.is_available() and "cuda" in kept:
        torch.cuda.set_rng_state(kept["cuda"])


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


@torch.no_grad()
def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Trained tensors and what AdamW keeps of each, by name; made first where no step has been taken."""
    optimizer = cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))
    kept: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        kept.update({f"{name}:{key}": value for key, value in state.items()})
    return {"model": trained_tensors(model), "optimizer": kept}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # One process is meant here wherever there is one.
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield

"""The processes that train together: what they agree on, and a model whose weights are shared out among them.

One process is the ordinary case, and costs nothing. Several are started by ``torchrun`` or ``accelerate launch``, which
tell each process its number; accelerate opens the connection.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regiongpt.errors import ConfigError

Found = TypeVar("Found")
_FAREWELL: Final = 0.1  # seconds


class Processes:
    """This process among those that train together, as accelerate has connected them."""

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size() if _connected() else 1

    @property
    def number(self) -> int:
        """Which one this is, from 0."""
        return dist.get_rank() if _connected() else 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.number == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def gathered(self, mine: Found) -> list[Found]:
        """What each has, by number; anything that can be pickled."""
        if self.count == 1:
            return [mine]
        everyones: list[Any] = [None] * self.count
        dist.all_gather_object(everyones, mine)
        return cast(list[Found], everyones)

    def from_first(self, find: Callable[[], Found]) -> Found:
        """What the first process finds, told to all.

        Raises:
            Exception: In all processes, what was raised in the first.
        """
        if self.count == 1:
            return find()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told = [find(), None]
            except Exception as error:
                told = [None, error]
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return cast(Found, told[0])

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values


def connect() -> None:
    """Connects this process to those that were started with it, over GPUs where there are any."""
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def disconnect() -> None:
    """Closes the connection; a process that ends with it open may be taken for one that failed."""
    if _connected():
        dist.destroy_process_group()
        # A thread of gloo's lets go of the last message's tensor after the one that waited for it has gone on, and
        # needs the interpreter's lock for that; where there is no interpreter any more, it aborts the process.
        time.sleep(_FAREWELL)


def refuse_outer_sharding() -> None:
    """Raises ConfigError where accelerate's own configuration would shard the model a second time."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ConfigError(
            "engine.sharding: expected sharding to be asked for in the recipe, got accelerate's own configuration that "
            "asks for FSDP; give --engine.sharding fsdp, and start with torchrun or a plain `accelerate launch`"
        )


class Sharded(nn.Module):
    """A module whose weights, gradients and optimiser are shared out among the processes (FSDP2).

    Each of the given layers is one unit, put together when it is used; the rest is another, there from the first use to
    the end of the backward pass.

    Args:
        inner: What is sharded, in place.
        layers: Modules inside it that are units of their own.
        precision: In which weights are put together; gradients are summed and weights kept in float32.
    """

    def __init__(self, inner: nn.Module, layers: list[nn.Module], precision: torch.dtype) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__()
        self.inner = inner
        # Weights of regions are exact areas, and stay float32; autocast decides on the rest.
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(self, mp_policy=policy)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """That of the module inside."""
        return self.inner(*inputs, **named)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients are summed over the processes at the end of an optimiser step, not in each micro-batch."""
        sharded = cast(Any, self)
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)


@torch.no_grad()
def put_together(module: nn.Module, first: bool) -> None:
    """Replaces the shards of a module's parameters by whole ones, in the memory of the first process alone.

    Args:
        module: Changed in place; those of the other processes are without content afterwards.
        first: Whether this is the first process.
    """
    from torch.distributed.tensor import DTensor

    whole: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter.data, DTensor):
                if id(parameter) not in whole:
                    full = parameter.data.full_tensor()
                    full = full.cpu() if first else torch.empty_like(full, device="meta")
                    whole[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
                part._parameters[name] = whole[id(parameter)]


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()

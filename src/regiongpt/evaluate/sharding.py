"""The processes of a run: one, or as many as ``accelerate launch`` or ``torchrun`` have started."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

from regiongpt.environment import launched
from regiongpt.errors import ConfigError

T = TypeVar("T")

PATIENCE: Final = timedelta(days=7)
"""How long processes wait for the slowest of them; the default of minutes would end a run whose shards differ."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all of a run.

    Attributes:
        rank: Of this one, from 0.
        count: Of all.
        local: Number of this one on its machine, which is that of its accelerator.
        wait: Returns when all have come here.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this is the one that reports."""
        return self.rank == 0

    def share(self, work: Sequence[T], size: Callable[[T], int]) -> list[T]:
        """The part of the work that falls to this process: disjoint, together everything, about equal in size.

        Args:
            work: The same in every process.
            size: Of one piece.
        """
        loads = [0] * self.count
        mine: list[T] = []
        for piece in work:
            least = loads.index(min(loads))
            loads[least] += size(piece)
            if least == self.rank:
                mine.append(piece)
        return mine


ALONE: Final = Processes()


def processes(on_cpu: bool = False) -> Processes:
    """The processes that a launcher has started, told of each other; otherwise this one alone.

    Args:
        on_cpu: Whether the model runs on the CPU though there is an accelerator.

    Raises:
        ConfigError: A launcher has started several that cannot be connected.
    """
    if launched() < 2:
        return ALONE
    import torch
    from accelerate import PartialState

    # accelerate connects processes without an accelerator only where it is told that they are meant to have none.
    state = PartialState(cpu=on_cpu or not torch.accelerator.is_available(), timeout=PATIENCE)
    if state.num_processes != launched():
        raise ConfigError(
            f"expected the {launched()} processes that WORLD_SIZE speaks of, got {state.num_processes} connected; "
            "start them with `torchrun` or `accelerate launch`"
        )
    return Processes(
        rank=state.process_index,
        count=state.num_processes,
        local=state.local_process_index,
        wait=state.wait_for_everyone,
    )

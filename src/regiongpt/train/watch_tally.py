"""What every optimiser step has learnt: sums that stay on the device until somebody wants to read them.

Reading a number from a GPU waits for all that it has to do. So a step only adds to a vector there; the vectors of many
steps are read, and summed over the processes, at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from regiongpt.model.processing import IGNORED
from regiongpt.prompts import QUESTIONS
from regiongpt.train.processes import Processes

TASKS: Final[tuple[str, ...]] = (*QUESTIONS, "chat")
"""The tasks that losses are told by; the place of a name here is its number in a batch."""

_LOSS, _EXAMPLES, _TOKENS, _IMAGES, _TARGETS, _SUMS = range(6)
_COUNTS = _SUMS + len(TASKS)
_WIDTH = _COUNTS + len(TASKS)


def task_numbers(labels_T: Tensor, tasks: Sequence[str]) -> Tensor:
    """Which task each target of a conversation belongs to.

    Args:
        labels_T: (T,), -100 where not a target; each run of targets is the answer of one turn.
        tasks: Of the turns, in order; there may be more of them than answers, where the last did not fit.

    Returns:
        (T,) int64: places in :data:`TASKS`; -1 where not a target, and in turns of any other task.
    """
    numbers = torch.tensor([*(TASKS.index(task) if task in TASKS else -1 for task in tasks), -1])
    is_target = labels_T != IGNORED
    begins = is_target & ~torch.cat([torch.tensor([False]), is_target[:-1]])
    turns_T = (begins.cumsum(0) - 1).clamp(0, len(tasks))
    return torch.where(is_target, numbers[turns_T], -1)


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """One optimiser step, over its micro-batches and all processes.

    Attributes:
        loss: As it was minimised: the sum over all targets divided by their number, and what else the stage adds.
        tasks: Of each task that had targets, the sum of their losses and their number.
        examples: Conversations.
        tokens: Without padding.
        images: Pictures among them.
        targets: Tokens that were learnt.
        grad_norm: Before it was clipped; None where nobody has told it.
    """

    loss: float
    tasks: dict[str, tuple[float, int]] = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0
    images: int = 0
    targets: int = 0
    grad_norm: float | None = None


class Tally:
    """Adds up what the micro-batches of each optimiser step report."""

    def __init__(self) -> None:
        self._open: Tensor | None = None
        self._norm: Tensor | float | None = None
        self._closed: list[Tensor] = []
        self._norms: list[Tensor | float | None] = []

    def add(
        self,
        loss: Tensor,
        losses_N: Tensor | None = None,
        tasks_N: Tensor | None = None,
        *,
        examples: int,
        tokens: int | Tensor,
        images: int = 0,
    ) -> None:
        """Adds a micro-batch; nothing is read from the device.

        Args:
            loss: This process's share of the step's loss: over micro-batches and processes, they sum to it.
            losses_N: (N,) cross-entropy of each target, not divided by anything; None where it is not known.
            tasks_N: (N,) place in :data:`TASKS` of each target, -1 for none.
            examples: Conversations in the micro-batch, however they are packed.
            tokens: In it, without padding.
            images: Pictures among them.
        """
        device = loss.device
        kind = torch.float32 if device.type == "mps" else torch.float64
        if self._open is None:
            self._open = torch.zeros(_WIDTH, dtype=kind, device=device)
        row = self._open
        row[_LOSS] += loss.detach().to(kind)
        row[_EXAMPLES] += examples
        row[_TOKENS] += tokens
        row[_IMAGES] += images
        if losses_N is not None:
            row[_TARGETS] += len(losses_N)
        if losses_N is not None and tasks_N is not None:
            # A product, for scattered sums on a GPU come out a little different each time.
            chosen = tasks_N.to(device)[None] == torch.arange(len(TASKS), device=device)[:, None]
            row[_SUMS:_COUNTS] += chosen.to(kind) @ losses_N.detach().to(kind)
            row[_COUNTS:] += chosen.sum(1)

    def norm(self, value: Tensor | float) -> None:
        """Notes the norm of the step's gradient, the same in every process."""
        self._norm = value.detach() if isinstance(value, Tensor) else value

    def close(self) -> None:
        """Ends a step."""
        if self._open is None:
            raise RuntimeError("expected a micro-batch to be added before a step is closed")
        self._closed.append(self._open)
        self._norms.append(self._norm)
        self._open, self._norm = None, None

    def take(self) -> list[StepSums]:
        """The steps since the last call, of all processes together; each process must call it at the same step."""
        if not self._closed:
            return []
        rows = torch.stack(self._closed)
        rows = Processes().summed(rows)
        norms = [None if norm is None else float(norm) for norm in self._norms]
        self._closed, self._norms = [], []
        return [_sums(row, norm) for row, norm in zip(rows.tolist(), norms, strict=True)]


def _sums(row: list[float], norm: float | None) -> StepSums:
    sums, counts = row[_SUMS:_COUNTS], row[_COUNTS:]
    return StepSums(
        loss=row[_LOSS],
        tasks={name: (total, round(n)) for name, total, n in zip(TASKS, sums, counts, strict=True) if n},
        examples=round(row[_EXAMPLES]),
        tokens=round(row[_TOKENS]),
        images=round(row[_IMAGES]),
        targets=round(row[_TARGETS]),
        grad_norm=norm,
    )

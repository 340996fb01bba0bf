"""Which conversations come into which micro-batch of which process, and what a micro-batch is made of.

Optimiser step k takes the items from ``k * batch_size`` on, however many processes there are and however large their
micro-batches: the position in the data is the number of steps done.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from regiongpt.errors import RegionGPTError
from regiongpt.model.processing import IGNORED
from regiongpt.train.dataset import Example
from regiongpt.train.packing import Collate


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of one process.

    Attributes:
        inputs: What the loss takes.
        items: Numbers of its conversations in the data set.
        tokens: Of its conversations, without padding.
        images: How many of them have one.
        fault: What was wrong with a record, raised once it is back in the training process; ``inputs`` are then empty.
    """

    inputs: dict[str, Any]
    items: tuple[int, ...]
    tokens: int
    images: int
    fault: RegionGPTError | None = None

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU copies from while it computes; PyTorch's loader asks for it by this name."""
        pinned = {k: each.pin_memory() if isinstance(each, torch.Tensor) else each for k, each in self.inputs.items()}
        return replace(self, inputs=pinned)


class StepBatches(Sampler[list[int]]):
    """Items of the micro-batches of one process, in order; as many in every process.

    Where the last step has too few items for all processes, one that is left without gets the step's first, as
    ``-1 - item``, which stands for that item without targets: it takes part in all that is computed together, and adds
    nothing.

    Args:
        items: Length of the data set.
        batch_size: Items of an optimiser step, over all processes.
        micro_batch_size: Items of a micro-batch; micro-batches of all processes together divide ``batch_size``.
        process: Number of this process.
        processes: How many there are.
    """

    def __init__(
        self, items: int, batch_size: int, micro_batch_size: int, process: int = 0, processes: int = 1
    ) -> None:
        self.items, self.batch_size, self.micro_batch_size = items, batch_size, micro_batch_size
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        whole, rest = divmod(self.items, self.batch_size)
        together = self.micro_batch_size * self.processes
        return whole * (self.batch_size // together) + -(-rest // together)

    def __iter__(self) -> Iterator[list[int]]:
        together = self.micro_batch_size * self.processes
        for first in range(0, self.items, self.batch_size):
            end = min(first + self.batch_size, self.items)
            for begin in range(first, end, together):
                mine = begin + self.process * self.micro_batch_size
                yield list(range(mine, min(mine + self.micro_batch_size, end))) or [-1 - first]


def load(
    dataset: Dataset[Example], collate: Collate, batches: Sampler[list[int]], workers: int, device: torch.device
) -> "DataLoader[Batch]":
    """What yields the micro-batches.

    Args:
        dataset: Examples with ``input_ids`` and ``labels``.
        collate: Makes the inputs of a micro-batch.
        batches: Items of each micro-batch.
        workers: Processes that load ahead; 0 to load when a batch is needed.
        device: That the batches will go to.
    """
    return DataLoader(
        cast(Any, _Numbered(dataset)),
        batch_sampler=batches,
        collate_fn=_Together(collate),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
    )


class _Numbered(Dataset[tuple[int, Example | RegionGPTError]]):
    """Examples with their numbers; one that cannot be made is what was wrong with it.

    An error that is raised in a loading process would arrive with that process's stack in its message.
    """

    def __init__(self, dataset: Dataset[Example]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: int) -> tuple[int, Example | RegionGPTError]:
        try:
            if item >= 0:
                return item, self.dataset[item]
            example = self.dataset[-1 - item]
            return item, {**example, "labels": torch.full_like(example["labels"], IGNORED)}
        except RegionGPTError as error:
            return item, error


class _Together:
    def __init__(self, collate: Callable[[list[Example]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, numbered: list[tuple[int, Example | RegionGPTError]]) -> Batch:
        examples: list[Example] = []
        items = tuple(item for item, _ in numbered if item >= 0)
        for _, example in numbered:
            if isinstance(example, RegionGPTError):
                return Batch(inputs={}, items=items, tokens=0, images=0, fault=example)
            examples.append(example)
        return Batch(
            inputs=self.collate(examples),
            items=items,
            tokens=sum(len(each["input_ids"]) for each in examples),
            images=sum("pixel_values" in each or "vision_features" in each for each in examples),
        )

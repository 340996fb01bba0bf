"""One stage of training: a plain loop over optimiser steps, in as many processes as were started.

However a run is spread or interrupted, step k takes the same items, its loss is the sum over all target tokens of the
step divided by their number, and every trained parameter has a gradient in every process.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import set_seed

from regiongpt.environment import connect
from regiongpt.errors import ConfigError, DataError, RegionGPTError
from regiongpt.model.processing import IGNORED
from regiongpt.storage import writing
from regiongpt.train import checkpoint
from regiongpt.train.checkpoint import Checkpoints, Progress
from regiongpt.train.packing import Collate, Example, PackedCollate, attend_in_units
from regiongpt.train.recipe import EngineConfig, StageConfig, WatchConfig
from regiongpt.train.watch import Watch, read_tally, tally

log = logging.getLogger(__name__)

Loss = Callable[[Any, dict[str, Any], Any], Tensor]
"""Takes a model, a batch, and the number of target tokens in the whole optimiser step."""


@contextmanager
def without_old_garbage() -> Iterator[None]:
    """Keep what is in memory now out of garbage collections: records by the million took a fifth of a packed step."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def decisive_settings(config: StageConfig) -> dict[str, Any]:
    """The settings of a stage that determine each step, and may not change on resuming."""
    return config.model_dump(exclude={"micro_batch_size", "save_steps", "log_steps"})


class Loop:
    """Trains, in place, the parameters of a model that require gradients, in all processes that were started together.

    ``name`` stands in the log, ``folder`` takes checkpoints and logs, ``seed`` is that of dropout. One pass over
    ``dataset`` is the stage; its ``name_of(item)``, if it has that, names bad records. The weights with the lowest loss
    on ``dev`` are restored at the end. A checkpoint in the folder must share ``made_of``, plain values, to resume from
    it. Of a sharded model the first process alone has the weights afterwards.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        dataset: Dataset[Example],
        collate: Collate,
        loss: Loss,
        config: StageConfig,
        folder: Path,
        seed: int,
        *,
        engine: EngineConfig | None = None,
        watch: WatchConfig | None = None,
        dev: Dataset[Example] | None = None,
        made_of: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.watch, self.processes = engine or EngineConfig(), watch or WatchConfig(), connect()
        self.name, self.model, self.dataset, self.collate, self.dev = name, model, dataset, collate, dev
        self.config, self.progress = config, Progress()
        self.together, several = config.micro_batch_size * self.processes.count, self.processes.count > 1
        if config.batch_size % self.together:
            together = f"{config.micro_batch_size} (micro_batch_size) x {self.processes.count} processes"
            raise ConfigError(f"{name}.batch_size: {config.batch_size} is not a multiple of {together}")
        set_seed(seed)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(folder, self.watch.keep, self.processes)
        items = len(cast(Any, dataset))
        self.steps = math.ceil(items / config.batch_size)
        self.settings = {**decisive_settings(config), "items": items, "seed": seed, **(made_of or {})}
        self.begin = self.checkpoints.newest()
        if self.begin is not None:
            checkpoint.require_settings(folder, self.settings)
            if self.processes.is_first:
                log.info("%s: going on from %s", name, self.begin)
        self.watcher = Watch(name, folder, config.log_steps, self.watch.tensorboard)
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        own: Any = model
        if self.engine.packing and hasattr(model, "embed"):  # text in windows of one length is full already
            attend_in_units(own.language_model)
            self.collate = PackedCollate(collate)
        if self.engine.gradient_checkpointing:
            # Newer releases of transformers call it by another name, and warn at the old one.
            enable = getattr(model, "activation_checkpointing_enable", None) or own.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.sharded = self.engine.sharding == "fsdp" and several
        self.module: Any = StageModule(model, loss, self.engine.precision == "bf16")
        if self.sharded:
            shard(self.module)
        else:
            self.module.to(self.device)
            if several:
                self.module = DistributedDataParallel(self.module)
        self.optimizer = make_optimizer(model, config)

    @without_old_garbage()
    def run(self) -> Self:
        """Train from the newest checkpoint, or from the first step, to the last.

        Raises:
            CheckpointError: A checkpoint in the folder is of another model.
            DataError: A record cannot be used, a loss is not finite (training has stopped before that step), or the
                folder cannot be written.
        """
        if self.begin is not None:
            self.progress = checkpoint.load(self.begin, self.model, self.optimizer, self.processes)
        rounds = self.config.batch_size // self.together
        # Opening a loader draws a random number; only at the first start may it come from the stage's generator.
        generator = None if self.begin is None else torch.Generator()
        skip, workers = self.progress.step * rounds, self.engine.workers
        batches = iter(self._batches(self.dataset, self.config.batch_size, skip, workers, generator))
        first = self.processes.is_first
        if first:
            self.watcher.start(self.progress.step)
        while self.progress.step < self.steps:
            began = time.perf_counter()
            step = list(islice(batches, rounds))
            waited = time.perf_counter() - began
            found = self._step(step)
            self.progress = self.progress.model_copy(update={"step": self.progress.step + 1})
            at, last = self.progress.step, self.progress.step == self.steps
            if first:
                line = {"step": at, "of": self.steps, "epoch": at / self.steps, **found}
                self.watcher.step({**line, "seconds": time.perf_counter() - began, "wait": waited})
            saves = last or at % self.config.save_steps == 0
            if self.dev is not None and self.watch.dev_steps and (last or at % self.watch.dev_steps == 0):
                saves |= self._measure()
            if saves:
                held = checkpoint.contents(self.model, self.optimizer, self.processes)
                fill = partial(checkpoint.save, held=held, settings=self.settings, progress=self.progress)
                self.checkpoints.write(at, fill, self.progress.best_step)
        best = self.progress.best_step
        if best is not None and best != self.progress.step:
            if self.processes.is_first:
                log.info("weights of step %d restored: the lowest dev loss, %.4f", best, self.progress.best_loss)
            checkpoint.load_model(self.checkpoints.path(best), self.model)
        if self.sharded:
            put_together(self.model, self.processes.is_first)
        return self

    def _step(self, step: Sequence["Batch"]) -> dict[str, Any]:
        """Forward and backward passes of the micro-batches of one step, then the optimiser's; its line of the log."""
        targets = torch.tensor(sum(batch.targets for batch in step), device=self.device)
        self.processes.summed(targets).clamp_(min=1)
        self.module.train()
        losses: list[Tensor] = []
        rows: list[Tensor] = []
        for number, batch in enumerate(step, 1):
            # Gradients are summed over the processes at the end of the step, not in each micro-batch.
            if self.sharded:
                self.module.set_requires_gradient_sync(number == len(step))
            waits = number < len(step) and isinstance(self.module, DistributedDataParallel)
            with self.module.no_sync() if waits else nullcontext():
                loss, each, tasks = self._forward(batch, targets)
                torch.autograd.backward(loss * self.processes.count)  # processes average gradients; their sum is wanted
            losses.append(loss.detach())
            rows.append(tally(losses[-1], each, tasks, (len(batch.items), batch.tokens, batch.images)))
        norm: Any = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # All processes have to agree that the step is sound.
        sound = torch.stack(losses).isfinite().all() & norm.isfinite()
        row = torch.stack(rows).sum(0)
        *values, failed = self.processes.summed(torch.cat([row, (~sound)[None].to(row)])).tolist()
        if failed:
            self._refuse(step, losses, float(norm))
        rate = rate_at(self.progress.step, self.steps, self.config.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return {**read_tally(values), "lr": rates, "grad_norm": float(norm)}

    def _refuse(self, step: Sequence["Batch"], losses: Sequence[Tensor], norm: float) -> None:
        """Raise DataError for a step whose loss or gradient is not finite, with the names of its records."""
        mine = [(batch.items, float(loss)) for batch, loss in zip(step, losses, strict=True)]
        every = [each for part in self.processes.gathered(mine) for each in part]
        wrong = [each for each in every if not math.isfinite(each[1])] or every
        name = getattr(self.dataset, "name_of", lambda item: f"item {item}")
        names = ", ".join(name(item) for item in sorted(item for batch, _ in wrong for item in batch))
        found = f"a loss of {wrong[0][1]:g} and a gradient of {norm:g} are not finite"
        how = f"the last good checkpoint is {self.checkpoints.newest()}; inspect {names}, or lower the learning rate"
        raise DataError(f"{self.name}, step {self.progress.step + 1}: {found}; {how}")

    def _batches(
        self, dataset: Dataset[Example], batch_size: int, skip: int, workers: int, generator: torch.Generator | None
    ) -> "DataLoader[Batch]":
        micro, processes = self.config.micro_batch_size, self.processes
        plan = StepBatches(len(cast(Any, dataset)), batch_size, micro, processes.rank, processes.count)
        return DataLoader(
            cast(Any, _MicroBatches(dataset, self.collate, plan)),
            sampler=range(skip, len(plan)),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            generator=generator,
        )

    def _forward(self, batch: "Batch", targets: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if batch.fault is not None:
            raise batch.fault
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()
        }
        found: tuple[Tensor, Tensor | None, Tensor | None] = self.module(inputs, targets)
        return found

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss of a target token of the dev data."""
        assert self.dev is not None
        self.module.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self._batches(self.dev, self.together, 0, 0, torch.Generator()):
            loss, losses, _tasks = self._forward(batch, 1)
            sums += torch.tensor([float(loss if losses is None else losses.sum()), batch.targets])
        self.module.train()
        total, targets = self.processes.summed(sums.float().to(self.device)).tolist()
        return float(total / max(targets, 1.0))

    def _measure(self) -> bool:
        """Whether the dev loss is the lowest so far."""
        found, step = self.evaluate(), self.progress.step
        if self.processes.is_first:
            self.watcher.measured(step, found)
        best = math.isfinite(found) and (self.progress.best_loss is None or found < self.progress.best_loss)
        if best:
            self.progress = Progress(step=step, best_step=step, best_loss=found)
        return best


# -- data --------------------------------------------------------------------------------------------------------------


class StepBatches(Sequence[list[int]]):
    """Items of the micro-batches of one process, in order; as many micro-batches in every process.

    Optimiser step k takes the items from ``k * batch_size`` on. Where the last step has too few items for all
    processes, one that is left without gets the step's first, as ``-1 - item``: that item without targets, which takes
    part in collective operations, and adds nothing.
    """

    def __init__(self, items: int, batch_size: int, micro_batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.items, self.batch_size, self.micro_batch_size, self.rank = items, batch_size, micro_batch_size, rank
        self.together = micro_batch_size * processes

    def __len__(self) -> int:
        whole, rest = divmod(self.items, self.batch_size)
        return whole * (self.batch_size // self.together) + -(-rest // self.together)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        step, turn = divmod(number, self.batch_size // self.together)
        first = step * self.batch_size
        end = min(first + self.batch_size, self.items)
        mine = first + turn * self.together + self.rank * self.micro_batch_size
        return list(range(mine, min(mine + self.micro_batch_size, end))) or [-1 - first]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of one process."""

    inputs: dict[str, Any]  # arguments of the loss
    items: tuple[int, ...]  # numbers of its conversations in the data set
    targets: int = 0
    tokens: int = 0  # without padding
    images: int = 0  # conversations with one
    fault: RegionGPTError | None = None  # raised in the training process: here its message would hold a stack


@dataclass
class _MicroBatches(Dataset[Batch]):
    dataset: Dataset[Example]
    collate: Collate
    plan: StepBatches

    def __getitem__(self, number: int) -> Batch:
        numbers = self.plan[number]
        items = tuple(item for item in numbers if item >= 0)
        try:
            examples = [self.dataset[item if item >= 0 else -1 - item] for item in numbers]
        except RegionGPTError as error:
            return Batch(inputs={}, items=items, fault=error)
        if not items:
            examples = [{**each, "labels": torch.full_like(each["labels"], IGNORED)} for each in examples]
        inputs = self.collate(examples)
        return Batch(
            inputs=inputs,
            items=items,
            targets=targets_in(inputs),
            tokens=sum(len(each["input_ids"]) for each in examples),
            images=sum("pixel_values" in each or "vision_features" in each for each in examples),
        )


def targets_in(inputs: dict[str, Any]) -> int:
    """Number of target tokens of a batch, padded or packed: the first token of a row is never one."""
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


# -- model and optimiser -----------------------------------------------------------------------------------------------


class StageModule(nn.Module):
    """A model with its loss as one module, for what wraps it; with ``half``, matrices are multiplied in bfloat16."""

    def __init__(self, model: nn.Module, loss: Loss, half: bool = False) -> None:
        super().__init__()
        self.model, self.loss, self.half_products = model, loss, half

    def forward(self, inputs: dict[str, Any], items: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss; and where the model tells them, that of each target token and the task it belongs to."""
        inputs = dict(inputs)
        tasks, labels = inputs.pop("tasks", None), inputs["labels"]
        outputs: list[Any] = []
        half = torch.autocast(labels.device.type, torch.bfloat16, enabled=self.half_products)
        with half, self.model.register_forward_hook(lambda _, __, output: outputs.append(output)):
            loss = self.loss(self.model, inputs, items)
        losses = next((getattr(each, "target_losses", None) for each in outputs), None)
        if losses is None or tasks is None:
            return loss, losses, None
        return loss, losses, tasks[:, 1:][labels[:, 1:] != IGNORED]


def shard(module: StageModule) -> None:
    """Shard weights, gradients and optimiser over the processes, in place (FSDP2), one unit per decoder layer."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Weights of regions are exact areas, and stay float32; autocast decides on the rest.
    kind = torch.bfloat16 if module.half_products else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
    language: Any = getattr(module.model, "language_model", module.model)
    count = language.config.get_text_config().num_hidden_layers
    found = (part for part in language.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    if (layers := next(found, None)) is None:
        raise ConfigError(f"engine.sharding: {type(language).__name__} has no list of {count} layers; give 'ddp'")
    for part in (*layers, module):
        fully_shard(part, mp_policy=policy)


@torch.no_grad()
def put_together(module: nn.Module, first: bool) -> None:
    """Replace a module's shards by whole parameters in the first process, and by empty ones in the others."""
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


def make_optimizer(model: nn.Module, config: StageConfig) -> torch.optim.AdamW:
    """AdamW, whose groups differ in part of the model, learning rate and weight decay; only matrices decay."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            visual, decays = name.startswith(("refinement.", "connector.", "region_connector.")), parameter.ndim > 1
            part = "visual" if visual else "lora" if "lora_" in name else "language"
            rate = (config.visual_lr or config.lr) if visual else config.lr
            group = {"params": [], "name": part, "peak": rate, "weight_decay": config.weight_decay if decays else 0.0}
            groups.setdefault((part, decays), group)["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.98), eps=1e-8)


def rate_at(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step from 0: linear warm-up, then a cosine to zero."""
    warm = math.ceil(warmup_ratio * steps)
    if step < warm:
        return step / max(1, warm)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * ((step - warm) / max(1, steps - warm)))))

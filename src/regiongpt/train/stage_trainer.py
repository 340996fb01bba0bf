"""A thin layer over ``transformers.Trainer``: exact loss, exact order, whole checkpoints, one or many processes.

What is the same however a run is spread over micro-batches and processes, and however often it was stopped:

- step k takes the same conversations (:mod:`regiongpt.train.batches`);
- its loss is the sum over all target tokens of the step divided by their number;
- every parameter that is trained has a gradient, in every process.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regiongpt.errors import DataError
from regiongpt.train import state as states
from regiongpt.train.batches import Batch, StepBatches, load
from regiongpt.train.checkpoints import Checkpoints
from regiongpt.train.dataset import Example
from regiongpt.train.lesson import Lesson
from regiongpt.train.packing import Collate, targets_in
from regiongpt.train.processes import Sharded
from regiongpt.train.recipe import EngineConfig, StageConfig

log = logging.getLogger(__name__)


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trains one stage.

    Args:
        lesson: The model and its loss.
        dataset: As long as the whole run: one pass over it is the stage.
        dev: What the dev loss is measured on; None for none.
        collate: Makes a micro-batch.
        config: Hyper-parameters.
        engine: How it is computed.
        checkpoints: Where they go.
        facts: Of the run, kept in each checkpoint.
        sharded: The lesson where it is shared out among processes.
        tally: Takes the losses of micro-batches and the gradient norms; see :mod:`regiongpt.train.watch`.
        **options: Of ``transformers.Trainer``.
    """

    def __init__(
        self,
        lesson: Lesson,
        dataset: Dataset[Example],
        dev: Dataset[Example] | None,
        collate: Collate,
        config: StageConfig,
        engine: EngineConfig,
        checkpoints: Checkpoints,
        facts: dict[str, Any],
        sharded: Sharded | None = None,
        tally: Any = None,
        **options: Any,
    ) -> None:
        self.lesson, self.collate, self.config, self.engine = lesson, collate, config, engine
        self.checkpoints, self.facts, self.sharded, self.tally = checkpoints, facts, sharded, tally
        self.processes = checkpoints.processes
        self.waited = 0.0
        """Seconds that this process has waited for data."""
        self.asked_to_stop = False
        self.stopped = False
        """Whether training ended because it was asked to."""
        self._step: list[tuple[Batch, Tensor]] = []
        self._norm: Any = 0.0
        self.control: TrainerControl
        super().__init__(
            model=lesson,
            train_dataset=dataset,
            eval_dataset=dev,
            callbacks=[_Guard(self), *options.pop("callbacks", [])],
            **options,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    # -- data ----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> "DataLoader[Batch]":
        """Micro-batches of this process."""
        batches = StepBatches(
            len(self.train_dataset),
            self.config.batch_size,
            self.config.micro_batch_size,
            self.processes.number,
            self.processes.count,
        )
        return load(self.train_dataset, self.collate, batches, self.engine.workers, self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any
    ) -> tuple[list[Batch], Any]:
        """The micro-batches of an optimiser step, and the number of target tokens in all processes' together.

        Raises:
            RegionGPTError: A record cannot be used.
        """
        begun = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.waited += time.perf_counter() - begun
        for batch in batches:
            if batch.fault is not None:
                raise batch.fault
        self._step = []
        targets = sum((targets_in(batch.inputs) for batch in batches), torch.tensor(0)).to(device)
        return batches, self.processes.summed(targets).clamp_min(1)

    # -- model and optimiser -------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, whose groups differ in part of the model, learning rate and weight decay."""
        trained = self.lesson.model
        decayed = set(self.get_decay_parameter_names(trained))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                visual = name.startswith(("refinement.", "connector."))
                part = "visual" if visual else "lora" if "lora_" in name else "language"
                groups.setdefault((part, name in decayed), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "name": part,
                    "lr": (self.config.visual_lr or self.config.lr) if part == "visual" else self.config.lr,
                    "weight_decay": self.config.weight_decay if decays else 0.0,
                }
                for (part, decays), parameters in groups.items()
            ],
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.sharded is None:  # sharding has moved each part as it came
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        return model if self.sharded is None else self.sharded

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.sharded is None:
            return super()._clip_grad_norm(model)
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.tally is not None:
            self.tally.norm(self._norm)
        return self._norm

    # -- a step --------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a micro-batch; processes average gradients, of which the sum is wanted."""
        model.train()
        loss: Tensor
        loss, losses, tasks = model(self._prepare_inputs(inputs.inputs), num_items_in_batch)
        self.accelerator.backward(loss * self.processes.count)
        loss = loss.detach()
        self._step.append((inputs, loss))
        if self.tally is not None:
            self.tally.add(loss, losses, tasks, examples=len(inputs.items), tokens=inputs.tokens, images=inputs.images)
        return loss * self.processes.count

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted here: :mod:`regiongpt.train.watch` does, from the numbers of tokens and images."""
        return 0

    def check_step(self) -> None:
        """What all processes have to agree on before the optimiser's step: that it is sound, and whether to stop after.

        Raises:
            DataError: A loss or the gradient is not finite. Nothing of the step is kept.
        """
        sound = torch.stack([loss for _, loss in self._step]).isfinite().all() & torch.as_tensor(self._norm).isfinite()
        flags = torch.stack([(~sound).float(), torch.tensor(float(self.asked_to_stop), device=sound.device)])
        failed, asked = self.processes.summed(flags.to(self.args.device)).tolist()
        self.asked_to_stop = asked > 0
        if failed:
            self._refuse_step()

    def _refuse_step(self) -> None:
        mine = [(batch.items, float(loss)) for batch, loss in self._step]
        everyones = [each for part in self.processes.gathered(mine) for each in part]
        wrong = [each for each in everyones if not torch.tensor(each[1]).isfinite()] or everyones
        items = sorted(item for batch, _ in wrong for item in batch)
        name = getattr(self.train_dataset, "name_of", lambda item: f"item {item}")
        newest = self.checkpoints.newest()
        raise DataError(
            f"{self.facts['stage']}, step {self.state.global_step + 1}: expected a finite loss and gradient, got "
            f"a loss of {', '.join(f'{loss:g}' for _, loss in wrong[:4])} and a gradient of {float(self._norm):g}; "
            f"nothing of this step was kept, and the last good checkpoint is "
            f"{newest or 'the one that the stage began with'}; it came of the records "
            f"{', '.join(name(item) for item in items)}; look at them with `regiongpt inspect`, and if they are sound "
            "lower the learning rate"
        )

    # -- the dev loss --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss of a target token of the dev data, on average."""
        micro, processes = self.config.micro_batch_size, self.processes
        batches = StepBatches(len(self.eval_dataset), micro * processes.count, micro, processes.number, processes.count)
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in load(self.eval_dataset, self.collate, batches, 0, self.args.device):
            if batch.fault is not None:
                raise batch.fault
            loss, losses, _tasks = model(self._prepare_inputs(batch.inputs), 1)
            sums += torch.stack([(loss if losses is None else losses.sum()).cpu(), targets_in(batch.inputs)])
        model.train()
        total, targets = processes.summed(sums.float().to(self.args.device)).tolist()
        metrics = {"eval_loss": total / max(targets, 1.0)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = bool(super()._determine_best_metric(metrics, trial))
        self.control.should_save |= best
        return best

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        def fill(folder: Path) -> None:
            states.save(folder, self.lesson.model, self.optimizer, self.lr_scheduler, self.facts, self.processes)
            if self.processes.is_first:
                self.state.save_to_json(str(folder / states.TRAINER_STATE))

        self.checkpoints.write(self.state.global_step, fill, self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: model and optimiser come together, once they are where they are trained."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states.load(Path(checkpoint), self.lesson.model, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states.load_random_state(Path(checkpoint), self.processes)

    def load_best(self) -> None:
        """Puts back the weights that had the lowest dev loss, where those are not the last."""
        best = self.state.best_global_step
        if best and best != self.state.global_step:
            path = self.checkpoints.path(best)
            if not self.processes.from_first(path.is_dir):
                log.warning("%s: expected the best checkpoint, found none; the last weights are kept", path)
                return
            if self.processes.is_first:
                value = self.state.best_metric
                log.info("the lowest dev loss, %.4f, was that of step %d; its weights are taken", value, best)
            states.load_model(path, self.lesson.model)


class _Guard(TrainerCallback):  # type: ignore[misc]
    """Stops after a step that is unsound, or that SIGTERM has come in."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.check_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = self.trainer.eval_dataset is not None
        elif self.trainer.asked_to_stop:
            self.trainer.stopped = control.should_save = control.should_training_stop = True

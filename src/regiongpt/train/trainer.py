"""A thin layer over ``transformers.Trainer``: loss over global target tokens, a fixed order, logs with time left."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regiongpt.train.config import StageConfig

log = logging.getLogger(__name__)


Loss = Callable[[Any, dict[str, Any], Any], torch.Tensor]
"""Of a model, a batch, and the number of target tokens in the whole optimiser step."""


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trains by a given loss in the order of the data set: the data set itself shuffles, from the seed and the epoch.

    Args:
        loss: Takes the model, a batch and the number of target tokens in the optimiser step.
        visual_lr: Learning rate of all that is not the language model.
        **options: Of ``transformers.Trainer``.
    """

    def __init__(self, loss: Loss, visual_lr: float, **options: Any) -> None:
        self.loss, self.visual_lr = loss, visual_lr
        super().__init__(**options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The given loss."""
        return self.loss(model, inputs, num_items_in_batch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW whose groups differ in learning rate and weight decay."""
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                visual = name.startswith(("refinement.", "connector."))
                groups.setdefault((visual, name in decayed), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": self.visual_lr if visual else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (visual, decays), parameters in groups.items()
            ],
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class _ProgressLog(TrainerCallback):  # type: ignore[misc]
    """One log line every few steps: loss, learning rate, examples a second, minutes left."""

    def __init__(self, name: str, batch_size: int) -> None:
        self.name, self.batch_size = name, batch_size
        self.started, self.first = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs and state.global_step > self.first:
            seconds = (time.monotonic() - self.started) / (state.global_step - self.first)
            log.info(
                "%s: step %d of %d, loss %.4f, lr %.2e, gradient norm %.2f, %.1f examples a second, %.0f min left",
                self.name,
                state.global_step,
                state.max_steps,
                logs["loss"],
                logs["learning_rate"],
                logs["grad_norm"],
                self.batch_size / seconds,
                (state.max_steps - state.global_step) * seconds / 60,
            )


def run_stage(
    name: str,
    model: torch.nn.Module,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    loss: Loss,
    config: StageConfig,
    folder: Path,
    seed: int,
) -> None:
    """Optimises the parameters that require gradients, going on from the newest checkpoint in the folder.

    Args:
        name: Name in the log.
        model: Whose parameters that require gradients are trained.
        dataset: As long as the whole run: one pass over it is the stage.
        collate: Makes a batch.
        loss: A sum over targets, divided by the number of them in the whole optimiser step.
        config: Hyper-parameters.
        folder: Checkpoints of this stage.
        seed: Seed of dropout; the data set has its own.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.log_steps,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = StageTrainer(
        loss,
        config.visual_lr or config.lr,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[_ProgressLog(name, config.batch_size)],
    )
    trainer.remove_callback(PrinterCallback)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=_newest_whole(folder))


def _newest_whole(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; those that a kill has cut short are removed.

    ``trainer_state.json`` is the last file of a checkpoint.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return str(checkpoint)
        except (OSError, ValueError):
            log.warning("%s was not written to its end; going on from the one before", checkpoint)
            shutil.rmtree(checkpoint)
    return None

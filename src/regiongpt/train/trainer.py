"""One stage of training: from its options to the weights that came of it, in as many processes as were started.

:mod:`regiongpt.train.stage_trainer` has the steps, :mod:`regiongpt.train.watch` what is seen of them.
"""

import atexit
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from regiongpt.environment import launched
from regiongpt.errors import ConfigError
from regiongpt.train import state as states
from regiongpt.train.checkpoints import Checkpoints
from regiongpt.train.dataset import Example
from regiongpt.train.lesson import Lesson, Loss, decoder_layers
from regiongpt.train.packed_attention import require_packable, units_on_cpu
from regiongpt.train.packing import Collate, PackedCollate, width_cost
from regiongpt.train.processes import Processes, Sharded, disconnect, put_together, refuse_outer_sharding
from regiongpt.train.recipe import EngineConfig, StageConfig, WatchConfig
from regiongpt.train.stage_trainer import StageTrainer
from regiongpt.train.watch import Cost, Watch
from regiongpt.train.watch_answers import Watched

log = logging.getLogger(__name__)

STOPPED_BY_SIGTERM = 128 + signal.SIGTERM
"""Exit code of a run that was asked to stop and has saved first."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""In which matrices are multiplied, by the recipe's name."""


def run_stage(
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
    resume: str = "auto",
    processor: Any = None,
    watched: Sequence[Watched] = (),
    cost: Cost | None = None,
) -> StageTrainer:
    """Optimises the parameters that require gradients, in as many processes as were started together.

    Args:
        name: Of the stage, in the log and in its checkpoints.
        model: Whose parameters that require gradients are trained. Where it was sharded, the first process has it whole
            afterwards, and the others have it without content.
        dataset: As long as the whole run: one pass over it is the stage. Where it has ``name_of(item)``, a bad step is
            reported by those names.
        collate: Makes a padded batch.
        loss: A sum over targets, divided by the number of them in the whole optimiser step.
        config: Hyper-parameters.
        folder: Checkpoints of this stage.
        seed: Seed of dropout; the data set has its own.
        engine: How it is computed; plainly by default.
        watch: How many checkpoints are kept, and how often the dev loss is measured.
        dev: What the dev loss is measured on. The weights with the lowest are those that the model has in the end.
        resume: ``auto`` goes on from the newest whole checkpoint in the folder, and begins where there is none;
            ``never`` begins; anything else is the folder of the checkpoint to go on from.
        processor: Of the model, to ask it about ``watched``.
        watched: Regions that it is asked about now and then.
        cost: What the stage computes, to report its utilisation.

    Returns:
        The trainer, whose work is done.

    Raises:
        ConfigError: Options do not go with each other, with the number of processes, or with the checkpoint.
        CheckpointError: The checkpoint given is none, or one of other tensors.
        DataError: A record cannot be used, or a loss is not finite: training has stopped before that step.
        SystemExit: 143, after SIGTERM: what was learnt is in a checkpoint.
    """
    engine, watch = engine or EngineConfig(), watch or WatchConfig()
    refuse_outer_sharding()
    processes = Processes()
    arguments = _arguments(config, watch, folder, seed, dev)
    together = config.micro_batch_size * processes.count
    if config.batch_size % together:
        raise ConfigError(
            f"{name}.batch_size: expected a multiple of {together}, since {processes.count} processes take "
            f"micro_batch_size = {config.micro_batch_size} each, got {config.batch_size}"
        )
    arguments.gradient_accumulation_steps = config.batch_size // together
    checkpoints = Checkpoints(folder, watch.keep, processes)
    decisive = {key: value for key, value in config.model_dump().items() if key not in _FREE}
    facts = states.facts_of(name, {**decisive, "items": len(cast(Any, dataset)), "seed": seed}, model)
    begin = (
        None if resume == "never" else checkpoints.newest() if resume == "auto" else checkpoints.chosen(Path(resume))
    )
    if begin is not None:
        states.require_same(begin, facts)
        _tell(processes, "%s: going on from %s", name, begin)
    if engine.packing:
        collate = _packed(collate, model, engine)
    watcher = Watch(
        name,
        folder,
        log_steps=config.log_steps,
        answer_steps=watch.answer_steps,
        watched=watched,
        processor=processor,
        tensorboard=watch.tensorboard,
        cost=cost,
        precision=PRECISIONS[engine.precision],
    )
    lesson, sharded = _prepare(model, loss, engine, processes)
    trainer = StageTrainer(
        lesson,
        dataset,
        dev if watch.dev_steps else None,
        collate,
        config,
        engine,
        checkpoints,
        facts,
        sharded,
        watcher.tally,
        args=arguments,
        callbacks=[watcher],
    )
    processes.wait()
    with _stops_on_sigterm(trainer), closing(watcher), _packing(model, engine, arguments.device):
        trainer.train(resume_from_checkpoint=str(begin) if begin else None)
    if trainer.stopped:
        _tell(processes, "%s: stopped by SIGTERM after step %d; run again to go on", name, trainer.state.global_step)
        raise SystemExit(STOPPED_BY_SIGTERM)
    trainer.load_best()
    if sharded is not None:
        put_together(model, processes.is_first)
    return trainer


def _tell(processes: Processes, message: str, *values: Any) -> None:
    """One log line, not one from each process."""
    if processes.is_first:
        log.info(message, *values)


_FREE = ("micro_batch_size", "save_steps", "log_steps")
"""Settings of a stage that may change from one run to the one that goes on from it."""


def _arguments(
    config: StageConfig, watch: WatchConfig, folder: Path, seed: int, dev: Dataset[Example] | None
) -> TrainingArguments:
    """What ``transformers.Trainer`` is told; making it connects the processes."""
    measures = dev is not None and watch.dev_steps > 0
    folder.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=config.micro_batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps,
        logging_steps=config.log_steps,
        logging_first_step=True,
        eval_strategy="steps" if measures else "no",
        eval_steps=watch.dev_steps if measures else None,
        metric_for_best_model="loss" if measures else None,
        greater_is_better=False if measures else None,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
        use_cpu=launched() > 1 and not torch.cuda.is_available(),
    )
    if arguments.world_size > 1:
        atexit.register(disconnect)
    if arguments.n_gpu > 1:
        # DataParallel would split the batch of one process over them; each GPU has a process of its own here.
        log.info("%d GPUs are here and one is used; start with `torchrun --nproc-per-node N`", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def _packed(collate: Collate, model: Any, engine: EngineConfig) -> Collate:
    """The collate that packs; text in windows of one length is full already, and stays as it is.

    Raises:
        ConfigError: The language model cannot be told who sees whom.
    """
    if not hasattr(model, "embed"):
        return collate
    text = model.config.text_config
    require_packable(text)
    longest = engine.pack_length or getattr(text, "max_position_embeddings", None) or 1 << 30
    return PackedCollate(collate, longest, width_cost(text))


def _prepare(model: nn.Module, loss: Loss, engine: EngineConfig, processes: Processes) -> tuple[Lesson, Sharded | None]:
    precision = PRECISIONS[engine.precision]
    if engine.gradient_checkpointing:
        # Newer releases of transformers call it by another name, and warn at the old one.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or cast(Any, model).gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if engine.compile:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    lesson = Lesson(model, loss, precision)
    if engine.sharding == "fsdp" and processes.count > 1:
        return lesson, Sharded(lesson, decoder_layers(model), precision)
    return lesson, None


@contextmanager
def _packing(model: Any, engine: EngineConfig, device: torch.device) -> Iterator[None]:
    """Attention for packed rows; compiled layers take masks, since each batch has other units."""
    if engine.packing and not engine.compile and hasattr(model, "embed"):
        with units_on_cpu(model.language_model, device):
            yield
    else:
        yield


@contextmanager
def _stops_on_sigterm(trainer: StageTrainer) -> Iterator[None]:
    """SIGTERM ends training after the step at hand, with a checkpoint; outside the main thread, at once."""

    def ask(*_: Any) -> None:
        trainer.asked_to_stop = True

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

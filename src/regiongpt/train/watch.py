"""Watching a stage while it learns: progress, a log that survives interruptions, answers on a few fixed regions.

Nothing here changes what is learnt: losses are the same to the bit, watched or not.
"""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regiongpt.data.progress import Meter, clock, rounded
from regiongpt.train.processes import Processes
from regiongpt.train.watch_answers import Watched, ask, check_whole, draw, unwrapped
from regiongpt.train.watch_cost import peak_flops
from regiongpt.train.watch_log import ANSWERS, DEV, LOG, StepLog, open_events, require_tensorboard
from regiongpt.train.watch_tally import StepSums, Tally

log = logging.getLogger(__name__)


class Cost(Protocol):
    """What a stage computes."""

    def flops(self, step: StepSums) -> float:
        """Floating-point operations of a step, forward and backward, over all processes."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Writes down what a stage does.

    It is a callback of ``transformers.Trainer``, the same in every process; the trainer tells its :attr:`tally` what
    each micro-batch was. A line of ``log.jsonl`` is a step. Lines are written every few steps, and before every
    checkpoint, so that none is missing behind it; a run that goes on from a checkpoint first takes out the lines of the
    steps that it will do again.

    Args:
        name: Of the stage, in the log.
        folder: Of the stage.
        log_steps: Optimiser steps between two lines of the log for people, and between two writes.
        answer_steps: Optimiser steps between the answers; 0 for none.
        watched: What is asked.
        processor: Of the model, to ask with.
        tensorboard: Whether TensorBoard's files are written too.
        cost: What the stage computes, for the utilisation; None to leave it out.
        precision: In which it computes.
        bar: Whether progress is a line that keeps changing; by default on a terminal.

    Attributes:
        tally: What the micro-batches tell; see :class:`regiongpt.train.watch_tally.Tally`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        log_steps: int = 20,
        answer_steps: int = 0,
        watched: Sequence[Watched] = (),
        processor: Any = None,
        tensorboard: bool = False,
        cost: Cost | None = None,
        precision: torch.dtype = torch.float32,
        bar: bool | None = None,
    ) -> None:
        if tensorboard:
            require_tensorboard()
        self.tally = Tally()
        self.name, self.folder, self.log_steps = name, Path(folder), log_steps
        self.answer_steps, self.watched, self.processor = answer_steps if watched else 0, list(watched), processor
        self.tensorboard, self.cost, self.precision = tensorboard, cost, precision
        self.bar = sys.stderr.isatty() if bar is None else bar
        self._log, self._dev, self._answers = (StepLog(self.folder / name) for name in (LOG, DEV, ANSWERS))
        self._processes, self._open = Processes(), ExitStack()
        self._events: Any = None
        self._meter: StepMeter | None = None
        self._peak = 0.0
        self._pending: list[dict[str, Any]] = []
        self._untold: list[dict[str, Any]] = []
        self._rates: dict[str, float] = {}
        self._answered = -1
        self._mark = self._began = time.perf_counter()
        self._wait = 0.0

    @property
    def _writes(self) -> bool:
        return self._processes.is_first

    # -----------------------------------------------------------------------------------------------------------------
    # What the trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Opens the logs, without what lies beyond the step that is gone on from; asks for the first time."""
        if self.answer_steps:
            check_whole(given["model"])
        if self._writes:
            step = state.global_step
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log.cut(step)
            self._dev.cut(step)
            answered = self._answers.cut(step)
            self._answered = max((line["step"] for line in answered), default=-1)
            if self.tensorboard:
                self._events = open_events(self.folder, step)
                self._open.callback(self._events.close)
            if self.answer_steps:
                draw(self.watched, self.folder)
            if self.cost is not None:
                self._peak = peak_flops(next(given["model"].parameters()).device, self.precision)
            if self.bar:
                self._meter = self._open.enter_context(StepMeter(self.name, step, state.max_steps))
        if self.answer_steps and state.global_step == 0:
            self._ask(given["model"], 0)
        self._mark = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """The batch has come: what has passed until now was waiting for it."""
        self._wait = time.perf_counter() - self._mark

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Notes the learning rates of the step, before the schedule goes on to those of the next."""
        self._rates = learning_rates(given["optimizer"].param_groups)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Ends the step's line; writes the lines, and asks, when it is time to."""
        self.tally.close()
        now = time.perf_counter()
        self._pending.append(
            {
                "step": state.global_step,
                "of": state.max_steps,
                "epoch": state.epoch,
                "lr": self._rates,
                "seconds": now - self._mark,
                "wait": self._wait,
            }
        )
        if self._meter is not None:
            self._meter.step = state.global_step
        last = control.should_training_stop or state.global_step >= state.max_steps
        tells = last or control.should_log or state.global_step % self.log_steps == 0
        if tells or control.should_save:
            self._flush()
        if tells:
            self._tell(state)
        if self.answer_steps and state.global_step % self.answer_steps == 0:
            self._ask(given["model"], state.global_step)
        self._mark = time.perf_counter()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **given: Any,
    ) -> None:
        """Writes what was measured on dev data, and the lines before it: a checkpoint may follow at once."""
        self._flush()
        if self._writes and metrics:
            found = {name.removeprefix("eval_"): value for name, value in metrics.items() if name != "epoch"}
            self._dev.write([{"step": state.global_step, **found}])
            if self._events is not None:
                for name, value in found.items():
                    self._events.add_scalar(f"dev/{name}", value, state.global_step)
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The time that a checkpoint took is no step's."""
        if self._pending:
            self._flush()
        self._mark = time.perf_counter()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Writes what is left; asks for the last time, unless the run was stopped before its end."""
        self._flush()
        if self.answer_steps and state.global_step >= state.max_steps:
            self._ask(given["model"], state.global_step)
        self.close()

    def close(self) -> None:
        """Ends the line of progress and closes the files; after an error, what is not yet written is, if it can be."""
        if self._pending and self._processes.count == 1:  # of several, the others may never come to the sum
            with suppress(RuntimeError):
                self._flush()
        self._open.close()
        self._meter = self._events = None

    # -----------------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Writes the lines of the steps since the last time; every process takes part in the sums."""
        lines, self._pending = self._pending, []
        sums = self.tally.take()
        if not self._writes or not lines:
            return
        for line, step in zip(lines, sums, strict=True):
            line |= self._figures(step, line["seconds"])
        self._log.write(lines)
        self._untold += lines
        if self._events is not None:
            self._to_tensorboard(lines)

    def _tell(self, state: TrainerState) -> None:
        """Says what has been written since the last time, to whoever looks on."""
        lines, self._untold = self._untold, []
        if not lines:
            return
        text = summary(lines)
        if self._meter is not None:
            self._meter.note = text
            return
        left = (state.max_steps - state.global_step) * sum(line["seconds"] for line in lines) / len(lines)
        log.info("%s: step %d of %d, %s, %s left", self.name, state.global_step, state.max_steps, text, clock(left))

    def _figures(self, step: StepSums, seconds: float) -> dict[str, Any]:
        found: dict[str, Any] = {
            "loss": step.loss,
            "tasks": {name: {"loss": total / n, "targets": n} for name, (total, n) in step.tasks.items()},
            "examples": step.examples,
            "tokens": step.tokens,
            "images": step.images,
            "targets": step.targets,
        }
        if step.grad_norm is not None:
            found["grad_norm"] = step.grad_norm
        if self.cost is not None and self._peak:
            peak = self._peak * self._processes.count
            found["mfu"] = self.cost.flops(step) / (seconds * peak)
        return found

    def _to_tensorboard(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            figures = {f"loss/{name}": each["loss"] for name, each in line["tasks"].items()}
            figures |= {f"lr/{name}": value for name, value in line["lr"].items()}
            figures |= {"loss/all": line["loss"], "speed/wait_share": line["wait"] / line["seconds"]}
            figures |= {f"speed/{name}_a_second": line[name] / line["seconds"] for name in ("tokens", "examples")}
            names = {"grad_norm": "gradient/norm", "mfu": "speed/model_flops_utilisation"}
            figures |= {names[name]: line[name] for name in names if name in line}
            for name, value in figures.items():
                self._events.add_scalar(name, value, line["step"])
        self._events.flush()

    def _ask(self, model: Any, step: int) -> None:
        """The first process asks; the others wait for it, lest they wait in the next step until time runs out."""
        if self._writes and step > self._answered:
            answers = ask(unwrapped(model), self.processor, self.watched)
            asked = [
                {"name": each.name, "question": each.question, "expected": each.expected, "answer": answer}
                for each, answer in zip(self.watched, answers, strict=True)
            ]
            self._answers.write([{"step": step, "answers": asked}])
            self._answered = step
            if self._events is not None:
                for number, each in enumerate(asked):
                    self._events.add_text(f"answer/{number}", f"{each['question']}\n\n{each['answer']}", step)
        self._processes.wait()


class StepMeter(Meter):
    """A line about the steps of a stage, which keeps changing, and which lines of the log do not run into.

    Args:
        name: Of the stage.
        step: That the run goes on from.
        steps: Of the whole stage.
        stream: Where the line goes; standard error by default.
    """

    def __init__(self, name: str, step: int, steps: int, stream: TextIO | None = None) -> None:
        super().__init__(name, "steps", stream=stream)
        self.first = self.step = step
        self.steps, self.note = steps, ""

    def __enter__(self) -> "StepMeter":
        super().__enter__()
        self._handlers = [
            each for each in logging.getLogger().handlers if getattr(each, "stream", None) is self._stream
        ]
        for handler in self._handlers:
            handler.addFilter(self._clear)
        return self

    def __exit__(self, *raised: Any) -> None:
        for handler in self._handlers:
            handler.removeFilter(self._clear)
        super().__exit__(*raised)

    def line(self) -> str:
        """What is shown at this moment."""
        done = self.step - self.first
        parts = [f"step {self.step:,} of {self.steps:,}"]
        if done:
            parts.append(f"{rounded(done / max(1e-9, self.seconds))} a second")
        parts += [self.note] if self.note else []
        if done:
            parts.append(f"{clock((self.steps - self.step) * self.seconds / done)} left")
        return f"{self._name}: {', '.join(parts)}"

    def _clear(self, record: logging.LogRecord) -> bool:
        with suppress(OSError, ValueError):
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        return True


def learning_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate of each group of parameters by the group's name; groups of one name share theirs."""
    return {str(group.get("name", f"group {number}")): float(group["lr"]) for number, group in enumerate(groups)}


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """The mean of some steps in words: loss, learning rate, gradient, speed."""
    seconds = sum(line["seconds"] for line in lines)
    last = lines[-1]
    rates = [f"{value:.2e}" for value in dict.fromkeys(last["lr"].values())]
    parts = [f"loss {sum(line['loss'] for line in lines) / len(lines):.4f}"]
    parts += [f"lr {' and '.join(rates)}"] if rates else []
    parts += [f"gradient norm {last['grad_norm']:.2f}"] if "grad_norm" in last else []
    for name in ("examples", "tokens"):
        parts.append(f"{rounded(sum(line[name] for line in lines) / seconds)} {name} a second")
    if "mfu" in last:
        parts.append(f"utilisation {sum(line['mfu'] * line['seconds'] for line in lines) / seconds:.0%}")
    return ", ".join(parts)

"""What a stage does while it trains: a log that survives interruptions, and answers about fixed regions.

Losses are the same to the bit, watched or not. Reading a number from a GPU waits for all its work, so sums stay on the
device and are read, over all processes, once for many steps.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from regiongpt.distributed import Processes
from regiongpt.errors import ConfigError, DataError
from regiongpt.model.modeling import RegionGPTForConditionalGeneration
from regiongpt.storage import reason, write_file, writing
from regiongpt.train.answers import Question, ask, draw
from regiongpt.train.costs import Costs, LayerCosts, language_costs, visual_costs
from regiongpt.train.dataset import TASKS
from regiongpt.train.known import peak_flops
from regiongpt.train.recipe import LoraConfig, WatchConfig

log = logging.getLogger(__name__)

LOG, DEV, ANSWERS, EVENTS = "log.jsonl", "dev.jsonl", "answers.jsonl", "tensorboard"
"""In a stage's folder: every step, measurements on dev data, answers about fixed regions; and TensorBoard's files."""

_LOSS, _EXAMPLES, _, _, _TARGETS, _SUMS = range(6)
_COUNTS = _SUMS + len(TASKS)


class Watch:
    """Writes what a stage does, a line of ``log.jsonl`` a step; the same calls come in every process.

    Lines are written every few steps, and before every checkpoint; a continued run first removes the lines of the
    steps that it will do again.

    Args:
        name: Name of the stage in the log.
        folder: Folder of the stage.
        processes: They train together.
        config: What is watched.
        log_steps: Optimiser steps between two lines of the log for people, and between two writes.
        questions: What is asked now and then, with the model's ``processor``.
        processor: Processor of the model.
        cost: FLOPs of the stage, for the utilisation; None to leave it out.
        precision: Precision that it computes in.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        processes: Processes,
        config: WatchConfig,
        log_steps: int,
        questions: Sequence[Question] = (),
        processor: Any = None,
        cost: "StageCost | None" = None,
        precision: str = "fp32",
    ) -> None:
        if config.tensorboard and find_spec("tensorboard") is None:
            raise ConfigError(
                "watch.tensorboard: TensorBoard is not installed; `pip install '.[train]'`, or leave it out: "
                "log.jsonl holds the same numbers"
            )
        self.name, self.folder, self.processes, self.tensorboard = name, folder, processes, config.tensorboard
        self.log_steps, self.answer_steps = log_steps, config.answer_steps if questions else 0
        self.questions, self.processor, self.cost, self.precision = questions, processor, cost, precision
        self._log, self._dev, self._answers = (StepLog(folder / each) for each in (LOG, DEV, ANSWERS))
        self._events: Events | None = None
        self._bar: Any = None
        self._stack = ExitStack()
        self._peak = 0.0
        self._sums: list[Tensor] = []
        self._open: Tensor | None = None
        self._lines: list[dict[str, Any]] = []
        self._untold: list[dict[str, Any]] = []

    def start(self, model: Any, step: int, steps: int) -> None:
        """Open the logs, without what lies beyond the step that is continued from; ask for the first time."""
        self.model, self.steps = model, steps
        if self.processes.is_first:
            for each in (self._log, self._dev, self._answers):
                each.cut(step)
            if self.tensorboard:
                self._events = Events(self.folder / EVENTS, step)
            if self.answer_steps:
                with writing(self.folder):
                    draw(self.questions, self.folder)
            if self.cost is not None:
                self._peak = self.processes.count * peak_flops(next(model.parameters()).device, self.precision)
            if sys.stderr.isatty():
                shown: Any = {"unit": " steps", "leave": False, "dynamic_ncols": True}
                self._bar = self._stack.enter_context(tqdm(desc=self.name, total=steps, initial=step, **shown))
                self._stack.enter_context(logging_redirect_tqdm())
        if step == 0:
            self._ask(0)

    def add(self, loss: Tensor, losses_N: Tensor | None, tasks_N: Tensor | None, counts: tuple[int, int, int]) -> None:
        """Add a micro-batch of the step at hand; nothing is read from the device.

        Args:
            loss: This process's share of the step's loss.
            losses_N: (N,) cross-entropy of each target, not divided by anything; None if it is not known.
            tasks_N: (N,) place in :data:`TASKS` of each target, -1 for none.
            counts: Number of conversations, of tokens without padding, and of images.
        """
        kind = torch.float32 if loss.device.type == "mps" else torch.float64
        if self._open is None:
            self._open = torch.zeros(_COUNTS + len(TASKS), dtype=kind, device=loss.device)
        row = self._open
        row[_LOSS] += loss.to(kind)
        for place, count in enumerate(counts, _EXAMPLES):
            row[place] += count
        if losses_N is not None:
            row[_TARGETS] += len(losses_N)
        if losses_N is not None and tasks_N is not None:
            # A product, for scattered sums on a GPU come out a little different each time.
            chosen = tasks_N.to(loss.device)[None] == torch.arange(len(TASKS), device=loss.device)[:, None]
            row[_SUMS:_COUNTS] += chosen.to(kind) @ losses_N.to(kind)
            row[_COUNTS:] += chosen.sum(1)

    def step(
        self, step: int, rates: Mapping[str, float], norm: float, seconds: float, wait: float, *, saves: bool = False
    ) -> None:
        """End a step; write and ask, when it is time to.

        Args:
            step: Optimiser steps done, this one included.
            rates: Learning rates by the names of their groups.
            norm: Norm of the gradient before clipping.
            seconds: Time of the step.
            wait: How much of it passed until its data had come.
            saves: Whether a checkpoint follows, or the end.
        """
        assert self._open is not None
        self._sums.append(self._open)
        self._open = None
        line = {"step": step, "of": self.steps, "epoch": step / self.steps, "lr": dict(rates)}
        self._lines.append({**line, "seconds": seconds, "wait": wait, "grad_norm": norm})
        tells = step in (1, self.steps) or step % self.log_steps == 0
        if tells or saves:
            self._flush()
        if self._bar is not None:
            self._bar.update()
        if tells and self._untold:
            lines, self._untold = self._untold, []
            if self._bar is not None:
                self._bar.set_postfix_str(summary(lines))
            else:
                left = (self.steps - step) * sum(each["seconds"] for each in lines) / len(lines)
                time_left = tqdm.format_interval(left)
                log.info("%s: step %d of %d, %s, %s left", self.name, step, self.steps, summary(lines), time_left)
        if self.answer_steps and (step % self.answer_steps == 0 or step == self.steps):
            self._ask(step)

    def measured(self, step: int, loss: float) -> None:
        """Write the dev loss, and the lines before it: a checkpoint may follow at once."""
        self._flush()
        if self.processes.is_first:
            self._dev.write([{"step": step, "loss": loss}])
            if self._events is not None:
                self._events.write(step, {"dev/loss": loss})

    def close(self) -> None:
        """Close everything; after an error, what is not yet written is, if it can be."""
        if self._lines and self.processes.count == 1:  # of several, the others may never come to the sum
            with suppress(RuntimeError):
                self._flush()
        self._stack.close()

    def _flush(self) -> None:
        """Write the lines of the steps since the last time; every process takes part in the sums."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        rows, self._sums = self.processes.summed(torch.stack(self._sums)).tolist(), []
        if not self.processes.is_first:
            return
        for line, row in zip(lines, rows, strict=True):
            tasks = zip(TASKS, row[_SUMS:_COUNTS], row[_COUNTS:], strict=True)
            line["loss"] = row[_LOSS]
            line["tasks"] = {name: {"loss": total / n, "targets": round(n)} for name, total, n in tasks if n}
            for place, name in enumerate(("examples", "tokens", "images", "targets"), _EXAMPLES):
                line[name] = round(row[place])
            if self.cost is not None:
                line["mfu"] = self.cost.flops(line) / (line["seconds"] * self._peak)
        self._log.write(lines)
        self._untold += lines
        if self._events is None:
            return
        for line in lines:
            found = {f"loss/{name}": each["loss"] for name, each in line["tasks"].items()}
            found |= {f"lr/{name}": value for name, value in line["lr"].items()}
            found |= {"loss/all": line["loss"], "gradient/norm": line["grad_norm"]}
            found |= {f"speed/{name}_a_second": line[name] / line["seconds"] for name in ("tokens", "examples")}
            found["speed/wait_share"] = line["wait"] / line["seconds"]
            found |= {"speed/model_flops_utilisation": line["mfu"]} if "mfu" in line else {}
            self._events.write(line["step"], found)

    def _ask(self, step: int) -> None:
        """The first process asks; the others wait for it, lest they wait in the next step until time runs out."""
        if not self.answer_steps:
            return
        if self.processes.is_first and step > self._answers.last:
            answers = ask(self.model, self.processor, self.questions)
            asked = [
                {"name": each.name, "question": each.text, "expected": each.expected, "answer": answer}
                for each, answer in zip(self.questions, answers, strict=True)
            ]
            self._answers.write([{"step": step, "answers": asked}])
            if self._events is not None:
                texts = {f"answer/{n}": f"{each['question']}\n\n{each['answer']}" for n, each in enumerate(asked)}
                self._events.write(step, texts)
        self.processes.wait()


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """The mean of some steps in words: loss, learning rate, gradient, speed."""
    seconds, last = sum(line["seconds"] for line in lines), lines[-1]
    parts = [
        f"loss {sum(line['loss'] for line in lines) / len(lines):.4f}",
        f"lr {' and '.join(f'{value:.2e}' for value in dict.fromkeys(last['lr'].values()))}",
        f"gradient norm {last['grad_norm']:.2f}",
    ]
    for name in ("examples", "tokens"):
        rate = sum(line[name] for line in lines) / seconds
        parts.append(f"{rate:.1f} {name} a second" if rate < 10 else f"{rate:,.0f} {name} a second")
    if "mfu" in last:
        parts.append(f"utilisation {sum(line['mfu'] * line['seconds'] for line in lines) / seconds:.0%}")
    return ", ".join(parts)


# -- files -------------------------------------------------------------------------------------------------------------


class StepLog:
    """A file of JSON lines, each of a step, of which ``last`` is the last one, -1 if there is none."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, -1
        self._waiting: list[str] = []
        self._told = False

    def cut(self, step: int) -> None:
        """Remove what lies beyond a step, which will be done again, and a torn last line."""
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        self.last = max((line["step"] for line in kept), default=-1)
        write_file(self.path, "".join(map(_line, kept)))

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, all or none; what a full disk does not take is written with the next ones."""
        lines = list(lines)
        if not lines:
            return
        self.last = max([self.last, *(line["step"] for line in lines)])
        self._waiting += map(_line, lines)
        data = "".join(self._waiting).encode()
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError("the disk is full")
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            if not self._told:
                log.warning("%s: cannot be written at the moment, and is tried again: %s", self.path, reason(error))
            self._told = True
            return
        self._waiting, self._told = [], False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that a kill has cut short; none if there is no file.

    Raises:
        DataError: It cannot be read, or a line before the last is not what was written.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None
    found = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip("\0 \r"):
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError("no step")
        except (ValueError, RecursionError):
            if number == len(lines):  # no line break behind it
                break
            raise DataError(
                f"{path}, line {number}: expected a line of JSON with its step, got {line[:60]!r}; mend or delete it"
            ) from None
        found.append(values)
    return found


def _line(values: Mapping[str, Any]) -> str:
    """JSON; NaN and infinity, which it has no word for, as strings."""
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        named = json.loads(json.dumps(values, ensure_ascii=False), parse_constant=lambda name: str(float(name)))
        return json.dumps(named, ensure_ascii=False) + "\n"


class Events:
    """TensorBoard's file; it hides what an interrupted run has written beyond a step.

    TensorBoard's own writer has a thread, in which a full disk ends with a traceback.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer: Any = RecordWriter(self._path.open("wb"))
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write numbers and texts of a step by their names; after an error nothing more is written."""
        from torch.utils.tensorboard import summary

        make: Any = summary
        for name, value in values.items():
            self._add(step=step, summary=make.text(name, value) if isinstance(value, str) else make.scalar(name, value))

    def _add(self, **values: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._writer is not None:
            try:
                self._writer.write(Event(wall_time=time.time(), **values).SerializeToString())
                self._writer.flush()
            except OSError as error:
                log.warning("%s: cannot be written, and is left: %s", self._path, reason(error))
                self._writer = None


# -- utilisation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """FLOPs of a stage's steps, without padding, repeats, and regions (each a thousandth of its image)."""

    costs: Costs

    @classmethod
    def of(
        cls,
        config: Any,
        *,
        trained: bool,
        reads: bool = True,
        sees: bool = True,
        cached: bool = False,
        lora: LoraConfig | None = None,
    ) -> "StageCost":
        """FLOPs of a stage.

        Args:
            config: Configuration of RegionGPT, or of a language model that sees nothing.
            trained: Whether the language model learns.
            reads: Whether it runs.
            sees: Whether refinement and connector run.
            cached: Whether the tower has been run beforehand.
            lora: The adapters, where they learn in place of the language model.
        """
        visual: dict[str, float] = {}
        if sees:
            with torch.device("meta"):
                visual = visual_costs(RegionGPTForConditionalGeneration(config), with_tower=not cached)
        text = config.text_config if sees else config
        layers, head = language_costs(text, trained, lora) if reads else (LayerCosts(), 0.0)
        return cls(costs=Costs(**visual, layers=layers, head=head))

    def flops(self, step: Mapping[str, Any]) -> float:
        """FLOPs of a step by its line of the log, forward and backward, over all processes."""
        visual = step["images"] * (self.costs.tower + self.costs.image)
        rows = step["examples"] * self.costs.layers.row(step["tokens"] / step["examples"]) if step["examples"] else 0.0
        return float(visual + rows + step["targets"] * self.costs.head)

"""Logs of a stage, written so that interruptions lose nothing; and the report of a run."""

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from jinja2 import UndefinedError
from markupsafe import Markup
from torch import Tensor
from tqdm import tqdm

from regiongpt.data.shards import Mixture
from regiongpt.environment import commit, launched, machine, versions
from regiongpt.errors import ConfigError, DataError, RegionGPTError
from regiongpt.report import Curve, line_chart, short, write_page
from regiongpt.storage import read_json, reason, write_file, write_json, writing
from regiongpt.train.dataset import TASKS
from regiongpt.train.recipe import Recipe, WatchConfig

log = logging.getLogger(__name__)

LOG, DEV, EVENTS = "log.jsonl", "dev.jsonl", "tensorboard"
"""In a stage's folder: every step, measurements on dev data; and TensorBoard's files."""
PAGE, RUN = "report.html", "run.json"
"""In a run's folder: its page; its recipe, data and starts."""

_PLAIN: Final = ("loss", "examples", "tokens", "images", "targets")


def tally(loss: Tensor, losses_N: Tensor | None, tasks_N: Tensor | None, counts: tuple[int, int, int]) -> Tensor:
    """A micro-batch's part of its step's log line, on the loss's device: :func:`read_tally` reads the sum.

    Args:
        loss: Its share of the step's loss.
        losses_N: (N,) cross-entropy of each target, not divided by anything; None if it is not known.
        tasks_N: (N,) place in :data:`TASKS` of each target, -1 for none.
        counts: Number of conversations, tokens without padding, and images.
    """
    kind = torch.float32 if loss.device.type == "mps" else torch.float64
    row = torch.zeros(len(_PLAIN) + 2 * len(TASKS), dtype=kind, device=loss.device)
    row[0] = loss.to(kind)
    row[1:5] = row.new_tensor([*counts, 0 if losses_N is None else len(losses_N)])
    if losses_N is not None and tasks_N is not None:
        # A product, for scattered sums on a GPU come out a little different each time.
        chosen = tasks_N.to(loss.device)[None] == torch.arange(len(TASKS), device=loss.device)[:, None]
        row[5:] = torch.cat([chosen.to(kind) @ losses_N.to(kind), chosen.sum(1)])
    return row


def read_tally(row: Sequence[float]) -> dict[str, Any]:
    """The part of a step's line that :func:`tally` counts."""
    sums = zip(TASKS, row[len(_PLAIN) :], row[len(_PLAIN) + len(TASKS) :], strict=False)
    tasks = {name: {"loss": total / n, "targets": round(n)} for name, total, n in sums if n}
    return {"loss": row[0], "tasks": tasks, **{name: round(row[place]) for place, name in enumerate(_PLAIN) if place}}


class Watch:
    """Writes the log of a stage: a line of ``log.jsonl`` per step, and every ``log_steps`` one for people."""

    def __init__(self, name: str, folder: Path, config: WatchConfig, log_steps: int) -> None:
        if config.tensorboard and find_spec("tensorboard") is None:
            raise ConfigError("watch.tensorboard: TensorBoard is not installed; run: pip install '.[train]'")
        self.name, self.folder, self.tensorboard, self.log_steps = name, folder, config.tensorboard, log_steps
        self._log, self._dev = StepLog(folder / LOG), StepLog(folder / DEV)
        self._events: Events | None = None
        self._untold: list[dict[str, Any]] = []

    def start(self, step: int) -> None:
        """Open the logs and remove lines after the step to resume from."""
        kept = [*self._log.cut(step), *self._dev.cut(step)]
        if self.tensorboard:
            self._events = Events(self.folder / EVENTS)
            for line in kept:
                self._events.write(line)

    def step(self, line: dict[str, Any]) -> None:
        """Write the line of a step."""
        self._write(self._log, line)
        self._untold.append(line)
        step, steps = line["step"], line["of"]
        if step in (1, steps) or step % self.log_steps == 0:
            lines, self._untold = self._untold, []
            left = tqdm.format_interval((steps - step) * sum(each["seconds"] for each in lines) / len(lines))
            log.info("%s: step %d of %d, %s, %s left", self.name, step, steps, summary(lines), left)

    def measured(self, step: int, loss: float) -> None:
        """Write the dev loss after a step."""
        self._write(self._dev, {"step": step, "loss": loss})

    def _write(self, file: "StepLog", line: dict[str, Any]) -> None:
        file.write(line)
        if self._events is not None:
            self._events.write(line)


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """The mean of some steps as text: loss, learning rate, gradient, speed."""
    seconds, last = sum(line["seconds"] for line in lines), lines[-1]
    parts = [
        f"loss {sum(line['loss'] for line in lines) / len(lines):.4f}",
        f"lr {' and '.join(f'{value:.2e}' for value in dict.fromkeys(last['lr'].values()))}",
        f"gradient norm {last['grad_norm']:.2f}",
    ]
    for name in ("examples", "tokens"):
        rate = sum(line[name] for line in lines) / seconds
        parts.append(f"{rate:.1f} {name}/s" if rate < 10 else f"{rate:,.0f} {name}/s")
    return ", ".join(parts)


# -- files -------------------------------------------------------------------------------------------------------------


class StepLog:
    """A file of JSON lines, each of a step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._told = False

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Remove lines after a step and an incomplete last line; returns the rest."""
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_file(self.path, "".join(map(_line, kept)))
        return kept

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line atomically; after a full disk it is written with the next one."""
        self._waiting.append(_line(line))
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
                log.warning("%s: cannot be written now, retrying: %s", self.path, reason(error))
            self._told = True
            return
        self._waiting, self._told = [], False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that a kill has cut short; DataError if another is damaged."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip("\0 \r"):
            continue
        try:
            values = json.loads(line)
            if not isinstance(values["step"], int):
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines):  # no line break behind it
                break
            raise DataError(f"{path}, line {number}: not a step's line: {line[:60]!r}; fix or delete it") from None
        found.append(values)
    return found


def _line(values: Mapping[str, Any]) -> str:
    """JSON; NaN and infinity, which it lacks, as strings."""
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        named = json.loads(json.dumps(values, ensure_ascii=False), parse_constant=lambda name: str(float(name)))
        return json.dumps(named, ensure_ascii=False) + "\n"


class Events:
    """A new file for TensorBoard. Its own writer has a thread, in which a full disk ends with a traceback."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir(parents=True)
            self._writer: Any = RecordWriter(self._path.open("wb"))
        self._add(file_version="brain.Event:2")

    def write(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a log's line; after an error nothing more is written."""
        for name, value in _scalars(line).items():
            self._add(step=line["step"], summary={"value": [{"tag": name, "simple_value": float(value)}]})

    def _add(self, **values: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._writer is not None:
            try:
                self._writer.write(Event(wall_time=time.time(), **values).SerializeToString())
                self._writer.flush()
            except OSError as error:
                log.warning("%s: cannot be written, giving up: %s", self._path, reason(error))
                self._writer = None


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of a log by TensorBoard's names."""
    if "tasks" not in line:
        return {"dev/loss": line["loss"]}
    found = {f"loss/{name}": each["loss"] for name, each in line["tasks"].items()}
    found |= {f"lr/{name}": value for name, value in line["lr"].items()}
    found |= {"loss/all": line["loss"], "gradient/norm": line["grad_norm"]}
    found |= {f"speed/{name}_a_second": line[name] / line["seconds"] for name in ("tokens", "examples")}
    return found | {"speed/wait_share": line["wait"] / line["seconds"]}


# -- a run as a page ---------------------------------------------------------------------------------------------------

_OVERVIEW: Final = ("stage", "steps", "loss", "examples", "tokens", "time", "tokens/s", "waiting")


def note_run(out: Path, recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Add a start to ``run.json``: recipe, machine, versions, and what each stage learns from, as plain values."""
    try:
        starts = list(_read_notes(out).get("starts", []))
    except (DataError, TypeError):  # torn, and worth less than the run
        starts = []
    start = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processes": launched(),
        "machine": machine(),
        "packages": {"python": sys.version.split()[0], **versions()},
        "commit": commit(),
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    notes = {"config": recipe.model_dump(mode="json"), "data": data, "starts": [*starts, start]}
    write_json(out / RUN, json.loads(json.dumps(notes, default=str)))


def data_of(mixture: Mixture) -> dict[str, Any]:
    """Contents of a mixture: the manifest of each part, and how many of its records make an epoch."""
    parts = [
        {
            "folder": str(part.records.folder),
            "records an epoch": part.per_epoch,
            **part.records.manifest.model_dump(mode="json"),
        }
        for part in mixture.parts
    ]
    return {"records an epoch": len(mixture), "seed": mixture.seed, "parts": parts}


def write_report(out: Path) -> Path:
    """Write ``report.html`` into the folder of a run, finished or not, and name it.

    Raises:
        DataError: The folder holds no log of a run, or one that cannot be read; the page cannot be written.
    """
    stages = sorted((path.parent for path in out.glob(f"*/{LOG}")), key=lambda each: each.name)
    stages.sort(key=lambda each: not each.name.startswith("language"))  # which nano's recipe trains first
    if not stages:
        raise DataError(f"{out}: not the folder of a run: no stage has a {LOG}; give the --out of a run")
    logs = {folder.name.removesuffix("-checkpoints"): read_lines(folder / LOG) for folder in stages}
    notes = _read_notes(out)
    try:
        recipe: dict[str, dict[str, Any]] = {"": {}}
        for name, value in notes.get("config", {}).items():
            recipe |= {name: value} if isinstance(value, dict) else {"": {**recipe[""], name: value}}
        states = [_state(name, lines) for name, lines in logs.items()]
        charts = [
            list(_charts(logs[name], read_lines(folder / DEV))) for name, folder in zip(logs, stages, strict=True)
        ]
        write_page(
            out / PAGE,
            "train.html",
            title=f"Training {out.resolve().name}",
            made=f"{out}, {states[-1]}; made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            overview=[_OVERVIEW, *(_overview(name, lines) for name, lines in logs.items())],
            stages=list(zip(logs, states, charts, strict=True)),
            starts=notes.get("starts", []),
            recipe=recipe,
            data=notes.get("data", {}),
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
        raise DataError(f"{out}: {RUN} or a log in it is damaged: {error!r}; delete it") from None
    return out / PAGE


def report_what_there_is(out: Path) -> None:
    """Write the report when a run ends or fails; log errors."""
    try:
        if any(read_lines(path) for path in out.glob(f"*/{LOG}")):
            log.info("report: %s", write_report(out))
    except (RegionGPTError, OSError) as error:
        log.warning("no report was made: %s", error)


def _read_notes(out: Path) -> dict[str, Any]:
    notes = read_json(out / RUN) if (out / RUN).exists() else {}
    if not isinstance(notes, dict):
        raise DataError(f"{out / RUN}: expected the notes of a run, got {type(notes).__name__}; delete the file")
    return notes


def _state(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return f"{name} has not started"
    done, steps = lines[-1]["step"], lines[-1]["of"]
    state = f"{name} is finished" if done >= steps else f"{name} has done step {done:,} of {steps:,}"
    bad = [line["step"] for line in lines if not math.isfinite(float(line["loss"]))]
    return f"{state}; the loss was no finite number at step {bad[0]:,}" if bad else state


def _overview(name: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    if not lines:
        return [name, "0", *[""] * (len(_OVERVIEW) - 2)]
    last = [float(line["loss"]) for line in lines[-max(1, round(0.05 * len(lines))) :]]
    seconds = sum(line["seconds"] for line in lines)
    return [
        name,
        f"{len(lines):,} of {lines[-1]['of']:,}",
        f"{sum(last) / len(last):.4f}",
        f"{sum(line['examples'] for line in lines):,}",
        short(sum(line["tokens"] for line in lines)),
        tqdm.format_interval(seconds),
        short(median(line["tokens"] / line["seconds"] for line in lines)),
        f"{sum(line['wait'] for line in lines) / seconds:.1%}",
    ]


def _charts(lines: Sequence[Mapping[str, Any]], dev: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    def curve(name: str, ys: Sequence[Any], of: Sequence[Mapping[str, Any]] = lines, exact: bool = False) -> Curve:
        points = [(line["step"], float(y)) for line, y in zip(of, ys, strict=True) if y is not None]
        return Curve(name=name, xs=[x for x, _ in points], ys=[y for _, y in points], exact=exact)

    tasks, rates = (sorted({name for line in lines for name in line[table]}) for table in ("tasks", "lr"))
    losses, measured = ([line["loss"] for line in each] for each in (lines, dev))
    yield line_chart("Loss", [curve("training", losses), curve("dev", measured, dev)])
    by_task = {name: [line["tasks"].get(name, {}).get("loss") for line in lines] for name in tasks}
    yield line_chart("Loss by task", [curve(*each) for each in by_task.items()])
    by_group = {name: [line["lr"].get(name) for line in lines] for name in rates}
    yield line_chart("Learning rate", [curve(*each, exact=True) for each in by_group.items()])
    norms = [curve("norm", [line["grad_norm"] for line in lines])]
    yield line_chart("Gradient norm, before clipping", norms)
    yield line_chart("Tokens per second", [curve("tokens", [line["tokens"] / line["seconds"] for line in lines])])
    waits = [curve("waiting", [line["wait"] / line["seconds"] for line in lines])]
    yield line_chart("Share of the time spent waiting for data", waits)

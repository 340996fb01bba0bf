"""Logs of a stage, which interruptions do not damage; and the notes of a run."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from regiongpt.environment import commit, launched, machine, versions
from regiongpt.errors import ConfigError, DataError
from regiongpt.storage import finite, read_json, write_file, write_json, writing
from regiongpt.train.dataset import TASKS
from regiongpt.train.recipe import Recipe

log = logging.getLogger(__name__)

LOG, DEV = "log.jsonl", "dev.jsonl"
"""In a stage's folder: every step, and measurements on dev data."""
RUN = "run.json"
"""In a run's folder: its recipe, data and starts."""

_PLAIN: Final = ("loss", "examples", "tokens", "images", "targets")


def tally(loss: Tensor, losses_N: Tensor | None, tasks_N: Tensor | None, counts: tuple[int, int, int]) -> Tensor:
    """A micro-batch's part of its step's log line, on the loss's device: :func:`read_tally` reads the sum.

    For each of N targets: its cross-entropy, not divided by anything, and its task's place in :data:`TASKS` or -1.
    ``counts``: conversations, tokens without padding, and images.
    """
    row = torch.zeros(len(_PLAIN) + 2 * len(TASKS), dtype=torch.float64, device=loss.device)
    row[0] = loss.double()
    row[1:5] = row.new_tensor([*counts, 0 if losses_N is None else len(losses_N)])
    if losses_N is not None and tasks_N is not None:
        # A product, for scattered sums on a GPU come out a little different each time.
        chosen = tasks_N.to(loss.device)[None] == torch.arange(len(TASKS), device=loss.device)[:, None]
        row[5:] = torch.cat([chosen.double() @ losses_N.double(), chosen.sum(1)])
    return row


def read_tally(row: Sequence[float]) -> dict[str, Any]:
    """The part of a step's line that :func:`tally` counts."""
    sums = zip(TASKS, row[len(_PLAIN) :], row[len(_PLAIN) + len(TASKS) :], strict=False)
    tasks = {name: {"loss": total / n, "targets": round(n)} for name, total, n in sums if n}
    return {"loss": row[0], "tasks": tasks, **{name: round(row[place]) for place, name in enumerate(_PLAIN) if place}}


class Watch:
    """Writes the log of a stage: a line of ``log.jsonl`` per step, and every ``log_steps`` one for people."""

    def __init__(self, name: str, folder: Path, log_steps: int, tensorboard: bool = False) -> None:
        self.name, self.folder, self.log_steps, self.tensorboard = name, folder, log_steps, tensorboard
        self._untold: list[dict[str, Any]] = []
        self._board: Any = None

    def start(self, step: int) -> None:
        """Remove lines after the step to resume from, and incomplete ones."""
        for path in (self.folder / LOG, self.folder / DEV):
            write_file(path, "".join(_line(line) for line in read_lines(path) if line["step"] <= step))
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError("watch.tensorboard: TensorBoard is not installed: pip install '.[train]'") from None
            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)

    def step(self, line: dict[str, Any]) -> None:
        """Write the line of a step; DataError if the disk is full."""
        scalars = {f"loss/{name}": each["loss"] for name, each in line["tasks"].items()}
        scalars |= {f"lr/{name}": value for name, value in line["lr"].items()}
        self._write(LOG, line, {**scalars, "loss/all": line["loss"], "gradient/norm": line["grad_norm"]})
        self._untold.append(line)
        step, steps = line["step"], line["of"]
        if step in (1, steps) or step % self.log_steps == 0:
            lines, self._untold = self._untold, []
            loss, seconds, tokens = (sum(each[name] for each in lines) for name in ("loss", "seconds", "tokens"))
            rates = " and ".join(f"{value:.2e}" for value in dict.fromkeys(line["lr"].values()))
            told = f"loss {loss / len(lines):.4f}, lr {rates}, gradient norm {line['grad_norm']:.2f}, "
            left = tqdm.format_interval((steps - step) * seconds / len(lines))
            told += f"{tqdm.format_sizeof(tokens / seconds)} tokens/s, {left} left"
            log.info("%s: step %d of %d, %s", self.name, step, steps, told)

    def measured(self, step: int, loss: float) -> None:
        """Write the dev loss after a step."""
        self._write(DEV, {"step": step, "loss": loss}, {"dev/loss": loss})

    def _write(self, name: str, line: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        path = self.folder / name
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(_line(line))
        if self._board is not None:
            for title, value in scalars.items():
                self._board.add_scalar(title, value, line["step"])
            self._board.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill has cut short is skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            values = json.loads(line)
            found += [values] if isinstance(values["step"], int) else []
    return found


def _line(values: Mapping[str, Any]) -> str:
    return f"{json.dumps(finite(values), ensure_ascii=False)}\n"


def note_run(out: Path, recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Add a start to ``run.json``: recipe, machine, versions, and what each stage learns from, as plain values."""
    command, packages = [Path(sys.argv[0]).name, *sys.argv[1:]], {"python": sys.version.split()[0], **versions()}
    start: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(command)}
    start |= {"processes": launched(), "machine": machine(), "packages": packages, "commit": commit()}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    before: list[Any] = []
    with suppress(DataError, KeyError, TypeError):  # torn notes are worth less than the run
        before = list(read_json(out / RUN)["starts"])
    notes = {"config": recipe.model_dump(mode="json"), "data": data, "starts": [*before, start]}
    write_json(out / RUN, notes)

"""Benchmarks from beginning to end: asked or read, scored, written to the folder of a run."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regiongpt.data.progress import Meter
from regiongpt.data.shards import file_identity
from regiongpt.distributed import Processes
from regiongpt.errors import RegionGPTError
from regiongpt.evaluate import mistakes, report
from regiongpt.evaluate.kept_towers import KeptTower
from regiongpt.evaluate.manifest import manifest, model_identity
from regiongpt.evaluate.predictions import read_predictions
from regiongpt.evaluate.runner import Runner, load_items, make_keys, usable
from regiongpt.evaluate.runs import TaskRun, options_of, read_run, refuse_other, write_task
from regiongpt.evaluate.store import AnswerStore
from regiongpt.evaluate.task import RESAMPLES, Answer, Item, Result, Task

if TYPE_CHECKING:
    from regiongpt.inference import RegionPredictor

GALLERY = 24
"""Worst mistakes on the page of results, unless another number is asked for."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """How benchmarks are run and where to.

    Attributes:
        out: Folder of the run.
        resamples: Of the bootstrap; 0 draws no intervals.
        gallery: Worst mistakes that the page shows of each task.
        overwrite: Replace figures of another model, other settings or other files.
        processes: Of the run; the first of them scores, writes and speaks.
        towers: Where the tower's features of each image are kept for models with the same tower; None to keep none.
    """

    out: Path
    resamples: int = RESAMPLES
    gallery: int = GALLERY
    overwrite: bool = False
    processes: Processes = field(default_factory=Processes)
    towers: Path | None = None

    def score_model(
        self, tasks: Sequence[Task], path: Path | None, device: str | None = None, dtype: str | None = None
    ) -> list[TaskRun]:
        """Asks a model what it has not yet been asked, and scores it.

        A task that cannot be scored does not keep the others from being run.

        Args:
            tasks: The benchmarks.
            path: Checkpoint folder; None for the model of the package.
            device: It is run on; the first of CUDA, MPS and CPU there is by default.
            dtype: Of its weights; bfloat16 on CUDA devices that have it, else float32 by default.

        Returns:
            The tasks as written; in all processes but the first, nothing.

        Raises:
            ConfigError: An option is wrong, or the folder holds something else.
            DataError: A file of a data set cannot be used.
            CheckpointError: The model cannot be loaded.
        """
        listed = [(task, self._load(task)) for task in tasks]
        device, dtype = self._place(device, dtype)
        if path is None:
            from regiongpt.model.weights import nano_path

            path = nano_path()
        model = model_identity(path, dtype, device)
        noted = [self._manifest(task, model) for task in tasks]
        for task, each in zip(tasks, noted, strict=True):
            refuse_other(self.out, task.name, each, self.overwrite)
        with self._meter("images", "images"):
            asked = make_keys(model["key"], listed)
        store = AnswerStore(self.out, self.processes.rank)
        self.processes.wait()  # all have read the same answers before the first writes another
        written: list[TaskRun] = []
        failures: list[RegionGPTError] = []
        with store:
            self._say(store.damaged_report())
            runner = Runner(asked, store, self.processes, lambda: _predictor(path, device, dtype, self.towers))
            for number, (task, items) in enumerate(listed):
                self._say(runner.plan(number))
                answers, notes = usable(runner.answer(number))
                if self.processes.is_first:
                    try:
                        written.append(self._finish(task, items, answers, noted[number], notes))
                    except RegionGPTError as error:
                        failures.append(type(error)("; ".join([f"{task.name}: {error}", *notes])))
                        self._say(str(failures[-1]))
        if written:
            self._write_page()
        if failures:
            raise failures[0]
        return written

    def score_predictions(
        self,
        task: Task,
        file: Path,
        missing: Literal["refuse", "wrong"] = "refuse",
        unknown: Literal["refuse", "ignore"] = "refuse",
    ) -> TaskRun:
        """Scores answers that someone else has given.

        Args:
            task: The benchmark.
            file: The predictions, as :func:`regiongpt.evaluate.predictions.read_predictions` takes them.
            missing: What to do where an item has none.
            unknown: What to do with those for no item.

        Raises:
            ConfigError: The folder holds something else.
            DataError: A file cannot be used.
        """
        noted = self._manifest(task, None)
        noted["predictions"] = file_identity(file)
        noted["scoring"] |= {"missing": missing, "unknown": unknown}
        refuse_other(self.out, task.name, noted, self.overwrite)
        items = self._load(task)
        found = read_predictions(file, task, items, missing=missing, unknown=unknown)
        run = self._finish(task, items, found.answers, noted, found.report)
        self._write_page()
        return run

    def _load(self, task: Task) -> list[Item]:
        with self._meter(task.name, "items"):
            return load_items(task)

    def _manifest(self, task: Task, model: Mapping[str, Any] | None) -> dict[str, Any]:
        noted = manifest(task.settings(), task.inputs(), model)
        return {**noted, "options": options_of(task), "scoring": {"resamples": self.resamples}}

    def _finish(
        self,
        task: Task,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        noted: dict[str, Any],
        notes: Sequence[str],
    ) -> TaskRun:
        result: Result = task.score(items, answers, resamples=self.resamples)
        part = {"part": f"the first {task.limit:,} images alone (--limit)"} if task.limit else {}
        result = dataclasses.replace(result, notes=(*notes, *result.notes), pinned={**result.pinned, **part})
        chosen = mistakes.worst(result, answers, self.gallery)
        cards = mistakes.gallery(chosen, {item.id: item for item in items}, answers)
        return write_task(self.out, result, items, answers, noted, cards)

    def _write_page(self) -> None:
        report.write_report(self.out, read_run(self.out))

    def _place(self, device: str | None, dtype: str | None) -> tuple[str, str]:
        """Names of the device and the dtype that the model will have."""
        from regiongpt.inference.engine import pick_device, pick_dtype

        chosen = pick_device(device)
        if device is None and chosen.type == "cuda" and self.processes.count > 1:
            chosen = pick_device(f"cuda:{self.processes.local}")
        return str(chosen), str(pick_dtype(dtype, chosen)).removeprefix("torch.")

    def _meter(self, name: str, unit: str) -> Any:
        return Meter(name, unit=unit) if self.processes.is_first else nullcontext()

    def _say(self, text: str) -> None:
        if text and self.processes.is_first:
            print(text, file=sys.stderr, flush=True)


def _predictor(path: Path, device: str, dtype: str, towers: Path | None) -> "RegionPredictor":
    from transformers.utils import logging

    from regiongpt.inference import RegionPredictor

    logging.disable_progress_bar()
    predictor = RegionPredictor.from_pretrained(path, device=device, dtype=dtype)
    if towers is not None:
        model: Any = predictor.engine.model
        model.encode_image = KeptTower(model, towers)
    return predictor

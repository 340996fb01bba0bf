"""Benchmarks from beginning to end: asked or read, scored, written to the folder of a run."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from regiongpt import legacy
from regiongpt.data.shards import file_identity
from regiongpt.distributed import Processes
from regiongpt.errors import RegionGPTError
from regiongpt.evaluate import report
from regiongpt.evaluate.predictions import read_predictions
from regiongpt.evaluate.runner import Runner, load_items, make_keys, usable
from regiongpt.evaluate.runs import TaskRun, make_manifest, model_identity, read_run, refuse_other, write_task
from regiongpt.evaluate.task import GALLERY, RESAMPLES, Answer, Item, Task
from regiongpt.storage import locked, write_file, writing
from regiongpt.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from regiongpt.inference import RegionPredictor


@dataclass(frozen=True, kw_only=True)
class Session:
    """How benchmarks are run and where to.

    Attributes:
        out: Folder of the run.
        resamples: How many the bootstrap draws; 0 for no intervals.
        gallery: Worst mistakes that the page shows of each task.
        overwrite: Replace results of another model, other settings or other files.
        processes: Those of the run; the first of them scores, writes and speaks.
        towers: Where the tower's features of each image are kept for models with the same tower; None to keep none.
        untrained: Ask a checkpoint even if it has not been trained.
    """

    out: Path
    resamples: int = RESAMPLES
    gallery: int = GALLERY
    overwrite: bool = False
    processes: Processes = field(default_factory=Processes)
    towers: Path | None = None
    untrained: bool = False

    def score_model(
        self, tasks: Sequence[Task], path: Path | None, device: str | None = None, dtype: str | None = None
    ) -> list[TaskRun]:
        """Ask a model what it has not yet been asked, and score it.

        A task that cannot be scored does not keep the others from being run.

        Args:
            tasks: The benchmarks.
            path: Checkpoint folder; None for the model of the package.
            device: It is run on; the first of CUDA, MPS and CPU there is by default.
            dtype: Precision of its weights; bfloat16 on CUDA devices that have it, else float32 by default.

        Returns:
            The tasks as written; in all processes but the first, nothing.

        Raises:
            ConfigError: An option is wrong, or the folder holds something else or is being written to.
            DataError: A file of a data set cannot be used.
            CheckpointError: The model cannot be loaded.
        """
        listed = [(task, load_items(task)) for task in tasks]
        device, dtype = self._place(device, dtype)
        if path is None:
            from regiongpt.model.weights import nano_path

            path = nano_path()
        model = model_identity(path, dtype, device)
        noted = [make_manifest(task, model, {"resamples": self.resamples}) for task in tasks]
        self._refuse_other(tasks, noted)
        with locked(self.out) if self.processes.is_first else nullcontext():
            asked = make_keys(model["key"], listed)
            store = Store(self.out / "answers", self.processes.rank)
            if self.processes.is_first and not store.keys() and (found := legacy.read_answers(store.folder)):
                with store:
                    store.add(found)
            self.processes.wait()
            runner = Runner(asked, store, self.processes, lambda: self._predictor(path, device, dtype))
            self.processes.wait()  # all have read the same answers before the first writes another
            return self._answered(runner, noted)

    def _answered(self, runner: Runner, noted: Sequence[dict[str, Any]]) -> list[TaskRun]:
        written: list[TaskRun] = []
        failure: RegionGPTError | None = None
        for number, each in enumerate(runner.asked):
            self._say(runner.plan(number))
            answers, notes = usable(runner.answer(number))
            if self.processes.is_first:
                try:
                    written.append(self._finish(each.task, each.items, answers, noted[number], notes))
                except RegionGPTError as error:
                    told = type(error)("; ".join([f"{each.task.name}: {error}", *notes]))
                    self._say(str(told))
                    failure = failure or told
        if written:
            report.write_report(self.out, read_run(self.out))
        if failure:
            raise failure
        return written

    def score_predictions(
        self,
        task: Task,
        file: Path,
        missing: Literal["refuse", "wrong"] = "refuse",
        unknown: Literal["refuse", "ignore"] = "refuse",
    ) -> TaskRun:
        """Score answers that someone else has given.

        Args:
            task: The benchmark.
            file: The predictions, as :func:`regiongpt.evaluate.predictions.read_predictions` takes them.
            missing: What to do where an item has none.
            unknown: What to do with those for no item.

        Raises:
            ConfigError: The folder holds something else or is being written to.
            DataError: A file cannot be used.
        """
        noted = make_manifest(task, None, {"resamples": self.resamples, "missing": missing, "unknown": unknown})
        noted["predictions"] = file_identity(file)
        self._refuse_other([task], [noted])
        items = load_items(task)
        found = read_predictions(file, task, items, missing=missing, unknown=unknown)
        with locked(self.out):
            run = self._finish(task, items, found.answers, noted, found.report)
            report.write_report(self.out, read_run(self.out))
        return run

    def _refuse_other(self, tasks: Sequence[Task], noted: Sequence[Mapping[str, Any]]) -> None:
        if not self.overwrite:
            for task, each in zip(tasks, noted, strict=True):
                refuse_other(self.out, task.name, each)

    def _finish(
        self,
        task: Task,
        items: Sequence[Item],
        answers: Mapping[str, Answer],
        noted: dict[str, Any],
        notes: Sequence[str],
    ) -> TaskRun:
        result = task.score(items, answers, resamples=self.resamples)
        part = {"part": f"the first {task.limit:,} images alone (--limit)"} if task.limit else {}
        result = dataclasses.replace(result, notes=(*notes, *result.notes), pinned={**result.pinned, **part})
        shown = report.mistakes(report.worst(result, answers, self.gallery), items, answers)
        return write_task(self.out, result, items, answers, noted, shown)

    def _place(self, device: str | None, dtype: str | None) -> tuple[str, str]:
        """Names of the device and the dtype that the model will have."""
        from regiongpt.inference.engine import pick_device, pick_dtype

        chosen = pick_device(device)
        if device is None and chosen.type == "cuda" and self.processes.count > 1:
            chosen = pick_device(f"cuda:{self.processes.local}")
        return str(chosen), str(pick_dtype(dtype, chosen)).removeprefix("torch.")

    def _say(self, text: str) -> None:
        if self.processes.is_first:
            print(text, file=sys.stderr, flush=True)

    def _predictor(self, path: Path, device: str, dtype: str) -> "RegionPredictor":
        from transformers.utils import logging

        from regiongpt.inference import RegionPredictor

        logging.disable_progress_bar()
        predictor = RegionPredictor.from_pretrained(path, device=device, dtype=dtype, untrained=self.untrained)
        if self.towers is not None:
            model: Any = predictor.engine.model
            model.encode_image = KeptTower(model, self.towers)
        return predictor


class KeptTower:
    """Stands in for a model's ``encode_image``: images encoded before are read from disk, to the same numbers.

    A frozen tower is most of the work of models that share it, such as the variants of an ablation.

    Args:
        model: A RegionGPT model; its ``encode_image`` is still its own.
        folder: Gets a folder for each tower, with a file of float32 numbers for each image.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._encode = model.encode_image
        content = sha256(repr(model.vision_tower.config.to_dict()).encode())
        for name, values in sorted(model.vision_tower.state_dict().items()):
            content.update(name.encode())
            content.update(values.detach().float().cpu().numpy().tobytes())
        self.folder = folder / content.hexdigest()[:32]

    def __call__(self, pixel_values: "Tensor") -> "Tensor":
        """Features of a batch of images, as the model's own method gives them."""
        import torch

        if pixel_values.device.type != "cpu" or pixel_values.dtype != torch.float32:
            found: Tensor = self._encode(pixel_values)
            return found
        path = self.folder / f"{sha256(pixel_values.contiguous().numpy().tobytes()).hexdigest()[:32]}.npy"
        with suppress(OSError, ValueError, EOFError):  # not there, or damaged
            return torch.from_numpy(np.load(path))
        encoded: Tensor = self._encode(pixel_values)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda beside: np.save(beside, encoded.numpy()))
        return encoded

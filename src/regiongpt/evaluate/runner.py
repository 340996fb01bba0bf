"""Runs benchmarks on a model: each question asked once, and each answer kept as it comes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regiongpt.console import progress
from regiongpt.data.reading import TRUNCATED
from regiongpt.data.values import known_size
from regiongpt.distributed import Processes
from regiongpt.errors import DataError
from regiongpt.evaluate.answering import answer_image, question_key
from regiongpt.evaluate.task import Answer, Item, Task
from regiongpt.storage import sha256
from regiongpt.store import Store

if TYPE_CHECKING:
    from regiongpt.inference import RegionPredictor


def load_items(task: Task) -> list[Item]:
    """The items of a task, whose images are all there and whose ids differ; images of another size are left out.

    Raises:
        DataError: A file cannot be used, or is truncated; an image is missing; there is nothing to ask.
        ConfigError: An option is wrong.
    """
    items = task.items()
    if task.left_out.counts[TRUNCATED]:
        files = ", ".join(str(path) for path in task.inputs())
        raise DataError(
            f"{task.name}: a file is truncated, and a part of it is another benchmark; fetch again: {files}"
        )
    if not items:
        raise DataError(f"{task.name}: nothing to ask about in {task.data}")
    repeated = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise DataError(f"{task.name}: {task.item_id} {repeated[0]!r} comes more than once")
    images = {item.image: item.size for item in items}
    missing = [path for path in images if not path.is_file()]
    if missing:
        others = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(f"{task.name}: the image {missing[0]} is not there{others}; check where the images are")
    other = {}
    for path, size in images.items():
        found = known_size(path) if size is not None else None
        if size is not None and found is not None and found != size:  # one that cannot be read is said when it is asked
            other[path] = f"{path.name} has {found[0]} x {found[1]} pixels (W x H), not {size[0]} x {size[1]}"
            task.left_out.add("image of another size", path, path.name, other[path])
    kept = [item for item in items if item.image not in other]
    if not kept:
        raise DataError(
            f"{task.name}: no image has the size that the annotations say: {next(iter(other.values()))}; give the "
            "images that belong to the annotations"
        )
    return kept


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task's items, and the key that each one's answer is kept under."""

    task: Task
    items: list[Item]
    keys: list[str]


def make_keys(model: str, tasks: Sequence[tuple[Task, list[Item]]]) -> list[Asked]:
    """The keys of all items, for which every image file is read once.

    Args:
        model: Key of the model.
        tasks: Tasks with their items.

    Raises:
        DataError: An image cannot be read.
    """
    hashes: dict[Path, str] = {}
    for path in progress(list(dict.fromkeys(item.image for _, items in tasks for item in items)), "reading", "images"):
        try:
            hashes[path] = sha256(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return [
        Asked(task=task, items=items, keys=[question_key(model, hashes[item.image], item) for item in items])
        for task, items in tasks
    ]


class Runner:
    """Answers the items of several tasks, in one or several processes.

    What has to be asked is settled for all tasks at once, before anything is: so all processes share the work out
    alike, whatever the others have written meanwhile.

    Args:
        asked: The tasks; the same in every process.
        store: Where answers are kept.
        processes: Those of the run; all of them have read the same answers.
        predictor: Loads the model, called once and only if there is something to ask.
    """

    def __init__(
        self, asked: Sequence[Asked], store: Store, processes: Processes, predictor: Callable[[], "RegionPredictor"]
    ) -> None:
        self.asked, self.store, self.processes = asked, store, processes
        self._load = predictor
        self._predictor: RegionPredictor | None = None
        self._kept = store.keys()
        planned = set(self._kept)
        self.work: list[list[list[tuple[str, Item]]]] = []
        """What this process asks for each task: a list of items with their keys for each image."""
        for each in asked:
            by_image: dict[Path, list[tuple[str, Item]]] = {}
            for key, item in zip(each.keys, each.items, strict=True):
                if key not in planned:
                    planned.add(key)
                    by_image.setdefault(item.image, []).append((key, item))
            self.work.append(processes.share(list(by_image.values()), len))

    def plan(self, number: int) -> str:
        """One line: how much this process has to ask for a task."""
        asked, count = self.asked[number], sum(map(len, self.work[number]))
        kept = sum(key in self._kept for key in asked.keys)
        mine = "" if self.processes.count == 1 else f", {count:,} of them in this process"
        return f"{asked.task.name}: {len(asked.items):,} questions, {kept:,} answered before{mine}"

    def answer(self, number: int) -> dict[str, dict[str, Any]]:
        """Ask what is still to be asked for one task, and wait until all processes have.

        Args:
            number: Which task, in the order given.

        Returns:
            The answers of all items by item id, as plain JSON; in all processes but the first, nothing.

        Raises:
            RegionGPTError: A question cannot be asked, or an answer not kept.
        """
        work, asked = self.work[number], self.asked[number]
        if work:
            name = asked.task.name + (f", process 1 of {self.processes.count}" if self.processes.count > 1 else "")
            with self.store:
                for _ in progress(self._each(work), name, "answers", sum(map(len, work))):
                    pass
        self.processes.wait()
        found: dict[str, Any] = self.store.get(asked.keys) if self.processes.is_first else {}
        self.processes.wait()  # none writes on before the first has read
        if not self.processes.is_first:
            return {}
        if lost := sum(key not in found for key in asked.keys):
            raise DataError(
                f"{self.store.folder}: {lost} answers of other processes are not there; let all of them write to the "
                "same folder, then run the same command again"
            )
        return {item.id: found[key] for key, item in zip(asked.keys, asked.items, strict=True)}

    def _each(self, work: list[list[tuple[str, Item]]]) -> Iterator[None]:
        if self._predictor is None:
            self._predictor = self._load()
        for image in work:
            answers = answer_image(self._predictor, [item for _, item in image])
            self.store.add({key: answer for (key, _), answer in zip(image, answers, strict=True)})
            yield from (None for _ in image)


def usable(answers: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Answer], list[str]]:
    """The answers of a model for scoring, and what has to be said of those that are none."""
    found = {name: Answer.from_dict(values) for name, values in answers.items() if "refused" not in values}
    refused = [(name, values["refused"]) for name, values in answers.items() if "refused" in values]
    if not refused:
        return found, []
    first, why = refused[0]
    return found, [
        f"{len(refused)} of {len(answers)} questions could not be asked and count as wrong, item {first} for instance: "
        f"{why}"
    ]

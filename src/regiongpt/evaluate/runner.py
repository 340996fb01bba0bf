"""Runs benchmarks on a model: each question asked once, each answer kept as it comes, each figure with its origin."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regiongpt.data.convert.images import known_size
from regiongpt.data.convert.jsonstream import TRUNCATED
from regiongpt.data.progress import Meter, track
from regiongpt.data.shards import file_identity
from regiongpt.distributed import Processes
from regiongpt.errors import DataError
from regiongpt.evaluate.answering import answer_image, from_json, question_key
from regiongpt.evaluate.store import AnswerStore
from regiongpt.evaluate.task import Answer, Item, Task

if TYPE_CHECKING:
    from regiongpt.inference import RegionPredictor


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task's items, and the key that each one's answer is kept under."""

    task: Task
    items: list[Item]
    keys: list[str]


def load_items(task: Task) -> list[Item]:
    """The items of a task, whose images are all there and whose ids differ; those of images of another size left out.

    Raises:
        DataError: A file cannot be used, or breaks off; an image is missing; there is nothing to ask.
        ConfigError: An option is wrong.
    """
    items = task.load()
    if task.left_out.counts[TRUNCATED]:
        files = ", ".join(str(path) for path in task.inputs())
        raise DataError(
            f"{task.name}: expected whole files, but one breaks off, and its part would be another benchmark; fetch "
            f"again: {files}"
        )
    if not items:
        raise DataError(f"{task.name}: expected something to ask about, found nothing in {task.data}")
    repeated = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise DataError(f"{task.name}: expected every {task.item_id} once, got {repeated[0]!r} more than once")
    missing = [path for path in dict.fromkeys(item.image for item in items) if not path.is_file()]
    if missing:
        others = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(
            f"{task.name}: expected the image {missing[0]}, found no such file{others}; check where the images are"
        )
    odd = {item.image: told for item in items if (told := _other_size(item))}
    for path, told in odd.items():
        task.left_out.add("image of another size", path, path.name, told)
    kept = [item for item in items if item.image not in odd]
    if not kept:
        raise DataError(
            f"{task.name}: expected images of the sizes that the annotations give them, found none among {len(odd)}; "
            f"{next(iter(odd.values()))}; give the images that belong to the annotations"
        )
    return kept


def _other_size(item: Item) -> str:
    """What is wrong with the size of an item's image; ``""`` where nothing is, or the image cannot be read."""
    found = known_size(item.image) if item.size is not None else None
    if item.size is None or found is None or found == item.size:
        return ""
    wanted = f"expected {item.image.name} of {item.size[0]} x {item.size[1]} pixels (W x H)"
    return f"{wanted}, got {found[0]} x {found[1]}"


def make_keys(model: str, tasks: Sequence[tuple[Task, list[Item]]]) -> list[Asked]:
    """The keys of all items, for which every image is read once.

    Args:
        model: Key of the model.
        tasks: Tasks with their items.

    Raises:
        DataError: An image cannot be read.
    """
    images = list(dict.fromkeys(item.image for _, items in tasks for item in items))
    hashes = {path: file_identity(path)["sha256"] for path in track(images, len(images))}
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
        store: Open for writing.
        processes: Of the run; all of them have read the same answers.
        predictor: Loads the model, called once and only if there is something to ask.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        store: AnswerStore,
        processes: Processes,
        predictor: Callable[[], "RegionPredictor"],
    ) -> None:
        self.asked, self.store, self.processes = asked, store, processes
        self._load = predictor
        self._predictor: RegionPredictor | None = None
        self.work = [self._share(each) for each in self._unanswered()]

    def _unanswered(self) -> Iterator[list[tuple[str, Item]]]:
        """Of each task, the items whose answers are neither kept nor asked for by a task before it."""
        planned: set[str] = set()
        for each in self.asked:
            todo = []
            for key, item in zip(each.keys, each.items, strict=True):
                if key not in self.store and key not in planned:
                    planned.add(key)
                    todo.append((key, item))
            yield todo

    def _share(self, todo: list[tuple[str, Item]]) -> list[list[tuple[str, Item]]]:
        by_image: dict[Path, list[tuple[str, Item]]] = {}
        for key, item in todo:
            by_image.setdefault(item.image, []).append((key, item))
        return self.processes.share(list(by_image.values()), len)

    def plan(self, number: int) -> str:
        """One line: how much this process has to ask for a task."""
        asked, count = self.asked[number], sum(map(len, self.work[number]))
        kept = sum(key in self.store for key in asked.keys)
        mine = "" if self.processes.count == 1 else f", {count:,} of them in this process"
        return f"{asked.task.name}: {len(asked.items):,} questions, {kept:,} answered before{mine}"

    def answer(self, number: int) -> dict[str, dict[str, Any]]:
        """Asks what is still to be asked for one task, and waits until all processes have.

        Args:
            number: Of the task, in the order given.

        Returns:
            The answers of all items by item id, as plain json.

        Raises:
            RegionGPTError: A question cannot be asked, or an answer not kept.
        """
        work, asked = self.work[number], self.asked[number]
        count = sum(map(len, work))
        if count:
            meter = Meter(self._name(asked.task.name), unit="answers") if self.processes.is_first else nullcontext()
            with meter as shown:
                answers = track(self._each(work), count)
                for _ in answers if shown is None else shown.watch(answers):
                    pass
        self.processes.wait()
        self.store.read()
        lost = [item.id for key, item in zip(asked.keys, asked.items, strict=True) if key not in self.store]
        if lost:
            raise DataError(
                f"{self.store.folder}: expected the answers of all processes there, {len(lost)} are not; let all of "
                "them write to the same folder, then run the same command again"
            )
        return {item.id: self.store[key] for key, item in zip(asked.keys, asked.items, strict=True)}

    def _each(self, work: list[list[tuple[str, Item]]]) -> Iterator[None]:
        if self._predictor is None:
            self._predictor = self._load()
        for image in work:
            answers = answer_image(self._predictor, [item for _, item in image])
            self.store.add({key: answer for (key, _), answer in zip(image, answers, strict=True)})
            yield from (None for _ in image)

    def _name(self, task: str) -> str:
        return task if self.processes.count == 1 else f"{task}, process 1 of {self.processes.count}"


def usable(answers: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Answer], list[str]]:
    """The answers of a model for scoring, and what has to be said of those that are none."""
    found = {name: from_json(values) for name, values in answers.items() if "refused" not in values}
    refused = [(name, values["refused"]) for name, values in answers.items() if "refused" in values]
    notes = []
    if refused:
        notes.append(
            f"{len(refused)} of {len(answers)} questions could not be asked and count as wrong, "
            f"item {refused[0][0]} for instance: {refused[0][1]}"
        )
    return found, notes

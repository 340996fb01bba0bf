"""Runs benchmarks and writes the folder of results; see ``docs/evaluation.md``."""

import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import regiongpt
from regiongpt.console import progress
from regiongpt.data.reading import TRUNCATED, known_size
from regiongpt.data.shards import file_identity
from regiongpt.environment import Processes, commit, connect, launched, machine, versions
from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError, RegionGPTError
from regiongpt.evaluate.predictions import Predictions, read_predictions
from regiongpt.evaluate.report import ITEMS, MANIFEST, PREDICTIONS, RESULT, TaskRun, read_object, write_report
from regiongpt.evaluate.task import Answer, Item, RunOptions, Task
from regiongpt.images import load_image
from regiongpt.storage import Store, digest, locked, reason, sha256, write_file, write_json, writing

if TYPE_CHECKING:
    from torch import Tensor

    from regiongpt.inference.options import Detail
    from regiongpt.inference.predictor import RegionPredictor

ANSWERING: Final = ("inference", "model", "prompts.py", "regions.py", "coverage.py", "images.py")
"""The part of this package that turns an image and a question into an answer."""
SHORT: Final = 16
"""Longest answer, in tokens, whose probability is computed if it is not a choice; this takes another pass."""
_DECIDING: Final = ("settings", "inputs", "model", "predictions", "scoring")
"""Parts of a manifest that have to be equal before results are replaced, but for the values in ``_NOTED``."""
_NOTED: Final = ("data", "name", "device", "key")


def evaluate(tasks: Sequence[Task], options: RunOptions) -> list[TaskRun]:
    """Ask a model the questions without a stored answer, or read predictions, then score and write the results.

    If a task cannot be scored, the others still are.

    Returns:
        The tasks as written; of several processes, in the first alone.

    Raises:
        ConfigError: An option is wrong, or the folder holds something else or is being written to.
        DataError: A file of a data set or of predictions cannot be used.
        CheckpointError: The model cannot be loaded.
    """
    assert options.out is not None, "evaluate() needs options.out"
    out, given = options.out, options.predictions
    if given and (launched() > 1 or len(tasks) > 1):
        what = "start one process" if launched() > 1 else "they answer one task; name it alone"
        raise ConfigError(f"--predictions: {what}")
    listed = [load_items(task) for task in tasks]
    processes = Processes() if given else connect(on_cpu=options.device == "cpu")
    model, load = ({}, None) if given else _find_model(options, processes)
    manifests = [make_manifest(task, model, options) for task in tasks]
    if not options.overwrite:
        for task, manifest in zip(tasks, manifests, strict=True):
            _refuse_other(out / task.name, manifest)
    runs: list[TaskRun] = []
    failures: list[RegionGPTError] = []
    with locked(out) if processes.is_first else nullcontext():
        if given:
            answered = [read_predictions(given, tasks[0], listed[0], missing=options.missing)]
        else:
            answered = _ask(tasks, listed, model, load, Store(out / "answers", processes.rank), processes)
        for task, items, manifest, found in zip(tasks, listed, manifests, answered, strict=processes.is_first):
            try:
                runs.append(_finish(out / task.name, task, items, found, manifest, options))
            except RegionGPTError as error:
                failures.append(type(error)("; ".join([f"{task.name}: {error}", *found.report])))
                print(failures[-1], file=sys.stderr, flush=True)
    if failures:
        raise failures[0]
    return runs


def load_items(task: Task) -> list[Item]:
    """The items of a task: each id once, every image there; images of another size than annotated are left out.

    Raises:
        DataError: A file cannot be used, or is truncated; an image is missing; there is nothing to ask.
        ConfigError: An option is wrong.
    """
    items = task.items()
    if task.left_out.counts[TRUNCATED]:
        files = ", ".join(map(str, task.inputs()))
        raise DataError(f"{task.name}: truncated annotation file; download again: {files}")
    if not items:
        raise DataError(f"{task.name}: nothing to ask about in {task.data}")
    if repeated := [name for name, count in Counter(item.id for item in items).items() if count > 1]:
        raise DataError(f"{task.name}: {task.item_id} {repeated[0]!r} comes more than once")
    images = {item.image: item.size for item in items}
    if missing := [path for path in images if not path.is_file()]:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{task.name}: the image {missing[0]} is not there{others}; check where the images are")
    wrong = set()
    for path, size in images.items():
        # An unreadable image is noted when it is asked about.
        if size is not None and (found := known_size(path)) not in (None, size):
            wrong.add(path)
            told = "{} has {} x {} pixels (W x H), not {} x {}".format(path.name, *(found or ()), *size)
            task.left_out.add("image of another size", path, path.name, told)
    if len(wrong) == len(images):
        raise DataError(f"{task.name}: {task.left_out.last}, nor has any other; give the annotations' own images")
    return [item for item in items if item.image not in wrong]


# ---------------------------------------------------------------------------------------------------------------------
# Asking


def _find_model(options: RunOptions, processes: Processes) -> tuple[dict[str, Any], Any]:
    """The identity of the model, and a function that loads it."""
    from transformers.utils import logging

    from regiongpt.inference.engine import pick_device, pick_dtype
    from regiongpt.inference.predictor import RegionPredictor
    from regiongpt.model.weights import nano_path

    path, device = options.model or nano_path(), pick_device(options.device)
    if options.device is None and device.type == "cuda" and processes.count > 1:
        device = pick_device(f"cuda:{processes.local}")
    dtype = pick_dtype(options.dtype, device)

    logging.disable_progress_bar()
    load = partial(RegionPredictor.from_pretrained, path, device=device, dtype=dtype, untrained=options.untrained)
    return model_identity(path, str(dtype).removeprefix("torch."), str(device), options.detail), load


def _ask(
    tasks: Sequence[Task], listed: Sequence[list[Item]], model: Any, load: Any, store: Store, processes: Processes
) -> list[Predictions]:
    """The answers of each task, with notes on questions that could not be asked; none but in the first process."""
    images = list(dict.fromkeys(item.image for items in listed for item in items))
    hashes = {path: file_identity(path)["sha256"] for path in progress(images, "reading", "images", len(images))}
    keys = [[question_key(model["key"], hashes[item.image], item) for item in items] for items in listed]
    wanted = {key for own in keys for key in own}
    known = store.get(wanted)
    processes.wait()  # all have read the same answers before one writes another, and share the rest out alike
    by_image: dict[Path, dict[str, Item]] = {}  # for all tasks, so that each image is encoded once
    for task, items, own in zip(tasks, listed, keys, strict=True):
        if processes.is_first:
            told = f"{len(items):,} questions, {sum(key in known for key in own):,} answered before"
            print(f"{task.name}: {told}", file=sys.stderr, flush=True)
        for key, item in zip(own, items, strict=True):
            if key not in known:
                by_image.setdefault(item.image, {})[key] = item
    if mine := processes.share(list(by_image.values()), len):
        predictor, name = load(), "asking" + (f", process 1 of {processes.count}" if processes.count > 1 else "")
        with store:
            for asked in progress(mine, name, "images", len(mine)):
                answers = dict(zip(asked, answer_image(predictor, list(asked.values()), model["detail"]), strict=True))
                store.add(answers)
                known |= answers
    processes.wait()
    if not processes.is_first:
        return []
    if processes.count > 1:
        known = store.get(wanted)
    if lost := sum(key not in known for key in wanted):
        raise DataError(
            f"{store.folder}: {lost} answers of other processes are not there; let all of them write to the same "
            "folder, then run the same command again"
        )
    found = []
    for own, items in zip(keys, listed, strict=True):
        said = {item.id: known[key] for key, item in zip(own, items, strict=True)}
        refused = {name: values["refused"] for name, values in said.items() if "refused" in values}
        count = f"{len(refused)} of {len(said)} questions could not be asked and count as wrong"
        notes = tuple(f"{count}, such as item {name}: {why}" for name, why in [*refused.items()][:1])
        answered = {name: Answer.from_dict(each) for name, each in said.items() if name not in refused}
        found.append(Predictions(answered, notes))
    return found


def answer_image(
    predictor: "RegionPredictor", items: Sequence[Item], detail: "Detail" = "fast"
) -> list[dict[str, Any]]:
    """Answer the items of one image, which is encoded once; their questions run as a batch behind it.

    Returns:
        Each answer as plain JSON; ``{"refused": why}`` where the image cannot be read, a region lies outside it, or the
        question does not fit the model's context.
    """
    import torch

    from regiongpt.inference.choices import answer_scores, called
    from regiongpt.inference.engine import TooLong, check_regions, question_turns
    from regiongpt.inference.options import Options

    try:
        photo = load_image(items[0].image)
    except DataError as error:
        return [{"refused": str(error)} for _ in items]
    refused: dict[int, str] = {}
    for k, item in enumerate(items):
        try:
            check_regions(item.regions, *photo.size)
        except RegionError as error:
            refused[k] = str(error)
    found: dict[int, dict[str, Any]] = {k: {} for k in range(len(items)) if k not in refused}

    @contextmanager
    def refusing(*places: int) -> Iterator[None]:
        """Leave out items whose question is too long."""
        try:
            yield
        except TooLong as error:
            for k in places:
                refused[k] = str(error)
                found.pop(k, None)

    engine = predictor.engine
    scene, rows = engine.encode_image(photo), engine.processor.tokens_per_region
    regions = [region for k in found for region in items[k].regions]
    sizes = [rows * len(items[k].regions) for k in found]
    pooled = dict(zip(found, torch.split(engine.pool(scene, regions, detail), sizes) if found else (), strict=True))

    def likelihoods(places: Sequence[int], answers: Sequence[str]) -> "dict[int, Tensor]":
        """Log likelihoods (A,) of answers to items with the same question; none where it is too long."""
        with refusing(*places):
            turns = question_turns((), items[places[0]].question)
            scores = answer_scores(engine, scene, turns, [pooled[k] for k in places], answers)
            return dict(zip(places, scores, strict=True))
        return {}

    together: dict[Any, list[int]] = {}  # items with the same question and choices run together
    for k in found:
        if items[k].choices:
            together.setdefault((items[k].question, items[k].choices, len(items[k].regions)), []).append(k)
    logs: dict[int, Tensor] = {}
    for (_, choices, _), places in together.items():
        logs |= likelihoods(places, choices)
    asked = {}
    for k in list(found):
        item = items[k]
        with refusing(k):
            prompt = engine.prompt(question_turns((), item.question), pooled[k], len(item.regions), item.max_new_tokens)
            asked[k] = (scene, prompt, Options(max_new_tokens=item.max_new_tokens))
    for place, answer in engine.answers(list(asked.values())):
        found[list(asked)[place]]["text"] = answer.text

    for k, own in list(found.items()):
        item, text, likely = items[k], own["text"], logs.get(k)
        if item.expression:
            with refusing(k):
                scores = called(engine, scene, torch.split(pooled[k], rows), [item.expression])[0]
                own["called"] = tuple(scores.tolist())
        if likely is not None:
            own["scores"] = tuple(likely.softmax(-1).tolist())
        if likely is not None and text in item.choices:
            own["probability"] = min(1.0, math.exp(float(likely[item.choices.index(text)])))
        elif text and item.max_new_tokens <= SHORT and (alone := likelihoods([k], (text,))):
            own["probability"] = min(1.0, math.exp(float(alone[k][0])))
    for k, own in found.items():
        try:
            found[k] = Answer(**own).to_dict()
        except DataError as error:
            raise DataError(f"{items[k].image.name}, item {items[k].id}: {error}") from None
    return [{"refused": refused[k]} if k in refused else found[k] for k in range(len(items))]


def question_key(model: str, image: str, item: Item) -> str:
    """Cache key of an answer: a hash of the model's key, the image's SHA-256 and the question."""
    regions = [region.to_dict() for region in item.regions]
    asked = [item.question, regions, list(item.choices), item.max_new_tokens]
    asked += [item.expression] if item.expression else []
    return digest(model, image, asked)


def model_identity(path: Path, dtype: str, device: str, detail: str = "fast") -> dict[str, Any]:
    """Identity of a checkpoint: the SHA-256 of its files, and what else its answers depend on.

    Its ``key`` is a digest of files, dtype, detail, the code that answers, torch and transformers, but not of the
    device, which changes rounding alone. CheckpointError where the folder is no checkpoint, or a file cannot be read.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no checkpoint folder, it has no config.json; check --model")
    try:
        files = {each.name: sha256(each) for each in sorted(path.iterdir()) if each.is_file()}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.filename} cannot be read: {reason(error)}") from None
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{path}: a checkpoint folder without weights (*.safetensors); check --model")
    libraries = {name: found for name, found in versions().items() if name in ("torch", "transformers")}
    # The last parts of the path tell checkpoints from one another; every run ends in "stage2/model".
    parts = [part for part in path.resolve().parts[1:] if part not in ("model", "stage1", "stage2")]
    key = digest(files, dtype, detail, code_hash(), libraries)
    name = "/".join(parts[-2:]) or str(path)
    return {"name": name, "files": files, "dtype": dtype, "device": device, "detail": detail, "key": key}


@cache
def code_hash() -> str:
    """A digest of the sources that turn a question into an answer."""
    root = Path(regiongpt.__file__).parent
    sources = [path for name in ANSWERING for path in ([root / name] if "." in name else (root / name).rglob("*.py"))]
    return digest({str(path.relative_to(root)): sha256(path) for path in sorted(sources)})


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def make_manifest(task: Task, model: Mapping[str, Any], options: RunOptions) -> dict[str, Any]:
    """Where the results of a task come from; ``model`` is empty where predictions are scored."""
    given = options.predictions
    return {
        "settings": task.options(lambda path: path.name),
        "inputs": [file_identity(path) for path in task.inputs()],
        "model": dict(model) or None,
        **({"predictions": file_identity(given)} if given else {}),
        "code": {"commit": commit(), "answering": code_hash()},
        "packages": {"python": platform.python_version(), **versions()},
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": task.options(lambda path: str(path.absolute())),
        "scoring": {"resamples": options.resamples, **({"missing": options.missing} if given else {})},
    }


def _refuse_other(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ConfigError if a folder holds results of another model, other settings or other files."""
    if not (folder / MANIFEST).exists():
        return
    there, now = read_object(folder / MANIFEST, ()), json.loads(json.dumps(manifest))

    def deciding(part: Any) -> Any:
        return {name: value for name, value in part.items() if name not in _NOTED} if isinstance(part, dict) else part

    if differing := [part for part in _DECIDING if deciding(there.get(part)) != deciding(now.get(part))]:
        raise ConfigError(
            f"{folder}: holds other results ({', '.join(differing)} differ); give another --out, or --overwrite"
        )


def _finish(
    folder: Path, task: Task, items: Sequence[Item], found: Predictions, manifest: dict[str, Any], options: RunOptions
) -> TaskRun:
    """Score a task and write its folder atomically, the manifest last."""
    result = task.score(items, found.answers, resamples=options.resamples)
    result.data["notes"] += found.report
    if task.limit:
        result.data["pinned"]["part"] = f"the first {task.limit:,} images alone (--limit)"
    run = TaskRun(folder=folder, result=result.data, manifest=manifest, items=items, answers=found.answers)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    _write_lines(folder / ITEMS, result.rows)
    # The regions that a number in an answer stands for, to read it again.
    marks = {item.id: {"regions": item.regions_key} if item.regions_key else {} for item in items}
    rows = [{"id": name, **answer.to_dict(), **marks[name]} for name, answer in found.answers.items()]
    _write_lines(folder / PREDICTIONS, rows)
    write_report(run, result.rows, options.gallery)
    write_json(folder / RESULT, run.result)
    write_json(folder / MANIFEST, manifest)
    return run


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    # JSON may hold halves of characters, which become "?".
    write_file(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))

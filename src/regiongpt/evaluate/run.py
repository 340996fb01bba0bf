"""Runs benchmarks, or reads predictions, and writes the folder of results; see ``docs/evaluation.md``."""

import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import ConfigDict

import regiongpt
from regiongpt.data.reading import known_size
from regiongpt.data.shards import file_identity
from regiongpt.environment import Processes, commit, connect, launched, machine, progress, versions
from regiongpt.errors import ConfigError, DataError, RegionError, short
from regiongpt.evaluate.report import ITEMS, MANIFEST, PREDICTIONS, RESULT, SAMPLED, TaskRun, read_object, write_report
from regiongpt.evaluate.task import Answer, Item, RunOptions, Task, listed
from regiongpt.images import load_image
from regiongpt.storage import (
    Store,
    digest,
    finite,
    locked,
    read_json,
    reason,
    sha256,
    write_file,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from regiongpt.inference.options import Detail
    from regiongpt.inference.predictor import RegionPredictor
    from regiongpt.inference.vision_language import VisionLanguageModel

ANSWERING: Final = ("inference", "model", "prompts.py", "regions.py", "coverage.py", "images.py")
"""The part of this package that turns an image and a question into an answer."""


class Predictions(NamedTuple):
    """Answers by item id, and sentences on what is missing or could not be asked."""

    answers: Mapping[str, Answer]
    report: Sequence[str] = ()


def evaluate(tasks: Sequence[Task], options: RunOptions) -> list[TaskRun]:
    """Ask a model the questions without a stored answer, or read predictions, then score and write the results.

    Of several processes, the first returns the tasks as written, and the others nothing.
    """
    assert options.out is not None, "evaluate() needs options.out"
    out, given = options.out, options.predictions
    if given and (launched() > 1 or len(tasks) > 1):
        what = "start one process" if launched() > 1 else "they answer one task; name it alone"
        raise ConfigError(f"--predictions: {what}")
    listed = [load_items(task) for task in tasks]
    if options.baseline:
        _check_baseline(tasks, listed, options.region_as)
    processes = Processes() if given else connect(on_cpu=options.device == "cpu")
    model, load = ({}, None) if given else _find_model(options, processes)
    manifests = [make_manifest(task, model, options) for task in tasks]
    for task, manifest in zip(tasks, manifests, strict=True):
        path = out / task.name / MANIFEST
        if path.exists() and not options.overwrite and read_object(path).get("key") != manifest["key"]:
            raise ConfigError(
                f"{path.parent}: holds results of another model, other settings or other files; give another --out, or "
                "--overwrite"
            )
    runs: list[TaskRun] = []
    with locked(out) if processes.is_first else nullcontext():
        if given:
            answered = [read_predictions(given, listed[0])]
        else:
            answered = _ask(tasks, listed, model, load, Store(out / "answers", processes.rank), processes)
        for task, items, manifest, found in zip(tasks, listed, manifests, answered, strict=processes.is_first):
            runs.append(_finish(out / task.name, task, items, found, manifest, options))
    return runs


def load_items(task: Task) -> list[Item]:
    """The items of a task, all of their images there; images of another size than annotated are left out.

    DataError where an image is missing or there is nothing to ask.
    """
    items = task.items()
    if not items:
        raise DataError(f"{task.name}: nothing to ask about in {task.data}")
    assert len({item.id for item in items}) == len(items), f"{task.name}: an id comes more than once"
    images = {item.image: item.size for item in items}
    if missing := [path for path in images if not path.is_file()]:
        count = f"{len(missing)} of {len(images)} images are not there"
        raise DataError(f"{task.name}: {count}, such as {missing[0]}; check where the images are")
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


# -- Asking ------------------------------------------------------------------------------------------------------------


def _find_model(options: RunOptions, processes: Processes) -> tuple[dict[str, Any], Any]:
    """The identity of the model, and a function that loads it."""
    from transformers.utils import logging

    from regiongpt.inference import vision_language as other
    from regiongpt.inference.engine import pick_device, pick_dtype
    from regiongpt.inference.predictor import RegionPredictor
    from regiongpt.model.weights import nano_path

    logging.disable_progress_bar()
    path, device = options.baseline or options.model or nano_path(), pick_device(options.device)
    if options.device is None and device.type == "cuda" and processes.count > 1:
        device = pick_device(f"cuda:{processes.local}")
    dtype = pick_dtype(options.dtype, device)
    place = str(dtype).removeprefix("torch."), str(device)
    if options.baseline:
        config, drawing = read_json(path / "config.json"), Path(regiongpt.__file__).with_name("drawing.py")
        family = str(config.get("model_type")) if isinstance(config, dict) else ""
        if family == "regiongpt":
            raise ConfigError(f"--baseline {path}: a RegionGPT checkpoint; give it as --model")
        if options.region_as == "coordinates" and family not in other.CONVENTIONS:
            raise ConfigError(f"--region-as coordinates: no convention known for {family}; give outline or crop")
        how = {"baseline": family, "region_as": options.region_as, "drawing": sha256(drawing)}
        identity = {**model_identity(path, *place, how), "batch_size": options.batch_size}
        return identity, partial(other.VisionLanguageModel, path, "--baseline", device, dtype)
    load = partial(RegionPredictor.from_pretrained, path, device=device, dtype=dtype, untrained=options.untrained)
    return model_identity(path, *place, {"detail": options.detail}), load


def _check_baseline(tasks: Sequence[Task], listed: Sequence[Sequence[Item]], region_as: str | None) -> None:
    """Raise ConfigError for what a baseline cannot be asked."""
    most = {task.name: max(len(item.regions) for item in items) for task, items in zip(tasks, listed, strict=True)}
    about, several = ([name for name, count in most.items() if count > few] for few in (0, 1))
    if "facts" in most:
        raise ConfigError("facts: reads the sentences of nano's training text, which no baseline writes; leave it out")
    if any("choices" in task.model_fields_set and getattr(task, "choices", False) for task in tasks):
        raise ConfigError("--choices: a baseline's names are not scored; leave it out")
    if about and region_as is None:
        raise ConfigError(f"{about[0]} asks about regions; give --region-as outline, coordinates or crop")
    if not about and region_as is not None:
        raise ConfigError(f"--region-as: no question of {', '.join(most)} is about a region; leave it out")
    if several and region_as == "crop":
        raise ConfigError(f"{several[0]} asks about several regions at once; give --region-as outline or coordinates")


def _ask(
    tasks: Sequence[Task], listed: Sequence[list[Item]], model: Any, load: Any, store: Store, processes: Processes
) -> list[Predictions]:
    """The answers of each task, and which questions could not be asked; in the first process alone."""
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
    if mine := list(by_image.values())[processes.rank :: processes.count]:
        other = "baseline" in model
        groups = _batches(mine, model["batch_size"]) if other else mine
        predictor, name = load(), "asking" + (f", process 1 of {processes.count}" if processes.count > 1 else "")
        with store:
            for asked in progress(groups, name, "batches" if other else "images", len(groups)):
                items = list(asked.values())
                how = model["region_as"] if other else model["detail"]
                given = answer_batch(predictor, items, how) if other else answer_image(predictor, items, how)
                answers = dict(zip(asked, given, strict=True))
                store.add(answers)
                known |= answers
    processes.wait()
    if not processes.is_first:
        return []
    if processes.count > 1:
        known = store.get(wanted)
    if lost := sum(key not in known for key in wanted):
        raise DataError(f"{store.folder}: lacks {lost} answers of other processes; give all one folder, then run again")
    found = []
    for own, items in zip(keys, listed, strict=True):
        said = {item.id: known[key] for key, item in zip(own, items, strict=True)}
        refused = {name: values["refused"] for name, values in said.items() if "refused" in values}
        count = f"{len(refused)} of {len(said)} questions could not be asked and count as wrong"
        notes = [f"{count}, such as item {name}: {why}" for name, why in [*refused.items()][:1]]
        if "baseline" in model:
            shown = f", regions as {model['region_as']}" if any(item.regions for item in items) else ""
            notes.insert(0, f"answers of the baseline {model['name']} ({model['baseline']}){shown}")
        answered = {name: Answer.model_validate(each) for name, each in said.items() if name not in refused}
        found.append(Predictions(answered, notes))
    return found


def answer_image(
    predictor: "RegionPredictor", items: Sequence[Item], detail: "Detail" = "fast"
) -> list[dict[str, Any]]:
    """Answers as plain JSON to the items of one image, which is encoded once; the questions run as a batch behind it.

    An answer is ``{"refused": why}`` where the image cannot be read, a region lies outside it, or the question does not
    fit the model's context.
    """
    import torch

    from regiongpt.inference.choices import ClosedSet, answer_scores, closed_set, log_likelihoods
    from regiongpt.inference.engine import TooLong, check_regions, question_turns
    from regiongpt.inference.options import Options

    try:
        photo = load_image(items[0].image)
    except DataError as error:
        return [{"refused": str(error)} for _ in items]
    found: list[dict[str, Any]] = []
    for item in items:
        try:
            check_regions(item.regions, *photo.size)
            found.append({})
        except RegionError as error:
            found.append({"refused": str(error)})
    engine = predictor.engine
    scene = engine.encode_image(photo)
    inside = [k for k, own in enumerate(found) if not own]
    pooled = engine.pool(scene, [region for k in inside for region in items[k].regions], detail)
    parts = torch.split(pooled, [len(items[k].regions) for k in inside]) if inside else ()
    features = dict(zip(inside, parts, strict=True))

    prompts = {}
    together: dict[ClosedSet, list[int]] = {}  # items with the same question and choices run together
    for k in inside:
        item, turns = items[k], question_turns((), items[k].question)
        try:
            prompt = engine.prompt(turns, features[k], len(item.regions), item.max_new_tokens)
            if item.choices:
                together.setdefault(closed_set(engine, turns, len(item.regions), item.choices), []).append(k)
            prompts[k] = (scene, replace(prompt, sure=item.sure), Options(max_new_tokens=item.max_new_tokens))
        except TooLong as error:
            found[k]["refused"] = str(error)
    likelihoods: dict[int, torch.Tensor] = {}
    for closed, places in together.items():
        likelihoods |= zip(places, log_likelihoods(engine, scene, closed, [features[k] for k in places]), strict=True)
    said = {list(prompts)[place]: answer for place, answer in engine.answers(list(prompts.values()))}
    for k in prompts:
        item, own, text, likely = items[k], found[k], said[k].text, likelihoods.get(k)
        own["text"] = text
        if likely is not None:
            own["scores"] = tuple(likely.softmax(-1).tolist())
        if item.sure and text:
            own["probability"] = said[k].probability
            if not said[k].complete:  # the text that was cut off, with the end of the turn behind it
                with suppress(TooLong):
                    sure = answer_scores(engine, scene, question_turns((), item.question), [features[k]], [text])[0, 0]
                    own["probability"] = min(1.0, math.exp(sure))
        found[k] = Answer.read(own, f"{item.image.name}, item {item.id}: ").to_dict()
    return found


def _batches(by_image: Sequence[Mapping[str, Item]], size: int) -> list[dict[str, Item]]:
    """Items by key in batches across images, of answers with the same room, which a batch shares."""
    pairs: dict[int, list[tuple[str, Item]]] = {}
    for key, item in (pair for own in by_image for pair in own.items()):
        pairs.setdefault(item.max_new_tokens, []).append((key, item))
    return [dict(own[k : k + size]) for own in pairs.values() for k in range(0, len(own), size)]


def answer_batch(model: "VisionLanguageModel", items: Sequence[Item], region_as: str) -> list[dict[str, Any]]:
    """Answers of a baseline as :func:`answer_image` gives them, without scores of choices."""
    from regiongpt.inference.engine import check_regions

    found: list[dict[str, Any]] = [{} for _ in items]
    chats = {}
    for k, item in enumerate(items):
        try:
            photo = load_image(item.image)
            check_regions(item.regions, *photo.size)
            chats[k] = model.region_chat(photo, item.question, item.regions, region_as, item.detail.get("ids", ()))
        except (DataError, RegionError, ValueError) as error:  # such as an image too thin to be resized
            found[k]["refused"] = str(error)
    how: Any = {"sure": any(item.sure for item in items), "repetition_penalty": 1.0}  # whatever the model's own is
    try:
        said = model.ask(list(chats.values()), items[0].max_new_tokens, **how) if chats else []
    except DataError as error:
        if len(items) > 1:  # one of them is at fault
            return [answer for item in items for answer in answer_batch(model, [item], region_as)]
        return [{"refused": str(error)}]
    for k, each in zip(chats, said, strict=True):
        found[k]["text"] = each.text.strip()
        if items[k].sure and each.ended and found[k]["text"]:
            found[k]["probability"] = each.probability
    return found


def question_key(model: str, image: str, item: Item) -> str:
    """Cache key of an answer: a hash of the model's key, the image's SHA-256 and the question."""
    regions, names = [region.to_dict() for region in item.regions], item.choices or item.detail.get("ids", ())
    return digest(model, image, [item.question, regions, list(names), item.max_new_tokens, item.sure])


def model_identity(path: Path, dtype: str, device: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """Identity of a model: the SHA-256 of its folder's files, and what else its answers depend on.

    Its ``key`` is a digest of files, dtype, ``how`` it is asked, the code that answers, torch and transformers, but not
    of the device, which changes rounding alone.
    """
    files = {each.name: file_identity(each)["sha256"] for each in sorted(path.iterdir()) if each.is_file()}
    libraries = {name: found for name, found in versions().items() if name in ("torch", "transformers")}
    # The last parts of the path tell checkpoints from one another; every run ends in "stage2/model".
    parts = [part for part in path.resolve().parts[1:] if part not in ("model", "stage1", "stage2")]
    key = digest(files, dtype, how, code_hash(), libraries)
    name = "/".join(parts[-2:]) or str(path)
    return {"name": name, "files": files, "dtype": dtype, "device": device, **how, "key": key}


@cache
def code_hash() -> str:
    """A digest of the sources that turn a question into an answer."""
    root = Path(regiongpt.__file__).parent
    sources = [path for name in ANSWERING for path in ([root / name] if "." in name else (root / name).rglob("*.py"))]
    return digest({str(path.relative_to(root)): sha256(path) for path in sorted(sources)})


# -- Predictions -------------------------------------------------------------------------------------------------------


class _Line(Answer):
    model_config = ConfigDict(extra="forbid")

    id: int | str
    regions: str = ""


def read_predictions(path: Path, items: Sequence[Item]) -> Predictions:
    """Read a prediction for each item; ``docs/evaluation.md`` describes the file. DataError where one is wrong."""
    by_id = {item.id: item for item in items}
    lines: dict[str, _Line] = {}
    try:
        # Line feeds alone end a line: JSON may hold other separators of lines within a text.
        texts = path.read_bytes().decode("utf-8-sig").split("\n")
        entries = [(f"{path}:{k}", json.loads(text)) for k, text in enumerate(texts, 1) if text.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON lines in UTF-8: {reason(error)}") from None
    for where, entry in entries:
        line = _Line.read(entry, f"{where}: ")
        name = str(line.id)
        if name not in by_id:
            raise DataError(f"{where}: no item {short(name)}; the benchmark has {listed(list(by_id))}")
        if name in lines:
            raise DataError(f"{where}: another prediction for item {name}; keep one")
        item, lines[name] = by_id[name], line
        if line.regions and line.regions != item.regions_key:
            raise DataError(f"{where}: about other regions than this question; give --seed and --proposals as before")
        choices = item.choices or tuple(item.detail.get("ids", ()))
        if line.scores is not None and len(line.scores) != len(choices):
            raise DataError(f"{where}: scores: give a number for each of {len(choices)} choices")
    answers = {
        name: Answer(text=line.text, probability=line.probability, scores=line.scores)
        for name, line in lines.items()
        if not (line.text is None and line.scores is None)
    }
    lacking = {"prediction": [name for name in by_id if name not in lines]}
    for kind in ("text", "scores"):
        without = [name for name, answer in answers.items() if getattr(answer, kind) is None]
        lacking[kind] = without if len(without) < len(answers) else []
    for kind, those in lacking.items():
        if those:
            raise DataError(f"{path}: {len(those)} of {len(items)} items have no {kind}: {listed(those)}; add it")
    return Predictions(answers)


# -- The folder --------------------------------------------------------------------------------------------------------


def make_manifest(task: Task, model: Mapping[str, Any], options: RunOptions) -> dict[str, Any]:
    """Where the results of a task come from; ``model`` is empty where predictions are scored."""
    given = options.predictions
    typed = {name: getattr(task, name) for name in type(task).model_fields}
    settings = {name: value.name if isinstance(value, Path) else value for name, value in typed.items()}
    inputs = [file_identity(path) for path in task.inputs()]
    predictions = {"predictions": file_identity(given)} if given else {}
    scoring = {"resamples": options.resamples}
    deciding = [{**settings, "data": ""}, inputs, model.get("key"), predictions, scoring]
    return {
        "settings": settings,
        "inputs": inputs,
        "model": dict(model) or None,
        **predictions,
        "code": {"commit": commit(), "answering": code_hash()},
        "packages": {"python": platform.python_version(), **versions()},
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "scoring": scoring,
        "key": digest(deciding),
    }


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
    answers = {item.id: found.answers.get(item.id, Answer()) for item in items}
    _write_lines(
        folder / PREDICTIONS, [{"id": name, **marks[name], **each.to_dict()} for name, each in answers.items()]
    )
    write_report(run, result.rows, options.gallery)
    sampled = {
        name: {key: {**each._asdict(), "values": each.values.tolist()} for key, each in own.items()}
        for name, own in result.sampled.items()
    }
    write_json(folder / SAMPLED, finite(sampled), indent=None)
    write_json(folder / RESULT, run.result)
    write_json(folder / MANIFEST, manifest)
    return run


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    # JSON may hold halves of characters, which become "?".
    write_file(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))

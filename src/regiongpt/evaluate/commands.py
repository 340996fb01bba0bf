"""The verb ``regiongpt evaluate``.

A task's options are its dataclass's fields, so a new task has its command line as soon as it is registered.
"""

import argparse
import dataclasses
import json
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from regiongpt.data.commands import option_arguments
from regiongpt.data.progress import Meter
from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.evaluate import mistakes, report, tables
from regiongpt.evaluate.manifest import manifest, model_identity
from regiongpt.evaluate.predictions import read_predictions
from regiongpt.evaluate.runner import Runner, load_items, make_keys, usable
from regiongpt.evaluate.runs import options_of, read_run, refuse_other, write_task
from regiongpt.evaluate.sharding import Processes, processes
from regiongpt.evaluate.store import AnswerStore
from regiongpt.evaluate.task import RESAMPLES, Answer, Item, Result, Task
from regiongpt.evaluate.tasks import TASKS, task_class

if TYPE_CHECKING:
    from regiongpt.inference import RegionPredictor

GALLERY: Final = 24
_OF_A_RUN: Final = ("predictions", "model", "device", "dtype", "overwrite", "gallery", "missing", "unknown")
"""Options that a comparison has no use for."""


def run_evaluate(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """``regiongpt evaluate TASK... --data DIR --out DIR`` and ``regiongpt evaluate --compare RUN_A RUN_B``.

    Args:
        parser: Still without arguments.
        arguments: What follows the verb.

    Returns:
        0.

    Raises:
        ConfigError: An option is wrong, or ``--out`` holds something else.
        DataError: A file of the data set, of predictions or of a run cannot be used.
        CheckpointError: ``--model`` is not a checkpoint folder.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    names = _named(arguments)
    _add_options(parser, names)
    options = parser.parse_args(arguments)
    if options.compare:
        return _compare(options)
    if options.html is not None:
        raise ConfigError("expected --html together with --compare, got it alone; a run writes index.html into --out")
    if not options.tasks:
        raise ConfigError(f"expected a task among {', '.join(TASKS)}, got none; see `{parser.prog} --help`")
    if options.out is None:
        raise ConfigError("expected --out DIR, the folder of the results, got none")
    _check_numbers(options)
    tasks = [_make(name, options) for name in names]
    if options.predictions is None:
        for name in ("missing", "unknown"):
            if getattr(options, name) is not None:
                raise ConfigError(f"expected --{name} together with --predictions, got it alone; leave it out")
        return _evaluate_model(tasks, options)
    return _evaluate_predictions(tasks, options)


def _named(arguments: Sequence[str]) -> list[str]:
    """The tasks, which stand before the first option."""
    names: list[str] = []
    for word in arguments:
        if word.startswith("-"):
            break
        task_class(word)
        if word in names:
            raise ConfigError(f"expected every task once, got {word!r} twice")
        names.append(word)
    return names


def _add_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    parser.description = "Ask a model the questions of benchmarks, or take anyone's answers, and score them."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = "\n".join(f"  {name:<18}{task_class(name).summary}" for name in TASKS) if not names else ""
    parser.epilog = (
        f"tasks:\n{known}\n\n`regiongpt evaluate TASK --help` lists the options of a task." if known else None
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="the benchmarks, before all options")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; the same again goes on there")
    parser.add_argument("--model", type=Path, metavar="PATH", help="checkpoint folder (default: the package's model)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these answers; no model is run")
    parser.add_argument("--missing", choices=("refuse", "wrong"), help="items without a prediction (default: refuse)")
    parser.add_argument("--unknown", choices=("refuse", "ignore"), help="predictions for no item (default: refuse)")
    parser.add_argument(
        "--resamples", type=int, metavar="N", help=f"of the bootstrap; 0 for no intervals (default: {RESAMPLES})"
    )
    parser.add_argument(
        "--gallery", type=int, metavar="N", help=f"worst mistakes on the page of results (default: {GALLERY})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other figures in --out")
    parser.add_argument("--json", action="store_true", help="print json")
    group = parser.add_argument_group("comparing")
    group.add_argument("--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"), help="two folders of --out")
    group.add_argument("--html", type=Path, metavar="FILE", help="with --compare: write it as a page")
    if names:
        _add_task_options(parser, names)
    else:
        group.add_argument("--data", type=Path, metavar="DIR", help="with --compare: where the data set is now")


def _add_task_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """The fields of the tasks: ``--limit`` for all that have it and, of several, ``--pope.limit`` for one of them."""
    kinds: dict[str, list[Any]] = {}
    common: dict[str, dict[str, Any]] = {}
    for name, field, kind in _fields(names):
        given = {**option_arguments(field, kind), "required": False, "default": argparse.SUPPRESS}
        kinds.setdefault(field.name, []).append(kind)
        common.setdefault(field.name, given)
        if len(names) > 1:
            flag = f"--{name}.{field.name.replace('_', '-')}"
            parser.add_argument(flag, dest=f"{name}.{field.name}", **{**given, "help": argparse.SUPPRESS})
    title = f"options of {names[0]}" if len(names) == 1 else "options of the tasks; --TASK.OPTION is for one of them"
    group = parser.add_argument_group(title)
    for field_name, given in common.items():
        if all(kind == kinds[field_name][0] for kind in kinds[field_name]):
            group.add_argument(f"--{field_name.replace('_', '-')}", dest=field_name, **given)


def _fields(names: Sequence[str]) -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Task, field and type, required fields first."""
    for name in names:
        kind = task_class(name)
        types = typing.get_type_hints(kind)
        for field in sorted(dataclasses.fields(kind), key=lambda field: field.default is not dataclasses.MISSING):
            yield name, field, types[field.name]


def _make(name: str, options: argparse.Namespace) -> Task:
    """A task of what was typed for it, or for all."""
    values: dict[str, Any] = {}
    for _, field, _ in _fields([name]):
        for dest in (field.name, f"{name}.{field.name}"):
            if hasattr(options, dest):
                value = getattr(options, dest)
                values[field.name] = tuple(value) if isinstance(value, list) else value
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ConfigError(f"{name}: expected --{field.name.replace('_', '-')}, got none")
    return task_class(name)(**values)


def _check_numbers(options: argparse.Namespace) -> None:
    options.resamples = RESAMPLES if options.resamples is None else options.resamples
    options.gallery = GALLERY if options.gallery is None else options.gallery
    if min(options.resamples, options.gallery) < 0:
        raise ConfigError(
            f"expected --resamples and --gallery of at least 0, got {options.resamples} and {options.gallery}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# A model


def _evaluate_model(tasks: Sequence[Task], options: argparse.Namespace) -> int:
    here = processes()
    listed = [(task, _load(task, here)) for task in tasks]
    device, dtype = _device(options, here)
    path = options.model
    if path is None:
        from regiongpt.model.weights import nano_path

        path = nano_path()
    model = model_identity(path, dtype, device)
    settings = [_manifest(task, model, options) for task in tasks]
    for task, noted in zip(tasks, settings, strict=True):
        refuse_other(options.out, task.name, noted, options.overwrite)
    with _shown(here, "images", "images"):
        asked = make_keys(model["key"], listed)
    store = AnswerStore(options.out, here.rank)
    here.wait()  # all have read the same answers before the first writes another
    with store:
        runner = Runner(asked, store, here, lambda: _predictor(path, device, dtype))
        if store.damaged and here.first:
            _say(f"{store.folder}: {store.damaged} lines that were cut short are passed over and asked again")
        failures: list[RegionGPTError] = []
        for number, (task, items) in enumerate(listed):
            if here.first:
                _say(runner.plan(number))
            found = runner.answer(number)
            if here.first:
                try:
                    answers, notes = usable(found)
                    _finish(task, items, answers, settings[number], options, notes)
                except RegionGPTError as error:  # the answers are kept, and other tasks need not wait for this one
                    failures.append(error)
                    _say(f"{task.name}: {error}")
    if here.first:
        _conclude(tasks, options, failures)
    return 0


def _load(task: Task, here: Processes) -> list[Item]:
    with _shown(here, task.name, "items"):
        return load_items(task)


def _shown(here: Processes, name: str, unit: str) -> Any:
    """A meter in the process that reports, and nothing in the others."""
    from contextlib import nullcontext

    return Meter(name, unit=unit) if here.first else nullcontext()


def _device(options: argparse.Namespace, here: Processes) -> tuple[str, str]:
    """Names of the device and the dtype that the model will have."""
    from regiongpt.inference.engine import pick_device, pick_dtype

    device = pick_device(options.device)
    if options.device is None and device.type == "cuda" and here.count > 1:
        device = pick_device(f"cuda:{here.local}")
    return str(device), str(pick_dtype(options.dtype, device)).removeprefix("torch.")


def _predictor(path: Path, device: str, dtype: str) -> "RegionPredictor":
    from transformers.utils import logging

    from regiongpt.inference import RegionPredictor

    logging.disable_progress_bar()
    return RegionPredictor.from_pretrained(path, device=device, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Anyone's answers


def _evaluate_predictions(tasks: Sequence[Task], options: argparse.Namespace) -> int:
    if len(tasks) > 1:
        raise ConfigError(f"expected one task with --predictions, got {len(tasks)}; score them one after the other")
    for name in ("model", "device", "dtype"):
        if getattr(options, name) is not None:
            raise ConfigError(f"expected --predictions or --{name}, got both; no model is run for predictions")
    task, here = tasks[0], Processes()
    noted = _manifest(task, None, options)
    refuse_other(options.out, task.name, noted, options.overwrite)
    items = _load(task, here)
    found = read_predictions(
        options.predictions, task, items, missing=options.missing or "refuse", unknown=options.unknown or "refuse"
    )
    _finish(task, items, found.answers, noted, options, found.report)
    _conclude(tasks, options, [])
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What both share


def _manifest(task: Task, model: Mapping[str, Any] | None, options: argparse.Namespace) -> dict[str, Any]:
    noted = manifest(task.settings(), task.inputs(), model)
    noted["options"] = options_of(task)
    noted["scoring"] = {"resamples": options.resamples}
    if options.predictions is not None:
        from regiongpt.data.shards import file_identity

        noted["predictions"] = file_identity(options.predictions)
        noted["scoring"] |= {"missing": options.missing or "refuse", "unknown": options.unknown or "refuse"}
    return noted


def _finish(
    task: Task,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    noted: dict[str, Any],
    options: argparse.Namespace,
    notes: Sequence[str],
) -> None:
    """Scores a task and writes its part of the run."""
    result: Result = task.score(items, answers, resamples=options.resamples)
    result = dataclasses.replace(result, notes=(*notes, *result.notes))
    run = write_task(options.out, result, items, answers, noted)
    chosen = mistakes.worst(result, answers, options.gallery)
    cards = mistakes.gallery(chosen, {item.id: item for item in items}, answers)
    (run.folder / report.GALLERY).write_text(cards, encoding="utf-8", errors="replace")
    if not options.json:
        print(tables.as_text(run), end="\n\n", flush=True)


def _conclude(tasks: Sequence[Task], options: argparse.Namespace, failures: Sequence[RegionGPTError]) -> None:
    """Writes the page of the whole run, and raises what a task has failed with."""
    if failures:
        raise failures[0]
    runs = read_run(options.out)
    written = report.write_report(options.out, runs)
    if options.json:
        mine = {task.name for task in tasks}
        print(json.dumps([{**run.result, "manifest": run.manifest} for run in runs if run.name in mine], indent=1))
    else:
        print(f"results written to {options.out}; see {written}")


def _compare(options: argparse.Namespace) -> int:
    from regiongpt.evaluate import compare
    from regiongpt.pages import write_page

    for name in _OF_A_RUN:
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"expected --compare or --{name}, got both; leave one of them out")
    if options.out is not None:
        raise ConfigError("expected --compare without --out, got both; --json prints the comparison, --html writes it")
    _check_numbers(options)
    if options.resamples == 0:
        raise ConfigError("expected --resamples of at least 1 with --compare, got 0; a comparison is made of them")
    fields = {field.name for _, field, _ in _fields(options.tasks)} - {"data"}
    if extra := sorted(dest for dest in vars(options) if dest.rpartition(".")[2] in fields):
        raise ConfigError(
            f"expected --compare with the runs' own settings, got --{extra[0].replace('_', '-')} too; leave it out"
        )
    a, b = options.compare
    found = compare.compare_runs(a, b, getattr(options, "data", None), options.tasks, options.resamples)
    if options.html is not None:
        write_page(compare.as_page(found, a, b), options.html)
        _say(f"page written to {options.html}")
    if options.json:
        print(json.dumps([each.to_dict() for each in found], indent=1, ensure_ascii=False))
    else:
        print(f"A: {a}\nB: {b}\n")
        print("\n\n".join(map(compare.as_text, found)))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""The verb ``regiongpt evaluate``.

A task's options are its dataclass's fields, so a new task has its command line as soon as it is registered.
"""

import argparse
import dataclasses
import json
import os
import sys
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from regiongpt.data.commands import option_arguments
from regiongpt.distributed import Processes, connect, launched
from regiongpt.errors import ConfigError
from regiongpt.evaluate import tables
from regiongpt.evaluate.runs import PAGE, finite
from regiongpt.evaluate.session import GALLERY, Session
from regiongpt.evaluate.task import RESAMPLES, Task
from regiongpt.evaluate.tasks import TASKS, task_class

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
    _add_options(parser, names, {"-h", "--help"} & set(arguments))
    options = parser.parse_args(arguments)
    if options.tasks != names:
        raise ConfigError(
            f"expected the tasks before all options, got {options.tasks[0]!r} after one; write `{parser.prog} "
            f"{' '.join(options.tasks)} ...`"
        )
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
    _check_predictions(tasks, options)
    session = Session(
        out=options.out,
        resamples=options.resamples,
        gallery=options.gallery,
        overwrite=options.overwrite,
        processes=Processes() if options.predictions is not None else connect(on_cpu=options.device == "cpu"),
    )
    if options.predictions is not None:
        missing: Any = options.missing or "refuse"
        unknown: Any = options.unknown or "refuse"
        runs = [session.score_predictions(tasks[0], options.predictions, missing, unknown)]
    else:
        runs = session.score_model(tasks, options.model, options.device, options.dtype)
    if runs and options.json:
        print(json.dumps([{**run.result, "manifest": run.manifest} for run in runs], indent=1, ensure_ascii=False))
    elif runs:
        print("\n\n".join(map(tables.as_text, runs)))
        print(f"\nresults written to {options.out}; see {options.out / PAGE}")
    return 0


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


def _add_options(parser: argparse.ArgumentParser, names: Sequence[str], helping: Collection[str]) -> None:
    parser.description = "Ask a model the questions of benchmarks, or take anyone's answers, and score them."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if helping and not names:  # only the help that lists them all needs them all
        known = "\n".join(f"  {name:<18}{task_class(name).summary}" for name in TASKS)
        parser.epilog = f"tasks:\n{known}\n\n`regiongpt evaluate TASK --help` lists the options of a task."
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


def _check_predictions(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    """Refuses what does not go with ``--predictions``, or without it."""
    given = options.predictions is not None
    for name in ("model", "device", "dtype") if given else ("missing", "unknown"):
        if getattr(options, name) is not None:
            why = "no model is run for predictions" if given else "a model answers everything"
            raise ConfigError(f"expected --{name} {'without' if given else 'with'} --predictions; {why}; leave it out")
    if given and launched() > 1:
        raise ConfigError("expected one process with --predictions, got several; there is nothing to share out")
    if given and len(tasks) > 1:
        raise ConfigError(f"expected one task with --predictions, got {len(tasks)}; score them one after the other")


def _check_numbers(options: argparse.Namespace) -> None:
    options.resamples = RESAMPLES if options.resamples is None else options.resamples
    options.gallery = GALLERY if options.gallery is None else options.gallery
    if min(options.resamples, options.gallery) < 0:
        raise ConfigError(
            f"expected --resamples and --gallery of at least 0, got {options.resamples} and {options.gallery}"
        )


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
        print(f"page written to {options.html}", file=sys.stderr)
    if options.json:
        print(json.dumps(finite([each.to_dict() for each in found]), indent=1, ensure_ascii=False))
    else:
        print(f"A: {a}\nB: {b}\n")
        print("\n\n".join(map(compare.as_text, found)))
    return 0

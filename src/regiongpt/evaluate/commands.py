"""The verb ``regiongpt evaluate``.

A task's options are its fields, so a new task has its command line as soon as it is registered.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model

from regiongpt.console import progress_shown, quiet_libraries
from regiongpt.distributed import Processes, connect, launched
from regiongpt.errors import ConfigError
from regiongpt.evaluate import tables
from regiongpt.evaluate.compare import compare_runs
from regiongpt.evaluate.runs import PAGE
from regiongpt.evaluate.session import GALLERY, Session
from regiongpt.evaluate.task import RESAMPLES, Task
from regiongpt.evaluate.tasks import TASKS, task_class
from regiongpt.report import write_page
from regiongpt.settings import Settings, add_options, read_options


class RunOptions(Settings):
    """What is asked of a run, whatever its tasks."""

    out: Path | None = None
    """Folder of the results; the same command again goes on there."""
    model: Path | None = None
    """Checkpoint folder; otherwise the package's own model."""
    device: str | None = None
    """cuda, mps or cpu; otherwise the first of these there is."""
    dtype: str | None = None
    """float32, bfloat16 or float16; otherwise float32 on the CPU and bfloat16 elsewhere."""
    predictions: Path | None = None
    """Score these answers; no model is run."""
    missing: Literal["refuse", "wrong"] = "refuse"
    """With --predictions: what to do with items that have none."""
    unknown: Literal["refuse", "ignore"] = "refuse"
    """With --predictions: what to do with those for no item."""
    resamples: int = Field(default=RESAMPLES, ge=0, le=1_000_000)
    """Resamples of the bootstrap; 0 for no intervals."""
    gallery: int = Field(default=GALLERY, ge=0)
    """Worst mistakes on the page of results."""
    overwrite: bool = False
    """Replace other results in --out."""


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
    quiet_libraries()
    names = _named(arguments)
    _add_options(parser, names, all_tasks=not names and bool({"-h", "--help"} & set(arguments)))
    typed = parser.parse_args(arguments)
    if typed.tasks != names:
        raise ConfigError(
            f"{typed.tasks[0]}: name the tasks before all options: `{parser.prog} {' '.join(typed.tasks)} ...`"
        )
    options = read_options(RunOptions, typed)
    if typed.compare:
        return _compare(typed, options.resamples)
    if typed.html is not None:
        raise ConfigError("--html goes with --compare; a run writes index.html into --out")
    if not names:
        raise ConfigError(f"give a task: {', '.join(TASKS)}; see `{parser.prog} --help`")
    if options.out is None:
        raise ConfigError("give --out DIR, the folder of the results")
    tasks = [_read_task(name, typed) for name in names]
    _check_predictions(options, typed, len(tasks))
    session = Session(
        out=options.out,
        resamples=options.resamples,
        gallery=options.gallery,
        overwrite=options.overwrite,
        processes=Processes() if options.predictions is not None else connect(on_cpu=options.device == "cpu"),
    )
    with progress_shown() if session.processes.is_first else nullcontext():
        if options.predictions is not None:
            runs = [session.score_predictions(tasks[0], options.predictions, options.missing, options.unknown)]
        else:
            runs = session.score_model(tasks, options.model, options.device, options.dtype)
    if runs and typed.json:
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
            raise ConfigError(f"{word}: given twice; name every task once")
        names.append(word)
    return names


def _add_options(parser: argparse.ArgumentParser, names: Sequence[str], all_tasks: bool) -> None:
    parser.description = "Ask a model the questions of benchmarks, or take anyone's answers, and score them."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if all_tasks:  # only the help that lists them needs them all
        known = "\n".join(f"  {name:<18}{task_class(name).summary}" for name in TASKS)
        parser.epilog = f"tasks:\n{known}\n\n`regiongpt evaluate TASK --help` lists the options of a task."
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="the benchmarks, before all options")
    parser.add_argument("--json", action="store_true", help="print json")
    add_options(parser, RunOptions, "options of the run")
    group = parser.add_argument_group("comparing")
    group.add_argument("--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"), help="two folders of --out")
    group.add_argument("--html", type=Path, metavar="FILE", help="with --compare: write it as a page")
    if len(names) == 1:
        add_options(parser, task_class(names[0]), f"options of {names[0]}", required=False)
    elif names:
        _add_options_of_several(parser, names)
    else:
        group.add_argument(
            "--data", default=argparse.SUPPRESS, metavar="DIR", help="with --compare: where the data set is now"
        )


def _add_options_of_several(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """``--limit`` for all tasks that have it, and ``--pope.limit`` for one of them."""
    shared: dict[str, Any] = {}
    kinds = [task_class(name) for name in names]
    for field, info in ((field, info) for kind in kinds for field, info in kind.model_fields.items()):
        those = [kind.model_fields[field].annotation for kind in kinds if field in kind.model_fields]
        if all(each == those[0] for each in those):
            shared.setdefault(field, (info.annotation, Field(default=None, description=info.description)))
    title = "options of the tasks; --TASK.OPTION is for one of them"
    add_options(parser, create_model("Shared", __base__=Settings, **shared), title)
    for name, kind in zip(names, kinds, strict=True):
        add_options(parser, kind, prefix=f"{name}.")


def _read_task(name: str, typed: argparse.Namespace) -> Task:
    """A task of what was typed for it, or for all."""
    kind = task_class(name)
    values = {
        field: getattr(typed, dest)
        for field in kind.model_fields
        for dest in (field, f"{name}.{field}")
        if hasattr(typed, dest)
    }
    try:
        return read_options(kind, argparse.Namespace(**values))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _check_predictions(options: RunOptions, typed: argparse.Namespace, tasks: int) -> None:
    """Refuse what does not go with ``--predictions``, or without it."""
    given = options.predictions is not None
    for name in ("model", "device", "dtype") if given else ("missing", "unknown"):
        if hasattr(typed, name):
            why = "no model is run for --predictions" if given else "it goes with --predictions"
            raise ConfigError(f"--{name}: {why}; leave it out")
    if given and launched() > 1:
        raise ConfigError("--predictions: start one process, there is nothing to share out")
    if given and tasks > 1:
        raise ConfigError(f"--predictions: answers to one task, and {tasks} are named; score them one after the other")


def _compare(typed: argparse.Namespace, resamples: int) -> int:
    kinds = [task_class(name) for name in typed.tasks]
    names = {*RunOptions.model_fields} - {"resamples"} | {each for kind in kinds for each in kind.model_fields} - {
        "data"
    }
    if extra := sorted(dest for dest in vars(typed) if dest.rpartition(".")[2] in names):
        raise ConfigError(f"--{extra[0].replace('_', '-')}: two runs are compared as they were made; leave it out")
    if resamples == 0:
        raise ConfigError("--resamples: a comparison needs at least 1")
    a, b = typed.compare
    data = Path(typed.data) if hasattr(typed, "data") else None
    found = compare_runs(a, b, data, typed.tasks, resamples)
    if typed.html is not None:
        made = f"A: {a}; B: {b}; differences are B less A, times 100"
        write_page(typed.html, "comparison.html", title="Two runs compared", made=made, comparisons=found)
        print(f"page written to {typed.html}", file=sys.stderr)
    if typed.json:
        print(json.dumps([each.to_dict() for each in found], indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(f"A: {a}\nB: {b}\n\n" + "\n\n".join(each.as_text() for each in found))
    return 0

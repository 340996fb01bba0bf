"""The verb ``regiongpt ablate``."""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from regiongpt.ablate import summary
from regiongpt.ablate.study import Study
from regiongpt.ablate.variants import KINDS, Variant, check_names, chosen
from regiongpt.distributed import launched
from regiongpt.errors import ConfigError
from regiongpt.evaluate.paper import TABLES
from regiongpt.evaluate.runs import PAGE, RESULT, TaskRun
from regiongpt.evaluate.task import RESAMPLES, Task
from regiongpt.evaluate.tasks import task_class
from regiongpt.pages import write_page
from regiongpt.storage import finite, write_json
from regiongpt.train.recipe import Recipe

TABLE = "table.md"
_ASKED = "--eval."


def run_ablate(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """``regiongpt ablate KIND CONFIG.toml --out DIR [--variants A,B] [--seeds 0,1,2] [--stage2.lr 5e-4 ...]``.

    Args:
        parser: Still without arguments.
        arguments: What follows the verb.

    Returns:
        0.

    Raises:
        ConfigError: An option is wrong, or the folder holds runs of another recipe.
        DataError: A data set cannot be used.
        CheckpointError: A checkpoint cannot be used.
    """
    _add_options(parser)
    options, words = parser.parse_known_args(arguments)
    asked, overrides = _split(words)
    if launched() > 1:
        raise ConfigError("expected one process, got several; variants are trained one after the other")
    if options.resamples < 1:
        raise ConfigError(f"expected --resamples of at least 1, got {options.resamples}")
    base = Recipe.load(options.config, overrides)
    variants = chosen(options.kind, options.variants, base)
    check_names(variants)
    _refuse_varied(options.kind, variants, overrides, asked)
    asked.setdefault("data", base.data.root)
    study = Study(
        kind=options.kind,
        recipe=options.config,
        overrides=tuple(overrides),
        variants=variants,
        seeds=_seeds(options.seeds),
        tasks={variant.name: _task(options.task, {**asked, **variant.asked}) for variant in variants},
        out=options.out,
        device=options.device,
        resamples=options.resamples,
        shared=options.shared,
        reuse=options.reuse,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    print(_write(study, study.run()))
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train the variants of one part of the model alike, ask them alike, and set them side by side."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = "\n".join(f"  {name:<12}{kind.summary}" for name, kind in KINDS.items())
    parser.epilog = (
        f"what is varied:\n{kinds}\n\nEvery field of the recipe can be overridden by its dotted name (--stage2.lr 5e-4 "
        "--data.root DIR), and\nevery option of the benchmark is given as --eval.OPTION (--eval.limit 50). Run the "
        "same command again\nto go on after an interruption."
    )
    parser.add_argument("kind", choices=tuple(KINDS), metavar="KIND", help=f"what is varied: {', '.join(KINDS)}")
    parser.add_argument("config", type=Path, help="recipe, a TOML file such as configs/nano.toml")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of all runs and of the table")
    parser.add_argument(
        "--variants", metavar="A,B,...", help="which (default: all); the others are held against the first"
    )
    parser.add_argument("--seeds", metavar="N,N,...", default="0,1,2", help="of the training (default: 0,1,2)")
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="RUN",
        help="an earlier run of `regiongpt train`: its language model, tower and features serve all variants and seeds",
    )
    parser.add_argument(
        "--shared",
        type=Path,
        metavar="DIR",
        help="what runs have in common; several ablations may (default: OUT/shared)",
    )
    parser.add_argument("--task", default="coco_cls", help="the benchmark (default: coco_cls)")
    parser.add_argument("--device", help="that the trained models are asked on (default: the first there is)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N", help=f"default: {RESAMPLES}")


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Options of the benchmark by name, and the words that are about the recipe."""
    asked: dict[str, str] = {}
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith(_ASKED):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix(_ASKED).partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"{word}: expected a value after it, got nothing")
            value = words.pop(0)
        asked[name.replace("-", "_")] = value
    return asked, rest


def _refuse_varied(kind: str, variants: Sequence[Variant], overrides: Sequence[str], asked: Mapping[str, str]) -> None:
    """Raises ConfigError for an option whose value the variants or the seeds decide."""
    # A variant that leaves a field as it is stands for its default; where each names its own, none is mistaken.
    plain = any(not variant.recipe for variant in variants)
    fields = {name for variant in variants for name in variant.recipe if plain}
    options = {f"{_ASKED}{name}" for variant in variants for name in variant.asked}
    given = {word.removeprefix("--").partition("=")[0] for word in overrides if word.startswith("--")}
    if "seed" in given:
        raise ConfigError("--seed: expected --seeds N,N,..., for every variant is trained with each of them")
    if both := sorted(f"--{name}" for name in given & fields) + sorted(options & {f"{_ASKED}{n}" for n in asked}):
        raise ConfigError(f"{both[0]}: expected what the ablation of {kind} varies to be left to it; leave it out")


def _seeds(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise ConfigError(f"expected --seeds such as 0,1,2, each once, got {text!r}")
    return tuple(map(int, words))


def _task(name: str, values: Mapping[str, str]) -> Task:
    """A benchmark of the texts of its options."""
    try:
        return task_class(name)(**values)
    except ConfigError as error:
        raise ConfigError(f"{_ASKED}{error}") from None


def _write(study: Study, runs: Mapping[str, Sequence[TaskRun]]) -> str:
    """Writes table, page and json, and returns the table."""
    measured, items = summary.measure(study.tasks, runs)
    found = summary.summarise(measured, study.resamples)
    printed = TABLES.get(KINDS[study.kind].paper)
    first = next(iter(runs.values()))[0]
    everywhere = [run.result["pinned"] for each in runs.values() for run in each]
    alike = {name: text for name, text in everywhere[0].items() if all(each.get(name) == text for each in everywhere)}
    pinned = "; ".join(f"{name}: {text}" for name, text in alike.items())
    about = [
        f"{KINDS[study.kind].summary}; recipe {study.recipe.name}{''.join(f' {word}' for word in study.overrides)}",
        f"{first.name}, {items:,} items; {pinned}",
        f"Means over the seeds {', '.join(map(str, study.seeds))}, times 100; behind each the range of 95 % of the "
        f"resamples, which draw the images{' and the seeds' if len(study.seeds) > 1 else ''} anew.",
    ]
    title = f"Ablation: {study.kind}"
    text = summary.as_markdown(title, about, found, printed)
    (study.out / TABLE).write_text(text, encoding="utf-8")
    write_page(summary.as_page(title, about, found, printed), study.out / PAGE, "--out")
    origin = {name: [json.loads(json.dumps(run.manifest)) for run in each] for name, each in runs.items()}
    write_json(
        study.out / RESULT,
        {
            "ablation": study.kind,
            "task": first.name,
            "items": items,
            "seeds": list(study.seeds),
            "variants": [dataclasses.asdict(variant) for variant in study.variants],
            "pinned": alike,
            "protocols": finite(summary.to_dict(found)),
            "orders": summary.orders(found, printed),
            "manifests": origin,
        },
    )
    return text + f"\nwritten to {study.out / TABLE}, {study.out / RESULT} and {study.out / PAGE}"

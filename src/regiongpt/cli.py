"""The command line: every verb's options, and errors as one line on standard error with exit code 2.

torch and transformers are imported only after the options are checked: help and errors take a fraction of a second.
"""

import argparse
import itertools
import json
import logging
import os
import re
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import regiongpt
from regiongpt.environment import keep_freed_memory, progress_shown, quiet_libraries, tell
from regiongpt.errors import ConfigError, RegionGPTError, naming
from regiongpt.inference.options import (
    REGION_OPTIONS,
    ChoiceOptions,
    DescribeOptions,
    LocateOptions,
    ModelOptions,
    Options,
    Sources,
)
from regiongpt.prompts import CHAT_TEMPLATES, check_placeholders, check_text, placeholders
from regiongpt.settings import Settings, add_options, read_options
from regiongpt.storage import check_checkpoint, check_new, check_writable, finite, reason

if TYPE_CHECKING:
    from regiongpt.evaluate.task import Task

EXIT_FAULTS = 1  # images were skipped, or records are faulty
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
EXIT_PIPE_CLOSED = 141  # and for one whose reader, such as `head`, has gone


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes raised for :func:`main` to report on one line rather than printed under a usage."""

    def __init__(self, **kwargs: Any) -> None:
        # Abbreviations would make every option added later a breaking change.
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default with this process's arguments; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # a byte that is no text must not end in a traceback
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    try:
        verb = arguments[0] if arguments and arguments[0] in VERBS else ""
        with warnings.catch_warnings(), progress_shown() if os.environ.get("RANK", "0") == "0" else nullcontext():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # they speak to programmers
            if not verb:
                _top().parse_args(arguments)
                return 0
            keep_freed_memory()
            summary, run = VERBS[verb]
            code = run(_Parser(prog=f"regiongpt {verb}", description=f"{summary}."), arguments[1:])
        sys.stdout.flush()
        return code
    except RegionGPTError as error:
        tell(f"regiongpt: error: {error}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            tell(f"regiongpt: error: {str(error.filename or 'output')[:80]}: {reason(error)}")
        with suppress(OSError, ValueError):
            # The interpreter flushes standard output once more as it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED if isinstance(error, BrokenPipeError) else EXIT_BAD_INPUT


def _print_json(value: Any) -> None:
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _top() -> argparse.ArgumentParser:
    parser = _Parser(prog="regiongpt", description="Ask about any region of an image.")
    parser.add_argument("--version", action="version", version=f"regiongpt {regiongpt.__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (summary, _) in VERBS.items():
        verbs.add_parser(name, help=summary)
    return parser


# -- ask, describe, classify, locate, chat -----------------------------------------------------------------------------

# What stands behind the images, by its name and as messages call it; the options.
_ABOUT_IMAGES: dict[str, tuple[str, str, type[Settings]]] = {
    "ask": ("QUESTION", "a question such as 'What is <region1>?'", Options),
    "describe": ("", "", DescribeOptions),
    "classify": ("", "", ChoiceOptions),
    "locate": ("EXPRESSION", "an expression such as 'the red cup'", LocateOptions),
}


def _about_images(verb: str, parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    last, meaning, kind = _ABOUT_IMAGES[verb]
    parser.usage = f"{parser.prog} IMAGE... {last + ' ' if last else ''}[options]"
    behind = f", then the {last.lower()} (after -- if it starts with a dash)" if last else ""
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"images or folders of images{behind}")
    _region_options(parser)
    add_options(parser, Sources, "proposals (further regions)")
    add_options(parser, kind, "answer")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON; with several images, one line each")
    group.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines; the same command again resumes")
    group.add_argument("--overwrite", action="store_true", help="with --out: replace an existing file")
    group.add_argument("--picture", metavar="FILE", help="draw the image with its regions and answers")
    add_options(parser, ModelOptions, "model")
    options = parser.parse_intermixed_args(words)
    model, sources = read_options(ModelOptions, options), read_options(Sources, options)
    settings, text = read_options(kind, options), ""
    if len(options.images) <= bool(last):
        parser.error(f"expected an image and {meaning}" if last else "expected an image")
    if last:
        text = options.images.pop()
        check_text(text, meaning)
        placeholders(text)
        if not sources.given:  # every image has the regions typed and no other
            check_placeholders(text, len(options.regions))
    if verb != "ask" and not (options.regions or sources.given):
        raise ConfigError("expected regions from --proposals, --grid, --sam, --box or another option, got none")
    if options.overwrite and not options.out:
        raise ConfigError("--overwrite goes with --out; leave it out")
    if options.out and options.json:
        raise ConfigError("--json prints and --out writes the answers; leave one of them out")
    if isinstance(settings, ChoiceOptions):
        settings.names  # noqa: B018  # checks them
    from regiongpt.drawing import check_picture
    from regiongpt.inference import over_images

    typed = over_images.read_regions(options.regions, options.normalized)
    images = over_images.find_images(options.images)
    for option, given in (("picture", options.picture), ("image-id", sources.image_id)):
        if given is not None and len(images) > 1:
            raise ConfigError(f"--{option} goes with a single image, got {len(images)}; leave it out")
    if options.picture is not None:
        check_picture(options.picture)
        for each in (*images, *(value for option, value in options.regions if option == "--mask")):
            if os.path.exists(each) and os.path.exists(options.picture) and os.path.samefile(each, options.picture):
                raise ConfigError(f"--picture {options.picture} would replace what is asked about; give another name")
    if options.out:
        if options.out.suffix != ".jsonl":
            raise ConfigError(f"{options.out}: end the name in .jsonl (JSON lines)")
        check_writable(options.out)
    request = over_images.Request(verb=verb, text=text, typed=typed, sources=sources, options=settings, model=model)
    how = {"out": options.out, "overwrite": options.overwrite, "json": options.json, "picture": options.picture}
    skipped = over_images.over_images(images, request, **how)
    return EXIT_FAULTS if skipped else 0


def _chat(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    parser.add_argument("image", help="the image")
    _region_options(parser)
    add_options(parser, ModelOptions, "model")
    add_options(parser, Options, "answer")
    options = parser.parse_args(words)
    model, generation = read_options(ModelOptions, options), dict(read_options(Options, options))
    from regiongpt.images import load_image
    from regiongpt.inference.over_images import load_predictor, read_regions

    photo = load_image(options.image)
    regions = [each.region for each in read_regions(options.regions, options.normalized).on(*photo.size)]
    conversation = load_predictor(model).set_image(photo).conversation(regions)
    typed, failed = sys.stdin.isatty(), False
    if typed:
        named = ", ".join(f"<region{n}> a {region.kind}" for n, region in enumerate(regions, 1)) or "no regions"
        print(f"{options.image}, {photo.width}x{photo.height}: {named}. Ask a question; Ctrl-D or `exit` quits.")
    for question in _questions(typed):
        try:
            for piece in conversation.stream(question, **generation):
                print(piece, end="", flush=True)
            print(flush=True)
            for warning in conversation.warnings:
                tell(f"regiongpt: warning: {warning}")
        except RegionGPTError as error:
            tell(f"regiongpt: error: {error}")
            failed = True
    return EXIT_FAULTS if failed and not typed else 0


def _questions(typed: bool) -> Iterator[str]:
    """The lines of standard input up to ``exit``, with a prompt and line editing where a person types them."""
    if typed:
        import readline  # noqa: F401  # gives input() its line editing and history
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        if line.lower() in ("exit", "quit"):
            return
        if line:
            yield line


def _region_options(parser: argparse.ArgumentParser) -> None:
    """Options that collect (option, text) in one list, for regions are numbered as they were typed."""
    parser._negative_number_matcher = re.compile(r"-(\d|\.|inf)")  # --box -5,0,9,9
    group = parser.add_argument_group("regions", "any number, in any order; the first is <region1>")
    for option, (metavar, text) in REGION_OPTIONS.items():
        kind = partial(lambda option, text: (option, text), option)
        group.add_argument(option, action="append", dest="regions", default=[], type=kind, metavar=metavar, help=text)
    text = "coordinates are fractions of the image's width and height"
    group.add_argument("--normalized", action="store_true", help=text)


# -- the other verbs ---------------------------------------------------------------------------------------------------


def _convert(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from regiongpt.data.shards import MANIFEST
    from regiongpt.data.sources import CONVERTERS, Output, convert, load_converter, summary

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "`regiongpt convert SOURCE --help` lists the files and options of a source."
    sources = parser.add_subparsers(title="sources", metavar="SOURCE", dest="source", required=True)
    named = next((word for word in words if not word.startswith("-")), None)
    # Import only the named source; the help lists all.
    for name in [named] if named in CONVERTERS else CONVERTERS:
        converter = load_converter(str(name))
        source = sources.add_parser(str(name), help=converter.summary, description=converter.summary)
        add_options(source, converter)
        add_options(source, Output, "records")
        source.set_defaults(converter=converter)
    options = parser.parse_args(words)
    made, to = read_options(options.converter, options), read_options(Output, options)
    was_there = (to.out / MANIFEST).exists() and not to.overwrite
    began = time.monotonic()
    manifest = convert(made, to.out, to.strict, to.overwrite)
    print(summary(manifest, to.out, None if was_there else time.monotonic() - began))
    return 0


def _inspect(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from regiongpt.data.inspection import Inspection, inspect

    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of records, made by `regiongpt convert`")
    add_options(parser, Inspection)
    options = parser.parse_args(words)
    quiet_libraries()
    return EXIT_FAULTS if inspect(options.folder, read_options(Inspection, options)) else 0


def _annotate(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from regiongpt.annotate.options import GROUPS, Options

    for title, kind in GROUPS.items():
        add_options(parser, kind, title)
    typed = parser.parse_args(words)
    quiet_libraries()
    from regiongpt.annotate.command import annotate

    return annotate(read_options(Options, typed))


def _weights(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    create = actions.add_parser("create", help="build an untrained model from a vision tower and a language model")
    create.add_argument(
        "--vision", metavar="NAME", help="hub name or folder of a CLIP, SigLIP or DINOv2 model, or efficientnet-lite2"
    )
    create.add_argument("--language", metavar="NAME", help="hub name or folder of a causal language model")
    create.add_argument("--llava", metavar="DIR", help="start from LLaVA-1.5, untrained on regions, instead")
    create.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write, new or empty")
    kinds = ("deconv", "bilinear", "deconv_bilinear", "none")
    create.add_argument("--refinement", choices=kinds, help="default: deconv; with --llava none")
    create.add_argument("--chat-template", choices=tuple(CHAT_TEMPLATES), help="default: that of the language model")
    take = actions.add_parser("import", help="rewrite a public checkpoint as one of ours")
    take.add_argument("kind", choices=("spatialrgpt",), help="SpatialRGPT-VILA1.5 with Llama 3")
    take.add_argument("source", metavar="NAME", help="hub name, such as a8cheng/SpatialRGPT-VILA1.5-8B, or folder")
    take.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write, new or empty")
    text = "weigh regions by exact area (default), or sampled at points as SpatialRGPT itself does"
    take.add_argument("--mask-weights", default="exact", choices=("exact", "sampled"), help=text)
    convert = actions.add_parser("convert", help="store a checkpoint in another precision")
    convert.add_argument("--model", metavar="PATH", required=True, help="checkpoint folder")
    convert.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write, new or empty")
    dtypes = ("float32", "bfloat16", "float16")
    convert.add_argument("--dtype", default="float16", choices=dtypes, help="dtype of the stored weights")
    options = parser.parse_args(words)
    check_new(options.out)
    if not options.out.exists():
        check_writable(options.out)
    if options.action == "convert":
        check_checkpoint(options.model)
    if options.action == "create":
        given = bool(options.vision), bool(options.language), bool(options.llava)
        if given not in ((1, 1, 0), (0, 0, 1)):
            raise ConfigError("give --vision and --language, or --llava instead of the two")
    quiet_libraries(progress=options.action != "convert")  # a download takes its time
    import torch

    from regiongpt.model import weights

    if options.action == "import":
        from regiongpt.model.spatialrgpt import TERMS, import_spatialrgpt

        print(TERMS, flush=True)
        count, left_out = import_spatialrgpt(options.source, options.out, options.mask_weights)
        print(f"{options.out}: {count / 1e6:.1f} M parameters; left out: {', '.join(left_out) or 'nothing'}")
        return 0
    if options.action == "convert":
        weights.convert(options.model, options.out, getattr(torch, options.dtype))
        size = sum(file.stat().st_size for file in options.out.iterdir())
        print(f"{options.out}: {size / 1e6:.1f} MB, weights stored as {options.dtype}")
        return 0
    chosen = {name: value for name in ("refinement", "chat_template") if (value := getattr(options, name))}
    if options.llava:
        model, _ = weights.from_llava(options.llava, options.out, **chosen)
    else:
        model, _ = weights.create(options.vision, options.language, options.out, **chosen)
    count = sum(parameter.numel() for parameter in model.parameters())
    told = "untrained; train it first"
    if options.llava:
        told = "whose answers about regions mean nothing until stage 1 has run; see `regiongpt train --help`"
    print(f"{options.out}: {count / 1e6:.1f} M parameters, {told}")
    return 0


def _evaluate(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from regiongpt.evaluate import TASKS, task_class
    from regiongpt.evaluate.task import RunOptions

    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
        raise ConfigError(f"{repeated[0]}: given twice; name every task once")
    kinds = [task_class(name) for name in names]
    if not names and "--compare" not in words and (late := [word for word in words if word in TASKS]):
        raise ConfigError(f"{late[0]}: name the tasks before all options: `{parser.prog} {late[0]} ...`")
    if not names and {"-h", "--help"} & {*words}:  # only this help imports all tasks
        known = "\n".join(f"  {name:<18}{task_class(name).summary}" for name in TASKS)
        parser.epilog = f"tasks:\n{known}\n\n`regiongpt evaluate TASK --help` lists the options of a task."
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="benchmarks; name them before the options")
    parser.add_argument("--json", action="store_true", help="print json")
    add_options(parser, RunOptions, "options of the run")
    group = parser.add_argument_group("comparing")
    group.add_argument(
        "--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"), help="the --out folders of two runs"
    )
    parser.conflict_handler = "resolve"  # an option of several tasks is given to each of them
    for name, kind in zip(names, kinds, strict=True):
        add_options(parser, kind, f"options of {name}", required=False)
    typed = parser.parse_args(words)
    options = read_options(RunOptions, typed)
    if typed.compare:
        return _compare(typed)
    if not names:
        raise ConfigError(f"give a task: {', '.join(TASKS)}; see `{parser.prog} --help`")
    if options.out is None:
        raise ConfigError("give --out DIR, the folder of the results")
    tasks: list[Task] = []
    for name, kind in zip(names, kinds, strict=True):
        with naming(name):
            tasks.append(read_options(kind, typed))
    quiet_libraries()
    from regiongpt.evaluate.report import as_text
    from regiongpt.evaluate.run import evaluate

    runs = evaluate(tasks, options)
    if runs and typed.json:
        _print_json([{**run.result, "manifest": run.manifest} for run in runs])
    elif runs:
        print("\n\n".join(map(as_text, runs)))
        print(f"\nresults written to {', '.join(str(run.folder / 'index.html') for run in runs)}")
    return 0


def _compare(typed: argparse.Namespace) -> int:
    from regiongpt.evaluate.report import compare_runs, comparison_as_text
    from regiongpt.evaluate.task import RunOptions

    given = [*typed.tasks, *(f"--{name}" for name in sorted({*RunOptions.model_fields} & {*vars(typed)}))]
    if given:
        raise ConfigError(f"{given[0].replace('_', '-')}: --compare takes the settings of the runs; leave it out")
    a, b = typed.compare
    found = compare_runs(a, b)
    if typed.json:
        _print_json(found)
    else:
        print(f"A: {a}\nB: {b}\n\n" + "\n\n".join(map(comparison_as_text, found)))
    return 0


def _train(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from regiongpt.train.recipe import Recipe, find_config, own_script

    parser.epilog = (
        "Run the same command again to resume. Every field of the recipe can be overridden by its dotted name: "
        "--stage2.lr 5e-4 --data.root DIR."
    )
    parser.add_argument("recipe", help="TOML file, or the name of a shipped recipe such as finetune_records")
    parser.add_argument("--plan", action="store_true", help="estimate parameters, memory and time, and stop")
    parser.add_argument("--debug", action="store_true", help="run in seconds with tiny models and drawn images")
    parser.add_argument("--from-scratch", action="store_true", help="let stage 2 start without stage 1")
    options, overrides = parser.parse_known_args(words)
    overrides += ["--from_scratch=true"] if options.from_scratch else []
    if script := own_script(options.recipe):
        if options.plan:
            raise ConfigError(f"--plan: {options.recipe} is trained by {script}, which has no plan; leave it out")
        sys.argv = [str(script), "--recipe", str(find_config(options.recipe)), *overrides, *["--debug"] * options.debug]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")  # ends with its own exit code
    recipe = Recipe.load(options.recipe, overrides)
    if not (options.plan or options.debug):
        recipe.check_files()

    _log()
    quiet_libraries()
    from regiongpt.environment import Processes, connect
    from regiongpt.train.debug import debug_size
    from regiongpt.train.plan import make_plan, plan_text
    from regiongpt.train.stages import train

    if options.debug:
        connect()
        recipe = Processes().from_first(lambda: debug_size(recipe))
    if options.plan:
        print(plan_text(recipe, make_plan(recipe)))
        return 0
    finished = train(recipe)
    if Processes().is_first:
        print(finished)
    return 0


def _ablate(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from regiongpt.ablate import KINDS, Options, Study

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = "\n".join(f"  {name:<12}{kind.summary}" for name, kind in KINDS.items())
    parser.epilog = (
        f"what is varied:\n{kinds}\n\nEvery field of the recipe can be overridden by its dotted name (--stage2.lr 5e-4 "
        "--data.root DIR), and\nevery option of the benchmark is given as --eval.OPTION (--eval.limit 50). Run the "
        "same command again\nto resume."
    )
    parser.add_argument("kind", choices=tuple(KINDS), metavar="KIND", help=f"what is varied: {', '.join(KINDS)}")
    parser.add_argument("recipe", help="TOML file, or the name of a shipped recipe such as finetune_records")
    add_options(parser, Options)
    typed, rest = parser.parse_known_args(words)
    study = Study(typed.kind, typed.recipe, rest, read_options(Options, typed))
    _log()
    quiet_libraries()
    print(study.run())
    return 0


def _serve(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    from regiongpt.serve.options import ServeOptions

    add_options(parser, ModelOptions, "model")
    add_options(parser, ServeOptions, "serving")
    options = parser.parse_args(words)
    model, settings = read_options(ModelOptions, options), read_options(ServeOptions, options)
    keys = settings.keys()
    if settings.engine == "vllm" and (model.device or "").startswith("cuda:"):
        raise ConfigError("--engine vllm does not take --device cuda:N; choose GPUs by CUDA_VISIBLE_DEVICES")
    _log()
    quiet_libraries()
    try:
        from regiongpt.serve.app import serve
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'regiongpt[serve]'") from None
    from regiongpt.inference.over_images import load_predictor

    predictor = load_predictor(model, images=0, token_budget=settings.token_budget, rows=settings.rows)
    name = settings.name or (model.model.resolve().name if model.model else "regiongpt-nano")
    engine = predictor.engine
    if settings.engine == "vllm":
        from regiongpt.model.weights import nano_path
        from regiongpt.serve.vllm import VllmEngine

        engine = VllmEngine(engine, model.model or nano_path(), settings)
    serve(engine, settings, name, keys)
    return 0


def _log() -> None:
    """Show the log of long work on standard error, that of the first process alone."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


VERBS: Final[dict[str, tuple[str, Callable[[argparse.ArgumentParser, Sequence[str]], int]]]] = {
    "ask": ("Ask one question about regions of one image or several", partial(_about_images, "ask")),
    "chat": ("Hold a conversation about regions of an image; questions are read from standard input", _chat),
    "describe": ("Describe many regions of one image or several", partial(_about_images, "describe")),
    "classify": ("Choose the class of regions from a closed set", partial(_about_images, "classify")),
    "locate": ("Choose the region that an expression refers to, or none", partial(_about_images, "locate")),
    "convert": ("Convert a data set to training records", _convert),
    "annotate": ("Caption regions of many images in two stages; run the same command again to resume", _annotate),
    "inspect": ("Show and check training records: statistics, or what an option asks for", _inspect),
    "weights": ("Make checkpoint folders", _weights),
    "train": ("Train a model in the paper's two stages", _train),
    "evaluate": ("Score a model, or answers from a file, on benchmarks", _evaluate),
    "serve": ("Serve the model: an OpenAI-compatible API, and a page to draw on and ask", _serve),
    "ablate": ("Train and score the variants of one part of the model, in the same way", _ablate),
}
"""Each verb with its summary and the function that reads its options."""


if __name__ == "__main__":
    raise SystemExit(main())

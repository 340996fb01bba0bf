"""The command line: ``regiongpt ask``, ``chat``, ``describe``, ``convert``, ``train``, ``evaluate`` and others.

torch and transformers are imported only by the verb that needs them, after its arguments, image and regions have been
checked: help and mistakes cost a fraction of a second. Whatever the user got wrong ends as one line on standard error
and exit code 2.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from regiongpt import __version__
from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.inference.commands import quiet

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
EXIT_PIPE_CLOSED = 141  # and for one whose reader, such as `head`, has gone

OWN_OPTIONS = {
    "ask": "inference.commands:run_ask",
    "chat": "inference.commands:run_chat",
    "describe": "inference.commands:run_describe",
    "convert": "data.commands:run_convert",
    "inspect": "data.commands:run_inspect",
    "evaluate": "evaluate.commands:run_evaluate",
    "ablate": "ablate.commands:run_ablate",
}
"""Verbs that are at home in another package, each with the module and function that knows its options."""


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes raised for :func:`main` to report on one line rather than printed under a usage."""

    def __init__(self, **kwargs: Any) -> None:
        # Abbreviations would make every option added later a breaking change.
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; default: those of this process.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C, 141 where the reader of the output has gone.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["train"]:  # has an own command line, passed on untouched
            from regiongpt.train.stages import run_cli

            return int(run_cli(arguments[1:]) or 0)
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # they speak to programmers
            if arguments and arguments[0] in OWN_OPTIONS:
                module, _, name = OWN_OPTIONS[arguments[0]].partition(":")
                run = getattr(import_module(f"regiongpt.{module}"), name)
                code = int(run(_Parser(prog=f"regiongpt {arguments[0]}"), arguments[1:]))
            else:
                options = _parser().parse_args(arguments)
                code = int(options.run(options))
        sys.stdout.flush()
        return code
    except RegionGPTError as error:
        print(f"regiongpt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more as it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="regiongpt", description="Ask about any region of an image.")
    parser.add_argument("--version", action="version", version=f"regiongpt {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    verbs.add_parser("ask", help="ask one question about regions of a photograph", add_help=False)
    verbs.add_parser("chat", help="hold a conversation about regions of a photograph", add_help=False)
    verbs.add_parser("describe", help="describe many regions of a photograph at once", add_help=False)
    verbs.add_parser("convert", help="make training records of a data set's files", add_help=False)
    verbs.add_parser("inspect", help="show what training records hold, and check them", add_help=False)

    weights = verbs.add_parser("weights", help="make checkpoint folders")
    actions = weights.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="build an untrained model from a vision tower and a language model")
    create.add_argument(
        "--vision", metavar="NAME", help="hub name or folder of a CLIP, SigLIP or DINOv2 model, or efficientnet-lite2"
    )
    create.add_argument("--language", metavar="NAME", help="hub name or folder of a causal language model")
    create.add_argument("--llava", metavar="DIR", help="start from a LLaVA-1.5 checkpoint instead of the two")
    create.add_argument("--out", metavar="DIR", required=True, help="folder to write, new or empty")
    create.add_argument(
        "--refinement", metavar="KIND", help="deconv (default), bilinear, deconv_bilinear or none (default for --llava)"
    )
    create.add_argument("--chat-template", metavar="FAMILY", help="vicuna_v1, llama2, llama3, chatml or plain")
    create.set_defaults(run=_create_weights)
    convert = actions.add_parser("convert", help="store a checkpoint in another precision")
    convert.add_argument("--model", metavar="PATH", required=True, help="checkpoint folder")
    convert.add_argument("--out", metavar="DIR", required=True, help="folder to write, new or empty")
    convert.add_argument(
        "--dtype", default="float16", choices=("float32", "bfloat16", "float16"), help="of the weights on disk"
    )
    convert.set_defaults(run=_convert_weights)

    verbs.add_parser("train", help="train a model in the paper's two stages", add_help=False)
    verbs.add_parser("evaluate", help="score a model, or anyone's answers, on benchmarks", add_help=False)
    verbs.add_parser("ablate", help="train and score the variants of one part of the model", add_help=False)
    return parser


def _create_weights(options: argparse.Namespace) -> int:
    if options.llava and (options.vision or options.language):
        raise ConfigError("expected --llava alone or --vision with --language, got both; leave one of them out")
    if not options.llava and not (options.vision and options.language):
        missing = ", ".join(f"--{name}" for name in ("vision", "language") if not getattr(options, name))
        raise ConfigError(f"expected --vision and --language, or --llava; missing: {missing}")
    out = _new_folder(options.out)
    quiet(progress=True)  # a download takes its time
    from regiongpt.model import weights

    chosen = {
        key: value
        for key, value in (("refinement", options.refinement), ("chat_template", options.chat_template))
        if value
    }
    if options.llava:
        model, _ = weights.from_llava(options.llava, out, **chosen)
    else:
        model, _ = weights.create(options.vision, options.language, out, **chosen)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {count / 1e6:.1f} M parameters; train it before you ask it anything")
    return 0


def _convert_weights(options: argparse.Namespace) -> int:
    out = _new_folder(options.out)
    quiet()
    import torch

    from regiongpt.model import weights

    weights.convert(options.model, out, getattr(torch, options.dtype))
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB, weights stored as {options.dtype}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What the verbs share


def _new_folder(text: str) -> Path:
    out = Path(text)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"expected --out to be a new or an empty folder, but {out} has something in it")
    return out


if __name__ == "__main__":
    raise SystemExit(main())

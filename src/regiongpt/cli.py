"""The command line: ``regiongpt ask``, ``chat``, ``describe``, ``convert``, ``train``, ``evaluate`` and others.

torch and transformers are imported only by the verb that needs them, after its arguments, image and regions have been
checked: help and mistakes cost a fraction of a second. Whatever the user got wrong ends as one line on standard error
and exit code 2.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from regiongpt import __version__
from regiongpt.errors import ConfigError, DataError, RegionError, RegionGPTError

if TYPE_CHECKING:
    from PIL.Image import Image

    from regiongpt.inference import RegionPredictor
    from regiongpt.inference.proposals import Proposal
    from regiongpt.regions import Region

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
EXIT_PIPE_CLOSED = 141  # and for one whose reader, such as `head`, has gone

REGION_OPTIONS = {
    "--box": ("X0,Y0,X1,Y1", "a box, in pixels from the image's top left corner"),
    "--mask": ("FILE", "an image of the photograph's size, not black (or not transparent) inside the region"),
    "--polygon": ("X,Y,X,Y,X,Y,...", "the corners of a polygon, at least three"),
    "--rle": ("FILE", "a JSON file with a COCO run-length mask: size [height, width] and counts"),
    "--point": ("X,Y", "a point: the small disk around it"),
    "--scribble": ("X,Y,X,Y,...", "a stroke through at least two points"),
}

OWN_OPTIONS = {
    "convert": "data.commands:run_convert",
    "inspect": "data.commands:run_inspect",
    "evaluate": "evaluate.commands:run_evaluate",
    "ablate": "ablate.commands:run_ablate",
}
"""Verbs whose options depend on what they are about, each with the module and function that knows them."""


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes raised for :func:`main` to report on one line rather than printed under a usage."""

    def __init__(self, **kwargs: Any) -> None:
        # Abbreviations would make every option added later a breaking change.
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


class _AddRegion(argparse.Action):
    """Collects (option, text) of every kind of region in one list, for regions are numbered as they were typed."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.regions = [*(namespace.regions or []), (option, values)]


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
                options = _parser().parse_args(_bind_coordinates(arguments))
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


def _bind_coordinates(arguments: Sequence[str]) -> list[str]:
    """Write ``--box -5,0,9,9`` as ``--box=-5,0,9,9``: argparse takes what begins with a dash for an option."""
    bound: list[str] = []
    for argument in arguments:
        negative = argument[:1] == "-" and (argument[1:2].isdigit() or argument[1:2] == "." or argument[1:4] == "inf")
        if bound and bound[-1] in REGION_OPTIONS and negative:
            bound[-1] += f"={argument}"
        else:
            bound.append(argument)
    return bound


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="regiongpt", description="Ask about any region of an image.")
    parser.add_argument("--version", action="version", version=f"regiongpt {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    ask = verbs.add_parser("ask", help="ask one question about regions of a photograph")
    ask.add_argument("image", help="the photograph")
    ask.add_argument("question", help='for example "What is <region1> doing next to <region2>?"')
    _add_region_options(ask)
    _add_model_options(ask)
    ask.add_argument("--json", action="store_true", help="print the answer with its circumstances as JSON")
    ask.add_argument("--picture", metavar="FILE", help="write the photograph with the regions drawn and the answer")
    ask.set_defaults(run=_ask)

    chat = verbs.add_parser("chat", help="hold a conversation about regions of a photograph")
    chat.add_argument("image", help="the photograph")
    _add_region_options(chat)
    _add_model_options(chat)
    chat.set_defaults(run=_chat)

    describe = verbs.add_parser("describe", help="describe many regions of a photograph at once")
    describe.add_argument("image", help="the photograph")
    _add_proposal_options(describe)
    _add_region_options(describe)
    _add_model_options(describe, sampling=False)
    describe.add_argument("--brief", action="store_true", help="a caption of a few words a region")
    describe.add_argument("--json", action="store_true", help="print regions and descriptions as JSON")
    describe.add_argument("--picture", metavar="FILE", help="write the photograph with regions and descriptions")
    describe.set_defaults(run=_describe)

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


def _add_region_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("regions", "any number of them; the first one typed is <region1>")
    for option, (metavar, text) in REGION_OPTIONS.items():
        group.add_argument(option, action=_AddRegion, dest="regions", metavar=metavar, help=text, default=None)


def _add_proposal_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "proposals", "where regions come from, beside those typed; one of the first three"
    )
    group.add_argument(
        "--proposals",
        metavar="FILE",
        help="json of COCO detection results, a COCO data set, or regions as --json has them",
    )
    group.add_argument("--grid", type=int, metavar="N", help="N x N points; with --sam, the points it is asked at")
    group.add_argument("--sam", metavar="PATH", help="masks that a SAM model of transformers finds, at 32 x 32 points")
    group.add_argument("--image-id", metavar="ID", help="of the photograph in --proposals, where its name does not say")
    group.add_argument("--min-score", type=float, metavar="S", help="leave out regions of a lower score")
    group.add_argument(
        "--iou", type=float, metavar="T", help="leave out regions that overlap a better one more (--sam: 0.7, else off)"
    )
    group.add_argument("--max-regions", type=int, metavar="N", help="only the N best, by score or else by order")


def _add_model_options(parser: argparse.ArgumentParser, sampling: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="PATH", help="checkpoint folder (default: the model of this package)")
    group.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    group.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, else bfloat16)")
    group.add_argument("--int8", action="store_true", help="language model's weights in int8; on a CPU, in float32")
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    if not sampling:
        return
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest word")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature: nucleus to draw from")
    group.add_argument("--seed", type=int, default=None, metavar="N", help="with a temperature: makes answers repeat")


# ---------------------------------------------------------------------------------------------------------------------
# Verbs


def _ask(options: argparse.Namespace) -> int:
    photo, regions = _read_inputs(options)
    if options.picture:
        _check_picture_path(options.picture)
    from regiongpt.prompts import check_placeholders

    check_placeholders(options.question, len(regions))  # before the model is loaded: it is the commonest mistake
    predictor = _predictor(options)
    predictor.set_image(photo)
    answer = predictor.ask(options.question, regions, **_generation(options))
    for warning in answer.warnings:
        print(f"regiongpt: warning: {warning}", file=sys.stderr)
    if options.json:
        record = {
            "image": options.image,
            "question": options.question,
            "regions": [region.to_dict() for region in regions],
            "answer": answer.text,
            "cited": list(answer.cited),
            "warnings": list(answer.warnings),
            "seconds": round(answer.seconds, 3),
            "device": str(predictor.device),
        }
        print(json.dumps(record, ensure_ascii=False, indent=2))
    else:
        print(answer.text)
    if options.picture:
        from regiongpt.drawing import draw_regions

        _save_picture(draw_regions(photo, regions, dialogue=[(options.question, answer.text)]), options.picture)
    return 0


def _chat(options: argparse.Namespace) -> int:
    photo, regions = _read_inputs(options)
    predictor = _predictor(options)
    predictor.set_image(photo)
    conversation = predictor.conversation(regions)
    typed = sys.stdin.isatty()
    if typed:
        named = ", ".join(f"<region{n}> a {region.kind}" for n, region in enumerate(regions, 1)) or "no regions"
        print(f"{options.image}, {photo.width}x{photo.height}: {named}. Ask away; Ctrl-D or `exit` leaves.")
    for question in _questions(typed):
        try:
            for piece in conversation.stream(question, **_generation(options)):
                print(piece, end="", flush=True)
            print(flush=True)
            for warning in conversation.warnings:
                print(f"regiongpt: warning: {warning}", file=sys.stderr, flush=True)
        except RegionGPTError as error:
            print(f"regiongpt: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 0


def _describe(options: argparse.Namespace) -> int:
    photo, typed = _read_inputs(options)
    if options.picture:
        _check_picture_path(options.picture)
    proposals, left_out = _proposals(options, photo, typed)
    regions = [proposal.region for proposal in proposals]
    predictor = _predictor(options)
    began = time.perf_counter()
    predictor.set_image(photo)
    answers = predictor.describe(regions, brief=options.brief, max_new_tokens=options.max_new_tokens)
    seconds = time.perf_counter() - began
    if left_out:
        print(f"regiongpt: warning: left out {left_out} of {left_out + len(regions)} regions", file=sys.stderr)
    if options.json:
        found = [
            {
                "region": proposal.region.to_dict(),
                **({} if proposal.score is None else {"score": proposal.score}),
                "answer": answer.text,
                "complete": answer.complete,
            }
            for proposal, answer in zip(proposals, answers, strict=True)
        ]
        record = {"image": options.image, "regions": found, "left_out": left_out, "seconds": round(seconds, 3)}
        print(json.dumps({**record, "device": str(predictor.device)}, ensure_ascii=False, indent=2))
    else:
        for number, answer in enumerate(answers, 1):
            print(f"[{number}] {' '.join(answer.text.split())}")  # one line a region
    if options.picture:
        from regiongpt.drawing import draw_regions

        captions = [answer.text for answer in answers]
        _save_picture(draw_regions(photo, regions, captions), options.picture)
    return 0


def _proposals(options: argparse.Namespace, photo: "Image", typed: "list[Region]") -> "tuple[list[Proposal], int]":
    """The regions to describe, and how many were left out."""
    from regiongpt.inference.proposals import Proposal, choose, grid_points, read_proposals

    if options.proposals and (options.sam or options.grid is not None):
        raise ConfigError("expected --proposals, or --grid or --sam, got several; describe them one after the other")
    if options.image_id is not None and not options.proposals:
        raise ConfigError("expected --image-id with --proposals, got it alone")
    if not (options.proposals or options.sam or options.grid is not None or typed):
        raise ConfigError("expected regions from --proposals, --grid, --sam, --box or another option, got none")
    found = [Proposal(region=region, place=f"<region{number}>") for number, region in enumerate(typed, 1)]
    if options.proposals:
        found += read_proposals(options.proposals, *photo.size, image=options.image, image_id=options.image_id)
    elif options.sam:
        side = 32 if options.grid is None else options.grid
        grid_points(side, *photo.size)  # for its check: before the model is loaded
        choose([], *photo.size, most=options.max_regions, iou=options.iou)  # likewise
        _quiet()
        from regiongpt.inference.segment import Segmenter

        found += Segmenter(options.sam, options.device).propose(photo, side)
    elif options.grid is not None:
        found += grid_points(options.grid, *photo.size)
    iou = 0.7 if options.sam and options.iou is None else options.iou
    kept = choose(found, *photo.size, most=options.max_regions, iou=iou, min_score=options.min_score)
    if not kept:
        raise DataError("expected at least one region to describe, got none that is left; lower --min-score or --iou")
    return kept, len(found) - len(kept)


def _questions(typed: bool) -> Iterator[str]:
    """The lines of standard input, with a prompt and line editing where a person types them, up to ``exit``."""
    if typed:
        import readline  # noqa: F401  # gives input() its line editing and history
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:
            print()
            return
        if not typed and not line:
            return
        if line.strip().lower() in ("exit", "quit"):
            return
        if line.strip():
            yield line.strip()


def _create_weights(options: argparse.Namespace) -> int:
    if options.llava and (options.vision or options.language):
        raise ConfigError("expected --llava alone or --vision with --language, got both; leave one of them out")
    if not options.llava and not (options.vision and options.language):
        missing = ", ".join(f"--{name}" for name in ("vision", "language") if not getattr(options, name))
        raise ConfigError(f"expected --vision and --language, or --llava; missing: {missing}")
    out = _new_folder(options.out)
    _quiet(progress=True)  # a download takes its time
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
    _quiet()
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


def _predictor(options: argparse.Namespace) -> "RegionPredictor":
    _quiet()
    from regiongpt.inference import RegionPredictor

    return RegionPredictor.from_pretrained(options.model, device=options.device, dtype=options.dtype, int8=options.int8)


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}


def _quiet(progress: bool = False) -> None:
    """Keep the libraries' advice, and unless ``progress`` their progress bars, out of the answers' way."""
    # Before their import, because some of them speak as they are imported; setdefault, because a person may want it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    if not progress:
        logging.disable_progress_bar()


def _read_inputs(options: argparse.Namespace) -> "tuple[Image, list[Region]]":
    """The photograph and the regions typed for it, checked against it."""
    from regiongpt.images import load_image

    photo = load_image(options.image)
    regions = []
    for number, (option, text) in enumerate(options.regions or [], 1):
        region = _read_region(option, text, number, photo.size)
        regions.append(region.check(photo.width, photo.height, f"<region{number}> ({option})"))
    return photo, regions


def _read_region(option: str, text: str, number: int, size: tuple[int, int]) -> "Region":
    from regiongpt.regions import Region

    where = f"<region{number}> ({option})"
    if option == "--mask":
        return Region.mask(_read_mask(text, where, size))
    if option == "--rle":
        return Region.from_dict({"rle": _read_json(text, where)}, where)
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        raise RegionError(f"{where}: expected numbers {REGION_OPTIONS[option][0]}, got {text!r}") from None
    return Region.from_dict({option.removeprefix("--"): values}, where)


def _read_mask(path: str, where: str, size: tuple[int, int]) -> Any:
    """The bool (H, W) mask in an image file, whose size is held against the photograph's before it is decoded."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    expected = f"{where}: expected an image of {size[0]}x{size[1]} pixels, the size of the photograph"
    try:
        with Image.open(path) as file:
            if file.size != size:
                raise RegionError(f"{expected}, got {file.width}x{file.height}: {path}")
            if "A" in file.getbands() or "transparency" in file.info:
                alpha = np.asarray(file.convert("RGBA"))[..., 3]
                if alpha.min() < 255:  # else the alpha channel says nothing, and the colours do
                    return alpha > 0
            pixels = np.asarray(file.convert("RGB") if "A" in file.getbands() else file)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image that can be read"
        raise DataError(f"{expected}, got {path}: {reason}") from None
    return pixels.any(axis=-1) if pixels.ndim == 3 else pixels != 0


def _read_json(path: str, where: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{where}: expected a JSON file, got {path}: {error.strerror}") from None
    except ValueError as error:
        raise RegionError(f"{where}: expected JSON with size and counts in {path}, got {error}") from None


def _check_picture_path(path: str) -> None:
    """Fail before the model is loaded, not after the answer is there."""
    from PIL import Image

    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"expected --picture to end in .png, .jpg or another image format, got {path!r}")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"expected --picture in a folder that exists, got {path!r}")


def _save_picture(picture: "Image", path: str) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected --picture to be a file that can be written, got {path!r}: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main())

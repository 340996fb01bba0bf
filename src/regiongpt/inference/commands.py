"""The verbs ``regiongpt ask``, ``chat`` and ``describe``.

torch and transformers are imported only after the arguments, the image and the regions have been checked: help and
mistakes cost a fraction of a second.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from regiongpt.errors import ConfigError, DataError, RegionGPTError
from regiongpt.inference.inputs import (
    add_region_options,
    bind_coordinates,
    check_picture_path,
    read_inputs,
    save_picture,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from regiongpt.inference import RegionPredictor
    from regiongpt.inference.proposals import Proposal
    from regiongpt.regions import Region


def run_ask(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """``regiongpt ask IMAGE QUESTION --box X0,Y0,X1,Y1 ...``.

    Args:
        parser: Still without arguments.
        arguments: What follows the verb.

    Returns:
        0.

    Raises:
        RegionGPTError: Of its kind: something typed, or a file, cannot be used.
    """
    parser.add_argument("image", help="the photograph")
    parser.add_argument("question", help='for example "What is <region1> doing next to <region2>?"')
    parser.add_argument("--json", action="store_true", help="print the answer with its circumstances as JSON")
    parser.add_argument("--picture", metavar="FILE", help="write the photograph with the regions drawn and the answer")
    options, photo, regions = _read(parser, "Ask one question about regions of a photograph.", arguments)
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

        save_picture(draw_regions(photo, regions, dialogue=[(options.question, answer.text)]), options.picture)
    return 0


def run_chat(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """``regiongpt chat IMAGE --box X0,Y0,X1,Y1 ...``, with the questions on standard input.

    Args:
        parser: Still without arguments.
        arguments: What follows the verb.

    Returns:
        0.

    Raises:
        RegionGPTError: Of its kind: something typed, or a file, cannot be used.
    """
    parser.add_argument("image", help="the photograph")
    options, photo, regions = _read(parser, "Hold a conversation about regions of a photograph.", arguments)
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


def run_describe(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """``regiongpt describe IMAGE --proposals FILE | --grid N | --sam PATH | --box X0,Y0,X1,Y1 ...``.

    Args:
        parser: Still without arguments.
        arguments: What follows the verb.

    Returns:
        0.

    Raises:
        RegionGPTError: Of its kind: something typed, or a file, cannot be used.
    """
    parser.add_argument("image", help="the photograph")
    _add_proposal_options(parser)
    parser.add_argument("--brief", action="store_true", help="a caption of a few words a region")
    parser.add_argument("--json", action="store_true", help="print regions and descriptions as JSON")
    parser.add_argument("--picture", metavar="FILE", help="write the photograph with regions and descriptions")
    options, photo, typed = _read(parser, "Describe many regions of a photograph at once.", arguments, sampling=False)
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
        save_picture(draw_regions(photo, regions, captions), options.picture)
    return 0


def _read(
    parser: argparse.ArgumentParser, description: str, arguments: Sequence[str], sampling: bool = True
) -> "tuple[argparse.Namespace, Image, list[Region]]":
    """Adds what every verb takes to its own options, and reads them, the photograph and the regions typed."""
    parser.description = description
    add_region_options(parser)
    _add_model_options(parser, sampling)
    options = parser.parse_args(bind_coordinates(arguments))
    photo, regions = read_inputs(options)
    if picture := getattr(options, "picture", None):
        check_picture_path(picture)
    return options, photo, regions


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
        quiet()
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
    group.add_argument("--untrained", action="store_true", help="ask a checkpoint even if it has not been trained")
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    if not sampling:
        return
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest word")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature: nucleus to draw from")
    group.add_argument("--seed", type=int, default=None, metavar="N", help="with a temperature: makes answers repeat")


def _predictor(options: argparse.Namespace) -> "RegionPredictor":
    quiet()
    from regiongpt.inference import RegionPredictor

    chosen = {name: getattr(options, name) for name in ("device", "dtype", "int8", "untrained")}
    return RegionPredictor.from_pretrained(options.model, **chosen)


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}


def quiet(progress: bool = False) -> None:
    """Keep the libraries' advice, and unless ``progress`` their progress bars, out of the answers' way."""
    # Before their import, because some of them speak as they are imported; setdefault, because a person may want it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    if not progress:
        logging.disable_progress_bar()

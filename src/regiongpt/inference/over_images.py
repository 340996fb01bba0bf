"""``ask``, ``describe``, ``classify`` and ``locate`` for one image or many, and their output.

torch and transformers are not imported here, so that a mistake costs a fraction of a second.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from regiongpt.console import progress, quiet_libraries, tell
from regiongpt.data.shards import Rejects
from regiongpt.drawing import draw_regions, save_picture
from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.images import SUFFIXES, load_image, open_image
from regiongpt.inference.options import (
    REGION_OPTIONS,
    ChoiceOptions,
    DescribeOptions,
    LocateOptions,
    ModelOptions,
    Options,
    Sources,
)
from regiongpt.inference.proposals import Proposal, Segmenter, choose, grid_points, read_proposals
from regiongpt.prompts import check_placeholders
from regiongpt.regions import Region
from regiongpt.storage import check_writable, read_json, write_json, writing

if TYPE_CHECKING:
    from PIL.Image import Image

    from regiongpt.inference import RegionPredictor


@dataclass(frozen=True, kw_only=True)
class View:
    """An image with the regions to ask about, those from the command line first."""

    photo: "Image"
    proposals: Sequence[Proposal]
    left_out: int = 0  # further regions
    unusable: str = ""  # what of the file of proposals could not be used, by kind

    @property
    def regions(self) -> list[Region]:
        """The regions in the order of their numbers."""
        return [proposal.region for proposal in self.proposals]

    def entries(self, said: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each region with its score and answer, for a record."""
        return [
            {"region": each.region.to_dict(), **({} if each.score is None else {"score": each.score}), **more}
            for each, more in zip(self.proposals, said, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Answers about an image."""

    record: dict[str, Any]  # for JSON
    lines: list[str]  # as text
    notes: list[dict[str, Any]]  # one per region, for COCO
    captions: list[str] = field(default_factory=list)  # one per region, for drawing
    dialogue: list[tuple[str, str]] = field(default_factory=list)  # question and answer, for a picture
    warnings: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# One image


def ask(predictor: "RegionPredictor", view: View, question: str, options: Options) -> Reply:
    """Ask one question about all regions."""
    answer = predictor.ask(question, view.regions, **dict(options))
    said = {
        "answer": answer.text,
        "cited": list(answer.cited),
        "warnings": list(answer.warnings),
        "complete": answer.complete,
        "seconds": round(answer.seconds, 3),
    }
    return Reply(
        record={"question": question, "regions": [region.to_dict() for region in view.regions], **said},
        lines=[answer.text],
        notes=[{"caption": answer.text} for _ in view.proposals],
        dialogue=[(question, answer.text)],
        warnings=list(answer.warnings),
    )


def describe(predictor: "RegionPredictor", view: View, _: str, options: DescribeOptions) -> Reply:
    """Describe each region."""
    answers = predictor.describe(view.regions, **dict(options))
    said = [{"answer": each.text, "complete": each.complete, "warnings": list(each.warnings)} for each in answers]
    texts = [answer.text for answer in answers]
    return Reply(
        record={"regions": view.entries(said)},
        lines=[f"[{number}] {' '.join(text.split())}" for number, text in enumerate(texts, 1)],
        notes=[{"caption": text} for text in texts],
        captions=texts,
        warnings=[f"[{number}] {line}" for number, answer in enumerate(answers, 1) for line in answer.warnings],
    )


def classify(predictor: "RegionPredictor", view: View, _: str, options: ChoiceOptions) -> Reply:
    """Choose the class of each region."""
    found = predictor.classify(view.regions, options.names, **options.model_dump(exclude={"choices"}))
    said = [
        {"label": each.label, "probability": each.probability, "probabilities": each.probabilities}
        | ({} if each.text is None else {"text": each.text})
        for each in found
    ]
    best = [", ".join(f"{name} {share:.3f}" for name, share in each.top(options.top_k or 1)) for each in found]
    free = ["" if each.text is None else f"; freely: {' '.join(each.text.split())}" for each in found]
    return Reply(
        record={"regions": view.entries(said)},
        lines=[f"[{number}] {text}{more}" for number, (text, more) in enumerate(zip(best, free, strict=True), 1)],
        notes=[{"category": each.label, "score": each.probability} for each in found],
        captions=best,
    )


def locate(predictor: "RegionPredictor", view: View, expression: str, options: LocateOptions) -> Reply:
    """Choose the region that an expression refers to."""
    found = predictor.locate(expression, view.regions, **dict(options))
    shares, line = found.probabilities[:-1], f"{found.text} {found.probability:.3f}"
    return Reply(
        record={
            "expression": expression,
            "regions": [region.to_dict() for region in view.regions],
            "number": found.number,
            "answer": found.text,
            "probability": found.probability,
            "probabilities": list(found.probabilities),
        },
        lines=[line],
        notes=[{"caption": expression, "score": share} for share in shares],
        captions=[f"{share:.3f}" for share in shares],
        dialogue=[(expression, line)],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Images and regions


@dataclass(frozen=True, kw_only=True)
class Typed:
    """Regions for every image, with their names for messages."""

    regions: list[tuple[str, Region]]
    normalized: bool  # their numbers are fractions of the image's sides

    def on(self, width: int, height: int) -> list[Proposal]:
        """The regions of an image of this size; RegionError where one does not fit it."""
        found = []
        for name, region in self.regions:
            region = region.scaled(width, height) if self.normalized else region
            found.append(Proposal(region=region.check(width, height, name), place=name))
        return found


def read_regions(typed: Sequence[tuple[str, str]], normalized: bool = False) -> Typed:
    """Read the regions that were typed, as option and value.

    Raises:
        RegionError: one is malformed.
        DataError: a file cannot be read.
        ConfigError: ``normalized`` without numbers.
    """
    if normalized and not any(option not in ("--mask", "--rle") for option, _ in typed):
        raise ConfigError("--normalized goes with --box, --polygon, --point and --scribble; leave it out")
    regions = []
    for number, (option, text) in enumerate(typed, 1):
        where = f"<region{number}> ({option})"
        try:
            region = _read_region(option, text, normalized)
        except ValueError:
            raise RegionError(f"{where}: expected numbers {REGION_OPTIONS[option][0]}, got {text!r}") from None
        except RegionError as error:
            raise RegionError(f"{where}{str(error).removeprefix('region')}") from None
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if region.note:  # said here, once, and in no answer again
            tell(f"regiongpt: warning: {where}: {region.note}")
            region = replace(cast(Any, region), note="")
        regions.append((where, region))
    return Typed(regions=regions, normalized=normalized)


def _read_region(option: str, text: str, normalized: bool) -> Region:
    if option == "--mask":
        return Region.mask(open_image(text)[1])
    if option == "--rle":
        return Region.rle(read_json(text))
    values = [float(value) for value in text.split(",")]
    if normalized and not all(-1 <= value <= 2 for value in values):
        raise RegionError(f"region: expected normalized numbers within 0..1, got {text}; leave --normalized out")
    return Region.from_dict({option.removeprefix("--"): values})


def find_images(words: Sequence[str]) -> list[str]:
    """The images on the command line, each once, those of a folder sorted by name."""
    found: list[str] = []
    for word in words:
        if not os.path.isdir(word):
            found.append(word)
            continue
        inside = [path for path in sorted(Path(word).iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
        if not inside:
            raise DataError(f"{word}: no image directly in this folder; it takes ({', '.join(SUFFIXES)})")
        found += map(str, inside)
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def load_predictor(options: ModelOptions, **memory: Any) -> "RegionPredictor":
    """Load the model that the command line names."""
    quiet_libraries()
    from regiongpt.inference import RegionPredictor

    return RegionPredictor.from_pretrained(options.model, **options.model_dump(exclude={"model"}), **memory)


# ---------------------------------------------------------------------------------------------------------------------
# Many images


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to do with each image."""

    verb: str
    text: str  # the question or the expression, if the verb takes one
    typed: Typed
    sources: Sources
    options: Any  # of the verb
    model: ModelOptions

    def view(self, path: str, several: bool) -> View:
        """Read an image and gather its regions: those typed, then those of the sources."""
        photo, sources = load_image(path), self.sources
        size = photo.size
        found = self.typed.on(*size)
        dropped, unusable = 0, ""
        if sources.proposals:
            rejects = Rejects()
            found += read_proposals(
                sources.proposals, *size, image=path, image_id=sources.image_id, crowds=sources.crowds, rejects=rejects
            )
            dropped, unusable = rejects.counts.total(), rejects.listed()
        elif sources.sam:
            found += _segmenter(sources.sam, self.model.device).propose(photo, sources.grid or 32)
        elif sources.grid is not None:
            found += grid_points(sources.grid, *size)
        iou = 0.7 if sources.sam and sources.iou is None else sources.iou
        kept = choose(found, *size, most=sources.max_regions, iou=iou, min_score=sources.min_score)
        if self.text:
            check_placeholders(self.text, len(kept))
        # With several images, describe and classify skip one without regions.
        if not kept and self.verb != "ask" and (self.text or not several):
            raise DataError(f"{path}: no region is left to ask about; lower --min-score or raise --iou")
        left_out = len(found) - len(kept) + dropped
        return View(photo=photo, proposals=kept, left_out=left_out, unusable=unusable)


@cache
def _segmenter(path: str, device: str | None) -> Segmenter:
    quiet_libraries()
    return Segmenter(path, device)


def over_images(
    images: Sequence[str],
    request: Request,
    *,
    out: "Results | None" = None,
    json: bool = False,
    picture: str | None = None,
) -> int:
    """Answer about each image, and print or write the answers as they come; returns how many were skipped.

    A single image that cannot be read is an error. One of several is reported and skipped.

    Args:
        images: paths.
        request: what to do with each. Its model is loaded once the first image has been read.
        out: takes the records; None to print them.
        json: print records rather than text.
        picture: file for the image with its regions and answers; of a single image.
    """
    predictor: RegionPredictor | None = None
    skipped, several = 0, len(images) > 1
    verbs: dict[str, Callable[..., Reply]]
    verbs = {"ask": ask, "describe": describe, "classify": classify, "locate": locate}
    for path in progress(images, "images", "images") if several and (out or not sys.stdout.isatty()) else images:
        try:
            seen = request.view(path, several)
        except (DataError, RegionError) as error:
            if not several:
                raise
            tell(f"regiongpt: error: {'' if path in str(error) else f'{path}: '}{error}; skipped")
            skipped += 1
            continue
        predictor = predictor or load_predictor(request.model)
        began = time.perf_counter()
        predictor.set_image(seen.photo)
        reply = verbs[request.verb](predictor, seen, request.text, request.options)
        left_out = []
        if seen.left_out:
            why = f" (unusable: {seen.unusable})" if seen.unusable else ""
            left_out = [f"left out {seen.left_out} of {seen.left_out + len(seen.proposals)} regions{why}"]
        for line in [*left_out, *reply.warnings]:
            tell(f"regiongpt: warning: {f'{path}: ' * several}{line}")
        record = {"image": path, **reply.record}
        record.setdefault("seconds", round(time.perf_counter() - began, 3))
        record |= {"left_out": seen.left_out, "device": str(predictor.device)}
        if out is not None:
            out.add(record, seen.photo.size, seen.regions, reply.notes)
        elif json:
            print(_as_json(record, None if several else 2), flush=True)
        else:
            for line in reply.lines:
                print(f"{path}: {' '.join(line.split())}" if several else line, flush=True)
        if picture is not None:
            drawn = draw_regions(seen.photo, seen.regions, reply.captions or None, dialogue=reply.dialogue)
            save_picture(drawn, picture)
    if out is not None:
        out.close()
        print(f"{out.path}: {len(images) - skipped} of {len(images)} images")
    if skipped:
        tell(f"regiongpt: error: {skipped} of {len(images)} images were skipped")
    return skipped


class Results:
    """The answers in a file, one record per image; the suffix is the format.

    ``.jsonl`` holds each record from the moment it is added, so a run that is killed leaves those before. ``.json``, a
    COCO data set with ``categories``, is written whole by :meth:`close`.
    """

    def __init__(self, path: Path, overwrite: bool = False, categories: Sequence[str] = ()) -> None:
        self.path, self.is_coco = path, path.suffix.lower() == ".json"
        if path.suffix.lower() not in (".jsonl", ".json"):
            raise ConfigError(f"{path}: end the name in .jsonl (json lines) or .json (COCO)")
        check_writable(path)
        if path.exists() and not overwrite:
            raise ConfigError(f"{path}: file exists; give --overwrite to replace it, or another name")
        self._categories = {name: number for number, name in enumerate(categories or ["region"], 1)}
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._file: Any = None

    def add(
        self, record: dict[str, Any], size: tuple[int, int], regions: Sequence[Region], notes: Sequence[dict[str, Any]]
    ) -> None:
        """Add the answers about an image; ``notes`` are further keys of each region's COCO annotation."""
        if not self.is_coco:
            with writing(self.path):
                self._file = self._file or self.path.open("w", encoding="utf-8", errors="backslashreplace")
                self._file.write(_as_json(record) + "\n")
                self._file.flush()
            return
        image = {"id": len(self._images) + 1, "file_name": record["image"], "width": size[0], "height": size[1]}
        self._images.append(image)
        for region, note in zip(regions, notes, strict=True):
            given = {"category": "region", **note}
            head = {"id": len(self._annotations) + 1, "image_id": image["id"], "iscrowd": 0}
            head["category_id"] = self._categories[given.pop("category")]
            self._annotations.append({**head, **region.to_coco(*size), **given})

    def close(self) -> None:
        """Write what is not yet in the file."""
        if not self.is_coco:
            with writing(self.path):
                (self._file or self.path.open("w", encoding="utf-8")).close()
            return
        places = [str(Path(image["file_name"]).absolute().parent) for image in self._images]
        folder = os.path.commonpath(places or ["."])
        for image in self._images:
            image["file_name"] = Path(os.path.relpath(image["file_name"], folder)).as_posix()
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        found = {"images": self._images, "annotations": self._annotations, "categories": categories}
        write_json(self.path, found, indent=None)


def _as_json(record: Any, indent: int | None = None) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, indent=indent)

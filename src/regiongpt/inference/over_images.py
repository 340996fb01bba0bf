"""What ``ask``, ``describe``, ``classify`` and ``locate`` do with an image or many, and what is shown of it."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regiongpt.console import progress, tell
from regiongpt.data.shards import Rejects
from regiongpt.drawing import draw_regions, save_picture
from regiongpt.errors import DataError, RegionError
from regiongpt.images import SUFFIXES, load_image
from regiongpt.inference.options import By, ClassifyOptions, Options, Sources
from regiongpt.inference.proposals import Proposal, choose, grid_points, read_proposals
from regiongpt.inference.results import Results, as_json
from regiongpt.regions import Region

if TYPE_CHECKING:
    from PIL.Image import Image

    from regiongpt.inference import RegionPredictor


@dataclass(frozen=True, kw_only=True)
class View:
    """An image with the regions to ask about.

    Attributes:
        path: of the image, as it was typed.
        photo: the image.
        proposals: the regions, first those that were typed.
        left_out: how many further regions were left out.
        unusable: what of the file of proposals could not be used, by kind; empty if nothing.
    """

    path: str
    photo: "Image"
    proposals: Sequence[Proposal]
    left_out: int = 0
    unusable: str = ""

    @property
    def regions(self) -> list[Region]:
        """The regions in the order of their numbers."""
        return [proposal.region for proposal in self.proposals]

    def entries(self) -> list[dict[str, Any]]:
        """Each region with its score, for a record."""
        scores = [{} if each.score is None else {"score": each.score} for each in self.proposals]
        return [{"region": region.to_dict(), **score} for region, score in zip(self.regions, scores, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What was answered about an image.

    Attributes:
        record: for JSON and csv.
        lines: as text.
        notes: of each region, for COCO.
        captions: of each region, for a picture.
        dialogue: question and answer, for a picture.
        warnings: one line each.
    """

    record: dict[str, Any]
    lines: list[str]
    notes: list[dict[str, Any]]
    captions: list[str] = field(default_factory=list)
    dialogue: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# One image


def ask(predictor: "RegionPredictor", view: View, question: str, options: Options) -> Reply:
    """Ask one question about all regions."""
    answer = predictor.ask(question, view.regions, **dict(options))
    return Reply(
        record={
            "question": question,
            "regions": [region.to_dict() for region in view.regions],
            "answer": answer.text,
            "cited": list(answer.cited),
            "warnings": list(answer.warnings),
            "complete": answer.complete,
            "seconds": round(answer.seconds, 3),
        },
        lines=[answer.text],
        notes=[{"caption": answer.text} for _ in view.proposals],
        dialogue=[(question, answer.text)],
        warnings=list(answer.warnings),
    )


def describe(predictor: "RegionPredictor", view: View, brief: bool, max_new_tokens: int) -> Reply:
    """Describe each region."""
    answers = predictor.describe(view.regions, brief=brief, max_new_tokens=max_new_tokens)
    said = [
        {"answer": answer.text, "complete": answer.complete, "warnings": list(answer.warnings)} for answer in answers
    ]
    texts = [answer.text for answer in answers]
    return Reply(
        record={"regions": [{**entry, **each} for entry, each in zip(view.entries(), said, strict=True)]},
        lines=[f"[{number}] {' '.join(text.split())}" for number, text in enumerate(texts, 1)],
        notes=[{"caption": text} for text in texts],
        captions=texts,
        warnings=[f"[{number}] {line}" for number, answer in enumerate(answers, 1) for line in answer.warnings],
    )


def classify(
    predictor: "RegionPredictor", view: View, choices: Sequence[str] | None, options: ClassifyOptions
) -> Reply:
    """Choose the class of each region."""
    found = predictor.classify(view.regions, choices, **dict(options))
    said = [
        {"label": each.label, "probability": each.probability, "probabilities": each.probabilities}
        | ({} if each.text is None else {"text": each.text})
        for each in found
    ]
    best = [", ".join(f"{name} {share:.3f}" for name, share in each.top(options.top_k or 1)) for each in found]
    free = ["" if each.text is None else f"; freely: {' '.join(each.text.split())}" for each in found]
    return Reply(
        record={"regions": [{**entry, **each} for entry, each in zip(view.entries(), said, strict=True)]},
        lines=[f"[{number}] {text}{more}" for number, (text, more) in enumerate(zip(best, free, strict=True), 1)],
        notes=[{"category": each.label, "score": each.probability} for each in found],
        captions=best,
    )


def locate(predictor: "RegionPredictor", view: View, expression: str, by: By) -> Reply:
    """Choose the region that an expression refers to."""
    found = predictor.locate(expression, view.regions, by=by)
    shares = found.probabilities[:-1]
    return Reply(
        record={
            "expression": expression,
            "regions": [region.to_dict() for region in view.regions],
            "number": found.number,
            "answer": found.text,
            "probability": found.probability,
            "probabilities": list(found.probabilities),
        },
        lines=[f"{found.text} {found.probability:.3f}"],
        notes=[{"caption": expression, "score": share} for share in shares],
        captions=[f"{share:.3f}" for share in shares],
        dialogue=[(expression, f"{found.text} {found.probability:.3f}")],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Many images


def find_images(words: Sequence[str]) -> list[str]:
    """The images that were typed, each once, those of a folder in the order of their names.

    Raises:
        DataError: a folder holds no image.
    """
    found: list[str] = []
    for word in words:
        if not os.path.isdir(word):
            found.append(word)
            continue
        inside = [path for path in sorted(Path(word).iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
        if not inside:
            raise DataError(f"{word}: no image directly in this folder; name its files ({', '.join(SUFFIXES)})")
        found += map(str, inside)
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def view_of(path: str, typed: Sequence[tuple[str, Region]], sources: Sources, segment: Any = None) -> View:
    """Read an image and gather its regions.

    Args:
        path: the image.
        typed: regions typed for every image, each behind what messages call it.
        sources: where further regions come from.
        segment: proposes regions of an image with ``sources.sam``.

    Raises:
        DataError: the image or the proposals cannot be read.
        RegionError: a region does not fit the image.
    """
    photo = load_image(path)
    found = [Proposal(region=region.check(*photo.size, name), place=name) for name, region in typed]
    rejects = Rejects()
    if sources.proposals:
        found += read_proposals(
            sources.proposals,
            *photo.size,
            image=path,
            image_id=sources.image_id,
            crowds=sources.crowds,
            rejects=rejects,
        )
    elif sources.sam:
        found += segment(photo)
    elif sources.grid is not None:
        found += grid_points(sources.grid, *photo.size)
    iou = 0.7 if sources.sam and sources.iou is None else sources.iou
    kept = choose(found, *photo.size, most=sources.max_regions, iou=iou, min_score=sources.min_score)
    left_out = len(found) - len(kept) + rejects.counts.total()
    return View(path=path, photo=photo, proposals=kept, left_out=left_out, unusable=rejects.listed())


def over_images(
    images: Sequence[str],
    view: Callable[[str], View],
    load: Callable[[], "RegionPredictor"],
    answer: Callable[["RegionPredictor", View], Reply],
    *,
    out: Results | None = None,
    json: bool = False,
    picture: str | None = None,
) -> int:
    """Answer about each image, and show or write what was answered as it comes.

    A single image that cannot be read is an error. One of several is reported and skipped.

    Args:
        images: paths.
        view: reads an image and its regions.
        load: loads the model, once the first image has been read.
        answer: asks about an image.
        out: takes the records; None to print them.
        json: print records rather than text, each on a line of its own where there are several images.
        picture: file for the image with its regions and answers; of a single image.

    Returns:
        How many images were skipped.

    Raises:
        RegionGPTError: of its kind: the model, the question, or a single image cannot be used.
    """
    predictor: RegionPredictor | None = None
    skipped = 0
    several = len(images) > 1
    for path in progress(images, "images", "images") if several and (out or not sys.stdout.isatty()) else images:
        try:
            seen = view(path)
        except (DataError, RegionError) as error:
            if not several:
                raise
            tell(f"regiongpt: error: {'' if path in str(error) else f'{path}: '}{error}; skipped")
            skipped += 1
            continue
        predictor = predictor or load()
        began = time.perf_counter()
        predictor.set_image(seen.photo)
        reply = answer(predictor, seen)
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
            print(as_json(record, None if several else 2), flush=True)
        else:
            for line in reply.lines:
                print(f"{path}: {' '.join(line.split())}" if several else line, flush=True)
        if picture is not None:
            save_picture(
                draw_regions(seen.photo, seen.regions, reply.captions or None, dialogue=reply.dialogue), picture
            )
    if out is not None:
        out.close()
        print(f"{out.path}: {len(images) - skipped} of {len(images)} images")
    if skipped:
        tell(f"regiongpt: error: {skipped} of {len(images)} images were skipped")
    return skipped

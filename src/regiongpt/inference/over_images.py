"""``ask``, ``describe``, ``classify`` and ``locate`` over images: their regions, the answers, the output.

torch and transformers are not imported here, so that a mistake costs a fraction of a second.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from pycocotools import mask as coco_mask

from regiongpt.data.coco import (
    annotated_box,
    entry_of,
    number_of,
    overhangs,
    read_annotation,
    read_box,
    read_score,
    warn_of_overhang,
)
from regiongpt.data.reading import MALFORMED, stated_size
from regiongpt.data.shards import Fault, Rejects, fault_of
from regiongpt.drawing import draw_regions, save_picture
from regiongpt.environment import light_imports, progress, quiet_libraries, tell
from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError, naming, short
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
from regiongpt.prompts import check_placeholders
from regiongpt.regions import KINDS, Region
from regiongpt.storage import digest, read_json, reason, writing

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from regiongpt.inference import RegionPredictor


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A region to ask about, in pixels of the image."""

    region: Region
    score: float | None = None  # from its source, if any
    place: str = "a region"  # as messages name it: ``boxes.json[3]``


class Typed(NamedTuple):
    """Regions for every image, with their names for messages."""

    regions: list[tuple[str, Region]]
    normalized: bool  # their numbers are fractions of the image's sides

    def on(self, width: int, height: int) -> list[Proposal]:
        """The regions of an image of this size; RegionError where one does not fit it."""
        scaled = [(name, each.scaled(width, height) if self.normalized else each) for name, each in self.regions]
        return [Proposal(region=region.check(width, height, name), place=name) for name, region in scaled]


def read_regions(typed: Sequence[tuple[str, str]], normalized: bool = False) -> Typed:
    """Read the regions that were typed, as option and value; an error names the region."""
    if normalized and not any(option not in ("--mask", "--rle") for option, _ in typed):
        raise ConfigError("--normalized goes with --box, --polygon, --point and --scribble; leave it out")
    regions = []
    for number, (option, text) in enumerate(typed, 1):
        where = f"<region{number}> ({option})"
        value: Any
        with naming(where):
            if option == "--mask":
                value = open_image(text)[1]
            elif option == "--rle":
                value = {"rle": read_json(text)}
            else:
                try:
                    numbers = [float(each) for each in text.split(",")]
                except ValueError:
                    raise RegionError(f"expected numbers {REGION_OPTIONS[option][0]}, got {text!r}") from None
                if normalized and not all(-1 <= each <= 2 for each in numbers):
                    raise RegionError(f"expected normalized numbers within 0..1, got {text}; leave --normalized out")
                value = {option.removeprefix("--"): numbers}
        region = Region.of(value, where)
        if region.note:  # said here, once, and in no answer again
            tell(f"regiongpt: warning: {where}: {region.note}")
            region = replace(cast(Any, region), note="")
        regions.append((where, region))
    return Typed(regions, normalized)


def read_proposals(
    path: str | Path,
    width: int,
    height: int,
    *,
    image: str | Path | None = None,
    image_id: int | str | None = None,
    rejects: Rejects | None = None,
) -> list[Proposal]:
    """Read regions of one image from a JSON file; an entry that cannot be used is left out and counted.

    The file is a list of COCO detection results or of regions as :meth:`Region.to_dict` writes them, or an object with
    such a list as its ``regions`` (the output of ``--json``) or ``annotations`` (a COCO data set). Of several images,
    this one (``width`` x ``height`` pixels) is known by its ``image_id``, else by the name of its file ``image``, or
    the number that it ends in. DataError where the file has another form, another size for the image, or nothing of it.
    """
    file = Path(path)
    rejects = Rejects() if rejects is None else rejects
    found, reasons, overhung = [], [], 0
    for index, entry in _entries_of(file, image, image_id, (width, height), rejects):
        place = f"{file.name}[{index}]"
        try:
            region = _region(entry, width, height).check(width, height)
            found.append(Proposal(region=region, score=read_score(entry), place=place))
            box = read_box(entry.get("bbox"))
            overhung += box is not None and overhangs(box, width, height)
        except (Fault, RegionError) as error:
            fault = fault_of(error)
            reasons.append(f"{place}: {fault.reason}")
            rejects.add(fault.kind, file, index, fault.reason)
    warn_of_overhang(overhung, len(found), file)
    if not found:
        why = f"no region can be used: {reasons[0]}" if reasons else "an empty list of regions"
        raise DataError(f"{file.name}: {why}")
    return found


_Entries = dict[int | None, list[tuple[int, Any]]]  # by image, each with its place in the file


@lru_cache(maxsize=1)  # read once for any number of images
def _read(path: Path, changed: int) -> tuple[_Entries, list[dict[str, Any]], str]:
    """The entries of a file, the images that it lists, and the one that it is about."""
    data = read_json(path)
    content = data if isinstance(data, dict) else {"regions": data}
    listed, images = content.get("regions", content.get("annotations")), content.get("images")
    if not isinstance(listed, list):
        raise DataError(f"{path}: expected a list of regions, alone or as regions or annotations, got {short(data)}")
    entries: _Entries = {}
    for place, entry in enumerate(listed):
        number = number_of(entry.get("image_id")) if isinstance(entry, dict) else None
        entries.setdefault(number, []).append((place, entry))
    first: dict[int | None, dict[str, Any]] = {}
    for each in images if isinstance(images, list) else ():
        if isinstance(each, dict):
            first.setdefault(number_of(each.get("id")), each)
    return entries, list(first.values()), str(content.get("image") or "").replace("\\", "/")


def _entries_of(
    file: Path, image: str | Path | None, image_id: int | str | None, size: tuple[int, int], rejects: Rejects
) -> list[tuple[int, Any]]:
    """The entries about one image, with their places in the file."""
    entries, images, about = _read(file, file.stat().st_mtime_ns if file.is_file() else 0)
    numbers, own = entries.keys() - {None}, PurePath("" if image is None else image)
    if image_id is None:
        if about and image is not None and PurePath(about).name != own.name:
            raise DataError(f"{file.name} is about {about}, not {image}; give the file of this image")
        is_text = any(number is not None and number >> 62 for number in numbers)  # the image's name, maybe of another
        if not images and len(numbers) <= 1 and (image is None or not is_text):
            return [each for some in entries.values() for each in some]
        named = any(isinstance(each.get("file_name") or each.get("coco_url"), str) for each in images)
        if image is not None and named:
            image_id = entry_of(images, image, file.name).get("id")
        elif len(images) == 1:
            image_id = images[0].get("id")
        else:  # results name no images, but some have the file's name for an id, and COCO's are called by their numbers
            digits = re.search(r"\d+$", own.stem)
            likely = own.name, own.stem, int(digits[0]) if digits else ""
            image_id = next((each for each in likely if each != "" and number_of(each) in numbers), None)
        if image_id is None:
            count = max(len(numbers), len(images))
            raise DataError(f"{file}: which of the {count} images is {own.name or 'meant'}? give --image-id")
    wanted = number_of(image_id)
    try:
        stated = stated_size(next((each for each in images if number_of(each.get("id")) == wanted), {})) or size
    except Fault as fault:
        raise DataError(f"{file.name}: image {image_id}: {fault.kind}: {fault}") from None
    if stated != size:
        expected = f"expected {stated[0]} x {stated[1]} pixels (W x H) as annotated"
        raise DataError(f"{file.name}: image of another size: {expected}, got {size[0]} x {size[1]}")
    if wanted not in numbers:
        raise DataError(f"{file}: no regions of image_id {image_id}")
    for index, stray in entries.get(None, ()):
        rejects.add(MALFORMED, file, index, f"expected an image_id, got {short(stray)}")
    return entries[wanted]


def _region(entry: Any, width: int, height: int) -> Region:
    """The region of an entry: as this package writes it, else its mask, else its box."""
    row = read_annotation(entry)
    own = entry.get("region", {key: entry[key] for key in (*KINDS, "radius", "width", "normalized") if key in entry})
    if isinstance(own, dict) and own.keys() & set(KINDS):
        # A width beside anything but a scribble is the image's.
        return Region.from_dict({key: own[key] for key in own if key != "width" or "scribble" in own})
    if row.mask.rle is not None and row.mask.rle.get("size") != [height, width]:
        got = f"{width} x {height} pixels, got {short(row.mask.rle.get('size'))}"
        raise Fault("RLE of another size", f"expected the size {[height, width]} (H, W) of the image, {got}")
    if (region := row.mask.region()) is not None:
        return region
    if row.mask.faults:
        raise row.mask.faults[0]
    if row.box is None:
        wanted = f"a bbox [x, y, width, height] in numbers, a segmentation or one of {', '.join(KINDS)}"
        raise Fault(MALFORMED, f"expected {wanted}, got the keys {short(list(entry))}")
    annotated_box(row.box, width, height)
    x, y, w, h = row.box
    return Region.box(x, y, x + w, y + h)


def grid_points(side: int, width: int, height: int) -> list[Proposal]:
    """Points in the middle of ``side`` x ``side`` cells over an image of a size in pixels, row by row."""
    return [
        Proposal(region=Region.point((column + 0.5) * width / side, (row + 0.5) * height / side))
        for row in range(side)
        for column in range(side)
    ]


class Segmenter:
    """A Segment Anything model of transformers, whose own pipeline needs torchvision; CheckpointError if it is none."""

    def __init__(self, path: str | Path, device: "str | torch.device | None" = None) -> None:
        quiet_libraries()
        from transformers import AutoConfig, SamModel
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        from regiongpt.inference.engine import pick_device

        chosen = pick_device(device)
        try:
            kind = AutoConfig.from_pretrained(path).model_type
            if kind != "sam":
                raise CheckpointError(f"expected a SAM model at {path}, got the model_type {kind!r}")
            self.processor = AutoImageProcessor.from_pretrained(path, backend="pil")
            self.model = SamModel.from_pretrained(path).eval().to(chosen)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"expected a SAM model at {path}, which cannot be read: {reason(error)}") from None

    def propose(
        self, photo: "Image", side: int = 32, *, min_quality: float = 0.88, min_stability: float = 0.95
    ) -> list[Proposal]:
        """Masks at ``side`` x ``side`` points, scored by the model; :func:`choose` removes duplicates.

        Kept are masks that the model expects to overlap the true object by ``min_quality``, and that drawn slightly
        larger overlap themselves drawn slightly smaller by ``min_stability``, both as in Segment Anything.
        """
        import torch

        cells = (torch.arange(side) + 0.5) / side
        inputs = self.processor(photo, return_tensors="pt")
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        points_P2 = torch.cartesian_prod(cells, cells).flip(1) * sizes[1][0].flip(0)
        found: list[Proposal] = []
        with torch.inference_mode():
            features = self.model.get_image_embeddings(inputs["pixel_values"].to(self.model.device))
            for asked_P2 in points_P2.to(features).split(64):
                output = self.model(image_embeddings=features, input_points=asked_P2[None, :, None])
                masks_NHW, quality_N = output.pred_masks[0].flatten(0, 1), output.iou_scores[0].flatten()
                inner, outer = ((masks_NHW > offset).flatten(1).sum(1) for offset in (1.0, -1.0))
                good = (quality_N >= min_quality) & (inner / outer.clamp_min(1) >= min_stability)
                # Only what is good is drawn at the image's size, one at a time: that is where the memory goes.
                for quality, mask_HW in zip(quality_N[good].tolist(), masks_NHW[good], strict=True):
                    (drawn,) = self.processor.post_process_masks([mask_HW[None, None]], *sizes)
                    pixels = drawn[0, 0].cpu().numpy()
                    if pixels.any():
                        found.append(Proposal(region=Region.mask(pixels), score=float(quality)))
        return found


_SEGMENTER = cache(Segmenter)


def choose(
    proposals: Sequence[Proposal],
    width: int,
    height: int,
    *,
    most: int | None = None,
    iou: float | None = None,
    min_score: float | None = None,
) -> list[Proposal]:
    """Drop low scores, duplicates and all but the ``most`` best of an image's proposals; the others keep their order.

    Higher scores are better, then earlier ones, and no score is the worst, but a ConfigError with ``min_score``.
    Duplicates share more than ``iou`` (0 to 1) of their union's pixels with something better.
    """
    if min_score is not None:
        if unscored := next((each for each in proposals if each.score is None), None):
            raise ConfigError(f"{unscored.place}: has no score; leave --min-score out")
        proposals = [each for each in proposals if (each.score or 0.0) >= min_score]
    ranked = sorted(range(len(proposals)), key=lambda k: (proposals[k].score is None, -(proposals[k].score or 0.0)))
    if iou is not None:
        apart, coded = list[int](), list[Any]()
        for k in ranked:
            one = coco_mask.encode(np.asfortranarray(proposals[k].region.to_mask(width, height), np.uint8))
            if not coded or np.max(coco_mask.iou([one], coded, [0] * len(coded))) <= iou:
                apart.append(k)
                coded.append(one)
        ranked = apart
    return [proposals[k] for k in sorted(ranked[:most])]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Answers about an image."""

    record: dict[str, Any]  # for JSON
    lines: list[str]  # as text
    captions: list[str] | None = None  # one per region, for a picture
    dialogue: Sequence[tuple[str, str]] = ()  # question and answer, for a picture
    warnings: list[str] = field(default_factory=list)


def _ask(predictor: "RegionPredictor", given: Sequence[Proposal], question: str, options: Options) -> Reply:
    regions = [each.region for each in given]
    answer = predictor.ask(question, regions, **dict(options))
    warnings = list(answer.warnings)
    asked = {"question": question, "regions": [region.to_dict() for region in regions], "answer": answer.text}
    record = {**asked, "cited": list(answer.cited), "warnings": warnings, "complete": answer.complete}
    return Reply(record=record, lines=[answer.text], dialogue=[(question, answer.text)], warnings=warnings)


def _describe(predictor: "RegionPredictor", given: Sequence[Proposal], _: str, options: DescribeOptions) -> Reply:
    answers = predictor.describe([each.region for each in given], **dict(options))
    said = [{"answer": each.text, "complete": each.complete, "warnings": list(each.warnings)} for each in answers]
    reply = _each(given, said, [answer.text for answer in answers])
    reply.warnings.extend(f"[{n}] {line}" for n, answer in enumerate(answers, 1) for line in answer.warnings)
    return reply


def _classify(predictor: "RegionPredictor", given: Sequence[Proposal], _: str, options: ChoiceOptions) -> Reply:
    how = options.model_dump(exclude={"choices"})
    found = predictor.classify([each.region for each in given], options.names, **how)
    best = [", ".join(f"{name} {share:.3f}" for name, share in each.top(options.top_k or 1)) for each in found]
    return _each(given, list(map(asdict, found)), best)


def _locate(predictor: "RegionPredictor", given: Sequence[Proposal], expression: str, options: LocateOptions) -> Reply:
    regions = [each.region for each in given]
    found = predictor.locate(expression, regions, **dict(options))
    said = {"number": found.number, "answer": found.text, "probability": found.probability}
    about = {"expression": expression, "regions": [region.to_dict() for region in regions]}
    line = f"{found.text} {found.probability:.3f}"
    return Reply(
        record={**about, **said, "probabilities": list(found.probabilities)},
        lines=[line],
        captions=[f"{share:.3f}" for share in found.probabilities[:-1]],
        dialogue=[(expression, line)],
    )


def _each(given: Sequence[Proposal], said: Sequence[dict[str, Any]], texts: list[str]) -> Reply:
    """What is said of each region by itself, as JSON and as a text."""
    regions = [
        {"region": each.region.to_dict(), **({} if each.score is None else {"score": each.score}), **more}
        for each, more in zip(given, said, strict=True)
    ]
    lines = [f"[{number}] {' '.join(text.split())}" for number, text in enumerate(texts, 1)]
    return Reply(record={"regions": regions}, lines=lines, captions=texts)


_as_json = partial(json.dumps, ensure_ascii=False, allow_nan=False)
_VERBS: dict[str, Callable[..., Reply]] = {"ask": _ask, "describe": _describe, "classify": _classify, "locate": _locate}


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
    with light_imports():
        from regiongpt.inference import RegionPredictor

    return RegionPredictor.from_pretrained(options.model, **options.model_dump(exclude={"model"}), **memory)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to do with each image."""

    verb: str
    text: str  # the question or the expression, if the verb takes one
    typed: Typed
    sources: Sources
    options: Any  # of the verb
    model: ModelOptions

    @property
    def key(self) -> str:
        """A digest of all that the answers depend on but the files' content."""
        typed = [region.to_dict() for _, region in self.typed.regions]
        model = self.model.model_dump(mode="json", exclude={"device"})
        settings = [*(each.model_dump(mode="json") for each in (self.sources, self.options)), model]
        return digest(self.verb, self.text, typed, self.typed.normalized, settings)[:16]

    def regions(self, photo: "Image", path: str, several: bool) -> tuple[list[Proposal], int, str]:
        """Regions to ask about, those typed first; how many others were left out; why some cannot be used."""
        size, sources, missing, why = photo.size, self.sources, 0, ""
        found = self.typed.on(*size)
        if sources.proposals:
            rejects = Rejects()
            found += read_proposals(sources.proposals, *size, image=path, image_id=sources.image_id, rejects=rejects)
            missing, why = rejects.counts.total(), rejects.listed()
        elif sources.sam:
            found += _SEGMENTER(sources.sam, self.model.device).propose(photo, sources.grid or 32)
        elif sources.grid is not None:
            found += grid_points(sources.grid, *size)
        iou = 0.7 if sources.sam and sources.iou is None else sources.iou
        kept = choose(found, *size, most=sources.max_regions, iou=iou, min_score=sources.min_score)
        if self.text:
            check_placeholders(self.text, len(kept))
        # With several images, describe and classify skip one without regions.
        if not kept and self.verb != "ask" and (self.text or not several):
            raise DataError(f"{path}: no region is left to ask about; lower --min-score or raise --iou")
        return kept, len(found) - len(kept) + missing, why


def over_images(
    images: Sequence[str],
    request: Request,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
    picture: str | None = None,
) -> int:
    """Answer about each image, and print or write the answers as they come; returns how many were skipped.

    An image of several that cannot be read is reported and skipped. The model is loaded once one has been read.

    Args:
        images: paths.
        request: what to do with each.
        out: file to append JSON lines to; images that the same request has answered there are not asked about again.
        overwrite: replace the file.
        json: print records rather than text.
        picture: file for the drawing of a single image with its regions and answers.
    """
    predictor: RegionPredictor | None = None
    skipped, several = 0, len(images) > 1
    key = request.key if out else ""
    done = _answered(out, key) if out and out.is_file() and not overwrite else set()
    left, mode = [path for path in images if path not in done], "a" if done else "w"
    for path in progress(left, "images", "images") if several and (out or not sys.stdout.isatty()) else left:
        try:
            photo = load_image(path)
            given, n_left_out, unusable = request.regions(photo, path, several)
            predictor = predictor or load_predictor(request.model)
            began = time.perf_counter()
            predictor.set_image(photo)
            reply = _VERBS[request.verb](predictor, given, request.text, request.options)
        except (DataError, RegionError) as error:
            if not several:
                raise
            tell(f"regiongpt: error: {'' if path in str(error) else f'{path}: '}{error}; skipped")
            skipped += 1
            continue
        if n_left_out:
            why = f" (unusable: {unusable})" if unusable else ""
            reply.warnings.insert(0, f"left out {n_left_out} of {n_left_out + len(given)} regions{why}")
        for line in reply.warnings:
            tell(f"regiongpt: warning: {f'{path}: ' * several}{line}")
        record = {"image": path, **reply.record, "seconds": round(time.perf_counter() - began, 3)}
        record |= {"left_out": n_left_out, "device": str(predictor.engine.device)}
        if out is not None:
            with writing(out), out.open(mode, encoding="utf-8", errors="backslashreplace") as file:
                file.write(_as_json({**record, "request": key}) + "\n")
            mode = "a"
        elif json:
            print(_as_json(record, indent=None if several else 2), flush=True)
        else:
            for line in reply.lines:
                print(f"{path}: {' '.join(line.split())}" if several else line, flush=True)
        if picture is not None:
            regions = [each.region for each in given]
            save_picture(draw_regions(photo, regions, reply.captions, dialogue=reply.dialogue), picture)
    if out is not None:
        print(f"{out}: {len(images) - skipped} of {len(images)} images")
    if skipped:
        tell(f"regiongpt: error: {skipped} of {len(images)} images were skipped")
    return skipped


def _answered(out: Path, key: str) -> set[str]:
    """The images whose records are in a file; a line that a kill has cut off is removed."""
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    found = set()
    for line in whole.splitlines() if whole or not content else [content]:
        try:
            record = json.loads(line)
            if record["request"] != key:
                raise ValueError
            found.add(record["image"])
        except (ValueError, TypeError, KeyError):
            hint = "give --overwrite to replace it, or another name"
            raise ConfigError(f"{out}: holds other things than answers to this request; {hint}") from None
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    return found

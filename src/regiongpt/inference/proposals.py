"""Regions that nobody marked: a detector's in a file, a grid of points, masks of a Segment Anything model."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from regiongpt.data.coco import (
    Annotation,
    annotated_box,
    crowd_hint,
    entry_of,
    number_of,
    overhangs,
    read_annotation,
    read_box,
    read_score,
    warn_of_overhang,
)
from regiongpt.data.reading import MALFORMED, stated_size, whole
from regiongpt.data.shards import CROWD, Fault, Rejects, many
from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError, short
from regiongpt.images import SUFFIXES
from regiongpt.regions import KINDS, Region
from regiongpt.storage import read_json

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

log = logging.getLogger(__name__)

QUALITY = 0.88
"""The least overlap with the true object that a SAM model itself must expect of a mask; Segment Anything's setting."""
STABILITY = 0.95
"""The least overlap of a mask drawn slightly larger with the same mask drawn slightly smaller."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A region that something other than a person marked, in pixels of the image."""

    region: Region
    score: float | None = None  # from its source, if any
    place: str = ""  # where it came from, as messages name it: ``boxes.json[3]``


def read_proposals(
    path: str | Path,
    width: int,
    height: int,
    *,
    image: str | Path | None = None,
    image_id: int | str | None = None,
    crowds: bool = False,
    rejects: Rejects | None = None,
) -> list[Proposal]:
    """Read regions of one image from a json file; an entry that cannot be used is left out and counted.

    The file is a list of COCO detection results (``image_id``, ``bbox`` or ``segmentation``, ``score``) or of regions
    as :meth:`Region.to_dict` writes them; or an object with such a list as its ``regions`` (what ``regiongpt ask
    --json`` prints) or its ``annotations`` (a COCO data set). Where an entry has a mask, that is taken, not its box.

    Args:
        path: the file.
        width: width of the image in pixels.
        height: height of the image in pixels.
        image: the image's file, looked up in a file about several by its name, or by the number that it ends in.
        image_id: take the entries with this ``image_id``, whatever the file's name.
        crowds: take what is marked as a crowd too.
        rejects: where entries that are left out are counted.

    Raises:
        DataError: the file is of another form, has nothing about this image, or says that it has another size.
    """
    file = Path(path)
    rejects = Rejects() if rejects is None else rejects
    found, reasons, spoilt, overhung = [], [], [], []
    stamp = file.stat() if file.is_file() else None
    opened = _read(file, stamp and (stamp.st_mtime_ns, stamp.st_size))
    entries = _of_image(opened, image, image_id, (width, height))
    if entries is not opened.entries:
        for index, entry in opened.homeless:
            rejects.add(MALFORMED, file, index, f"expected an image_id, got {short(entry)}")
    for index, entry in entries:
        place = f"{file.name}[{index}]"
        try:
            proposal, passed_over = _proposal(entry, place, width, height, crowds)
            found.append(proposal)
            box = read_box(entry.get("bbox"))
            overhung.append(box is not None and overhangs(box, width, height))
            spoilt += [f"{place}: {passed_over}"] if passed_over else []
        except Fault as fault:
            reasons.append(f"{place}: {fault.reason}")
            rejects.add(fault.kind, file, index, fault.reason)
    warn_of_overhang(sum(overhung), len(found), file)
    if spoilt:
        log.warning("%s cannot be used, so the box is: %s", many(len(spoilt), "mask"), spoilt[0])
    if not found:
        hint = crowd_hint(rejects) if reasons and "--crowds" not in reasons[0] else ""
        why = f"no region can be used: {reasons[0]}{hint}" if reasons else "an empty list of regions"
        raise DataError(f"{file.name}: {why}")
    return found


def grid_points(side: int, width: int, height: int) -> list[Proposal]:
    """Points in the middle of ``side`` x ``side`` cells over an image of a size in pixels, row by row."""
    if not 1 <= side <= 128:
        raise ConfigError(f"grid: give 1 to 128 points a side, got {side}")
    return [
        Proposal(
            region=Region.point((column + 0.5) * width / side, (row + 0.5) * height / side),
            place=f"point {row + 1},{column + 1} of the grid",
        )
        for row in range(side)
        for column in range(side)
    ]


def choose(
    proposals: Sequence[Proposal],
    width: int,
    height: int,
    *,
    most: int | None = None,
    iou: float | None = None,
    min_score: float | None = None,
) -> list[Proposal]:
    """Drop low scores, duplicates and excess proposals.

    Higher scores are better, then earlier ones; those without a score come last.

    Args:
        proposals: in any order, which the result keeps.
        width: width of the image in pixels.
        height: height of the image in pixels.
        most: how many to keep, the best; None for all.
        iou: leave out what overlaps something better by more than this, in 0 to 1; None to keep all. Boxes are compared
            exactly, other kinds by their pixels.
        min_score: leave out scores under this; None to keep all.

    Raises:
        ConfigError: it asks for scores that are not there.
        RegionError: a proposal is no region of the image.
    """
    if min_score is not None:
        scores = [each.score for each in proposals]
        if None in scores:
            place = proposals[scores.index(None)].place
            raise ConfigError(f"{place}: has no score; leave --min-score out")
        proposals = [each for each in proposals if (each.score or 0.0) >= min_score]
    ranked = sorted(range(len(proposals)), key=lambda k: (proposals[k].score is None, -(proposals[k].score or 0.0)))
    if iou is not None:
        regions = [proposals[k].region for k in ranked]
        coded: list[Any]
        if all(region.kind == "box" for region in regions):
            bounds = [region.bounds(width, height) for region in regions]
            coded = [[float(x0), float(y0), float(x1 - x0), float(y1 - y0)] for x0, y0, x1, y1 in bounds]
        else:
            masks = [region.to_mask(width, height) for region in regions]
            coded = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
        apart: list[int] = []
        for k, one in enumerate(coded):
            others = [coded[other] for other in apart]
            if not others or np.max(coco_mask.iou([one], others, [0] * len(others))) <= iou:
                apart.append(k)
        ranked = [ranked[k] for k in apart]
    return [proposals[k] for k in sorted(ranked[:most])]


class Segmenter:
    """A Segment Anything model in transformers' format, from a hub name or folder, ready to look at images.

    transformers' own pipeline for it needs torchvision.

    Raises:
        CheckpointError: the model cannot be read, or is of another kind.
    """

    def __init__(self, path: str | Path, device: "str | torch.device | None" = None) -> None:
        from transformers import AutoConfig, SamModel
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            kind = AutoConfig.from_pretrained(path).model_type
            if kind == "sam":
                self.processor = AutoImageProcessor.from_pretrained(path, backend="pil")
                self.model = SamModel.from_pretrained(path).eval().to(device or "cpu")
        except (OSError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200]
            raise CheckpointError(f"expected a SAM model at {path}, which cannot be read: {why}") from None
        if kind != "sam":
            raise CheckpointError(f"expected a SAM model at {path}, got the model_type {kind!r}")

    def propose(
        self, photo: "Image", side: int = 32, *, min_quality: float = QUALITY, min_stability: float = STABILITY
    ) -> list[Proposal]:
        """Masks of the objects at ``side`` x ``side`` points, with the model's own opinion of each as its score.

        Several points lie on one object, and each is answered by masks of a part, the object and what it belongs to:
        :func:`choose` removes duplicates.
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
                # Only what is good is drawn at the image's size, and a few at a time: that is where the memory goes.
                for quality, mask_HW in zip(quality_N[good].tolist(), masks_NHW[good], strict=True):
                    (drawn,) = self.processor.post_process_masks([mask_HW[None, None]], *sizes)
                    pixels = drawn[0, 0].cpu().numpy()
                    if pixels.any():
                        place = f"mask {len(found) + 1} of the SAM model"
                        found.append(Proposal(region=Region.mask(pixels), score=float(quality), place=place))
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Files


class _File(NamedTuple):
    """A file of regions: its entries with their places, all and by image, the images it lists, and the one it names."""

    path: Path
    entries: list[tuple[int, Any]]
    by_image: dict[int, list[tuple[int, Any]]]
    ids: dict[int, Any]  # image ids as in the entries
    homeless: list[tuple[int, Any]]  # without an image_id
    images: list[Mapping[str, Any]]
    about: str


@lru_cache(maxsize=1)  # read once for any number of images
def _read(path: Path, stamp: tuple[int, int] | None) -> _File:
    data = read_json(path)
    content = data if isinstance(data, dict) else {"regions": data}
    listed = content.get("regions", content.get("annotations"))
    if not isinstance(listed, list):
        raise DataError(
            f"{path}: expected a list of regions, or an object with one as regions or annotations, got {short(data)}"
        )
    by_image: dict[int, list[tuple[int, Any]]] = {}
    ids: dict[int, Any] = {}
    homeless: list[tuple[int, Any]] = []
    for place, entry in enumerate(listed):
        given = [entry.get(key) for key in ("image_id", "file_name", "image")] if isinstance(entry, dict) else []
        identity, number = next(((each, n) for each in given if (n := number_of(each)) is not None), (None, None))
        if number is None:
            homeless.append((place, entry))
        else:
            by_image.setdefault(number, []).append((place, entry))
            ids[number] = identity
    images, about = content.get("images"), content.get("image")
    images = [each for each in images if isinstance(each, dict)] if isinstance(images, list) else []
    if not images:  # some results have the name of the image for its id
        named = [each for each in ids.values() if isinstance(each, str) and each.lower().endswith(SUFFIXES)]
        images = [{"id": name, "file_name": name} for name in named]
    first = {number_of(each.get("id")): each for each in reversed(images)}
    about = about.replace("\\", "/") if isinstance(about, str) else ""
    return _File(path, list(enumerate(listed)), by_image, ids, homeless, list(first.values())[::-1], about)


def _of_image(
    file: _File, image: str | Path | None, image_id: int | str | None, size: tuple[int, int]
) -> list[tuple[int, Any]]:
    """The entries about one image, with their places in the file."""
    name = file.path.name
    if image_id is None:
        if file.about and image is not None and PurePath(file.about).name != PurePath(image).name:
            raise DataError(f"{name} is about {file.about}, not {image}; give a file with its list of regions alone")
        is_called_by_number = all(number >> 62 == 0 for number in file.by_image)
        if not file.images and len(file.by_image) <= 1 and (is_called_by_number or image is None):
            return file.entries
        image_id = _guess(file, image)
    wanted = number_of(image_id)
    for entry in file.images:
        if number_of(entry.get("id")) == wanted:
            try:
                stated = stated_size(entry) or size
            except Fault as fault:
                raise DataError(f"{name}: image {image_id}: {fault.kind}: {fault}") from None
            if stated != size:
                expected = f"expected {stated[0]} x {stated[1]} pixels (W x H) as annotated"
                raise DataError(f"{name}: image of another size: {expected}, got {size[0]} x {size[1]}")
    if wanted not in file.by_image:
        known = ", ".join(map(str, islice(file.ids.values(), 5)))
        raise DataError(f"{file.path}: no regions of image_id {image_id}, only of {known or 'no image'}")
    return file.by_image[wanted]


def _guess(file: _File, image: str | Path | None) -> Any:
    """Which of a file's images is the one in the file ``image``."""
    own = PurePath(image if image is not None else "")
    if own.stem and number_of(own.stem) in file.by_image and whole(own.stem) is None:
        return own.stem  # some results have that for an id
    named = any(isinstance(each.get("file_name") or each.get("coco_url"), str) for each in file.images)
    if image is not None and named:
        return entry_of(file.images, image, file.path.name).get("id")
    if len(file.images) == 1:
        return file.images[0].get("id")
    # Results name no images, but those of COCO's are called by their numbers.
    digits = re.search(r"(\d+)$", own.stem)
    if digits and int(digits[1]) in file.by_image:
        return int(digits[1])
    raise DataError(
        f"{file.path}: which of the {max(len(file.by_image), len(file.images))} images is "
        f"{PurePath(image).name if image is not None else 'meant'}? give --image-id"
    )


def _proposal(entry: Any, place: str, width: int, height: int, crowds: bool) -> tuple[Proposal, str]:
    """The proposal of an entry, and what is wrong with the mask where the box beside it was taken."""
    row, score = read_annotation(entry), read_score(entry)
    if row.crowd and not crowds:
        raise Fault(CROWD, "expected one object, got a crowd; --crowds includes it")
    try:
        region, passed_over = _region(entry, row, width, height)
        return Proposal(region=region.check(width, height), score=score, place=place), passed_over
    except RegionError as error:
        raise Fault("region that makes no sense", str(error)) from None


def _region(entry: dict[str, Any], row: Annotation, width: int, height: int) -> tuple[Region, str]:
    own = entry.get("region", {key: entry[key] for key in (*KINDS, "radius", "width", "normalized") if key in entry})
    if isinstance(own, dict) and own.keys() & set(KINDS):
        # A width beside anything but a scribble is the image's.
        return Region.from_dict({key: own[key] for key in own if key != "width" or "scribble" in own}), ""
    if row.mask.rle is not None and row.mask.rle.get("size") != [height, width]:
        got = f"{width} x {height} pixels, got {short(row.mask.rle.get('size'))}"
        raise Fault("RLE of another size", f"expected the size {[height, width]} (H, W) of the image, {got}")
    wrong = row.mask.faults[0].reason if row.mask.faults else ""
    try:
        if (region := row.mask.region()) is not None:
            return region.check(width, height), ""
    except RegionError as error:
        if row.box is None or row.boxless:
            raise
        wrong = str(error)
    if row.box is not None:
        annotated_box(row.box, width, height)
        x, y, w, h = row.box
        return Region.box(x, y, x + w, y + h), wrong
    if row.mask.faults:
        raise row.mask.faults[0]
    wanted = f"a bbox [x, y, width, height] in numbers, a segmentation or one of {', '.join(KINDS)}"
    raise Fault(MALFORMED, f"expected {wanted}, got the keys {short(list(entry))}")

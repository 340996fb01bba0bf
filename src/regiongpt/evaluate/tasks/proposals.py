"""Candidate boxes from a file of detections in the common form of detection results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regiongpt.data.convert.jsonstream import iter_array
from regiongpt.data.convert.values import is_number, short
from regiongpt.data.instances import number_of, read_box, read_mask
from regiongpt.data.shards import Rejects
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.detection import ENOUGH, overlaps

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Boxes by image, the best score first where there are scores.

    Attributes:
        boxes: By image id, xyxy in pixels.
        scored: Whether the file has scores.
    """

    boxes: Mapping[int, Sequence[Box]]
    scored: bool


def read_proposals(
    path: Path,
    images: set[int],
    top: int,
    least: float,
    rejects: Rejects,
    size: Callable[[int], tuple[int, int] | None] = lambda _: None,
) -> Proposals:
    """The candidates of the images that are asked about.

    Args:
        path: A json array of objects with ``image_id`` and ``bbox`` (x, y, width, height) or ``segmentation``, and
            ``score``; where others have one, null is left out.
        images: Ids of the images.
        top: Most candidates an image, by score; 0 for all.
        least: Least score; 0 for all, those of scores below 0 too.
        rejects: Where unusable entries are noted.
        size: Width and height of an image in pixels, to which a candidate is clipped, and of which it has to show
            something; None where unknown.

    Raises:
        DataError: The file is of another form, or has scores for some entries alone, or nothing for any image.
        ConfigError: ``top`` or ``least`` is asked for, and there are no scores.
    """
    found: dict[int, list[tuple[float, Box]]] = {}
    unscored: list[tuple[int, int, Box]] = []
    lacking = 0
    fault = ""  # the first, for a file of which nothing can be used
    for place, entry in enumerate(iter_array(path, None, rejects)):
        known = entry if isinstance(entry, dict) else {}
        image_id, score = number_of(known.get("image_id")), known.get("score")
        box = read_box(known.get("bbox")) or read_mask(known.get("segmentation")).bounds()
        if image_id is None or box is None or not all(map(is_number, (*box, 0 if score is None else score))):
            told = f"expected image_id, bbox as four numbers or a segmentation, and a finite score, got {short(entry)}"
            fault = fault or f"[{place}]: {told}"
            rejects.add("proposal of another form", path, place, told)
            continue
        if image_id not in images:
            continue
        x, y, width, height = box
        if width <= 0 or height <= 0:
            rejects.add("box without size", path, place, f"expected a width and height above 0, got {short(box)}")
            continue
        within = size(image_id)
        if within is not None and not (x < within[0] and y < within[1] and x + width > 0 and y + height > 0):
            said = f"expected a box that shows something of an image of {within[0]} x {within[1]} pixels"
            rejects.add("proposal outside its image", path, place, f"{said}, got {short(box)}")
            continue
        right, bottom = within or (float("inf"), float("inf"))
        corners = max(x, 0.0), max(y, 0.0), min(x + width, right), min(y + height, bottom)
        if score is None:
            unscored.append((place, image_id, corners))
            lacking += "score" not in known
        else:
            found.setdefault(image_id, []).append((float(score), corners))
    scored = bool(found)
    if scored and lacking:
        raise DataError(f"{path}: expected a score for every candidate or for none, got {lacking} without")
    for place, image_id, corners in unscored:
        if scored:
            rejects.add("proposal without a score", path, place, "expected a score as the others have one, got null")
        else:
            found.setdefault(image_id, []).append((0.0, corners))
    if not found:
        raise DataError(
            f"{path}: expected candidates of the {len(images)} images that are asked about, found none; "
            f"{rejects.summary()}; {fault or 'is the file of another split?'}"
        )
    if not scored and (top or least):
        raise ConfigError(
            f"{path}: expected scores to choose candidates by, found none; give a file with scores, or take all "
            "candidates with --top 0 --min-score 0"
        )
    kept = {}
    for image_id, those in found.items():
        order = np.argsort([-score for score, _ in those], kind="stable") if scored else np.arange(len(those))
        best = [those[k][1] for k in order.tolist() if not least or those[k][0] >= least]
        kept[image_id] = best[: top or None]
    return Proposals(boxes=kept, scored=scored)


def candidates_of(truth: Box, proposed: Sequence[Box], inject: bool, seed: tuple[int, ...]) -> tuple[list[Box], bool]:
    """The boxes to choose among, in an order drawn by the seed, for a detector's order says which is likely.

    Args:
        truth: The object's box.
        proposed: Boxes proposed in the image.
        inject: Add the truth where no candidate reaches an overlap of 0.5, as the paper does.
        seed: Seed of the order.

    Returns:
        The boxes, and whether the truth had to be added (or would have had to be).

    Paper: §4.3
    """
    lacking = not proposed or bool(overlaps(truth, proposed).max() < ENOUGH)
    boxes = [*proposed, truth] if lacking and inject else list(proposed)
    order = np.random.default_rng(seed).permutation(len(boxes)).tolist()
    return [boxes[k] for k in order], lacking

"""Candidate boxes from a file of detections in the common form of detection results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regiongpt.data.convert.jsonstream import iter_array
from regiongpt.data.convert.values import is_box, is_number, is_whole, short
from regiongpt.data.shards import Rejects
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.overlap import ENOUGH, overlaps

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
        path: A json array of objects with ``image_id`` and ``bbox`` (x, y, width, height), and ``score``.
        images: Ids of the images.
        top: Most candidates an image, by score; 0 for all.
        least: Least score; 0 for all, those of scores below 0 too.
        rejects: Where unusable entries are noted.
        size: Width and height of an image in pixels, to which a candidate is clipped, and of which it has to show
            something; None where unknown.

    Raises:
        DataError: The file is of another form, or has scores for some entries alone, or none for any image.
        ConfigError: ``top`` or ``least`` is asked for, and there are no scores.
    """
    found: dict[int, list[tuple[float, Box]]] = {}
    scored = unscored = 0
    fault = ""  # the first, for a file of which nothing can be used
    for place, entry in enumerate(iter_array(path, None, rejects)):
        if told := _malformed(entry):
            fault = fault or f"[{place}]: {told}"
            rejects.add("proposal of another form", path, place, told)
            continue
        image_id, box, score = entry["image_id"], entry["bbox"], entry.get("score")
        scored, unscored = scored + (score is not None), unscored + (score is None)
        if image_id not in images:
            continue
        x, y, width, height = map(float, box)
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
        found.setdefault(image_id, []).append((float(score or 0.0), corners))
    if not found:
        raise DataError(
            f"{path}: expected candidates of the {len(images)} images that are asked about, found none; "
            f"{rejects.summary()}; {fault or 'is the file of another split?'}"
        )
    if scored and unscored:
        raise DataError(
            f"{path}: expected a score for every candidate or for none, got {unscored} without of {scored + unscored}"
        )
    if unscored and (top or least):
        raise ConfigError(
            f"{path}: expected scores to choose candidates by, found none; give a file with scores, or take all "
            "candidates with --top 0 --min-score 0"
        )
    kept = {}
    for image_id, those in found.items():
        order = np.argsort([-score for score, _ in those], kind="stable") if scored else np.arange(len(those))
        best = [those[k][1] for k in order.tolist() if not least or those[k][0] >= least]
        kept[image_id] = best[: top or None]
    return Proposals(boxes=kept, scored=bool(scored))


def _malformed(entry: Any) -> str:
    """What is wrong with an entry's form; ``""`` where nothing is."""
    if not isinstance(entry, dict) or not is_whole(entry.get("image_id")) or not is_box(entry.get("bbox")):
        return f"expected image_id as a whole number and bbox as four numbers, got {short(entry)}"
    score = entry.get("score")
    return "" if score is None or is_number(score) else f"expected score as a finite number, got {short(score)}"


def candidates_of(truth: Box, proposed: Sequence[Box], inject: bool, seed: tuple[int, ...]) -> tuple[list[Box], bool]:
    """The boxes to choose among, in an order drawn by the seed, for a detector's order says which is likely.

    Args:
        truth: The object's box.
        proposed: Of the image.
        inject: Add the truth where no candidate reaches an overlap of 0.5, as the paper does.
        seed: Of the order.

    Returns:
        The boxes, and whether the truth had to be added (or would have had to be).

    Paper: §4.3
    """
    lacking = not proposed or bool(overlaps(truth, proposed).max() < ENOUGH)
    boxes = [*proposed, truth] if lacking and inject else list(proposed)
    order = np.random.default_rng(seed).permutation(len(boxes)).tolist()
    return [boxes[k] for k in order], lacking

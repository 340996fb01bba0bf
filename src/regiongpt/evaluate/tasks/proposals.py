"""Candidate boxes from a file of detections in the common form of detection results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regiongpt.data.coco import annotated_box, read_annotation, read_score
from regiongpt.data.reading import MALFORMED, iter_array
from regiongpt.data.shards import Fault, Rejects, many
from regiongpt.errors import ConfigError, DataError, short
from regiongpt.evaluate.metrics.detection import ENOUGH, overlaps

Box = tuple[float, float, float, float]
_ENDLESS = 1 << 40  # pixels of an image whose size is unknown


class Proposals(NamedTuple):
    """Boxes (xyxy in pixels) by image id, the best score first if the file has scores."""

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
        path: A json array of detection results, with a ``score`` in all or in none.
        images: Ids of the images.
        top: Most candidates an image, by score; 0 for all.
        least: Least score; 0 for all, those of scores below 0 too.
        rejects: Where unusable entries are noted.
        size: Width and height of an image in pixels, to which a candidate is clipped; None where unknown.

    Raises:
        DataError: The file has scores for some entries alone, or nothing for any image.
        ConfigError: ``top`` or ``least`` is asked for, and there are no scores.
    """
    found: dict[int, list[tuple[float | None, Box]]] = {}
    fault = ""  # the first, for a file of which nothing can be used
    for place, entry in enumerate(iter_array(path, None, rejects)):
        with rejects.noting(path, place):
            try:
                row = read_annotation(entry)
                if row.image is None or row.box is None:
                    wanted = "expected image_id, and a bbox of four numbers or a segmentation"
                    raise Fault(MALFORMED, f"{wanted}, got {short(entry)}")
                if row.image in images:
                    box = annotated_box(row.box, *(size(row.image) or (_ENDLESS, _ENDLESS)))
                    found.setdefault(row.image, []).append((read_score(entry), box))
            except Fault as error:
                fault = fault or f"[{place}]: {error}"
                raise
    if not found:
        raise DataError(
            f"{path}: no candidates of the {many(len(images), 'image')} that are asked about; "
            f"{rejects.summary()}; {fault or 'is the file of another split?'}"
        )
    lacking = [score is None for those in found.values() for score, _ in those]
    if any(lacking) and not all(lacking):
        raise DataError(f"{path}: {sum(lacking):,} of {len(lacking):,} candidates have no score; give all one, or none")
    if all(lacking) and (top or least):
        raise ConfigError(
            f"{path}: there are no scores to choose candidates by; give a file with scores, or take all candidates "
            "with --top 0 --min-score 0"
        )
    kept = {}
    for image_id, those in found.items():
        best = sorted(those, key=lambda each: -(each[0] or 0.0))
        kept[image_id] = [box for score, box in best if not least or (score or 0.0) >= least][: top or None]
    return Proposals(kept, not all(lacking))


def candidates_of(truth: Box, proposed: Sequence[Box], inject: bool, seed: tuple[int, ...]) -> tuple[list[Box], bool]:
    """The boxes to choose among, in an order drawn by the seed, for a detector's order says which is likely.

    Returns:
        The boxes, and whether none overlaps the truth by 0.5; with ``inject`` it is then added, as in the paper.

    Paper: §4.3
    """
    lacking = not proposed or bool(overlaps(truth, proposed).max() < ENOUGH)
    boxes = [*proposed, truth] if lacking and inject else list(proposed)
    order = np.random.default_rng(seed).permutation(len(boxes)).tolist()
    return [boxes[k] for k in order], lacking

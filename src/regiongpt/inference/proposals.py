"""Regions that nobody marked: proposals of a detector in a file, and a grid of points.

Every proposal knows where it came from, so that a mistake in a file of thousands can be found.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.regions import KINDS, Region

MOST_POINTS = 128
"""Points a side of a grid."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A region that something other than a person marked.

    Attributes:
        region: in pixels of the image.
        score: how sure its maker was of it; None where it did not say.
        place: where it came from, as messages name it: ``boxes.json[3]``.
    """

    region: Region
    score: float | None = None
    place: str = ""


def read_proposals(
    path: str | Path, width: int, height: int, *, image: str | Path | None = None, image_id: int | str | None = None
) -> list[Proposal]:
    """Read regions of one image from a json file.

    The file is a list: COCO detection results (``image_id``, ``bbox`` as x, y, width, height or ``segmentation``,
    ``score``) or regions as :meth:`Region.to_dict` writes them, each with a ``score`` if it has one. Or it is an object
    with such a list as its ``regions`` (what ``regiongpt ask --json`` prints) or its ``annotations`` (a COCO data set).
    Where an entry has a mask, that is taken and not its box.

    Args:
        path: the file.
        width: of the image, in pixels.
        height: of the image, in pixels.
        image: the image's file name, by which a file about several images is searched: by the ``file_name`` of a COCO
            data set, else by the number at its end, as COCO's images have it.
        image_id: take the entries with this ``image_id``, whatever the file's name.

    Returns:
        The proposals in the order of the file.

    Raises:
        DataError: the file cannot be read, is of another form, or has nothing about this image.
        RegionError: an entry is no region of this image.
    """
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"expected a json file of regions, got {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a json file of regions, got {file}, which is not json: {error}") from None
    entries, images = _entries(data, file)
    chosen = _of_image(entries, images, file, image, image_id)
    found = []
    for index, entry in chosen:
        place = f"{file.name}[{index}]"
        region = _region(entry, place).check(width, height, place)
        found.append(Proposal(region=region, score=_score(entry, place), place=place))
    if not found:
        raise DataError(f"expected at least one region in {file}, got an empty list")
    return found


def grid_points(side: int, width: int, height: int) -> list[Proposal]:
    """Points in the middle of the cells of a grid over the image, row by row.

    Args:
        side: points a row and rows, 1 to 128.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Raises:
        ConfigError: ``side`` is out of its range.
    """
    if not 1 <= side <= MOST_POINTS:
        raise ConfigError(f"expected a grid of 1 to {MOST_POINTS} points a side, got {side}")
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
    """Leave out the poor, the repeated and the too many.

    Better is what has a higher score, then what comes first; what has no score comes behind what has one.

    Args:
        proposals: in any order, which the result keeps.
        width: of the image, in pixels.
        height: of the image, in pixels.
        most: how many to keep, the best; None for all.
        iou: leave out what overlaps something better by more than this, as intersection over union in 0 to 1; None to
            keep all. Boxes are compared exactly, other kinds by their pixels.
        min_score: leave out scores under this; None to keep all.

    Raises:
        ConfigError: an option is out of its range, or asks for scores that are not there.
        RegionError: a proposal is no region of the image.
    """
    if most is not None and most < 1:
        raise ConfigError(f"expected at least 1 region to keep, got {most}")
    if iou is not None and not 0 <= iou <= 1:
        raise ConfigError(f"expected an IoU of 0 to 1, got {iou}")
    kept = list(range(len(proposals)))
    if min_score is not None:
        without = [proposals[k].place for k in kept if proposals[k].score is None]
        if without:
            raise ConfigError(
                f"expected a score of every proposal to compare with {min_score}, got none of {without[0]}"
            )
        kept = [k for k in kept if (proposals[k].score or 0.0) >= min_score]
    scores = [proposal.score for proposal in proposals]
    kept.sort(key=lambda k: (scores[k] is None, -(scores[k] or 0.0)))
    if iou is not None:
        kept = _apart([proposals[k].region for k in kept], kept, width, height, iou)
    return [proposals[k] for k in sorted(kept[:most])]


def _apart(regions: Sequence[Region], places: Sequence[int], width: int, height: int, iou: float) -> list[int]:
    """Those of ``places`` whose region overlaps no earlier one that is kept by more than ``iou``."""
    if not regions:
        return []
    coded: Any
    if all(region.kind == "box" for region in regions):
        bounds = np.array([region.bounds(width, height) for region in regions], float)
        coded = np.concatenate([bounds[:, :2], bounds[:, 2:] - bounds[:, :2]], axis=1)
    else:
        coded = [coco_mask.encode(np.asfortranarray(r.to_mask(width, height), dtype=np.uint8)) for r in regions]
    kept: list[int] = []
    for index in range(len(regions)):
        if kept:
            others = coded[kept] if isinstance(coded, np.ndarray) else [coded[k] for k in kept]
            overlaps = coco_mask.iou(coded[index : index + 1], others, [0] * len(kept))
            if float(np.max(overlaps)) > iou:
                continue
        kept.append(index)
    return [places[k] for k in kept]


def _entries(data: Any, file: Path) -> tuple[list[Any], list[Any]]:
    """The list of a file, and a COCO data set's images."""
    images: list[Any] = []
    if isinstance(data, Mapping):
        listed = data.get("regions", data.get("annotations"))
        if isinstance(data.get("images"), list):
            images = data["images"]
    else:
        listed = data
    if not isinstance(listed, list):
        got = f"an object with the keys {', '.join(map(repr, list(data)[:6]))}" if isinstance(data, Mapping) else "none"
        raise DataError(
            f"expected a list of regions in {file}, or an object with one as its regions or annotations, got {got}"
        )
    return listed, images


def _of_image(
    entries: list[Any], images: list[Any], file: Path, image: str | Path | None, image_id: int | str | None
) -> list[tuple[int, Any]]:
    """The entries about one image, with their places in the file."""
    numbered = list(enumerate(entries))
    ids = list(dict.fromkeys(str(e["image_id"]) for e in entries if isinstance(e, Mapping) and "image_id" in e))
    if image_id is None:
        if len(ids) <= 1 and not images:
            return numbered
        image_id = _guess(ids, images, file, image)
    found = [(k, e) for k, e in numbered if isinstance(e, Mapping) and str(e.get("image_id")) == str(image_id)]
    if not found:
        some = ", ".join(ids[:5]) or "none at all"
        raise DataError(f"expected regions of image_id {image_id} in {file}, got only others: {some}")
    return found


def _guess(ids: Sequence[str], images: Sequence[Any], file: Path, image: str | Path | None) -> str:
    """Which of a file's images is the one in the file ``image``."""
    name = Path(image).name if image is not None else ""
    for entry in images:
        if isinstance(entry, Mapping) and name and Path(str(entry.get("file_name"))).name == name and "id" in entry:
            return str(entry["id"])
    digits = re.search(r"(\d+)$", Path(name).stem)
    if digits and str(int(digits[1])) in ids:
        return str(int(digits[1]))
    raise DataError(
        f"expected to know which of the {max(len(ids), len(images))} images of {file} is {name or 'meant'}; "
        "give its image_id"
    )


def _region(entry: Any, place: str) -> Region:
    if not isinstance(entry, Mapping):
        raise RegionError(f"{place}: expected an object with a region, got {type(entry).__name__}")
    if isinstance(entry.get("region"), Mapping):
        return Region.from_dict(entry["region"], place)
    if entry.get("segmentation"):
        mask = entry["segmentation"]
        return Region.from_dict({"rle" if isinstance(mask, Mapping) else "polygon": mask}, place)
    if "bbox" in entry:
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4 or any(_number(value) is None for value in box):
            raise RegionError(f"{place}: expected a bbox [x, y, width, height] in numbers, got {box!r:.60}")
        x, y, w, h = map(float, box)
        return Region.box(x, y, x + w, y + h)
    own = {key: entry[key] for key in (*KINDS, "radius", "width") if key in entry}
    if not own.keys() & set(KINDS):
        keys = ", ".join(map(repr, list(entry)[:6])) or "none"
        raise RegionError(f"{place}: expected a bbox, a segmentation or one of {', '.join(KINDS)}, got the keys {keys}")
    if "scribble" not in own:
        own.pop("width", None)  # of the image, where it stands beside another kind
    return Region.from_dict(own, place)


def _score(entry: Mapping[str, Any], place: str) -> float | None:
    score = entry.get("score")
    if score is not None and _number(score) is None:
        raise DataError(f"{place}: expected a score as a number, got {score!r:.60}")
    return None if score is None else float(score)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

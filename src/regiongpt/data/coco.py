"""Reads COCO-format annotations: several instance files, their image folders and human captions, as one list.

A record that cannot be used is never dropped in silence: it is counted by the kind of its fault in
:attr:`CocoData.skipped`, which the training report prints.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regiongpt.errors import DataError

Box = tuple[float, float, float, float]
Ring = tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectAnnotation:
    """One annotated object, or one crowd of objects, of an image.

    Args:
        id: Annotation id of the file.
        category: Category name, for example ``"dog"``.
        box: Half-open xyxy in pixels of the image, clipped to it, at least a fraction of a pixel wide and high.
        polygons: Rings as flat ``(x0, y0, x1, y1, ...)`` in pixels, or None when the object has a box only.
        rle: COCO run-length encoding, or None.
        iscrowd: True when the annotation covers a group whose members were not told apart.
        area: Area of the object in px^2, the box's where the file gives none.
    """

    id: int
    category: str
    box: Box
    polygons: tuple[Ring, ...] | None = None
    rle: Mapping[str, Any] | None = None
    iscrowd: bool = False
    area: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAnnotations:
    """One image with everything that is known about it; objects and captions in the order of their ids.

    Args:
        path: Image file.
        image_id: Id of the image in its file.
        width: Width in pixels, the frame of every box and polygon.
        height: Height in pixels.
        objects: Objects and crowds.
        captions: Human captions of the whole image, each one sentence with a full stop; often empty.
    """

    path: Path
    image_id: int
    width: int
    height: int
    objects: tuple[ObjectAnnotation, ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoSource:
    """One instances file, the folder of its images, and optionally one file of captions.

    Args:
        instances: ``instances_*.json`` in COCO's format.
        images: Folder that ``file_name`` is relative to.
        captions: ``captions_*.json``, or None.
    """

    instances: Path
    images: Path
    captions: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CocoData:
    """What a list of sources holds, ordered by source and image id.

    Args:
        images: The usable images, those without any object included.
        skipped: Number of unusable records by the kind of fault.
    """

    images: tuple[ImageAnnotations, ...]
    skipped: Mapping[str, int]

    def report(self) -> str:
        """One line for the log: images, objects and captions, and every kind of record that was left out."""
        objects = sum(len(image.objects) for image in self.images)
        captions = sum(len(image.captions) for image in self.images)
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items())) or "nothing"
        return f"{len(self.images)} images, {objects} objects, {captions} captions; left out: {faults}"


def photo_sources(root: Path, split: str) -> list[CocoSource]:
    """Finds the sources of one split in a folder laid out as ``images/``, ``instances_<split>.json`` and so on.

    Args:
        root: Folder with ``instances_<split>.json`` and ``images/``; ``instances_<split>_small.json`` with
            ``images_small/`` and ``captions_<split>.json`` are taken when there.
        split: For example ``"train"`` or ``"dev"``.

    Raises:
        DataError: The split's instances file is not there.
    """
    root = Path(root)
    instances = root / f"instances_{split}.json"
    if not instances.is_file():
        raise DataError(
            f"expected COCO annotations at {instances}, found no such file; give the folder that holds them"
        )
    captions = root / f"captions_{split}.json"
    sources = [
        CocoSource(instances=instances, images=root / "images", captions=captions if captions.is_file() else None)
    ]
    small = root / f"instances_{split}_small.json"
    if small.is_file():
        sources.append(CocoSource(instances=small, images=root / "images_small"))
    return sources


def load_coco(sources: Iterable[CocoSource]) -> CocoData:
    """Reads the sources into one deterministic list: by source, then image id, then annotation id.

    Args:
        sources: Files to read, in the order their images shall have. An image id seen twice keeps its first source.

    Raises:
        DataError: A file is missing, is not JSON, or is not in COCO's format.
    """
    skipped: Counter[str] = Counter()
    images: list[ImageAnnotations] = []
    seen: set[int] = set()
    for source in sources:
        for image in _load_source(source, skipped):
            if image.image_id in seen:
                skipped["duplicate image"] += 1
            else:
                seen.add(image.image_id)
                images.append(image)
    return CocoData(images=tuple(images), skipped=dict(sorted(skipped.items())))


def normalise_caption(text: str) -> str:
    """Makes one human caption one sentence: spaces collapsed, first letter capital, one full stop at the end.

    Returns:
        The sentence, or ``""`` when nothing is left of it.
    """
    text = re.split(r"(?<=[a-z)\"][.!?])\s+(?=[A-Z])", " ".join(text.split()))[0].strip(" .,;:!\"'")
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _load_source(source: CocoSource, skipped: Counter[str]) -> list[ImageAnnotations]:
    content = _read(source.instances, ("images", "annotations", "categories"))
    try:
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source.instances}: expected categories with an id and a name, got {error!r}") from None

    frames: dict[int, tuple[Path, int, int]] = {}
    for record in content["images"]:
        try:
            image_id, width, height = int(record["id"]), int(record["width"]), int(record["height"])
            path = source.images / str(record["file_name"])
        except (KeyError, TypeError, ValueError):
            skipped["malformed image record"] += 1
            continue
        if width < 1 or height < 1:
            skipped["image without size"] += 1
        elif not path.is_file():
            skipped["image file missing"] += 1
        elif image_id in frames:
            skipped["duplicate image"] += 1
        else:
            frames[image_id] = (path, width, height)
    objects: dict[int, list[ObjectAnnotation]] = {image_id: [] for image_id in frames}
    ids: set[int] = set()
    for record in content["annotations"]:
        try:
            image_id, annotation_id = int(record["image_id"]), int(record["id"])
            x, y, w, h = (float(v) for v in record["bbox"])
            category = categories.get(int(record["category_id"]))
        except (KeyError, TypeError, ValueError):
            skipped["malformed annotation"] += 1
            continue
        if image_id not in frames:
            skipped["annotation of an absent image"] += 1
        elif category is None:
            skipped["unknown category"] += 1
        elif annotation_id in ids:
            skipped["duplicate annotation"] += 1
        elif not all(map(math.isfinite, (x, y, w, h))):
            skipped["box not finite"] += 1
        elif w <= 0 or h <= 0:
            skipped["box without size"] += 1
        else:
            _, width, height = frames[image_id]
            box = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
            if box[2] <= box[0] or box[3] <= box[1]:
                skipped["box outside the image"] += 1
                continue
            ids.add(annotation_id)
            polygons, rle = _shape(record.get("segmentation"), skipped)
            area = record.get("area")
            objects[image_id].append(
                ObjectAnnotation(
                    id=annotation_id,
                    category=category,
                    box=box,
                    polygons=polygons,
                    rle=rle,
                    iscrowd=bool(record.get("iscrowd", 0)),
                    area=float(area) if isinstance(area, int | float) and area > 0 else w * h,
                )
            )
    captions = _load_captions(source.captions, frames, skipped)
    return [
        ImageAnnotations(
            path=path,
            image_id=image_id,
            width=width,
            height=height,
            objects=tuple(sorted(objects[image_id], key=lambda o: o.id)),
            captions=tuple(captions.get(image_id, ())),
        )
        for image_id, (path, width, height) in sorted(frames.items())
    ]


def _shape(segmentation: Any, skipped: Counter[str]) -> tuple[tuple[Ring, ...] | None, Mapping[str, Any] | None]:
    """Splits COCO's one field into polygons or RLE; a bad ring is counted and the object keeps the rest, or its box."""
    if isinstance(segmentation, Mapping):
        return None, segmentation
    if not isinstance(segmentation, Sequence) or not segmentation:
        return None, None
    rings: list[Ring] = []
    for ring in segmentation:
        points = np.asarray(ring, dtype=object).ravel()
        try:
            values = points.astype(np.float64)
        except (TypeError, ValueError):
            values = np.zeros(0)
        if len(values) < 6 or len(values) % 2 or not np.isfinite(values).all():
            skipped["malformed polygon ring"] += 1
        else:
            rings.append(tuple(values.tolist()))
    return (tuple(rings) or None), None


def _load_captions(path: Path | None, images: Mapping[int, object], skipped: Counter[str]) -> dict[int, list[str]]:
    captions: dict[int, list[tuple[int, str]]] = {}
    for record in _read(path, ("annotations",))["annotations"] if path is not None else ():
        try:
            caption_id, image_id = int(record["id"]), int(record["image_id"])
            text = normalise_caption(str(record["caption"]))
        except (KeyError, TypeError, ValueError):
            skipped["malformed caption"] += 1
            continue
        if image_id not in images:
            skipped["caption of an absent image"] += 1
        elif not text:
            skipped["empty caption"] += 1
        else:
            captions.setdefault(image_id, []).append((caption_id, text))
    return {image_id: [text for _, text in sorted(found)] for image_id, found in captions.items()}


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"expected a COCO annotation file at {path}, got {error.strerror}; check the path") from None
    except ValueError as error:
        raise DataError(f"{path}: expected JSON in COCO's format, got {error}; fetch the file again") from None
    lacking = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise DataError(f"{path}: expected COCO's lists {', '.join(keys)}, found no {', '.join(lacking)}")
    return dict(content)

"""Annotated images as one list, of instances files, image folders and captions; what is left out is counted."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from regiongpt.data.instances import InstancesFile, read_captions
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectAnnotation:
    """One annotated object, or one crowd of objects, of an image."""

    id: int
    category: str
    box: Box  # half-open xyxy in pixels of the image, clipped to it
    polygons: tuple[tuple[float, ...], ...] | None = None  # flat rings (x0, y0, x1, y1, ...), None for a box or RLE
    iscrowd: bool = False  # a group whose members were not told apart


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAnnotations:
    """One image with its objects and captions (one sentence each), in the order of their ids."""

    path: Path
    image_id: int
    width: int
    height: int
    objects: tuple[ObjectAnnotation, ...] = ()
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoSource:
    """One instances file, the folder that its ``file_name`` are relative to, and optionally one file of captions."""

    instances: Path
    images: Path
    captions: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CocoData:
    """Usable images of a list of sources, by source and image id, and the number of unusable records by fault."""

    images: tuple[ImageAnnotations, ...]
    skipped: Mapping[str, int]

    def report(self) -> str:
        """One line for the log: images, objects and captions, and every kind of record that was left out."""
        objects = sum(len(image.objects) for image in self.images)
        captions = sum(len(image.captions) for image in self.images)
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items())) or "nothing"
        return f"{len(self.images)} images, {objects} objects, {captions} captions; left out: {faults}"


def photo_sources(root: Path, split: str) -> list[CocoSource]:
    """The sources of one split; DataError if the folder has no such split.

    These are ``instances_<split>.json`` with ``images/`` and, when there, ``captions_<split>.json`` and
    ``instances_<split>_small.json`` with ``images_small/``.
    """
    root = Path(root)
    instances, captions, small = (
        root / name for name in (f"instances_{split}.json", f"captions_{split}.json", f"instances_{split}_small.json")
    )
    if not instances.is_file():
        raise DataError(f"expected COCO annotations at {instances}, found none; give the folder that holds them")
    whole = CocoSource(instances=instances, images=root / "images", captions=captions if captions.is_file() else None)
    return [whole, *([CocoSource(instances=small, images=root / "images_small")] if small.is_file() else [])]


def load_coco(sources: Iterable[CocoSource]) -> CocoData:
    """Read the sources into one deterministic list: by source, then image id, then annotation id.

    An image id seen twice keeps its first source.

    Raises:
        DataError: A file is missing, is not JSON, or is not in COCO's format.
    """
    rejects = Rejects()
    images: list[ImageAnnotations] = []
    known: set[int] = set()
    for source in sources:
        file = InstancesFile(
            source.instances, rejects, shapes="both", folder=source.images, check="missing", crowds="keep", known=known
        )
        known.update(file.images.tolist())
        given = [source.captions] if source.captions is not None else []
        captions = {
            image: [sentence for _, text in found if (sentence := normalise_caption(text))]
            for image, found in read_captions(given, set(file.images.tolist()), rejects).items()
        }
        objects: list[list[ObjectAnnotation]] = [[] for _ in file.paths]
        columns = (file.ids, file.places, file.categories, file.boxes, file.crowd)
        for k, (number, place, category, box, crowd) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            objects[place].append(
                ObjectAnnotation(
                    id=number,
                    category=file.names[category],
                    box=tuple(box),
                    polygons=tuple(tuple(ring.ravel().tolist()) for ring in file.rings(k)) or None,
                    iscrowd=crowd,
                )
            )
        images += [
            ImageAnnotations(
                path=source.images / path,
                image_id=number,
                width=width,
                height=height,
                objects=tuple(objects[place]),
                captions=tuple(captions.get(number, ())),
            )
            for place, (path, number, width, height) in enumerate(
                zip(file.paths, file.images.tolist(), file.widths.tolist(), file.heights.tolist(), strict=True)
            )
        ]
    return CocoData(images=tuple(images), skipped=dict(sorted(rejects.counts.items())))


def normalise_caption(text: str) -> str:
    """A human caption as one sentence, or ``""``: spaces collapsed, first letter capital, one full stop at the end."""
    text = re.split(r"(?<=[a-z)\"][.!?])\s+(?=[A-Z])", " ".join(text.split()))[0].strip(" .,;:!\"'")
    return f"{text[0].upper()}{text[1:]}." if text else ""

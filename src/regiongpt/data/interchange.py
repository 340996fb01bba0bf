"""Records and regions to and from what other tools read and write.

COCO json is written here and read by the converter ``coco``; Label Studio, LabelMe and CVAT export it too. The
``Detections`` of supervision are read as records. Masks come and go as PNG or RLE.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.errors import DataError
from regiongpt.regions import Region
from regiongpt.storage import write_file

__all__ = [
    "mask_png",
    "mask_rle",
    "read_label_png",
    "read_mask_png",
    "record_of_detections",
    "regions_of_detections",
    "write_coco",
]

UNNAMED = "region"
"""The category of a region without one: a COCO annotation must have one."""


# ---------------------------------------------------------------------------------------------------------------------
# COCO json


def write_coco(records: Iterable[Record], path: str | Path) -> dict[str, int]:
    """Writes the regions of records as COCO instances json, which pycocotools and the converter ``coco`` read.

    Boxes and polygons stay what they are; every other region becomes RLE. Several records of one image share its entry,
    and a region that they share (same id in the source, same outline and category) is written once. What is said of a
    region has no place in the format and is left out. Annotations are written as they come, so memory stays small.

    Args:
        records: Those without an image are passed over.
        path: Of the json; appears when it is whole.

    Returns:
        How many ``images``, ``annotations`` and ``categories`` were written.

    Raises:
        DataError: The file cannot be written.
        RegionError: A region makes no sense in its image.
    """
    images: dict[str, dict[str, Any]] = {}
    categories: dict[str, int] = {}
    written: set[tuple[int, str, str, str]] = set()

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write('{"annotations": [')
            for record in records:
                if not record.image:
                    continue
                entry = {"file_name": record.image, "width": record.width, "height": record.height}
                image = images.setdefault(record.image, {"id": len(images) + 1, **entry})
                for each in record.regions:
                    category = categories.setdefault(each.category or UNNAMED, len(categories) + 1)
                    drawn = each.region.to_coco(record.width, record.height)
                    key = (image["id"], each.source_id, each.category, json.dumps(drawn))
                    if key in written:
                        continue
                    head = {"id": len(written) + 1, "image_id": image["id"], "category_id": category, "iscrowd": 0}
                    file.write("," * bool(written) + "\n" + json.dumps(head | drawn))
                    written.add(key)
            listed = [{"id": number, "name": name} for name, number in categories.items()]
            rest = {"images": list(images.values()), "categories": listed}
            file.write(f"\n], {json.dumps(rest, ensure_ascii=False)[1:]}\n")

    write_file(path, write)
    return {"images": len(images), "annotations": len(written), "categories": len(categories)}


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def mask_rle(region: Region, width: int, height: int) -> dict[str, Any]:
    """Any region as COCO's RLE, ``{"size": [H, W], "counts": "..."}``; :meth:`Region.rle` is the way back.

    Args:
        region: To encode; of one that is no mask, the pixels whose centre is in it.
        width: Of the image in pixels.
        height: Of the image in pixels.

    Raises:
        RegionError: It makes no sense in the image.
    """
    coded = coco_mask.encode(np.asfortranarray(region.to_mask(width, height), dtype=np.uint8))
    return {"size": [height, width], "counts": coded["counts"].decode("ascii")}


def mask_png(region: Region, width: int, height: int) -> bytes:
    """Any region as a PNG file of 8-bit grey, 255 inside and 0 outside; :func:`read_mask_png` is the way back.

    Args:
        region: To draw; of one that is no mask, the pixels whose centre is in it.
        width: Of the image in pixels.
        height: Of the image in pixels.

    Raises:
        RegionError: It makes no sense in the image.
    """
    drawn = io.BytesIO()
    Image.fromarray(np.where(region.to_mask(width, height), 255, 0).astype(np.uint8)).save(drawn, "PNG")
    return drawn.getvalue()


def read_mask_png(source: str | Path | bytes) -> Region:
    """The region of a mask's PNG: every pixel that is not 0.

    Args:
        source: A file or its bytes, in black and white, grey or colours of a palette.

    Raises:
        DataError: It is no such image, or holds several masks.
    """
    labels = read_label_png(source)
    if len(labels) > 1:
        raise DataError(
            f"{_name(source)}: expected a mask of one value beside 0, got the values {sorted(labels)[:5]}; "
            "read it with read_label_png"
        )
    if not labels:
        raise DataError(f"{_name(source)}: expected a mask with at least one set pixel, got none")
    return next(iter(labels.values()))


def read_label_png(source: str | Path | bytes) -> dict[int, Region]:
    """The masks of a PNG in which each value but 0 marks another object.

    Args:
        source: A file or its bytes, in black and white, grey of 8 or 16 bits or colours of a palette.

    Raises:
        DataError: It is no such image.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            mode, values = image.mode, np.array(image)
    except Exception as error:  # decoders raise nearly every built-in exception on broken data
        raise DataError(f"{_name(source)}: expected a PNG of masks, got {error}; check the file") from None
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise DataError(f"{_name(source)}: expected one channel of grey or a palette, got mode {mode}; convert it")
    return {int(value): Region.mask(values == value) for value in np.unique(values) if value != 0}


def _name(source: str | Path | bytes) -> str:
    return "mask" if isinstance(source, bytes) else Path(source).name


# ---------------------------------------------------------------------------------------------------------------------
# supervision


def regions_of_detections(detections: Any, names: Mapping[int, str] | None = None) -> tuple[RecordRegion, ...]:
    """Each detection of a ``supervision.Detections`` as a region: its mask where it has one, else its box.

    Args:
        detections: With ``xyxy`` (N, 4), ``mask`` (N, H, W) or None, ``class_id`` (N,) or None, and ``data``, whose
            ``"class_name"`` is taken where it is there. A mask without a set pixel is none: supervision gives one to
            an object that has a box alone, where others have masks.
        names: Of the classes by id, for detections without names.

    Raises:
        DataError: It is no such object, or a class has no name.
    """
    try:
        boxes = np.asarray(detections.xyxy, dtype=np.float64).reshape(-1, 4)
        masks, classes = detections.mask, detections.class_id
        given = detections.data.get("class_name")
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"expected a supervision.Detections, got {type(detections).__name__} ({error})") from None
    regions: list[RecordRegion] = []
    for number, box in enumerate(boxes.tolist()):
        mask = None if masks is None else np.asarray(masks[number])
        region = Region.box(*box) if mask is None or not mask.any() else Region.mask(mask)
        if given is not None:
            name = str(given[number])
        elif classes is None or names is None:
            name = ""
        elif int(classes[number]) in names:
            name = names[int(classes[number])]
        else:
            raise DataError(f"detection {number}: expected a class among {sorted(names)[:8]}, got {classes[number]}")
        regions.append(RecordRegion(region=region, category=name, source_id=str(number)))
    return tuple(regions)


def record_of_detections(
    detections: Any, image: str, width: int, height: int, names: Mapping[int, str] | None = None
) -> Record:
    """The detections of one image as a record that asks for the class of each.

    Args:
        detections: As for :func:`regions_of_detections`; each must have a name.
        image: Path of the image below the images' folder.
        width: Of the image in pixels.
        height: Of the image in pixels.
        names: Of the classes by id, for detections without names.

    Raises:
        DataError: A detection has no name, or there is none.
        RegionError: A box or mask makes no sense in the image.
    """
    regions = tuple(
        replace(each, region=_within(each.region, width, height, f"detection {number}"))
        for number, each in enumerate(regions_of_detections(detections, names))
    )
    record = Record(
        id=f"detections/{image}",
        source="detections",
        image=image,
        width=width,
        height=height,
        regions=regions,
        turns=tuple(_asked(regions)),
    )
    record.check()
    return record


def _within(region: Region, width: int, height: int, name: str) -> Region:
    """A box clipped to the image, as records have them; RegionError for a region that makes no sense there."""
    region.check(width, height, name)
    return Region.box(*region.bounds(width, height)) if region.kind == "box" else region


def _asked(regions: tuple[RecordRegion, ...]) -> Iterator[Turn]:
    for number, each in enumerate(regions, 1):
        if not each.category:
            raise DataError(f"detection {number - 1}: expected the name of its class, got none; pass names")
        yield Turn(task="classify", regions=(number,), answer=each.category)

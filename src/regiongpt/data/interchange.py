"""Regions and records to and from what other tools read and write: COCO json, masks as PNG or RLE, supervision."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.values import words_alone
from regiongpt.errors import DataError
from regiongpt.images import open_image
from regiongpt.regions import Region
from regiongpt.storage import write_file

UNNAMED = "region"
"""The category of a region without one: a COCO annotation must have one."""


def write_coco(records: Iterable[Record], path: str | Path) -> dict[str, int]:
    """Write the regions of records as COCO instances, which pycocotools and the source ``coco`` read.

    Boxes and polygons stay what they are; every other region becomes RLE. A region that several records of an image
    share is written once. Turns, and records without an image, are left out.

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
                    if key not in written:
                        head = {"id": len(written) + 1, "image_id": image["id"], "category_id": category, "iscrowd": 0}
                        file.write("," * bool(written) + "\n" + json.dumps(head | drawn))
                        written.add(key)
            listed = [{"id": number, "name": name} for name, number in categories.items()]
            rest = {"images": list(images.values()), "categories": listed}
            file.write(f"\n], {json.dumps(rest, ensure_ascii=False)[1:]}\n")

    write_file(path, write)
    return {"images": len(images), "annotations": len(written), "categories": len(categories)}


def mask_rle(region: Region, width: int, height: int) -> dict[str, Any]:
    """Any region as COCO's RLE, ``{"size": [H, W], "counts": "..."}``; :meth:`Region.rle` is the way back.

    Raises:
        RegionError: It makes no sense in an image of this width and height in pixels.
    """
    coded = coco_mask.encode(np.asfortranarray(region.to_mask(width, height), dtype=np.uint8))
    return {"size": [height, width], "counts": coded["counts"].decode("ascii")}


def mask_png(region: Region, width: int, height: int) -> bytes:
    """Any region as a PNG file of 8-bit grey, 255 inside and 0 outside; :func:`read_mask_png` is the way back.

    Raises:
        RegionError: It makes no sense in an image of this width and height in pixels.
    """
    drawn = io.BytesIO()
    Image.fromarray(np.where(region.to_mask(width, height), 255, 0).astype(np.uint8)).save(drawn, "PNG")
    return drawn.getvalue()


def read_mask_png(source: str | Path | bytes) -> Region:
    """The region of a mask's file or its bytes, by the rules of :meth:`Region.mask`.

    Raises:
        DataError: It is no image.
        RegionError: It is no mask of one object.
    """
    return Region.mask(open_image(source)[1])


def regions_of_detections(detections: Any, names: Mapping[int, str] | None = None) -> tuple[RecordRegion, ...]:
    """Each detection of a ``supervision.Detections`` as a region: its mask where that has a set pixel, else its box.

    Args:
        detections: With ``xyxy`` (N, 4), ``mask`` (N, H, W) or None, ``class_id`` (N,) or None, and ``data``, whose
            ``"class_name"`` is taken where it is there.
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
    for what, values in (("masks", masks), ("classes", classes), ("names", given)):
        if values is not None and len(values) != len(boxes):
            raise DataError(f"expected {len(boxes)} {what}, one a box, got {len(values)}")
    regions: list[RecordRegion] = []
    for number, box in enumerate(boxes.tolist()):
        mask = None if masks is None else np.asarray(masks[number])
        region = Region.box(*box) if mask is None or not mask.any() else Region.mask(mask)
        name = "" if given is None or given[number] is None else words_alone(str(given[number]))
        if given is None and classes is not None and names is not None:
            if int(classes[number]) not in names:
                raise DataError(f"detection {number}: expected a class of {sorted(names)[:8]}, got {classes[number]}")
            name = names[int(classes[number])]
        regions.append(RecordRegion(region=region, category=name, source_id=str(number)))
    return tuple(regions)


def record_of_detections(
    detections: Any, image: str, width: int, height: int, names: Mapping[int, str] | None = None
) -> Record:
    """The detections of one image as a record that asks for the class of each.

    Args:
        detections: As for :func:`regions_of_detections`; each must have a name.
        image: Path below the images' folder.
        width: Of the image in pixels, as is ``height``.
        height: See ``width``.
        names: Of the classes by id, for detections without names.

    Raises:
        DataError: A detection has no name, or there is none.
        RegionError: A box or mask makes no sense in the image.
    """
    regions, turns = [], []
    for number, each in enumerate(regions_of_detections(detections, names)):
        if not each.category:
            raise DataError(f"detection {number}: expected the name of its class, got none; pass names")
        region = each.region.check(width, height, f"detection {number}")
        if region.kind == "box":
            region = Region.box(*region.bounds(width, height))
        regions.append(RecordRegion(region=region, category=each.category, source_id=each.source_id))
        turns.append(Turn(task="classify", regions=(number + 1,), answer=each.category))
    record = Record(
        id=f"detections/{image}",
        source="detections",
        image=image,
        width=width,
        height=height,
        regions=tuple(regions),
        turns=tuple(turns),
    )
    record.check()
    return record

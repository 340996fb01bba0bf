"""What the tests of converters share."""

import json
from pathlib import Path

from PIL import Image

from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects, usable
from regiongpt.data.sources import Converter
from regiongpt.regions import Region

CATEGORIES = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 18, "name": "dog"}]


def record(name: str, *regions: Region | tuple[Region, str], image: str = "a.png", size: tuple[int, int] = (40, 20),
           turns: tuple[Turn, ...] | None = None, source: str = "test") -> Record:  # fmt: skip
    """A record of regions with their categories; by default, one turn that captions the image."""
    pairs = [each if isinstance(each, tuple) else (each, "") for each in regions]
    return Record(
        id=f"{source}/{name}",
        source=source,
        image=image,
        width=size[0] if image else 0,
        height=size[1] if image else 0,
        regions=tuple(RecordRegion(region=region, category=category) for region, category in pairs),
        turns=(Turn(task="image_caption", answer="A dog."),) if turns is None else turns,
    )


def run(made: Converter) -> tuple[list[Record], dict[str, int]]:
    """The records that a model can learn from, and how many were left out by kind."""
    rejects = Rejects()
    return list(usable(made.records(rejects), rejects, made.name)), dict(rejects.counts)


def annotation(number: object, box: object, image: object = 1, category: object = 18, **more: object) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, **more}


def write_coco(
    folder: Path, annotations: list, images: list | None = None, name: str = "instances.json", **more: object
) -> Path:
    """An instances file in COCO's layout, with its images, 40 x 20 pixels each."""
    (folder / "images").mkdir(exist_ok=True)
    for file in ("1.png", "2.png"):
        Image.new("RGB", (40, 20)).save(folder / "images" / file)
    if images is None:
        images = [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 20} for k in (2, 1)]
    content = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / name).write_text(json.dumps({**content, **more}))
    return folder / name

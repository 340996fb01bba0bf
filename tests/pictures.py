"""Pictures that are drawn for tests of training, with what is in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from regiongpt.data.coco import ImageAnnotations, ObjectAnnotation

TINY = {
    "model.image_size": 64,
    "model.image_grid": 2,
    "model.refinement_channels": 16,
    "model.vocab_size": 500,
    "model.hidden_size": 32,
    "model.layers": 1,
    "model.heads": 2,
    "model.mlp_size": 32,
    **{
        f"{step}.{name}": 8
        for step in ("language", "align", "stage1", "stage2")
        for name in ("batch_size", "micro_batch_size")
    },
}
"""nano's recipe at a size of seconds."""


def draw_pictures(root: Path, count: int, name: str) -> list[dict[str, Any]]:
    """Draws a red cat and a blue dog into each picture, as rectangles, and writes them down in COCO's format.

    Args:
        root: Gets a folder ``images``, and the instances.
        count: Number of pictures.
        name: Name of the instances file.

    Returns:
        The entries of the images.
    """
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        picture = Image.new("RGB", (96, 64), "white")
        draw = ImageDraw.Draw(picture)
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
        for kind, colour, left in ((17, "red", 4), (18, "blue", 52)):
            x, y, w, h = left + int(rng.integers(8)), int(rng.integers(4, 20)), int(rng.integers(16, 30)), 30
            draw.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": kind, **box})
        picture.save(root / "images" / f"{number}.png")
    categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    (root / name).write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return images


def annotated(*objects: tuple, width: int = 100, height: int = 100) -> ImageAnnotations:
    """Objects as (category, box[, more fields]) with ids from 1."""
    made = [
        ObjectAnnotation(id=k, category=each[0], box=tuple(map(float, each[1])), **(each[2] if len(each) > 2 else {}))
        for k, each in enumerate(objects, 1)
    ]
    return ImageAnnotations(path=Path("x.jpg"), image_id=1, width=width, height=height, objects=tuple(made))

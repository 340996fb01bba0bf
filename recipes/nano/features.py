"""The cache of tower features: every view of every image goes through the frozen tower once.

A view is the whole image or a random crop, every other one mirrored. Each is a row of a float16 file that training
maps into memory.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageOps
from recipe import FeatureConfig

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import View, colours_of
from regiongpt.environment import keep_freed_memory, progress
from regiongpt.errors import DataError
from regiongpt.images import load_image
from regiongpt.regions import Region
from regiongpt.storage import digest, read_json, reason, write_json, writing

log = logging.getLogger(__name__)


def plan_views(annotations: ImageAnnotations, index: int, config: FeatureConfig) -> list[View]:
    """The views of one image: the whole, then seeded crops, every other one mirrored.

    Args:
        annotations: The image and its objects.
        index: Position of the image among those of the cache.
        config: Number of views, the smallest crop, the seed.
    """
    views = [View(annotations)]
    width, height = annotations.width, annotations.height
    for number in range(1, config.views):
        rng = np.random.default_rng((config.seed, 17, index, number))
        shares = rng.uniform(config.min_crop, 1.0, 2)
        crop_width, crop_height = max(1, round(width * shares[0])), max(1, round(height * shares[1]))
        x0, y0 = int(rng.integers(0, width - crop_width + 1)), int(rng.integers(0, height - crop_height + 1))
        crop = (float(x0), float(y0), float(x0 + crop_width), float(y0 + crop_height))
        views.append(View(annotations, crop=crop, flip=number % 2 == 1))
    return views


def view_image(view: View, image: Image.Image) -> Image.Image:
    """The pixels of one view of an image."""
    x0, y0, x1, y1 = map(int, view.crop)
    cropped = image.crop((x0, y0, x1, y1))
    return ImageOps.mirror(cropped) if view.flip else cropped


@dataclass(frozen=True)
class FeatureStore:
    """Rows of tower features, one for each (image, view), and the colours of the objects.

    Attributes:
        features: float16, (images, views, C, h, w), mapped from disk.
        colours: For each image, the name of the dominant colour of each object whose colour is clear.
        places: For each image, its place among those of ``features``; None where they are the same.
        checksums: CRC-32 of each view of each image of ``features``; None where nothing is checked.
        blanks: Features (N, C, h, w) of images that show nothing.
        crops: Float16 features (C,) of each object's own crop, by ids of image and annotation; None where the model
            takes no second look.
    """

    features: np.ndarray
    colours: Sequence[dict[int, str]]
    places: Sequence[int] | None = None
    checksums: Sequence[Sequence[int]] | None = None
    blanks: torch.Tensor | None = None
    crops: Mapping[tuple[int, int], np.ndarray] | None = None

    def place(self, index: int) -> int:
        """Where an image stands among those of the cache, by which its crops are drawn."""
        return index if self.places is None else self.places[index]

    def row(self, index: int, view: int) -> torch.Tensor:
        """Features of one view, float32 (C, h, w); DataError if they are not what was written."""
        place = self.place(index)
        row = self.features[place, view]
        if self.checksums is not None and crc32(row.data) != self.checksums[place][view]:
            raise DataError(
                f"{getattr(self.features, 'filename', 'features')}: the features of image {place + 1} are damaged; "
                "delete the folder, and they are computed again"
            )
        return torch.from_numpy(row.astype(np.float32))

    def part(self, whole: Sequence[ImageAnnotations], images: Sequence[ImageAnnotations]) -> "FeatureStore":
        """The same rows for some of the images of the cache, which may have fewer objects there."""
        at = {image.path.resolve(): place for place, image in enumerate(whole)}
        lacking = [image.path for image in images if image.path.resolve() not in at]
        if lacking:
            raise DataError(
                f"{lacking[0]}: not among the images whose features are cached (features.root), nor are "
                f"{len(lacking) - 1} others; leave features.root out, or give the folder that holds them"
            )
        places = [at[image.path.resolve()] for image in images]
        colours = [self.colours[place] for place in places]
        return FeatureStore(self.features, colours, places, self.checksums, self.blanks, self.crops)


def build_features(
    folder: Path, images: Sequence[ImageAnnotations], model: Any, processor: Any, config: FeatureConfig
) -> FeatureStore:
    """Compute what is not yet computed, and open the cache.

    An interrupted run continues: images are counted in a side file once their rows are on the disk. A cache that was
    cut short is computed again; any other damage is found when a row is read.

    Args:
        folder: Folder of the cache.
        images: Annotated images, in their fixed order.
        model: RegionGPT, with the frozen tower.
        processor: Pads and normalises exactly as inference does.
        config: Views.

    Raises:
        DataError: An image cannot be read, the cache was made for other data or another tower, or it cannot be written.
    """
    views = {"views": config.views, "min_crop": config.min_crop}
    shape = (len(images), config.views, model.config.vision_config.hidden_size, *model.config.tower_grid)
    identity = json.dumps(
        [views, config.seed, shape, model.config.vision_config.to_dict(), [i.image_id for i in images]],
        sort_keys=True,
        default=str,
    )
    made_for = sha256(identity.encode()).hexdigest()
    side_file, path = folder / "progress.json", folder / "features.npy"
    state = _read_state(side_file, path, made_for)
    if state is None:
        state = {"digest": made_for, "done": 0, "colours": [], "checksums": []}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            side_file.unlink(missing_ok=True)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    colours, checksums = state["colours"], state["checksums"]
    keep_freed_memory()
    size = 2 * math.prod(shape[1:])
    begin = path.stat().st_size - len(images) * size
    # Written by calls that report a full disk; through a mapped file it would end the process.
    with writing(path), path.open("r+b") as file:
        for index in progress(range(state["done"], len(images)), "features", "images"):
            image = load_image(images[index].path)
            pixels = [processor.pixels_of(view_image(v, image)) for v in plan_views(images[index], index, config)]
            rows = [np.ascontiguousarray(model.encode_image(each)[0].to(torch.float16).numpy()) for each in pixels]
            file.seek(begin + index * size)
            file.writelines(row.data for row in rows)
            colours.append(colours_of(images[index], image))
            checksums.append([crc32(row.data) for row in rows])
            if (index + 1) % 100 == 0 or index + 1 == len(images):
                file.flush()
                os.fsync(file.fileno())
                write_json(side_file, {**state, "done": index + 1}, indent=None)
    named = [{int(k): v for k, v in each.items()} for each in colours]
    blanks = torch.cat([model.encode_image(processor.pixels_of(each)) for each in blank_images()])
    crops = build_crops(folder, images, model, processor) if model.config.region_crop else None
    return FeatureStore(np.load(path, mmap_mode="r"), named, checksums=checksums, blanks=blanks.float(), crops=crops)


def build_crops(
    folder: Path, images: Sequence[ImageAnnotations], model: Any, processor: Any
) -> Mapping[tuple[int, int], np.ndarray]:
    """Features of every object's own crop of the whole image, every other one mirrored; a run that stopped goes on."""
    objects = [[each for each in image.objects if not each.iscrowd] for image in images]
    ids = [(image.image_id, each.id) for image, own in zip(images, objects, strict=True) for each in own]
    width = model.config.crop_channels
    shape = (model.config.vision_config.to_dict(), model.config.crop_size, ids)
    path = folder / f"crops-{digest(json.loads(json.dumps(shape, default=str)))}.f16"
    done, place = path.stat().st_size // (2 * width) if path.exists() else 0, 0
    with writing(path), path.open("ab") as file:
        file.truncate(done * 2 * width)
        for image, own in zip(progress(images, "crops", "images", len(images)), objects, strict=True):
            new = own[max(0, done - place) :]
            if new:
                pixels = processor.crop_inputs(load_image(image.path), [Region.box(*each.box) for each in new])
                mirrored = [(place + len(own) - len(new) + k) % 2 == 1 for k in range(len(new))]
                pixels[mirrored] = pixels[mirrored].flip(-1)
                file.write(model.encode_crops(pixels[None])[0].to(torch.float16).numpy().tobytes())
            place += len(own)
    rows = np.memmap(path, np.float16, "r", shape=(len(ids), width)) if ids else ()
    return dict(zip(ids, rows, strict=True))


def blurred(features: torch.Tensor, blur: float, *of: int) -> torch.Tensor:
    """Features (C, ...) with each channel times 1 + ``blur`` x a normal number, drawn for ``of``.

    The tower's features of the training images are known so well after some epochs that certainty means less on others.
    """
    drawn = np.random.default_rng(of).standard_normal(len(features)).astype(np.float32)
    factors = torch.from_numpy(1 + blur * drawn)
    return features * factors.reshape(-1, *[1] * (features.dim() - 1))


def blank_images() -> list[Image.Image]:
    """Images that show nothing: one colour, or noise."""
    colours = ((0, 0, 0), (255, 255, 255), (127, 127, 127), (200, 30, 30), (30, 60, 200))
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    noise[1] = noise[1] // 4  # nearly dark
    return [*(Image.new("RGB", (128, 96), each) for each in colours), *(Image.fromarray(each) for each in noise)]


def _read_state(side_file: Path, path: Path, wanted: str) -> dict[str, Any] | None:
    """The side file of a cache that can be continued; None where there is none."""
    if not side_file.exists() or not path.exists():
        return None
    try:
        state = read_json(side_file)
        rows = np.load(path, mmap_mode="r")
        done, colours, made_for = state["done"], state["colours"], state["digest"]
        if not len(colours) == len(state["checksums"]) == done <= len(rows):
            raise ValueError(f"{done} images are not {len(colours)}")
    except (DataError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: damaged (%s); the features are computed again", side_file.parent, reason(error))
        return None
    if made_for != wanted:
        raise DataError(
            f"{side_file.parent}: features of another recipe, other data or another tower; delete the folder or give "
            "another --out"
        )
    return dict(state)

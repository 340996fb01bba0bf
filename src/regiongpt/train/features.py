"""The cache of frozen tower features: every view of every image goes through the tower once, and never again.

The tower is frozen in both stages (paper §4), so its output for a fixed set of views (the whole image, random crops,
some mirrored) can be computed beforehand. Each view is one row of a float16 file that training maps into memory.
"""

import ctypes
import json
import logging
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageOps

from regiongpt.console import progress
from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import View, colours_of
from regiongpt.errors import DataError
from regiongpt.images import load_image
from regiongpt.storage import read_json, reason, write_json, writing
from regiongpt.train.recipe import FeatureConfig

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTForConditionalGeneration, RegionGPTProcessor

log = logging.getLogger(__name__)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of giving it back: on a CPU the tower then runs twice as fast.

    Activations of tens of megabytes are otherwise mapped anew for every layer, and zeroing fresh pages costs more than
    the convolutions. Does nothing on other C libraries.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


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
    cropped = image.crop((int(view.crop[0]), int(view.crop[1]), int(view.crop[2]), int(view.crop[3])))
    return ImageOps.mirror(cropped) if view.flip else cropped


@dataclass(frozen=True)
class FeatureStore:
    """Rows of tower features, one for each (image, view), and the colours of the objects.

    Attributes:
        features: float16, (images, views, C, h, w), mapped from disk.
        colours: For each image, the name of the dominant colour of each object whose colour is clear.
        places: For each image, its place among those of ``features``; None where they are the same.
        checksums: CRC-32 of each view of each image of ``features``; None where nothing is checked.
    """

    features: np.ndarray
    colours: Sequence[dict[int, str]]
    places: Sequence[int] | None = None
    checksums: Sequence[Sequence[int]] | None = None

    def place(self, index: int) -> int:
        """Where an image stands among those of the cache, by which its crops are drawn."""
        return index if self.places is None else self.places[index]

    def row(self, index: int, view: int) -> torch.Tensor:
        """Features of one view: float32 (C, h, w).

        Raises:
            DataError: They are not what was written.
        """
        place = self.place(index)
        row = self.features[place, view]
        if self.checksums is not None and crc32(row.data) != self.checksums[place][view]:
            raise DataError(
                f"{getattr(self.features, 'filename', 'features')}: the features of image {place + 1} are damaged; "
                "delete the folder, and they are computed again"
            )
        return torch.from_numpy(row.astype(np.float32))

    def part(self, whole: Sequence[ImageAnnotations], images: Sequence[ImageAnnotations]) -> "FeatureStore":
        """The same rows for some of the images.

        Args:
            whole: The images of the cache.
            images: Some of them, perhaps with fewer objects.

        Raises:
            DataError: One of them is not in the cache.
        """
        at = {image.path.resolve(): place for place, image in enumerate(whole)}
        lacking = [image.path for image in images if image.path.resolve() not in at]
        if lacking:
            raise DataError(
                f"{lacking[0]}: expected a photograph of the folder whose features are cached (features.root), and so "
                f"{len(lacking) - 1} others; leave features.root out, or give the folder that holds them"
            )
        places = [at[image.path.resolve()] for image in images]
        return FeatureStore(self.features, [self.colours[place] for place in places], places, self.checksums)


@torch.no_grad()
def calibrate(
    model: "RegionGPTForConditionalGeneration",
    processor: "RegionGPTProcessor",
    photographs: Sequence[Path],
) -> None:
    """Measures, on some photographs, the mean and spread of what goes into the refinement and into the connector.

    The connector's output layer is scaled so that what it writes begins with the length of a word.

    Args:
        model: Its connector is changed in place, and so is an EfficientNet-Lite tower; another tower is left as it is.
        processor: Pads and normalises.
        photographs: Those to measure on.
    """
    pixels = [processor.pixels_of(load_image(each)) for each in photographs]
    if model.config.vision_config.model_type == "efficientnet_lite":
        tower = model.vision_tower
        _standardise(tower, [model.encode_image(each)[0, : len(tower.mean)].flatten(1).T for each in pixels])
    _calibrate_connector(model, [model.encode_image(each) for each in pixels])


def _calibrate_connector(model: "RegionGPTForConditionalGeneration", encoded: Sequence[torch.Tensor]) -> None:
    """By encoded images (1, C, h, w)."""
    pooled = [model.refinement.pool_image(model.refine(each))[0] for each in encoded]
    _standardise(model.connector, pooled)
    written = model.connector(torch.cat(pooled))
    words = cast(torch.Tensor, model.get_input_embeddings().weight)
    model.connector.linear_2.weight.mul_(words.norm(dim=-1).mean() / written.norm(dim=-1).mean())


def _standardise(module: Any, samples: Sequence[torch.Tensor]) -> None:
    """Sets the buffers ``mean`` and ``std`` of a module by samples (N, C) that they do not yet act on."""
    values = torch.cat(list(samples)).double()
    module.mean.copy_(values.mean(0))
    module.std.copy_(values.std(0).clamp_min(1e-3))


def build_features(
    folder: Path,
    images: Sequence[ImageAnnotations],
    model: "RegionGPTForConditionalGeneration",
    processor: "RegionGPTProcessor",
    config: FeatureConfig,
) -> FeatureStore:
    """Compute what is not yet computed, and open the cache.

    A run that was stopped goes on where it was: images are counted in a side file once their rows are on the disk. A
    cache that was cut short is computed again; any other damage is found when a row is read.

    Args:
        folder: Where the cache lies.
        images: Annotated images, in their fixed order.
        model: Holds the frozen tower.
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
    digest = sha256(identity.encode()).hexdigest()
    side_file, path = folder / "progress.json", folder / "features.npy"
    state = _read_state(side_file, path, digest)
    if state is None:
        state = {"digest": digest, "done": 0, "colours": [], "checksums": []}
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
            planned = plan_views(images[index], index, config)
            pixels = [processor.pixels_of(view_image(view, image)) for view in planned]
            rows = [model.encode_image(each)[0].to(torch.float16).numpy() for each in pixels]
            file.seek(begin + index * size)
            file.writelines(row.data for row in map(np.ascontiguousarray, rows))
            colours.append(colours_of(images[index], image))
            checksums.append([crc32(np.ascontiguousarray(row).data) for row in rows])
            if (index + 1) % 100 == 0 or index + 1 == len(images):
                file.flush()
                os.fsync(file.fileno())
                write_json(side_file, {**state, "done": index + 1}, indent=None)
    named = [{int(k): v for k, v in each.items()} for each in colours]
    return FeatureStore(np.load(path, mmap_mode="r"), named, checksums=checksums)


def _read_state(side_file: Path, path: Path, digest: str) -> dict[str, Any] | None:
    """What the side file says of a cache that can be gone on with; None where there is none."""
    if not side_file.exists() or not path.exists():
        return None
    try:
        state = read_json(side_file)
        rows = np.load(path, mmap_mode="r")
        done, colours, made_for = state["done"], state["colours"], state["digest"]
        if "checksums" not in state:  # of a release that had none
            state["checksums"] = [[crc32(row.data) for row in rows[index]] for index in range(done)]
        if not len(colours) == len(state["checksums"]) == done <= len(rows):
            raise ValueError(f"{done} images are not {len(colours)}")
    except (DataError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: damaged (%s); the features are computed again", side_file.parent, reason(error))
        return None
    if made_for != digest:
        raise DataError(
            f"{side_file.parent}: expected features of this data and tower, got those of another recipe; "
            "delete the folder or give another --out"
        )
    return dict(state)

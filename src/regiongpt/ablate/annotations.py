"""The annotations of a folder of photographs, cut down for an ablation; the photographs themselves are linked to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regiongpt.data.coco import photo_sources
from regiongpt.errors import DataError
from regiongpt.storage import read_json, write_json

_DONE = "made.json"


def prepare(root: Path, split: str, how: str, folder: Path) -> Path:
    """A folder laid out as ``root`` is, with fewer objects or images of one split.

    Args:
        root: Folder with ``instances_<split>.json`` and ``images/``.
        split: That is cut down; no other is there.
        how: ``"outlined"`` keeps the objects that have an outline; ``"25%"`` keeps that share of the images, drawn
            once, so that a larger share holds every smaller one.
        folder: Where the new folder is made.

    Returns:
        The new folder; one that was made before of the same files is used again.

    Raises:
        DataError: A file is missing or not in COCO's format, or nothing is left.
    """
    sources = photo_sources(root, split)
    out = folder / f"annotations-{how.replace('%', '-percent')}"
    stamps = [
        [str(each.instances.resolve()), each.instances.stat().st_size, each.instances.stat().st_mtime_ns]
        for each in sources
    ]
    done = out / _DONE
    if done.is_file() and read_json(done) == {"of": stamps}:
        return out
    out.mkdir(parents=True, exist_ok=True)
    left = 0
    for source in sources:
        content = _read(source.instances)
        kept = _outlined(content) if how == "outlined" else _share(content, int(how.removesuffix("%")))
        left += len(kept["annotations"])
        write_json(out / source.instances.name, kept)
        _link(out / source.images.name, source.images)
        if source.captions is not None:
            there = {image["id"] for image in kept["images"]}
            captions = _read(source.captions)
            captions["annotations"] = [each for each in captions["annotations"] if each["image_id"] in there]
            write_json(out / source.captions.name, captions)
    if not left:
        raise DataError(f"{root}: expected something left to learn from after keeping {how}, found nothing")
    write_json(done, {"of": stamps})
    return out


def _outlined(content: Mapping[str, Any]) -> dict[str, Any]:
    """Objects with polygons, and the images that have one."""
    kept = [each for each in content["annotations"] if each.get("segmentation") and not each.get("iscrowd")]
    there = {each["image_id"] for each in kept}
    return {**content, "annotations": kept, "images": [image for image in content["images"] if image["id"] in there]}


def _share(content: Mapping[str, Any], percent: int) -> dict[str, Any]:
    order = np.random.default_rng(0).permutation(len(content["images"]))
    images = [content["images"][k] for k in sorted(order[: max(1, round(len(order) * percent / 100))])]
    there = {image["id"] for image in images}
    kept = [each for each in content["annotations"] if each["image_id"] in there]
    return {**content, "annotations": kept, "images": images}


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise DataError(f"{path}: no lists of images and annotations, as COCO's files have them; check the path")
    return content


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve(), target_is_directory=True)

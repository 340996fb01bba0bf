"""Build the images and annotations that nano is trained on from COCO's public downloads, or check that they are there.

    python recipes/nano/get_data.py --out data/nano                     # downloads 0.25 GB, then 7,679 images (1.2 GB)
    python recipes/nano/get_data.py --out data/nano --coco /data/coco   # has annotations/, train2017/, val2017/
    python recipes/nano/get_data.py --check data/nano

`images.tsv` lists every image by its COCO id: the part it belongs to, its size here, a checksum of its objects'
classes, and a difference hash of its pixels, which survives another decoder or resampling filter. Run it again after
an interruption: images that are there are kept.
"""

import argparse
import csv
import hashlib
import json
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image

from regiongpt.environment import progress, progress_shown
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.storage import read_json, write_json, writing

LIST = Path(__file__).with_name("images.tsv")
COCO = "http://images.cocodataset.org"
ANNOTATIONS_MD5 = "f4bbac642086de4f52a3fdda2de5fa2c"
DIFFERENT = 10
"""Bits of 64 from which on two difference hashes are of different images."""


class Part(NamedTuple):
    """Files of one part of the data."""

    instances: str
    folder: str
    quality: int
    captions: str = ""


PARTS = {
    "train": Part("instances_train.json", "images", 85, "captions_train.json"),
    "dev": Part("instances_dev.json", "images", 85, "captions_dev.json"),
    "small": Part("instances_train_small.json", "images_small", 76),
}


class Listed(NamedTuple):
    """A row of the list."""

    id: int
    split: str
    part: str
    width: int
    height: int
    classes: str
    pixels: str

    @property
    def file_name(self) -> str:
        """As COCO names it."""
        return f"{self.id:012d}.jpg"


def read_list() -> list[Listed]:
    """The images of the three parts."""
    with LIST.open(newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        next(rows)
        return [Listed(int(i), split, part, int(w), int(h), *sums) for i, split, part, w, h, *sums in rows]


def checksum_of_classes(categories: Iterable[int]) -> str:
    """CRC-32 of the classes of an image's objects, in any order."""
    return f"{crc32(json.dumps(sorted(categories)).encode()):08x}"


def difference_hash(image: Image.Image) -> str:
    """64 bits, each whether a cell of an 8x9 grid is clearly brighter than the one to its right."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return np.packbits(grey[:, :-1] > grey[:, 1:] + 2).tobytes().hex()


def get_image(listed: Listed, out: Path, source: str) -> None:
    """Fetch one image, resize it and write it, unless it is there."""
    part = PARTS[listed.part]
    path = out / part.folder / listed.file_name
    if path.exists():
        return
    image = Image.open(BytesIO(_read(f"{source}/{listed.split}/{listed.file_name}"))).convert("RGB")
    small = image.resize((listed.width, listed.height), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        small.save(path.with_suffix(".part"), "JPEG", quality=part.quality)
        path.with_suffix(".part").replace(path)


def _read(url: str, tries: int = 4) -> bytes:
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return bytes(answer.read())
        except OSError as error:
            if attempt + 1 == tries or getattr(error, "code", 500) in (403, 404):
                raise DataError(f"{url}: {error}; run the command again to go on") from error
            time.sleep(2**attempt)
    raise AssertionError


@contextmanager
def annotation_files(out: Path, coco: Path | None) -> Iterator[Any]:
    """A function that reads one of COCO's 2017 annotation files: of a folder, or of the archive, which is fetched."""
    if coco:
        yield lambda name: read_json(coco / "annotations" / name)
        return
    path = out / "annotations_trainval2017.zip"
    if not path.exists():
        with writing(path):
            path.with_suffix(".part").write_bytes(_read(f"{COCO}/annotations/{path.name}"))
            path.with_suffix(".part").replace(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != ANNOTATIONS_MD5:
        raise DataError(f"{path}: its MD5 is {found}, COCO's is {ANNOTATIONS_MD5}; delete it and run the command again")
    with zipfile.ZipFile(path) as archive:

        def read(name: str) -> Any:
            file: IO[bytes] = archive.open(f"annotations/{name}")
            with file:
                return json.load(file)

        yield read


def build(out: Path, coco: Path | None = None) -> None:
    """Write the annotations and the images of every part; DataError where something cannot be had."""
    rows = read_list()
    parts: dict[str, dict[int, Listed]] = {name: {} for name in PARTS}
    for row in rows:
        parts[row.part][row.id] = row
    instances: dict[str, dict[str, Any]] = {name: {"images": [], "annotations": []} for name in PARTS}
    captions: dict[str, dict[str, Any]] = {name: {"images": [], "annotations": []} for name in PARTS}
    out.mkdir(parents=True, exist_ok=True)
    with annotation_files(out, coco) as read:
        for split in sorted({row.split for row in rows}):
            for kind, into in (("instances", instances), ("captions", captions)):
                found = read(f"{kind}_{split}.json")
                for name, listed in parts.items():
                    own = {i: each for i, each in listed.items() if each.split == split}
                    sizes = {
                        each["id"]: (each["width"], each["height"]) for each in found["images"] if each["id"] in own
                    }
                    into[name]["images"] += [_image(own[i], *size) for i, size in sizes.items()]
                    for each in found["annotations"]:
                        if image := own.get(each["image_id"]):
                            scaled = _scaled(each, image, *sizes[image.id]) if kind == "instances" else each
                            into[name]["annotations"].append(scaled)
                    if kind == "instances":
                        into[name]["categories"] = found["categories"]
    for name, part in PARTS.items():
        write_json(out / part.instances, instances[name], indent=None)
        if part.captions:
            write_json(out / part.captions, captions[name], indent=None)
    source = coco.resolve().as_uri() if coco else COCO
    with ThreadPoolExecutor(16) as pool:
        done = pool.map(lambda row: get_image(row, out, source), rows)
        list(progress(done, "images", "images", len(rows)))


def _image(row: Listed, width: int, height: int) -> dict[str, Any]:
    sizes = {"width": row.width, "height": row.height, "coco_width": width, "coco_height": height}
    return {"id": row.id, "file_name": row.file_name, **sizes, "coco_split": row.split}


def _scaled(annotation: dict[str, Any], row: Listed, width: int, height: int) -> dict[str, Any]:
    """An object with its box at the image's size here; its outline too, for the images that nano has outlines of."""
    x, y = row.width / width, row.height / height
    scaled = {
        **{name: annotation[name] for name in ("id", "image_id", "category_id", "iscrowd")},
        "bbox": [round(value * by, 2) for value, by in zip(annotation["bbox"], (x, y, x, y), strict=True)],
        "area": round(annotation["area"] * x * y, 2),
    }
    outline = annotation["segmentation"]
    if row.part != "small" and row.split == "train2017" and isinstance(outline, list):
        scaled["segmentation"] = [
            [round(value * (y if place % 2 else x), 2) for place, value in enumerate(ring)] for ring in outline
        ]
    return scaled


def list_of(folder: Path) -> Iterator[Listed]:
    """The list as a folder of this layout has it."""
    for name, part in PARTS.items():
        found = read_json(folder / part.instances)
        classes: dict[int, list[int]] = {}
        for each in found["annotations"]:
            classes.setdefault(each["image_id"], []).append(each["category_id"])
        for each in found["images"]:
            with Image.open(folder / part.folder / each["file_name"]) as image:
                sums = checksum_of_classes(classes.get(each["id"], [])), difference_hash(image)
                yield Listed(each["id"], each["coco_split"], name, *image.size, *sums)


def check(folder: Path) -> list[str]:
    """What of a folder differs from the list, a line for each kind of difference with its first images."""
    wanted = {(row.part, row.id): row for row in read_list()}
    there = {(row.part, row.id): row for row in progress(list_of(folder), "checking", "images", len(wanted))}
    both = [(row, there[key]) for key, row in wanted.items() if key in there]
    different = {
        "images that are not there": [row for key, row in wanted.items() if key not in there],
        "images that are not in the list": [row for key, row in there.items() if key not in wanted],
        "images of another size": [row for row, got in both if row[3:5] != got[3:5]],
        "images with objects of other classes": [row for row, got in both if row.classes != got.classes],
        "images with other pixels": [
            row for row, got in both if (int(row.pixels, 16) ^ int(got.pixels, 16)).bit_count() >= DIFFERENT
        ],
    }
    return [
        f"{len(rows)} {what}: {', '.join(row.file_name for row in rows[:3])}"
        for what, rows in different.items()
        if rows
    ]


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("--out", type=Path, help="folder to build")
    folder.add_argument("--check", type=Path, help="folder to hold against the list")
    parser.add_argument("--coco", type=Path, help="folder of COCO 2017; downloaded where it is not given")
    options = parser.parse_args(words)
    try:
        with progress_shown():
            if options.out:
                build(options.out, options.coco)
            different = check(options.out or options.check)
    except RegionGPTError as error:
        print(f"get_data: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(different) or f"{options.out or options.check}: all {len(read_list()):,} images are as listed")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

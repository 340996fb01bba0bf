"""Convert annotation files of the real sizes and shapes, and read records at random.

    python benchmarks/conversion.py --out conversion.json

The files are made up, of the sizes of the real ones: COCO train2017 (118,287 images, 860,001 objects with polygons) and
Visual Genome (108,077 images, 5.4 million regions). Every step runs in a process of its own on ``--cores`` cores, so
its peak of memory is its own. Conversions check every image, which is a link to one of a few files. ``--scale 0.01``
makes everything a hundredth as large.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stamp import Progress, stamp

from regiongpt.storage import finite, write_json

COCO_IMAGES, COCO_OBJECTS, COCO_CROWDS = 118_287, 860_001, 10_000
VG_IMAGES, VG_REGIONS = 108_077, 5_408_689
WIDTH, HEIGHT = 640, 480
LINKS = 30_000  # links to one file; file systems allow about twice as many
WORDS = ("a", "the", "small", "red", "white", "dog", "man", "standing", "holding", "wooden", "table", "on", "near")


def make_images(folder: Path, names: Sequence[str]) -> None:
    """A photograph's worth of pixels under each name."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((WIDTH, HEIGHT))
    source = folder
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % LINKS:
            path.hardlink_to(source)
        else:
            picture.save(path, quality=80)
            source = path


def write_array(path: Path, head: str, entries: Iterator[Any], tail: str, progress: Progress) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(head)
        for number, entry in enumerate(entries):
            file.write((", " if number else "") + json.dumps(entry))
            progress.add()
        file.write(tail)


def make_coco(folder: Path, scale: float) -> dict[str, int]:
    """Instances and their images; outlines of 23 points, every tenth object in two parts, some crowds as RLE."""
    from regiongpt.prompts import COCO_80, COCO_IDS

    rng = np.random.default_rng(1)
    images, objects, crowds = (round(scale * count) for count in (COCO_IMAGES, COCO_OBJECTS, COCO_CROWDS))
    names = [f"{number:012d}.jpg" for number in range(1, images + 1)]
    make_images(folder / "images", names)
    listed = [
        {
            "license": 3,
            "file_name": name,
            "coco_url": f"http://images.cocodataset.org/train2017/{name}",
            "height": HEIGHT,
            "width": WIDTH,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": f"http://farm9.staticflickr.com/8186/{name}",
            "id": number,
        }
        for number, name in enumerate(names, 1)
    ]
    categories = [{"supercategory": "", "id": k, "name": n} for k, n in zip(COCO_IDS, COCO_80, strict=True)]

    def annotations() -> Iterator[dict[str, Any]]:
        angles = np.linspace(0, 2 * np.pi, 23, endpoint=False)
        for number in range(objects):
            x, y = rng.uniform(60, WIDTH - 60), rng.uniform(60, HEIGHT - 60)
            rings = []
            for part in range(1 + (number % 10 == 0)):
                radius = rng.uniform(10, 28, 23)
                outline = np.column_stack((x + 20 * part + radius * np.cos(angles), y + radius * np.sin(angles)))
                rings.append(outline.round(2).ravel().tolist())
            crowd = number < crowds
            # A run a column of pixels, as crowds of people have.
            rle = {"counts": [WIDTH * HEIGHT // 2 - 5000, *[100, 100] * 50], "size": [HEIGHT, WIDTH]}
            rle["counts"].append(WIDTH * HEIGHT - sum(rle["counts"]))
            points = np.concatenate([np.reshape(ring, (-1, 2)) for ring in rings])
            (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
            yield {
                "segmentation": rle if crowd else rings,
                "area": round(float((x1 - x0) * (y1 - y0)), 4),
                "iscrowd": int(crowd),
                "image_id": int(rng.integers(1, images + 1)),
                "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "category_id": COCO_IDS[int(rng.integers(80))],
                "id": number + 1,
            }

    head = f'{{"info": {{}}, "licenses": [], "images": {json.dumps(listed)}, "annotations": ['
    tail = f'], "categories": {json.dumps(categories)}}}'
    write_array(folder / "instances.json", head, annotations(), tail, Progress("COCO", objects, "objects"))
    return {"images": images, "objects": objects, "bytes": (folder / "instances.json").stat().st_size}


def make_vg(folder: Path, scale: float) -> dict[str, int]:
    """``region_descriptions.json`` and ``image_data.json`` with the images."""
    rng = np.random.default_rng(2)
    images, regions = round(scale * VG_IMAGES), round(scale * VG_REGIONS)
    make_images(folder / "images", [f"VG_100K/{number}.jpg" for number in range(1, images + 1)])
    url = "https://cs.stanford.edu/people/rak248/VG_100K"
    data = [
        {"width": WIDTH, "url": f"{url}/{number}.jpg", "height": HEIGHT, "image_id": number, "coco_id": None}
        for number in range(1, images + 1)
    ]
    (folder / "image_data.json").write_text(json.dumps(data))
    bounds = np.linspace(0, regions, images + 1).astype(int).tolist()

    def described() -> Iterator[dict[str, Any]]:
        for image in range(1, images + 1):
            count = bounds[image] - bounds[image - 1]
            x, y = rng.integers(0, WIDTH - 40, count).tolist(), rng.integers(0, HEIGHT - 40, count).tolist()
            words = rng.integers(0, len(WORDS), (count, 5)).tolist()
            yield {
                "regions": [
                    {
                        "region_id": bounds[image - 1] + k + 1,
                        "width": 40,
                        "height": 30,
                        "image_id": image,
                        "phrase": " ".join(WORDS[word] for word in words[k]),
                        "y": y[k],
                        "x": x[k],
                    }
                    for k in range(count)
                ],
                "id": image,
            }

    path = folder / "region_descriptions.json"
    write_array(path, "[", described(), "]", Progress("Visual Genome", images, "images"))
    return {"images": images, "regions": regions, "bytes": path.stat().st_size}


def convert(source: str, out: Path, **given: Any) -> dict[str, Any]:
    from regiongpt.data import sources

    manifest = sources.convert(sources.load_converter(source)(**given), out)
    return {"counts": manifest.counts, "rejects": manifest.rejects}


def load_coco(folder: Path) -> dict[str, Any]:
    from pycocotools.coco import COCO

    return {"objects": len(COCO(str(folder / "instances.json")).anns)}


def read_at_random(folder: Path, reads: int) -> dict[str, Any]:
    """Milliseconds to read a record that no read before came near, after the shards have been opened once."""
    from regiongpt.data.shards import RecordSet

    began = time.perf_counter()
    records = RecordSet(folder)
    opened = time.perf_counter() - began
    taken = []
    for index in np.random.default_rng(3).integers(0, len(records), reads).tolist():
        began = time.perf_counter()
        records[index]
        taken.append(1000 * (time.perf_counter() - began))
    return {
        "records": len(records),
        "first_open_seconds": opened,
        "milliseconds": {
            "mean": statistics.fmean(taken),
            "median": statistics.median(taken),
            "p99": float(np.quantile(taken, 0.99)),
        },
    }


def steps(work: Path, scale: float, reads: int) -> dict[str, Callable[[], dict[str, Any]]]:
    coco, vg = work / "coco", work / "vg"
    instances: dict[str, Any] = {"images": coco / "images", "instances": (coco / "instances.json",)}
    described = {"regions": vg / "region_descriptions.json", "image_data": vg / "image_data.json"}
    return {
        "make_coco": lambda: make_coco(coco, scale),
        "pycocotools": lambda: load_coco(coco),
        "coco_box": lambda: convert("coco", coco / "box", **instances),
        "coco_mask": lambda: convert("coco", coco / "mask", shapes="mask", **instances),
        "read_box": lambda: read_at_random(coco / "box", reads),
        "read_mask": lambda: read_at_random(coco / "mask", reads),
        "make_vg": lambda: make_vg(vg, scale),
        "vg": lambda: convert("vg", vg / "records", images=vg / "images", **described),
        "read_vg": lambda: read_at_random(vg / "records", reads),
    }


def run_step(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One step in its own process: its seconds, its peak of memory and what it returned."""
    command = [sys.executable, __file__, "--step", name, "--work", str(work)]
    command += ["--scale", str(options.scale), "--reads", str(options.reads), "--cores", str(options.cores)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    began = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"seconds": seconds, "peak_gb": peak / 1e9, **result}


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'step':<12} {'seconds':>9} {'peak GB':>8}  what"]
    for name, figure in figures.items():
        shown = {key: value for key, value in figure.items() if key not in ("seconds", "peak_gb")}
        lines.append(f"{name:<12} {figure['seconds']:>9.1f} {figure['peak_gb']:>8.2f}  {json.dumps(shown)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the files, 1 for the real one (default: 1)")
    parser.add_argument("--cores", type=int, default=2, help="that each step may use (default: 2)")
    parser.add_argument("--reads", type=int, default=2000, help="records read at random (default: 2000)")
    parser.add_argument("--only", choices=["coco", "vg"], help="one of the two data sets")
    parser.add_argument("--work", type=Path, help="folder for the files, kept (default: a temporary one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.scale > 0 or options.cores < 1 or options.reads < 1:
        parser.error("expected --scale above 0, --cores and --reads of at least 1")
    if options.step:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        print(json.dumps(measure(steps(options.work, options.scale, options.reads)[options.step])))
        return 0
    work = options.work or Path(tempfile.mkdtemp(prefix="regiongpt-conversion-"))
    figures: dict[str, dict[str, Any]] = {}
    try:
        for name in steps(work, options.scale, options.reads):
            of_vg = name.endswith("vg")
            if options.only and of_vg != (options.only == "vg"):
                continue
            if (made := name.startswith("make_")) and (work / name.removeprefix("make_")).exists():
                shutil.rmtree(work / name.removeprefix("make_"))
            print(f"{name} ...", file=sys.stderr, flush=True)
            figures[name] = run_step(name, options, work)
            if made:
                figures[name].pop("counts", None)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(table(figures))
    if options.out:
        write_json(options.out, finite({**stamp(vars(options), {}), "figures": figures}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Measure how far SpatialRGPT's sampled weights of regions are from exact areas, on the objects of a COCO file.

    python benchmarks/mask_weights.py --instances data/nano/instances_dev.json

Printed are medians by the object's size: the share of the weight that lies in other cells, altogether and against areas
on a grid over the whole image, which leaves the sampling alone; how far the centre moves, in cells; and the share of
objects that no sample hits, which SpatialRGPT gives no weight at all.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from regiongpt.evaluate.task import size_name
from regiongpt.images import SquareFrame
from regiongpt.model.processing import sampled_weights
from regiongpt.regions import Region

SIDE, SEEN, CELLS = 384, 378, 108  # of SigLIP so400m and its refined map
HEAD = "| objects | n | other cells | by sampling alone | centre moves (cells) | missed |\n|---|---|---|---|---|---|"


def moved(some: np.ndarray, others: np.ndarray) -> float:
    """Distance of the centres of two sets of weights, in cells."""
    places = np.indices(some.shape)
    centres = [(places * each).sum((1, 2)) / each.sum() for each in (some, others)]
    return float(np.linalg.norm(centres[0] - centres[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=Path, required=True, help="COCO instances")
    parser.add_argument("--limit", type=int, default=1000, help="objects, spread over the file")
    options = parser.parse_args()
    content = json.loads(options.instances.read_text())
    sizes = {each["id"]: (each["width"], each["height"]) for each in content["images"]}
    objects = [each for each in content["annotations"] if not each.get("iscrowd")]
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for each in objects[:: max(1, len(objects) // options.limit)]:
        width, height = sizes[each["image_id"]]
        x, y, w, h = each["bbox"]
        regions = {"box": Region.box(x, y, x + w, y + h, normalized=False)}
        if isinstance(each.get("segmentation"), list):
            regions["mask"] = Region.polygon(each["segmentation"])
        for kind, region in regions.items():
            sampled = sampled_weights(region.to_mask(width, height), SIDE, (CELLS, CELLS))
            exact, whole = (
                region.pool_weights(SquareFrame(width, height, True, seen), CELLS, CELLS) for seen in (SEEN / SIDE, 1.0)
            )
            apart = [float(np.abs(sampled - other).sum() / 2) for other in (exact, whole)]
            found = (*apart, moved(sampled, exact)) if sampled.any() else (np.nan,) * 3
            for size in (size_name(each["area"]), "all"):
                rows.setdefault((kind, size), []).append((*found, float(not sampled.any())))
    print(HEAD)
    for (kind, size), values in sorted(rows.items()):
        other, sampling, centre, _ = np.nanmedian(values, axis=0)
        missed = np.mean([each[3] for each in values])
        shown = f"{other:.1%} | {sampling:.1%} | {centre:.2f} | {missed:.2%}"
        print(f"| {kind}, {size} | {len(values)} | {shown} |")


if __name__ == "__main__":
    main()

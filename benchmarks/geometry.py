"""Time and memory of outlines that cross themselves and of long strokes, beside shapely drawing the same.

    python benchmarks/geometry.py --out geometry.json

Every case runs in a process of its own, so that peaks of memory are its own. ``error`` is the largest difference of a
cell's area, in cells of a 96 x 96 grid over the padded image. Where shapely would take minutes it is left out.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import shapely
from stamp import stamp

from regiongpt.images import SquareFrame
from regiongpt.regions import Region
from regiongpt.storage import finite, write_json

WIDTH, HEIGHT, GRID = 1000, 800, 96
CASES = [("ring", 30), ("ring", 100), ("ring", 200), ("ring", 3000), ("ring", 10_000),
         ("scribble", 100), ("scribble", 400), ("scribble", 3000), ("scribble", 10_000)]  # fmt: skip
MOST = {"ring": 200, "scribble": 400}
"""Points up to which shapely draws the same."""


def measure(kind: str, points: int) -> dict[str, float]:
    line = np.random.default_rng(points).random((points, 2)) * (WIDTH, HEIGHT)
    y_edges, x_edges = SquareFrame(WIDTH, HEIGHT).edges(GRID, GRID)
    make = Region.polygon if kind == "ring" else Region.scribble
    make(line[:3]).pool_weights(SquareFrame(WIDTH, HEIGHT), GRID, GRID)  # what is imported and set up once
    region, before, began = make(line), peak(), time.process_time()
    areas = region.coverage(y_edges, x_edges, WIDTH, HEIGHT)
    found = {"seconds": time.process_time() - began, "megabytes": peak() - before}
    if points <= MOST[kind]:
        began = time.process_time()
        if kind == "ring":
            drawn = shapely.make_valid(shapely.Polygon(line))
        else:
            drawn = shapely.LineString(line).buffer(0.015 * WIDTH / 2, quad_segs=32)
        drawn = shapely.intersection(drawn, shapely.box(0, 0, WIDTH, HEIGHT), grid_size=2.0**-20)
        left, top = np.meshgrid(x_edges[:-1], y_edges[:-1])
        right, bottom = np.meshgrid(x_edges[1:], y_edges[1:])
        took = time.process_time() - began
        cells = shapely.area(shapely.intersection(shapely.box(left, top, right, bottom), drawn))
        error = float(np.abs(areas - cells).max() / (WIDTH / GRID) ** 2)
        found |= {"shapely_seconds": took, "ratio": took / found["seconds"], "error": error}
    return found


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "POINTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], int(options.case[1]))))
        return
    print("case             points   CPU s      MB   shapely s   ratio     error")
    rows = []
    for kind, points in CASES:
        command = [sys.executable, __file__, "--case", kind, str(points)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"case": kind, "points": points, **found})
        more = [found.get(name, math.nan) for name in ("shapely_seconds", "ratio", "error")]
        print(f"{kind:12s} {points:10,d} {found['seconds']:7.3f} {found['megabytes']:7.0f}", end="")
        print(f" {more[0]:11.2f} {more[1]:7.1f} {more[2]:9.1e}", flush=True)
    if options.out:
        write_json(options.out, finite({"results": rows, **stamp({}, {})}))


if __name__ == "__main__":
    main()

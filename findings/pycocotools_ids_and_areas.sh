#!/usr/bin/env bash
# pycocotools 2.0.11, COCOeval, two surprises. Expected: the same numbers whatever an annotation's id is, and whether or
# not a result that has a mask states its box as well. Seen:
# 1. an annotation of id 0, as tools that number from zero write it, is never found: the matches are kept as ids, and 0
#    stands for "none". The exact box counts as a false positive, and the precision of that object is 0.
# 2. a mask's result that also has a bbox is measured by its box's area, so a thin slanted object moves from small to
#    large, and its false positives leave the precision of small objects.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pycocotools==2.0.11 numpy==2.4.6 2>/dev/null
cd "$work"
venv/bin/python - <<'PY'
import contextlib
import io
from importlib.metadata import version

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def precision(objects, results, kind, statistic):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        image = {"id": 1, "width": 200, "height": 200}
        truth.dataset = {"images": [image], "categories": [{"id": 1, "name": "stick"}], "annotations": objects}
        truth.createIndex()
        found = COCOeval(truth, truth.loadRes(results), kind)
        found.evaluate()
        found.accumulate()
        found.summarize()
    return round(float(found.stats[statistic]), 3)


print("pycocotools", version("pycocotools"))
common = {"image_id": 1, "category_id": 1}
box = {"bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
result = {**common, "bbox": box["bbox"], "score": 0.9}
by_id = [precision([{**common, **box, "id": number}], [result], "bbox", 0) for number in (0, 1)]
print("average precision of one exact box, by the id of its annotation: id 0", by_id[0], "id 1", by_id[1])
assert by_id == [0.0, 1.0]

square, stick = np.zeros((2, 200, 200), np.uint8)
square[10:30, 10:30] = 1
for step in range(100):
    stick[50 + step, 50 + step : 55 + step] = 1
square, stick = (coco_mask.encode(np.asfortranarray(mask)) for mask in (square, stick))
pixels = [int(coco_mask.area(mask)) for mask in (square, stick)]
print("square and stick have", *pixels, "pixels; the stick's box is", coco_mask.toBbox(stick).tolist())
objects = [{**common, **box, "id": 1, "segmentation": square}]
masks = [{**common, "segmentation": square, "score": 0.8}, {**common, "segmentation": stick, "score": 0.9}]
boxed = [{**row, "bbox": coco_mask.toBbox(row["segmentation"]).tolist()} for row in masks]
small = [precision(objects, rows, "segm", 3) for rows in (masks, boxed)]
print("segm average precision of small objects: masks alone", small[0], "the same masks with their boxes", small[1])
assert small == [0.5, 1.0]
PY

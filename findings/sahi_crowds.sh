#!/usr/bin/env bash
# sahi 0.12.8, which cuts COCO data sets into slices: a crowd (iscrowd 1, with a run-length mask, as COCO has them) is
# loaded as one ordinary object. Its iscrowd becomes 0, its mask is dropped with a warning, and its area is that of its
# box. What is sliced or written again trains a class on a box of many things, and an evaluation on it counts the crowd
# as one more object to be found, where pycocotools would have left it out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet sahi==0.12.8 pycocotools==2.0.11 numpy==2.4.6 2>/dev/null
cd "$work"
venv/bin/python - 2>/dev/null <<'PY'
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from sahi.utils.coco import Coco

pixels = np.zeros((60, 60), np.uint8, order="F")
pixels[10:30:2, 10:30] = 1
counts = coco_mask.encode(pixels)["counts"].decode()
crowd = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 19], "area": 200, "iscrowd": 1}
document = {
    "images": [{"id": 1, "file_name": "one.jpg", "width": 60, "height": 60}],
    "categories": [{"id": 1, "name": "person"}],
    "annotations": [{**crowd, "segmentation": {"size": [60, 60], "counts": counts}}],
}
Path("in.json").write_text(json.dumps(document))
(found,) = Coco.from_coco_dict_or_path("in.json").json["annotations"]
print("sahi", version("sahi"), "iscrowd", found["iscrowd"], "area", found["area"], "mask", found["segmentation"])
assert (found["iscrowd"], found["area"], found["segmentation"]) == (0, 380, [])
PY

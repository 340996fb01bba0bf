#!/usr/bin/env bash
# supervision 0.31.2 and COCO json, three surprises:
# 1. an object that has only a box, among objects with polygons, is loaded with a sound box and an all-False mask
#    (area 0), so "use the mask where there is one" loses it;
# 2. one object of two pieces, or with a hole, is exported with iscrowd 1, which evaluation and training tools skip;
# 3. the exported box of that mask is one pixel short on each axis (x1 and y1 are the last pixels inside), while its
#    area counts every pixel.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet supervision==0.31.2 2>/dev/null
cd "$work"
venv/bin/python -W ignore - <<'PY'
import json
from pathlib import Path

import numpy as np
import supervision as sv
from PIL import Image

print("supervision", sv.__version__)
Path("img").mkdir()
Image.new("RGB", (100, 80)).save("img/one.jpg")
thing = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400}
square = [[40, 20, 60, 20, 60, 40, 40, 40]]
document = {
    "images": [{"id": 1, "file_name": "one.jpg", "width": 100, "height": 80}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [
        {**thing, "id": 1, "bbox": [10, 10, 20, 20], "segmentation": []},
        {**thing, "id": 2, "bbox": [40, 20, 20, 20], "segmentation": square},
    ],
}
Path("in.json").write_text(json.dumps(document))
_, _, found = next(iter(sv.DetectionDataset.from_coco("img", "in.json")))
print("boxes", found.xyxy.tolist(), "pixels in the masks", found.mask.sum((1, 2)).tolist())
assert found.xyxy[0].tolist() == [10, 10, 30, 30] and not found.mask[0].any() and found.mask[1].any()

two, hole = np.zeros((2, 80, 100), bool)
two[10:30, 10:30] = two[50:60, 50:60] = True
hole[10:50, 10:50] = True
hole[20:40, 20:40] = False
for name, mask in (("two pieces", two), ("a hole", hole)):
    object_ = sv.Detections(xyxy=sv.mask_to_xyxy(mask[None]), mask=mask[None], class_id=np.array([0]))
    data = sv.DetectionDataset(classes=["cat"], images=["img/one.jpg"], annotations={"img/one.jpg": object_})
    data.as_coco(annotations_path="out.json")
    row = json.loads(Path("out.json").read_text())["annotations"][0]
    ys, xs = np.nonzero(mask)
    width = int(xs.max() - xs.min() + 1)
    print(name, "-> iscrowd", row["iscrowd"], "bbox", row["bbox"], "area", row["area"], "mask is", width, "wide")
    assert row["iscrowd"] == 1 and row["bbox"][2] == width - 1 and row["area"] == mask.sum()
PY

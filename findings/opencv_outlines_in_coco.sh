#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93 and pycocotools 2.0.11: a mask outlined by findContours and stored as a COCO polygon is
# a smaller mask when pycocotools reads it. The outline goes through the centres of the mask's outer pixels, numbered
# from 0; Pillow 12.1.0, scikit-image 0.26.0 and OpenCV fill it up to and with those pixels and give the mask back, while
# COCO's coordinates are those of edges, so half a pixel is lost all around: a square of 100 pixels keeps 81, a strip two
# pixels wide 29 of 60. Thin objects suffer, and a ground truth in RLE beside predictions as polygons scores below 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93 pycocotools==2.0.11 scikit-image==0.26.0 \
    pillow==12.1.0 numpy==2.4.6 2>/dev/null
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import cv2
import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from skimage.draw import polygon2mask

print("opencv", cv2.__version__, "pycocotools", version("pycocotools"))
y, x = np.mgrid[:60, :60]
masks = {
    "square": (y >= 10) & (y < 20) & (x >= 10) & (x < 20),
    "strip": (y >= 10) & (y < 40) & (x >= 10) & (x < 12),
    "disk": (y - 30) ** 2 + (x - 30) ** 2 < 20**2,
}
kept = {}
for name, mask in masks.items():
    (outline,), _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = outline[:, 0].astype(float)
    coco = coco_mask.decode(coco_mask.frPyObjects([points.ravel().tolist()], *mask.shape))[..., 0].astype(bool)
    picture = Image.new("1", mask.shape[::-1])
    ImageDraw.Draw(picture).polygon([tuple(point) for point in points], fill=1)
    others = (np.asarray(picture), polygon2mask(mask.shape, points[:, ::-1]))
    opencv = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [outline], 1).astype(bool)
    assert all((filled == mask).all() for filled in (*others, opencv))
    kept[name] = int(mask.sum()), int(coco.sum())
    print(f"{name}: {kept[name][0]} pixels; as pycocotools reads the outline {kept[name][1]}; the others all")
assert kept == {"square": (100, 81), "strip": (60, 29), "disk": (1245, 1188)}, kept
PY

#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93 beside Pillow 12.1.0: a mask resized with INTER_NEAREST to a vision tower's input is
# not the mask that Pillow's NEAREST gives (INTER_NEAREST_EXACT does). From 640 to 384 pixels two columns in three show
# another source pixel, the one at the cell's left edge instead of the one at its centre. And it is not the rule
# floor(i * old / new) either, by which PyTorch's "nearest" goes: the step is the inverse of an inverse in floats, so from
# 500 to 336 pixels three columns, from 600 seven and from 333 to 518 twenty-six show the pixel before that. Region
# features pooled with masks that one code resized by OpenCV and another by Pillow or PyTorch differ for thin regions.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93 numpy==2.4.1 pillow==12.1.0 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import cv2
import numpy as np
from PIL import Image

seen = {}
for old, new in ((640, 384), (500, 336), (600, 336), (333, 518)):
    columns = np.arange(old, dtype=np.float32)[None]
    nearest, exact = (
        cv2.resize(columns, (new, 1), interpolation=how)[0] for how in (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT)
    )
    pillow = np.asarray(Image.fromarray(columns).resize((new, 1), Image.Resampling.NEAREST))[0]
    floor = np.arange(new) * old // new
    assert (exact == pillow).all()
    off = nearest - floor
    assert set(off) <= {-1.0, 0.0}
    seen[old, new] = int((nearest != pillow).sum()), int((off < 0).sum())
    print(f"opencv {cv2.__version__}: {old} -> {new}: {seen[old, new][0]} columns are not Pillow's,", end=" ")
    print(f"{seen[old, new][1]} are not floor(i * {old} / {new})")
assert seen == {(640, 384): (256, 0), (500, 336): (251, 3), (600, 336): (295, 7), (333, 518): (174, 26)}, seen
PY

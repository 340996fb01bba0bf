#!/usr/bin/env bash
# faster-coco-eval 1.8.0 beside pycocotools 2.0.11: objects whose `area` is missing, which pycocotools refuses with a
# KeyError, are evaluated as if their area were 0. The precision over all sizes is right, so nothing looks amiss, but
# every object counts as small: small objects get a precision, medium and large ones get -1, "there are none".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faster-coco-eval==1.8.0 pycocotools==2.0.11 numpy==2.4.6 2>/dev/null
cd "$work"
venv/bin/python - <<'PY'
import contextlib
import io
from importlib.metadata import version

import faster_coco_eval
import pycocotools.coco
from faster_coco_eval import COCOeval_faster
from pycocotools.cocoeval import COCOeval

box = [10, 10, 120, 120]
result = {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9}
whole = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0, "area": 14400}
bare = {name: value for name, value in whole.items() if name != "area"}


def precisions(reader, evaluator, object_):
    """Average precision over all sizes, and of small, medium and large objects."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = reader()
        image, category = {"id": 1, "width": 200, "height": 200}, {"id": 1, "name": "cat"}
        truth.dataset = {"images": [image], "categories": [category], "annotations": [dict(object_)]}
        truth.createIndex()
        found = evaluator(truth, truth.loadRes([dict(result)]), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    return [round(float(found.stats[k]), 3) for k in (0, 3, 4, 5)]


print("faster-coco-eval", version("faster-coco-eval"), "pycocotools", version("pycocotools"))
with_area, without = (precisions(faster_coco_eval.COCO, COCOeval_faster, each) for each in (whole, bare))
print("one large object, found exactly: all, small, medium, large")
print("with its area", with_area, "without", without)
assert with_area == precisions(pycocotools.coco.COCO, COCOeval, whole) == [1.0, -1.0, -1.0, 1.0]
assert without == [1.0, 1.0, -1.0, -1.0]
try:
    precisions(pycocotools.coco.COCO, COCOeval, bare)
except KeyError as error:
    print("pycocotools: KeyError", error)
else:
    raise SystemExit("pycocotools evaluates it too")
PY

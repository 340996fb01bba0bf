#!/usr/bin/env bash
# supervision 0.31.2, boxes read from the answers of Qwen2.5-VL and Qwen3-VL: two answers that hold a sound box are read
# as "no objects", without an error or a warning, so they count as misses of the model:
# 1. one object written as {...} instead of [{...}];
# 2. a sentence ahead of the list that has square brackets in it, such as "Region [1] is a cat"; without them, the same
#    sentence does no harm.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet supervision==0.31.2 2>/dev/null
"$work/venv/bin/python" -W ignore - <<'PY'
import warnings

import supervision as sv

warnings.simplefilter("error")
print("supervision", sv.__version__)
item = '{"bbox_2d": [10, 20, 50, 60], "label": "cat"}'
answers = {
    "a list": f"```json\n[{item}]\n```",
    "one object": f"```json\n{item}\n```",
    "a sentence, a list": f"Region 1 is a cat:\n```json\n[{item}]\n```",
    "a sentence with brackets, a list": f"Region [1] is a cat:\n```json\n[{item}]\n```",
}
sizes = {"qwen_2_5_vl": {"input_wh": (1000, 1000)}, "qwen_3_vl": {}}
for name, more in sizes.items():
    found = [len(sv.Detections.from_vlm(name, text, resolution_wh=(1000, 1000), **more)) for text in answers.values()]
    print(name, dict(zip(answers, found, strict=True)))
    assert found == [1, 0, 1, 0]
PY

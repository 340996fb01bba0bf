#!/usr/bin/env bash
# efficientnet-lite-pytorch 0.1.0: its convolutions promise TensorFlow's 'SAME' padding, but fix it when the model is made,
# by the size its variant was trained with (260 for lite2), and keep it for images of any other size. At 260 pixels all five
# strided layers pad as 'SAME' does; at 576 pixels three of them do not (one row and column more at the upper left), so the
# maps of strides 8, 16 and 32 are shifted. A region's features then come from elsewhere than a port that pads by the size of each
# map says, and the two towers' outputs differ though their weights are the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 efficientnet-lite-pytorch==0.1.0 numpy==2.4.1 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import math

import torch
from efficientnet_lite_pytorch import EfficientNet

model = EfficientNet.from_name("efficientnet-lite2").eval()
seen = {}


def check(conv, args):
    height = args[0].shape[-2]
    kernel, stride = conv.weight.shape[-1], conv.stride[0]
    total = max((math.ceil(height / stride) - 1) * stride + kernel - height, 0)
    pad = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    if stride == 2:
        seen[size].append((height, kernel, (pad[2], pad[3]), (total // 2, total - total // 2)))


for module in model.modules():
    if hasattr(module, "static_padding"):
        module.register_forward_pre_hook(check)
off = {}
for size in (260, 576):
    seen[size] = []
    with torch.no_grad():
        model.extract_features(torch.zeros(1, 3, size, size))
    off[size] = [(height, kernel) for height, kernel, padded, same in seen[size] if padded != same]
    for height, kernel, padded, same in seen[size]:
        print(f"image {size}: map {height}, kernel {kernel}, stride 2: padded {padded}, 'SAME' is {same}")
print({size: f"{len(off[size])} of {len(seen[size])} strided layers are not 'SAME'" for size in off})
assert {size: len(found) for size, found in off.items()} == {260: 0, 576: 3}, off
PY

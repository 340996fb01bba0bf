#!/usr/bin/env bash
# shapely 2.2.0: the buffer of one zigzag line of 3,000 points takes tens of times as long as the union of the buffers
# of its pieces of 16 points, though both cover the same area. A brush stroke of a person is such a line.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet shapely==2.2.0 numpy==2.4.6 2>/dev/null
cd "$work"
venv/bin/python - <<'PY'
import time

import numpy as np
import shapely

count = 3000
points = np.column_stack((np.linspace(0, 1000, count), 500 + 100 * (np.arange(count) % 2 * 2 - 1)))
begun = time.process_time()
whole = shapely.buffer(shapely.linestrings(points), 15)
one = time.process_time() - begun
begun = time.process_time()
pieces = [shapely.linestrings(points[k : k + 17]) for k in range(0, count - 1, 16)]
union = shapely.union_all(shapely.buffer(pieces, 15))
parts = time.process_time() - begun
print(f"shapely {shapely.__version__}, GEOS {shapely.geos_version_string}: whole {one:.2f} s, in pieces {parts:.2f} s,")
print(f"areas {whole.area:.1f} and {union.area:.1f}")
assert abs(whole.area - union.area) < 1e-3 * union.area
assert one > 10 * parts
PY

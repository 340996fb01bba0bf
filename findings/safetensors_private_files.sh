#!/usr/bin/env bash
# safetensors 0.8.0: save_file writes a file that only its owner can read (mode 600), whatever the umask; numpy's and
# torch's own writers follow the umask (644 under 022). A checkpoint saved into a shared folder cannot be read by
# colleagues or by a server that runs as another user.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6 2>/dev/null
cd "$work"
umask 022
venv/bin/python - <<'PY'
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

values = np.zeros(4, np.float32)
np.save("a.npy", values)
save_file({"a": values}, "a.safetensors")
modes = {name: oct(Path(name).stat().st_mode & 0o777) for name in ("a.npy", "a.safetensors")}
print("safetensors", safetensors.__version__, modes)
assert modes == {"a.npy": "0o644", "a.safetensors": "0o600"}
PY

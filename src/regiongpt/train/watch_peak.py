"""How fast a device multiplies matrices at best: what the utilisation is measured against."""

import time
from typing import Final

import torch

_SIDE: Final = {"cpu": 1024, "cuda": 8192, "mps": 4096}
_RUNS: Final = 3
_SECONDS: Final = 0.3
_MEASURED: dict[tuple[str, torch.dtype], float] = {}


def peak_flops(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations a second of one device: its maker's figure where it is known, else a product's rate.

    Args:
        device: Of the model.
        precision: In which it computes.
    """
    key = (str(device), precision)
    if key not in _MEASURED:
        _MEASURED[key] = matmul_rate(device, precision)
    return _MEASURED[key]


def matmul_rate(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, the best of a few measurements.

    Args:
        device: That multiplies.
        precision: Of the matrices.
    """
    side = _SIDE.get(device.type, 2048)
    left, right = (torch.ones(side, side, dtype=precision, device=device) for _ in range(2))
    best = 0.0
    for _ in range(_RUNS):
        _finish(device)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < _SECONDS / _RUNS:
            left @ right
            count += 1
            if device.type == "cuda" and count % 8 == 0:
                _finish(device)
        _finish(device)
        best = max(best, 2 * side**3 * count / (time.perf_counter() - began))
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

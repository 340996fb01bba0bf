"""Overlap of boxes, for referring expressions scored by intersection over union."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from regiongpt.evaluate.metrics.bootstrap import Floats, ratio

ENOUGH: Final = 0.5
"""Intersection over union from which a box counts as the object (paper §4.3)."""


def overlaps(box: Sequence[float], others: Sequence[Sequence[float]] | Floats) -> Floats:
    """Intersection over union of a box with each of n others.

    Args:
        box: xyxy in pixels.
        others: (n, 4) likewise.

    Returns:
        (n,) in [0, 1]; 0 for a box without area.
    """
    rest = np.asarray(others, np.float64).reshape(-1, 4)
    own = np.asarray(box, np.float64)
    sides = np.minimum(own[2:], rest[:, 2:]) - np.maximum(own[:2], rest[:, :2])
    shared = np.clip(sides, 0, None).prod(axis=1)
    areas = np.clip(rest[:, 2:] - rest[:, :2], 0, None).prod(axis=1)
    return np.nan_to_num(ratio(shared, areas + np.clip(own[2:] - own[:2], 0, None).prod() - shared))

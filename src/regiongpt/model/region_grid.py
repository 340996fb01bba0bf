"""Several embeddings a region: its pooling weights divided among the cells of a coarse grid over it.

Shapes: H and W rows and columns of the refined grid.
"""

import numpy as np
from numpy.typing import NDArray


def split_weights(weights_HW: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """Divides a region's weights among the cells of a coarse grid over the rows and columns that it touches.

    Args:
        weights_HW: (H, W), summing to 1.
        parts: Side of the coarse grid.

    Returns:
        (parts * parts, H, W), row by row, each summing to 1; the whole region's weights where it leaves a part empty.
    """
    overlaps = []
    for axis in (1, 0):
        touched = np.flatnonzero(weights_HW.any(axis=axis))
        edges = np.linspace(touched[0], touched[-1] + 1, parts + 1)
        cells = np.arange(weights_HW.shape[1 - axis])
        covered = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
        overlaps.append(covered.clip(0, 1))
    rows, columns = overlaps
    split = weights_HW * rows[:, None, :, None] * columns[None, :, None, :]
    split = split.reshape(parts * parts, *weights_HW.shape)
    sums = split.sum((1, 2), keepdims=True)
    split = np.where(sums > 0, split / np.where(sums > 0, sums, 1), weights_HW)
    return split.astype(np.float32)

"""From the tower's coarse grid to region features and image tokens.

Two deconvolutions refine the grid; a region is the weighted mean of the refined cells that it covers, and the image
tokens are an adaptive average of the same map. A bilinear upsampling U is linear, and so are both poolings, so they are
composed with it on the small grid and the upsampled map is never built: a region's weights W become U_h^T W U_w, and
the adaptive average P becomes P U.

Shapes: B batch, R regions, C channels, H rows and W columns of a grid, h and w those of the map before any bilinear
upsampling.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regiongpt.model.configuration import REFINEMENTS, RegionGPTConfig


class Deconvolution(nn.ConvTranspose2d):
    """A 2x2 deconvolution of stride 2, computed as the matrix product that it is.

    On a CPU this trains nearly twice as fast as the library's kernel for the general case.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Refine (B, C, H, W) to (B, C, 2H, 2W), channels last in memory."""
        batch, channels, rows, columns = input.shape
        weight = self.weight.permute(0, 2, 3, 1).reshape(channels, -1)
        cells = input.permute(0, 2, 3, 1).reshape(-1, channels) @ weight
        cells = cells.view(batch, rows, columns, 2, 2, -1).transpose(2, 3).reshape(batch, 2 * rows, 2 * columns, -1)
        return (cells + self.bias).permute(0, 3, 1, 2)  # type: ignore[operator, unused-ignore]


class Refinement(nn.Module):
    """Refine a tower's feature map, and pool regions and image tokens from it. Paper: §3.1; Tab. 6 for the variants."""

    def __init__(self, config: RegionGPTConfig) -> None:
        super().__init__()
        tower, channels = config.vision_config.hidden_size, config.feature_channels
        self.reduce = nn.Conv2d(tower, channels, 1) if config.refinement_channels else nn.Identity()
        self.deconvolves = config.refinement.startswith("deconv")
        if self.deconvolves:
            self.deconv_1 = Deconvolution(channels, channels, 2, stride=2)
            self.norm = nn.LayerNorm(channels)
            self.deconv_2 = Deconvolution(channels, channels, 2, stride=2)
        self.bilinear_scale = REFINEMENTS[config.refinement] // (4 if self.deconvolves else 1)
        self.image_grid = (config.image_grid[0], config.image_grid[1])

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Apply the learned part: (B, C, H, W) to the refined map, or to the map of which that is an upsampling."""
        x = self.reduce(features_BCHW.contiguous(memory_format=torch.channels_last))
        if self.deconvolves:
            x = self.deconv_1(x)
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = F.gelu(self.deconv_2(F.gelu(x)))
        return x  # type: ignore[no-any-return]

    def pool_regions(self, map_BChw: Tensor, weights_BRHW: Tensor) -> Tensor:
        """Average what ``forward`` returned over each region: (B, R, C). Paper: §3.1, mask pooling.

        Weights (B, R, H, W) on the refined grid sum to 1 for each region; rows of zeros give zeros.
        """
        if self.bilinear_scale > 1:
            up_Hh, up_Ww = (upsampling_matrix(n, self.bilinear_scale, map_BChw.device) for n in map_BChw.shape[-2:])
            weights_BRHW = up_Hh.T @ weights_BRHW.to(up_Hh.dtype) @ up_Ww
        return mask_pool(map_BChw, weights_BRHW)

    def pool_image(self, map_BChw: Tensor) -> Tensor:
        """Average what ``forward`` returned down to the image grid (H, W): (B, H * W, C). Paper: §3.1, AdaPool."""
        if self.bilinear_scale == 1:
            pooled = F.adaptive_avg_pool2d(map_BChw, self.image_grid)
            return pooled.flatten(2).transpose(1, 2)
        rows, columns = (
            _as_matrix(partial(F.adaptive_avg_pool1d, output_size=cells), n * self.bilinear_scale, map_BChw.device)
            @ upsampling_matrix(n, self.bilinear_scale, map_BChw.device)
            for n, cells in zip(map_BChw.shape[-2:], self.image_grid, strict=True)
        )
        pooled = rows.to(map_BChw.dtype) @ map_BChw @ columns.to(map_BChw.dtype).T
        return pooled.flatten(2).transpose(1, 2)


def mask_pool(map_BCHW: Tensor, weights_BRHW: Tensor) -> Tensor:
    """Average a map over regions given as weights on its grid, of any float dtype: (B, R, C) in the map's dtype."""
    return weights_BRHW.to(map_BCHW.dtype).flatten(2) @ map_BCHW.flatten(2).transpose(1, 2)


def split_weights(weights_HW: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """Divide a region's weights among the cells of a square grid over the rows and columns it touches.

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


def upsampling_matrix(cells: int, scale: int, device: torch.device | None = None) -> Tensor:
    """Bilinear upsampling of ``cells`` cells along one axis, as ``F.interpolate`` does it: (cells * scale, cells)."""
    return _as_matrix(lambda x: F.interpolate(x, scale_factor=scale, mode="linear", align_corners=False), cells, device)


def _as_matrix(linear: Callable[[Tensor], Tensor], cells: int, device: torch.device | None) -> Tensor:
    """Matrix of a linear map of a sequence, read off from what it does to the unit vectors."""
    return linear(torch.eye(cells, device=device, dtype=torch.float32)[None])[0].T

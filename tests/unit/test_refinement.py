"""Refinement and pooling against explicit maps and plain loops."""

import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.nn import functional as F

from regiongpt.model.configuration import REFINEMENTS
from regiongpt.model.modeling import Refinement, mask_pool


def make(refinement: str, **options: object) -> Refinement:
    torch.manual_seed(0)
    return Refinement(tiny_config(refinement=refinement, **options)).eval()


def test_mask_pool_on_a_hand_written_map() -> None:
    cells = torch.arange(16.0).reshape(1, 1, 4, 4)
    weights = torch.zeros(1, 3, 4, 4)
    weights[0, 0, 1, 2] = 1  # one cell
    weights[0, 1, 0, 0], weights[0, 1, 3, 3] = 0.75, 0.25  # two cells, unevenly
    assert mask_pool(cells, weights).flatten().tolist() == [6.0, 3.75, 0.0]


@pytest.mark.parametrize("grid", [[4, 4], [3, 5], [1, 1]])
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_pooling_equals_pooling_the_explicit_map(refinement: str, grid: list[int]) -> None:
    image_grid = [min(n, 4 * REFINEMENTS[refinement]) for n in grid]
    module = make(refinement, image_grid=image_grid)
    with torch.no_grad():
        small = module(torch.randn(2, 32, 4, 4))
        explicit = F.interpolate(small, scale_factor=module.bilinear_scale, mode="bilinear")
        side = 4 * REFINEMENTS[refinement]
        assert explicit.shape == (2, 32, side, side)
        weights = torch.rand(2, 3, side, side)
        weights[0, 0] = 0
        weights[0, 0, side - 1, 0] = 1  # a single cell, in a corner
        weights /= weights.sum((2, 3), keepdim=True)
        torch.testing.assert_close(module.pool_regions(small, weights), mask_pool(explicit, weights), rtol=0, atol=1e-5)
        expected = F.adaptive_avg_pool2d(explicit, image_grid).flatten(2).transpose(1, 2)
        torch.testing.assert_close(module.pool_image(small), expected, rtol=0, atol=1e-5)


def test_deconvolution_is_the_papers_block() -> None:
    module = make("deconv")
    features = torch.randn(1, 32, 4, 4)
    finer = nn.ConvTranspose2d.forward(module.deconv_1, features)
    finer = F.layer_norm(finer.permute(0, 2, 3, 1), (32,), module.norm.weight, module.norm.bias).permute(0, 3, 1, 2)
    expected = F.gelu(nn.ConvTranspose2d.forward(module.deconv_2, F.gelu(finer)))
    assert expected.shape == (1, 32, 16, 16)
    torch.testing.assert_close(module(features), expected)


def test_fewer_channels_begin_with_a_one_by_one_convolution() -> None:
    module = make("bilinear", refinement_channels=8)
    features = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(module(features), F.conv2d(features, module.reduce.weight, module.reduce.bias))
    assert not list(make("bilinear").parameters())

"""Towers give the patch tokens that transformers' own models give, and EfficientNet-Lite those of its package."""

import math
from typing import Any

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from tiny import TOWERS, text_config, tower_config
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from regiongpt.model.configuration import EFFICIENTNET_LITE_CHANNELS, EfficientNetLiteConfig, RegionGPTConfig
from regiongpt.model.modeling import EfficientNetLiteModel, tower_features


def reference_tokens(tower: torch.nn.Module, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """Hidden states with every non-patch token cut off, the way each model's documentation says."""
    kind, cells = tower.config.model_type, pixels.shape[-1] // 7
    if kind == "siglip2_vision_model":
        patches = torch.stack([torch.from_numpy(convert_image_to_patches(image.numpy(), 7)) for image in pixels])
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(len(pixels), cells * cells, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[cells, cells]] * len(pixels)),
        }
    elif kind.startswith("dinov2"):
        inputs = {"pixel_values": pixels}
    else:
        inputs = {"pixel_values": pixels, "interpolate_pos_encoding": pixels.shape[-1] != 28}
    dropped = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 4}.get(kind, 0)
    with torch.no_grad():
        return tower(**inputs, output_hidden_states=True).hidden_states[layer][:, dropped:]


@pytest.mark.parametrize("size", [28, 42])
@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_transformers_patch_tokens(kind: str, layer: int, size: int) -> None:
    torch.manual_seed(0)
    tower = AutoModel.from_config(tower_config(kind)).eval()
    pixels = torch.randn(2, 3, size, size)
    features = tower_features(tower, pixels, layer)
    tokens = reference_tokens(tower, pixels, layer)
    assert features.shape == (2, 32, size // 7, size // 7)
    assert not features.requires_grad
    # Row by row: the token of patch (y, x) is at y * columns + x.
    torch.testing.assert_close(features.permute(0, 2, 3, 1).reshape(tokens.shape), tokens)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_a_tower_whose_input_is_no_whole_number_of_patches_sees_those_that_it_has(kind: str) -> None:
    torch.manual_seed(0)
    described = tower_config(kind)
    described.image_size = 30
    config = RegionGPTConfig(vision_config=described, text_config=text_config())
    assert (config.image_size, config.tower_grid) == (28, (4, 4))
    tower = AutoModel.from_config(described).eval()
    pixels = torch.randn(1, 3, 30, 30)
    with torch.no_grad():
        theirs = tower(pixels, output_hidden_states=True).hidden_states[-2][0, -16:]
    found = tower_features(tower, pixels[..., :28, :28])[0]
    torch.testing.assert_close(found.flatten(1).T, theirs)


@pytest.mark.parametrize("variant", EFFICIENTNET_LITE_CHANNELS)
def test_configured_channels_are_the_networks(variant: str) -> None:
    with torch.device("meta"):
        network = EfficientNet.from_name(variant)
    strides = [block._depthwise_conv.stride[0] for block in network._blocks]
    last = [*(i - 1 for i, stride in enumerate(strides) if stride == 2), len(strides) - 1]
    channels = tuple(network._blocks[i]._project_conv.out_channels for i in last)
    assert channels[-3:] == EFFICIENTNET_LITE_CHANNELS[variant]


def test_efficientnet_lite_stages_and_positions() -> None:
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(variant="efficientnet-lite0", image_size=64, position_frequencies=2)
    tower = EfficientNetLiteModel(config).eval()
    tower.mean.uniform_(-1, 1)
    tower.std.uniform_(0.5, 2)
    pixels = torch.randn(1, 3, 64, 64)
    found = tower_features(tower, pixels)[0]
    assert found.shape == (config.hidden_size, 2, 2)

    whole = EfficientNet.from_name("efficientnet-lite0").eval()
    whole.load_state_dict(tower.network.state_dict(), strict=False)
    outputs: list[torch.Tensor] = []
    for block in whole._blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[-1][0]))
    with torch.no_grad():
        whole(pixels)
    by_side = {output.shape[-1]: output for output in outputs}
    assert sorted(by_side) == [2, 4, 8, 16, 32]
    eighth = F.avg_pool2d(by_side[8][None], 2)[0]
    expected = []
    for y in range(2):
        for x in range(2):
            cell = [by_side[2][:, y, x]]
            for finer in (by_side[4], eighth):
                cell.append(finer[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten())
            centres = (x + 0.5) / 2, (y + 0.5) / 2
            waves = [
                wave(math.pi * frequency * centre)
                for centre in centres
                for wave in (math.sin, math.cos)
                for frequency in (1, 2)
            ]
            expected.append(torch.cat([(torch.cat(cell) - tower.mean) / tower.std, torch.tensor(waves)]))
    torch.testing.assert_close(found.flatten(1).T, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_efficientnet_lite_carries_no_head() -> None:
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(variant="efficientnet-lite0", image_size=32))
    assert not [name for name in tower.state_dict() if "_fc" in name or "_conv_head" in name]


class Operations(TorchDispatchMode):
    """Keeps PyTorch's operations and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kept.append((operation.__name__.partition(".")[0], args))
        return operation(*args, **(kwargs or {}))


def test_efficientnet_lite_runs_neither_batch_norms_nor_1x1_convolutions() -> None:
    """Both are slow on a CPU; the operations are the same on every machine."""
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(variant="efficientnet-lite0", image_size=64)).eval()
    with Operations() as run:
        tower_features(tower, torch.zeros(2, 3, 64, 64))
    kernels = [args[1].shape[-1] for name, args in run.kept if name == "convolution"]
    names = [name for name, _ in run.kept]
    assert len(kernels) == 1 + len(tower.network._blocks)
    assert min(kernels) > 1
    assert not any("batch_norm" in name for name in names)
    assert len(names) < 800

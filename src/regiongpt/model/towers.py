"""Frozen vision towers: one image in, one grid of features out.

Shapes: B batch, S image side in pixels, C channels, H rows and W columns of the feature grid, N tokens.
"""

import math
from typing import Any

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from regiongpt.model.configuration import EfficientNetLiteConfig


class EfficientNetLiteModel(PreTrainedModel):  # type: ignore[misc]
    """EfficientNet-Lite without its head, its three coarsest stages side by side on the stride-32 grid.

    Finer stages are laid out as channels, and fixed sines and cosines of the position appended. The stages differ in
    scale by an order of magnitude, so each channel is standardised by the buffers ``mean`` and ``std``, which a recipe
    measures once on its training images.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # It has no attention at all; saying so lets a whole model ask for any kind for its language model.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.network = EfficientNet.from_name(config.variant)
        # The head and the classifier are a fifth of the weights, and the region features measured worse with them.
        for unused in ("_conv_head", "_bn1", "_avg_pooling", "_dropout", "_fc"):
            delattr(self.network, unused)
        strided = [i for i, block in enumerate(self.network._blocks) if block._depthwise_conv.stride[0] == 2]
        self.last_stride16, self.last_stride8 = strided[-1] - 1, strided[-2] - 1
        self.register_buffer("mean", torch.zeros(config.stage_channels))
        self.register_buffer("std", torch.ones(config.stage_channels))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out")
        if module is self:
            init.zeros_(self.mean)
            init.ones_(self.std)

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Compute the feature grid: (B, 3, S, S), S a multiple of 32, to a last hidden state (B, C, S/32, S/32)."""
        network = self.network
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = network._swish(network._bn0(network._conv_stem(x)))
        for index, block in enumerate(network._blocks):
            x = block(x)
            if index == self.last_stride8:
                stride8_BCHW = F.pixel_unshuffle(F.avg_pool2d(x, 2), 2)
            if index == self.last_stride16:
                stride16_BCHW = F.pixel_unshuffle(x, 2)
        stages_BCHW = torch.cat([x, stride16_BCHW, stride8_BCHW], dim=1)
        maps = [(stages_BCHW - self.mean[:, None, None]) / self.std[:, None, None]]
        if self.config.position_frequencies:
            maps.append(_position_channels(self.config.position_frequencies, x))
        return BaseModelOutput(last_hidden_state=torch.cat(maps, dim=1))


def _position_channels(frequencies: int, like_BCHW: Tensor) -> Tensor:
    """Sines then cosines of x, then of y, at wavelengths 2, 1, 1/2, ... of the canvas: (B, 4 * frequencies, H, W)."""
    batch, _, rows, columns = like_BCHW.shape
    channels = []
    for axis, cells in ((1, columns), (0, rows)):
        centres = (torch.arange(cells, device=like_BCHW.device, dtype=torch.float32) + 0.5) / cells
        phase = math.pi * 2.0 ** torch.arange(frequencies, device=like_BCHW.device)[:, None] * centres
        waves = torch.cat([phase.sin(), phase.cos()])
        channels.append((waves[:, None, :] if axis else waves[:, :, None]).expand(-1, rows, columns))
    return torch.cat(channels).to(like_BCHW.dtype).expand(batch, -1, -1, -1)


@torch.no_grad()
def tower_features(model: Any, pixel_values: Tensor, layer: int = -2) -> Tensor:
    """Run a frozen tower and arrange its patch tokens as a grid (B, C, H, W). Paper: §3.1, visual backbone.

    ``layer`` is an index into the tower's hidden states, of which class and register tokens are dropped.
    """
    config = model.config
    pixel_values = pixel_values.to(device=model.device, dtype=model.dtype)
    if config.model_type == "efficientnet_lite":
        return model(pixel_values).last_hidden_state  # type: ignore[no-any-return]
    patch = config.patch_size
    rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    if config.model_type == "siglip2_vision_model":
        output = model(**_siglip2_inputs(pixel_values, patch, rows, columns), output_hidden_states=True)
    elif config.model_type.startswith("dinov2"):
        output = model(pixel_values, output_hidden_states=True)
    else:
        resized = pixel_values.shape[-1] != config.image_size
        output = model(pixel_values, interpolate_pos_encoding=resized, output_hidden_states=True)
    # Patch tokens come last in every tower that has class or register tokens.
    tokens_BNC = output.hidden_states[layer][:, -rows * columns :]
    return tokens_BNC.transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-any-return]


def _siglip2_inputs(pixel_values: Tensor, patch: int, rows: int, columns: int) -> dict[str, Tensor]:
    """SigLIP 2 takes rows of flattened patches with their shape: a square image is one full, unmasked such sequence."""
    batch, channels = pixel_values.shape[:2]
    patches = pixel_values.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.reshape(batch, rows * columns, patch * patch * channels),
        "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.long, device=pixel_values.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=pixel_values.device),
    }


AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)

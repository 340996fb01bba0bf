"""RegionGPT: frozen tower -> refinement -> region and image features -> shared connector -> language model.

Paper: §3.1.

Shapes: B batch, R regions, K ``<region>`` tokens of one sequence, N image tokens, C channels, H and W rows and columns
of a feature grid, h and w those before a bilinear upsampling, T text tokens, D language model width, S image side.
"""

import inspect
import math
from contextlib import nullcontext
from typing import Any, Self, cast

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.model.configuration import REFINEMENTS, EfficientNetLiteConfig, RegionGPTConfig
from regiongpt.model.processing import IGNORED

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache argument in the installed transformers; ``past_key_values`` became ``cache`` in 5.24."""

CROPS = 16  # that go through the tower at a time
CPU_PIXELS = 640**2  # that go through an EfficientNet at a time: larger intermediate maps leave a CPU's cache

_VISUAL_INPUTS = ("pixel_values", "vision_features", "region_weights", "region_ids", "region_crops")


class EfficientNetLiteModel(PreTrainedModel):  # type: ignore[misc]
    """EfficientNet-Lite without its head, its three coarsest stages side by side on the stride-32 grid.

    Finer stages are laid out as channels, standardised by the buffers ``mean`` and ``std``, which a recipe measures on
    its training images; sines and cosines of the position are appended.
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
        folded: dict[Any, tuple[Tensor, Tensor]] = {}  # what the first images fold, all others find
        at_once = max(1, CPU_PIXELS // pixel_values[0, 0].numel()) if pixel_values.device.type == "cpu" else 2**20
        features = [self._features(some, folded) for some in torch.split(pixel_values, at_once)]
        return BaseModelOutput(last_hidden_state=torch.cat(features))

    def _features(self, pixel_values: Tensor, folded: dict[Any, tuple[Tensor, Tensor]]) -> Tensor:
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = _convolve(x, self.network._conv_stem, self.network._bn0, folded).clamp_(0, 6)
        for index, block in enumerate(self.network._blocks):
            before = x
            if hasattr(block, "_expand_conv"):
                x = _convolve(x, block._expand_conv, block._bn0, folded).clamp_(0, 6)
            x = _convolve(x, block._depthwise_conv, block._bn1, folded).clamp_(0, 6)
            x = _convolve(x, block._project_conv, block._bn2, folded)
            if x.shape == before.shape:
                x += before
            if index == self.last_stride8:
                stride8_BCHW = F.pixel_unshuffle(F.avg_pool2d(x, 2), 2)
            if index == self.last_stride16:
                stride16_BCHW = F.pixel_unshuffle(x, 2)
        stages_BCHW = torch.cat([x, stride16_BCHW, stride8_BCHW], dim=1)
        stages_BCHW = (stages_BCHW - self.mean[:, None, None]) / self.std[:, None, None]
        return torch.cat([stages_BCHW, _position_channels(self.config.position_frequencies, x)], dim=1)


def _convolve(x_BCHW: Tensor, conv: Any, norm: Any, folded: dict[Any, tuple[Tensor, Tensor]]) -> Tensor:
    """Apply a convolution of EfficientNet and the batch norm behind it as one; ``folded`` keeps weight and bias.

    One of 1x1 is a matrix product: torch runs those slowly on one CPU thread.
    """
    if conv not in folded:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        folded[conv] = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    weight, bias = folded[conv]
    if conv.kernel_size == (1, 1):
        return F.linear(x_BCHW.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    left, right, top, bottom = conv.static_padding.padding  # of the variant's own image size
    if left != right or top != bottom:
        x_BCHW, left, top = F.pad(x_BCHW, (left, right, top, bottom)), 0, 0
    return F.conv2d(x_BCHW, weight, bias, conv.stride, (top, left), 1, conv.groups)


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
    """Run a frozen tower and arrange the patch tokens of one of its layers as a grid (B, C, H, W). Paper: §3.1."""
    config = model.config
    pixel_values = pixel_values.to(device=model.device, dtype=model.dtype)
    if config.model_type == "efficientnet_lite":
        return model(pixel_values).last_hidden_state  # type: ignore[no-any-return]
    patch = config.patch_size
    rows, columns = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    inputs: dict[str, Any] = {"pixel_values": pixel_values}
    if config.model_type == "siglip2_vision_model":  # takes flattened patches: an image is one full, unmasked sequence
        batch, channels = pixel_values.shape[:2]
        patches = pixel_values.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        inputs["pixel_values"] = patches.reshape(batch, rows * columns, patch * patch * channels)
        inputs["pixel_attention_mask"] = torch.ones(batch, rows * columns, dtype=torch.long, device=model.device)
        inputs["spatial_shapes"] = torch.tensor([[rows, columns]] * batch, device=model.device)
    elif not config.model_type.startswith("dinov2"):
        inputs["interpolate_pos_encoding"] = pixel_values.shape[-1] != config.image_size
    # Patch tokens come last in every tower that has class or register tokens.
    tokens_BNC = model(**inputs, output_hidden_states=True).hidden_states[layer][:, -rows * columns :]
    return tokens_BNC.transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-any-return]


class Deconvolution(nn.ConvTranspose2d):
    """A 2x2 deconvolution of stride 2 as a matrix product, which trains nearly twice as fast on a CPU."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Refine (B, C, H, W) to (B, C, 2H, 2W), channels last in memory."""
        batch, channels, rows, columns = input.shape
        weight = self.weight.permute(0, 2, 3, 1).reshape(channels, -1)
        cells = input.permute(0, 2, 3, 1).reshape(-1, channels) @ weight
        cells = cells.view(batch, rows, columns, 2, 2, -1).transpose(2, 3).reshape(batch, 2 * rows, 2 * columns, -1)
        return (cells + self.bias).permute(0, 3, 1, 2)  # type: ignore[operator, unused-ignore]


class Refinement(nn.Module):
    """Refine a tower's feature map, and pool regions and image tokens from it. Paper: §3.1; Tab. 6 for the variants.

    An upsampling U and both poolings are linear, so the upsampled map is never built: a region's weights W become
    U_h^T W U_w on the small grid, and the adaptive average P becomes P U.
    """

    def __init__(self, config: RegionGPTConfig) -> None:
        super().__init__()
        tower, channels = config.vision_config.hidden_size, config.feature_channels
        self.reduce = nn.Conv2d(tower, channels, 1) if config.refinement_channels else nn.Identity()
        self.deconvolves = config.refinement.startswith("deconv")
        if self.deconvolves:
            self.deconv_1 = Deconvolution(channels, channels, 2, stride=2)
            self.norm = nn.LayerNorm(channels, eps=config.refinement_norm_eps)
            self.deconv_2 = Deconvolution(channels, channels, 2, stride=2)
        self.bilinear_scale = REFINEMENTS[config.refinement] // (4 if self.deconvolves else 1)
        self.image_grid = (config.image_grid[0], config.image_grid[1])
        if config.region_crop:
            self.crop_projection = nn.Linear(config.crop_channels, channels, bias=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Apply the learned part: (B, C, H, W) to the refined map, or to the map of which that is an upsampling."""
        x = self.reduce(features_BCHW.contiguous(memory_format=torch.channels_last))
        if self.deconvolves:
            x = self.deconv_1(x)
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = F.gelu(self.deconv_2(F.gelu(x)))
        return x  # type: ignore[no-any-return]

    def pool_regions(self, map_BChw: Tensor, weights_BRHW: Tensor, crops: Tensor | None = None) -> Tensor:
        """Average what ``forward`` returned over each region: (B, R, C). Paper: §3.1, mask pooling.

        Weights (B, R, H, W) sum to 1 for each region; rows of zeros give zeros. ``crops``, the features of the regions'
        own crops, are added; one row may be for several rows of weights.
        """
        if self.bilinear_scale > 1:
            scale = self.bilinear_scale
            up_Hh, up_Ww = (resampling(n, scale, n * scale, map_BChw) for n in map_BChw.shape[-2:])
            weights_BRHW = up_Hh.T @ weights_BRHW.to(up_Hh.dtype) @ up_Ww
        pooled_BRC = mask_pool(map_BChw, weights_BRHW)
        if crops is None:
            return pooled_BRC
        seen_BRC: Tensor = self.crop_projection(crops.to(pooled_BRC))
        return pooled_BRC + seen_BRC.repeat_interleave(pooled_BRC.shape[1] // max(1, crops.shape[1]), 1)

    def pool_image(self, map_BChw: Tensor) -> Tensor:
        """Average what ``forward`` returned down to the image grid (H, W): (B, H * W, C). Paper: §3.1, AdaPool."""
        if self.bilinear_scale == 1:
            pooled = F.adaptive_avg_pool2d(map_BChw, self.image_grid)
            return pooled.flatten(2).transpose(1, 2)
        rows, columns = (
            resampling(n, self.bilinear_scale, cells, map_BChw)
            for n, cells in zip(map_BChw.shape[-2:], self.image_grid, strict=True)
        )
        return (rows.to(map_BChw.dtype) @ map_BChw @ columns.to(map_BChw.dtype).T).flatten(2).transpose(1, 2)


def merge_cells(cells_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Join each 2x2 cells of a grid, padded with zeros to even sides, column by column: (B, N / 4, 4C)."""
    (batch, _, channels), (rows, columns) = cells_BNC.shape, grid
    cells_BHWC = F.pad(cells_BNC.reshape(batch, *grid, channels), (0, 0, 0, columns % 2, 0, rows % 2))
    blocks = cells_BHWC.reshape(batch, (rows + 1) // 2, 2, (columns + 1) // 2, 2, channels)
    return blocks.permute(0, 3, 1, 2, 4, 5).reshape(batch, -1, 4 * channels)


def mask_pool(map_BCHW: Tensor, weights_BRHW: Tensor) -> Tensor:
    """Average a map over regions given as weights on its grid, of any float dtype: (B, R, C) in the map's dtype."""
    return weights_BRHW.to(map_BCHW.dtype).flatten(2) @ map_BCHW.flatten(2).transpose(1, 2)


def resampling(cells: int, scale: int, pooled: int, like: Tensor) -> Tensor:
    """Matrix (P, cells) of a bilinear upsampling along one axis, as ``F.interpolate`` does it, averaged to P cells."""
    units = torch.eye(cells, device=like.device, dtype=torch.float32)[None]
    fine = F.interpolate(units, scale_factor=scale, mode="linear", align_corners=False)
    return F.adaptive_avg_pool1d(fine, pooled)[0].T


class Connector(nn.Module):
    """Two-layer perceptron from visual features to word embeddings, one for image and regions. Paper: §3.1.

    One that downsamples takes the channels of 2x2 cells and norms them first; regions then have another.

    Input channels are first standardised by ``mean`` and ``std``, 0 and 1 unless a recipe measured them, since what the
    all positive refined features have in common would outgrow what tells them apart.
    """

    def __init__(self, config: RegionGPTConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        between = config.connector_size or width
        downsamples = config.image_connector == "downsample"
        channels = config.feature_channels * (4 if downsamples else 1)
        self.norm = nn.LayerNorm(channels) if downsamples else nn.Identity()
        self.linear_1 = nn.Linear(channels, between)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(between, width)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Project features (..., C) to (..., D)."""
        normed = self.norm((features - self.mean) / self.std)
        return self.linear_2(self.act(self.linear_1(normed)))  # type: ignore[no-any-return]


class RegionGPTForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Answers in words about regions of an image. Paper: §3.1.

    The tower is frozen: it is never in training mode, keeps no graph and takes no gradient.
    """

    config_class = RegionGPTConfig
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("cache", "past_key_values")

    def __init__(self, config: RegionGPTConfig) -> None:
        super().__init__(config)
        self.num_image_tokens = config.num_image_tokens
        self.features_shape = (int(config.vision_config.hidden_size), *config.tower_grid)
        self.weights_grid = config.weights_grid
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.refinement = Refinement(config)
        self.connector = Connector(config)
        if config.region_connector == "linear":
            self.region_connector = nn.Linear(config.feature_channels, config.text_config.hidden_size)
        # The language model keeps its own head and its own weight tying, so that any architecture fits.
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.train(self.training)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Deconvolution):
            # The four cells begin alike, and orthogonal: the map begins as an upsampling that keeps what the tower saw.
            kernel = module.weight.new_empty(module.weight.shape[:2], dtype=torch.float32)
            init.orthogonal_(kernel, gain=2**0.5)
            init.copy_(module.weight, kernel[:, :, None, None].expand_as(module.weight))
        elif isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=module.in_channels**-0.5)
        elif module is getattr(self.refinement, "crop_projection", None):
            init.zeros_(module.weight)  # to begin with, a second look changes nothing
        elif isinstance(module, Connector):
            for linear in (module.linear_1, module.linear_2):
                init.normal_(linear.weight, std=linear.in_features**-0.5)
            init.zeros_(module.mean)
            init.ones_(module.std)

    def train(self, mode: bool = True) -> Self:
        """Set training mode everywhere but in the tower, which stays frozen."""
        super().train(mode)
        self.vision_tower.requires_grad_(False).eval()
        return self

    @property
    def untrained(self) -> bool:
        """Whether refinement and connector are untrained: the last bias is still zero."""
        last = self.refinement.deconv_2 if self.refinement.deconvolves else self.connector.linear_2
        return not bool(cast(Tensor, last.bias).any())

    def get_output_embeddings(self) -> nn.Module:
        """Head of the language model."""
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head of the language model."""
        self.language_model.set_output_embeddings(value)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Run the frozen tower: (B, 3, S, S) to (B, C, H, W)."""
        return tower_features(self.vision_tower, pixel_values, self.config.vision_feature_layer)

    def encode_crops(self, crops: Tensor) -> Tensor:
        """Features (B, R, C) of regions' own crops (B, R, 3, S, S): the mean of the frozen tower's grid over each.

        A crop of zeros has features of zeros, and features stay as they are.
        """
        if not self.config.region_crop:
            raise ConfigError("region_crops: this model was made without region_crop; leave them out")
        crops = crops.to(self.device)
        if crops.dim() == 3:
            return crops
        shown = crops.flatten(-3).any(-1)
        channels = self.config.crop_channels
        features = torch.zeros(*shown.shape, channels, device=crops.device, dtype=self.dtype)
        if shown.any():
            seen = [self.encode_image(some)[:, :channels].mean((2, 3)) for some in torch.split(crops[shown], CROPS)]
            features[shown] = torch.cat(seen)
        return features

    def refine(self, vision_features: Tensor) -> Tensor:
        """Refine the tower's features (B, C, H, W), of any float dtype; DataError for another shape."""
        if (got := tuple(vision_features.shape))[1:] != self.features_shape:
            raise DataError(f"vision_features must be {('images', *self.features_shape)}; got {got}")
        weight = self.connector.linear_1.weight
        return self.refinement(vision_features.to(device=weight.device, dtype=weight.dtype))  # type: ignore[no-any-return]

    def region_features(self, refined: Tensor, region_weights: Tensor, region_crops: Tensor | None = None) -> Tensor:
        """Embed regions (B, R, D) from what ``refine`` returned. Paper: §3.1, ``H_r = h(Z_r)``.

        Where positions are coded, the last row of ``region_weights`` (B, R, H, W) begins with the region's box.
        """
        if region_crops is not None:
            region_crops = self.encode_crops(region_crops)
        if (got := tuple(region_weights.shape))[-2:] != self.weights_grid:
            raise RegionError(f"region_weights must have the refined grid {self.weights_grid}; got {got}")
        region_weights = region_weights.to(refined.device)
        rows = self.config.refined_grid[0]
        pooled = self.refinement.pool_regions(refined, region_weights[..., :rows, :], region_crops)
        embeds: Tensor = getattr(self, "region_connector", self.connector)(pooled)
        if self.config.region_position:
            code = position_code(region_weights[..., rows, :4].float(), embeds.shape[-1])
            embeds = embeds + self.config.region_position * code.to(embeds)
        return embeds

    def image_features(self, refined: Tensor) -> Tensor:
        """Embed the whole image from what ``refine`` returned: (B, N, D), row by row. Paper: §3.1, ``H_v = h(Z_v)``."""
        cells_BNC = self.refinement.pool_image(refined)
        if self.config.image_connector == "downsample":
            cells_BNC = merge_cells(cells_BNC, self.refinement.image_grid)
        cells_BND: Tensor = self.connector(cells_BNC)
        if self.config.image_marks:
            image = torch.tensor(self.config.image_token_id, device=cells_BND.device)
            cells_BND = cells_BND + self.get_input_embeddings()(image).to(cells_BND)
        return cells_BND

    def add_numbers(self, features_KD: Tensor, input_ids: Tensor) -> Tensor:
        """Add their numbers' word embeddings, if this model does, to embeddings of the last K regions of the ids."""
        if not self.config.region_number_offset:
            return features_KD
        numbers = number_ids(input_ids, self.config.region_token_id, self.config.region_number_offset)
        numbers_K = numbers[len(numbers) - len(features_KD) :]
        return features_KD + self.get_input_embeddings()(numbers_K).to(features_KD.dtype)  # type: ignore[no-any-return]

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        region_weights: Tensor | None = None,
        region_ids: Tensor | None = None,
        region_crops: Tensor | None = None,
    ) -> Tensor:
        """Embed the inputs of :meth:`forward`, with visual embeddings in place of placeholders: (B, T, D)."""
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        image_id, region_id = self.config.image_token_id, self.config.region_token_id
        image_BT, region_BT = (input_ids == (-1 if token is None else token) for token in (image_id, region_id))
        has_image, has_region = bool(image_BT.any()), bool(region_BT.any())
        if not (has_image or has_region):
            return embeds
        if vision_features is None:
            if pixel_values is None:
                raise DataError("the text has <image> or <region> tokens; give pixel_values or vision_features")
            vision_features = self.encode_image(pixel_values)
        refined = self.refine(vision_features)
        if has_image:
            tokens = image_BT.sum(1)
            if not set(tokens.tolist()) <= {0, self.num_image_tokens}:
                raise DataError(f"an image takes {self.num_image_tokens} <image> tokens here; got {tokens.tolist()}")
            features = self.image_features(refined)[tokens > 0]
            embeds = embeds.masked_scatter(image_BT[..., None], features.to(embeds.dtype))
        if has_region:
            if region_weights is None or region_ids is None:
                raise RegionError("the text has <region> tokens, but region_weights or region_ids is missing")
            owners, rows = _region_rows(region_BT, region_ids, region_weights.shape[1])
            features = self.region_features(refined, region_weights, region_crops)[owners, rows].to(embeds.dtype)
            embeds = embeds.masked_scatter(region_BT[..., None], self.add_numbers(features, input_ids))
        return embeds

    @can_return_tuple  # type: ignore[untyped-decorator, unused-ignore]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        region_weights: Tensor | None = None,
        region_ids: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        loss_only: bool = False,
        past_key_values: Any = None,
        region_crops: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position. Paper: §3.2, auto-regressive loss on the responses.

        Arguments not listed are those of the language model; ``logits_to_keep`` counts without labels alone.

        Args:
            input_ids: (B, T), with placeholder tokens already expanded by the processor.
            pixel_values: (B, 3, S, S).
            vision_features: (B, C, H, W) from ``encode_image``, in place of ``pixel_values``.
            region_weights: (B, R, H, W) on ``config.weights_grid``, each region's summing to 1; rows of zeros pad.
            region_ids: (B, K), for each ``<region>`` token behind the cache its row of ``region_weights``; -1 pads.
            labels: (B, T), -100 where not a target.
            inputs_embeds: (B, T, D) from ``embed``, in place of ``input_ids`` and all visual inputs.
            cache: the language model's cache; ``past_key_values`` is its older name.
            num_items_in_batch: targets in the whole optimiser step, by which the sum of this batch's losses is divided;
                by default, this batch's own number.
            loss_only: compute the head at target positions alone and return no logits.
            region_crops: regions' own crops (B, R, 3, S, S), or (B, R, C) from ``encode_crops``; zeros are left out.

        Returns:
            ``loss`` if there are labels, with each target's in the attribute ``target_losses``; ``logits`` unless
            ``loss_only``; the cache, ``hidden_states`` and ``attentions`` as asked for.
        """
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            seen = (pixel_values, vision_features, region_weights, region_ids, region_crops)
            inputs_embeds = self.embed(cast(Tensor, input_ids), *seen)
        call = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "return_dict": True,
            **({} if cache is None else {cache_argument(self.language_model): cache}),
            **kwargs,
        }
        loss = losses = None
        if labels is None:
            output = self.language_model(**call, logits_to_keep=logits_to_keep)
            logits = output.logits
        else:
            next_BT = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(inputs_embeds.device)
            is_target = next_BT != IGNORED
            targets = next_BT[is_target]
            # A hook rather than a call of the head: what an architecture does to its logits afterwards still happens.
            head = self.get_output_embeddings()
            chosen = (
                head.register_forward_pre_hook(lambda _, inputs: (inputs[0][is_target][None],)) if loss_only else None
            )
            with chosen or nullcontext():
                output = self.language_model(**call)
            logits = None if loss_only else output.logits
            target_logits = output.logits[0] if loss_only else output.logits[is_target]
            items = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
            if isinstance(items, Tensor):
                items = items.to(target_logits.device)
            losses = F.cross_entropy(target_logits.float(), targets, reduction="none")
            loss = losses.sum() / items
        answer = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: output.get(CACHE)},
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )
        answer.target_losses = None if losses is None else losses.detach()
        return answer

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Drop the visual inputs once they are in the cache; see the base class for the arguments."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in _VISUAL_INPUTS:
                inputs.pop(name, None)
        return inputs

    def generate(self, *args: Any, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        """As ``transformers.GenerationMixin.generate``, from any of the inputs of ``forward``.

        The image and its crops are encoded once for all beams, and placeholder tokens are never written.
        """
        for name in {"cache", "past_key_values"} & kwargs.keys():
            kwargs[CACHE] = kwargs.pop(name)
        if pixel_values is not None:
            kwargs["vision_features"] = self.encode_image(pixel_values)
        if kwargs.get("region_crops") is not None:
            kwargs["region_crops"] = self.encode_crops(kwargs["region_crops"])
        placeholders = [i for i in (self.config.image_token_id, self.config.region_token_id) if i is not None]
        if placeholders and getattr(kwargs.get("generation_config"), "suppress_tokens", None) is None:
            kwargs.setdefault("suppress_tokens", placeholders)
        return super().generate(*args, **kwargs)


def position_code(boxes: Tensor, width: int) -> Tensor:
    """A code (..., width) of length 1 for boxes (..., 4): x0, y0, x1, y1 as shares of the image's width and height.

    Sines and cosines, at wavelengths 2 and 1, of the centre, width, height and the logarithm of the area. Shorter waves
    take their share of the length and tell a small reader nothing of places: with two more, none was learned.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    area = 1 + ((x1 - x0) * (y1 - y0)).clamp_min(1e-4).log() / math.log(1e4)
    values = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, area], -1)
    phases = math.pi * 2.0 ** torch.arange(2, device=boxes.device) * values[..., None]
    waves = torch.cat([phases.sin(), phases.cos()], -1).flatten(-2)
    repeats = [1] * (waves.dim() - 1) + [-(-width // waves.shape[-1])]
    return F.normalize(waves.repeat(repeats)[..., :width], dim=-1)


def cache_argument(language_model: Any) -> str:
    """The name by which a language model takes its cache: code from a hub may keep the older one."""
    return "past_key_values" if "past_key_values" in inspect.signature(language_model.forward).parameters else CACHE


def number_ids(input_ids: Tensor, region_token_id: int, offset: int) -> Tensor:
    """The token ``offset`` places before each region of (..., T): (K,)."""
    places = torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)
    return input_ids.gather(-1, (places - offset).clamp_min(0))[input_ids == region_token_id]


def _region_rows(region_BT: Tensor, region_ids: Tensor, regions: int) -> tuple[Tensor, Tensor]:
    """For every region token, in reading order, its sequence and its row of that sequence's region weights."""
    tokens = region_BT.sum(1)
    region_ids = region_ids.to(region_BT.device)
    given = (region_ids >= 0).sum(1)
    if bool((tokens != given).any()):
        raise RegionError(
            f"every <region> token needs one region id; got {tokens.tolist()} tokens and {given.tolist()} ids"
        )
    if (most := int(region_ids.max())) >= regions:
        raise RegionError(f"region_ids must name rows of region_weights, 0 to {regions - 1}; got {most}")
    owners, places = region_BT.nonzero(as_tuple=True)
    return owners, region_ids[owners, region_BT.cumsum(1)[owners, places] - 1]


AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
AutoModelForImageTextToText.register(RegionGPTConfig, RegionGPTForConditionalGeneration)

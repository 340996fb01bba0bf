"""Shape of a RegionGPT model: which tower, which refinement, which language model, and how they fit together."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from regiongpt.errors import ConfigError, short

REFINEMENTS: dict[str, int] = {"deconv": 4, "bilinear": 16, "deconv_bilinear": 16, "none": 1}
"""How many times finer than the tower's grid each refinement's grid is, on each axis. Paper: Tab. 6."""

EFFICIENTNET_LITE_CHANNELS: dict[str, tuple[int, int, int]] = {
    "efficientnet-lite0": (40, 112, 320),
    "efficientnet-lite1": (40, 112, 320),
    "efficientnet-lite2": (48, 120, 352),
    "efficientnet-lite3": (48, 136, 384),
    "efficientnet-lite4": (56, 160, 448),
}
"""Channels of each variant's last block at stride 8, 16 and 32."""

VISION_TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2", "dinov2_with_registers",
                 "efficientnet_lite")  # fmt: skip
"""``model_type`` of every vision tower that can stand in front of the refinement."""


class EfficientNetLiteConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of the EfficientNet-Lite tower, the small default that pip can install.

    ``image_size`` is a multiple of 32 pixels; ``position_frequencies`` sine and cosine wavelengths per axis are
    appended as channels, since a convolutional tower says little about where a feature lies.
    """

    patch_size = 32

    model_type = "efficientnet_lite"

    variant: str = "efficientnet-lite2"
    image_size: int = 448
    position_frequencies: int = 4

    @property
    def hidden_size(self) -> int:
        """Channels of the output: the stages, then the position."""
        return self.stage_channels + 4 * self.position_frequencies

    @property
    def stage_channels(self) -> int:
        """Channels of stride 32, and of the 2x2 cells at stride 16 below each of its cells, for strides 16 and 8."""
        stride8, stride16, stride32 = EFFICIENTNET_LITE_CHANNELS[self.variant]
        return stride32 + 4 * stride16 + 4 * stride8


class RegionGPTConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of a RegionGPT model. Paper: §3.1.

    Args:
        vision_config: the tower's configuration or its fields; CLIP ViT-L/14 at 336 pixels when None.
        text_config: of any ``AutoModelForCausalLM``; Llama when None.
        image_size: side of the square input in pixels: whole patches, or SigLIP's own size, whose rest no patch sees;
            the tower's own in whole patches when None.
        vision_feature_layer: which of the tower's hidden states to use, as an index; EfficientNet-Lite ignores it.
        refinement: ``deconv``, ``bilinear``, ``deconv_bilinear`` or ``none``.
        refinement_channels: channels of the refined map, by a 1x1 convolution; the tower's own when None.
        refinement_norm_eps: epsilon of the norm between the two deconvolutions.
        image_grid: rows and columns of image tokens; the tower's own grid when None.
        image_connector: ``mlp``, or ``downsample``: 2x2 cells of the image grid become one token, column by column, by
            a norm and the two layers.
        region_connector: ``shared`` with the image, or ``linear``: one layer of its own.
        connector_size: width of the connector between its two layers; the language model's when None.
        region_number_offset: how many tokens before a region its number stands in the text, whose word embedding is
            added to the region's own; 0 adds none.
        image_marks: whether the word embedding of ``<image>`` is added to each image token's own.
        region_position: length of a code of the region's place and size that is added to its embedding.
        region_crop: whether the region's own crop through the same tower may add to its features.

    Raises:
        ConfigError: a tower, refinement, layer or size does not exist or does not fit the rest.
    """

    model_type = "regiongpt"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    image_size: int = None  # type: ignore[assignment]
    vision_feature_layer: int = -2
    refinement: str = "deconv"
    refinement_channels: int | None = None
    refinement_norm_eps: float = 1e-5
    image_connector: str = "mlp"
    region_connector: str = "shared"
    image_grid: list[int] = None  # type: ignore[assignment]
    connector_size: int | None = None
    projector_hidden_act: str = "gelu"
    image_token_id: int | None = None
    region_token_id: int | None = None
    region_number_offset: int = 0
    image_marks: bool = False
    region_position: float = 0.0
    region_crop: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the two inner configurations, fill in what was left open, and check that all fits together."""
        self.vision_config = _sub_config("vision_config", self.vision_config, "clip_vision_model", _CLIP_L_336)
        # A complete CLIP or SigLIP configuration carries its vision half; only that half is a tower.
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        self.text_config = _sub_config("text_config", self.text_config, "llama", {})
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        tower = self.vision_config
        fits = tower.model_type in VISION_TOWERS
        _check("vision_config", tower.model_type, fits, f"one of {', '.join(VISION_TOWERS)}")
        _check("refinement", self.refinement, self.refinement in list(REFINEMENTS), f"one of {', '.join(REFINEMENTS)}")
        self.image_size = native_image_size(tower) if self.image_size is None else self.image_size
        own = tower.model_type == "siglip_vision_model" and self.image_size == tower.image_size
        fits = self.image_size > 0 and (own or self.image_size % tower.patch_size == 0)
        _check("image_size", self.image_size, fits, f"a positive multiple of the patch size, {tower.patch_size} px")
        self.image_grid = list(self.tower_grid if self.image_grid is None else self.image_grid)
        most = list(self.refined_grid)
        fits = len(self.image_grid) == 2 and all(1 <= n <= m for n, m in zip(self.image_grid, most, strict=True))
        _check("image_grid", self.image_grid, fits, f"two numbers up to the refined grid {most}")
        kinds = self.image_connector, self.region_connector
        known = [("mlp", "shared"), ("mlp", "linear"), ("downsample", "linear")]
        _check("image_connector and region_connector", kinds, kinds in known, f"one of {known}")
        fits = self.region_position == 0 or (self.region_position > 0 and most[1] >= 4)
        _check("region_position", self.region_position, fits, f"at least 0, and 0 on a grid under 4 columns, as {most}")
        layers = getattr(tower, "num_hidden_layers", abs(self.vision_feature_layer))
        fits = -layers - 1 <= self.vision_feature_layer <= layers
        _check("vision_feature_layer", self.vision_feature_layer, fits, f"between {-layers - 1} and {layers}")
        super().__post_init__(**kwargs)

    @property
    def tower_grid(self) -> tuple[int, int]:
        """Rows and columns of the tower's feature map."""
        cells = self.image_size // self.vision_config.patch_size
        return cells, cells

    @property
    def seen_size(self) -> int:
        """Side in pixels of what the tower's patches see of the input, from its top left corner."""
        return self.tower_grid[0] * int(self.vision_config.patch_size)

    @property
    def refined_grid(self) -> tuple[int, int]:
        """Rows and columns of the refined map, the grid on which region weights are given."""
        rows, columns = self.tower_grid
        scale = REFINEMENTS[self.refinement]
        return rows * scale, columns * scale

    @property
    def weights_grid(self) -> tuple[int, int]:
        """Rows and columns of region weights: the refined grid, and a row for the box if its position is coded."""
        rows, columns = self.refined_grid
        return rows + bool(self.region_position), columns

    @property
    def crop_size(self) -> int:
        """Side in pixels of a region's own crop, 224 or the tower's if that is less; 0 without ``region_crop``."""
        patch = int(self.vision_config.patch_size)
        return min(self.image_size, max(1, 224 // patch) * patch) if self.region_crop else 0

    @property
    def crop_channels(self) -> int:
        """Channels of a region's own crop: the tower's without its position's."""
        return int(getattr(self.vision_config, "stage_channels", self.vision_config.hidden_size))

    @property
    def feature_channels(self) -> int:
        """Channels of the refined map, the connector's input width."""
        return self.refinement_channels or int(self.vision_config.hidden_size)

    @property
    def num_image_tokens(self) -> int:
        """How many ``<image>`` tokens one image takes."""
        rows, columns = self.image_grid
        if self.image_connector == "downsample":
            rows, columns = -(-rows // 2), -(-columns // 2)
        return int(rows * columns)


_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP_L_336 = {**_CLIP_L, "patch_size": 14, "image_size": 336, "projection_dim": 768}


def native_image_size(vision_config: Any) -> int:
    """Side in pixels of the square input that a tower was made for, in whole patches."""
    size, patch = getattr(vision_config, "image_size", None), int(vision_config.patch_size)
    if vision_config.model_type == EfficientNetLiteConfig.model_type:
        return int(vision_config.image_size)  # one that is no multiple is refused
    # SigLIP 2 takes any size and states a number of patches instead.
    return (int(vision_config.num_patches**0.5) if size is None else int(size) // patch) * patch


def _check(name: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {wanted}; got {short(value)}")


def _sub_config(name: str, value: Any, default_type: str, defaults: dict[str, Any]) -> Any:
    if value is None:
        return AutoConfig.for_model(default_type, **defaults)
    if isinstance(value, dict):
        fields = dict(value)
        return AutoConfig.for_model(fields.pop("model_type", default_type), **fields)
    _check(name, value, isinstance(value, PreTrainedConfig), "a configuration or a dictionary")
    return value


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig)
AutoConfig.register("regiongpt", RegionGPTConfig)

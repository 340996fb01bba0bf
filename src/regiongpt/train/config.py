"""Training configuration: frozen dataclasses read from TOML, with dotted overrides from the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regiongpt.configuration import build, dotted, override, read_toml
from regiongpt.errors import ConfigError
from regiongpt.model.configuration import REFINEMENTS


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the annotated photographs lie, or the records.

    Attributes:
        root: Folder with ``instances_<split>.json``, ``captions_<split>.json`` and ``images/``; usually given on the
            command line as ``--data.root``. With a mixture: the folder that its paths are relative to.
        split: Which of the photographs to train on.
        mix: Turns of each task in a conversation about a photograph, on average; the sampler's own mix where empty.
        mixture: Records of stage 2 in place of photographs: a TOML file (:mod:`regiongpt.data.mixture`) or one folder
            of records. A stage that has none is left out.
        pretrain_mixture: Likewise of stage 1.
    """

    root: str = ""
    split: str = "train"
    mix: dict[str, float] = field(default_factory=dict)
    mixture: str = ""
    pretrain_mixture: str = ""

    @property
    def on_records(self) -> bool:
        """Whether records are trained on, not annotated photographs."""
        return bool(self.mixture or self.pretrain_mixture)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The untrained model (paper §3.1), or the checkpoint to go on from.

    Attributes:
        init: With a mixture of records: a checkpoint folder, or ``nano`` for the model of the package. It brings its
            own shape, so that nothing else is given here.
        vision: ``efficientnet-lite2``, or a folder or hub name of a CLIP, SigLIP, SigLIP 2 or DINOv2 tower.
        image_size: Side of the square tower input in pixels.
        refinement: ``deconv``, ``bilinear``, ``deconv_bilinear`` or ``none`` (paper Tab. 6).
        refinement_channels: Channels inside the refinement; 0 keeps the tower's own number.
        image_grid: Side of the square grid of image tokens; 0 keeps the tower's own grid.
        region_format: What each ``<regionN>`` becomes; ``{n}`` is its number, ``<region>`` its embedding.
        region_numbers: Add the word embedding of a region's number to the region's own.
        vocab_size: Size of the byte-level BPE that is trained for the language model.
        hidden_size: Width of the language model.
        layers: Layers of the language model.
        heads: Attention heads of the language model.
        mlp_size: Width of the language model's feed-forward layers.
        max_length: Positions of the language model, in tokens.
    """

    init: str = ""
    vision: str = "efficientnet-lite2"
    image_size: int = 576
    refinement: str = "deconv"
    refinement_channels: int = 384
    image_grid: int = 6
    region_format: str = "[{n}]<region>"
    region_numbers: bool = False
    vocab_size: int = 4096
    hidden_size: int = 320
    layers: int = 5
    heads: int = 5
    mlp_size: int = 832
    max_length: int = 1024

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"model.heads: expected a divisor of model.hidden_size={self.hidden_size}, got {self.heads}"
            )
        if self.refinement not in REFINEMENTS:
            raise ConfigError(f"model.refinement: expected one of {', '.join(REFINEMENTS)}, got '{self.refinement}'")
        if "<region>" not in self.region_format:
            raise ConfigError(f"model.region_format: expected a text with '<region>' in it, got {self.region_format!r}")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """The cache of frozen tower features.

    Attributes:
        views: Views of each image: the whole one, then random crops, every other one mirrored.
        min_crop: Smallest side of a crop as a share of the image's side, in (0, 1].
    """

    views: int = 2
    min_crop: float = 0.6

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ConfigError(f"features.views: expected at least 1, got {self.views}")
        if not 0 < self.min_crop <= 1:
            raise ConfigError(f"features.min_crop: expected a share in (0, 1], got {self.min_crop}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One pass of optimisation.

    Attributes:
        epochs: Passes over the images or over the mixture; fractions are allowed.
        lr: Highest learning rate, reached after the warm-up; it falls to zero along a cosine.
        visual_lr: That of refinement and connector; ``lr`` where 0.
        alignment: How many target tokens the alignment of a region with its class's name counts for in the loss; see
            :mod:`regiongpt.train.alignment`.
        batch_size: Conversations in an optimiser step.
        micro_batch_size: Conversations in a forward pass; must divide ``batch_size``.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: AdamW weight decay of the matrices.
        max_grad_norm: Gradient norm that is clipped to.
        save_steps: Optimiser steps between checkpoints.
        log_steps: Optimiser steps between log lines.
    """

    epochs: float = 1.0
    lr: float = 1e-3
    visual_lr: float = 0.0
    alignment: float = 0.0
    batch_size: int = 32
    micro_batch_size: int = 16
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_steps: int = 200
    log_steps: int = 20

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size: expected a multiple of micro_batch_size={self.micro_batch_size}, got {self.batch_size}"
            )
        if self.epochs <= 0 or self.lr <= 0:
            raise ConfigError(f"epochs and lr: expected positive numbers, got {self.epochs} and {self.lr}")
        if self.visual_lr < 0 or self.alignment < 0:
            raise ConfigError(
                f"visual_lr and alignment: expected numbers of at least 0, got {self.visual_lr} and {self.alignment}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole recipe: language model, alignment, stage 1 and stage 2 (paper §3.2 and §4).

    Attributes:
        out: Folder of the run: feature cache, checkpoints and the finished model.
        seed: Seed of every random number, together with an index and an epoch.
        isolated_share: Share of the training conversations, in [0, 1], whose turns do not see each other.
        data: Annotated photographs, or records.
        model: The untrained model, or the checkpoint to go on from.
        features: Feature cache.
        language: Text-only pre-training of the language model.
        align: Refinement and connector, by the alignment alone.
        stage1: Refinement and connector; the language model is frozen.
        stage2: Refinement, connector and language model.
    """

    out: str = "runs/nano"
    seed: int = 0
    isolated_share: float = 0.8
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    language: StageConfig = field(default_factory=StageConfig)
    align: StageConfig = field(default_factory=lambda: StageConfig(alignment=1.0))
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=StageConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.isolated_share <= 1:
            raise ConfigError(f"isolated_share: expected a share in [0, 1], got {self.isolated_share}")
        if not self.data.on_records and not self.align.alignment:
            raise ConfigError("align.alignment: expected a number above 0, got 0; nothing else is learnt in that step")
        if self.data.on_records and not self.model.init:
            raise ConfigError(
                "model.init: expected the checkpoint to train on records, a folder or 'nano', got none; give "
                "--model.init, and make a folder from a tower and a language model with `regiongpt weights create`"
            )
        if self.data.on_records and (self.stage1.alignment or self.stage2.alignment):
            raise ConfigError(
                "alignment: goes with annotated photographs, whose objects have COCO's classes, not with a mixture of "
                "records; leave it out"
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a recipe and applies overrides.

    Args:
        path: A TOML file whose tables are the fields of :class:`TrainConfig`.
        overrides: Command-line words: ``--stage2.lr 5e-4`` or ``--stage2.lr=5e-4``, by dotted field name.

    Raises:
        ConfigError: The file is missing or is not TOML; a key is unknown (the message names the nearest one); a
            value is of another type or out of range; a key does not go with the kind of data.
    """
    values = read_toml(path)
    override(values, overrides)
    config = build(TrainConfig, values)
    for name in dotted(values):
        _check_use(name, config)
    return config


def _check_use(name: str, config: TrainConfig) -> None:
    """Raises ConfigError for a value that was given and that nothing would read."""
    if not config.data.on_records:
        if name == "model.init":
            raise ConfigError(
                "model.init: a checkpoint is trained further on records alone; give data.mixture or "
                "data.pretrain_mixture too, or leave it out"
            )
        return
    stage, _, leaf = name.partition(".")
    missing = {"stage1": "data.pretrain_mixture", "stage2": "data.mixture"}.get(stage)
    if missing and leaf != "alignment":
        if not (config.data.pretrain_mixture if stage == "stage1" else config.data.mixture):
            raise ConfigError(f"{name}: {stage} has no records to train on; give {missing} too, or leave it out")
    elif name not in ("out", "seed", "data.root", "data.mixture", "data.pretrain_mixture", "model.init"):
        raise ConfigError(
            f"{name}: goes with annotated photographs, not with a mixture of records, whose shape of model, images and "
            "turns are those of model.init and of the records; leave it out"
        )

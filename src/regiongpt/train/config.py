"""Training configuration: frozen dataclasses read from TOML, with dotted overrides from the command line."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from regiongpt.errors import ConfigError
from regiongpt.model.configuration import REFINEMENTS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the annotated photographs lie.

    Attributes:
        root: Folder with ``instances_<split>.json``, ``captions_<split>.json`` and ``images/``; usually given on the
            command line as ``--data.root``.
        split: Which of them to train on.
        mix: Turns of each task in a conversation, on average; the sampler's own mix where empty.
    """

    root: str = ""
    split: str = "train"
    mix: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The untrained model (paper §3.1).

    Attributes:
        vision: ``efficientnet-lite2``, or a folder or hub name of a CLIP, SigLIP, SigLIP 2 or DINOv2 tower.
        image_size: Side of the square tower input in pixels.
        refinement: ``deconv``, ``bilinear``, ``deconv_bilinear`` or ``none`` (paper Tab. 6).
        refinement_channels: Channels inside the refinement; 0 keeps the tower's own number.
        image_grid: Side of the square grid of image tokens; 0 keeps the tower's own grid.
        region_format: What each ``<regionN>`` becomes; ``{n}`` is its number, ``<region>`` its embedding.
        vocab_size: Size of the byte-level BPE that is trained for the language model.
        hidden_size: Width of the language model.
        layers: Layers of the language model.
        heads: Attention heads of the language model.
        mlp_size: Width of the language model's feed-forward layers.
        max_length: Positions of the language model, in tokens.
    """

    vision: str = "efficientnet-lite2"
    image_size: int = 576
    refinement: str = "deconv"
    refinement_channels: int = 384
    image_grid: int = 6
    region_format: str = "[{n}]<region>"
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
        epochs: Passes over the images; fractions are allowed.
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
        data: Annotated photographs.
        model: The untrained model.
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
        if not self.align.alignment:
            raise ConfigError("align.alignment: expected a number above 0, got 0; nothing else is learnt in that step")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a recipe and applies overrides.

    Args:
        path: A TOML file whose tables are the fields of :class:`TrainConfig`.
        overrides: Command-line words: ``--stage2.lr 5e-4`` or ``--stage2.lr=5e-4``, by dotted field name.

    Raises:
        ConfigError: The file is missing or is not TOML; a key is unknown (the message names the nearest one); a
            value is of another type or out of range.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable TOML file, got: {error}") from error
    for name, text in _pairs(overrides):
        target = values
        *parents, leaf = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--{name}: '{parent}' is a value, not a table")
        target[leaf] = _Text(text)
    return build(TrainConfig, values, "")


def build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds one dataclass from plain values, checking every key and type.

    Raises:
        ConfigError: See :func:`load_config`.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    hints = typing.get_type_hints(kind)
    made: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean '{where}{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown configuration key '{name}'; {hint}")
        made[key] = _convert(hints[key], value, name)
    return kind(**made)


class _Text(str):
    """A value from the command line: text whose type the field decides."""


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"expected an override such as '--stage2.lr 5e-4', got '{word}'")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{name}: expected a value after it, got nothing")
            value = rest.pop(0)
        pairs.append((name, value))
    return pairs


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected a table, got {value!r}")
        return build(typing.cast(type[Any], hint), value, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        items = [v for v in value.split(",") if v] if isinstance(value, _Text) else value
        if not isinstance(items, list):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], _Text(v) if isinstance(value, _Text) else v, name) for v in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: expected a table, got {value!r}")
        return {k: _convert(arguments[1], v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, _Text):
        return _parse(hint, value, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r}")
    return value


def _parse(hint: Any, text: str, name: str) -> Any:
    if hint is str:
        return str(text)
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"{name}: expected true or false, got '{text}'")
    try:
        return hint(text)
    except ValueError:
        raise ConfigError(f"{name}: expected {hint.__name__}, got '{text}'") from None

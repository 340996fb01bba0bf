"""Training configuration: frozen dataclasses read from TOML, with dotted overrides from the command line."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regiongpt.configuration import build, dotted, override, read_toml
from regiongpt.data.sampling import OUTLINE_SHARE
from regiongpt.errors import ConfigError
from regiongpt.model.configuration import REFINEMENTS

STEPS = ("language", "align", "stage1", "stage2")
"""The steps of a recipe that learn, in order; the first two belong to recipes on photographs."""

PRECISIONS = ("fp32", "bf16")
SHARDINGS = ("ddp", "fsdp")
EXTENDS = "extends"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the annotated photographs lie, or the records.

    Attributes:
        root: Folder with ``instances_<split>.json``, ``captions_<split>.json`` and ``images/``; usually given on the
            command line as ``--data.root``. With a mixture: the folder that its paths are relative to.
        split: Which of the photographs to train on.
        mix: Turns of each task in a conversation about a photograph, on average; the sampler's own mix where empty.
        suffixes: Whether guided questions end with the suffix that fixes the format of their answer (paper Table 1).
        outline_share: Share of the regions with an outline, in [0, 1], that are given by it rather than by their box.
        mixture: Records of stage 2 in place of photographs: a TOML file (:mod:`regiongpt.data.mixture`) or one folder
            of records. A stage that has none is left out.
        pretrain_mixture: Likewise of stage 1.
        dev_mixture: Likewise, never learnt from: the loss of their answers is what checkpoints are chosen by.
        dev_split: Likewise of the photographs; none where empty.
    """

    root: str = ""
    split: str = "train"
    mix: dict[str, float] = field(default_factory=dict)
    suffixes: bool = True
    outline_share: float = OUTLINE_SHARE
    mixture: str = ""
    pretrain_mixture: str = ""
    dev_mixture: str = ""
    dev_split: str = ""

    @property
    def on_records(self) -> bool:
        """Whether records are trained on, not annotated photographs."""
        return bool(self.mixture or self.pretrain_mixture)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The untrained model (paper §3.1), or the checkpoint to go on from.

    Attributes:
        init: A checkpoint folder, or ``nano`` for the model of the package; for records alone. It brings its own shape:
            what else is given here, with ``language``, is what it must have been made of.
        vision: ``efficientnet-lite2``, or a folder or hub name of a CLIP, SigLIP, SigLIP 2 or DINOv2 tower.
        language: Folder or hub name of a trained causal language model. Where it is empty, a recipe on photographs
            trains one of its own, in the shape that ``vocab_size`` and the fields after it give.
        image_size: Side of the square tower input in pixels; 0 for the tower's own.
        refinement: ``deconv``, ``bilinear``, ``deconv_bilinear`` or ``none`` (paper Tab. 6).
        refinement_channels: Channels inside the refinement; 0 keeps the tower's own number.
        connector_size: Width of the connector between its two layers; 0 for the language model's.
        image_grid: Side of the square grid of image tokens; 0 keeps the tower's own grid.
        region_format: What each ``<regionN>`` becomes; ``{n}`` is its number, ``<region>`` its embeddings.
        region_grid: Side of the square grid of embeddings that each region becomes; 1 for the paper's one embedding.
        region_numbers: Add the word embedding of a region's number to the region's own.
        image_marks: Add the word embedding of ``<image>`` to each image token's own.
        chat_template: A key of :data:`regiongpt.prompts.CHAT_TEMPLATES`; that of the language model's family where
            empty. The project's own language model is trained with ``plain``.
        vocab_size: Size of the byte-level BPE that is trained for the language model.
        hidden_size: Width of the language model.
        layers: Layers of the language model.
        heads: Attention heads of the language model.
        comparing_layers: First layers of the language model, or all where it has fewer, half of whose heads begin by
            attending to what is like the token that they read for (:mod:`regiongpt.train.matching`).
        mlp_size: Width of the language model's feed-forward layers.
        max_length: Positions of the language model, in tokens.
    """

    init: str = ""
    vision: str = "efficientnet-lite2"
    language: str = ""
    image_size: int = 0
    refinement: str = "deconv"
    refinement_channels: int = 0
    connector_size: int = 0
    image_grid: int = 0
    region_format: str = "<region>"
    region_grid: int = 1
    region_numbers: bool = False
    image_marks: bool = False
    chat_template: str = ""
    vocab_size: int = 4096
    hidden_size: int = 320
    layers: int = 5
    heads: int = 5
    comparing_layers: int = 0
    mlp_size: int = 832
    max_length: int = 1024

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"model.heads: expected a divisor of model.hidden_size={self.hidden_size}, got {self.heads}"
            )
        if self.comparing_layers < 0:
            raise ConfigError(f"model.comparing_layers: expected 0 or more, got {self.comparing_layers}")
        if self.refinement not in REFINEMENTS:
            raise ConfigError(f"model.refinement: expected one of {', '.join(REFINEMENTS)}, got '{self.refinement}'")
        if "<region>" not in self.region_format:
            raise ConfigError(f"model.region_format: expected a text with '<region>' in it, got {self.region_format!r}")
        if not 1 <= self.region_grid <= 16:
            raise ConfigError(f"model.region_grid: expected 1 to 16, got {self.region_grid}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the language model in stage 2, in place of its own weights.

    They are merged into the weights of the finished checkpoint, which is then like any other.

    Attributes:
        rank: Of the adapters; 0 for none, that is for training all of the language model.
        alpha: The adapters' output is scaled by ``alpha / rank``.
        dropout: On the adapters' input, in [0, 1).
        targets: Last names of the linear layers that get one, such as ``q_proj``; all but the head where empty.
    """

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                "lora: expected rank of at least 0, alpha above 0 and dropout in [0, 1), got "
                f"{self.rank}, {self.alpha} and {self.dropout}"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the arithmetic is done and spread; none of it changes what is learnt beyond rounding.

    Attributes:
        precision: ``fp32``, or ``bf16`` for matrix products in bfloat16 over weights that are kept in float32.
        sharding: Over several processes, ``ddp`` for a whole model on each, or ``fsdp`` for a share of its weights,
            gradients and optimiser on each (FSDP2).
        gradient_checkpointing: Whether the language model's layers are computed again in the backward pass instead of
            kept, a third more arithmetic for a fraction of the memory.
        compile: Whether ``torch.compile`` compiles the language model's layers.
        packing: Whether the conversations of a micro-batch lie end to end in as few rows as hold them, kept apart by
            attention and positions, rather than each in a padded row.
        pack_length: Most tokens in a packed row; 0 for as many as the language model reads.
        workers: Processes that load data ahead; 0 to load in the training process.
    """

    precision: str = "fp32"
    sharding: str = "ddp"
    gradient_checkpointing: bool = False
    compile: bool = False
    packing: bool = False
    pack_length: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("precision", self.precision, PRECISIONS), ("sharding", self.sharding, SHARDINGS)):
            if value not in known:
                raise ConfigError(f"engine.{name}: expected {' or '.join(known)}, got '{value}'")
        if self.pack_length < 0 or self.workers < 0:
            raise ConfigError(
                f"engine.pack_length and engine.workers: expected 0 or more, got {self.pack_length} and {self.workers}"
            )
        if self.pack_length and not self.packing:
            raise ConfigError(f"engine.pack_length: goes with engine.packing, got {self.pack_length} without it")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is kept, logged and reported of a run.

    Attributes:
        keep: Checkpoints that are kept of a stage, besides the best.
        dev_steps: Optimiser steps between measurements on the dev data; 0 for none.
        dev_items: Conversations in such a measurement.
        answer_steps: Optimiser steps between the answers on a few fixed dev regions; 0 for none.
        answers: How many such regions.
        tensorboard: Whether a TensorBoard log is written beside the JSON lines.
        report: Whether an HTML page about the run is written at its end.
    """

    keep: int = 2
    dev_steps: int = 0
    dev_items: int = 64
    answer_steps: int = 0
    answers: int = 4
    tensorboard: bool = False
    report: bool = True

    def __post_init__(self) -> None:
        if self.keep < 1 or min(self.dev_steps, self.answer_steps) < 0 or min(self.dev_items, self.answers) < 1:
            raise ConfigError(
                "watch: expected keep, dev_items and answers of at least 1, dev_steps and answer_steps of at least 0, "
                f"got {self.keep}, {self.dev_items}, {self.answers}, {self.dev_steps} and {self.answer_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """How much data a stage has, supposed where its records cannot be read.

    Attributes:
        records: In an epoch.
        text_tokens: Of a record, besides those of its image, on average.
        answer_tokens: How many of these are targets.
    """

    records: int = 0
    text_tokens: int = 0
    answer_tokens: int = 0

    def __post_init__(self) -> None:
        if self.records < 0 or not 0 <= self.answer_tokens <= self.text_tokens:
            raise ConfigError(
                "plan: expected records of at least 0 and no more answer_tokens than text_tokens, got "
                f"{self.records}, {self.answer_tokens} and {self.text_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What ``--plan`` supposes: the machines, and the data where the records are not at hand.

    Attributes:
        gpu: A name of :data:`regiongpt.train.gpus.GPUS`.
        gpus: How many.
        utilisation: Share of the GPU's peak arithmetic that is reached, in (0, 1]; the table's own where 0.
        sample: Most records that tokens are counted on; all of them where there are no more.
        stage1: The data of stage 1, where it cannot be read.
        stage2: Likewise of stage 2.
    """

    gpu: str = "a100-80gb"
    gpus: int = 1
    utilisation: float = 0.0
    sample: int = 256
    stage1: DataSize = field(default_factory=DataSize)
    stage2: DataSize = field(default_factory=DataSize)

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.sample < 1 or not 0 <= self.utilisation <= 1:
            raise ConfigError(
                "plan: expected gpus and sample of at least 1 and a utilisation in [0, 1], got "
                f"{self.gpus}, {self.sample} and {self.utilisation}"
            )


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """The cache of frozen tower features.

    Attributes:
        views: Views of each image: the whole one, then random crops, every other one mirrored.
        min_crop: Smallest side of a crop as a share of the image's side, in (0, 1].
        seed: Of the crops. It is not the recipe's, so that runs with other seeds can share what is cached.
        root: Folder of annotated photographs whose features are cached, of which those of ``data.root`` are a part;
            ``data.root`` where empty.
    """

    views: int = 2
    min_crop: float = 0.6
    seed: int = 0
    root: str = ""

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
        batch_size: Conversations in an optimiser step, over all processes.
        micro_batch_size: Conversations in a forward pass of one process; must divide ``batch_size``.
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
        if self.micro_batch_size < 1 or self.batch_size < 1 or self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size: expected a multiple of micro_batch_size={self.micro_batch_size}, got {self.batch_size}"
            )
        if not (0 < self.epochs < math.inf and 0 < self.lr < math.inf):
            raise ConfigError(f"epochs and lr: expected positive numbers, got {self.epochs} and {self.lr}")
        if self.visual_lr < 0 or self.alignment < 0:
            raise ConfigError(
                f"visual_lr and alignment: expected numbers of at least 0, got {self.visual_lr} and {self.alignment}"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"warmup_ratio: expected a share in [0, 1), got {self.warmup_ratio}")
        if self.save_steps < 1 or self.log_steps < 1:
            raise ConfigError(
                f"save_steps and log_steps: expected at least 1, got {self.save_steps} and {self.log_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole recipe: language model, alignment, stage 1 and stage 2 (paper §3.2 and §4).

    Attributes:
        out: Folder of the run: feature cache, checkpoints and the finished model.
        seed: Seed of every random number, together with an index and an epoch.
        steps: Which of :data:`STEPS` to run, those that have data where empty. A step that is left out must have left
            its result in ``out`` before.
        from_scratch: Whether stage 2 may begin with a refinement and a connector that stage 1 has not trained.
        resume: ``auto`` goes on where the run in ``out`` stopped, ``never`` puts its results aside and begins anew, the
            folder of a checkpoint goes on from it; see :mod:`regiongpt.train.resuming`.
        isolated_share: Share of the training conversations, in [0, 1], whose turns do not see each other.
        data: Annotated photographs, or records.
        model: The untrained model, or the checkpoint to go on from.
        lora: Adapters on the language model in stage 2.
        engine: Precision, sharding, memory.
        watch: Checkpoints, logs, reports.
        plan: What `--plan` supposes.
        features: Feature cache.
        language: Text-only pre-training of the language model.
        align: Refinement and connector, by the alignment alone.
        stage1: Refinement and connector; the language model is frozen.
        stage2: Refinement, connector and language model.
    """

    out: str = "runs/nano"
    seed: int = 0
    steps: tuple[str, ...] = ()
    from_scratch: bool = False
    resume: str = "auto"
    isolated_share: float = 0.8
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
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
        wrong = [name for name in self.steps if name not in STEPS]
        if wrong:
            raise ConfigError(f"steps: expected some of {', '.join(STEPS)}, got '{wrong[0]}'")
        if self.data.on_records:
            self._check_records()
        if self.lora.rank and not self.runs("stage2"):
            raise ConfigError(
                f"lora.rank: the adapters belong to stage 2, which this recipe does not run, got {self.lora.rank}"
            )

    def _check_records(self) -> None:
        if not self.model.init and not self.model.language:
            raise ConfigError(
                "model.init: expected the checkpoint to train on records, a folder or 'nano', got none; give "
                "--model.init, or a tower and a language model to join: --model.vision and --model.language"
            )
        if self.stage1.alignment or self.stage2.alignment:
            raise ConfigError(
                "alignment: goes with annotated photographs, whose objects have COCO's classes, not with a mixture of "
                "records; leave it out"
            )

    def runs(self, step: str) -> bool:
        """Whether a step of :data:`STEPS` is to be run, by ``steps`` and by what data there is."""
        if self.steps and step not in self.steps:
            return False
        if self.data.on_records:
            return bool({"stage1": self.data.pretrain_mixture, "stage2": self.data.mixture}.get(step))
        return step != "language" or not self.model.language


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a recipe and applies overrides.

    A recipe may begin with ``extends = ["other.toml"]``: recipes beside it that it takes its values from, the later
    ones over the earlier, its own over theirs. What was inherited and goes with another kind of data is left out.

    Args:
        path: A TOML file whose tables are the fields of :class:`TrainConfig`.
        overrides: Command-line words: ``--stage2.lr 5e-4`` or ``--stage2.lr=5e-4``, by dotted field name.

    Raises:
        ConfigError: The file is missing or is not TOML; a key is unknown (the message names the nearest one); a
            value is of another type or out of range; a key does not go with the kind of data.
    """
    inherited, own = _read(Path(path), ())
    override(own, overrides)
    config = build(TrainConfig, _merged(inherited, own))
    for name in dotted(own):
        _check_use(name, config)
    return config


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that a recipe inherits, and its own."""
    own = read_toml(path)
    bases = own.pop(EXTENDS, [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: expected a list of recipes, got {bases!r}")
    inherited: dict[str, Any] = {}
    for base in bases:
        other = path.parent / base
        if other.resolve() in (child.resolve() for child in (*children, path)):
            raise ConfigError(f"{path}: extends: expected recipes that do not extend this one, got '{base}'")
        inherited = _merged(inherited, _merged(*_read(other, (*children, path))))
    return inherited, own


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two sets of tables as one, the second's values over the first's."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


_OF_RECORDS = (
    *("out", "seed", "steps", "from_scratch", "resume"),
    *("data.root", "data.mixture", "data.pretrain_mixture", "data.dev_mixture", "data.suffixes", "model.init"),
)
_OF_NEW_MODELS = tuple(
    f"model.{name}"
    for name in (
        *("vision", "language", "image_size", "refinement", "refinement_channels", "connector_size"),
        *("image_grid", "region_format", "region_grid", "region_numbers", "image_marks", "chat_template"),
    )
)


def is_read(name: str, config: TrainConfig) -> bool:
    """Whether a field, by its dotted name, goes with the rest of a recipe: a checkpoint brings its own shape, say."""
    try:
        _check_use(name, config)
    except ConfigError:
        return False
    return True


def _check_use(name: str, config: TrainConfig) -> None:
    """Raises ConfigError for a value that was given and that nothing would read."""
    table, _, leaf = name.partition(".")
    if table == "lora" and not config.lora.rank and name != "lora.rank":
        raise ConfigError(f"{name}: goes with adapters, whose lora.rank is 0; give lora.rank too, or leave it out")
    if table in ("lora", "engine", "watch", "plan"):
        return
    if not config.data.on_records:
        if name == "model.init" and config.model.init:
            raise ConfigError(
                "model.init: a checkpoint is trained further on records alone; give data.mixture or "
                "data.pretrain_mixture too, or leave it out"
            )
        if name == "data.dev_mixture":
            raise ConfigError("data.dev_mixture: goes with records, not with photographs; give data.dev_split")
        return
    missing = {"stage1": "data.pretrain_mixture", "stage2": "data.mixture"}.get(table)
    if missing and leaf != "alignment":
        if not (config.data.pretrain_mixture if table == "stage1" else config.data.mixture):
            raise ConfigError(f"{name}: {table} has no records to train on; give {missing} too, or leave it out")
    elif name in _OF_NEW_MODELS:
        if config.model.init and not config.model.language:
            raise ConfigError(
                f"{name}: goes with a new model, not with the checkpoint {config.model.init}, which brings its own "
                "shape; leave it out"
            )
    elif name not in _OF_RECORDS:
        raise ConfigError(
            f"{name}: goes with annotated photographs, not with a mixture of records, whose shape of model, images and "
            "turns are those of model.init and of the records; leave it out"
        )

"""Training recipes: TOML files and command-line overrides, checked before anything is computed."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from regiongpt.distributed import launched
from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.prompts import CHAT_TEMPLATES, QUESTIONS
from regiongpt.settings import Settings, nearest, override
from regiongpt.train.known import GPUS

Count = Annotated[int, Field(ge=1, le=10**9)]
Limit = Annotated[int, Field(ge=0, le=10**9)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
Step = Literal["language", "align", "stage1", "stage2"]

STEPS: tuple[Step, ...] = get_args(Step)
"""Training steps of a recipe, in order; the first two belong to recipes on photographs."""

MOST_REGION_GRID = 4
"""Largest ``region_grid`` whose regions fit into the windows of text that the recipe's own language model reads."""

SHORTEST_TEXT = 160
"""Fewest tokens that questions and answers need beside the image."""

_PACKAGE = Path(__file__).parents[1]
_SHIPPED = _PACKAGE / "configs"


def find_config(path: str | Path) -> Path:
    """A TOML file, or one that comes with the package: ``nano``, ``configs/nano.toml``, ``configs/data/finetune.toml``.

    Returns:
        The path as it is if it exists or no file of the package bears that name.
    """
    name = Path(path).as_posix().removeprefix("configs/").removesuffix(".toml")
    shipped = {each.relative_to(_SHIPPED).with_suffix("").as_posix(): each for each in _SHIPPED.rglob("*.toml")}
    return Path(path) if Path(path).is_file() else shipped.get(name, Path(path))


class DataConfig(Settings):
    """Annotated photographs or records to train on."""

    root: str = ""
    """Folder with ``instances_<split>.json``, ``captions_<split>.json`` and ``images/``; for records the folder that a
    mixture's paths are relative to."""
    split: str = Field("train", min_length=1)
    """Split of the photographs to train on."""
    mix: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(default_factory=dict)
    """Average number of turns per task in a conversation about a photograph; the sampler's own mix when empty."""
    suffixes: bool = True
    """End guided questions with the suffix that fixes the format of the answer (paper, Table 1)."""
    outline_share: Share = 0.5
    """Share of the regions with an outline that are given by it rather than by their box."""
    mixture: str = ""
    """Records for stage 2: a mixture (TOML) or one folder of records. A stage without records is skipped."""
    pretrain_mixture: str = ""
    """Records for stage 1."""
    dev_mixture: str = ""
    """Held-out records; their loss picks the best checkpoint."""
    dev_split: str = ""
    """Held-out photographs, by their split; none when empty."""

    @field_validator("mixture", "pretrain_mixture", "dev_mixture")
    @classmethod
    def _find_mixture(cls, value: str) -> str:
        return str(find_config(value)) if value.endswith(".toml") else value

    @field_validator("mix")
    @classmethod
    def _check_mix(cls, value: dict[str, float]) -> dict[str, float]:
        for task in value:
            if task not in QUESTIONS:
                raise ValueError(f"unknown task '{task}'; {nearest(task, QUESTIONS)}")
        if value and not any(value.values()):
            raise ValueError("give a number above 0 for some task")
        return value

    @property
    def on_records(self) -> bool:
        """Whether the recipe trains on records rather than annotated photographs."""
        return bool(self.mixture or self.pretrain_mixture)


class ModelConfig(Settings):
    """The new model (paper §3.1), or the checkpoint to continue from."""

    init: str = ""
    """Checkpoint folder to continue from, or ``nano``; needs records. It brings its own shape: the rest of this table
    then describes, with ``language``, what it must be made of."""
    vision: str = Field("efficientnet-lite2", min_length=1)
    """Vision tower: ``efficientnet-lite2``, or folder or hub name of a CLIP, SigLIP, SigLIP 2 or DINOv2 model."""
    language: str = ""
    """Folder or hub name of a causal language model. When empty, a recipe on photographs trains its own, in the shape
    given by ``vocab_size`` and the fields below it."""
    image_size: int = Field(0, ge=0, le=2**14)
    """Side of the square tower input in pixels; 0 for the tower's own."""
    refinement: Literal["deconv", "bilinear", "deconv_bilinear", "none"] = "deconv"
    """Module that refines the feature map (paper, Table 6)."""
    refinement_channels: int = Field(0, ge=0, le=2**20)
    """Channels inside the refinement; 0 for the tower's."""
    connector_size: int = Field(0, ge=0, le=2**20)
    """Hidden width of the connector; 0 for the language model's."""
    image_grid: int = Field(0, ge=0, le=2**10)
    """Side of the square grid of image tokens; 0 for the tower's own grid."""
    region_format: str = "<region>"
    """What ``<regionN>`` becomes: ``{n}`` is its number, ``<region>`` its embeddings."""
    region_grid: int = Field(1, ge=1, le=16)
    """Side of the square grid of embeddings per region; the paper has one embedding."""
    region_numbers: bool = False
    """Add the word embedding of a region's number to the region's embedding."""
    image_marks: bool = False
    """Add the word embedding of ``<image>`` to each image token."""
    chat_template: str = ""
    """Chat template: vicuna_v1, llama2, llama3, chatml or plain; guessed from the language model when empty."""
    vocab_size: int = Field(4096, ge=300, le=2**20)
    """Size of the byte-level BPE vocabulary."""
    hidden_size: Size = 320
    """Width of the language model."""
    layers: int = Field(5, ge=1, le=1000)
    """Layers of the language model."""
    heads: Size = 5
    """Attention heads of the language model; the width of a head must be even."""
    comparing_layers: int = Field(0, ge=0, le=1000)
    """First layers in which half of the heads start out attending to similar tokens
    (:mod:`regiongpt.train.alignment`)."""
    mlp_size: Size = 832
    """Width of the feed-forward layers."""
    max_length: int = Field(1024, ge=SHORTEST_TEXT, le=2**24)
    """Context of the language model in tokens."""

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint to continue from."""
        return _PACKAGE / "weights" / "nano" if self.init == "nano" else Path(self.init)

    @field_validator("region_format")
    @classmethod
    def _check_format(cls, value: str) -> str:
        rest = value.replace("{n}", "")
        if value.count("<region>") != 1 or "{" in rest or "}" in rest:
            raise ValueError("write <region> once, and {n} for its number, as in '[{n}]<region>'")
        return value

    @field_validator("chat_template")
    @classmethod
    def _check_template(cls, value: str) -> str:
        if value and value not in CHAT_TEMPLATES:
            raise ValueError(f"unknown chat template; {nearest(value, CHAT_TEMPLATES)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be an even multiple of heads = {self.heads}, got {self.hidden_size}")
        if self.region_numbers and "{n}" not in self.region_format.partition("<region>")[0]:
            raise ValueError("region_numbers needs '{n}' before '<region>' in region_format, as in '[{n}]<region>'")
        if self.vision.startswith("efficientnet") and self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32 with {self.vision}, got {self.image_size}")
        if self.init or self.language:
            return self
        if self.region_grid > MOST_REGION_GRID:
            raise ValueError(
                f"region_grid must be at most {MOST_REGION_GRID} if the recipe trains its own language model, got "
                f"{self.region_grid}; give a trained one as model.language"
            )
        # A grid of the tower's own has at least the cells of a stride of 32.
        cells = (self.image_grid or self.image_size // 32) ** 2
        if cells + SHORTEST_TEXT > self.max_length:
            raise ValueError(
                f"max_length = {self.max_length} fits no question beside the {cells} tokens of an image; give at "
                f"least {cells + SHORTEST_TEXT}, or a smaller image_grid"
            )
        return self


class LoraConfig(Settings):
    """Low-rank adapters that stage 2 trains instead of the language model; merged into the finished checkpoint."""

    rank: int = Field(0, ge=0, le=2**16)
    """Rank of the adapters; 0 trains the language model itself."""
    alpha: int = Field(16, ge=1, le=2**16)
    """The adapters' output is scaled by ``alpha / rank``."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] = ()
    """Layer names such as ``q_proj``; all linear layers but the head when empty."""


class EngineConfig(Settings):
    """How the training is computed; nothing here changes the result beyond rounding."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` multiplies matrices in bfloat16; weights stay in float32."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Over several processes: ``ddp`` keeps the whole model on each, ``fsdp`` a share of it (FSDP2)."""
    gradient_checkpointing: bool = False
    """Recompute the language model's activations in the backward pass: a third more FLOPs, far less memory."""
    compile: bool = False
    """Compile the language model's layers with ``torch.compile``."""
    packing: bool = False
    """Lay the conversations of a micro-batch end to end instead of padding them."""
    pack_length: Limit = 0
    """Longest packed row in tokens; 0 for the language model's context."""
    workers: int = Field(0, ge=0, le=1024)
    """Data-loading processes; 0 loads in the training process."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pack_length and not self.packing:
            raise ValueError("pack_length needs packing = true")
        return self


class WatchConfig(Settings):
    """What is kept, logged and reported."""

    keep: Count = 2
    """Checkpoints to keep per stage, besides the best."""
    dev_steps: Limit = 0
    """Optimiser steps between measurements of the dev loss; 0 for none."""
    dev_items: Count = 64
    """Conversations in a measurement."""
    answer_steps: Limit = 0
    """Optimiser steps between answers on a few fixed dev regions; 0 for none."""
    answers: int = Field(4, ge=1, le=1000)
    """Number of these regions."""
    tensorboard: bool = False
    """Write a TensorBoard log beside the JSON lines."""
    report: bool = True
    """Write an HTML report when the run ends."""


class DataSize(Settings):
    """Assumed size of a stage's data, for ``--plan`` where its records cannot be read."""

    records: Limit = 0
    """Records per epoch."""
    text_tokens: Limit = 0
    """Tokens per record on average, without those of the image."""
    answer_tokens: Limit = 0
    """How many of these are supervised."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answer_tokens > self.text_tokens:
            raise ValueError(f"answer_tokens must not exceed text_tokens = {self.text_tokens}")
        return self


class PlanConfig(Settings):
    """Machines and data that ``--plan`` assumes."""

    gpu: str = "a100-80gb"
    """A name from the table in :mod:`regiongpt.train.known`."""
    gpus: Count = 1
    """Number of GPUs."""
    utilisation: Share = 0.0
    """Share of the GPU's peak FLOP/s that is reached; 0 for the table's."""
    sample: Count = 256
    """Most records to count tokens on."""
    stage1: DataSize = DataSize()
    stage2: DataSize = DataSize()

    @field_validator("gpu")
    @classmethod
    def _check_gpu(cls, value: str) -> str:
        if value not in GPUS:
            raise ValueError(f"unknown GPU; {nearest(value, GPUS)}")
        return value


class FeatureConfig(Settings):
    """Cached features of the frozen tower."""

    views: int = Field(2, ge=1, le=1000)
    """Views of each image: the whole one, then random crops, every other one mirrored."""
    min_crop: float = Field(0.6, gt=0, le=1)
    """Smallest side of a crop as a share of the image's side."""
    seed: Seed = 0
    """Seed of the crops; apart from the recipe's, so that runs with other seeds share the cache."""
    root: str = ""
    """Folder of photographs to cache, of which those of ``data.root`` are a part; ``data.root`` when empty."""


class StageConfig(Settings):
    """Hyper-parameters of one training step."""

    epochs: float = Field(1.0, gt=0, le=10**6)
    """Passes over the images or the mixture; may be a fraction."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate after warm-up; a cosine takes it to zero."""
    visual_lr: NonNegativeFloat = 0.0
    """Learning rate of refinement and connector; 0 for ``lr``."""
    alignment: NonNegativeFloat = 0.0
    """Weight of a region's alignment with its class's name, in supervised tokens
    (:mod:`regiongpt.train.alignment`)."""
    batch_size: Size = 32
    """Conversations per optimiser step, over all processes."""
    micro_batch_size: Size = 16
    """Conversations per forward pass of one process; must divide ``batch_size``."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps spent warming up."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay of the matrices."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm to clip to."""
    save_steps: Count = 200
    """Optimiser steps between checkpoints."""
    log_steps: Count = 20
    """Optimiser steps between log lines."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size = {self.micro_batch_size}, got {self.batch_size}"
            )
        return self


class Recipe(Settings):
    """A training run: language model, alignment, stage 1 and stage 2 (paper §3.2 and §4)."""

    out: Path = Path("runs/nano")
    """Folder of the run: feature cache, checkpoints, reports and the finished model."""
    seed: Seed = 0
    """Seed of every random number, together with an index and an epoch."""
    steps: tuple[Step, ...] = ()
    """Steps to run, of ``language``, ``align``, ``stage1`` and ``stage2``; all that have data when empty. The result of
    a step that is left out must be in ``out`` already."""
    from_scratch: bool = False
    """Let stage 2 start from an untrained refinement and connector."""
    resume: str = Field("auto", min_length=1)
    """``auto`` continues the run in ``out``, ``never`` sets it aside and starts over, the folder of a checkpoint
    continues from it."""
    isolated_share: Share = 0.8
    """Share of the conversations about photographs whose turns do not attend to each other."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    engine: EngineConfig = EngineConfig()
    watch: WatchConfig = WatchConfig()
    plan: PlanConfig = PlanConfig()
    features: FeatureConfig = FeatureConfig()
    language: StageConfig = StageConfig()
    """Text-only pre-training of the language model."""
    align: StageConfig = StageConfig(alignment=1.0)
    """Refinement and connector, by alignment alone."""
    stage1: StageConfig = StageConfig()
    """Refinement and connector; the language model is frozen."""
    stage2: StageConfig = StageConfig()
    """Refinement, connector and language model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data.on_records and not self.align.alignment:
            raise ValueError("align.alignment: give a number above 0; the step learns nothing else")
        if self.data.on_records and not self.model.init and not self.model.language:
            raise ValueError("give model.init, or model.vision and model.language, to train on records")
        if self.data.on_records and not any(map(self.runs, STEPS)):
            raise ValueError("steps: none of them has records; give data.pretrain_mixture or data.mixture")
        if self.lora.rank and not self.runs("stage2"):
            raise ValueError("lora.rank: adapters belong to stage 2, which this recipe does not run")
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe and apply overrides.

        Args:
            path: A TOML file, or the name of a shipped recipe such as ``nano``; ``extends = ["other.toml"]`` names
                recipes beside it whose values it changes.
            overrides: Command-line words, by dotted name: ``--stage2.lr 5e-4`` or ``--stage2.lr=5e-4``.

        Raises:
            ConfigError: There is no such file; it is no TOML; a setting is unknown, cannot be used, does not go with
                the others, or, unless it was inherited, would not be read.
        """
        path = find_config(path) if path is not None else None
        if path is not None and not path.is_file():
            names = sorted(each.stem for each in _SHIPPED.glob("*.toml"))
            raise ConfigError(f"{path}: no such recipe; {nearest(path.stem, names)}")
        recipe = super().load(path, overrides)
        own = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
        own.pop("extends", None)
        for name in dotted(override(own, overrides)):
            if why := recipe.unused(name):
                raise ConfigError(f"{name}: {why}, or leave it out")
        return recipe

    def check_files(self) -> None:
        """Check that data, checkpoints and processes are what the recipe needs, without loading anything heavy.

        Raises:
            ConfigError: The data folder is not given, the recipe cannot be trained by several processes, or stage 2
                comes first.
            DataError: Annotations or records are missing.
            CheckpointError: The checkpoint to continue from is missing.
        """
        data = self.data
        if self.resume not in ("auto", "never") and not Path(self.resume).is_dir():
            raise CheckpointError(f"resume: {self.resume}: no such checkpoint folder; give one, or auto or never")
        if data.on_records:
            from regiongpt.data.mixture import find_parts

            for mixture in filter(None, (data.pretrain_mixture, data.mixture, data.dev_mixture)):
                find_parts(mixture, data.root)
            if self.with_start().model.init and not (self.model.folder / "config.json").is_file():
                raise CheckpointError(f"model.init: {self.model.init}: no checkpoint there; give another, or nano")
            return
        from regiongpt.data.coco import photo_sources

        if launched() > 1:
            raise ConfigError("a recipe on photographs runs in one process; several need records (data.mixture)")
        if not data.root:
            raise ConfigError("data.root: give the folder of the annotated photographs, --data.root DIR")
        photo_sources(Path(data.root), data.split)
        if self.features.root:
            photo_sources(Path(self.features.root), data.split)
        if data.dev_split:
            photo_sources(Path(data.root), data.dev_split)

    def with_start(self) -> Self:
        """The recipe with ``model.init`` left out if stage 2 is to start from a new, untrained model.

        Raises:
            ConfigError: Stage 2 comes first, and ``from_scratch`` is not given.
        """
        init = self.model.init
        trained = init and (self.model.folder / "config.json").is_file()
        stage1 = self.runs("stage1") or any((self.out / stage / "model").exists() for stage in ("stage1", "stage2"))
        if trained or stage1 or not self.model.language:
            return self
        if not self.from_scratch:
            raise ConfigError(
                f"stage 2 needs a checkpoint that stage 1 has trained, got "
                f"{f'{init}, where there is none' if init else 'none'}; run stage 1 first and give its result as "
                "model.init, or give --from-scratch"
            )
        return self.replace(model=self.model.replace(init=""))

    def runs(self, step: str) -> bool:
        """Whether a step is to be run, given ``steps`` and the data."""
        if self.steps and step not in self.steps:
            return False
        if self.data.on_records:
            return bool({"stage1": self.data.pretrain_mixture, "stage2": self.data.mixture}.get(step))
        return step != "language" or not self.model.language

    def unused(self, name: str) -> str:
        """Why nothing would read a setting, and what would change that; empty if something does.

        Args:
            name: Dotted name.
        """
        table = name.partition(".")[0]
        data, model, on_records = self.data, self.model, self.data.on_records
        dev = data.dev_mixture if on_records else data.dev_split
        for_photographs = any(f"{name}.".startswith(f"{each}.") for each in _FOR_PHOTOGRAPHS)
        if table == "lora" and not self.lora.rank and name != "lora.rank":
            return "lora.rank is 0; give lora.rank too"
        if on_records and for_photographs:
            return "goes with annotated photographs; give no records"
        if on_records and table == "stage1" and not data.pretrain_mixture:
            return "stage1 has no records to train on; give data.pretrain_mixture too"
        if on_records and table == "stage2" and not data.mixture:
            return "stage2 has no records to train on; give data.mixture too"
        if on_records and table == "model" and name != "model.init" and model.init and not model.language:
            return f"the checkpoint {model.init} brings its own shape; give a new model's parts instead of model.init"
        measured = self.watch.dev_steps or self.watch.answer_steps
        if name in ("data.dev_mixture", "data.dev_split") and dev and not measured:
            return "nothing is measured on it; give watch.dev_steps or watch.answer_steps too"
        if name in ("watch.dev_steps", "watch.dev_items") and self.watch.dev_steps and not dev:
            return "there is no dev data; give data.dev_mixture or data.dev_split too"
        if not on_records and name == "model.init" and model.init:
            return "a checkpoint is trained further on records alone; give data.mixture too"
        if not on_records and name == "model.chat_template" and not model.language:
            return "the recipe's own language model has the plain template; give model.language too"
        if not on_records and name == "data.dev_mixture" and data.dev_mixture:
            return "goes with records; give data.dev_split"
        return ""


_FOR_PHOTOGRAPHS = (
    *("isolated_share", "features", "language", "align", "stage1.alignment", "stage2.alignment"),
    *(f"data.{name}" for name in ("split", "mix", "outline_share", "dev_split")),
    *(f"model.{name}" for name in ("vocab_size", "hidden_size", "layers", "heads")),
    *(f"model.{name}" for name in ("comparing_layers", "mlp_size", "max_length")),
)


def dotted(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted names: ``{"seed": 0, "stage2.lr": 1e-3}``."""
    names: dict[str, Any] = {}
    for key, value in values.items():
        names |= dotted(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return names

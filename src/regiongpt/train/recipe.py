"""Training recipes: TOML files and command-line overrides, checked before anything is computed; and what they name."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.settings import Settings, nearest, override

Count = Annotated[int, Field(ge=1, le=10**9)]
Limit = Annotated[int, Field(ge=0, le=10**9)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1e3)]
Step = Literal["stage1", "stage2"]

_PACKAGE = Path(__file__).parents[1]
_SHIPPED = _PACKAGE / "configs"
_RECIPES = _PACKAGE.parents[1] / "recipes"


def find_config(path: str | Path) -> Path:
    """A TOML file, or one that ships by its name, such as ``table6_none`` or ``configs/data/finetune.toml``."""
    if Path(path).is_file():
        return Path(path)
    name = Path(path).as_posix().removeprefix("configs/").removesuffix(".toml")
    shipped = {each.stem: each for each in _RECIPES.glob("*/*.toml")}
    shipped |= {each.relative_to(_SHIPPED).with_suffix("").as_posix(): each for each in _SHIPPED.rglob("*.toml")}
    return shipped.get(name, Path(path))


def own_script(path: str | Path) -> Path | None:
    """The script beside a recipe that has steps of its own, as nano's; None if the package trains it."""
    script = find_config(path).parent / "train.py"
    return script if find_config(path).is_file() and script.is_file() else None


class Gpu(NamedTuple):
    """One kind of GPU."""

    bf16: float  # peak of dense matrix products in bfloat16 that are summed in float32, in TFLOP/s
    fp32: float  # the same in float32, without TF32
    memory: float  # GiB
    utilisation: float = 0.4  # share of the peak that a well-run training reaches; assumed, not measured here

    def peak(self, precision: str) -> float:
        """FLOP/s in ``bf16`` or ``fp32``."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


_KNOWN: Final = tomllib.loads(Path(__file__).with_name("known.toml").read_text(encoding="utf-8"))
GPUS: Final = {name: Gpu(**values) for name, values in _KNOWN["gpus"].items()}
"""By the name that ``plan.gpu`` takes."""


class DataConfig(Settings):
    """Records to train on."""

    root: str = ""
    """Folder that a mixture's paths are relative to; empty: the mixture's own folder."""
    suffixes: bool = True
    """End guided questions with the suffix that fixes the format of the answer (paper, Table 1)."""
    mixture: str = ""
    """Records for stage 2: a mixture (TOML) or one folder of records. A stage without records is skipped."""
    pretrain_mixture: str = ""
    """Records for stage 1."""
    dev_mixture: str = ""
    """Held-out records; their loss picks the best checkpoint."""

    @field_validator("mixture", "pretrain_mixture", "dev_mixture")
    @classmethod
    def _find_mixture(cls, value: str) -> str:
        return str(find_config(value)) if value.endswith(".toml") else value


class ModelConfig(Settings):
    """The new model (paper §3.1), or the checkpoint to continue from."""

    init: str = ""
    """Checkpoint folder to continue from, or ``nano``; with ``language``, the rest says what it must be."""
    vision: str = Field("efficientnet-lite2", min_length=1)
    """Vision tower: ``efficientnet-lite2``, or folder or hub name of a CLIP, SigLIP, SigLIP 2 or DINOv2 model."""
    language: str = ""
    """Folder or hub name of a causal language model."""
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
    """Replacement of ``<regionN>``: ``{n}`` is its number, ``<region>`` its embedding."""
    region_numbers: bool = False
    """Add the word embedding of a region's number to the region's embedding."""
    image_marks: bool = False
    """Add the word embedding of ``<image>`` to each image token."""
    region_position: float = Field(0.0, ge=0, le=100)
    """Length of the position and size code added to a region's embedding; 0 for none."""
    region_crop: bool = False
    """Add features of a region's own crop, dropped in half the examples, for ``--detail careful``."""
    chat_template: str = ""
    """Chat template, one that ``regiongpt weights create --help`` lists; guessed from the language model when empty."""

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint to continue from."""
        return _PACKAGE / "weights" / "nano" if self.init == "nano" else Path(self.init)


class LoraConfig(Settings):
    """Low-rank adapters that stage 2 trains instead of the language model; merged into the finished checkpoint."""

    rank: int = Field(0, ge=0, le=2**16)
    """Rank of the adapters; 0 trains the language model itself."""
    alpha: int = Field(16, ge=1, le=2**16)
    """The adapters' output is scaled by ``alpha / rank``."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""


class EngineConfig(Settings):
    """How training is computed; affects results only by rounding."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` multiplies matrices in bfloat16; weights stay in float32."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Over several processes: ``ddp`` keeps the whole model on each, ``fsdp`` a share of it (FSDP2)."""
    gradient_checkpointing: bool = False
    """Recompute the language model's activations in the backward pass: a third more FLOPs, far less memory."""
    packing: bool = False
    """Pack the conversations of a micro-batch end to end instead of padding them."""
    workers: int = Field(0, ge=0, le=1024)
    """Data-loading processes; 0 loads in the training process."""


class WatchConfig(Settings):
    """Checkpoints and logs."""

    keep: Count = 2
    """Checkpoints to keep per stage, besides the best."""
    dev_steps: Limit = 0
    """Optimiser steps between measurements of the dev loss; 0 for none."""
    dev_items: Count = 64
    """Conversations in a measurement."""
    tensorboard: bool = False
    """Also log to TensorBoard."""


class DataSize(Settings):
    """Assumed size of a stage's data, for ``--plan``."""

    records: Limit = 0
    """Records per epoch, where they cannot be counted."""
    text_tokens: Limit = 200
    """Tokens per record on average, without those of the image."""
    answer_tokens: Limit = 100
    """How many of these are supervised."""


class PlanConfig(Settings):
    """Machines and data that ``--plan`` assumes."""

    gpu: str = "a100-80gb"
    """Kind of GPU, by its name in :data:`GPUS`."""
    gpus: Count = 1
    """Number of GPUs."""
    stage1: DataSize = DataSize()
    stage2: DataSize = DataSize()

    @field_validator("gpu")
    @classmethod
    def _check_gpu(cls, value: str) -> str:
        if value not in GPUS:
            raise ValueError(f"unknown GPU; {nearest(value, GPUS)}")
        return value


class StageConfig(Settings):
    """Hyper-parameters of one training step."""

    epochs: float = Field(1.0, gt=0, le=10**6)
    """Passes over the data; may be a fraction."""
    lr: Rate = 1e-3
    """Peak learning rate after warm-up; a cosine takes it to zero."""
    visual_lr: float = Field(0.0, ge=0, le=1e3)
    """Learning rate of refinement and connector; 0 for ``lr``."""
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
            known = f"micro_batch_size = {self.micro_batch_size}"
            raise ValueError(f"batch_size must be a multiple of {known}, got {self.batch_size}")
        return self


class Recipe(Settings):
    """A training run in the paper's two stages (§3.2 and §4)."""

    all_steps: ClassVar[tuple[str, ...]] = ("stage1", "stage2")
    """Steps that a recipe of this kind can have, in order."""

    out: Path = Path("runs/model")
    """Folder of the run: checkpoints, logs and the finished model."""
    seed: Seed = 0
    """Seed of every random number, together with an index and an epoch."""
    steps: tuple[Step, ...] = ()
    """Steps to run; empty: all that have data. Results of other steps must be in ``out`` already."""
    from_scratch: bool = False
    """Let stage 2 start from an untrained refinement and connector."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    engine: EngineConfig = EngineConfig()
    watch: WatchConfig = WatchConfig()
    plan: PlanConfig = PlanConfig()
    stage1: StageConfig = StageConfig()
    """Refinement and connector; the language model is frozen."""
    stage2: StageConfig = StageConfig()
    """Refinement, connector and language model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model.init and not self.model.language:
            raise ValueError("give model.init, or model.vision and model.language")
        if not any(map(self.runs, self.all_steps)):
            raise ValueError("steps: none of them has records; give data.pretrain_mixture or data.mixture")
        if self.lora.rank and not self.runs("stage2"):
            raise ValueError("lora.rank: adapters need stage 2, which this recipe does not run")
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe, a TOML file or the name of one that ships, and apply overrides such as ``--stage2.lr 5e-4``.

        ConfigError where there is no such recipe, or a setting, unless it was inherited, would not be read.
        """
        path = None if path is None else find_config(path)
        if path and not path.is_file():
            known = nearest(path.stem, sorted(each.stem for each in _SHIPPED.glob("*.toml")))
            what = "a folder; give a recipe's TOML file" if path.is_dir() else f"no such recipe; {known}"
            raise ConfigError(f"{path}: {what}")
        if cls is Recipe and path and (script := own_script(path)):
            raise ConfigError(f"{path}: has steps of its own; run python {script}")
        recipe = super().load(path, overrides)
        own = tomllib.loads(path.read_text(encoding="utf-8-sig")) if path else {}
        own.pop("extends", None)
        for name in dotted(override(own, overrides)):
            if why := recipe.unused(name):
                raise ConfigError(f"{name}: {why}, or leave it out")
        return recipe

    def check_files(self) -> None:
        """Raise a RegionGPTError if data or a checkpoint is missing; loads nothing heavy."""
        from regiongpt.data.shards import find_parts

        for mixture in filter(None, (self.data.pretrain_mixture, self.data.mixture, self.data.dev_mixture)):
            find_parts(mixture, self.data.root)
        init = self.model.init
        if init and not (self.model.folder / "config.json").is_file():
            told = "run stage 1 first, or give another, or '' for a new model"
            raise CheckpointError(f"model.init: {init}: no checkpoint there; {told}")
        if not (init or self.from_scratch or self.runs("stage1") or (self.out / "stage1" / "model").exists()):
            how = "run stage 1 first and give its result as model.init, or give --from-scratch"
            raise ConfigError(f"stage 2 needs a model that stage 1 has trained; {how}")

    def runs(self, step: str) -> bool:
        """Whether a step is to be run, given ``steps`` and the data."""
        data = {"stage1": self.data.pretrain_mixture, "stage2": self.data.mixture}
        return (not self.steps or step in self.steps) and bool(data.get(step))

    def unused(self, name: str) -> str:
        """Why a setting, by its dotted name, has no effect, and what would change that; empty if it has one."""
        table, dev = name.partition(".")[0], self.data.dev_mixture
        if table == "lora" and not self.lora.rank and name != "lora.rank":
            return "lora.rank is 0; give lora.rank too"
        field = {"stage1": "pretrain_mixture", "stage2": "mixture"}.get(table)
        if field and not getattr(self.data, field):
            return f"{table} has no records to train on; give data.{field} too"
        if table == "model" and name != "model.init" and self.model.init and not self.model.language:
            return f"the checkpoint {self.model.init} brings its own shape"
        if name == "data.dev_mixture" and dev and not self.watch.dev_steps:
            return "nothing is measured on it; give watch.dev_steps too"
        if name in ("watch.dev_steps", "watch.dev_items") and self.watch.dev_steps and not dev:
            return "there is no dev data; give data.dev_mixture too"
        return ""


def dotted(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted names: ``{"seed": 0, "stage2.lr": 1e-3}``."""
    names: dict[str, Any] = {}
    for key, value in values.items():
        names |= dotted(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return names


# -- towers and language models, to plan where none of them is at hand -------------------------------------------------

TOWERS: Final[dict[str, dict[str, Any]]] = _KNOWN["towers"]
LANGUAGE_MODELS: Final[dict[str, dict[str, Any]]] = _KNOWN["language_models"]


def tower_shape(name: str) -> Any:
    """Configuration of a tower of :data:`TOWERS`, EfficientNet-Lite, a folder or a fetched hub name; or ConfigError."""
    from regiongpt.model.configuration import EFFICIENTNET_LITE_CHANNELS, EfficientNetLiteConfig

    if name in EFFICIENTNET_LITE_CHANNELS:
        return EfficientNetLiteConfig(variant=name)
    config = _find(name, TOWERS, "model.vision")
    return getattr(config, "vision_config", config)


def language_shape(name: str) -> Any:
    """Configuration of a language model; otherwise as :func:`tower_shape`."""
    return _find(name, LANGUAGE_MODELS, "model.language")


def _find(name: str, known: dict[str, dict[str, Any]], field: str) -> Any:
    from transformers import AutoConfig

    if name in known:
        fields = dict(known[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    # A hub name that was never fetched, a folder of something else, a torn file: each has an exception of its own.
    except Exception as error:
        told = f"{field}: the shape of '{name}' is not known here; give a folder with config.json, or one of"
        raise ConfigError(f"{told} {', '.join(known)}") from error

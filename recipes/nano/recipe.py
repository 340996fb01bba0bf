"""Settings of nano's recipe: a package recipe, with annotated images for data and a language model of its own."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from regiongpt.data.coco import photo_sources
from regiongpt.environment import launched
from regiongpt.errors import ConfigError
from regiongpt.prompts import COMMON, QUESTIONS
from regiongpt.settings import Settings, nearest
from regiongpt.train.recipe import DataConfig, ModelConfig, Recipe, Seed, Share, Size, StageConfig

NanoStep = Literal["language", "align", "stage1", "stage2", "polish"]

RECIPE = Path(__file__).with_name("nano.toml")

SHORTEST_TEXT = 160
"""Fewest tokens that questions and answers need beside the image."""


class PhotoConfig(DataConfig):
    """Annotated images to train on."""

    root: str = ""
    """Folder with ``instances_<split>.json``, ``captions_<split>.json`` and ``images/``."""
    split: str = Field("train", min_length=1)
    """Split to train on."""
    dev_split: str = ""
    """Held-out images, by their split; none when empty."""
    mix: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(default_factory=dict)
    """Average number of turns per task in a conversation; the sampler's own mix when empty."""
    outline_share: Share = 0.5
    """Share of the regions with an outline that are given by it rather than by their box."""
    present_share: Share = 0.5
    """Share of the questions "Is there a ...?" to which the answer is yes; more of them make yes likelier."""

    @field_validator("mix")
    @classmethod
    def _check_mix(cls, value: dict[str, float]) -> dict[str, float]:
        known = (*QUESTIONS, *COMMON, "other")
        for task in value:
            if task not in known:
                raise ValueError(f"unknown task '{task}'; {nearest(task, known)}")
        if value and not any(value.values()):
            raise ValueError("give a number above 0 for some task")
        return value


class NanoModelConfig(ModelConfig):
    """The model, and the language model that the recipe trains for it where ``language`` is empty."""

    vocab_size: int = Field(4096, ge=300, le=2**20)
    """Size of the byte-level BPE vocabulary."""
    hidden_size: Size = 320
    """Width of the language model."""
    layers: int = Field(5, ge=1, le=1000)
    """Layers of the language model."""
    heads: Size = 5
    """Attention heads of the language model; the width of a head must be even."""
    comparing_layers: int = Field(0, ge=0, le=1000)
    """First layers in which half of the heads start out attending to similar tokens."""
    mlp_size: Size = 832
    """Width of the feed-forward layers."""
    max_length: int = Field(1024, ge=SHORTEST_TEXT, le=2**24)
    """Context of the language model in tokens."""

    @model_validator(mode="after")
    def _check_language(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be an even multiple of heads = {self.heads}, got {self.hidden_size}")
        if self.init or self.language:
            return self
        # A grid of the tower's own has at least the cells of a stride of 32.
        cells = (self.image_grid or self.image_size // 32) ** 2
        if cells + SHORTEST_TEXT > self.max_length:
            raise ValueError(
                f"max_length = {self.max_length} fits no question beside the {cells} tokens of an image; give at "
                f"least {cells + SHORTEST_TEXT}, or a smaller image_grid"
            )
        return self


class FeatureConfig(Settings):
    """Cached features of the frozen tower."""

    views: int = Field(2, ge=1, le=1000)
    """Views of each image: the whole one, then random crops, every other one mirrored."""
    min_crop: float = Field(0.6, gt=0, le=1)
    """Smallest side of a crop as a share of the image's side."""
    seed: Seed = 0
    """Seed of the crops; apart from the recipe's, so that runs with other seeds share the cache."""
    root: str = ""
    """Folder of images to cache, of which those of ``data.root`` are a part; ``data.root`` when empty."""


class NanoStageConfig(StageConfig):
    """Hyper-parameters of one training step."""

    alignment: NonNegativeFloat = 0.0
    """Weight of a region's alignment with its class's name, in supervised tokens."""
    pooled_epochs: NonNegativeFloat = 0.0
    """Passes over all objects by their pooled features, before the first map; of ``align`` alone."""
    blur: NonNegativeFloat = 0.0
    """Standard deviation of the factors, around 1, that multiply the channels of whole maps and crops."""


class NanoRecipe(Recipe):
    """A training run: language model, alignment, stage 1, stage 2 and polish."""

    all_steps: ClassVar[tuple[str, ...]] = get_args(NanoStep)

    out: Path = Path("runs/nano")
    """Folder of the run: feature cache, checkpoints, reports and the finished model."""
    steps: tuple[NanoStep, ...] = ()  # type: ignore[assignment]
    """Steps to run, of ``language``, ``align``, ``stage1``, ``stage2`` and ``polish``; all when empty."""
    isolated_share: Share = 0.8
    """Share of the conversations whose turns do not attend to each other."""
    sure: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of class names that must be true for stage 2 to say them in sentences, instead of a wider word; 0 to name
    every object."""
    data: PhotoConfig = PhotoConfig()
    model: NanoModelConfig = NanoModelConfig()
    features: FeatureConfig = FeatureConfig()
    language: NanoStageConfig = NanoStageConfig()
    """Text-only pre-training of the language model."""
    align: NanoStageConfig = NanoStageConfig(alignment=1.0)
    """Refinement and connector, by alignment alone."""
    stage1: NanoStageConfig = NanoStageConfig()
    """Refinement and connector; the language model is frozen."""
    stage2: NanoStageConfig = NanoStageConfig()
    """Refinement, connector and language model."""
    polish: NanoStageConfig = NanoStageConfig()
    """The same, a little longer: sentences name what the model of stage 2 can tell."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.align.alignment:
            raise ValueError("align.alignment: give a number above 0; the step learns nothing else")
        if self.lora.rank and not self.runs("stage2"):
            raise ValueError("lora.rank: adapters need stage 2, which this recipe does not run")
        return self

    def check_files(self) -> None:
        """Check that the annotations are there, without reading them.

        Raises:
            ConfigError: Several processes were started, or no folder is given.
            DataError: Annotations are missing.
            CheckpointError: The checkpoint to continue from is missing.
        """
        if launched() > 1:
            raise ConfigError("nano's recipe runs in one process")
        if not self.data.root:
            raise ConfigError("data.root: give the folder of the annotated images, --data.root DIR")
        photo_sources(Path(self.data.root), self.data.split)
        if self.features.root:
            photo_sources(Path(self.features.root), self.data.split)
        if self.data.dev_split:
            photo_sources(Path(self.data.root), self.data.dev_split)

    def runs(self, step: str) -> bool:
        """Whether a step is to be run."""
        return (not self.steps or step in self.steps) and (step != "language" or not self.model.language)

    def unused(self, name: str) -> str:
        """Why nothing would read a setting, and what would change that; empty if something does."""
        records = name in ("data.mixture", "data.pretrain_mixture", "data.dev_mixture", "model.init")
        if name.startswith("plan") or (records and _value(self, name)):
            return "goes with a recipe on records, by `regiongpt train`"
        if name.startswith("lora.") and not self.lora.rank and name != "lora.rank":
            return "lora.rank is 0; give lora.rank too"
        if name == "model.chat_template" and not self.model.language:
            return "the recipe's own language model has the plain template; give model.language too"
        dev = self.data.dev_split
        if name == "data.dev_split" and dev and not self.watch.dev_steps:
            return "nothing is measured on it; give watch.dev_steps too"
        if name in ("watch.dev_steps", "watch.dev_items") and self.watch.dev_steps and not dev:
            return "there is no dev data; give data.dev_split too"
        return ""


def _value(recipe: NanoRecipe, name: str) -> object:
    table, _, field = name.partition(".")
    return getattr(getattr(recipe, table), field)

"""All options of the verb ``annotate``, by their headings in its help."""

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from regiongpt.settings import Settings

Mode = Literal["crop", "context", "full"]
MODES: Final[tuple[Mode, ...]] = ("crop", "context", "full")
Doubt = Literal["short", "repeated", "refusing", "about_image", "unnamed", "other_class", "not_located"]


class Data(Settings):
    """Input and output."""

    images: Path | None = None
    """folder of the images"""
    regions: Path | None = None
    """COCO, LVIS or V3Det instances, a COCO export of another tool, or a folder of records"""
    out: Path | None = None
    """folder of the captions; run the same command again to resume"""
    refilter: Path | None = None
    """rewrite the files of such a folder, also during a run, with these filters; calls no model"""
    crowds: bool = False
    """include crowds (some tools mark every mask as one)"""


class Model(Settings):
    """The captioner and its requests."""

    captioner: str | None = None
    """address of an OpenAI-compatible endpoint, folder of a transformers or RegionGPT model, or facts (default: the
    model of this package)"""
    served_model: str | None = None
    """name of the model at an endpoint (default: the only one there)"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the endpoint's key"""
    max_new_tokens: PositiveInt = 512
    """longest answer in tokens; a longer one counts as unfinished"""
    temperature: NonNegativeFloat = 0.0
    """0 takes the most probable token; above 0, tokens are sampled"""
    concurrency: PositiveInt = 256
    """most requests in flight at an endpoint; adapts below that"""
    timeout: PositiveFloat = 120.0
    """seconds until a request times out"""
    patience: PositiveFloat = 600.0
    """seconds without an answer until the run ends"""
    batch_size: PositiveInt = 8
    """images or crops per batch, for a local model"""
    device: str | None = None
    """device of a local model: cuda, cuda:N, mps or cpu"""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """dtype of a local model; int8 for RegionGPT checkpoints alone"""


class Captions(Settings):
    """Prompts and crops."""

    mode: Mode = "full"
    """caption from the crop alone (crop), plus the global caption (context), plus the class name (full)"""
    seed: NonNegativeInt = 0
    """seed of prompts and answers"""
    gallery: NonNegativeInt = 12
    """regions to caption in all three modes, shown side by side"""
    locate_back: bool = False
    """ask the captioner which region each caption describes"""
    crop_margin: float = Field(0.15, ge=0, le=4)
    """margin around a region on each side, as a share of its box"""
    crop_least: PositiveInt = 48
    """least side of a crop in pixels; smaller regions get a larger margin"""
    crop_most: int = Field(768, ge=16)
    """longest side of an image or crop in pixels; larger ones are scaled down"""


class Limits(Settings):
    """When a run ends early, and where it runs."""

    input_price: NonNegativeFloat = 0.0
    """price per million input tokens"""
    output_price: NonNegativeFloat = 0.0
    """price per million output tokens"""
    max_cost: PositiveFloat | None = None
    """most cost in the currency of the prices, over all runs in --out"""
    max_time: PositiveFloat | None = None
    """most seconds for this run"""
    max_failures: PositiveInt | None = None
    """most failed requests in this run"""
    engine: Literal["local", "ray"] = "local"
    """ray distributes images over a Ray cluster, one worker per node"""


class Filters(Settings):
    """Which captions are kept, and how they are written; the others stay in the table of all captions."""

    similarity: Path | None = None
    """folder of a CLIP or SigLIP model that scores captions against crops"""
    reject: tuple[Doubt, ...] = ("short", "repeated", "refusing", "about_image")
    """doubts that reject a caption: short, repeated, refusing, about_image, unnamed, other_class, not_located"""
    min_words: NonNegativeInt = 5
    """least words of a caption that is not short"""
    min_similarity: float | None = None
    """least similarity of crop and caption"""
    top_share: float | None = Field(None, gt=0, le=1)
    """keep this share of the captions of each class, the most similar"""
    export: tuple[Literal["llava", "webdataset"], ...] = ()
    """further formats: llava (JSON lines of image and conversations), webdataset (tar files)"""


GROUPS: Final[dict[str, type[Settings]]] = {
    "data": Data, "captioner": Model, "captions": Captions, "limits": Limits, "what is kept": Filters,
}  # fmt: skip


class Options(Data, Model, Captions, Limits, Filters):
    """Everything that can be typed."""

    @model_validator(mode="after")
    def _check(self) -> "Options":
        if self.refilter and (self.images or self.regions or self.out or self.similarity):
            raise ValueError("--refilter takes only filters and exports; leave the other options out")
        missing = [f"--{name}" for name in ("images", "regions", "out") if getattr(self, name) is None]
        if missing and not self.refilter:
            raise ValueError(f"give {', '.join(missing)}")
        if self.max_cost and not (self.input_price or self.output_price):
            raise ValueError("--max-cost needs --input-price and --output-price (per million tokens)")
        if self.locate_back and self.captioner == "facts":
            raise ValueError("--locate-back: facts cannot read captions; use a model, or leave it out")
        return self

    def noted(self) -> dict[str, Any]:
        """Settings stored with a run, enough to rewrite its files; without the address, which may hold a password."""
        noted = {*Captions.model_fields, "images", "regions", "crowds", "max_new_tokens"}
        paths = {name: getattr(self, name).resolve() for name in ("images", "regions")}
        return self.model_copy(update=paths).model_dump(mode="json", include=noted)

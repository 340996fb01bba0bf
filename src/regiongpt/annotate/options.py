"""All options of the verb ``annotate``, by their headings in its help."""

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from regiongpt.settings import Settings

Mode = Literal["crop", "context", "full"]
MODES: Final[tuple[Mode, ...]] = ("crop", "context", "full")
Doubt = Literal["short", "repeated", "refusing", "about_image", "unnamed", "other_class", "not_located"]


class Data(Settings):
    """What is captioned, and where it goes."""

    images: Path | None = None
    """folder of the images"""
    regions: Path | None = None
    """json of COCO, LVIS, V3Det or another tool's COCO export, or a folder of records"""
    out: Path | None = None
    """folder of the captions; the same command goes on with what is there"""
    refilter: Path | None = None
    """write the files of such a folder again, with other filters or while a run goes on; no model is asked"""
    crowds: bool = False
    """caption what is marked as a crowd too, as some tools mark every mask"""


class Model(Settings):
    """Who captions, and how it is asked."""

    captioner: str | None = None
    """address of an OpenAI-compatible endpoint, folder of a transformers or RegionGPT model, or facts (default: the
    model of this package)"""
    served_model: str | None = None
    """name of the model at an endpoint (default: the only one there)"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the endpoint's key"""
    max_new_tokens: PositiveInt = 512
    """longest answer in tokens; one that is cut off there does not count as finished"""
    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token each time"""
    concurrency: PositiveInt = 256
    """most requests under way at an endpoint; how many there are adapts below that"""
    timeout: PositiveFloat = 120.0
    """seconds until a request counts as lost"""
    patience: PositiveFloat = 600.0
    """seconds that an endpoint may be silent before the run ends"""
    batch_size: PositiveInt = 8
    """images or crops at a time, for a model on this machine"""
    device: str | None = None
    """of a model on this machine: cuda, cuda:N, mps or cpu"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of a model on this machine"""


class Captions(Settings):
    """What is asked about each region, and how its picture is cut out of the image."""

    mode: Mode = "full"
    """a region's caption from its crop alone, with the global caption (context), or with the class name too (full)"""
    seed: NonNegativeInt = 0
    """of prompt versions and answers"""
    gallery: NonNegativeInt = 12
    """regions that are captioned in all three modes, to be shown side by side"""
    locate_back: bool = False
    """ask which of all regions each caption describes"""
    crop_margin: float = Field(0.15, ge=0, le=4)
    """context around a region on each side, as a share of its box"""
    crop_least: PositiveInt = 48
    """least side of a crop in pixels, as far as the image has them; smaller regions get more context"""
    crop_most: int = Field(768, ge=16)
    """longest side of what a model is shown in pixels; larger crops and images are scaled down"""


class Limits(Settings):
    """When a run ends early, and where it works; what is under way is finished, and the same command goes on."""

    input_price: NonNegativeFloat = 0.0
    """of a million tokens read"""
    output_price: NonNegativeFloat = 0.0
    """of a million tokens written"""
    max_cost: PositiveFloat | None = None
    """in the currency of the prices, over all runs into --out"""
    max_time: PositiveFloat | None = None
    """seconds of this run"""
    max_failures: PositiveInt | None = None
    """failed requests in this run"""
    engine: Literal["local", "ray"] = "local"
    """ray spreads images over a Ray cluster, a worker for each node"""


class Filters(Settings):
    """Which captions are kept, and how they are written; the others stay in the table of all captions."""

    similarity: Path | None = None
    """folder of a CLIP or SigLIP model that scores how well a caption fits its crop"""
    reject: tuple[Doubt, ...] = ("short", "repeated", "refusing", "about_image")
    """doubts that reject a caption: short, repeated, refusing, about_image, unnamed, other_class, not_located"""
    min_words: NonNegativeInt = 5
    """words below which a caption is short"""
    min_similarity: float | None = None
    """least similarity of crop and caption"""
    top_share: float | None = Field(None, gt=0, le=1)
    """of each class, keep this share of the captions: the most similar"""
    export: tuple[Literal["llava", "webdataset"], ...] = ()
    """other layouts too: llava (json lines of image and conversations), webdataset (tar files of both)"""


GROUPS: Final[dict[str, type[Settings]]] = {
    "data": Data, "captioner": Model, "captions": Captions, "limits": Limits, "what is kept": Filters,
}  # fmt: skip


class Options(Data, Model, Captions, Limits, Filters):
    """Everything that can be typed."""

    @model_validator(mode="after")
    def _check(self) -> "Options":
        if self.refilter and (self.images or self.regions or self.out or self.similarity):
            raise ValueError("--refilter takes all but filters and exports from its folder; leave the others out")
        missing = [f"--{name}" for name in ("images", "regions", "out") if getattr(self, name) is None]
        if missing and not self.refilter:
            raise ValueError(f"give {', '.join(missing)}")
        if self.max_cost and not (self.input_price or self.output_price):
            raise ValueError("--max-cost: give --input-price and --output-price, of a million tokens, too")
        if self.locate_back and self.captioner == "facts":
            raise ValueError("--locate-back: facts reads no captions; caption with a model, or leave it out")
        return self

    def noted(self) -> dict[str, Any]:
        """What a store notes of a run, enough to write its files again; no address, which may hold a password."""
        noted = {*Captions.model_fields, "images", "regions", "crowds", "max_new_tokens"}
        paths = {name: getattr(self, name).resolve() for name in ("images", "regions")}
        return self.model_copy(update=paths).model_dump(mode="json", include=noted)

"""Settings of the predictor's methods and command-line options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from regiongpt.prompts import check_choices
from regiongpt.settings import Settings
from regiongpt.storage import check_checkpoint

By = Literal["answer", "words", "both"]
Detail = Literal["fast", "careful"]
ROWS = 64
"""Answers written at a time, unless the token budget allows fewer."""

REGION_OPTIONS = {
    "--box": ("X0,Y0,X1,Y1", "a box, in pixels from the image's top left corner"),
    "--mask": ("FILE", "an image of the same size, white (or opaque) inside the region"),
    "--polygon": ("X,Y,X,Y,X,Y,...", "the corners of a polygon, at least three"),
    "--rle": ("FILE", "a JSON file with a COCO run-length mask: size [height, width] and counts"),
    "--point": ("X,Y", "a point: the small disk around it"),
    "--scribble": ("X,Y,X,Y,...", "a stroke through at least two points"),
}


class Look(Settings):
    """Whether regions are also encoded from their own crops."""

    detail: Detail = "fast"
    """fast, or careful: also encode each region's own crop, if the model was trained for it"""


class Length(Look):
    """Length of an answer."""

    max_new_tokens: int = Field(128, ge=1)
    """longest answer, in tokens"""


class Options(Length):
    """How to generate an answer; see :meth:`RegionPredictor.ask`."""

    temperature: float = Field(0.0, ge=0)
    """0 takes the most probable token; above 0, tokens are sampled"""
    top_p: float = Field(1.0, gt=0, le=1)
    """with a temperature: sample from the most probable tokens with this total probability"""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """with a temperature: makes the answer repeatable"""
    stop: str | Sequence[str] = ()
    """strings that end the answer; not part of it"""

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | Sequence[str]) -> tuple[str, ...]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise ValueError("a stop text must not be empty")
        return stops


class DescribeOptions(Length):
    """How to describe regions on the command line."""

    brief: bool = False
    """a caption of a few words per region"""


class LocateOptions(Look):
    """How to choose the region that an expression refers to; see :meth:`RegionPredictor.locate`."""

    by: By = "both"
    """by the answer to one question about all regions, by the words for each region, or both"""


class ClassifyOptions(Look):
    """How to choose from a closed set; see :meth:`RegionPredictor.classify`."""

    label_set: str = Field("COCO-80", min_length=1)
    """the set named in the question, and the choices by default"""
    top_k: int | None = Field(None, ge=1)
    """keep only the most probable choices"""


class ChoiceOptions(ClassifyOptions):
    """How to classify regions on the command line."""

    choices: str | None = None
    """comma-separated names (default: those of the label set)"""

    @property
    def names(self) -> Sequence[str]:
        """The names to choose from; ConfigError for a blank or repeated one."""
        return check_choices(None if self.choices is None else self.choices.split(","), self.label_set)


class Sources(Settings):
    """Sources of further regions."""

    proposals: Path | None = None
    """JSON of COCO detection results, a COCO data set, or output of --json"""
    grid: int | None = Field(None, ge=1, le=128)
    """N x N points; with --sam, its prompt points"""
    sam: str | None = None
    """hub name or folder of a transformers SAM model, whose masks become regions"""
    image_id: str | None = None
    """id of the image in --proposals, if its file name does not match"""
    min_score: float | None = None
    """drop regions with a lower score"""
    iou: float | None = Field(None, ge=0, le=1)
    """drop regions that overlap a better one by more than this (with --sam 0.7)"""
    max_regions: int | None = Field(None, ge=1)
    """keep at most this many: the best by score, else the first"""

    @property
    def given(self) -> bool:
        """Whether other regions may follow those from the command line."""
        return bool(self.proposals or self.sam or self.grid)

    @model_validator(mode="after")
    def _check_sources(self) -> "Sources":
        if self.proposals and (self.sam or self.grid is not None):
            raise ValueError("--proposals goes without --grid and --sam")
        if self.image_id is not None and not self.proposals:
            raise ValueError("--image-id goes with --proposals")
        return self


class ModelOptions(Settings):
    """Which model answers, and how it is held; see :meth:`RegionPredictor.from_pretrained`."""

    model: Path | None = None
    """checkpoint folder (default: the model of this package)"""
    device: str | None = None
    """cuda, cuda:N, mps or cpu (default: the first available)"""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """float32, bfloat16 or float16 (default: bfloat16 on CUDA, else float32), or int8 for the language model"""
    untrained: bool = False
    """allow a checkpoint that has not been trained"""

    @model_validator(mode="after")
    def _check_model(self) -> "ModelOptions":
        if self.model is not None:
            check_checkpoint(self.model)
        return self


class Memory(Settings):
    """Limits of a predictor; see :class:`RegionPredictor`."""

    images: int = Field(4, ge=0)
    token_budget: int | None = Field(None, ge=1)
    rows: int = Field(ROWS, ge=1)

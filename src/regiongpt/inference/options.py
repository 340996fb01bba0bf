"""How to answer: settings of the predictor's methods, which are the command line's options too."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

from pydantic import Field, ValidationInfo, field_validator, model_validator

from regiongpt.prompts import LABEL_SETS, check_choices
from regiongpt.settings import Settings, plain_types
from regiongpt.storage import check_checkpoint

By = Literal["answer", "words", "both"]
Detail = Literal["fast", "careful"]
WAYS: Final[tuple[By, ...]] = ("answer", "words", "both")
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


class Arguments(Settings):
    """Settings that are keyword arguments too: a number may be text on the command line alone."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> Any:
        hint = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, str) and not info.context and str not in plain_types(hint):
            raise ValueError("give a number, not a text")
        return value


class Generation(TypedDict, total=False):
    """The fields of :class:`Options` as keyword arguments."""

    detail: Detail
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: str | Sequence[str]


class Look(Arguments):
    """How closely regions are looked at."""

    detail: Detail = "fast"
    """fast, or careful: look at each region's own crop too, if the model was trained for it"""


class Length(Look):
    """How long an answer may be."""

    max_new_tokens: int = Field(128, ge=1)
    """longest answer, in tokens"""


class Options(Length):
    """How to generate an answer; see :meth:`RegionPredictor.ask`."""

    temperature: float = Field(0.0, ge=0)
    """0 takes the most probable token each time; above, tokens are drawn"""
    top_p: float = Field(1.0, gt=0, le=1)
    """with a temperature: draw from the most probable tokens of this joint probability"""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """with a temperature: makes the answer repeatable"""
    stop: str | Sequence[str] = ()
    """texts that end the answer and are not part of it"""

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
    """a caption of a few words a region"""


class LocateOptions(Look):
    """How to choose the region that an expression refers to; see :meth:`RegionPredictor.locate`."""

    by: By = "both"
    """by the answer to one question about all regions, by the words for each, or both"""


class ClassifyOptions(Look):
    """How to choose from a closed set; see :meth:`RegionPredictor.classify`."""

    label_set: str = Field("COCO-80", min_length=1)
    """the set named in the question, and chosen from unless there are choices"""
    generate: bool = False
    """also generate the answer freely"""
    top_k: int | None = Field(None, ge=1)
    """keep only the most probable choices"""

    @field_validator("label_set")
    @classmethod
    def _find_label_set(cls, name: str) -> str:
        """The name of a known set however it is spelt: ``coco80`` is ``COCO-80``."""
        plain = {re.sub(r"\W|_", "", known).lower(): known for known in LABEL_SETS}
        return plain.get(re.sub(r"\W|_", "", name).lower(), name)


class ChoiceOptions(ClassifyOptions):
    """How to classify regions on the command line."""

    choices: str | None = None
    """the names, with commas between them (default: those of the label set)"""

    @property
    def names(self) -> Sequence[str]:
        """The names to choose from; ConfigError for a blank or repeated one."""
        return check_choices(None if self.choices is None else self.choices.split(","), self.label_set)


class Sources(Settings):
    """Where regions come from besides those typed."""

    proposals: Path | None = None
    """json of COCO detection results, a COCO data set, or regions as --json has them"""
    grid: int | None = Field(None, ge=1, le=128)
    """N x N points; with --sam, the points it is asked at"""
    sam: str | None = None
    """hub name or folder of a SAM model of transformers: masks that it finds, at 32 x 32 points"""
    image_id: str | None = None
    """of the image in --proposals, where its name does not say"""
    crowds: bool = False
    """take what --proposals marks as a crowd too, as some tools mark every mask"""
    min_score: float | None = None
    """leave out regions of a lower score"""
    iou: float | None = Field(None, ge=0, le=1)
    """leave out regions that overlap a better one more (with --sam 0.7)"""
    max_regions: int | None = Field(None, ge=1)
    """only so many, the best by score or else the first"""

    @property
    def given(self) -> bool:
        """Whether there may be regions besides those typed."""
        return bool(self.proposals or self.sam or self.grid)

    @model_validator(mode="after")
    def _check_sources(self) -> "Sources":
        if self.proposals and (self.sam or self.grid is not None):
            raise ValueError("give --proposals, or --grid or --sam, not several; ask about them one after the other")
        if not self.proposals and (self.image_id is not None or self.crowds):
            raise ValueError(f"--{'crowds' if self.crowds else 'image-id'} goes with --proposals")
        return self


class ModelOptions(Settings):
    """Which model answers, and how it is held; see :meth:`RegionPredictor.from_pretrained`."""

    model: Path | None = None
    """checkpoint folder (default: the model of this package)"""
    device: str | None = None
    """cuda, cuda:N, mps or cpu (default: the first of these that is there)"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """float32, bfloat16 or float16 (default: float32 on the CPU, else bfloat16)"""
    int8: bool = False
    """language model's weights in int8; on a CPU, in float32"""
    untrained: bool = False
    """ask a checkpoint even if it has not been trained"""

    @model_validator(mode="after")
    def _check_model(self) -> "ModelOptions":
        """What can be known without torch."""
        if self.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            raise ValueError(f"--device: expected cuda, cuda:N, mps or cpu, got {self.device!r}")
        if self.int8 and (self.dtype or "float32", self.device or "cpu") != ("float32", "cpu"):
            raise ValueError("--int8 goes with float32 on the CPU alone; leave --dtype and --device out")
        if self.model is not None:
            check_checkpoint(self.model)
        return self


class Memory(Arguments):
    """What a predictor keeps; see :class:`RegionPredictor`."""

    images: int = Field(4, ge=0)
    token_budget: int | None = Field(None, ge=1)
    rows: int = Field(ROWS, ge=1)

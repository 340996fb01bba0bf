"""Requests and answers of the API, with the examples of its documentation."""

from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from regiongpt.prompts import LABEL_SETS

MOST = 10_000
"""Entries of any list, whatever the limits say: checking them takes the event loop's time."""
_POINTS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}}
_RLE = {
    "type": "object",
    "properties": {
        "size": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
        "counts": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
    },
    "required": ["size", "counts"],
}


def _one(kind: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
    properties = {kind: value, **more}
    return {"type": "object", "properties": properties, "required": [kind], "additionalProperties": False}


_BOX = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
_POSITIVE = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}
REGION_SCHEMA = {
    "description": "A region in pixels of the image: a box x0, y0, x1, y1, a polygon (rings), a point, a scribble, or "
    "a mask as COCO's RLE.",
    "anyOf": [
        _one("box", _BOX, normalized={"type": "boolean"}),
        _one("polygon", {"anyOf": [{"type": "array", "items": _POINTS}, _POINTS]}),
        _one("point", {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}, radius=_POSITIVE),
        _one("scribble", _POINTS, width=_POSITIVE),
        _one("rle", _RLE),
        _one("mask", _RLE),
        _BOX,
    ],
}
RegionJson = Annotated[dict[str, Any] | list[Any], WithJsonSchema(REGION_SCHEMA)]

_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwAgMAAADcJZSMAAAACVBMVEX/////AAAAAP+3l+0cAAAAaElEQVR4"
    "2mNgGByAkYEhFMJ6fYCBgYGBgQldBYkCqxpQBbgYNFAFFBiYUAUaGBgakAWYYIpw2sLBwMDAQbFL0QR+MDAw/MCr4h8DA8MDvE5neMDwD9WWbw"
    "w3GBhYkA0Mo0IgkykwhAEAJeENvGNkNQEAAAAASUVORK5CYII="
)
_BOXES: list[Any] = [{"box": [8, 8, 37, 37]}, {"point": [50, 20], "radius": 8}]


def _chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": _IMAGE}}
    return {"messages": [{"role": "user", "content": [image, *parts]}], "max_tokens": 16, **more}


def _example(**more: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [{"image": _IMAGE, "regions": _BOXES, **more}]})


class Request(BaseModel):
    """Base of requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ImageUrl(Request):
    """Where the image of a message is."""

    url: str
    """a data URI, sha256:HEX of an uploaded image, or an https URL that the server allows"""
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Request):
    """Text of a message; ``<regionN>`` in it stands for the N-th region."""

    type: Literal["text"]
    text: str


class ImagePart(Request):
    """The image of a conversation."""

    type: Literal["image_url"]
    image_url: ImageUrl


class RegionPart(Request):
    """A region at its place in the text."""

    type: Literal["region"]
    region: RegionJson


Part = Annotated[Union[TextPart, ImagePart, RegionPart], Field(discriminator="type")]  # noqa: UP007


class Message(Request):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MOST)]
    name: str | None = None


Stop = Annotated[str, Field(max_length=100)]


class StreamOptions(Request):
    """Last event of a stream."""

    include_usage: bool = False


class ChatRequest(Request):
    """A conversation about an image, whose last message is the question."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                _chat({"type": "text", "text": "What is <region1>?"}, regions=_BOXES),
                _chat({"type": "text", "text": "What is "}, {"type": "region", "region": _BOXES[0]}, stream=True),
            ]
        }
    )

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=MOST)
    regions: list[RegionJson] = Field([], max_length=MOST)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    # What clients send anyway, and has no meaning here.
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None


class RegionsRequest(Request):
    """Regions of an image."""

    model: str | None = None
    image: str
    """a data URI, sha256:HEX of an uploaded image, or an https URL that the server allows"""
    regions: list[RegionJson] = Field(min_length=1, max_length=MOST)


class DescribeRequest(RegionsRequest):
    """Each region is to be described, or captioned in a few words."""

    model_config = _example(brief=True, max_tokens=16)

    brief: bool = False
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False


class ClassifyRequest(RegionsRequest):
    """Each region is to be called by one of the choices."""

    model_config = _example(choices=["cat", "dog"])

    choices: list[str] | None = Field(None, min_length=1, max_length=MOST)
    label_set: Literal[tuple(LABEL_SETS)] = "COCO-80"  # type: ignore[valid-type]
    top_k: int | None = Field(None, ge=1)


class LocateRequest(RegionsRequest):
    """The region that an expression, or each of several, refers to is to be found."""

    model_config = _example(expression="the red square")

    expression: str | Annotated[list[str], Field(min_length=1, max_length=MOST)]
    by: Literal["answer", "words", "both"] = "both"


class Choice(BaseModel):
    """The one answer."""

    index: int
    message: dict[str, str]
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ChatAnswer(BaseModel):
    """An answer in OpenAI's shape, with the regions that it names."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, int]
    cited: list[int]
    warnings: list[str]


class RegionsAnswer(BaseModel):
    """Common part of answers about regions."""

    model: str
    seconds: float


class Described(BaseModel):
    """The answer about a region."""

    region: RegionJson
    answer: str
    complete: bool
    warnings: list[str]


class DescribeAnswer(RegionsAnswer):
    """The answers about regions."""

    object: Literal["regions.describe"]
    regions: list[Described]
    usage: dict[str, int]


class Labelled(BaseModel):
    """The class of a region."""

    region: RegionJson
    label: str
    probability: float
    probabilities: dict[str, float]


class ClassifyAnswer(RegionsAnswer):
    """The class of each region."""

    object: Literal["regions.classify"]
    regions: list[Labelled]


class Found(BaseModel):
    """The region that an expression refers to: its number from 1, or null."""

    expression: str
    number: int | None
    answer: str
    probability: float
    probabilities: list[float]
    """one per region, and last that of no match"""


class LocateAnswer(RegionsAnswer):
    """The regions, and which of them each expression refers to."""

    object: Literal["regions.locate"]
    regions: list[RegionJson]
    results: list[Found]


class ImageAnswer(BaseModel):
    """An uploaded image."""

    object: Literal["image"] = "image"
    id: str
    width: int
    height: int
    bytes: int
    expires_at: int


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 or above."""

    error: dict[Literal["message", "type", "param", "code"], str | None]

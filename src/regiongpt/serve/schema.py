"""Requests and answers of the API, with the examples of its documentation."""

from types import GenericAlias
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model

from regiongpt.inference.options import By
from regiongpt.prompts import LABEL_SETS

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_LISTS, _RLE = {"type": "array", "items": {"type": "array"}}, {"type": "object", "required": ["size", "counts"]}
_KINDS = {"box": _NUMBERS, "polygon": _LISTS, "point": _NUMBERS, "scribble": _LISTS, "rle": _RLE, "mask": _RLE}
_REGION = {
    "description": "A region in pixels of the image: a box x0, y0, x1, y1 (perhaps normalized), a polygon (rings), a "
    "point (and its radius), a scribble (and its width), or a mask as COCO's RLE.",
    "anyOf": [{"type": "object", "properties": {name: kind}, "required": [name]} for name, kind in _KINDS.items()],
}
# Checked with the image, by the model's own code, which says best what is wrong.
RegionJson = Annotated[dict[str, Any] | list[Any], WithJsonSchema(_REGION)]

_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwAgMAAADcJZSMAAAACVBMVEX/////AAAAAP+3l+0cAAAANklEQVR42mNgGBy"
    "AkYEhFMJ6fYCBgYGBgQldBWEBFgSTawEDw78IMswY1gJIAfQtbADdMYQBAOosBYqfbvNiAAAAAElFTkSuQmCC"
)
_BOXES: list[Any] = [{"box": [8, 8, 37, 37]}, {"point": [50, 20], "radius": 8}]


def _chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": _IMAGE}}
    return {"messages": [{"role": "user", "content": [image, *parts]}], "max_tokens": 16, **more}


def _examples(*bodies: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


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


class Message(Request):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart | RegionPart, Field(discriminator="type")]]
    name: str | None = None


_Stop = Annotated[str, Field(max_length=100)]


class ChatRequest(Request):
    """A conversation about an image, whose last message is the question."""

    model_config = _examples(
        _chat({"type": "text", "text": "What is <region1>?"}, regions=_BOXES),
        _chat({"type": "text", "text": "What is "}, {"type": "region", "region": _BOXES[0]}, stream=True),
    )

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    regions: list[RegionJson] = []
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    # What clients send anyway, and has no meaning here.
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = None


class RegionsRequest(Request):
    """Regions of an image."""

    model: str | None = None
    image: str
    """a data URI, sha256:HEX of an uploaded image, or an https URL that the server allows"""
    regions: list[RegionJson] = Field(min_length=1)


class DescribeRequest(RegionsRequest):
    """Each region is to be described, or captioned in a few words."""

    model_config = _examples({"image": _IMAGE, "regions": _BOXES, "brief": True, "max_tokens": 16})

    brief: bool = False
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False


class ClassifyRequest(RegionsRequest):
    """Each region is to be called by one of the choices."""

    model_config = _examples({"image": _IMAGE, "regions": _BOXES, "choices": ["cat", "dog"]})

    choices: list[str] | None = Field(None, min_length=1)
    label_set: Literal[tuple(LABEL_SETS)] = "COCO-80"  # type: ignore[valid-type]
    top_k: int | None = Field(None, ge=1)


class LocateRequest(RegionsRequest):
    """The region that an expression, or each of several, refers to is to be found."""

    model_config = _examples({"image": _IMAGE, "regions": _BOXES, "expression": "the red square"})

    expression: str | Annotated[list[str], Field(min_length=1)]
    by: By = "both"


def _answer(name: str, **fields: Any) -> Any:
    """An answer's shape, for the documentation alone; a field [x] has many x."""
    kinds = {field: GenericAlias(list, kind[0]) if isinstance(kind, list) else kind for field, kind in fields.items()}
    return create_model(name, **{field: (kind, ...) for field, kind in kinds.items()})  # type: ignore[call-overload]


Usage = _answer("Usage", prompt_tokens=int, completion_tokens=int, total_tokens=int)
Choice = _answer("Choice", index=int, message=dict[str, str], finish_reason=Literal["stop", "length"], logprobs=None)
ChatAnswer = _answer(
    "ChatAnswer", id=str, object=str, created=int, model=str, choices=[Choice], usage=Usage, cited=[int], warnings=[str]
)
Described = _answer("Described", region=RegionJson, answer=str, complete=bool, warnings=[str])
DescribeAnswer = _answer("DescribeAnswer", regions=[Described], usage=Usage)
Labelled = _answer("Labelled", region=RegionJson, label=str, probability=float, probabilities=dict[str, float])
ClassifyAnswer = _answer("ClassifyAnswer", regions=[Labelled])
Found = _answer("Found", expression=str, number=int | None, answer=str, probability=float, probabilities=[float])
LocateAnswer = _answer("LocateAnswer", results=[Found])
ImageAnswer = _answer("ImageAnswer", id=str, width=int, height=int, expires_at=int)
ErrorAnswer = _answer("ErrorAnswer", error=dict[Literal["message", "type", "param", "code"], str | None])

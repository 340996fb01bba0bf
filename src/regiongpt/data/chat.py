"""Conversation files: your own JSON lines, and LLaVA's mixes (paper §3.2)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from regiongpt.data.reading import (
    MALFORMED,
    Identity,
    Row,
    Side,
    Words,
    check_image,
    image_name,
    iter_array,
    iter_lines,
    unicode_text,
    words_alone,
)
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Fault, Rejects
from regiongpt.data.sources import Converter
from regiongpt.errors import short
from regiongpt.prompts import (
    IMAGE_TOKEN,
    LABEL_SETS,
    NO_MATCH,
    QUESTIONS,
    check_placeholders,
    parse_region_answer,
    region_answer,
)
from regiongpt.regions import Region


def _without_image(text: str) -> str:
    if IMAGE_TOKEN in text:
        raise Fault("placeholder in the text", f"leave {IMAGE_TOKEN} out: the image always comes first")
    return unicode_text(text)


Spoken = Annotated[str, AfterValidator(_without_image)]


class _TurnRow(Row, extra="forbid"):
    answer: Spoken = ""
    question: Spoken | None = None
    task: str = ""
    regions: list[Annotated[int, Field(gt=0)]] = Field([])
    expression: Words = ""
    category: Words = ""
    label_set: Words = ""
    guided: bool = False


class _Line(Row, extra="forbid"):
    id: Identity = ""
    image: str | None = None
    width: Side | None = None
    height: Side | None = None
    regions: list[dict[str, Any]] = Field([])
    conversation: list[Any]


class JsonlConverter(Converter):
    """Your own data, one image with regions and conversation per line; docs/data.md has the keys.

    A turn is a question that stands as it is, or a task of :data:`regiongpt.prompts.QUESTIONS` with what that needs.
    The answer to a guided question is held to what the question asks for: ``Region [1]``, a name of the label set.
    """

    name: ClassVar[str] = "jsonl"
    summary: ClassVar[str] = "your own data: JSON lines of images, regions and conversations"

    data: Path
    """JSON lines file."""

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """One record a line, in the order of the file."""
        for number, entry in iter_lines(self.data, rejects):
            with rejects.noting(self.data, number):
                line = _Line.read(entry)
                size = (0, 0)
                if line.image:
                    size = check_image(self.images / image_name(line.image), line.width, line.height)
                regions = []
                for place, given in enumerate(line.regions, 1):
                    category = given.pop("category", "")
                    if not isinstance(category, str):
                        raise Fault(MALFORMED, f"<region{place}>: expected category as text, got {short(category)}")
                    if given.get("normalized"):
                        raise Fault("box in fractions", f"<region{place}>: multiply it by the image's width and height")
                    region = Region.from_dict(given, f"<region{place}>")
                    regions.append(RecordRegion(region=region, category=words_alone(category)))
                turns = [_turn(each, f"turn {k}: ", len(regions)) for k, each in enumerate(line.conversation, 1)]
                yield self.record(line.id or f"line-{number}", line.image or "", size, regions, turns)


def _turn(given: Any, where: str, n_regions: int) -> Turn:
    """One turn; region numbers are checked here, placeholders by the record."""
    row = _TurnRow.read(given, where)
    literal = row.question is not None
    if literal and (extra := sorted(given.keys() - {"question", "answer", "task"})):
        raise Fault(MALFORMED, f"{where}a question is used verbatim; leave out {', '.join(extra)}")
    tasks = [*QUESTIONS, *(["chat"] if literal else [])]
    task = row.task or ("chat" if literal else "")
    if task not in tasks:
        raise Fault("unknown task", f"{where}expected a task among {', '.join(tasks)}, got {short(task)}")
    if literal and not str(row.question).strip():
        raise Fault("question empty", f"{where}expected a question, got none")
    check_placeholders([f"<region{each}>" for each in row.regions], n_regions)
    if row.guided and task == "locate":
        if parse_region_answer(row.answer) not in (None, *row.regions):
            options = ", ".join(map(region_answer, row.regions))
            reason = f"{where}expected {options} or {NO_MATCH!r}, got {short(row.answer)}"
            raise Fault("answer that is no option", reason)
    elif row.guided and (task != "classify" or not row.label_set.strip()):
        raise Fault(MALFORMED, f"{where}guided goes with 'locate', and with 'classify' and its label_set")
    elif row.guided and row.answer not in LABEL_SETS.get(row.label_set, (row.answer,)):
        raise Fault("unknown category", f"{where}expected a name of {row.label_set}, got {short(row.answer)}")
    values = {"task": task, "question": row.question or "", "regions": tuple(row.regions)}
    return Turn(**{**row.model_dump(), **values})


class _Message(Row):
    role: Any = Field(None, alias="from")
    value: str


class _Conversation(Row):
    id: Identity
    image: str | None = None
    conversations: Annotated[list[_Message], Field(min_length=1)]


class LlavaConverter(Converter):
    """Conversations about whole images in LLaVA's format, one record each, with verbatim questions.

    The placeholder of the image goes, wherever a question has it: a record's image always comes first. The files do not
    tell the sizes of images, so each is opened. Ids repeat in the 665K mix, where several conversations are about one
    image; a record's id therefore ends in its place in the file.
    """

    name: ClassVar[str] = "llava"
    summary: ClassVar[str] = "LLaVA: LAION-CC-SBU-558K, the 665K instruction mix, and files in the same format"

    data: Path
    """blip_laion_cc_sbu_558k.json, llava_v1_5_mix665k.json or similar."""
    task: Literal["chat", "image_caption"] = "chat"
    """chat, or image_caption for captions of whole images such as the 558K; it names the turns in counts, and the
    questions stand as they are."""

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """One record a conversation, in the order of the file."""
        for place, entry in enumerate(iter_array(self.data)):
            with rejects.noting(self.data, place):
                row = _Conversation.read(entry)
                image = row.image or ""
                if self.task == "image_caption" and not image:
                    raise Fault("caption without an image", "expected an image, got none")
                turns = _turns(row.conversations, self.task, bool(image))
                size = check_image(self.images / image_name(image)) if image else (0, 0)
                yield self.record(f"{row.id}-{place}", image, size, [], turns)


def _turns(conversation: list[_Message], task: str, with_image: bool) -> list[Turn]:
    texts: list[str] = []
    images = 0
    for number, message in enumerate(conversation):
        role, text = ("human", "gpt")[number % 2], message.value
        if message.role != role:
            raise Fault("roles out of turn", f"expected {role} as message {number}, got {short(message.role)}")
        if role == "human" and with_image:
            images += text.count(IMAGE_TOKEN)
            text = text.replace(IMAGE_TOKEN, "")
        if not text.strip():
            raise Fault("message empty", f"expected text in message {number}")
        texts.append(words_alone(text.strip()))
    if len(texts) % 2:
        raise Fault("question without an answer", "expected the last message from gpt, got one from human")
    if images > 1:
        raise Fault("placeholder in the text", f"expected {IMAGE_TOKEN} once, got it {images} times")
    return [Turn(task=task, question=q, answer=a) for q, a in zip(texts[::2], texts[1::2], strict=True)]

"""LLaVA's conversations about whole images: the captions of LAION-CC-SBU-558K and the 665K instruction mix.

Paper: §3.2 (image captioning as a pretext task; LLaVA's instruction data)
"""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.images import check_image
from regiongpt.data.convert.jsonstream import iter_array
from regiongpt.data.convert.values import MALFORMED, image_name, short, unicode_text, words_alone
from regiongpt.data.records import Record, Turn
from regiongpt.data.shards import Fault, Rejects
from regiongpt.prompts import IMAGE_TOKEN


class LlavaConverter(Converter):
    """Conversations in LLaVA's form, one record each, with the questions as they stand.

    The placeholder of the image goes, wherever a question has it: a record's image always comes first. The files do not
    tell the sizes of images, so each is opened. Ids repeat in the 665K mix, where several conversations are about one
    image; a record's id therefore ends in its place in the file, and only a conversation that repeats is left out.
    """

    name: ClassVar[str] = "llava"
    summary: ClassVar[str] = "LLaVA: LAION-CC-SBU-558K, the 665K instruction mix, and whatever has their form"

    data: Path
    """blip_laion_cc_sbu_558k.json, llava_v1_5_mix665k.json or the like."""
    task: Literal["chat", "image_caption"] = "chat"
    """chat, or image_caption for captions of whole images such as the 558K; it names the turns in counts, and the
    questions stand as they are."""

    def inputs(self) -> list[Path]:
        """The one file."""
        return [self.data]

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """One record a conversation, in the order of the file."""
        seen: set[bytes] = set()
        for place, entry in enumerate(iter_array(self.data, None, rejects)):
            own = entry.get("id") if isinstance(entry, dict) else None
            with rejects.noting(self.data, place if own is None else f"{short(own)} at {place}"):
                yield self._record(place, entry, seen)

    def _record(self, place: int, entry: Any, seen: set[bytes]) -> Record:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
            raise Fault(MALFORMED, f"expected a conversation with an id, got {short(entry)}")
        own, image = unicode_text(str(entry["id"])), entry.get("image") or ""
        if not isinstance(image, str):
            raise Fault(MALFORMED, f"expected one image, got {short(image)}")
        if self.task == "image_caption" and not image:
            raise Fault("caption without an image", "expected an image that is captioned, got none")
        turns = _turns(entry.get("conversations"), self.task, bool(image))
        said = repr((entry["id"], image, [(turn.question, turn.answer) for turn in turns]))
        digest = blake2b(said.encode(), digest_size=12).digest()
        if digest in seen:
            raise Fault("duplicate conversation", "expected each conversation once, got id, image and words again")
        seen.add(digest)
        width, height = check_image(self.images / image_name(image)) if image else (0, 0)
        return Record(
            id=f"{self.name}/{own}-{place}",
            source=self.name,
            image=image,
            width=width,
            height=height,
            regions=(),
            turns=tuple(turns),
        )


def _turns(conversation: Any, task: str, with_image: bool) -> list[Turn]:
    """The turns of a conversation that goes question, answer, question, answer."""
    if not isinstance(conversation, list) or not conversation:
        raise Fault(MALFORMED, f"expected a list of conversations, got {short(conversation)}")
    texts: list[str] = []
    images = 0
    for number, message in enumerate(conversation):
        role = message.get("from") if isinstance(message, dict) else None
        if role not in ("human", "gpt"):
            raise Fault("unknown role", f"expected 'human' or 'gpt' in message {number}, got {short(role)}")
        if role != ("gpt" if number % 2 else "human"):
            raise Fault("roles out of turn", f"expected human and gpt in turn, got {role} in message {number}")
        text = message.get("value")
        if not isinstance(text, str):
            raise Fault(MALFORMED, f"expected text in message {number}, got {short(text)}")
        if role == "human" and with_image:
            images += text.count(IMAGE_TOKEN)
            text = text.replace(IMAGE_TOKEN, "")
        text = text.strip()
        if not text:
            raise Fault(f"{'question' if role == 'human' else 'answer'} empty", f"expected words in message {number}")
        texts.append(words_alone(text))
    if len(texts) % 2:
        raise Fault("question without an answer", "expected gpt to have the last word, got human's")
    if images > 1:
        raise Fault("placeholder in the text", f"expected {IMAGE_TOKEN} once, got it {images} times")
    return [
        Turn(task=task, question=question, answer=answer)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]

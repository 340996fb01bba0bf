"""LLaVA's conversations about whole images: the captions of LAION-CC-SBU-558K and the 665K instruction mix.

Paper: §3.2 (image captioning as a pretext task; LLaVA's instruction data)
"""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.images import Fault, check_image, image_size
from regiongpt.data.convert.jsonstream import iter_array
from regiongpt.data.convert.values import MALFORMED, image_fault, short, text_fault, unicode_fault
from regiongpt.data.records import Record, Turn
from regiongpt.data.shards import Rejects
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
            found = self._record(place, entry, seen)
            if isinstance(found, Fault):
                own = entry.get("id") if isinstance(entry, dict) else None
                rejects.add(found.kind, self.data, place if own is None else f"{short(own)} at {place}", found.reason)
            else:
                yield found

    def _record(self, place: int, entry: Any, seen: set[bytes]) -> Record | Fault:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
            return Fault(MALFORMED, f"expected a conversation with an id, got {short(entry)}")
        if fault := unicode_fault(str(entry["id"])):
            return fault
        image = entry.get("image") or ""
        if not isinstance(image, str):
            return Fault(MALFORMED, f"expected one image, got {short(image)}")
        if self.task == "image_caption" and not image:
            return Fault("caption without an image", "expected an image that is captioned, got none")
        turns = _turns(entry.get("conversations"), self.task, bool(image))
        if isinstance(turns, Fault):
            return turns
        said = repr((entry["id"], image, [(turn.question, turn.answer) for turn in turns]))
        digest = blake2b(said.encode(), digest_size=12).digest()
        if digest in seen:
            return Fault("duplicate conversation", "expected each conversation once, got id, image and words again")
        seen.add(digest)
        width = height = 0
        if image:
            if fault := image_fault(image) or check_image(self.images / image):
                return fault
            width, height = image_size(self.images / image)
        return Record(
            id=f"{self.name}/{entry['id']}-{place}",
            source=self.name,
            image=image,
            width=width,
            height=height,
            regions=(),
            turns=tuple(turns),
        )


def _turns(conversation: Any, task: str, with_image: bool) -> list[Turn] | Fault:
    """The turns of a conversation that goes question, answer, question, answer; or what is wrong with it."""
    if not isinstance(conversation, list) or not conversation:
        return Fault(MALFORMED, f"expected a list of conversations, got {short(conversation)}")
    texts: list[str] = []
    images = 0
    for number, message in enumerate(conversation):
        role = message.get("from") if isinstance(message, dict) else None
        if role not in ("human", "gpt"):
            return Fault("unknown role", f"expected 'human' or 'gpt' in message {number}, got {short(role)}")
        if role != ("gpt" if number % 2 else "human"):
            return Fault("roles out of turn", f"expected human and gpt in turn, got {role} in message {number}")
        text = message.get("value")
        if not isinstance(text, str):
            return Fault(MALFORMED, f"expected text in message {number}, got {short(text)}")
        if role == "human" and with_image:
            images += text.count(IMAGE_TOKEN)
            text = text.replace(IMAGE_TOKEN, "")
        text = text.strip()
        if not text:
            return Fault(f"{'question' if role == 'human' else 'answer'} empty", f"expected words in message {number}")
        if fault := text_fault(text):
            return fault
        texts.append(text)
    if len(texts) % 2:
        return Fault("question without an answer", "expected gpt to have the last word, got human's")
    if images > 1:
        return Fault("placeholder in the text", f"expected {IMAGE_TOKEN} once, got it {images} times")
    return [
        Turn(task=task, question=question, answer=answer)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]

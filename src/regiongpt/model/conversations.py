"""Conversations as text: the checks on what people and models write, and the placeholders in it."""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from regiongpt.errors import DataError, RegionError
from regiongpt.prompts import (
    CONTROL_TOKENS,
    IMAGE_TOKEN,
    PLACEHOLDER,
    check_placeholders,
    placeholder_number,
    placeholders,
)

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]


def control_pattern(tokenizer: Any, chat_template: str) -> re.Pattern[str]:
    """What only the template, and never a person's words, may write: special tokens, and marks between turns."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {token for tokens in CONTROL_TOKENS.values() for token in tokens if token in chat_template}
    breakable = sorted((token for token in special if len(token.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, breakable)) or "(?!)")


def check_turns(
    messages: Messages, control: re.Pattern[str], with_image: bool, forgive_beyond: int | None = None
) -> list[dict[str, str]]:
    """Check the order of turns and make each a string, ``<image>`` before the first question.

    Args:
        messages: ``role`` and ``content``, a string or transformers' list of parts.
        control: from :func:`control_pattern`; what it finds in a content is broken up with a blank, and so read as the
            words it is.
        with_image: whether ``<image>`` comes before the first question.
        forgive_beyond: where given, placeholders of higher numbers, and malformed ones, are plain text in the
            assistant's turns.

    Returns:
        ``role`` and ``content``, a string, of each turn.

    Raises:
        DataError: a role is out of order, a content is empty or of a wrong kind, or an image is not at the start.
        RegionError: a placeholder is malformed.
    """
    turns: list[dict[str, str]] = []
    expected = {"system", "user"}
    first_question = True
    for position, message in enumerate(messages, 1):
        where = f"message {position} of {len(messages)}"
        role = message.get("role")
        if role not in expected:
            raise DataError(f"{where}: expected role {' or '.join(sorted(expected))}, got {role!r}")
        text, n_images = _content(message.get("content"), where)
        expected = {"assistant"} if role == "user" else {"user"}
        if role == "user" and first_question and text.startswith(IMAGE_TOKEN):
            text, n_images = text.removeprefix(IMAGE_TOKEN), n_images + 1
        if n_images > (with_image and role == "user" and first_question):
            raise DataError(f"{where}: expected one image in all, in the first question, got {n_images} here")
        if not text.strip():
            kind = {"user": "a question", "assistant": "an answer"}.get(role, "a system prompt")
            raise DataError(f"{where}: expected {kind}, got an empty one; write some text")
        # A trailing blank is kept out because no tokenizer spells it the same way with and without a next word.
        text = text.strip()
        if role == "assistant" and forgive_beyond is not None:
            text = PLACEHOLDER.sub(lambda match: _forgiven(match, forgive_beyond), text)
        elif PLACEHOLDER.search(text):
            placeholders(text)  # a malformed one is an error, not a control token to be broken up
        while control.search(text):
            text = control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if role == "user" and first_question:
            text = f"{IMAGE_TOKEN}\n{text}" if with_image else text
            first_question = False
        turns.append({"role": role, "content": text})
    if not turns or first_question:
        raise DataError("expected a conversation with a question in it, got none; add a user message")
    return turns


def expand_regions(text: str, spans: Spans, region_format: str, n_regions: int) -> tuple[str, Spans, list[int]]:
    """Write each ``<regionN>`` as the model reads it.

    Args:
        text: a rendered conversation.
        spans: characters of ``text`` from, to.
        region_format: what a placeholder becomes, ``{n}`` being its number.
        n_regions: how many regions there are.

    Returns:
        The text, the spans moved along with it, and the 0-based region of each placeholder in order.

    Raises:
        RegionError: a placeholder is malformed or without its region.
    """
    pieces: list[str] = []
    region_ids: list[int] = []
    ends, gains = [0], [0]  # where each placeholder ends in the old text, and characters gained up to there
    for match in PLACEHOLDER.finditer(text):
        number = placeholder_number(match)
        if number > n_regions:
            check_placeholders(match[0], n_regions)
        written = region_format.replace("{n}", str(number))
        pieces += text[ends[-1] : match.start()], written
        gains.append(gains[-1] + len(written) - len(match[0]))
        ends.append(match.end())
        region_ids.append(number - 1)
    pieces.append(text[ends[-1] :])

    def moved(place: int) -> int:
        return place + gains[bisect_right(ends, place) - 1]

    return "".join(pieces), [(moved(start), moved(end)) for start, end in spans], region_ids


def images_in(messages: Messages) -> list[Any]:
    """Images carried by the content lists themselves."""
    return [
        part[key]
        for message in messages
        if not isinstance(message.get("content"), str)
        for part in message.get("content") or ()
        for key in ("image", "path", "url")
        if isinstance(part, Mapping) and part.get("type") == "image" and key in part
    ]


def _forgiven(match: re.Match[str], n_regions: int) -> str:
    """A placeholder of the model's own making: itself if its region exists, else broken up into plain text."""
    try:
        known = placeholder_number(match) <= n_regions
    except RegionError:
        known = False
    return match[0] if known else f"< {match[0][1:]}"


def _content(content: Any, where: str) -> tuple[str, int]:
    """Text of a message and how many images it holds, of a string or of transformers' list of parts."""
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: expected content as a string or a list of parts, got {type(content).__name__}")
    texts, n_images = [], 0
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text":
            texts.append(str(part.get("text", "")))
        elif kind == "image":
            n_images += 1
        else:
            raise DataError(f"{where}: expected parts of type text or image, got {kind!r}")
    return "\n".join(texts), n_images

"""Records as a model is taught them: their tokens with what is learnt marked, for a terminal and as a web page.

Paper: §3.2 (only the response is learnt).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup, escape

from regiongpt.data.inspection import draw_record, encode, said
from regiongpt.data.shards import RecordSet
from regiongpt.data.statistics import Statistics, table_rows
from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.report import chip, picture, write_page

if TYPE_CHECKING:
    from regiongpt.model.processing import RegionGPTProcessor

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one token stands for, or a few that spell one character together.

    Attributes:
        text: Decoded.
        target: Whether it is learnt.
        kind: ``"image"`` and ``"region"`` stand where an embedding does; ``"special"`` is written by the chat template.
        count: Tokens in it.
        ids: Of the tokens, without repeats.
        region: Number of the region of a ``"region"``.
    """

    text: str
    target: bool
    kind: Literal["text", "special", "image", "region"] = "text"
    count: int = 1
    ids: tuple[int, ...] = ()
    region: int = 0


def pieces(encoded: Mapping[str, Any], processor: "RegionGPTProcessor") -> list[Piece]:
    """The tokens of a conversation, decoded one by one.

    Args:
        encoded: What :meth:`RegionGPTProcessor.encode_conversation` has made, with labels.
        processor: That made it.
    """
    ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
    tokenizer = processor.tokenizer
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    regions = iter(encoded["region_ids"].tolist())
    found: list[Piece] = []
    waiting: list[int] = []
    before: list[int] = []  # the last piece: some tokenizers write the blank before a word only behind another
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        target = label == token
        if token == processor.image_token_id:
            if found and found[-1].kind == "image":
                found[-1] = replace(found[-1], count=found[-1].count + 1)
            else:
                found.append(Piece(text=processor.image_token, target=False, kind="image", ids=(token,)))
        elif token == processor.region_token_id:
            number = next(regions) + 1
            found.append(Piece(text=f"<region{number}>", target=False, kind="region", ids=(token,), region=number))
        elif token in special:
            text = tokenizer.convert_ids_to_tokens(token)
            found.append(Piece(text=text, target=target, kind="special", ids=(token,)))
        else:
            waiting.append(token)
            text = tokenizer.decode(before + waiting)[len(tokenizer.decode(before)) :]
            last = place + 1 == len(ids) or (labels[place + 1] == ids[place + 1]) != target
            # A letter that no token spells whole is spelt by its bytes: up to four tokens for one.
            if text.endswith("\ufffd") and len(waiting) < 4 and not last:
                continue
            found.append(Piece(text=text, target=target, count=len(waiting), ids=tuple(waiting)))
            waiting = []
        before = list(found[-1].ids)
    return found


def target_count(shown: Sequence[Piece]) -> tuple[int, int]:
    """How many tokens there are, and how many of them are learnt."""
    return sum(piece.count for piece in shown), sum(piece.count for piece in shown if piece.target)


# ---------------------------------------------------------------------------------------------------------------------
# In a terminal

_RESET, _TARGET, _PLACE, _FAINT = "\x1b[0m", "\x1b[1;32m", "\x1b[36m", "\x1b[2m"


def terminal(shown: Sequence[Piece], colour: bool) -> str:
    """The tokens as text, what is learnt in bold green, or between ``⟦`` and ``⟧`` without colour.

    Control characters of the data are written as escapes: they could do anything to a terminal.
    """
    parts: list[str] = []
    learnt = False
    for piece in shown:
        text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", piece.text)
        if piece.kind == "image" and piece.count > 1:
            text = f"{text}×{piece.count}"
        if learnt and not piece.target:  # a turn has ended: the next begins a line of its own
            text = text if text.startswith("\n") else f"\n{text}"
        if colour:
            learnt = piece.target
            style = _TARGET if piece.target else _FAINT if piece.kind == "text" else _PLACE
            # Line by line, for a pager colours each on its own.
            parts.append("\n".join(f"{style}{line}{_RESET}" if line else "" for line in text.split("\n")))
            continue
        if piece.target != learnt:
            parts.append("⟦" if piece.target else "⟧")
            learnt = piece.target
        parts.append(text)
    return "".join(parts) + ("⟧" if learnt and not colour else "")


# ---------------------------------------------------------------------------------------------------------------------
# As a page


def write_gallery(
    path: Path,
    records: RecordSet,
    indices: Sequence[int],
    processor: "RegionGPTProcessor",
    counted: Statistics | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> None:
    """Write a page that shows records with their pictures, questions, answers and tokens; it needs no other file.

    Args:
        path: Of the page.
        records: The folder.
        indices: Of the records to be shown, in this order.
        processor: Of the model to be trained.
        counted: Statistics to begin with.
        seed: Of the wording.
        epoch: Likewise.

    Raises:
        DataError: The page cannot be written.
    """
    write_page(
        path,
        "records.html",
        title=f"{records.manifest.source}: {len(records):,} records",
        made=f"{records.folder}, converted by regiongpt {records.manifest.regiongpt_version}; "
        f"questions as worded with seed {seed} in epoch {epoch}",
        tables=table_rows(counted) if counted is not None else [],
        records=len(records),
        cards=[_card(records, index, processor, seed, epoch) for index in indices],
    )


def _card(records: RecordSet, index: int, processor: "RegionGPTProcessor", seed: int, epoch: int) -> dict[str, Any]:
    """One record for the page; whatever cannot be shown of a faulty one gives way to the reason."""
    try:
        record = records[index]
        dialogue = said(record, seed, epoch, index)
    except (DataError, ConfigError, RegionError) as error:
        return {"heading": f"record {index}", "fault": str(error), **dict.fromkeys(("meta", "dialogue", "tokens"))}
    where = f"{record.image}, {record.width} × {record.height} px" if record.image else "no image"
    found: dict[str, Any] = {
        "heading": record.id,
        "meta": f"record {index} · {record.task} · {where}",
        "regions": [(each.category, each.region.kind) for each in record.regions],
        "dialogue": dialogue,
        **dict.fromkeys(("picture", "picture_fault", "tokens", "fault")),
    }
    try:
        if record.image:
            drawn = draw_record(record, records.image_path(record), names=False)
            found["picture"] = picture(drawn, f"{record.image} with {len(record.regions)} numbered regions")
    except (DataError, RegionError) as error:
        found["picture_fault"] = str(error)
    try:
        shown = pieces(encode(record, processor, seed, epoch, index), processor)
        found["total"], found["supervised"] = target_count(shown)
        found["tokens"] = list(_spans(shown))
    except (DataError, RegionError) as error:
        found["fault"] = str(error)
    return found


def _spans(shown: Sequence[Piece]) -> Iterator[tuple[str, str, Markup, bool]]:
    """Each token with its classes and title, and whether a line begins with it, as behind a turn that has ended."""
    learnt = False
    for piece in shown:
        ids = ", ".join(map(str, piece.ids))
        title = f"{piece.count} tokens, id {ids}" if piece.count > 1 else f"id {ids}"
        text = chip(piece.region) if piece.region else Markup("↵<br>").join(map(escape, piece.text.split("\n")))
        if piece.kind == "image" and piece.count > 1:
            text += f" × {piece.count}"
        breaks = learnt and not piece.target and not piece.text.startswith("\n")
        learnt = piece.target
        yield f"{piece.kind} learnt" if piece.target else piece.kind, title, text, breaks

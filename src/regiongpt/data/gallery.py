"""Records as a model is taught them: their tokens with what is learnt marked, for a terminal and as a web page.

Paper: §3.2 (only the response is learnt).
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from regiongpt.data.inspection import draw_record, encode, said
from regiongpt.data.records import Record
from regiongpt.data.shards import RecordSet
from regiongpt.data.statistics import Statistics, table_rows
from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.pages import beside, card, chip, columns, fault, page, picture, region_list, table, turn

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


def gallery(
    records: RecordSet,
    indices: Sequence[int],
    processor: "RegionGPTProcessor",
    counted: Statistics | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> str:
    """A page that shows records with their pictures, questions, answers and tokens; it needs no other file.

    Args:
        records: The folder.
        indices: Of the records to be shown, in this order.
        processor: Of the model to be trained.
        counted: Statistics to begin with.
        seed: Of the wording.
        epoch: Likewise.
    """
    statistics = columns(table(rows, title) for title, rows in table_rows(counted)) if counted is not None else ""
    cards = "\n".join(_card(records, index, processor, seed, epoch) for index in indices)
    return page(
        f"{records.manifest.source}: {len(records):,} records",
        f"{records.folder}, converted by regiongpt {records.manifest.regiongpt_version}; "
        f"questions as worded with seed {seed} in epoch {epoch}",
        f"{statistics}\n{_KEY.format(shown=len(indices), records=len(records))}\n{cards}",
        _STYLE,
    )


def _card(records: RecordSet, index: int, processor: "RegionGPTProcessor", seed: int, epoch: int) -> str:
    """One record; whatever cannot be shown of a faulty one gives way to the reason."""
    try:
        record = records[index]
        dialogue = said(record, seed, epoch, index)
    except (DataError, ConfigError, RegionError) as error:
        return card(fault(str(error)), f"record {index}")
    try:
        shown = pieces(encode(record, processor, seed, epoch, index), processor)
        total, learnt = target_count(shown)
        tokens = f"<h3>{total:,} tokens, {learnt:,} of them learnt</h3><p class='tokens'>{_spans(shown)}</p>"
    except (DataError, RegionError) as error:
        tokens = fault(str(error))
    where = f"{record.image}, {record.width} × {record.height} px" if record.image else "no image"
    regions = region_list([(each.category, each.region.kind) for each in record.regions])
    talk = regions + "".join(turn(question, answer) for question, answer in dialogue)
    return card(beside(_figure(records, record), talk) + tokens, record.id, f"record {index} · {record.task} · {where}")


def _figure(records: RecordSet, record: Record) -> str:
    if not record.image:
        return ""
    try:
        drawn = draw_record(record, records.image_path(record), names=False)
    except (DataError, RegionError) as error:
        return fault(str(error))
    return picture(drawn, f"{record.image} with {len(record.regions)} numbered regions")


def _spans(shown: Sequence[Piece]) -> str:
    parts: list[str] = []
    learnt = False
    for piece in shown:
        if learnt and not piece.target and not piece.text.startswith("\n"):
            parts.append("<br>")  # a turn has ended
        learnt = piece.target
        ids = ", ".join(map(str, piece.ids))
        title = f"{piece.count} tokens, id {ids}" if piece.count > 1 else f"id {ids}"
        text = html.escape(piece.text).replace("\n", "↵<br>")
        if piece.kind == "image" and piece.count > 1:
            text += f" × {piece.count}"
        elif piece.kind == "region":
            text = chip(piece.region)
        marks = " ".join(mark for mark, is_so in ((piece.kind, True), ("learnt", piece.target)) if is_so)
        # A line may end behind every token, as it may behind every word.
        parts.append(f'<span class="{marks}" title="{title}">{text}</span><wbr>')
    return "".join(parts)


_STYLE: Final = """
.tokens { margin: 4px 0 0; padding: 10px 12px; background: var(--asked);
  border-radius: 8px; font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { padding: 1px 0; border-right: 1px solid var(--line); color: var(--faint); }
.tokens .special, .tokens .image { font-weight: 600; }
.tokens .learnt { background: var(--learnt); color: var(--learnt-ink); }
.key { font-size: 13px; color: var(--faint); } .key span { padding: 1px 6px; border-radius: 4px; }
.key .learnt { background: var(--learnt); color: var(--learnt-ink); }
"""

_KEY: Final = """<p class="key">{shown:,} of {records:,} records. <span class="learnt">Green</span> tokens are learnt;
all others are only read. A line stands between tokens; point at one for its id.</p>"""

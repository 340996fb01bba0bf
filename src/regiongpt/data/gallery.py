"""Records as a model is taught them: their tokens with what is learnt marked, for a terminal and as a web page.

Paper: §3.2 (only the response is learnt).
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from regiongpt.data.inspection import draw_record, encode, said
from regiongpt.data.records import Record
from regiongpt.data.shards import RecordSet
from regiongpt.data.statistics import Statistics, table_rows
from regiongpt.drawing import COLOURS
from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.prompts import PLACEHOLDER

if TYPE_CHECKING:
    from regiongpt.model.processing import RegionGPTProcessor

PICTURE_SIDE: Final = 900
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
    cards = "\n".join(_card(records, index, processor, seed, epoch) for index in indices)
    name = html.escape(f"{records.manifest.source}: {len(records):,} records")
    made = html.escape(
        f"{records.folder}, converted by regiongpt {records.manifest.regiongpt_version}; "
        f"questions as worded with seed {seed} in epoch {epoch}"
    )
    return _PAGE.format(
        title=name,
        style=_STYLE,
        made=made,
        statistics=_tables(counted) if counted is not None else "",
        shown=f"{len(indices):,} of {len(records):,} records",
        cards=cards,
    )


def write_page(text: str, path: Path) -> None:
    """Writes a page.

    Raises:
        ConfigError: It cannot be written there.
    """
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"expected --html to be a file that can be written, got {str(path)!r}: {error}") from None


def _card(records: RecordSet, index: int, processor: "RegionGPTProcessor", seed: int, epoch: int) -> str:
    """One record; whatever cannot be shown of a faulty one gives way to the reason."""
    try:
        record = records[index]
        dialogue = said(record, seed, epoch, index)
    except (DataError, ConfigError, RegionError) as error:
        return f'<article><h2>record {index}</h2><p class="fault">{html.escape(str(error))}</p></article>'
    try:
        shown = pieces(encode(record, processor, seed, epoch, index), processor)
        total, learnt = target_count(shown)
        tokens = f"<h3>{total:,} tokens, {learnt:,} of them learnt</h3><p class='tokens'>{_spans(shown)}</p>"
    except (DataError, RegionError) as error:
        tokens = f'<p class="fault">{html.escape(str(error))}</p>'
    where = f"{record.image}, {record.width} × {record.height} px" if record.image else "no image"
    return (
        f'<article><h2>{html.escape(record.id)}</h2><p class="meta">record {index} · {html.escape(record.task)} · '
        f"{html.escape(where)}</p><div class='pair'>{_figure(records, record)}<div class='talk'>{_regions(record)}"
        f"{''.join(_turn(question, answer) for question, answer in dialogue)}</div></div>{tokens}</article>"
    )


def _figure(records: RecordSet, record: Record) -> str:
    if not record.image:
        return ""
    try:
        picture = draw_record(record, records.image_path(record), names=False)
    except (DataError, RegionError) as error:
        return f'<p class="fault">{html.escape(str(error))}</p>'
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    coded = base64.b64encode(data.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{coded}" width="{picture.width}" height="{picture.height}" '
        f'alt="{html.escape(record.image)} with {len(record.regions)} numbered regions">'
    )


def _regions(record: Record) -> str:
    if not record.regions:
        return ""
    items = [
        f"<li>{_chip(number)} {html.escape(each.category)} <small>{each.region.kind}</small></li>"
        for number, each in enumerate(record.regions, 1)
    ]
    return f'<ul class="regions">{"".join(items)}</ul>'


def _turn(question: str, answer: str) -> str:
    return f"<p class='q'>{_with_chips(question)}</p><p class='a'>{_with_chips(answer)}</p>"


def _with_chips(text: str) -> str:
    """Text with every placeholder in the colour of its region."""
    parts: list[str] = []
    end = 0
    for match in PLACEHOLDER.finditer(text):
        parts.append(html.escape(text[end : match.start()]))
        parts.append(_chip(int(match[1])) if match[1].isdecimal() else html.escape(match[0]))
        end = match.end()
    return "".join([*parts, html.escape(text[end:])]).replace("\n", "<br>")


def _chip(number: int) -> str:
    red, green, blue = COLOURS[(number - 1) % len(COLOURS)]
    ink = "#212121" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "#fff"
    return f'<b class="chip" style="background:rgb({red},{green},{blue});color:{ink}">{number}</b>'


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
            text = _chip(piece.region)
        marks = " ".join(mark for mark, is_so in ((piece.kind, True), ("learnt", piece.target)) if is_so)
        # A line may end behind every token, as it may behind every word.
        parts.append(f'<span class="{marks}" title="{title}">{text}</span><wbr>')
    return "".join(parts)


def _tables(counted: Statistics) -> str:
    blocks: list[str] = []
    for title, (header, *body) in table_rows(counted):
        heading = f"<h3>{title}</h3>" if title else ""
        # A column without a name holds bars.
        marks = ["" if cell else ' class="bar"' for cell in header]
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        rows = (
            "".join(f"<td{mark}>{html.escape(cell)}</td>" for mark, cell in zip(marks, row, strict=True))
            for row in body
        )
        lines = "".join(f"<tr>{row}</tr>" for row in rows)
        blocks.append(f"<div>{heading}<table><tr>{head}</tr>{lines}</table></div>")
    return f"<section class='statistics'>{''.join(blocks)}</section>"


_STYLE: Final = """
:root { color-scheme: light dark; --line: #d5d8dc; --faint: #6b7280; --card: #fff; --page: #f3f4f6; --ink: #1f2937;
  --learnt: #c7ecd4; --learnt-ink: #0b4f27; --asked: #eef1f5; }
@media (prefers-color-scheme: dark) { :root { --line: #3a414b; --faint: #9aa3af; --card: #1c2128; --page: #12161b;
  --ink: #e5e7eb; --learnt: #14532d; --learnt-ink: #d1fae5; --asked: #272e38; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 24px; } h2 { margin: 0; font-size: 16px; overflow-wrap: anywhere; }
h3 { margin: 16px 0 4px; font-size: 14px; }
.meta { margin: 0 0 12px; color: var(--faint); font-size: 13px; overflow-wrap: anywhere; }
article, .statistics { margin: 20px 0; padding: 18px 20px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.statistics { columns: 2 480px; column-gap: 40px; }
.statistics > div { margin-bottom: 14px; overflow-x: auto; break-inside: avoid; }
.statistics h3 { margin-top: 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 18px 2px 0; text-align: right; white-space: pre; }
th { color: var(--faint); font-weight: 600; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .bar { text-align: left; }
.pair { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
.pair > img { flex: 1 1 420px; width: 420px; max-width: 620px; height: auto; border-radius: 6px; }
.talk { flex: 1 1 340px; min-width: 0; }
.talk p { margin: 0 0 6px; padding: 6px 12px; border-radius: 10px; overflow-wrap: anywhere; width: fit-content; }
.q { background: var(--asked); }
.talk .a { margin: 0 0 12px 28px; background: var(--learnt); color: var(--learnt-ink); }
.regions { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0 0 12px; padding: 0; list-style: none;
  font-size: 13px; }
.regions small { color: var(--faint); }
.chip { display: inline-block; min-width: 1.6em; padding: 0 5px; border-radius: 5px; text-align: center;
  font: 600 12px/1.5 system-ui, sans-serif; }
.tokens { margin: 4px 0 0; padding: 10px 12px; background: var(--asked);
  border-radius: 8px; font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { padding: 1px 0; border-right: 1px solid var(--line); color: var(--faint); }
.tokens .special, .tokens .image { font-weight: 600; }
.tokens .learnt { background: var(--learnt); color: var(--learnt-ink); }
.fault { padding: 10px 12px; border: 1px solid #d55e00; border-radius: 8px; overflow-wrap: anywhere; }
.key { font-size: 13px; color: var(--faint); } .key span { padding: 1px 6px; border-radius: 4px; }
.key .learnt { background: var(--learnt); color: var(--learnt-ink); }
"""

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1><p class="meta">{made}</p>
{statistics}
<p class="key">{shown}. <span class="learnt">Green</span> tokens are learnt; all others are only read. A line stands
between tokens; point at one for its id.</p>
{cards}
</body></html>
"""

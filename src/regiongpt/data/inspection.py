"""Contents of a folder of records: statistics, records as training reads them, and faults.

Paper: Table 2 (images, regions, average words), §3.2 (only the response is supervised), §4 (boxes a category)
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from regiongpt.console import progress
from regiongpt.data.records import Record
from regiongpt.data.shards import Fault, RecordSet, counted, fault_of, many, require_data_extra
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionError, RegionGPTError, naming
from regiongpt.images import load_image
from regiongpt.prompts import IMAGE_TOKEN, PLACEHOLDER
from regiongpt.report import picture, write_page
from regiongpt.settings import Settings
from regiongpt.storage import check_checkpoint, check_writable, sha256

if TYPE_CHECKING:
    from regiongpt.model.processing import RegionGPTProcessor

SHARES: Final = {1e-4: "under 0.01 %", 1e-3: "0.01 to 0.1 %", 1e-2: "0.1 to 1 %", 0.1: "1 to 10 %", 2.0: "10 to 100 %"}
"""Classes of the share of its image that a region covers, each by its upper bound."""
SIZES: Final = {32: "small, under 32² px", 96: "medium, under 96² px", 1 << 40: "large, from 96² px"}
"""COCO's classes of regions, each by the side of the square that bounds it."""
_MOST_CATEGORIES: Final = 20
_BAR: Final = 40
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Inspection(Settings):
    """What to show: statistics, unless a record or a check is requested."""

    images: Path | None = None
    """folder of the images, if it has moved"""
    check: bool = False
    """check every record; exit code 1 if there are faults"""
    record: str | None = Field(None, min_length=1)
    """show one record, by index from 0 or by id"""
    html: Path | None = None
    """write a page that shows records as training reads them"""
    count: int | None = Field(None, ge=1)
    """with --html: how many records (default: 24)"""
    model: Path | None = None
    """checkpoint folder whose tokenizer and template are used (default: the package's model)"""
    seed: int | None = Field(None, ge=0)
    """seed of the wording and of the records on the page (default: 0)"""
    epoch: int | None = Field(None, ge=0)
    """epoch epoch epoch of the wording (default: 0)"""

    @model_validator(mode="after")
    def _refuse_idle(self) -> "Inspection":
        for name, needed in (
            ("count", ("html",)),
            ("epoch", ("record", "html")),
            ("seed", ("record", "html")),
            ("model", ("record", "html", "check")),
            ("images", ("html", "check")),
        ):
            if getattr(self, name) is not None and not any(getattr(self, other) for other in needed):
                listed = " or ".join(f"--{other}" for other in needed)
                raise ValueError(f"--{name} goes with {listed}; add one of them or leave it out")
        if self.count is not None and self.record:
            raise ValueError("--count and --record cannot be combined; leave one out")
        return self


def inspect(folder: Path, options: Inspection) -> bool:
    """Print and write what the options request.

    Returns:
        Whether a check has found a fault.

    Raises:
        RegionGPTError: A file cannot be read or written, or there is no such record.
    """
    require_data_extra()
    if options.html is not None:
        check_writable(options.html)
    seed, epoch = options.seed or 0, options.epoch or 0
    records = RecordSet(folder, options.images)
    index = find(records, options.record) if options.record else None
    processor: Any = load_processor(options.model) if options.record or options.html or options.check else None
    tables: Tables = []
    if index is not None:
        record = records[index]
        shown = pieces(encode(record, processor, seed, epoch, index), processor)
        colour = bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
        total, supervised = (sum(piece.tokens for piece in some) for some in (shown, [p for p in shown if p.target]))
        print(f"{_described(record, index)}\n\n{total:,} tokens, {supervised:,} of them supervised:\n")
        print(terminal(shown, colour and not os.environ.get("NO_COLOR")))
    elif options.html or not options.check:
        rows = progress(records.rows(), "statistics", "records", len(records))
        tables = statistics(records.manifest.source, map(Record.from_row, rows), records.manifest.rejects)
        if not options.check:
            print(as_text(tables) + ("" if records.manifest.rejects else "\n\nThe conversion left nothing out."))
    if options.html:
        chosen = [index or 0]
        if index is None:
            count = min(len(records), options.count or 24)
            chosen = sorted(np.random.default_rng(seed).choice(len(records), count, replace=False).tolist())
        manifest = records.manifest
        write_page(
            options.html,
            "records.html",
            title=f"{manifest.source}: {many(len(records), 'record')}",
            made=f"{records.folder}, converted by regiongpt {manifest.regiongpt_version}; "
            f"questions as worded with seed {seed} in epoch {epoch}",
            tables=tables,
            records=len(records),
            cards=[_card(records, index, processor, seed, epoch) for index in chosen],
        )
        print(f"page of {many(len(chosen), 'record')} written to {options.html}")
    if not options.check:
        return False
    faulty: set[str] = set()
    kinds = Counter[str]()
    for name, fault in check(records, processor):
        faulty.add(name)
        kinds[fault.kind] += 1
        print(f"{name}: {fault.kind}: {fault.reason}")
    result = f"{len(faulty):,} faulty" if faulty else "every one can be taught"
    print(f"{many(len(records), 'record')} checked: {result}", *counted(kinds), sep="\n")
    return bool(faulty)


def find(records: RecordSet, which: str) -> int:
    """Index of a record given by index from 0 or by id; DataError if there is none."""
    if which.isdecimal():
        if int(which) < len(records):
            return int(which)
        raise DataError(f"{records.folder}: give a record from 0 to {len(records) - 1}, got {which}")
    import pyarrow.compute as pc

    place: int = pc.index(records.table.data.column("id"), which).as_py()
    if place < 0:
        raise DataError(f"{records.folder}: found no record '{which}'; its first is '{records[0].id}'")
    return place


def _described(record: Record, index: int) -> str:
    size = record.width, record.height
    where = "{}, {} x {} (W x H)".format(record.image, *size) if record.image else "no image"
    lines = [f"record {index}, {record.id}, from {record.source}", f"image   {where}"]
    for number, each in enumerate(record.regions, 1):
        bounds = ", ".join(f"{side:g}" for side in np.round(each.region.bounds(*size), 1))
        share = f"{100 * each.region.area(*size) / (size[0] * size[1]):.3g} % of the image"
        lines.append(f"[{number}]     {each.region.kind} within {bounds}, {share}  {each.category}".rstrip())
    for number, turn in enumerate(record.turns, 1):
        lines.append(f"turn {number}  {', '.join(filter(None, [turn.task, 'guided' * turn.guided, turn.label_set]))}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


Tables = list[tuple[str, list[list[str]]]]


def statistics(source: str, records: Iterable[Record], rejects: Mapping[str, int]) -> Tables:
    """Counts over records, with the rejects of their conversion, as titled tables of text.

    The first row of a table is its header; empty tables are left out. ``regions`` of a task are those that its
    questions are about.
    """
    images: set[str] = set()
    n_records = n_regions = 0
    kinds, categories = Counter[str](), Counter[str]()
    shares, sizes = Counter(dict.fromkeys(SHARES.values(), 0)), Counter(dict.fromkeys(SIZES.values(), 0))
    tasks: dict[str, Counter[str]] = {}
    for record in records:
        images.update(filter(None, [record.image]))
        n_records += 1
        n_regions += len(record.regions)
        kinds.update(each.region.kind for each in record.regions)
        categories.update(each.category for each in record.regions if each.category)
        for each in record.regions:
            try:
                area = each.region.area(record.width, record.height)
            except RegionError:
                shares["no area"] += 1
                continue
            share = area / (record.width * record.height)
            shares[next(name for bound, name in SHARES.items() if share < bound)] += 1
            sizes[next(name for side, name in SIZES.items() if area < side**2)] += 1
        for turn in record.turns:
            asked = len(turn.regions or set(PLACEHOLDER.findall(turn.question)))
            found = {"turns": 1, "guided": int(turn.guided), "regions": asked, "words": len(turn.answer.split())}
            tasks.setdefault(turn.task, Counter()).update(found)
    total = sum(tasks.values(), Counter[str]())

    def average(counts: Counter[str]) -> str:
        return f"{counts['words'] / max(1, counts['turns']):.2f}"

    def shared(name: str, counts: Iterable[tuple[str, int]]) -> list[list[str]]:
        listed = list(counts)
        rows = [[name, "regions", ""]]
        for part, count in listed[:_MOST_CATEGORIES]:
            share = count / max(1, n_regions)
            rows.append([part, f"{count:,}", f"{100 * share:5.1f} %  {'█' * round(share * _BAR)}".rstrip()])
        if len(listed) > _MOST_CATEGORIES:
            rest = sorted(count for _, count in listed)
            spread = f"of {len(rest):,}: the rarest {rest[0]:,}, half of them up to {rest[len(rest) // 2]:,}"
            rows.append(["...", "", spread])
        return rows

    numbers = len(images), n_regions, average(total), len(categories), n_records, total["turns"]
    header = ["data set", "images", "regions", "average words", "categories", "records", "turns"]
    by_task = [
        [name, *(f"{each[key]:,}" for key in ("turns", "guided", "regions")), average(each)]
        for name, each in sorted(tasks.items())
    ]
    tables = [
        ("", [header, [source, *(n if isinstance(n, str) else f"{n:,}" for n in numbers)]]),
        ("Turns", [["task", "turns", "guided", "regions", "average words"], *by_task]),
        ("Area of the regions", shared("share of the image", shares.items())),
        ("", shared("size as COCO counts", sizes.items())),
        ("", shared("kind of region", kinds.most_common())),
        ("Categories", shared("category", categories.most_common())),
        ("Rejects", [["left out by the conversion", "times"], *([k, f"{n:,}"] for k, n in sorted(rejects.items()))]),
    ]
    return [(title, table) for title, table in tables if len(table) > 1]


def as_text(tables: Tables) -> str:
    """Tables for a terminal: words to the left and numbers to the right."""
    blocks = []
    for _, table in tables:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        numbers = [bool(title) and k > 0 for k, title in enumerate(table[0])]
        for row in table:
            cells = (f"{cell:{'>' if n else '<'}{width}}" for cell, n, width in zip(row, numbers, widths, strict=True))
            blocks.append("   ".join(cells).rstrip())
        blocks.append("")
    return "\n".join(blocks[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# What a model is taught


def load_processor(model: str | Path | None = None) -> "RegionGPTProcessor":
    """The processor of a checkpoint folder, by default the package's model; CheckpointError if there is none."""
    from regiongpt.model import weights
    from regiongpt.model.processing import RegionGPTProcessor

    folder = weights.nano_path() if model is None else Path(model)
    check_checkpoint(folder)
    with weights.reading(f"the processor of {folder}"):
        loaded: RegionGPTProcessor = RegionGPTProcessor.from_pretrained(folder, local_files_only=True)
    return loaded


def encode(record: Record, processor: "RegionGPTProcessor", seed: int, epoch: int, index: int) -> dict[str, Any]:
    """The tokens and targets of a record, as training makes them, without the image and the regions' pixels."""
    return processor.encode_conversation(
        record.messages(seed, epoch, index),
        region_weights=np.zeros((len(record.regions) * processor.tokens_per_region, 1, 1), np.float32),
        with_image=bool(record.image),
    )


def said(record: Record, seed: int, epoch: int, index: int) -> list[tuple[str, str]]:
    """The questions and answers of a record as training reads them, without ``<image>``."""
    texts = [message["content"] for message in record.messages(seed, epoch, index)]
    texts[0] = texts[0].removeprefix(f"{IMAGE_TOKEN}\n")
    return list(zip(texts[::2], texts[1::2], strict=True))


class Piece(NamedTuple):
    """The text of one token, or of a few that spell one character together."""

    text: str
    target: bool  # supervised
    ids: tuple[int, ...]  # without repeats
    kind: Literal["text", "special", "image", "region"] = "text"  # special: written by the chat template
    tokens: int = 1
    region: int = 0  # its number


def pieces(encoded: Mapping[str, Any], processor: "RegionGPTProcessor") -> list[Piece]:
    """The tokens that :meth:`RegionGPTProcessor.encode_conversation` has made, decoded one by one."""
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
            count = found.pop().tokens + 1 if found and found[-1].kind == "image" else 1
            found.append(Piece(processor.image_token, False, (token,), "image", count))
        elif token == processor.region_token_id:
            number = next(regions) + 1
            found.append(Piece(f"<region{number}>", False, (token,), "region", region=number))
        elif token in special:
            found.append(Piece(tokenizer.convert_ids_to_tokens(token), target, (token,), "special"))
        else:
            waiting.append(token)
            text = tokenizer.decode(before + waiting)[len(tokenizer.decode(before)) :]
            last = place + 1 == len(ids) or (labels[place + 1] == ids[place + 1]) != target
            # A letter outside the vocabulary is spelt by its bytes: up to four tokens for one.
            if text.endswith("\ufffd") and len(waiting) < 4 and not last:
                continue
            found.append(Piece(text, target, tuple(waiting), tokens=len(waiting)))
            waiting = []
        before = list(found[-1].ids)
    return found


def terminal(shown: Sequence[Piece], colour: bool) -> str:
    """The tokens as text, what is supervised in bold green, or between ``⟦`` and ``⟧`` without colour."""
    parts: list[str] = []
    taught = False
    for piece in shown:
        text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", piece.text)  # lest data steer the terminal
        if piece.kind == "image" and piece.tokens > 1:
            text = f"{text}×{piece.tokens}"
        if taught and not piece.target:  # a turn has ended: the next begins on its own line
            text = text if text.startswith("\n") else f"\n{text}"
        if colour:  # line by line, for pagers: bold green, faint or cyan
            style = "1;32" if piece.target else "2" if piece.kind == "text" else "36"
            text = "\n".join(f"\x1b[{style}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
        elif piece.target != taught:
            parts.append("⟦" if piece.target else "⟧")
        taught = piece.target
        parts.append(text)
    return "".join(parts) + ("⟧" if taught and not colour else "")


def _card(records: RecordSet, index: int, processor: "RegionGPTProcessor", seed: int, epoch: int) -> dict[str, Any]:
    """One record for the page."""
    record, shown = records[index], None
    with naming(record.id):
        if path := records.image_path(record):
            image = load_image(path)
            _check_size(image.size, record)
            alt = f"{record.image} with {many(len(record.regions), 'numbered region')}"
            shown = picture(draw_regions(image, [each.region for each in record.regions]), alt)
        return {
            "index": index,
            "record": record,
            "dialogue": said(record, seed, epoch, index),
            "picture": shown,
            "tokens": pieces(encode(record, processor, seed, epoch, index), processor),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def check(records: RecordSet, processor: "RegionGPTProcessor") -> Iterator[tuple[str, Fault]]:
    """Check every record as training reads it, and every image.

    Yields:
        The id of a record (its place where it has none, or the file name of a shard) and the first of its faults.
    """
    for shard in records.manifest.shards:
        digest = sha256(records.folder / shard["file"])
        if digest != shard["sha256"]:
            told = f"expected SHA-256 {shard['sha256'][:12]}..., got {digest[:12]}...; convert the source again"
            yield shard["file"], Fault("shard of other content", told)
    ids: set[str] = set()
    size_of = cache(lambda path: load_image(path).size)
    for index, row in enumerate(progress(records.rows(), "check", "records", len(records))):
        name = str(row.get("id") or f"row {index}")
        try:
            if name in ids:
                raise Fault("duplicate id", "duplicate id")
            ids.add(name)
            record = Record.from_row(row)
            record.check()
            if path := records.image_path(record):
                if not path.is_file():
                    raise Fault("image file missing", f"expected an image at {path}, found none")
                _check_size(size_of(path), record)
            labels = encode(record, processor, 0, 0, index)["labels"].tolist()
            # The end of the turn is a target of every answer; a model that learns it alone learns to say nothing.
            words = [label for label in labels if label >= 0 and label not in processor.stop_token_ids]
            if not processor.tokenizer.decode(words).strip():
                raise Fault("no target", "no supervised token: every answer is empty")
        except RegionGPTError as error:
            yield name, fault_of(error)


def _check_size(size: tuple[int, int], record: Record) -> None:
    if size != (record.width, record.height):
        expected = f"expected {record.width} x {record.height} pixels (W x H) as converted"
        raise Fault("image of another size", f"{record.image}: {expected}, got {size[0]} x {size[1]}")

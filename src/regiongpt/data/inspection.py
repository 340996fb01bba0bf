"""What a folder of records holds: statistics, records as a model is taught them, and faults.

Paper: Table 2 (images, regions, average words), §3.2 (only the response is supervised), §4 (boxes a category)
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from regiongpt.console import progress
from regiongpt.data.records import Record
from regiongpt.data.shards import Fault, RecordSet, counted, fault_of, many, require_data_extra
from regiongpt.drawing import COLOURS, check_picture, draw_regions, save_picture
from regiongpt.errors import ConfigError, DataError, RegionError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.prompts import IMAGE_TOKEN, PLACEHOLDER
from regiongpt.report import picture, write_page
from regiongpt.settings import Settings
from regiongpt.storage import check_checkpoint, check_writable, sha256, write_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from regiongpt.model.processing import RegionGPTProcessor

MOST_DRAWN: Final = 12
"""Turns beneath a picture, and names on it."""
MOST_CATEGORIES: Final = 20
PAGE_RECORDS: Final = 24
SHARES: Final = {1e-4: "under 0.01 %", 1e-3: "0.01 to 0.1 %", 1e-2: "0.1 to 1 %", 0.1: "1 to 10 %", 2.0: "10 to 100 %"}
"""Classes of the share of its image that a region covers, each by the share that it ends below."""
SIZES: Final = {32: "small, under 32² px", 96: "medium, under 96² px", 1 << 40: "large, from 96² px"}
"""Classes of regions as COCO counts them, each by the side of the square that it ends below."""
_BAR: Final = 40
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


# Statistics


def statistics(source: str, records: Iterable[Record], rejects: Mapping[str, int]) -> dict[str, Any]:
    """Counts over records as JSON writes them, with the rejects of their conversion.

    ``regions`` of a task are those that its questions are about; ``words``, how many answers have so many words.
    """
    images: set[str] = set()
    counts, kinds, categories = Counter[str](), Counter[str](), Counter[str]()
    shares, sizes = Counter(dict.fromkeys(SHARES.values(), 0)), Counter(dict.fromkeys(SIZES.values(), 0))
    tasks: dict[str, Counter[str]] = {}
    words: dict[str, Counter[int]] = {}
    for record in records:
        images.add(record.image)
        counts.update(records=1, regions=len(record.regions), turns=len(record.turns))
        for each in record.regions:
            kinds[each.region.kind] += 1
            categories.update([each.category] if each.category else [])
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
            tasks.setdefault(turn.task, Counter()).update(turns=1, guided=int(turn.guided), regions=asked)
            words.setdefault(turn.task, Counter())[len(turn.answer.split())] += 1

    def average(lengths: Counter[int]) -> float:
        return round(sum(length * count for length, count in lengths.items()) / max(1, lengths.total()), 3)

    return {
        "source": source,
        "images": len(images - {""}),
        "regions": counts["regions"],
        "average_words": average(sum(words.values(), Counter())),
        "records": counts["records"],
        "turns": counts["turns"],
        "tasks": {
            name: {**tasks[name], "average_words": average(words[name]), "words": dict(sorted(words[name].items()))}
            for name in sorted(tasks)
        },
        "shares": dict(shares),
        "sizes": dict(sizes),
        "kinds": dict(kinds.most_common()),
        "categories": dict(categories.most_common()),
        "rejects": dict(sorted(rejects.items())),
    }


def table_rows(found: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """The statistics as titled tables of strings, each with its header first; what is empty is left out."""

    def number(value: float) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"

    def shared(name: str, counts: Mapping[str, int]) -> list[list[str]]:
        rows = [[name, "regions", ""]]
        for part, count in list(counts.items())[:MOST_CATEGORIES]:
            share = count / max(1, found["regions"])
            whole, eighths = divmod(round(share * _BAR * 8), 8)
            rows.append([part, f"{count:,}", f"{100 * share:5.1f} %  {'█' * whole}{' ▏▎▍▌▋▊▉'[eighths]}".rstrip()])
        if len(counts) > MOST_CATEGORIES:
            rest = sorted(counts.values())
            spread = f"of {len(rest):,}: the rarest {rest[0]:,}, half of them up to {rest[len(rest) // 2]:,}"
            rows.append(["...", "", spread])
        return rows

    header = ["data set", "images", "regions", "average words", "categories", "records", "turns"]
    total = {**found, "average words": found["average_words"], "categories": len(found["categories"])}
    tasks = [[name, *map(number, list(task.values())[:4])] for name, task in found["tasks"].items()]
    tables = [
        ("", [header, [found["source"], *(number(total[name]) for name in header[1:])]]),
        ("Turns", [["task", "turns", "guided", "regions", "average words"], *tasks]),
        ("Area of the regions", shared("share of the image", found["shares"])),
        ("", shared("size as COCO counts", found["sizes"])),
        ("", shared("kind of region", found["kinds"])),
        ("Categories", shared("category", found["categories"])),
        ("Rejects", [["left out by the conversion", "times"], *([k, f"{n:,}"] for k, n in found["rejects"].items())]),
    ]
    return [(title, table) for title, table in tables if len(table) > 1]


def as_text(found: Mapping[str, Any]) -> str:
    """The statistics as tables for a terminal: words to the left and numbers to the right."""
    blocks = []
    for _, table in table_rows(found):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            cells = [f"{row[0]:<{widths[0]}}"]
            for title, cell, width in zip(table[0][1:], row[1:], widths[1:], strict=True):
                cells.append(f"{cell:>{width}}" if title else cell)
            lines.append("   ".join(cells).rstrip())
        blocks.append("\n".join(lines))
    if not found["rejects"]:
        blocks.append("The conversion left nothing out.")
    return "\n\n".join(blocks)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Write the statistics as a picture of four panels, in the format of the file's ending."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ConfigError("expected matplotlib for --plot, found none; pip install '.[data]'") from None
    lengths = Counter[int]()
    for task in found["tasks"].values():
        lengths.update(task["words"])
    width = max(1, math.ceil((max(lengths, default=0) + 1) / 20))
    words = Counter[str]()
    for length in sorted(lengths):
        first = length // width * width
        words[str(first) if width == 1 else f"{first} to {first + width - 1}"] += lengths[length]
    common = dict(list(found["categories"].items())[:MOST_CATEGORIES])
    some = f"the {len(common)} most frequent of {len(found['categories']):,} categories"
    panels = {
        "regions by their share of the image": found["shares"],
        "answers by their words": words,
        "turns by task": {name: task["turns"] for name, task in found["tasks"].items()},
        some if len(common) < len(found["categories"]) else "regions by category": common,
    }
    figure = Figure(figsize=(13, 9), layout="constrained")
    listed = ", ".join(many(found[f"{name}s"], name) for name in ("record", "image", "region", "turn"))
    figure.suptitle(f"{found['source']}: {listed}, {found['average_words']:.2f} words an answer")
    for axis, colour, (title, counts) in zip(figure.subplots(2, 2).flat, COLOURS, panels.items(), strict=False):
        axis.barh(list(counts), list(counts.values()), color=[level / 255 for level in colour])
        axis.set_title(title)
        axis.invert_yaxis()
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    try:
        write_file(path, lambda unfinished: figure.savefig(unfinished, dpi=120))
    except ValueError as error:
        raise ConfigError(f"--plot: {path}: {error}") from None


# What a model is taught


def load_processor(model: str | Path | None = None) -> "RegionGPTProcessor":
    """The processor of a checkpoint folder; of the package's model by default. CheckpointError if there is none."""
    from regiongpt.model import weights
    from regiongpt.model.processing import RegionGPTProcessor

    folder = weights.nano_path() if model is None else Path(model)
    check_checkpoint(folder)
    with weights.reading(f"the processor of {folder}"):
        loaded: RegionGPTProcessor = RegionGPTProcessor.from_pretrained(folder, local_files_only=True)
    return loaded


def encode(record: Record, processor: "RegionGPTProcessor", seed: int, epoch: int, index: int) -> dict[str, Any]:
    """The tokens and targets of a record, as training makes them; image and regions are left out."""
    return processor.encode_conversation(
        record.messages(seed, epoch, index),
        region_weights=np.zeros((len(record.regions) * processor.tokens_per_region, 1, 1), np.float32),
        with_image=bool(record.image),
    )


def said(record: Record, seed: int, epoch: int, index: int) -> list[tuple[str, str]]:
    """The questions and answers of a record as a model is taught them, without ``<image>``."""
    texts = [message["content"] for message in record.messages(seed, epoch, index)]
    texts[0] = texts[0].removeprefix(f"{IMAGE_TOKEN}\n")
    return list(zip(texts[::2], texts[1::2], strict=True))


class Piece(NamedTuple):
    """What one token stands for, or a few that spell one character together."""

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
            # A letter that no token spells whole is spelt by its bytes: up to four tokens for one.
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
        # Control characters could do anything to a terminal.
        text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", piece.text)
        if piece.kind == "image" and piece.tokens > 1:
            text = f"{text}×{piece.tokens}"
        if taught and not piece.target:  # a turn has ended: the next begins a line of its own
            text = text if text.startswith("\n") else f"\n{text}"
        if colour:
            # Bold green, faint or cyan, line by line: a pager colours each on its own.
            style = "1;32" if piece.target else "2" if piece.kind == "text" else "36"
            text = "\n".join(f"\x1b[{style}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
        elif piece.target != taught:
            parts.append("⟦" if piece.target else "⟧")
        taught = piece.target
        parts.append(text)
    return "".join(parts) + ("⟧" if taught and not colour else "")


def draw_record(
    record: Record, path: Path | None, dialogue: Sequence[tuple[str, str]] = (), *, names: bool = True
) -> "Image":
    """A record's image with its regions numbered, a few with their names, and the first turns of a dialogue beneath.

    Raises:
        DataError: The record has no image, or it cannot be read, or it is of another size.
        RegionError: A region makes no sense in it.
    """
    if path is None:
        raise DataError(f"{record.id}: text alone, there is no image to draw")
    image = load_image(path)
    if image.size != (record.width, record.height):
        raise DataError(
            f"{path}: expected {record.width} x {record.height} pixels (W x H) for {record.id}, "
            f"got {image.width} x {image.height}; give the folder of the images that were converted"
        )
    shown = list(dialogue[:MOST_DRAWN])
    if len(dialogue) > len(shown):
        shown.append((f"... and {many(len(dialogue) - len(shown), 'more turn')}", ""))
    captions = [each.category for each in record.regions] if names and len(record.regions) <= MOST_DRAWN else []
    return draw_regions(image, [each.region for each in record.regions], captions or None, dialogue=shown)


def write_gallery(
    path: Path,
    records: RecordSet,
    indices: Sequence[int],
    processor: "RegionGPTProcessor",
    found: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> None:
    """Write a page that shows records with their pictures, questions, answers and tokens, and statistics if given."""
    write_page(
        path,
        "records.html",
        title=f"{records.manifest.source}: {many(len(records), 'record')}",
        made=f"{records.folder}, converted by regiongpt {records.manifest.regiongpt_version}; "
        f"questions as worded with seed {seed} in epoch {epoch}",
        tables=table_rows(found) if found is not None else [],
        records=len(records),
        cards=[_card(records, index, processor, seed, epoch) for index in indices],
    )


def _card(records: RecordSet, index: int, processor: "RegionGPTProcessor", seed: int, epoch: int) -> dict[str, Any]:
    """One record for the page; whatever cannot be shown of a faulty one gives way to the reason."""
    card: dict[str, Any] = {"index": index, "record": None, "dialogue": None, "picture": None, "tokens": None}
    faults = card["faults"] = []

    def attempt(key: str, make: Callable[[Record], Any]) -> None:
        try:
            card[key] = make(records[index])
        except (DataError, ConfigError, RegionError) as error:
            faults.append(str(error))

    def drawn(record: Record) -> Any:
        image = draw_record(record, records.image_path(record), names=False)
        return picture(image, f"{record.image} with {many(len(record.regions), 'numbered region')}")

    attempt("record", lambda record: record)
    if card["record"] is not None:
        attempt("dialogue", lambda record: said(record, seed, epoch, index))
    if card["dialogue"] is not None:
        if card["record"].image:
            attempt("picture", drawn)
        attempt("tokens", lambda record: pieces(encode(record, processor, seed, epoch, index), processor))
    return card


# Faults


def check(records: RecordSet, processor: "RegionGPTProcessor") -> Iterator[tuple[str, Fault]]:
    """Look at every record as training would, and at every image.

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
                raise Fault("duplicate id", "expected ids to be unique, got one twice")
            ids.add(name)
            record = Record.from_row(row)
            record.check()
            if path := records.image_path(record):
                if not path.is_file():
                    raise Fault("image file missing", f"expected an image at {path}, found none")
                if (size := size_of(path)) != (record.width, record.height):
                    expected = f"expected {record.width} x {record.height} pixels (W x H)"
                    raise Fault("image of another size", f"{path}: {expected}, got {size[0]} x {size[1]}")
            labels = encode(record, processor, 0, 0, index)["labels"].tolist()
            # The end of the turn is a target of every answer; a model that learns it alone learns to say nothing.
            words = [label for label in labels if label >= 0 and label not in processor.stop_token_ids]
            if not processor.tokenizer.decode(words).strip():
                raise Fault("no target", "expected at least one supervised word, got answers without any")
        except RegionGPTError as error:
            yield name, fault_of(error)


# The verb


class Inspection(Settings):
    """What to show of records: statistics, unless a record or a check is asked for."""

    images: Path | None = None
    """folder of the images, where it has moved"""
    plot: Path | None = None
    """write the statistics as a picture: .png, .svg, .pdf"""
    check: bool = False
    """look for faults in every record; exit code 1 if there are any"""
    record: str | None = Field(None, min_length=1)
    """show one record, by its place from 0 or its id"""
    picture: Path | None = None
    """with --record: write its image with the regions numbered"""
    html: Path | None = None
    """write a page that shows records as they are taught"""
    count: int | None = Field(None, ge=1)
    """with --html: how many records (default: 24)"""
    model: Path | None = None
    """checkpoint folder whose tokenizer and template are used (default: the package's model)"""
    seed: int | None = Field(None, ge=0)
    """of the wording, and of the page's choice of records (default: 0)"""
    epoch: int | None = Field(None, ge=0)
    """of the wording (default: 0)"""

    @model_validator(mode="after")
    def _refuse_idle(self) -> "Inspection":
        for name, needed in (
            ("picture", ("record",)),
            ("count", ("html",)),
            ("epoch", ("record", "html")),
            ("seed", ("record", "html")),
            ("model", ("record", "html", "check")),
            ("images", ("picture", "html", "check")),
        ):
            if getattr(self, name) is not None and not any(getattr(self, other) for other in needed):
                listed = " or ".join(f"--{other}" for other in needed)
                raise ValueError(f"--{name} goes with {listed}; add one of them or leave it out")
        if self.count is not None and self.record:
            raise ValueError("--count and --record exclude each other; leave one of them out")
        return self


def inspect(folder: Path, options: Inspection, as_json: bool) -> bool:
    """Print and write what was asked of a folder of records, as text or one JSON object.

    Returns:
        Whether a check has found a fault.

    Raises:
        RegionGPTError: A file cannot be read or written, or there is no such record.
    """
    require_data_extra()
    for path in (options.plot, options.html):
        if path is not None:
            check_writable(path)
    if options.picture is not None:
        check_picture(options.picture)
    seed, epoch = options.seed or 0, options.epoch or 0
    found: dict[str, Any] = {}

    def tell(*texts: str) -> None:
        if not as_json:
            print(*texts, sep="\n")

    def written(what: str, path: Path) -> None:
        print(f"{what} written to {path}", file=sys.stderr if as_json else sys.stdout)

    records = RecordSet(folder, options.images)

    @cache
    def count_all() -> dict[str, Any]:
        rows = progress(records.rows(), "statistics", "records", len(records))
        return statistics(records.manifest.source, map(Record.from_row, rows), records.manifest.rejects)

    if options.plot or not (options.record or options.check):
        found["statistics"] = count_all()
    if not (options.record or options.check):
        tell(as_text(count_all()))
    if options.plot:
        plot(count_all(), options.plot)
        written("plot", options.plot)
    index = find(records, options.record) if options.record else None
    record = records[index] if index is not None else None
    if index is not None and record is not None and options.picture:  # before the processor: its faults are common
        save_picture(draw_record(record, records.image_path(record), said(record, seed, epoch, index)), options.picture)
        written("picture", options.picture)
    processor: Any = load_processor(options.model) if record or options.html or options.check else None
    if index is not None and record is not None:
        shown = pieces(encode(record, processor, seed, epoch, index), processor)
        total = sum(piece.tokens for piece in shown)
        supervised = sum(piece.tokens for piece in shown if piece.target)
        found["record"] = {
            "index": index,
            **record.row(),
            "messages": record.messages(seed, epoch, index),
            "tokens": [{"text": piece.text, "count": piece.tokens, "learnt": piece.target} for piece in shown],
        }
        colour = bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
        coloured = terminal(shown, colour and not os.environ.get("NO_COLOR"))
        tell(_described(record, index), f"\n{total:,} tokens, {supervised:,} of them supervised:\n", coloured)
    if options.html:
        chosen = [index or 0]
        if index is None:
            count = min(len(records), options.count or PAGE_RECORDS)
            chosen = sorted(np.random.default_rng(seed).choice(len(records), count, replace=False).tolist())
        counts = count_all() if index is None else None
        write_gallery(options.html, records, chosen, processor, counts, seed=seed, epoch=epoch)
        written(f"page of {many(len(chosen), 'record')}", options.html)
    if options.check:
        faults = []
        for name, fault in check(records, processor):
            faults.append({"record": name, "kind": fault.kind, "reason": fault.reason})
            tell(f"{name}: {fault.kind}: {fault.reason}")
        kinds = Counter(fault["kind"] for fault in faults)
        faulty = len({fault["record"] for fault in faults})
        counts_of = {"records": len(records), "faulty": faulty, "kinds": dict(kinds.most_common())}
        found["check"] = {**counts_of, "faults": faults}
        result = f"{faulty:,} faulty" if faulty else "every one can be taught"
        tell(f"{many(len(records), 'record')} checked: {result}", *counted(kinds))
    if as_json:
        print(json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1))
    return bool(found.get("check", {}).get("faulty"))


def find(records: RecordSet, which: str) -> int:
    """The place of a record given by its place, from 0, or by its id; DataError if there is none."""
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
    where = f"{record.image}, {record.width} x {record.height} (W x H)" if record.image else "no image"
    lines = [f"record {index}, {record.id}, from {record.source}", f"image   {where}"]
    for number, each in enumerate(record.regions, 1):
        bounds = ", ".join(f"{side:g}" for side in np.round(each.region.bounds(record.width, record.height), 1))
        share = each.region.area(record.width, record.height) / (record.width * record.height)
        lines.append(
            f"[{number}]     {each.region.kind} within {bounds}, {100 * share:.3g} % of the image  {each.category}"
        )
    for number, turn in enumerate(record.turns, 1):
        traits = [turn.task, *(["guided"] if turn.guided else []), *([turn.label_set] if turn.label_set else [])]
        lines.append(f"turn {number}  {', '.join(traits)}")
    return "\n".join(line.rstrip() for line in lines)

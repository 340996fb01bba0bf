"""Contents of a folder of records: statistics (paper Table 2), records as training reads them (§3.2), faults."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from regiongpt.data.records import Record
from regiongpt.data.shards import Fault, RecordSet, counted, fault_of, many, require_data_extra
from regiongpt.drawing import Rows, aligned, check_picture, draw_regions, save_picture
from regiongpt.environment import progress
from regiongpt.errors import DataError, RegionGPTError, naming
from regiongpt.images import load_image
from regiongpt.prompts import PLACEHOLDER
from regiongpt.settings import Settings
from regiongpt.storage import check_checkpoint, sha256

if TYPE_CHECKING:
    from regiongpt.model.processing import RegionGPTProcessor

_MOST_CATEGORIES: Final = 20
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Inspection(Settings):
    """What to show: statistics, unless a record or a check is requested."""

    images: Path | None = None
    """folder of the images, if it has moved"""
    check: bool = False
    """check every record; exit code 1 if there are faults"""
    record: str | None = Field(None, min_length=1)
    """show one record, by index from 0 or by id"""
    picture: Path | None = None
    """with --record: write its image with the regions drawn"""
    model: Path | None = None
    """checkpoint folder whose tokenizer and template are used (default: the package's model)"""
    seed: int | None = Field(None, ge=0)
    """with --record: seed of the wording (default: 0)"""

    @model_validator(mode="after")
    def _refuse_idle(self) -> "Inspection":
        for name, needed in (("picture", "record"), ("seed", "record"), ("model", "record check"),
                             ("images", "picture check")):  # fmt: skip
            if getattr(self, name) is not None and not any(getattr(self, other) for other in needed.split()):
                raise ValueError(f"--{name} goes with --{' or --'.join(needed.split())}; add one or leave it out")
        return self


def inspect(folder: Path, options: Inspection) -> bool:
    """Print and write what the options request; returns whether a check has found a fault.

    RegionGPTError where a file cannot be read or written, or there is no such record.
    """
    require_data_extra()
    if options.picture is not None:
        check_picture(options.picture)
    records = RecordSet(folder, options.images)
    if not options.record and not options.check:
        read = progress(records, "statistics", "records", len(records))
        tables = statistics(records.manifest.source, read, records.manifest.rejects)
        print("\n\n".join("\n".join(aligned(table)) for table in tables))
        return False
    processor = load_processor(options.model)
    if options.record:
        index = find(records, options.record)
        record = records[index]
        shown = runs(encode(record, processor, options.seed or 0, index), processor)
        total, supervised = sum(run.tokens for run in shown), sum(run.tokens for run in shown if run.target)
        print(f"{_described(record, index)}\n\n{total:,} tokens, {supervised:,} of them supervised:\n\n{marked(shown)}")
        if options.picture is not None:
            with naming(record.id):
                if (path := records.image_path(record)) is None:
                    raise DataError("has no image to draw on; leave --picture out")
                image = load_image(path)
                _check_size(image.size, record)
                save_picture(draw_regions(image, [each.region for each in record.regions]), options.picture)
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
    if which.isdecimal() and int(which) < len(records):
        return int(which)
    place: int = records.table.data.column("id").index(which).as_py()
    if place < 0:
        known = f"0 to {len(records) - 1}, or an id such as '{records[0].id}'"
        raise DataError(f"{records.folder}: expected a record from {known}, got '{which}'")
    return place


def _described(record: Record, index: int) -> str:
    where = f"{record.image}, {record.width} x {record.height} (W x H)" if record.image else "no image"
    lines = [f"record {index}, {record.id}, from {record.source}", f"image   {where}"]
    for number, each in enumerate(record.regions, 1):
        bounds = ", ".join(f"{side:g}" for side in np.round(each.region.bounds(record.width, record.height), 1))
        lines.append(f"[{number}]     {each.region.kind} within {bounds}  {each.category}".rstrip())
    for number, turn in enumerate(record.turns, 1):
        lines.append(f"turn {number}  {', '.join(filter(None, [turn.task, 'guided' * turn.guided, turn.label_set]))}")
    return "\n".join(lines)


# -- Statistics --------------------------------------------------------------------------------------------------------


def statistics(source: str, records: Iterable[Record], rejects: Mapping[str, int]) -> list[Rows]:
    """Counts over records, with the rejects of their conversion; empty tables are left out.

    ``regions`` of a task are those that its questions are about.
    """
    images: set[str] = set()
    n_records = n_regions = 0
    kinds, categories = Counter[str](), Counter[str]()
    tasks: dict[str, Counter[str]] = {}
    for record in records:
        images.update(filter(None, [record.image]))
        n_records += 1
        n_regions += len(record.regions)
        kinds.update(each.region.kind for each in record.regions)
        categories.update(each.category for each in record.regions if each.category)
        for turn in record.turns:
            asked = len(turn.regions or set(PLACEHOLDER.findall(turn.question)))
            found = {"turns": 1, "guided": int(turn.guided), "regions": asked, "words": len(turn.answer.split())}
            tasks.setdefault(turn.task, Counter()).update(found)
    total = sum(tasks.values(), Counter[str]())

    def average(counts: Counter[str]) -> str:
        return f"{counts['words'] / max(1, counts['turns']):.2f}"

    def shared(name: str, counts: Sequence[tuple[str, int]]) -> Rows:
        rows = [[part, f"{n:,}", f"{100 * n / n_regions:.1f} %"] for part, n in counts[:_MOST_CATEGORIES]]
        if rest := [n for _, n in counts[_MOST_CATEGORIES:]]:
            rows.append([f"{len(rest):,} more", f"{sum(rest):,}", f"the rarest {rest[-1]:,}"])
        return [[name, "regions", "share"], *rows]

    header = ["data set", "images", "regions", "average words", "categories", "records", "turns"]
    numbers = [f"{n:,}" for n in (len(images), n_regions, len(categories), n_records, total["turns"])]
    by_task = [
        [name, *(f"{each[key]:,}" for key in ("turns", "guided", "regions")), average(each)]
        for name, each in sorted(tasks.items())
    ]
    tables = [
        [header, [source, *numbers[:2], average(total), *numbers[2:]]],
        [["task", "turns", "guided", "regions", "average words"], *by_task],
        shared("kind of region", kinds.most_common()),
        shared("category", categories.most_common()),
        [["left out by the conversion", "times"], *([kind, f"{n:,}"] for kind, n in sorted(rejects.items()))],
    ]
    return [table for table in tables if len(table) > 1]


# -- What a model is taught --------------------------------------------------------------------------------------------


def load_processor(model: str | Path | None = None) -> "RegionGPTProcessor":
    """The processor of a checkpoint folder, by default the package's model; CheckpointError if there is none."""
    from regiongpt.model import weights
    from regiongpt.model.processing import RegionGPTProcessor

    folder = weights.nano_path() if model is None else Path(model)
    check_checkpoint(folder)
    with weights.reading(f"the processor of {folder}"):
        loaded: RegionGPTProcessor = RegionGPTProcessor.from_pretrained(folder, local_files_only=True)
    return loaded


def encode(record: Record, processor: "RegionGPTProcessor", seed: int, index: int) -> dict[str, Any]:
    """The tokens and targets of a record in the first epoch, without the image and the regions' pixels."""
    return processor.encode_conversation(
        record.messages(seed, 0, index),
        region_weights=np.zeros((len(record.regions), 1, 1), np.float32),
        with_image=bool(record.image),
    )


class Run(NamedTuple):
    """Consecutive tokens that are all supervised or all input; an image's and a region's are by themselves."""

    text: str
    target: bool  # supervised
    tokens: int


def runs(encoded: Mapping[str, Any], processor: "RegionGPTProcessor") -> list[Run]:
    """The tokens that :meth:`RegionGPTProcessor.encode_conversation` has made, as text."""
    ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
    numbers = iter(encoded["region_ids"].tolist())
    own = (processor.image_token_id, processor.region_token_id)
    found: list[Run] = []
    for (target, token), group in groupby(
        range(len(ids)), key=lambda place: (ids[place] == labels[place], ids[place] if ids[place] in own else None)
    ):
        places = list(group)
        if token == processor.image_token_id:
            text = f"{processor.image_token}×{len(places)}"
        elif token == processor.region_token_id:
            text = "".join(f"<region{next(numbers) + 1}>" for _ in places)
        else:  # decoded behind all before, since some tokenizers leave out the blank that a text begins with
            before, through = (processor.tokenizer.decode(ids[:end]) for end in (places[0], places[-1] + 1))
            text = through[len(before) :]
        found.append(Run(text, target, len(places)))
    return found


def marked(shown: Sequence[Run]) -> str:
    """The conversation, what is supervised between ``⟦`` and ``⟧``; what follows an answer begins on its own line."""
    parts: list[str] = []
    for run in shown:
        text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", run.text)  # lest data steer the terminal
        ended = bool(parts) and parts[-1].endswith("⟧") and not (run.target or text.startswith("\n"))
        parts.append(f"⟦{text}⟧" if run.target else "\n" * ended + text)
    return "".join(parts)


# -- Faults ------------------------------------------------------------------------------------------------------------


def check(records: RecordSet, processor: "RegionGPTProcessor") -> Iterator[tuple[str, Fault]]:
    """Check every record as training reads it, and every image.

    Yields the id of a record (its place where it has none, or a shard's file name) and the first of its faults.
    """
    for shard in records.manifest.shards:
        if sha256(records.folder / shard["file"]) != shard["sha256"]:
            yield shard["file"], Fault("shard of other content", "not as it was written; convert the source again")
    ids: set[str] = set()
    size_of = cache(lambda path: load_image(path).size)
    for index, row in enumerate(progress(records.rows(), "check", "records", len(records))):
        name = str(row.get("id") or f"row {index}")
        try:
            if name in ids:
                raise Fault("duplicate id", "expected each id once")
            ids.add(name)
            record = Record.from_row(row)
            record.check()
            if path := records.image_path(record):
                if not path.is_file():
                    raise Fault("image file missing", f"expected an image at {path}, found none")
                _check_size(size_of(path), record)
            labels = encode(record, processor, 0, index)["labels"].tolist()
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

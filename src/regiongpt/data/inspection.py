"""What a folder of records holds: statistics, one record, and whether a model can be taught with all of them.

Paper: §3.2 (only the response is learnt).
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydantic import Field, model_validator

from regiongpt.console import progress
from regiongpt.data.records import Record
from regiongpt.data.shards import Fault, RecordSet, counted, fault_of, many, require_data_extra
from regiongpt.data.statistics import rows
from regiongpt.drawing import check_picture, draw_regions, save_picture
from regiongpt.errors import CheckpointError, DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.prompts import IMAGE_TOKEN
from regiongpt.settings import Settings
from regiongpt.storage import check_writable, sha256

if TYPE_CHECKING:
    from PIL.Image import Image

    from regiongpt.model.processing import RegionGPTProcessor

MOST_TURNS_DRAWN: Final = 12
MOST_CAPTIONS_DRAWN: Final = 12
GALLERY_RECORDS: Final = 24


def load_processor(model: str | Path | None = None) -> "RegionGPTProcessor":
    """The processor of a checkpoint folder; of the model that ships in the package by default.

    Raises:
        CheckpointError: The folder is not there or holds no processor.
    """
    from regiongpt.model.processing import RegionGPTProcessor
    from regiongpt.model.weights import nano_path

    folder = nano_path() if model is None else Path(model)
    if not (folder / "processor_config.json").is_file():
        raise CheckpointError(
            f"expected a checkpoint folder with a processor_config.json at {folder}; give one that regiongpt has made"
        )
    try:
        loaded: RegionGPTProcessor = RegionGPTProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the processor of {folder} cannot be read: {' '.join(str(error).split())}") from error
    return loaded


def check(records: RecordSet, processor: "RegionGPTProcessor") -> Iterator[tuple[str, Fault]]:
    """Look at every record as training would, and at every image.

    Args:
        records: To be checked.
        processor: Of the model to be trained; its tokenizer and chat template decide what the targets are.

    Yields:
        The id of a record (its place where it has none, or the file name of a shard) and the first of its faults: a
        shard with other bytes than the manifest says; a record that comes twice; a region that makes no sense or is not
        there; an answer that is empty or leaves no target; an image that is missing, cannot be read, or is of another
        size.
    """
    for shard in records.manifest.shards:
        found = sha256(records.folder / shard["file"])
        if found != shard["sha256"]:
            reason = f"expected SHA-256 {shard['sha256'][:12]}..., got {found[:12]}...; convert the source again"
            yield shard["file"], Fault("shard of other content", reason)
    ids: set[str] = set()
    size_of = cache(lambda path: load_image(path).size)
    for index, row in enumerate(progress(rows(records), "check", "records", len(records))):
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
                raise Fault("no target", "expected at least one word to be learnt, got answers without any")
        except RegionGPTError as error:
            yield name, fault_of(error)


def encode(record: Record, processor: "RegionGPTProcessor", seed: int, epoch: int, index: int) -> dict[str, Any]:
    """The tokens and targets of a record, as training makes them; image and regions are left out.

    Raises:
        DataError: The record has no target.
        RegionError: A placeholder has no region.
    """
    return processor.encode_conversation(
        record.messages(seed, epoch, index),
        region_weights=np.zeros((len(record.regions) * processor.tokens_per_region, 1, 1), np.float32),
        with_image=bool(record.image),
    )


def find(records: RecordSet, which: str) -> int:
    """The place of a record given by its place, from 0, or by its id.

    Raises:
        DataError: There is none.
    """
    if which.isdecimal():
        if int(which) < len(records):
            return int(which)
        raise DataError(f"{records.folder}: expected a record from 0 to {len(records) - 1}, got {which}")
    import pyarrow.compute as pc

    place: int = pc.index(records.table.data.column("id"), which).as_py()
    if place < 0:
        raise DataError(f"{records.folder}: found no record '{which}'; its first is '{records[0].id}'")
    return place


def said(record: Record, seed: int, epoch: int, index: int) -> list[tuple[str, str]]:
    """The questions and answers of a record as a model is taught them, without ``<image>``."""
    texts = [message["content"] for message in record.messages(seed, epoch, index)]
    texts[0] = texts[0].removeprefix(f"{IMAGE_TOKEN}\n")
    return list(zip(texts[::2], texts[1::2], strict=True))


def draw_record(
    record: Record, path: Path | None, dialogue: Sequence[tuple[str, str]] = (), *, names: bool = True
) -> "Image":
    """A record's image with its regions numbered, their categories and, if given, the dialogue beneath.

    Args:
        record: To be drawn.
        path: Of its image.
        dialogue: Questions and answers; of more than :data:`MOST_TURNS_DRAWN`, the first.
        names: Whether the categories are written, where there are at most :data:`MOST_CAPTIONS_DRAWN` regions.

    Raises:
        DataError: The record has no image, or it cannot be read, or it is of another size.
        RegionError: A region makes no sense in it.
    """
    if path is None:
        raise DataError(f"{record.id}: expected a record with an image to be drawn, got one of text alone")
    photo = load_image(path)
    if photo.size != (record.width, record.height):
        raise DataError(
            f"{path}: expected {record.width} x {record.height} pixels (W x H) for {record.id}, "
            f"got {photo.width} x {photo.height}; give the folder of the images that were converted"
        )
    shown = list(dialogue[:MOST_TURNS_DRAWN])
    if len(dialogue) > len(shown):
        shown.append((f"... and {len(dialogue) - len(shown)} more turns", ""))
    captions = [each.category for each in record.regions] if names else None
    if captions and len(captions) > MOST_CAPTIONS_DRAWN:
        captions = None
    return draw_regions(photo, [each.region for each in record.regions], captions, dialogue=shown)


# ---------------------------------------------------------------------------------------------------------------------
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
    """Print and write what was asked of a folder of records.

    Args:
        folder: the records.
        options: what to show.
        as_json: print one JSON object rather than text.

    Returns:
        Whether a check has found a fault.

    Raises:
        ConfigError: a file cannot be written.
        DataError: the folder holds no records, or not the one that is asked for.
        CheckpointError: the checkpoint folder holds no processor.
    """
    from regiongpt.data import gallery, statistics

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
    count_all = cache(lambda: statistics.statistics(records))
    if options.plot or not (options.record or options.check):
        found["statistics"] = count_all().as_dict()
    if not (options.record or options.check):
        tell(statistics.as_text(count_all()))
    if options.plot:
        statistics.plot(count_all(), options.plot)
        written("plot", options.plot)
    index = find(records, options.record) if options.record else None
    if index is not None and options.picture:  # before the processor is loaded: its faults are the commonest
        record = records[index]
        picture = draw_record(record, records.image_path(record), said(record, seed, epoch, index))
        save_picture(picture, options.picture)
        written("picture", options.picture)
    words = index is not None or options.html or options.check
    processor: Any = load_processor(options.model) if words else None
    if index is not None:
        record = records[index]
        shown = gallery.pieces(encode(record, processor, seed, epoch, index), processor)
        total, learnt = gallery.target_count(shown)
        found["record"] = {
            "index": index,
            **record.row(),
            "messages": record.messages(seed, epoch, index),
            "tokens": [{"text": piece.text, "count": piece.count, "learnt": piece.target} for piece in shown],
        }
        colour = bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
        coloured = gallery.terminal(shown, colour and not os.environ.get("NO_COLOR"))
        tell(_described(record, index), f"\n{total:,} tokens, {learnt:,} of them supervised:\n", coloured)
    if options.html:
        chosen, counts = [index or 0], None
        if index is None:
            count = min(len(records), options.count or GALLERY_RECORDS)
            chosen = sorted(np.random.default_rng(seed).choice(len(records), count, replace=False).tolist())
            counts = count_all()
        gallery.write_gallery(options.html, records, chosen, processor, counts, seed=seed, epoch=epoch)
        written(f"page of {many(len(chosen), 'record')}", options.html)
    if options.check:
        faults = []
        for name, fault in check(records, processor):
            faults.append({"record": name, "kind": fault.kind, "reason": " ".join(fault.reason.split())})
            tell(f"{name}: {fault.kind}: {faults[-1]['reason']}")
        kinds = Counter(fault["kind"] for fault in faults)
        faulty = len({fault["record"] for fault in faults})
        found["check"] = {
            "records": len(records),
            "faulty": faulty,
            "kinds": dict(kinds.most_common()),
            "faults": faults,
        }
        result = f"{faulty:,} faulty" if faulty else "every one can be taught"
        tell(f"{many(len(records), 'record')} checked: {result}", *counted(kinds))
    if as_json:
        print(json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1))
    return bool(found.get("check", {}).get("faulty"))


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

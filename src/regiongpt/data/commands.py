"""The verbs ``regiongpt convert`` and ``regiongpt inspect``.

A converter's options are its fields, so a new converter has its command line as soon as it is registered.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regiongpt.console import progress_shown
from regiongpt.data.convert import CONVERTERS, load_converter
from regiongpt.data.convert.base import Output, convert
from regiongpt.data.records import Record
from regiongpt.data.shards import CROWD, MANIFEST, REJECTS, Manifest, RecordSet, require_data_extra
from regiongpt.errors import ConfigError
from regiongpt.settings import add_options, read_options

if TYPE_CHECKING:
    from regiongpt.data.inspection import Fault
    from regiongpt.data.statistics import Statistics

EXIT_FAULTS = 1
GALLERY_RECORDS = 24

# ---------------------------------------------------------------------------------------------------------------------
# convert


def run_convert(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """``regiongpt convert SOURCE ... --out DIR``.

    Args:
        parser: Still without arguments.
        arguments: What follows the verb.

    Returns:
        0, however many records were left out.

    Raises:
        ConfigError: An option is wrong, or ``--out`` holds something else.
        DataError: A file cannot be used; with ``--strict``, a record.
    """
    parser.description = "Make training records of a data set's files."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "`regiongpt convert SOURCE --help` lists the files and options of a source."
    sources = parser.add_subparsers(title="sources", metavar="SOURCE", dest="source", required=True)
    named = next((word for word in arguments if not word.startswith("-")), None)
    # Only the help that lists them all needs them all.
    for name in [named] if named in CONVERTERS else CONVERTERS:
        converter = load_converter(str(name))
        source = sources.add_parser(str(name), help=converter.summary, description=converter.summary)
        add_options(source, converter)
        add_options(source, Output, "records")
        source.set_defaults(converter=converter)
    options = parser.parse_args(arguments)
    made, to = read_options(options.converter, options), read_options(Output, options)
    was_there = (to.out / MANIFEST).exists() and not to.overwrite
    began = time.monotonic()
    with progress_shown():
        manifest = convert(made, to.out, to.strict, to.overwrite)
    print(_converted(manifest, to.out, None if was_there else time.monotonic() - began))
    return 0


def option_arguments(field: "dataclasses.Field[Any]", kind: Any) -> dict[str, Any]:
    """What ``argparse.ArgumentParser.add_argument`` is told of a field of this type, its name left out."""
    required = field.default is dataclasses.MISSING
    text = str(field.metadata["help"])
    stated = not required and field.default not in (None, "", ()) and not isinstance(field.default, bool)
    shown = (f"{text} (default: {field.default})" if stated else text).replace("%", "%%")
    given: dict[str, Any] = {"help": shown, "required": required}
    if not required:
        given["default"] = field.default
    if kind is bool:
        given["action"] = argparse.BooleanOptionalAction
    elif kind in (int, float, str):
        given |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    else:
        given |= {"type": Path, "metavar": "DIR" if field.name in ("data", "images") else "FILE"}
        if typing.get_origin(kind) is tuple:
            given["nargs"] = "+"
    return given


def _converted(manifest: Manifest, out: Path, seconds: float | None) -> str:
    """What a conversion has made, or, where ``seconds`` is None, had made before."""
    counts = manifest.counts
    size = sum((out / shard["file"]).stat().st_size for shard in manifest.shards)
    listed = ", ".join(_many(counts.get(f"{name}s", 0), name) for name in ("record", "image", "region", "turn"))
    time = "already converted, nothing to do" if seconds is None else f"{seconds:,.1f} s"
    shards = f"{_many(len(manifest.shards), 'shard')}, {size / 1e6:,.1f} MB"
    lines = [f"{manifest.source}: {listed}", f"{out}: {shards}; {time}"]
    tasks = {name.removeprefix("task:"): count for name, count in counts.items() if name.startswith("task:")}
    if len(tasks) > 1:
        lines.append("turns: " + ", ".join(f"{count:,} {name}" for name, count in sorted(tasks.items())))
    if not manifest.rejects:
        return "\n".join([*lines, "nothing left out"])
    lines.append(f"{sum(manifest.rejects.values()):,} left out, each with its reason in {out / REJECTS}:")
    lines += _counted(manifest.rejects)
    if manifest.rejects.get(CROWD) and not counts.get("regions"):
        lines.append("every object is marked as a crowd, as some tools mark every mask; --crowds takes them")
    return "\n".join(lines)


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _counted(kinds: dict[str, int]) -> list[str]:
    width = max((len(f"{count:,}") for count in kinds.values()), default=0)
    return [f"  {count:>{width},}  {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])]


# ---------------------------------------------------------------------------------------------------------------------
# inspect


def run_inspect(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """``regiongpt inspect DIR``: statistics unless one record or a check is asked for.

    Args:
        parser: Still without arguments.
        arguments: What follows the verb.

    Returns:
        0, or 1 if a check has found a fault.

    Raises:
        ConfigError: Options do not go together, or a file cannot be written.
        DataError: The folder holds no records, or not the one that is asked for.
        CheckpointError: ``--model`` is not a checkpoint folder.
    """
    parser.description = "Show what training records hold: statistics, or what one of the options asks for."
    _add_inspect_options(parser)
    options = parser.parse_args(arguments)
    _refuse_idle(options)
    require_data_extra()
    # Before the tokenizer's libraries are imported, because some of them speak as they are.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import CRITICAL, set_verbosity

    set_verbosity(CRITICAL)  # what goes wrong is said once, and on one line
    records = RecordSet(options.folder, options.images)
    found: dict[str, Any] = {}
    if not (options.record or options.check) or options.plot:
        _show_statistics(records, options, found)
    if options.record:
        _show_record(records, options, found)
    elif options.html:
        _write_gallery(records, options)
    faulty = _check(records, options, found) if options.check else False
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    return EXIT_FAULTS if faulty else 0


def _add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of records, made by `regiongpt convert`")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of the images, where it has moved")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the statistics as a picture: .png, .svg, .pdf")
    parser.add_argument("--check", action="store_true", help="look for faults in every record; exit code 1 if any")
    parser.add_argument("--record", metavar="N|ID", help="show one record, by its place from 0 or its id")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="with --record: write its image, regions numbered")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page that shows records as they are taught")
    parser.add_argument(
        "--count", metavar="N", type=int, help=f"with --html: how many records (default: {GALLERY_RECORDS})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    group = parser.add_argument_group("wording", "how --record, --html and --check word and tokenise the turns")
    group.add_argument("--model", metavar="PATH", type=Path, help="checkpoint folder (default: the package's model)")
    group.add_argument("--seed", metavar="N", type=int, help="of the wording, and of the page's choice (default: 0)")
    group.add_argument("--epoch", metavar="N", type=int, help="of the wording (default: 0)")


def _refuse_idle(options: argparse.Namespace) -> None:
    """Refuses options that would do nothing."""
    for name, needed in (
        ("picture", ("record",)),
        ("count", ("html",)),
        ("epoch", ("record", "html")),
        ("seed", ("record", "html")),
        ("model", ("record", "html", "check")),
        ("images", ("picture", "html", "check")),
    ):
        if getattr(options, name) is not None and not any(getattr(options, other) for other in needed):
            listed = " or ".join(f"--{other}" for other in needed)
            raise ConfigError(
                f"expected --{name} together with {listed}, got it alone; add one of them or leave it out"
            )
    if options.count is not None and options.record:
        raise ConfigError("expected --count or --record with --html, got both; leave one of them out")
    if options.count is not None and options.count < 1:
        raise ConfigError(f"expected --count to be at least 1, got {options.count}")
    for name in ("plot", "picture", "html"):
        path = getattr(options, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"expected --{name} in a folder that exists, got {str(path)!r}")
    options.seed, options.epoch = options.seed or 0, options.epoch or 0
    if min(options.seed, options.epoch) < 0:
        raise ConfigError(f"expected --seed and --epoch from 0 on, got {options.seed} and {options.epoch}")


def _count(records: RecordSet) -> "Statistics":
    from regiongpt.data.statistics import statistics

    with progress_shown():
        return statistics(records)


def _show_statistics(records: RecordSet, options: argparse.Namespace, found: dict[str, Any]) -> None:
    from regiongpt.data.statistics import as_text, plot

    counted = _count(records)
    found["statistics"] = counted.as_dict()
    if not options.json and not (options.record or options.check):
        print(as_text(counted))
    if options.plot:
        plot(counted, options.plot)
        _tell(options, f"plot written to {options.plot}")
    options.counted = counted


def _show_record(records: RecordSet, options: argparse.Namespace, found: dict[str, Any]) -> None:
    from regiongpt.data import gallery, inspection
    from regiongpt.pages import write_page

    index = inspection.find(records, options.record)
    record = records[index]
    dialogue = inspection.said(record, options.seed, options.epoch, index)
    if options.picture:  # before the processor is loaded: its faults are the commonest
        picture = inspection.draw_record(record, records.image_path(record), dialogue)
        _save(picture, options.picture)
        _tell(options, f"picture written to {options.picture}")
    processor = inspection.load_processor(options.model)
    shown = gallery.pieces(inspection.encode(record, processor, options.seed, options.epoch, index), processor)
    total, learnt = gallery.target_count(shown)
    found["record"] = {
        "index": index,
        **record.row(),
        "messages": record.messages(options.seed, options.epoch, index),
        "tokens": [{"text": piece.text, "count": piece.count, "learnt": piece.target} for piece in shown],
    }
    if not options.json:
        print(_described(record, index))
        print(f"\n{total:,} tokens, {learnt:,} of them learnt:\n")
        print(gallery.terminal(shown, _coloured()))
    if options.html:
        page = gallery.gallery(records, [index], processor, seed=options.seed, epoch=options.epoch)
        write_page(page, options.html)
        _tell(options, f"page written to {options.html}")


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


def _write_gallery(records: RecordSet, options: argparse.Namespace) -> None:
    from regiongpt.data import gallery, inspection
    from regiongpt.pages import write_page

    count = min(len(records), options.count or GALLERY_RECORDS)
    drawn = np.random.default_rng(options.seed).choice(len(records), count, replace=False)
    processor = inspection.load_processor(options.model)
    counted = getattr(options, "counted", None) or _count(records)
    page = gallery.gallery(records, sorted(drawn.tolist()), processor, counted, seed=options.seed, epoch=options.epoch)
    write_page(page, options.html)
    _tell(options, f"page of {_many(count, 'record')} written to {options.html}")


def _check(records: RecordSet, options: argparse.Namespace, found: dict[str, Any]) -> bool:
    from regiongpt.data import inspection

    processor = inspection.load_processor(options.model)
    faults: list[Fault] = []
    with progress_shown():
        for fault in inspection.check(records, processor):
            faults.append(fault)
            if not options.json:
                print(f"{fault.record}: {fault.kind}: {' '.join(fault.reason.split())}")
    kinds = Counter(fault.kind for fault in faults)
    faulty = len({fault.record for fault in faults})
    found["check"] = {
        "records": len(records),
        "faulty": faulty,
        "kinds": dict(kinds.most_common()),
        "faults": [dataclasses.asdict(fault) for fault in faults],
    }
    if not options.json:
        print(
            f"{_many(len(records), 'record')} checked: {f'{faulty:,} faulty' if faulty else 'every one can be taught'}"
        )
        print("\n".join(_counted(kinds)), end="\n" if kinds else "")
    return bool(faults)


def _tell(options: argparse.Namespace, text: str) -> None:
    """On standard error where standard output is for another program."""
    print(text, file=sys.stderr if options.json else sys.stdout)


def _save(picture: Any, path: Path) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected --picture to be a picture that can be written, got {str(path)!r}: {error}"
        ) from None


def _coloured() -> bool:
    """Whether standard output shows colours; NO_COLOR and FORCE_COLOR of the environment decide before the terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()

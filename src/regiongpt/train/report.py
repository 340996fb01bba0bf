"""A run as one page that needs no other file, made of what the run has written so far, finished or not."""

import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

from markupsafe import Markup
from tqdm import tqdm

from regiongpt.data.mixture import Mixture
from regiongpt.distributed import launched
from regiongpt.environment import commit, machine, versions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.report import Curve, line_chart, picture, short, write_page
from regiongpt.storage import read_json, write_json, writing
from regiongpt.train.answers import PICTURES
from regiongpt.train.recipe import Recipe, dotted
from regiongpt.train.watch import ANSWERS, DEV, LOG, read_lines

log = logging.getLogger(__name__)
PAGE, RUN = "report.html", "run.json"
_ORDER: Final = ("language-checkpoints", "align", "stage1", "stage2")
_ANSWERS_SHOWN: Final = 8


def note_run(out: Path, recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Add a start to the notes of a run in its folder: recipe, data, machine, versions.

    Args:
        out: Folder of the run.
        recipe: The recipe.
        data: What each stage learns from: :func:`data_of` for a mixture, else any plain values.
    """
    try:
        starts = list(read_notes(out).get("starts", []))
    except DataError:  # torn, and worth less than the run
        starts = []
    start = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "processes": launched(),
        "machine": machine(),
        "packages": {"python": sys.version.split()[0], **versions()},
        "commit": commit(),
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    config = recipe.model_dump(mode="json")
    unread = [name for name in dotted(config) if recipe.unused(name)]
    notes = {"config": config, "unread": unread, "data": dict(data), "starts": [*starts, start]}
    write_json(out / RUN, json.loads(json.dumps(notes, default=str)))


def data_of(mixture: Mixture) -> dict[str, Any]:
    """Contents of a mixture: the manifest of each part, and how many of its records make an epoch."""
    parts = []
    for part in mixture.parts:
        manifest = part.records.manifest
        parts.append(
            {
                "folder": str(part.records.folder),
                "source": manifest.source,
                "records an epoch": part.per_epoch,
                "counts": manifest.counts,
                "left out": manifest.rejects,
                "arguments": manifest.arguments,
                "inputs": manifest.inputs,
                "shards": manifest.shards,
                "converted by": f"regiongpt {manifest.regiongpt_version}",
            }
        )
    return {"records an epoch": len(mixture), "seed": mixture.seed, "parts": parts}


def read_notes(out: Path) -> dict[str, Any]:
    """The notes of a run; empty if there are none. Raises DataError if they are not what was written."""
    path = out / RUN
    notes = read_json(path) if path.exists() else {}
    if not isinstance(notes, dict):
        raise DataError(f"{path}: expected the notes of a run, got {type(notes).__name__}; delete the file")
    return notes


def write_report(out: Path) -> Path:
    """Write ``report.html`` into the folder of a run, and name it.

    Raises:
        DataError: The folder holds no log of a run, or one that cannot be read; the page cannot be written.
    """
    stages = read_stages(out)
    if not stages:
        raise DataError(
            f"{out}: expected the folder of a run, with {LOG} in the folder of a stage, found none; "
            "give the folder that --out named"
        )
    notes = read_notes(out)
    try:
        shown = {
            "title": f"Training {out.resolve().name}",
            "made": f"{out}, {stages[-1].state}; made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "overview": [_OVERVIEW, *map(_overview, stages)],
            "stages": [_shown(stage) for stage in stages],
            "starts": notes.get("starts", []),
            "recipe": _recipe(notes, {stage.name for stage in stages}),
            "data": list(_data(notes.get("data") or {})),
            "environment": _environment(notes.get("starts", [])),
        }
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{out}: {RUN} or a log in it is not what a training wrote: {error!r}; delete it") from None
    write_page(out / PAGE, "train.html", **shown)
    return out / PAGE


def report_what_there_is(out: Path) -> None:
    """Write the report at the end of a run, however it ends; log what cannot be reported."""
    try:
        if any(stage.lines for stage in read_stages(out)):
            log.info("report: %s", write_report(out))
    except (RegionGPTError, OSError) as error:
        log.warning("no report was made: %s", error)


@dataclass(frozen=True, kw_only=True)
class StageLog:
    """What a stage has written: its log, measurements on dev data, answers about fixed regions."""

    folder: Path
    lines: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    answers: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The stage."""
        return self.folder.name.removesuffix("-checkpoints")

    @property
    def steps(self) -> int:
        """Steps of the whole stage."""
        return int(self.lines[-1]["of"]) if self.lines else 0

    @property
    def finished(self) -> bool:
        """Whether its last step is done."""
        return bool(self.lines) and int(self.lines[-1]["step"]) >= self.steps

    @property
    def state(self) -> str:
        """How far it is."""
        if not self.lines:
            return f"{self.name} has not begun"
        if self.finished:
            return f"{self.name} is finished"
        return f"{self.name} has done step {self.lines[-1]['step']:,} of {self.steps:,}"


def read_stages(out: Path) -> list[StageLog]:
    """The stages of a run that have begun, in order."""
    folders = [path.parent for path in out.glob(f"*/{LOG}")] if out.is_dir() else []
    folders.sort(key=lambda each: (_ORDER.index(each.name) if each.name in _ORDER else len(_ORDER), each.name))
    return [
        StageLog(
            folder=each,
            lines=read_lines(each / LOG),
            dev=read_lines(each / DEV),
            answers=read_lines(each / ANSWERS),
        )
        for each in folders
    ]


# -- what the page shows -----------------------------------------------------------------------------------------------

_OVERVIEW: Final = ("stage", "steps", "loss", "examples", "tokens", "time", "tokens/s", "waiting", "utilisation")


def _overview(stage: StageLog) -> list[str]:
    lines, done = stage.lines, f"{len(stage.lines):,}"
    if not lines:
        return [stage.name, "0", *[""] * (len(_OVERVIEW) - 2)]
    last = [float(line["loss"]) for line in lines[-max(1, round(0.05 * len(lines))) :]]
    seconds = sum(line["seconds"] for line in lines)
    used = [line["mfu"] for line in lines if "mfu" in line]
    return [
        stage.name,
        done if stage.finished else f"{done} of {stage.steps:,}",
        f"{sum(last) / len(last):.4f}",
        f"{sum(line['examples'] for line in lines):,}",
        short(sum(line["tokens"] for line in lines)),
        tqdm.format_interval(seconds),
        short(median(line["tokens"] / line["seconds"] for line in lines)),
        f"{sum(line['wait'] for line in lines) / seconds:.1%}",
        f"{median(used):.1%}" if used else "",
    ]


def _shown(stage: StageLog) -> dict[str, Any]:
    described = "no step yet"
    if stage.lines:
        described = f"{stage.state}; loss {float(stage.lines[0]['loss']):.4f} at first"
        bad = [line["step"] for line in stage.lines if not math.isfinite(float(line["loss"]))]
        described += f"; the loss was no finite number at step {bad[0]:,}" if bad else ""
    asked = stage.answers[-1]["answers"] if stage.answers else []
    return {
        "name": stage.name,
        "described": described,
        "charts": list(_charts(stage)),
        "asked": len(stage.answers),
        "answers": [_answer(stage, number, each) for number, each in enumerate(asked)],
    }


def _charts(stage: StageLog) -> Iterator[Markup]:
    lines = stage.lines
    tasks = sorted({name for line in lines for name in line["tasks"]})
    rates = sorted({name for line in lines for name in line["lr"]})
    yield line_chart("Loss", [_curve("training", lines, "loss"), _curve("dev", stage.dev, "loss")])
    yield line_chart("Loss by task", [_curve(name, lines, "tasks", name, "loss") for name in tasks])
    yield line_chart("Learning rate", [_curve(name, lines, "lr", name, exact=True) for name in rates])
    yield line_chart("Gradient norm, before clipping", [_curve("norm", lines, "grad_norm")], logarithmic=True)
    for name in ("tokens", "examples"):
        speeds = [{**line, "rate": line[name] / line["seconds"]} for line in lines]
        yield line_chart(f"{name.capitalize()} a second", [_curve(name, speeds, "rate")])
    shares = [{**line, "share": line["wait"] / line["seconds"]} for line in lines]
    waiting, used = _curve("waiting for data", shares, "share"), _curve("model FLOPs utilisation", lines, "mfu")
    yield line_chart("Shares of the time and of the peak", [waiting, used])


def _curve(name: str, lines: Iterable[Mapping[str, Any]], *path: str, exact: bool = False) -> Curve:
    """The values that lines have at a path of keys, over their steps."""
    xs, ys = [], []
    for line in lines:
        value: Any = line
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            xs.append(line["step"])
            ys.append(float(value))
    return Curve(name=name, xs=xs, ys=ys, exact=exact)


def _answer(stage: StageLog, number: int, asked: Mapping[str, str]) -> dict[str, Any]:
    given = [(line["step"], line["answers"][number]) for line in stage.answers if len(line["answers"]) > number]
    said = [(step, each["answer"]) for step, each in given if each["question"] == asked["question"]]
    shown = {**asked, "said": over_time(said), "picture": None, "fault": ""}
    try:
        path = stage.folder / PICTURES / f"{number}.jpg"
        return {**shown, "picture": picture(load_image(path), "the image with its numbered regions")}
    except DataError as error:
        return {**shown, "fault": str(error)}


def over_time(said: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    """Answers with the steps they were given at, equal ones in a row as one, and of many some from all over."""
    runs: list[tuple[int, int, str]] = []
    for step, answer in said:
        if runs and runs[-1][2] == answer:
            runs[-1] = (runs[-1][0], step, answer)
        else:
            runs.append((step, step, answer))
    if len(runs) > _ANSWERS_SHOWN:
        places = [round(k * (len(runs) - 1) / (_ANSWERS_SHOWN - 1)) for k in range(_ANSWERS_SHOWN)]
        runs = [runs[place] for place in places]
    return [
        (f"step {first:,}" if first == last else f"steps {first:,} to {last:,}", answer) for first, last, answer in runs
    ]


def _recipe(notes: Mapping[str, Any], stages: set[str]) -> dict[str, list[tuple[str, str]]]:
    """The recipe, table by table, without what the run does not read and the stages that were not run."""
    tables: dict[str, list[tuple[str, str]]] = {}
    hidden = {"plan", "language", "align", "stage1", "stage2"} - stages
    for name, text in _flat(notes.get("config") or {}):
        table, dot, field = name.partition(".")
        if table not in hidden and name not in notes.get("unread", ()):
            tables.setdefault(table if dot else "", []).append((field or name, text))
    return tables


def _data(data: Mapping[str, Any]) -> Iterator[tuple[str, list[list[str]], list[tuple[str, str]]]]:
    """For each stage's data a title and a table, or plain values where they are of no mixture."""
    for name, values in data.items():
        if not (isinstance(values, Mapping) and values.get("parts")):
            yield name, [], _flat(values) if isinstance(values, Mapping) else [("", str(values))]
            continue
        rows = [["folder", "source", "records", "an epoch", "images", "regions", "turns", "left out", "SHA-256"]]
        for part in values["parts"]:
            counts = part.get("counts", {})
            sums = ", ".join(shard["sha256"][:12] for shard in part.get("shards", []))
            numbers = [counts.get("records", 0), part["records an epoch"]]
            numbers += [counts.get(kind, 0) for kind in ("images", "regions", "turns")]
            numbers.append(sum(part.get("left out", {}).values()))
            shown = sums if len(sums) < 60 else f"{sums[:60]}..."
            rows.append([part["folder"], part["source"], *(f"{number:,}" for number in numbers), shown])
        yield f"{name}: {values['records an epoch']:,} records an epoch, seed {values['seed']}", rows, []


def _environment(starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    if not starts:
        return []
    last = starts[-1]
    pairs = [(name, str(value)) for name, value in last["machine"].items() if value]
    pairs += [("processes", str(last["processes"])), *last["packages"].items()]
    if checkout := last.get("commit"):
        pairs.append(("commit", f"{checkout['hash']}{', with changes' if checkout.get('changed') else ''}"))
    pairs += [(f"start {n}", f"{each['date']}  {' '.join(each['command'])}") for n, each in enumerate(starts, 1)]
    return pairs


def _flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted names with texts; what is empty is left out."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            found += _flat(value, name)
        elif value not in ("", None, [], ()):
            found.append((name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return found

"""A run as one page that needs no other file: curves, figures, answers over time, recipe, data and environment.

It is made of what the run has written so far, so it can be made of one that is running, or was killed, as well.
"""

import base64
import html
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

from regiongpt import charts
from regiongpt.charts import Curve, line_chart, short
from regiongpt.data.mixture import Mixture
from regiongpt.data.progress import clock
from regiongpt.distributed import launched
from regiongpt.environment import commit, machine, versions
from regiongpt.errors import ConfigError, DataError, RegionGPTError
from regiongpt.pages import beside, card, chips, facts, fault, page, table, write_page
from regiongpt.storage import read_json, write_json, writing
from regiongpt.train.answers import PICTURES
from regiongpt.train.recipe import Recipe
from regiongpt.train.watch import ANSWERS, DEV, LOG, read_lines

log = logging.getLogger(__name__)
PAGE, RUN = "report.html", "run.json"
_ORDER: Final = ("language", "language-checkpoints", "align", "stage1", "stage2")
_ANSWERS_SHOWN: Final = 8
_RECENT: Final = 0.05


def write_report(out: Path) -> Path:
    """Writes ``report.html`` into the folder of a run.

    Args:
        out: The folder.

    Returns:
        The page.

    Raises:
        DataError: The folder holds no log of a run, or one that cannot be read.
        ConfigError: The page cannot be written.
    """
    out = Path(out)
    stages = read_stages(out)
    if not stages:
        raise DataError(
            f"{out}: expected the folder of a run, with {LOG} in the folder of a stage, found none; "
            "give the folder that --out named"
        )
    notes = read_notes(out)
    state = stages[-1].state
    made = f"{out}, {state}; made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    sections = [_overview(stages, notes), *(_stage(stage) for stage in stages)]
    sections += [_recipe(notes, [stage.name for stage in stages]), _data(notes), _environment(notes)]
    body = "\n".join(section for section in sections if section)
    write_page(page(f"Training {out.resolve().name}", made, body, charts.STYLE + _STYLE), out / PAGE, "the report")
    return out / PAGE


def report_what_there_is(out: Path) -> None:
    """Writes the report at the end of a run, however it ends: what cannot be reported is said, and is no fault."""
    try:
        if any(stage.lines for stage in read_stages(out)):
            log.info("report: %s", write_report(out))
    except (RegionGPTError, OSError, ValueError, KeyError) as error:
        log.warning("no report was made: %s", error)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage has written.

    Attributes:
        folder: Of the stage.
        lines: Its log, a line a step.
        dev: Measurements on dev data.
        answers: Answers on fixed regions.
    """

    folder: Path
    lines: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    answers: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.folder.name.removesuffix("-checkpoints")

    @property
    def steps(self) -> int:
        """That it has when it is finished."""
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

    def total(self, name: str) -> float:
        """The sum of a figure over all steps."""
        return float(sum(line.get(name, 0) for line in self.lines))

    def rate(self, name: str) -> float:
        """How many a second, in the middle of all steps."""
        rates = [line[name] / line["seconds"] for line in self.lines if line.get("seconds")]
        return median(rates) if rates else 0.0

    def recent(self, values: Iterable[Any]) -> float:
        """The mean of the last values of some, one a step."""
        numbers = [float(value) for value in values]
        last = numbers[-max(1, round(_RECENT * len(numbers))) :]
        return sum(last) / len(last) if last else math.nan


def read_stages(out: Path) -> list[Stage]:
    """The stages of a run that have begun, in order.

    Raises:
        DataError: A log cannot be read.
    """
    folders = [path.parent for path in out.glob(f"*/{LOG}")] if out.is_dir() else []
    folders.sort(key=lambda each: (_ORDER.index(each.name) if each.name in _ORDER else len(_ORDER), each.name))
    return [
        Stage(
            folder=folder,
            lines=read_lines(folder / LOG),
            dev=read_lines(folder / DEV),
            answers=read_lines(folder / ANSWERS),
        )
        for folder in folders
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page


def _overview(stages: Sequence[Stage], notes: Mapping[str, Any]) -> str:
    rows = [["stage", "steps", "loss", "examples", "tokens", "time", "tokens/s", "waiting", "utilisation"]]
    for stage in stages:
        seconds = stage.total("seconds")
        used = [line["mfu"] for line in stage.lines if "mfu" in line]
        rows.append(
            [
                stage.name,
                f"{len(stage.lines):,}" if stage.finished else f"{len(stage.lines):,} of {stage.steps:,}",
                f"{stage.recent(line['loss'] for line in stage.lines):.4f}",
                f"{stage.total('examples'):,.0f}",
                short(stage.total("tokens")),
                clock(seconds),
                short(stage.rate("tokens")),
                f"{stage.total('wait') / seconds:.1%}" if seconds else "",
                f"{median(used):.1%}" if used else "",
            ]
        )
    text = (
        f"Loss: mean of the last {_RECENT:.0%} of the steps. Time: of the steps alone, without checkpoints and "
        "answers. Waiting: share of it spent waiting for data. Utilisation: model FLOPs of tokens that are not "
        "padding, of the device's peak. Tokens a second and utilisation are those of the median step."
    )
    starts = notes.get("starts", [])
    if len(starts) > 1:
        text += f" The run was started {len(starts)} times; every step is counted once."
    return card(f"{table(rows)}<p class='meta note'>{html.escape(text)}</p>")


def _stage(stage: Stage) -> str:
    drawn = "".join(_curves(stage))
    answers = _answers(stage)
    body = f'<div class="charts">{drawn}</div>{answers}' if drawn else answers
    return card(body, stage.name, _described(stage))


def _described(stage: Stage) -> str:
    if not stage.lines:
        return "no step yet"
    bad = [line["step"] for line in stage.lines if not math.isfinite(float(line["loss"]))]
    text = f"{stage.state}; loss {float(stage.lines[0]['loss']):.4f} at first"
    if bad:
        text += f"; the loss was no finite number at step {bad[0]:,}"
    return text


def _curves(stage: Stage) -> Iterator[str]:
    lines = stage.lines
    steps = [line["step"] for line in lines]
    dev = [Curve(name="dev", xs=[d["step"] for d in stage.dev], ys=_floats(d.get("loss") for d in stage.dev))]
    yield line_chart("Loss", [Curve(name="training", xs=steps, ys=_floats(line["loss"] for line in lines)), *dev])
    tasks = sorted({name for line in lines for name in line.get("tasks", {})})
    yield line_chart("Loss by task", [_task_curve(lines, name) for name in tasks])
    others = sorted({name for d in stage.dev for name, v in d.items() if isinstance(v, int | float)} - {"step", "loss"})
    for name in others:
        having = [d for d in stage.dev if name in d]
        curve = Curve(name=name, xs=[d["step"] for d in having], ys=_floats(d[name] for d in having))
        yield line_chart(f"Dev: {name}", [curve])
    rates = sorted({name for line in lines for name in line.get("lr", {})})
    yield line_chart(
        "Learning rate",
        [Curve(name=name, xs=steps, ys=_floats(line["lr"].get(name) for line in lines), exact=True) for name in rates],
    )
    norm = Curve(name="norm", xs=steps, ys=_floats(line.get("grad_norm") for line in lines))
    yield line_chart("Gradient norm, before clipping", [norm], logarithmic=True)
    for title, name in (("Tokens a second", "tokens"), ("Examples a second", "examples")):
        ys = [line[name] / line["seconds"] if line["seconds"] else math.nan for line in lines]
        yield line_chart(title, [Curve(name=name, xs=steps, ys=ys)])
    shares = [
        Curve(
            name="waiting for data",
            xs=steps,
            ys=[line["wait"] / line["seconds"] if line["seconds"] else math.nan for line in lines],
        ),
        Curve(name="model FLOPs utilisation", xs=steps, ys=_floats(line.get("mfu") for line in lines)),
    ]
    yield line_chart("Shares of the time and of the peak", shares)


def _task_curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve:
    having = [line for line in lines if name in line.get("tasks", {})]
    return Curve(
        name=name, xs=[line["step"] for line in having], ys=_floats(line["tasks"][name]["loss"] for line in having)
    )


def _floats(values: Iterable[Any]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _answers(stage: Stage) -> str:
    if not stage.answers:
        return ""
    asked = stage.answers[-1]["answers"]
    blocks = []
    for number, each in enumerate(asked):
        said = [
            (line["step"], line["answers"][number]["answer"])
            for line in stage.answers
            if len(line["answers"]) > number and line["answers"][number]["question"] == each["question"]
        ]
        told = f"<p class='q'>{chips(each['question'])}</p>"
        told += "".join(
            f"<p class='a'><small>{html.escape(when)}</small>{chips(answer) or '<i>nothing</i>'}</p>"
            for when, answer in over_time(said)
        )
        told += f"<p class='expected'><small>in the data</small>{chips(each['expected'])}</p>"
        blocks.append(f"<h3>{html.escape(each['name'])}</h3>{beside(_picture(stage.folder, number), told)}")
    heading = f"Answers on fixed dev regions, at {len(stage.answers):,} steps"
    return f'<h2 class="part">{html.escape(heading)}</h2><div class="answers">{"".join(blocks)}</div>'


def over_time(said: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    """Answers with the steps they were given at, equal ones in a row as one, and of many some from all over.

    Args:
        said: Step and answer, in order.
    """
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


def _picture(folder: Path, number: int) -> str:
    path = folder / PICTURES / f"{number}.jpg"
    try:
        coded = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        return fault(f"{path}: {error.strerror}")
    return f'<img src="data:image/jpeg;base64,{coded}" alt="the image with its numbered regions">'


def _recipe(notes: Mapping[str, Any], stages: Sequence[str]) -> str:
    """The recipe, table by table, without what the run does not read and the stages that were not run."""
    config = notes.get("config")
    if not config:
        return ""
    hidden = {"plan", *(name.removesuffix("-checkpoints") for name in _ORDER)} - set(stages)
    try:
        recipe = Recipe(**config)
        read = [(name, text) for name, text in flat(config) if not recipe.unused(name)]
    except ConfigError:  # of another release
        read = flat(config)
    blocks = [facts((name, text) for name, text in read if "." not in name)]
    for kind in (name for name, values in config.items() if isinstance(values, Mapping) and name not in hidden):
        own = [(name.partition(".")[2], text) for name, text in read if name.startswith(f"{kind}.")]
        if own:
            blocks.append(facts(own, f"[{kind}]"))
    return card(f'<div class="tables">{"".join(f"<div>{block}</div>" for block in blocks)}</div>', "Recipe")


def _data(notes: Mapping[str, Any]) -> str:
    blocks = []
    for name, values in (notes.get("data") or {}).items():
        if isinstance(values, Mapping) and values.get("parts"):
            rows = [["folder", "source", "records", "an epoch", "images", "regions", "turns", "left out", "SHA-256"]]
            for part in values["parts"]:
                counts = part.get("counts", {})
                sums = ", ".join(shard["sha256"][:12] for shard in part.get("shards", []))
                rows.append(
                    [
                        part["folder"],
                        part["source"],
                        f"{counts.get('records', 0):,}",
                        f"{part['records an epoch']:,}",
                        *(f"{counts.get(kind, 0):,}" for kind in ("images", "regions", "turns")),
                        f"{sum(part.get('left out', {}).values()):,}",
                        sums if len(sums) < 60 else f"{sums[:60]}...",
                    ]
                )
            blocks.append(
                table(rows, f"{name}: {values['records an epoch']:,} records an epoch, seed {values['seed']}")
            )
        else:
            blocks.append(facts(flat(values) if isinstance(values, Mapping) else [("", str(values))], name))
    return card("".join(blocks), "Data") if blocks else ""


def _environment(notes: Mapping[str, Any]) -> str:
    starts = notes.get("starts", [])
    if not starts:
        return ""
    last = starts[-1]
    commit = last.get("commit")
    changed = ", with changes" if commit and commit.get("changed") else ""
    pairs = [
        *((name, str(value)) for name, value in last["machine"].items() if value),
        ("processes", str(last["processes"])),
        *((name, value) for name, value in last["packages"].items()),
        *([("commit", f"{commit['hash']}{changed}")] if commit else []),
        *((f"start {number}", f"{each['date']}  {' '.join(each['command'])}") for number, each in enumerate(starts, 1)),
    ]
    return card(facts(pairs), "Environment")


def flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted names with texts; what is empty is left out."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            found += flat(value, name)
        elif value not in ("", None, [], ()):
            found.append((name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return found


_STYLE: Final = """
.note { margin: 10px 0 0; } .part { margin: 22px 0 0; font-size: 15px; }
.talk .a small, .expected small { display: block; opacity: 0.75; font-size: 12px; }
.talk .expected { margin-left: 28px; border: 1px dashed var(--line); }
.answers .pair > img { flex: 0 1 auto; width: auto; max-width: min(480px, 100%); max-height: 400px; }
.tables { columns: 3 320px; column-gap: 36px; margin-top: 10px; } .tables > div { break-inside: avoid; }
.tables > div { margin-bottom: 16px; } .tables h3 { margin: 0 0 4px; font-family: ui-monospace, monospace; }
"""


def note_run(out: Path, recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Note a start of a run, the first or a later one, in its folder: recipe, data, machine, versions.

    Args:
        out: Folder of the run.
        recipe: That is trained.
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
    notes = {"config": recipe.model_dump(mode="json"), "data": dict(data), "starts": [*starts, start]}
    write_json(out / RUN, json.loads(json.dumps(notes, default=str)))


def read_notes(out: Path) -> dict[str, Any]:
    """The notes of a run; empty where there are none.

    Raises:
        DataError: They are not what was written.
    """
    path = out / RUN
    notes = read_json(path) if path.exists() else {}
    if not isinstance(notes, dict):
        raise DataError(f"{path}: expected the notes of a run, got {type(notes).__name__}; delete the file")
    return notes


def data_of(mixture: Mixture) -> dict[str, Any]:
    """What a mixture holds: of each part its manifest, and how many of its records make an epoch."""
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

"""What a folder of records holds, counted: as a table, as a picture, as numbers for another program.

Paper: Table 2 (images, regions, average words), §4 (boxes a category).
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import numpy as np

from regiongpt.console import progress
from regiongpt.data.records import Record
from regiongpt.data.shards import RecordSet
from regiongpt.drawing import COLOURS
from regiongpt.errors import ConfigError, RegionError
from regiongpt.prompts import PLACEHOLDER
from regiongpt.storage import write_file

SHARE_EDGES: Final = tuple(10 ** (exponent / 4) for exponent in range(-20, 1))
"""Bounds of the area histogram, as shares of the image: four bins a power of ten, from 0.001 % to all of it."""
SIDES: Final = (32, 96)
"""COCO calls a region small below a square of 32 pixels and large above one of 96."""
MOST_CATEGORIES: Final = 20
_BATCH: Final = 500
_BAR: Final = 40


def rows(records: RecordSet) -> Iterator[dict[str, Any]]:
    """The rows of a folder in order, read in batches: many times as fast as one by one."""
    for table in records.table.with_format("arrow").iter(batch_size=_BATCH):
        yield from table.to_pylist()


@dataclass(kw_only=True)
class TaskStatistics:
    """The turns of one task.

    Attributes:
        turns: Questions with an answer.
        guided: Of these, those with the suffix that fixes the format of the answer.
        regions: That their questions are about, one counted as often as it is asked about.
        words: How many answers have so many words.
    """

    turns: int = 0
    guided: int = 0
    regions: int = 0
    words: Counter[int] = field(default_factory=Counter)

    @property
    def average_words(self) -> float:
        """Words an answer."""
        return sum(words * count for words, count in self.words.items()) / max(1, self.words.total())


@dataclass(kw_only=True)
class Statistics:
    """Counts over a folder of records.

    Attributes:
        source: Name of the converter.
        records: Rows.
        images: Different images.
        regions: In all records.
        tasks: Of each task's turns.
        categories: Regions of each category.
        kinds: Regions of each kind (box, polygon, ...).
        shares: Regions in each bin of the share of the image that they cover: below the first of
            :data:`SHARE_EDGES`, then between each two of them.
        sizes: Regions that COCO calls small, medium and large.
        unmeasured: Regions without an area in their image.
        rejects: Left out by the conversion, by kind.
    """

    source: str
    records: int = 0
    images: int = 0
    regions: int = 0
    tasks: dict[str, TaskStatistics] = field(default_factory=dict)
    categories: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    shares: list[int] = field(default_factory=lambda: [0] * len(SHARE_EDGES))
    sizes: list[int] = field(default_factory=lambda: [0] * 3)
    unmeasured: int = 0
    rejects: dict[str, int] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        """Of all tasks."""
        return sum(task.turns for task in self.tasks.values())

    @property
    def words(self) -> Counter[int]:
        """How many answers of any task have so many words."""
        return sum((task.words for task in self.tasks.values()), Counter())

    @property
    def average_words(self) -> float:
        """Words an answer, over all tasks."""
        return TaskStatistics(words=self.words).average_words

    def add(self, record: Record) -> None:
        """Counts one record; images are counted by the caller, who knows which came before."""
        self.records += 1
        self.regions += len(record.regions)
        for each in record.regions:
            self.kinds[each.region.kind] += 1
            if each.category:
                self.categories[each.category] += 1
            try:
                area = each.region.area(record.width, record.height)
            except RegionError:
                self.unmeasured += 1
                continue
            share = min(1.0, area / (record.width * record.height))
            self.shares[min(bisect_right(SHARE_EDGES, share), len(SHARE_EDGES) - 1)] += 1
            self.sizes[bisect_right([side**2 for side in SIDES], area)] += 1
        for turn in record.turns:
            task = self.tasks.setdefault(turn.task, TaskStatistics())
            task.turns += 1
            task.guided += turn.guided
            task.regions += len(turn.regions or set(PLACEHOLDER.findall(turn.question)))
            task.words[len(turn.answer.split())] += 1

    def as_dict(self) -> dict[str, Any]:
        """All of it as json can write it."""
        tasks = {
            name: {
                "turns": task.turns,
                "guided": task.guided,
                "regions": task.regions,
                "average_words": round(task.average_words, 3),
                "words": {str(words): task.words[words] for words in sorted(task.words)},
            }
            for name, task in sorted(self.tasks.items())
        }
        return {
            **{name: getattr(self, name) for name in ("source", "records", "images", "regions", "turns")},
            "average_words": round(self.average_words, 3),
            "tasks": tasks,
            "categories": dict(self.categories.most_common()),
            "kinds": dict(self.kinds.most_common()),
            "area_share_edges": list(SHARE_EDGES),
            "area_share": self.shares,
            "sizes": dict(zip(("small", "medium", "large"), self.sizes, strict=True)),
            "regions_without_area": self.unmeasured,
            "rejects": self.rejects,
        }


def statistics(records: RecordSet) -> Statistics:
    """Counts a folder of records.

    Raises:
        DataError: A row is not a record.
    """
    counted = Statistics(source=records.manifest.source, rejects=dict(records.manifest.rejects))
    images: set[str] = set()
    for row in progress(rows(records), "statistics", "records", len(records)):
        record = Record.from_row(row)
        images.add(record.image)
        counted.add(record)
    counted.images = len(images - {""})
    return counted


# ---------------------------------------------------------------------------------------------------------------------
# As text


def table_rows(counted: Statistics) -> list[tuple[str, list[list[str]]]]:
    """The statistics as titled tables of strings, each with its header first; what is empty is left out."""

    def shared(name: str, parts: Iterable[tuple[str, int]]) -> list[list[str]]:
        return [[name, "regions", ""], *([part, f"{n:,}", _share_bar(n, counted.regions)] for part, n in parts)]

    numbers = [counted.images, counted.regions, counted.average_words, len(counted.categories)]
    total = [counted.source, *map(_number, [*numbers, counted.records, counted.turns])]
    tasks = [
        [name, *map(_number, (task.turns, task.guided, task.regions, task.average_words))]
        for name, task in sorted(counted.tasks.items())
    ]
    names = (f"small, under {SIDES[0]}² px", f"medium, under {SIDES[1]}² px", f"large, from {SIDES[1]}² px")
    common = counted.categories.most_common(MOST_CATEGORIES)
    categories = shared("category", common)
    if len(counted.categories) > len(common):
        rest = sorted(counted.categories.values())
        spread = f"of {len(rest):,}: the rarest {rest[0]:,}, half of them up to {rest[len(rest) // 2]:,}"
        categories.append(["...", "", spread])
    rejects = [[kind, f"{count:,}"] for kind, count in sorted(counted.rejects.items())]
    areas = [*coarse_shares(counted), *([("no area", counted.unmeasured)] if counted.unmeasured else [])]
    header = ["data set", "images", "regions", "average words", "categories", "records", "turns"]
    tables = [
        ("", [header, total]),
        ("Turns", [["task", "turns", "guided", "regions", "average words"], *tasks]),
        ("Area of the regions", shared("share of the image", areas)),
        ("", shared("size as COCO counts", zip(names, counted.sizes, strict=True))),
        ("", shared("kind of region", counted.kinds.most_common())),
        ("Categories", categories),
        ("Rejects", [["left out by the conversion", "times"], *rejects]),
    ]
    return [(title, table) for title, table in tables if len(table) > 1]


def as_text(counted: Statistics) -> str:
    """The statistics as tables for a terminal: words to the left and numbers to the right."""
    blocks = []
    for _, table in table_rows(counted):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            cells = [f"{row[0]:<{widths[0]}}"]
            for title, cell, width in zip(table[0][1:], row[1:], widths[1:], strict=True):
                cells.append(f"{cell:>{width}}" if title else cell)
            lines.append("   ".join(cells).rstrip())
        blocks.append("\n".join(lines))
    if not counted.rejects:
        blocks.append("The conversion left nothing out.")
    return "\n\n".join(blocks)


def coarse_shares(counted: Statistics) -> list[tuple[str, int]]:
    """The area histogram in powers of ten."""
    below, fine = counted.shares[0], counted.shares[1:]
    decades = [sum(fine[start : start + 4]) for start in range(0, len(fine), 4)]
    names = ["under 0.01 %", "0.01 to 0.1 %", "0.1 to 1 %", "1 to 10 %", "10 to 100 %"]
    return list(zip(names, [below + decades[0], *decades[1:]], strict=True))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _share_bar(count: int, total: int) -> str:
    share = count / max(1, total)
    eighths = round(share * _BAR * 8)
    bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return f"{100 * share:5.1f} %  {bar}".rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# As a picture


def plot(counted: Statistics, path: Path) -> None:
    """Write the statistics as a picture of four panels.

    Args:
        counted: To be drawn.
        path: Of the file; its ending (.png, .svg, .pdf) is the format.

    Raises:
        ConfigError: matplotlib is missing, or the ending is of no picture.
        DataError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError:
        raise ConfigError("expected matplotlib for --plot, found none; pip install '.[data]'") from None
    figure = Figure(figsize=(13, 9), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    figure.suptitle(
        f"{counted.source}: {counted.records:,} records, {counted.images:,} images, {counted.regions:,} regions, "
        f"{counted.turns:,} turns, {counted.average_words:.2f} words an answer"
    )
    ((areas, words), (tasks, categories)) = figure.subplots(2, 2)
    colours = [tuple(level / 255 for level in colour) for colour in COLOURS]

    areas.set(title="area of the regions", xlabel="share of the image", ylabel="regions", xscale="log")
    edges = [SHARE_EDGES[0] / SHARE_EDGES[1] * SHARE_EDGES[0], *SHARE_EDGES]
    areas.stairs(counted.shares, edges, fill=True, color=colours[5])
    areas.set_xlim(edges[0], 1.02)
    areas.set_xticks([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    areas.minorticks_off()

    words.set(title="length of the answers", xlabel="words", ylabel="answers")
    longest = max(counted.words, default=1)
    width = max(1, math.ceil((longest + 1) / 60))
    below = np.zeros(longest // width + 1)
    for colour, (name, task) in zip(cycle(colours), sorted(counted.tasks.items()), strict=False):
        lengths, counts = np.array(list(task.words)), list(task.words.values())
        heights = np.bincount(lengths // width, counts, len(below))
        places = (np.arange(len(below)) + 0.5) * width - 0.5
        words.bar(places, heights, 0.9 * width, bottom=below, color=colour, label=name)
        below += heights
    if len(counted.tasks) > 1:
        words.legend(frameon=False)

    tasks.set(title="turns of each task", xlabel="turns")
    ordered = sorted(counted.tasks.items(), key=lambda item: item[1].turns)
    names, guided = [name for name, _ in ordered], [task.guided for _, task in ordered]
    tasks.barh(names, guided, color=colours[2], label="with a guided prompt")
    tasks.barh(names, [task.turns - task.guided for _, task in ordered], left=guided, color=colours[1], label="without")
    tasks.margins(y=max(0.05, 0.5 - len(names) / 10))
    tasks.legend(frameon=False, loc="lower right")

    common, total = counted.categories.most_common(MOST_CATEGORIES)[::-1], len(counted.categories)
    some = "categories" if common else "no categories"
    title = some if len(common) == total else f"the {len(common)} most frequent of {total:,} categories"
    categories.set(title=title, xlabel="regions")
    categories.barh([name for name, _ in common], [count for _, count in common], color=colours[0])

    for axis in (areas.yaxis, words.xaxis, words.yaxis, tasks.xaxis, categories.xaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.axes.spines[["top", "right"]].set_visible(False)
    try:
        write_file(path, lambda unfinished: figure.savefig(unfinished, dpi=120))
    except ValueError as error:
        raise ConfigError(f"--plot: {path}: {error}") from None

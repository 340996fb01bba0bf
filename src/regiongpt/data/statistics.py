"""What a folder of records holds, counted: as a table, as a picture, as numbers for another program.

Paper: Table 2 (images, regions, average words), §4 (boxes a category).
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from regiongpt.console import progress
from regiongpt.data.records import Record
from regiongpt.data.shards import RecordSet
from regiongpt.drawing import COLOURS
from regiongpt.errors import ConfigError, RegionError
from regiongpt.prompts import PLACEHOLDER

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
        return {
            "source": self.source,
            "records": self.records,
            "images": self.images,
            "regions": self.regions,
            "turns": self.turns,
            "average_words": round(self.average_words, 3),
            "tasks": {
                name: {
                    "turns": task.turns,
                    "guided": task.guided,
                    "regions": task.regions,
                    "average_words": round(task.average_words, 3),
                    "words": {str(words): task.words[words] for words in sorted(task.words)},
                }
                for name, task in sorted(self.tasks.items())
            },
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
        if record.image:
            images.add(record.image)
        counted.add(record)
    counted.images = len(images)
    return counted


# ---------------------------------------------------------------------------------------------------------------------
# As text


def table_rows(counted: Statistics) -> list[tuple[str, list[list[str]]]]:
    """The statistics as titled tables of strings, each with its header first; what is empty is left out."""
    total = [
        ["data set", "images", "regions", "average words", "categories", "records", "turns"],
        [
            counted.source,
            f"{counted.images:,}",
            f"{counted.regions:,}",
            f"{counted.average_words:.2f}",
            f"{len(counted.categories):,}",
            f"{counted.records:,}",
            f"{counted.turns:,}",
        ],
    ]
    tasks = [["task", "turns", "guided", "regions", "average words"]]
    for name, task in sorted(counted.tasks.items()):
        numbers = [f"{value:,}" for value in (task.turns, task.guided, task.regions)]
        tasks.append([name, *numbers, f"{task.average_words:.2f}"])
    areas = [["share of the image", "regions", ""]]
    for name, count in coarse_shares(counted):
        areas.append([name, f"{count:,}", _share_bar(count, counted.regions)])
    if counted.unmeasured:
        areas.append(["no area", f"{counted.unmeasured:,}", _share_bar(counted.unmeasured, counted.regions)])
    sizes = [["size as COCO counts", "regions", ""]]
    names = (f"small, under {SIDES[0]}²", f"medium, under {SIDES[1]}²", f"large, from {SIDES[1]}²")
    for name, count in zip(names, counted.sizes, strict=True):
        sizes.append([f"{name} px", f"{count:,}", _share_bar(count, counted.regions)])
    kinds = [["kind of region", "regions", ""]]
    kinds += [[kind, f"{n:,}", _share_bar(n, counted.regions)] for kind, n in counted.kinds.most_common()]
    categories = [["category", "regions", ""]]
    common = counted.categories.most_common(MOST_CATEGORIES)
    categories += [[name, f"{n:,}", _share_bar(n, counted.regions)] for name, n in common]
    if len(counted.categories) > len(common):
        rest = sorted(counted.categories.values())
        middle = rest[len(rest) // 2]
        spread = f"of {len(rest):,}: the rarest {rest[0]:,}, half of them up to {middle:,}"
        categories.append(["...", "", spread])
    rejects = [["left out by the conversion", "times"]]
    rejects += [[kind, f"{count:,}"] for kind, count in sorted(counted.rejects.items())]
    tables = [
        ("", total),
        ("Turns", tasks),
        ("Area of the regions", areas),
        ("", sizes),
        ("", kinds),
        ("Categories", categories),
        ("Rejects", rejects),
    ]
    return [(title, table) for title, table in tables if len(table) > 1]


def as_text(counted: Statistics) -> str:
    """The statistics as tables for a terminal."""
    blocks = ["\n".join(_aligned(table)) for _, table in table_rows(counted)]
    if not counted.rejects:
        blocks.append("The conversion left nothing out.")
    return "\n\n".join(blocks)


def coarse_shares(counted: Statistics) -> list[tuple[str, int]]:
    """The area histogram in powers of ten."""
    below, fine = counted.shares[0], counted.shares[1:]
    decades = [sum(fine[start : start + 4]) for start in range(0, len(fine), 4)]
    counts = [below + decades[0], *decades[1:]]
    names = ["under 0.01 %", "0.01 to 0.1 %", "0.1 to 1 %", "1 to 10 %", "10 to 100 %"]
    return list(zip(names, counts, strict=True))


def _share_bar(count: int, total: int) -> str:
    share = count / max(1, total)
    eighths = round(share * _BAR * 8)
    bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return f"{100 * share:5.1f} %  {bar}".rstrip()


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of equal width, words to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        cells = [f"{row[0]:<{widths[0]}}"]
        for column, cell in enumerate(row[1:], 1):
            cells.append(f"{cell:>{widths[column]}}" if table[0][column] else cell)
        yield "   ".join(cells).rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# As a picture


def plot(counted: Statistics, path: Path) -> None:
    """Writes the statistics as a picture of four panels.

    Args:
        counted: To be drawn.
        path: Of the file; its ending (.png, .svg, .pdf) is the format.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ConfigError("expected matplotlib for --plot, found none; pip install '.[data]'") from None
    figure = Figure(figsize=(13, 9), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    figure.suptitle(
        f"{counted.source}: {counted.records:,} records, {counted.images:,} images, {counted.regions:,} regions, "
        f"{counted.turns:,} turns, {counted.average_words:.2f} words an answer"
    )
    panels = figure.subplots(2, 2)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    _plot_areas(panels[0, 0], counted)
    _plot_words(panels[0, 1], counted)
    _plot_tasks(panels[1, 0], counted)
    _plot_categories(panels[1, 1], counted)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected --plot to be a picture that can be written, got {str(path)!r}: {error}") from None


def _colour(index: int) -> tuple[float, ...]:
    return tuple(level / 255 for level in COLOURS[index])


def _plot_areas(panel: Any, counted: Statistics) -> None:
    panel.set(title="area of the regions", xlabel="share of the image", ylabel="regions")
    edges = [SHARE_EDGES[0] / SHARE_EDGES[1] * SHARE_EDGES[0], *SHARE_EDGES]
    panel.stairs(counted.shares, edges, fill=True, color=_colour(5))
    panel.set_xscale("log")
    panel.set_xlim(edges[0], 1.02)
    panel.set_xticks([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    panel.minorticks_off()
    panel.set_ylim(0, 1.05 * max(1, *counted.shares))
    _whole(panel.yaxis)


def _plot_words(panel: Any, counted: Statistics) -> None:
    panel.set(title="length of the answers", xlabel="words", ylabel="answers")
    longest = max(counted.words, default=1)
    width = max(1, math.ceil((longest + 1) / 60))
    bins = longest // width + 1
    below = [0] * bins
    for index, (name, task) in enumerate(sorted(counted.tasks.items())):
        heights = [0] * bins
        for words, count in task.words.items():
            heights[words // width] += count
        places = [(number + 0.5) * width - 0.5 for number in range(bins)]
        panel.bar(places, heights, 0.9 * width, bottom=below, color=_colour(index % len(COLOURS)), label=name)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    panel.set_ylim(0, 1.05 * max(1, *below))
    if len(counted.tasks) > 1:
        panel.legend(frameon=False)
    _whole(panel.yaxis)
    _whole(panel.xaxis)


def _plot_tasks(panel: Any, counted: Statistics) -> None:
    panel.set(title="turns of each task", xlabel="turns")
    tasks = sorted(counted.tasks.items(), key=lambda item: item[1].turns)
    names = [name for name, _ in tasks]
    guided = [task.guided for _, task in tasks]
    panel.barh(names, guided, color=_colour(2), label="with a guided prompt")
    free = [task.turns - task.guided for _, task in tasks]
    panel.barh(names, free, left=guided, color=_colour(1), label="without")
    panel.set_xlim(0, 1.05 * max(1, *(task.turns for _, task in tasks)))
    panel.margins(y=max(0.05, 0.5 - len(tasks) / 10))
    panel.legend(frameon=False, loc="lower right")
    _whole(panel.xaxis)


def _plot_categories(panel: Any, counted: Statistics) -> None:
    if not counted.categories:
        panel.set_axis_off()
        panel.text(0.5, 0.5, "the source names no categories", ha="center", va="center", transform=panel.transAxes)
        return
    common = counted.categories.most_common(MOST_CATEGORIES)[::-1]
    total = len(counted.categories)
    title = f"the {len(common)} most frequent of {total:,} categories" if total > len(common) else "categories"
    panel.set(title=title, xlabel="regions")
    panel.barh([name for name, _ in common], [count for _, count in common], color=_colour(0))
    _whole(panel.xaxis)


def _whole(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

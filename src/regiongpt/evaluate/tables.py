"""Figures of a run as rows of text, the paper's beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from regiongpt.evaluate.runs import TaskRun
from regiongpt.evaluate.tasks import task_class

NOTHING: Final = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure, all numbers times 100 as the paper prints them.

    Attributes:
        protocol: It was measured under.
        name: Of the figure.
        value: None where there was nothing to measure.
        interval: 95 % of the bootstrap resamples of the images.
        of: How many items it is about.
        paper: What the paper has, on its own data.
    """

    protocol: str
    name: str
    value: float | None
    interval: tuple[float, float] | None
    of: int
    paper: float | None

    def cells(self) -> list[str]:
        """Name, value, interval, items, paper."""
        return [self.name, number(self.value), span(self.interval), f"{self.of:,}", number(self.paper, digits=2)]


def rows(run: TaskRun) -> Iterator[Row]:
    """All figures of a task, protocol by protocol."""
    paper = task_class(run.name).paper
    for protocol, figures in run.result["protocols"].items():
        for name, figure in figures.items():
            printed = paper.get(protocol, {}).get(name)
            yield Row(
                protocol=protocol,
                name=name,
                value=times_100(figure["value"]),
                interval=interval_of(figure),
                of=figure["of"],
                paper=times_100(printed),
            )


def paper_source(run: TaskRun) -> str:
    """Where the paper's figures are, and what they were measured on."""
    return task_class(run.name).paper_source


def as_text(run: TaskRun) -> str:
    """A task's figures for a terminal."""
    found = list(rows(run))
    with_paper = any(row.paper is not None for row in found)
    lines = [run.name, "  " + "; ".join(f"{name}: {text}" for name, text in run.result["pinned"].items())]
    head = ["", "value", "95 %", "items"] + (["paper"] if with_paper else [])
    for protocol in dict.fromkeys(row.protocol for row in found):
        cells = [row.cells()[: len(head)] for row in found if row.protocol == protocol]
        lines += ["", f"  {protocol}", *(f"    {line}" for line in aligned([head, *cells]))]
    if with_paper:
        lines += ["", f"  paper: {paper_source(run)}; another data set is another test"]
    lines += [f"  note: {note}" for note in run.result["notes"]]
    return "\n".join(lines)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines, the first column left, the others right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for first, *others in cells:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return lines


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table in Markdown, the header first."""
    escaped = [[text.replace("|", "\\|") for text in row] for row in cells]
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def number(value: float | None, digits: int = 1) -> str:
    """A figure, already times 100."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def span(interval: tuple[float, float] | None) -> str:
    """An interval, already times 100."""
    return "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def times_100(value: float | None) -> float | None:
    """As the paper prints it."""
    return None if value is None else 100 * value


def interval_of(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of a figure as it was written, times 100."""
    ends = figure["interval"]
    return None if ends is None or None in ends else (100 * ends[0], 100 * ends[1])

"""Results of a run as rows of text, the paper's beside them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from regiongpt.evaluate.runs import TaskRun
from regiongpt.evaluate.tasks import task_class

NOTHING: Final = "–"


class Row(NamedTuple):
    """One figure, all numbers times 100 as the paper prints them.

    Attributes:
        protocol: It was measured under.
        name: Name of the figure.
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
            value, interval = times_100(figure)
            printed = paper.get(protocol, {}).get(name)
            yield Row(protocol, name, value, interval, figure["of"], None if printed is None else 100 * printed)


def tables(run: TaskRun) -> list[tuple[str, list[list[str]]]]:
    """A table of each protocol: its name, and rows of text with the header first."""
    found = list(rows(run))
    by_protocol = {protocol: [row for row in found if row.protocol == protocol] for protocol, *_ in found}
    head = ["figure", "value", "95 %", "items", "paper"]
    return [
        (
            protocol,
            [
                each[: 5 if any(row.paper is not None for row in own) else 4]
                for each in [head, *(row.cells() for row in own)]
            ],
        )
        for protocol, own in by_protocol.items()
    ]


def as_text(run: TaskRun) -> str:
    """A task's results for a terminal."""
    lines = [run.name, "  " + "; ".join(f"{name}: {text}" for name, text in run.result["pinned"].items())]
    for protocol, cells in tables(run):
        lines += ["", f"  {protocol}", *(f"    {line}" for line in aligned(cells))]
    if paper := task_class(run.name).paper_source:
        lines += ["", f"  paper: {paper}; another data set is another test"]
    return "\n".join([*lines, *(f"  note: {note}" for note in run.result["notes"])])


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    ]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table in Markdown, the header first."""
    escaped = [[text.replace("|", "\\|") for text in row] for row in cells]
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def number(value: float | None, digits: int = 1) -> str:
    """A value, already times 100."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def span(interval: tuple[float, float] | None) -> str:
    """An interval, already times 100."""
    return "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def times_100(figure: Mapping[str, Any]) -> tuple[float | None, tuple[float, float] | None]:
    """Value and interval of a figure as it was written, times 100."""
    value, ends = figure["value"], figure["interval"]
    interval = None if ends is None or None in ends else (100 * ends[0], 100 * ends[1])
    return None if value is None else 100 * value, interval

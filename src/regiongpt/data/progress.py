"""How far a long piece of work is: one line that keeps changing on a terminal, now and then a plain line elsewhere.

Work that knows its size passes its items through :func:`track`, wherever in the code it is; whoever runs it for a
person opens a :class:`Meter` around it. Where no meter is open nothing is shown, and nothing is lost by tracking.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Final, Self, TextIO, TypeVar

Item = TypeVar("Item")

TERMINAL_SECONDS: Final = 0.25
LOG_SECONDS: Final = 10.0
_OPEN_FILES: Final = Path("/proc/self/fd")


class Meter:
    """Shows the progress of what happens while it is open.

    The share that is done is that of the items passed through :func:`track`; where nothing is tracked, that of the
    bytes read so far of the files, which the operating system knows (Linux; elsewhere only the rate is shown).

    Args:
        name: Of the work, which begins the line.
        unit: Of what is counted, in the plural.
        files: That the work reads from beginning to end.
        stream: Where the line goes; standard error by default.
        seconds: Between two lines; by default a quarter second on a terminal and ten elsewhere.
    """

    def __init__(
        self,
        name: str,
        unit: str = "records",
        files: Sequence[Path] = (),
        stream: TextIO | None = None,
        seconds: float | None = None,
    ) -> None:
        self._name, self._unit = name, unit
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._seconds = seconds or (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        self._sizes = {str(path.resolve()): path.stat().st_size for path in files if path.is_file()}
        self._read: dict[str, int] = {}
        self._count, self._counted_from = 0, 0.0
        self._done, self._total, self._tracked_from = 0, 0, 0.0
        self._opened = 0.0
        self._stop = Event()
        self._thread = Thread(target=self._show, daemon=True)

    def __enter__(self) -> Self:
        self._opened = time.monotonic()
        self._outer = _METER.set(self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _METER.reset(self._outer)
        self._stop.set()
        self._thread.join()
        if self._terminal:
            self._write("\r\x1b[K")

    @property
    def seconds(self) -> float:
        """Since it was opened."""
        return time.monotonic() - self._opened

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Passes items on and counts them, for the rate."""
        self._counted_from = time.monotonic()
        for item in items:
            yield item
            self._count += 1

    def line(self) -> str:
        """What is shown at this moment."""
        parts = [self._name]
        if self._count:
            rate = self._count / max(1e-9, time.monotonic() - self._counted_from)
            parts.append(f"{self._count:,} {self._unit}, {rounded(rate)} a second")
        share, since = self._share()
        if 0 < share < 1:
            left = (time.monotonic() - since) * (1 - share) / share
            parts.append(f"{share:.0%} done, {clock(left)} left")
        elif not self._count:
            parts.append("reading")
        return f"{parts[0]}: {', '.join(parts[1:])}" if parts[1:] else parts[0]

    def _share(self) -> tuple[float, float]:
        """The share that is done, 0 where it is unknown, and when that part of the work began."""
        if self._total:
            return self._done / self._total, self._tracked_from
        if self._tracked_from:  # what was tracked is done: the files were read before it
            return 1.0, self._opened
        for path, position in _positions(self._sizes):
            self._read[path] = max(position, self._read.get(path, 0))
        # Most files are read one after the other: one that is no longer open has been read whole.
        return sum(self._read.values()) / max(1, sum(self._sizes.values())), self._opened

    def _show(self) -> None:
        while not self._stop.wait(self._seconds):
            self._write(f"\r\x1b[K{self.line()}" if self._terminal else f"{self.line()}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads it any more, which is no reason to end the work
            self._stop.set()


_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)


def track(items: Iterable[Item], total: int) -> Iterator[Item]:
    """Passes items on; an open meter shows what share of them is done and how long the rest will take.

    Args:
        items: In their order.
        total: How many there are.
    """
    meter = _METER.get()
    if meter is None:
        yield from items
        return
    meter._done, meter._total, meter._tracked_from = 0, total, time.monotonic()
    for item in items:
        yield item
        meter._done += 1
    meter._total = 0


def _positions(files: dict[str, int]) -> Iterator[tuple[str, int]]:
    """How far this process has read each of the files that it has open."""
    try:
        opened = list(_OPEN_FILES.iterdir()) if files else []
    except OSError:
        return
    for handle in opened:
        try:
            path = os.readlink(handle)
            if path in files:
                place = Path("/proc/self/fdinfo", handle.name).read_text().split(maxsplit=2)[1]
                yield path, min(int(place), files[path])
        except (OSError, ValueError, IndexError):  # closed in the meantime
            continue


def rounded(rate: float) -> str:
    """A rate in few digits."""
    return f"{rate:.1f}" if rate < 10 else f"{rate:,.0f}"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

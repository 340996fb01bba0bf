"""Progress on the command line, and quiet libraries."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Item = TypeVar("Item")

LOG_SECONDS = 30.0
"""Seconds between two lines of progress where standard error is no terminal."""

_SHOWN: ContextVar[bool] = ContextVar("progress", default=False)


@contextmanager
def progress_shown() -> Iterator[None]:
    """Within the block :func:`progress` is shown; elsewhere, as in library use, it is silent."""
    token = _SHOWN.set(True)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def progress(items: Iterable[Item], name: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """Yield items and show progress: count, rate, and time left if the total is known.

    A terminal gets a bar (tqdm); anything else, such as a log file, a line every 30 seconds.
    """
    if not _SHOWN.get():
        return items
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    seconds = 0.2 if terminal else LOG_SECONDS

    class Lines(tqdm):  # type: ignore[misc]
        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if terminal:
                super().display(msg, pos)
            elif msg is None and self.n:
                print(self, file=self.fp, flush=True)

    shown: Any = {"file": sys.stderr, "leave": False, "dynamic_ncols": True, "mininterval": seconds, "delay": seconds}
    return Lines(items, desc=name, unit=f" {unit}", total=total, maxinterval=max(seconds, 10.0), **shown)


def tell(text: str) -> None:
    """Write a line to standard error, above a progress bar."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def quiet_libraries(progress: bool = False) -> None:
    """Silence transformers, tokenizers and datasets, before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "transformers" in sys.modules:
            sys.modules["transformers"].utils.logging.disable_progress_bar()

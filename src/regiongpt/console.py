"""What the command line shows while it works: progress, and libraries kept quiet."""

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
    """Inside the block, :func:`progress` shows itself; elsewhere, as for users of the library, it stays silent."""
    token = _SHOWN.set(True)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def progress(items: Iterable[Item], name: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """Pass items on, showing how many are done, the rate, and the time left where the total is known.

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
    """Write a line on standard error, above the bar that may stand there."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def quiet_libraries(progress: bool = False) -> None:
    """Keep transformers, tokenizers and datasets from talking over the output, before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "transformers" in sys.modules:
            sys.modules["transformers"].utils.logging.disable_progress_bar()

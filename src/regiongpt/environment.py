"""What a run meets: its processes (``torchrun``, ``accelerate launch``), the machine, and who watches its progress.

Nothing here imports PyTorch before it is needed; a single process is not connected to anything.
"""

import atexit
import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from regiongpt.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PATIENCE: Final = timedelta(days=7)
"""How long processes wait for the slowest; PyTorch's default is too short for unequal shares of work."""


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: activations are otherwise mapped anew for every layer."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def launched() -> int:
    """How many processes were started together, connected or not."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among the processes of a run, connected or not; ``local`` is its number on its machine."""

    rank: int = field(default_factory=lambda: _torch().get_rank() if _connected() else 0)
    count: int = field(default_factory=lambda: _torch().get_world_size() if _connected() else 1)
    local: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK") or 0))

    @property
    def is_first(self) -> bool:
        """Whether this process reports and writes shared files."""
        return self.rank == 0

    def wait(self) -> None:
        """Barrier: return when all processes are here."""
        if self.count > 1:
            _torch().barrier()

    def gathered(self, mine: T) -> list[T]:
        """Each process's picklable value, by rank."""
        if self.count == 1:
            return [mine]
        everyones: list[Any] = [None] * self.count
        _torch().all_gather_object(everyones, mine)
        return cast(list[T], everyones)

    def from_first(self, find: Callable[[], T]) -> T:
        """The first process's result, or exception, in every process."""
        if self.count == 1:
            return find()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = find()
            except Exception as error:
                told[1] = error
        _torch().broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return cast(T, told[0])

    def summed(self, values: "Tensor") -> "Tensor":
        """The sum over all processes, in place."""
        if self.count > 1:
            _torch().all_reduce(values)
        return values


def connect(on_cpu: bool = False) -> Processes:
    """Connect this process to those started with it, each with a GPU of its own unless ``on_cpu``; or ConfigError."""
    if launched() > 1 and not _connected():
        import torch

        gpu = torch.cuda.is_available() and not on_cpu
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
        try:
            _torch().init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
        except (ValueError, RuntimeError) as error:
            told = f"{launched()} processes (WORLD_SIZE) cannot connect ({str(error).splitlines()[0][:200]})"
            raise ConfigError(f"{told}; start them with torchrun or `accelerate launch`") from None
        atexit.register(_disconnect)  # a process that ends connected may be taken for one that failed
    return Processes()


def _disconnect() -> None:
    if _connected():
        _torch().destroy_process_group()
        # A thread of gloo's lets go of the last message's tensor after the waiting thread has continued, and
        # needs the interpreter's lock for that; where there is no interpreter any more, it aborts the process.
        time.sleep(0.1)


def _torch() -> Any:
    import torch.distributed

    return torch.distributed


def _connected() -> bool:
    return "torch" in sys.modules and bool(_torch().is_available() and _torch().is_initialized())


# -- versions and the machine ------------------------------------------------------------------------------------------

_PACKAGES: Final = "regiongpt torch transformers tokenizers safetensors accelerate numpy pillow pycocotools shapely"


@cache
def versions() -> dict[str, str]:
    """The versions of packages that results may depend on."""
    found = dict.fromkeys(_PACKAGES.split(), "not installed")
    for name in found:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def commit() -> dict[str, Any] | None:
    """``hash`` of the checkout's commit, and the sources ``changed`` since; None where the package is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():  # installed: a repository around it would be someone else's
        return None

    def git(*words: str) -> list[str]:
        run = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True)
        return run.stdout.splitlines()

    try:
        (head,), changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "src")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"hash": head, "changed": [line[3:] for line in changed]}


def machine() -> dict[str, Any]:
    """Processor, cores and accelerator."""
    import torch

    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": cores, "gpu": gpu, "system": f"{platform.system()} {platform.machine()}"}


# -- progress ----------------------------------------------------------------------------------------------------------

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


def progress(items: Iterable[T], name: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Yield items and show progress: count, rate, and time left if the total is known.

    A terminal gets a bar (tqdm); anything else, such as a log file, a line every 30 seconds.
    """
    if not _SHOWN.get():
        return items
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    seconds = 0.2 if terminal else LOG_SECONDS

    class Lines(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread for each bar: every item looks at the clock itself

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if terminal:
                super().display(msg, pos)
            elif msg is None and self.n:
                print(self, file=self.fp, flush=True)

    shown: Any = {"file": sys.stderr, "leave": False, "dynamic_ncols": True, "mininterval": seconds, "delay": seconds}
    return Lines(items, desc=name, unit=f" {unit}", total=total, miniters=1, **shown)


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


@contextmanager
def light_imports() -> Iterator[None]:
    """Import transformers for a process that answers on one device, in a tenth less time.

    It goes without what it treats as optional: scipy, for detection losses, and accelerate, for several devices.
    """
    # Importing makes a million objects that stay: looking for garbage among them takes a quarter of a cold start.
    gc.disable()
    from transformers import utils

    own = {name: getattr(utils, name) for name in ("is_scipy_available", "is_accelerate_available")}
    try:
        for name in own:
            setattr(utils, name, lambda *_, **__: False)
        yield
    finally:
        for name, check in own.items():
            setattr(utils, name, check)
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()

"""Checkpoints of a stage: whole or not there, the newest few and the best, and nothing damaged is gone on from.

A checkpoint is a folder ``checkpoint-N``, N the optimiser steps done. It is written beside its place, flushed to the
disk and renamed, and holds a list of its files with their sizes and hashes; a kill, a full disk or a bad sector is
therefore noticed, and the checkpoint before is taken.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.train.processes import Processes

log = logging.getLogger(__name__)

LIST = "files.json"
"""The list of a checkpoint's files, written last."""

_PREFIX, _UNFINISHED, _ASIDE = "checkpoint-", ".unfinished-", "aside-"
_CHUNK = 1 << 22


class Checkpoints:
    """The checkpoints of one stage in its folder.

    Args:
        folder: Of the stage; made where it is not there.
        keep: How many of the newest are kept, at least 1, besides the best.
        processes: That write together.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = folder, keep, processes

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after so many optimiser steps."""
        return self.folder / f"{_PREFIX}{step}"

    def newest(self) -> Path | None:
        """The newest checkpoint that is as it was written; None where there is none.

        What a kill has left unfinished is removed. A damaged checkpoint is renamed, and the log tells.
        """

        def search() -> Path | None:
            for leftover in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover)
            for checkpoint in reversed(_numbered(self.folder)):
                fault = damage(checkpoint)
                if fault is None:
                    return checkpoint
                aside = _put_aside(checkpoint)
                log.warning("%s: %s; it is now %s, and the one before is taken", checkpoint, fault, aside.name)
            return None

        return self.processes.from_first(search)

    def chosen(self, path: Path) -> Path:
        """A checkpoint that a person has chosen, after those of this stage that are newer have been put aside.

        Raises:
            CheckpointError: It is not a whole checkpoint.
        """

        def check() -> Path | str:
            fault = damage(path) if path.is_dir() else "there is no such folder"
            if fault is None and not path.name.removeprefix(_PREFIX).isdigit():
                fault = "that is no checkpoint's name"
            if fault is not None:
                return f"{path}: expected the folder of a checkpoint, such as stage1/{_PREFIX}200; {fault}"
            for newer in _numbered(self.folder):
                if step_of(newer) > step_of(path):
                    log.info("%s is newer than %s and is now %s", newer, path, _put_aside(newer).name)
            return path

        found = self.processes.from_first(check)
        if isinstance(found, str):
            raise CheckpointError(found)
        return found

    def write(self, step: int, fill: Callable[[Path], None], best: int | None = None) -> bool:
        """Writes a checkpoint whole, then removes those that are not kept.

        Args:
            step: Optimiser steps done.
            fill: Writes this process's files into the given folder. All processes call it.
            best: Step of the best checkpoint so far, which is kept.

        Returns:
            Whether it was written. Where the disk is full or fails, nothing is left of it, the log tells, and the
            checkpoints before are untouched.
        """
        temporary = self.folder / f"{_UNFINISHED}{step}"
        first = self.processes.is_first

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def finish() -> None:
            _seal(temporary)
            shutil.rmtree(self.path(step), ignore_errors=True)
            temporary.rename(self.path(step))
            _sync(self.folder)

        for part in (begin if first else None, lambda: fill(temporary), finish if first else None):
            fault = _fault_of(part) if part else ""
            fault = next((each for each in self.processes.gathered(fault) if each), "")
            if fault:
                if first:
                    shutil.rmtree(temporary, ignore_errors=True)
                    whole = _numbered(self.folder)
                    log.warning(
                        "%s could not be written (%s); the run goes on, and the newest checkpoint is %s",
                        self.path(step),
                        fault,
                        whole[-1] if whole else "none",
                    )
                return False
        if first:
            self._remove_old(best)
        return True

    def _remove_old(self, best: int | None) -> None:
        for checkpoint in _numbered(self.folder)[: -self.keep]:
            if step_of(checkpoint) != best:
                # A kill in the middle of this must not leave what looks like a checkpoint.
                gone = self.folder / f"{_UNFINISHED}{step_of(checkpoint)}"
                checkpoint.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """Optimiser steps that were done when it was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where they are as they were written."""
    try:
        listed = json.loads((checkpoint / LIST).read_text(encoding="utf-8"))
        expected = {name: (size, digest) for name, (size, digest) in listed.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return f"it was not written to its end, or its {LIST} is damaged"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        try:
            if (found := path.stat().st_size) != size:
                return f"{name} is damaged: expected {size} bytes, got {found}"
            if _digest(path) != digest:
                return f"{name} is damaged: its content is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def set_aside(folder: Path) -> Path | None:
    """Renames a stage's folder, so that the stage begins anew and nothing of it is lost; None where there is none.

    Raises:
        ConfigError: It cannot be renamed.
    """
    if not folder.exists():
        return None
    try:
        return _put_aside(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: expected to rename it, to begin anew; {error.strerror}") from error


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def _put_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{_ASIDE}{number}-{path.name}")).exists():
        number += 1
    return path.rename(aside)


def _fault_of(part: Callable[[], None]) -> str:
    """Why a piece of writing failed; empty where it did not."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        part()
    except OSError as error:
        return error.strerror or str(error)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        # Writers of archives report a failed write as a RuntimeError.
        if all(isinstance(cause, (OSError, RuntimeError)) for cause in causes):
            return "; ".join(sorted({" ".join(str(cause).split())[:200] for cause in causes}))
        raise
    return ""


def _seal(folder: Path) -> None:
    """Flushes all files to the disk, and lists them with their sizes and hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {}
    for path in files:
        _sync(path)
        listed[path.relative_to(folder).as_posix()] = (path.stat().st_size, _digest(path))
    (folder / LIST).write_text(json.dumps(listed, indent=1), encoding="utf-8")
    _sync(folder / LIST)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    running = sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            running.update(chunk)
    return running.hexdigest()

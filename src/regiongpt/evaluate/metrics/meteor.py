"""METEOR by its reference program, METEOR 1.5 in Java, run so that nothing hangs and nothing breaks in silence.

The program is asked for the alignment of each caption alone. Its scores follow from those counts by the formula of
METEOR 1.5, here, which also serves resampling: the score of a set is computed from summed counts, and is no mean.
"""

import os
import queue
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.bootstrap import Floats, ratio

COUNTS: Final = 23
"""Numbers the program tells of a caption: see :func:`meteor_scores`."""
PATIENCE: Final = 300.0
"""Seconds of its own work without any line after which the program is given up; its tables take about ten."""
_IDLE: Final = 0.01
"""Share of one core below which the program stands still, and is not merely kept waiting by a busy machine."""
_PROMPT: Final = 0.1
"""Share of the patience within which a line is taken as it comes, and nobody asks what the program does."""
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75
_STAGES = np.array([1.0, 0.6, 0.8, 0.6])  # exact words, stems, synonyms, paraphrases
_SEPARATOR = "|||"


def meteor_scores(counts: Floats) -> Floats:
    """METEOR of captions, or of whole sets by their summed counts.

    Args:
        counts: (N, 23), for a set the sum of its :func:`meteor_addends`. Words of the caption, of the reference;
            function words of each; for each of the four stages the content words matched of the caption, of the
            reference, and the function words likewise; chunks; words matched of the caption, of the reference.

    Returns:
        (N,) in [0, 1]; 0 where nothing matches.
    """
    counts = np.asarray(counts, np.float64).reshape(-1, COUNTS)
    lengths, functions, chunks, matched = counts[:, :2], counts[:, 2:4], counts[:, 20], counts[:, 21:]
    stages = counts[:, 4:20].reshape(-1, 4, 4)
    content, function = stages[:, :, :2], stages[:, :, 2:]
    found = np.einsum("s,nsk->nk", _STAGES, _DELTA * content + (1 - _DELTA) * function)
    size = _DELTA * (lengths - functions) + (1 - _DELTA) * functions
    precision, recall = np.nan_to_num(ratio(found, size)).T
    mean = ratio(precision * recall, (1 - _ALPHA) * recall + _ALPHA * precision)
    fragments = ratio(chunks, matched.mean(axis=1))
    penalty = _GAMMA * np.where(_is_whole(counts), 0.0, fragments) ** _BETA
    result: Floats = np.nan_to_num(mean * (1 - penalty))
    return result


def meteor_addends(counts: Floats) -> Floats:
    """What each caption's counts (N, 23) add to those of a set: a caption matched whole adds no chunk."""
    added = np.array(counts, np.float64)
    added[_is_whole(added), 20] = 0.0
    return added


def _is_whole(counts: Floats) -> NDArray[np.bool_]:
    """Whether caption and reference match word by word, in one piece."""
    matched = counts[:, 4:20].reshape(-1, 4, 2, 2).sum(axis=(1, 2))
    whole: NDArray[np.bool_] = (matched == counts[:, :2]).all(axis=1) & (counts[:, 20] == 1)
    return whole


def meteor_counts(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    java: str | None = None,
    jar: Path | None = None,
    patience: float = PATIENCE,
) -> Floats:
    """What the program counts for each caption against its references, of which it takes the best.

    Args:
        captions: The words of n captions, as :func:`regiongpt.evaluate.metrics.ptb.scored_words` gives them.
        references: Of each caption, the words of at least one reference.
        java: The Java program; default: ``$JAVA_HOME/bin/java``, or the one on the path.
        jar: ``meteor-1.5.jar`` with its ``data/`` beside it; default: that of the package pycocoevalcap.
        patience: Seconds of its own work without a line after which the program is given up, and of standing still.

    Returns:
        (n, 23), see :func:`meteor_scores`.

    Raises:
        ConfigError: Java or the program is missing, does not start, fails, or gives no answer.
        DataError: A caption has no references.
    """
    for number, those in enumerate(references):
        if not those:
            raise DataError(f"references[{number}]: expected at least one reference, got none")
    program = find_java(java)
    jar = find_jar() if jar is None else Path(jar)
    if not jar.is_file():
        raise ConfigError(f"expected METEOR at {jar}, found no file; give the path of meteor-1.5.jar")
    lines = [_line(caption, those) for caption, those in zip(captions, references, strict=True)]
    if not lines:
        return np.zeros((0, COUNTS))
    command = [program, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    return _Conversation(command, jar.parent, patience).counts(lines)


def find_java(java: str | None = None) -> str:
    """The Java program.

    Raises:
        ConfigError: There is none.
    """
    home = os.environ.get("JAVA_HOME")
    for candidate in (java,) if java else (f"{home}/bin/java" if home else None, "java"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise ConfigError(
        f"expected Java to compute METEOR or SPICE, found {java or 'none on the path'}; install a Java runtime, such "
        "as Debian's default-jre-headless, or leave these two metrics out"
    )


def find_jar() -> Path:
    """``meteor-1.5.jar`` of the installed pycocoevalcap.

    Raises:
        ConfigError: It is not installed.
    """
    found = find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "expected pycocoevalcap, which scores captions; install it with: pip install regiongpt[evaluate]"
        )
    return Path(next(iter(found.submodule_search_locations))) / "meteor" / "meteor-1.5.jar"


def _line(caption: str, references: Sequence[str]) -> str:
    parts = [*references, caption]
    # A line break would begin a command of its own, a separator another reference: both would shift every later answer.
    words = (" ".join(part.replace(_SEPARATOR, "").split()) for part in parts)
    return f"SCORE {_SEPARATOR} {f' {_SEPARATOR} '.join(words)}\n"


class _Conversation:
    """One run of the program. Three threads keep its pipes moving, for a full pipe stops whoever writes to it."""

    def __init__(self, command: list[str], folder: Path, patience: float) -> None:
        self._patience = patience
        self._said: queue.Queue[str | None] = queue.Queue()
        self._complaints: deque[str] = deque(maxlen=20)
        try:
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise ConfigError(f"expected Java to start as {command[0]}, got: {error.strerror or error}") from error

    def counts(self, lines: Sequence[str]) -> Floats:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._hearing = threading.Thread(target=self._hear, args=(process.stderr,), daemon=True)
        threads = [
            threading.Thread(target=self._write, args=(process.stdin, lines), daemon=True),
            threading.Thread(target=self._read, args=(process.stdout,), daemon=True),
            self._hearing,
        ]
        for thread in threads:
            thread.start()
        try:
            return np.array([self._answer(number, len(lines)) for number in range(len(lines))])
        finally:
            process.kill()
            process.wait()
            for thread in threads:
                thread.join(5.0)
            for pipe in (process.stdin, process.stdout, process.stderr):
                try:
                    pipe.close()
                except OSError:  # what was left to write has no reader any more
                    continue

    def _write(self, pipe: IO[bytes], lines: Sequence[str]) -> None:
        try:
            for line in lines:
                pipe.write(line.encode("utf-8", "replace"))
            pipe.close()
        except (OSError, ValueError):  # the program has gone; whoever waits for its answers is told so
            return

    def _read(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._said.put(line.decode("utf-8", "replace"))
        self._said.put(None)

    def _hear(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._complaints.append(line.decode("utf-8", "replace").strip())

    def _next(self, number: int, of: int) -> str | None:
        """The next line, however long a busy machine takes for it; None at the end."""
        early = _PROMPT * self._patience
        try:
            return self._said.get(timeout=early)
        except queue.Empty:
            first = before = self._worked()
        wait = self._patience - early
        while True:
            try:
                return self._said.get(timeout=wait)
            except queue.Empty:
                now = self._worked()
            if now - first >= self._patience or now - before < _IDLE * self._patience:
                raise ConfigError(
                    f"METEOR: expected an answer for caption {number + 1} of {of}, got none in {self._patience:g} s; "
                    "the program was ended; is the machine out of memory?"
                )
            before, wait = now, self._patience

    def _worked(self) -> float:
        """Seconds of processor time that the program has had."""
        import psutil

        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def _answer(self, number: int, of: int) -> list[float]:
        line = self._next(number, of)
        if line is None:
            code = self._process.wait()
            self._hearing.join(5.0)  # what it said last
            words = "; ".join(filter(None, self._complaints)) or "it said nothing"
            raise ConfigError(
                f"METEOR: expected an answer for caption {number + 1} of {of}, but Java ended with code {code}: {words}"
            )
        try:
            values = [float(value) for value in line.split()]
        except ValueError:
            values = []
        if len(values) != COUNTS or not np.isfinite(values).all():
            raise ConfigError(
                f"METEOR: expected {COUNTS} numbers for caption {number + 1} of {of}, got {line.strip()[:80]!r}; "
                "is the jar METEOR 1.5?"
            )
        return values

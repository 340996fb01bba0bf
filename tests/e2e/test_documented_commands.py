"""What the documentation shows is what happens: its commands are run here, its links and its file tree followed.

Every fenced block of bash, console or python in README.md and docs/ is run, in order, in one folder a document that
holds photo.jpg, mask.png, mask.json and the recipes; a block right under ``<!-- not run: why -->`` is not. A console
block shows commands after ``$`` and, below each, exactly what it prints, unless ``<!-- output not compared: why -->``
stands above it.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import skimage.data
from PIL import Image
from pycocotools import mask as coco_mask

from regiongpt import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = ("bash", "console", "python")
SHOWN = ("json", "text", "toml")
NOTE = re.compile(r"<!-- (not run|output not compared): (\S.*) -->")
OPERATORS = frozenset("();<>|&")


class Block(NamedTuple):
    """A fenced block, and what the comment on the line above it says of it."""

    place: str
    line: int
    language: str
    body: str
    note: str


def blocks(path: Path) -> Iterator[Block]:
    lines = path.read_text(encoding="utf-8").splitlines()
    start = None
    for index, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = index
            continue
        above = NOTE.fullmatch(lines[start - 1]) if start else None
        place, language = f"{path.relative_to(ROOT)}:{start + 1}", lines[start].strip("` ")
        body = "".join(f"{each}\n" for each in lines[start + 1 : index])
        yield Block(place, start + 1, language, body, above[1] if above else "")
        start = None
    assert start is None, f"{path}:{start}: a fence that is never closed"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the documents speak of: a photograph, two masks of its size, and the recipes."""
    folder = tmp_path_factory.mktemp("photographs")
    photo = Image.fromarray(skimage.data.chelsea())
    photo.save(folder / "photo.jpg", quality=95)
    rows, columns = np.mgrid[: photo.height, : photo.width]
    mask = ((columns - 240) / 110) ** 2 + ((rows - 150) / 90) ** 2 < 1
    Image.fromarray((mask * 255).astype(np.uint8)).save(folder / "mask.png")
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    (folder / "mask.json").write_text(json.dumps({"size": rle["size"], "counts": rle["counts"].decode()}))
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_does_what_it_says(path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photographs)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.language not in RUNNABLE or block.note == "not run":
            continue
        if block.language == "python":  # in the names that earlier snippets left, with line numbers that lead to it
            code = compile("\n" * block.line + block.body, str(path), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, namespace)
            continue
        for command, shown in commands(block):
            ended, printed = run_command(command)
            expected = 2 if shown.startswith("regiongpt: error:") else 0
            assert ended == expected, f"{block.place}: {command!r} ended with {ended}:\n{printed}"
            if block.language == "console" and not block.note:
                assert printed.strip() == shown.strip(), f"{block.place}: {command!r} prints something else"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_can_be_run_or_says_why_not_and_links_lead_somewhere(path: Path) -> None:
    found = list(blocks(path))
    for block in found:
        assert block.language in RUNNABLE + SHOWN, f"{block.place}: name one of {RUNNABLE + SHOWN} behind the fence"
        assert not block.note or block.language in RUNNABLE, f"{block.place}: a {block.language} block needs no note"
    text = path.read_text(encoding="utf-8")
    notes = len(re.findall(r"<!--\s*(?:not run|output not compared)", text))
    assert notes == sum(bool(block.note) for block in found), f"{path}: a note gives no reason, or no block follows it"

    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target} is not there"


def test_the_file_tree_is_the_file_tree() -> None:
    tree = next(block for block in blocks(ROOT / "docs" / "architecture.md") if block.body.startswith("src/regiongpt/"))
    parents: list[str] = []
    listed = set()
    for line in tree.body.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        listed.add("".join(parents))
    for path in listed:
        assert (ROOT / path).exists(), f"docs/architecture.md: {path} is in the file tree alone"
    for path in (ROOT / "src" / "regiongpt").rglob("*.py"):
        name = str(path.relative_to(ROOT))
        assert name in listed or path.name == "__init__.py", f"docs/architecture.md: its file tree lacks {name}"


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Each command of a block, with what the block shows as its output."""
    body = block.body.replace("\\\n", " ")
    if block.language == "bash":
        whole = [line for line in body.splitlines() if line.strip() and not line.startswith("#")]
        # A line of our own program runs in this process; anything else is a script for bash as it stands.
        yield from ((line, "") for line in whole) if all(map(arguments, whole)) else [(body, "")]
        return
    for entry in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        command, _, shown = entry.partition("\n")
        yield command, shown


def arguments(command: str) -> list[str] | None:
    """The words of a plain call of ``regiongpt``; None for whatever needs a shell."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    plain = words[:1] == ["regiongpt"] and not any(set(word) <= OPERATORS for word in words)
    return words[1:] if plain else None


def run_command(command: str) -> tuple[int, str]:
    """The exit code and everything printed."""
    words = arguments(command)
    if words is None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        given: Any = {"env": {**os.environ, "PATH": path}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], **given, text=True, timeout=300, check=False)
        return done.returncode, done.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = cli.main(words)
        except SystemExit as leaving:  # argparse's way out of --help
            code = int(leaving.code or 0)
    return code, printed.getvalue()

"""Java for the tests that hold our figures against the reference programs; they skip where there is none."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest


def need_java() -> str:
    """The Java program."""
    found = shutil.which("java")
    if found is None:
        pytest.skip("no Java here; install a runtime such as Debian's default-jre-headless")
    return found


def need_pycocoevalcap(*parts: str) -> Path:
    """A file of the package pycocoevalcap."""
    found = find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no pycocoevalcap here; pip install regiongpt[evaluate]")
    return Path(next(iter(found.submodule_search_locations)), *parts)

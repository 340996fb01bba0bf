"""Settings: TOML and options in, one-line mistakes out. Progress: silent for users of the library."""

import argparse
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import model_validator

from regiongpt import environment
from regiongpt.errors import ConfigError
from regiongpt.settings import Settings, add_options, read_options


class Inner(Settings):
    rate: float = 1.0
    steps: tuple[int, ...] = ()
    kind: Literal["a", "b"] = "a"

    @model_validator(mode="after")
    def _check(self) -> "Inner":
        if self.kind == "b" and not self.steps:
            raise ValueError("kind b needs steps")
        return self


class Outer(Settings):
    out: Path = Path("runs")
    """Folder of the run, 100 % yours."""
    count: int = 2
    on: bool = False
    inner: Inner = Inner()

    @model_validator(mode="after")
    def _check(self) -> "Outer":
        if self.count == 13:
            raise ValueError("count: 13 is unlucky; give another")
        return self


def load(tmp_path: Path, text: str, *words: str) -> Outer:
    file = tmp_path / "a.toml"
    file.write_text(text, encoding="utf-8")
    return Outer.load(file, words)


def test_reads_toml_extended_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("count = 3\n[inner]\nrate = 2\nsteps = [1]\n")
    found = load(
        tmp_path, 'extends = ["base.toml"]\n[inner]\nsteps = [4, 5]\n', "--inner.kind=b", "--on", "true", "--out", "x"
    )
    assert found == Outer(count=3, on=True, out=Path("x"), inner=Inner(rate=2.0, steps=(4, 5), kind="b"))
    assert load(tmp_path, "", "--inner.steps", "7,8").inner.steps == (7, 8)


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("cuont = 1", (), "unknown setting 'cuont'; did you mean 'count'?"),
        ("[inner]\nrat = 1", (), "unknown setting 'inner.rat'; did you mean 'inner.rate'?"),
        ("count = true", (), "count: give a number, got True"),
        ("[inner]\nkind = 'b'", (), "inner: kind b needs steps"),
        ("count = 13", (), "count: 13 is unlucky; give another"),
        ('out = " "', (), "out: give a path, got"),
        ("[inner]\nkind = 'c'", (), "inner.kind: input should be 'a' or 'b', got 'c'"),
        ("", ("--count",), "--count: give a value after it"),
        ("", ("count", "3"), "count: not an override"),
        ("count = 1", ("--count.deep", "3"), "--count.deep: 'count' is a value, not a table"),
        ('extends = "a.toml"', (), "extends: give a list of files"),
        ('extends = ["a.toml"]', (), "extends itself"),
        ('extends = ["none.toml"]', (), "none.toml: not a readable TOML file"),
        ("a = " + "[" * 3000, (), "not a readable TOML file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def typed(*words: str) -> Any:
    parser = argparse.ArgumentParser()
    add_options(parser, Outer)
    return read_options(Outer, parser.parse_args(words))


def test_fields_are_options() -> None:
    assert typed("--out", "y", "--count", "5", "--on") == Outer(out=Path("y"), count=5, on=True)
    with pytest.raises(ConfigError, match=r"--count: input should be a valid integer, .* got 'x'"):
        typed("--count", "x")
    parser = argparse.ArgumentParser()
    add_options(parser, Outer)
    assert "100 % yours. (default: runs)" in parser.format_help()


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_is_silent_unless_asked_for_and_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(environment.progress([1, 2], "work", "items")) == [1, 2]
    with environment.progress_shown():
        assert list(environment.progress(range(3), "work", "items")) == [0, 1, 2]
        assert capsys.readouterr().err == ""  # done before the first half minute
        monkeypatch.setattr(environment, "LOG_SECONDS", 0.0)
        assert list(environment.progress(iter("abc"), "work", "items", total=3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("work:  67%") and "2/3" in line and "items/s" in line for line in lines)
    assert not any("\r" in line for line in lines)

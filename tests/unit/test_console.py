"""Progress: a bar on a terminal, a line every half minute elsewhere, nothing for users of the library."""

import pytest

from regiongpt import console


def test_is_silent_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.progress([1, 2], "work", "items")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_writes_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.progress_shown():
        assert list(console.progress(range(3), "work", "items")) == [0, 1, 2]
        assert capsys.readouterr().err == ""  # done before the first half minute
        monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
        assert list(console.progress(iter("abc"), "work", "items", total=3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("work:  67%") and "2/3" in line and "items/s" in line for line in lines)
    assert not any("\r" in line for line in lines)

"""Files: whole or not there; mistakes in one line; one writer at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.storage import (
    check_writable,
    locked,
    new_folder,
    read_json,
    sha256,
    write_file,
    write_json,
    writing,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, "ä"]})

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"a.json: cannot be written: No space left on device; free some space"):
        write_file(file, fail)
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": [1, "ä"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(DataError, match="No such file or directory"):
        write_file(tmp_path / "none" / "a.json", "x")
    for folder in (tmp_path, ".", "/"):
        with pytest.raises(DataError, match="a folder; give the path of a file"):
            write_file(folder, "x")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, float("nan"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "Expecting"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "Exceeds the limit"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json: not a readable JSON file: ") as caught:
        read_json(file, CheckpointError)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_whatever_library_wrote(tmp_path: Path) -> None:
    inner = DataError("b: cannot be written: (os error 28)")
    for error, told in (
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"a: cannot be written: I/O error"),
        (inner, "^b: cannot be written"),
    ):
        with pytest.raises(DataError, match=told), writing(tmp_path / "a"):
            raise error
    with pytest.raises(KeyError), writing(tmp_path / "a"):
        raise KeyError("a mistake of ours")


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:

    def half() -> None:
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with new_folder(tmp_path / "a") as folder:
        write_file(folder / "x", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sha256(tmp_path / "a" / "x") == "5d5766cf2d78701614200418ee1450690d9af12c84d52545e4802f001ad53099"


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    code = f"from regiongpt.storage import check_writable, locked\nwith locked({str(tmp_path)!r}): pass"
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "is writing there; wait for its end" in other.stderr
    assert "process " in other.stderr
    with locked(tmp_path), pytest.raises(ConfigError), locked(tmp_path):
        pass
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, said in (
        (tmp_path / "none" / "a.json", "no folder"),
        (tmp_path / "file" / "a.json", "no folder"),
        (tmp_path, "name a file"),
        (Path("/proc/a.json"), "not writable"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_writable(place)
    check_writable(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

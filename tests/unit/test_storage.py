"""Files: whole or not there; mistakes in one line; one writer at a time. Finished work is kept when add returns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.storage import (
    Store,
    check_writable,
    locked,
    new_folder,
    read_json,
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


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_a_json_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json: not a readable JSON file: .+") as caught:
        read_json(tmp_path / "a.json", CheckpointError)
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
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "x"]


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    code = f"from regiongpt.storage import check_writable, locked\nwith locked({str(tmp_path)!r}): pass"
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "is writing there" in other.stderr
    assert "process " in other.stderr
    with locked(tmp_path), pytest.raises(ConfigError), locked(tmp_path):
        pass
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("none/a.json", "no folder"),
        ("file/a.json", "no folder"),
        (".", "name a file"),
        ("/proc/a.json", "not writable"),
    ],
)
def test_where_nothing_can_be_written_is_known_before(place: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=said):
        check_writable(tmp_path / place)
    check_writable(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- finished work by key ----------------------------------------------------------------------------------------------

WRITER = """
import sys
from regiongpt.storage import Store
with Store(sys.argv[1]) as store:
    number = 0
    while True:
        store.add({str(number): {"text": "x" * 5000}})
        print(number, flush=True)
        number += 1
"""


def test_what_was_added_is_there_for_the_next_process_and_the_last_value_of_a_key_counts(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").keys() == set()
    (tmp_path / "00002.sqlite").touch()  # a kill as it was made
    with Store(tmp_path, 0) as first, Store(tmp_path, 1) as second:
        first.add({"a": {"text": "Käse ☕ \ud800"}, "b": 1, **{str(k): {"cost": 0.5} for k in range(3000)}})
        second.add({"c": [0.1, None]})
        first.add({"b": 2, "1": {"cost": 0.25}})
        assert second.keys() == {"a", "b", "c", *map(str, range(3000))}
    again = Store(tmp_path, 7)
    assert again.get(["a", "b", "c", "d"]) == {"a": {"text": "Käse ☕ \ud800"}, "b": 2, "c": [0.1, None]}
    found = again.get(list(map(str, range(2000))))
    assert (len(found), found["1"], found["2"]) == (2000, {"cost": 0.25}, {"cost": 0.5})
    assert again.total("cost") == 1500.25  # with what was replaced


def test_a_kill_loses_nothing_that_add_has_returned_from(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(40)]
    process.kill()
    told += process.stdout.read().split("\n")[:-1]
    process.wait()
    kept = Store(tmp_path).keys()
    assert {str(int(number)) for number in told} <= kept
    with Store(tmp_path) as store:
        store.add({"after": 1})
    assert Store(tmp_path).keys() == kept | {"after"}


def test_damage_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add({str(k): "x" * 1000 for k in range(100)})
    file = tmp_path / "00000.sqlite"
    whole = file.read_bytes()
    file.write_bytes(whole[:20_000] + b"\xff" * 30_000 + whole[50_000:])
    with pytest.raises(DataError, match=r"00000\.sqlite: .*damaged; delete it"):
        Store(tmp_path).get([str(k) for k in range(100)])
    file.write_bytes(b"no data base at all " * 100)
    with pytest.raises(DataError, match="damaged"), Store(tmp_path):
        pass
    with pytest.raises(DataError, match="cannot be written"), Store(file):
        pass


def test_a_full_disk_is_one_line_and_nothing_counts_as_kept(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add({"a": 1})
        assert store._open is not None
        pages = store._open.execute("PRAGMA page_count").fetchone()[0]
        store._open.execute(f"PRAGMA max_page_count={pages}")  # as a disk that is full
        with pytest.raises(DataError, match="is full; free some space"):
            store.add({"b": "x" * 100_000, "c": 1})
        assert store.keys() == {"a"}

"""Finished work: kept when add returns, read by every process, damage and full disks in one line."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from regiongpt import DataError
from regiongpt.storage import digest
from regiongpt.store import Store

WRITER = """
import sys
from regiongpt.store import Store
with Store(sys.argv[1]) as store:
    number = 0
    while True:
        store.add({str(number): {"text": "x" * 5000}})
        print(number, flush=True)
        number += 1
"""


def test_what_was_added_is_there_for_the_next_process_and_the_last_value_of_a_key_counts(tmp_path: Path) -> None:
    with Store(tmp_path / "a", 0) as first, Store(tmp_path / "a", 1) as second:
        first.add({"a": {"text": "Käse ☕ \ud800"}, "b": 1})
        second.add({"c": [0.1, None]})
        first.add({"b": 2})
        assert second.keys() == {"a", "b", "c"}
    again = Store(tmp_path / "a", 7)
    assert again.get(["a", "b", "c", "d"]) == {"a": {"text": "Käse ☕ \ud800"}, "b": 2, "c": [0.1, None]}
    assert again.get(["c"]) == {"c": [0.1, None]}


def test_nothing_was_added(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").keys() == set()
    (tmp_path / "00000.sqlite").touch()  # a kill as it was made
    assert Store(tmp_path).get(["a"]) == {}


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
    with pytest.raises(DataError, match=r"00000\.sqlite: damaged: .*; delete it, and its part is done again"):
        Store(tmp_path).get(["1"])
    file.write_bytes(b"no data base at all " * 100)
    with pytest.raises(DataError, match="damaged"), Store(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "1.sqlite") as other:
        other.execute("CREATE TABLE done (key TEXT, value TEXT)")
        other.execute("INSERT INTO done VALUES ('a', '{')")
    file.unlink()
    with pytest.raises(DataError, match="damaged: "):
        Store(tmp_path).get(["a"])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"), Store(tmp_path / "file"):
        pass
    (tmp_path / "00000.sqlite").mkdir()
    with pytest.raises(DataError, match="unable to open database file"), Store(tmp_path):
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


def test_no_value_is_invalid_json(tmp_path: Path) -> None:
    with Store(tmp_path) as store, pytest.raises(ValueError, match="not JSON compliant"):
        store.add({"a": float("nan")})


def test_a_digest_is_of_values_and_not_of_their_order() -> None:
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
    assert digest("a", "bc") != digest("ab", "c")

import os
import subprocess
import sys
from pathlib import Path

import pytest
from regiongpt.evaluate.store import AnswerStore, digest

from regiongpt import DataError

WRITER = """
import sys
from pathlib import Path
from regiongpt.evaluate.store import AnswerStore
with AnswerStore(Path(sys.argv[1])) as store:
    number = 0
    while True:
        store.add({str(number): {"text": "x" * 5000}})
        print(number, flush=True)
        number += 1
"""


def test_what_is_added_is_there_for_the_next_run(tmp_path):
    with AnswerStore(tmp_path) as store:
        store.add({"a": {"text": "Käse ☕ \ud800"}, "b": {"scores": [0.1, 0.9]}})
        assert store["a"]["text"].startswith("Käse")
    again = AnswerStore(tmp_path)
    assert (len(again), again["b"], again["a"]["text"]) == (2, {"scores": [0.1, 0.9]}, "Käse ☕ \ud800")
    assert again.damaged == 0
    assert again.damaged_report() == ""


@pytest.mark.parametrize(
    "torn", [b'{"key": "c", "ans', b'{"key": "c", "answer": {"text": "\xc3', b"\n", b"[]\n", b'{"key": 1}\n']
)
def test_a_torn_line_costs_one_answer_and_is_never_glued_to_the_next(tmp_path, torn):
    with AnswerStore(tmp_path) as store:
        store.add({"a": {"text": "one"}})
    path = tmp_path / "answers" / "00000.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    with AnswerStore(tmp_path) as store:
        assert list(store._found) == ["a"]
        assert store.damaged == 1
        assert "asked again" in store.damaged_report()
        store.add({"b": {"text": "two"}})
    again = AnswerStore(tmp_path)
    assert (again["a"]["text"], again["b"]["text"]) == ("one", "two")


def test_a_file_of_one_torn_line_is_begun_anew(tmp_path):
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "00000.jsonl").write_bytes(b'{"key": "a", "answer"' + b"x" * 200_000)
    with AnswerStore(tmp_path) as store:
        assert len(store) == 0
        store.add({"b": {}})
    assert list(AnswerStore(tmp_path)._found) == ["b"]


def test_every_process_reads_what_all_have_written(tmp_path):
    with AnswerStore(tmp_path, 0) as first, AnswerStore(tmp_path, 1) as second:
        first.add({"a": {}})
        second.add({"b": {}})
        assert "b" not in first
        first.read()
        assert "b" in first
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == ["00000.jsonl", "00001.jsonl"]


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with AnswerStore(tmp_path), pytest.raises(DataError, match="another run is writing there"), AnswerStore(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "answers").write_text("")
    with pytest.raises(DataError, match=r"expected room and the right to write answers"), AnswerStore(tmp_path):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_said_and_nothing_counts_as_kept(tmp_path):
    store = AnswerStore(tmp_path)
    with store:
        os.dup2(os.open("/dev/full", os.O_WRONLY), store._file.fileno())
        with pytest.raises(DataError, match="free some space"):
            store.add({"a": {}})
        assert "a" not in store


def test_a_kill_loses_nothing_that_add_has_returned_from(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    told = [process.stdout.readline() for _ in range(40)][-1]
    process.kill()
    told = [told, *process.stdout.read().split("\n")[:-1]][-1] or told
    process.wait()
    kept = AnswerStore(tmp_path)
    assert len(kept) >= int(told) + 1
    assert all(str(number) in kept for number in range(len(kept)))


def test_a_digest_is_of_values_and_not_of_their_order():
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
    assert digest("a", "bc") != digest("ab", "c")

"""Answers that others gave: what is taken, and what is refused and why."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regiongpt import Region
from regiongpt.errors import DataError
from regiongpt.evaluate.run import read_predictions
from regiongpt.evaluate.task import Answer, Item

ITEMS = [
    Item(id=str(k), image=Path("x.jpg"), image_id=1, question="?", choices=("cat", "dog"), truth="cat")
    for k in (1, 2, 3)
]


def write(folder: Path, entries: Sequence[Any]) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in entries), encoding="utf-8")
    return path


def whole(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": k, "text": "cat", **changes} for k in (1, 2, 3)]


def test_lines_are_taken(tmp_path: Path) -> None:
    answers = {
        "1": Answer(text="cat", probability=0.5, scores=(0.75, 0.25)),
        "2": Answer(text="a\u2028b\x85c", scores=(0.1, 0.9)),  # separators of lines within a text are text
        "3": Answer(text="", scores=(1.0, 0.0)),
    }
    path = write(tmp_path, [{"id": name, **answer.to_dict()} for name, answer in answers.items()])
    assert read_predictions(path, ITEMS).answers == answers
    # An id alone says that there is no answer, which counts as wrong.
    assert list(read_predictions(write(tmp_path, [*whole()[:1], {"id": 2}, {"id": 3}]), ITEMS).answers) == ["1"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "cat"}, "id: give a value"),
        ({"id": 8, "text": "cat"}, "no item '8'; the benchmark has 1, 2, 3"),
        ({"id": 2, "text": "cat"}, "another prediction for item 2; keep one"),
        ({"id": 1, "caption": "cat"}, "unknown setting 'caption'"),
        ({"id": 1, "text": "cat", "probability": 1.5}, "probability: .*less than or equal to 1"),
        ({"id": 1, "scores": [1]}, "scores: give a number for each of 2 choices"),
        ({"id": 1, "scores": [1, float("nan")]}, r"scores.1: .*finite"),
        ([1, "cat"], "expected an object"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(write(tmp_path, [{"id": 2, "text": "x"}, entry]), ITEMS)
    assert "answers.jsonl:2" in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "lack"),
    [
        (whole()[:1], "2 of 3 items have no prediction: 2, 3"),
        ([{**whole()[0], "scores": [1, 0]}, *whole()[1:]], "2 of 3 items have no scores: 2, 3"),
        ([{"id": 1, "scores": [1, 0]}, *whole(scores=[1, 0])[1:]], "1 of 3 items have no text: 1"),
    ],
)
def test_what_some_items_have_all_must_have(tmp_path: Path, entries: list[Any], lack: str) -> None:
    with pytest.raises(DataError, match=lack):
        read_predictions(write(tmp_path, entries), ITEMS)


def test_answers_by_number_are_held_against_the_regions_they_number(tmp_path: Path) -> None:
    boxes = Region.box(0, 0, 10, 10), Region.box(20, 0, 30, 10)
    one, other = (replace(ITEMS[0], choices=(), regions=regions) for regions in (boxes, boxes[::-1]))
    path = write(tmp_path, [{"id": 1, "text": "Region [1]", "regions": one.regions_key}])
    assert read_predictions(path, [one]).answers["1"].text == "Region [1]"
    with pytest.raises(DataError, match=r":1: about other regions than this question; give --seed"):
        read_predictions(path, [other])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "3 of 3 items have no prediction"), (b"{", "Expecting"), (b"\xff\xfe", "not UTF-8"),
     (b"[" * 10**5, "nested too deeply")],
)  # fmt: skip
def test_files_that_are_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "odd.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"odd.jsonl: .*{message}"):
        read_predictions(tmp_path / "odd.jsonl", ITEMS)

"""Answers that others gave: what is taken, and what is refused and why."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import Drawn

from regiongpt import Region
from regiongpt.errors import DataError
from regiongpt.evaluate.predictions import read_predictions
from regiongpt.evaluate.task import Answer, Item

ITEMS = [
    Item(id=str(k), image=Path("x.jpg"), image_id=1, question="?", choices=("cat", "dog"), truth="cat")
    for k in (1, 2, 3)
]
TASK = Drawn(data=Path("nowhere"))


def write(folder: Path, entries: Sequence[Any], array: bool = False) -> Path:
    path = folder / "answers.json"
    path.write_text(json.dumps(list(entries)) if array else "\n".join(map(json.dumps, entries)), encoding="utf-8")
    return path


def whole(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": k, "text": "cat", **changes} for k in (1, 2, 3)]


@pytest.mark.parametrize("array", [False, True])
def test_lines_and_arrays_are_taken(tmp_path: Path, array: bool) -> None:
    entries = [
        {"id": 1, "text": "cat", "probability": 0.5, "scores": {"dog": 0.25, "cat": 0.75}},
        {"question_id": "2", "answer": "dog", "scores": [0.1, 0.9]},
        {"ann_id": 3, "caption": "", "scores": [1, 0]},
    ]
    found = read_predictions(write(tmp_path, entries, array), TASK, ITEMS)
    assert found.answers == {
        "1": Answer(text="cat", probability=0.5, scores=(0.75, 0.25)),
        "2": Answer(text="dog", scores=(0.1, 0.9)),
        "3": Answer(text="", scores=(1.0, 0.0)),
    }
    assert found.report == ()


def test_unknown_ids_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [*whole(), {"id": 8, "text": "cat"}, {"id": 9, "text": "cat"}])
    with pytest.raises(DataError, match=r"2 predictions for no item: annotation ids 8, 9, where .* 1, 2, 3"):
        read_predictions(path, TASK, ITEMS, missing="wrong")


def test_missing_ids_are_listed_and_refused_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path, whole()[:1])
    with pytest.raises(DataError, match=r"2 of 3 items have no prediction: annotation ids 2, 3; .*--missing wrong"):
        read_predictions(path, TASK, ITEMS)
    assert list(read_predictions(path, TASK, ITEMS, missing="wrong").answers) == ["1"]


def test_duplicates_must_be_alike(tmp_path: Path) -> None:
    found = read_predictions(write(tmp_path, [*whole(), whole()[0]]), TASK, ITEMS)
    assert found.report == ("1 prediction given more than once (1)",)
    with pytest.raises(DataError, match=r":4: another prediction for annotation id 1 that differs; keep one"):
        read_predictions(write(tmp_path, [*whole(), {"id": 1, "text": "dog"}]), TASK, ITEMS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "cat"}, "no annotation id; give one of id, question_id, ann_id, .*, found keys: text"),
        ({"id": 1.5, "text": "cat"}, "id: give a whole number or text"),
        ({"id": 1}, "no answer; give one of text, .*, found keys: id"),
        ({"id": 1, "text": 5}, "text: give text, got 5"),
        ({"id": 1, "text": "cat", "probability": 1.5}, "probability: 1.5 is not between 0 and 1"),
        ({"id": 1, "text": "cat", "probability": "high"}, "probability: give finite numbers, got 'high'"),
        ({"id": 1, "scores": [1]}, "scores: give a number for each of 2 choices, got 1"),
        ({"id": 1, "scores": {"cat": 1}}, "scores: none for dog"),
        ({"id": 1, "scores": {"cat": 1, "dgo": 1}}, "scores: 'dgo' is not a choice; did you mean 'dog'"),
        ({"id": 1, "scores": [1, "2"]}, "scores: give finite numbers, got '2'"),
        ({"id": 1, "scores": [1, 10**400]}, "scores: give finite numbers, got 1000"),
        ({"id": 1, "called": [1.0]}, "no answer; .*, found keys: id, called"),
        ({"id": 1, "text": "cat", "answer": "dog"}, "more than one answer, text 'cat', answer 'dog'; keep"),
        ({"id": 1, "text": " ? "}, "the question itself"),
        ({"id": 1, "label": "cat"}, "no answer; .*, found keys: id, label"),
        ({"id": 8, "ann_id": 7, "text": "cat"}, "more than one annotation id, id 8, ann_id 7; keep one"),
        ([1, "cat"], "a JSON list; give an object"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(write(tmp_path, [{"id": 2, "text": "x"}, entry]), TASK, ITEMS, missing="wrong")
    assert "answers.json:2" in str(caught.value)


def test_what_some_items_have_all_must_have(tmp_path: Path) -> None:
    path = write(tmp_path, [{**whole()[0], "scores": [1, 0]}, *whole()[1:]])
    with pytest.raises(DataError, match=r"2 of 3 predictions lack 'scores': .* 2, 3; give it for all items"):
        read_predictions(path, TASK, ITEMS)
    report = read_predictions(path, TASK, ITEMS, missing="wrong").report
    assert report == (
        "2 of 3 predictions lack 'scores': annotation ids 2, 3; they count as wrong where 'scores' is scored",
    )
    with pytest.raises(DataError, match=r"lack 'text': .*; give it for all"):
        read_predictions(write(tmp_path, [{"id": 1, "scores": [1, 0]}, *whole(scores=[1, 0])[1:]]), TASK, ITEMS)


def test_a_label_is_an_answer_where_classes_are_asked_for_alone(tmp_path: Path) -> None:
    path = write(tmp_path, [{"ann_id": 1, "label": "cat"}])
    asked = [replace(ITEMS[0], detail={"ids": {"cat": 1, "dog": 2}})]
    assert read_predictions(path, TASK, asked).answers == {"1": Answer(text="cat")}


def test_answers_by_number_are_held_against_the_regions_they_number(tmp_path: Path) -> None:
    def asked(*order: int) -> list[Item]:
        boxes = [Region.box(0, 0, 10, 10), Region.box(20, 0, 30, 10)]
        return [Item(id="1", image=Path("x.jpg"), image_id=1, question="?", regions=tuple(boxes[k] for k in order))]

    answer = {"id": 1, "text": "Region [1]", "regions": asked(0, 1)[0].regions_key}
    path = write(tmp_path, [answer])
    assert read_predictions(path, TASK, asked(0, 1)).answers["1"].text == "Region [1]"
    with pytest.raises(DataError, match=r":1: an answer about other regions than the 2 of .* order; give the --seed"):
        read_predictions(path, TASK, asked(1, 0))
    listed = {**answer, "regions": [{"box": [0, 0, 10, 10]}, {"box": [20, 0, 30, 10]}]}
    assert read_predictions(write(tmp_path, [listed]), TASK, asked(0, 1)).answers
    with pytest.raises(DataError, match="in another order"):
        read_predictions(write(tmp_path, [listed]), TASK, asked(1, 0))


def test_separators_of_lines_within_a_text_are_text(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps({"id": k, "text": "a\u2028b\x85c"}, ensure_ascii=False) for k in (1, 2, 3)]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert read_predictions(path, TASK, ITEMS).answers["2"].text == "a\u2028b\x85c"


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: not readable .*: No such file"):
        read_predictions(tmp_path / "none.json", TASK, ITEMS)
    for content, message in (
        (b"", "no predictions in this file"),
        (b"{", ":1: not readable as JSON .*Expecting"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"[" * 10**5, "nested too deeply"),
    ):
        (tmp_path / "odd.json").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_predictions(tmp_path / "odd.json", TASK, ITEMS)

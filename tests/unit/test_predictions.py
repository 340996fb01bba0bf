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
from regiongpt.evaluate.predictions import read_predictions, regions_of
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


def test_unknown_ids_are_refused_or_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, [*whole(), {"id": 8, "text": "cat"}, {"id": 9, "text": "cat"}])
    with pytest.raises(DataError, match=r"got 2 for others: annotation ids 8, 9; .*--unknown ignore"):
        read_predictions(path, TASK, ITEMS)
    found = read_predictions(path, TASK, ITEMS, unknown="ignore")
    assert found.report == ("2 predictions are for no item and were left out (8, 9)",)


def test_missing_ids_are_listed_and_refused_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path, whole()[:1])
    with pytest.raises(DataError, match=r"of 3 items, found none for 2: annotation ids 2, 3; .*--missing wrong"):
        read_predictions(path, TASK, ITEMS)
    assert list(read_predictions(path, TASK, ITEMS, missing="wrong").answers) == ["1"]


def test_duplicates_must_be_alike(tmp_path: Path) -> None:
    found = read_predictions(write(tmp_path, [*whole(), whole()[0]]), TASK, ITEMS)
    assert found.report == ("1 predictions came more than once, always alike (1)",)
    with pytest.raises(DataError, match=r":4: expected one prediction for annotation id 1, got another that differs"):
        read_predictions(write(tmp_path, [*whole(), {"id": 1, "text": "dog"}]), TASK, ITEMS)


def test_another_split_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are they of another split, or of another task"):
        read_predictions(write(tmp_path, [{"id": 70, "text": "cat"}]), TASK, ITEMS, unknown="ignore", missing="wrong")

    class Split(Drawn):
        split = "val"

    path = write(tmp_path, whole(split="test"))
    with pytest.raises(DataError, match=r":1: expected a prediction for the split 'val', got one for 'test'"):
        read_predictions(path, Split(data=Path("nowhere")), ITEMS)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "cat"}, "expected the annotation id as 'id', 'question_id', 'ann_id' or .*, found keys: 'text'"),
        ({"id": 1.5, "text": "cat"}, "expected id as a number or text"),
        ({"id": True, "text": "cat"}, "expected id as a number or text"),
        ({"id": 1}, "expected the answer as 'text' or 'scores', found 'id'"),
        ({"id": 1, "text": 5}, "expected text as text, got 5"),
        ({"id": 1, "text": "cat", "probability": 1.5}, "expected a number from 0 to 1, got 1.5"),
        ({"id": 1, "text": "cat", "probability": "high"}, "expected probability as a number"),
        ({"id": 1, "scores": [1]}, "a score for each of 2 choices, got 1"),
        ({"id": 1, "scores": {"cat": 1}}, "expected a score of every choice, found none of dog"),
        ({"id": 1, "scores": {"cat": 1, "dgo": 1}}, "got one of 'dgo'; near: dog"),
        ({"id": 1, "scores": [1, "2"]}, "expected scores as finite numbers, got '2'"),
        ({"id": 1, "scores": [1, float("nan")]}, "expected scores as finite numbers, got nan"),
        ({"id": 1, "scores": [1, 10**400]}, "expected scores as finite numbers, got 1000"),
        ({"id": 1, "scores": {"fish": 1}}, "got one of 'fish'$"),
        ({"id": 1, "bbox": [0, 0, 5, 5]}, "expected the answer as 'text' or 'scores', found 'id', 'bbox'"),
        ({"id": 1, "called": [1.0]}, "expected the answer as 'text' or 'scores', found 'id', 'called'"),
        ({"id": 1, "text": "cat", "answer": "dog"}, "expected one answer, got text 'cat' and answer 'dog'; keep"),
        ({"id": 1, "text": " ? "}, "expected an answer, got the question itself"),
        ({"id": 1, "label": "cat"}, "expected the answer as 'text' or 'scores', found 'id', 'label'"),
        ({"id": 8, "ann_id": 7, "text": "cat"}, "expected one annotation id, got id 8, ann_id 7; keep the one"),
        ([1, "cat"], "expected a json object, got list"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(write(tmp_path, [{"id": 2, "text": "x"}, entry]), TASK, ITEMS, missing="wrong")
    assert "answers.json:2" in str(caught.value)


def test_what_some_items_have_all_must_have(tmp_path: Path) -> None:
    path = write(tmp_path, [{**whole()[0], "scores": [1, 0]}, *whole()[1:]])
    with pytest.raises(
        DataError, match=r"expected 'scores' in every prediction or in none, but 2 of 3 .*: .* 2, 3; add"
    ):
        read_predictions(path, TASK, ITEMS)
    report = read_predictions(path, TASK, ITEMS, missing="wrong").report
    assert report == (
        "2 of 3 predictions lack 'scores': annotation ids 2, 3; they count as wrong where 'scores' is scored",
    )
    with pytest.raises(DataError, match="expected 'text' in every prediction"):
        read_predictions(write(tmp_path, [{"id": 1, "scores": [1, 0]}, *whole(scores=[1, 0])[1:]]), TASK, ITEMS)


def test_a_label_is_an_answer_where_classes_are_asked_for_alone(tmp_path: Path) -> None:
    path = write(tmp_path, [{"ann_id": 1, "label": "cat"}])
    asked = [replace(ITEMS[0], detail={"names": ["cat", "dog"]})]
    assert read_predictions(path, TASK, asked).answers == {"1": Answer(text="cat")}


def test_answers_by_number_are_held_against_the_regions_they_number(tmp_path: Path) -> None:
    def asked(*order: int) -> list[Item]:
        boxes = [Region.box(0, 0, 10, 10), Region.box(20, 0, 30, 10)]
        return [Item(id="1", image=Path("x.jpg"), image_id=1, question="?", regions=tuple(boxes[k] for k in order))]

    answer = {"id": 1, "text": "Region [1]", "regions": regions_of(asked(0, 1)[0])}
    path = write(tmp_path, [answer])
    assert read_predictions(path, TASK, asked(0, 1)).answers["1"].text == "Region [1]"
    with pytest.raises(DataError, match=r":1: expected an answer about the 2 regions .* in their order.*--seed"):
        read_predictions(path, TASK, asked(1, 0))
    listed = {**answer, "regions": [{"box": [0, 0, 10, 10]}, {"box": [20, 0, 30, 10]}]}
    assert read_predictions(write(tmp_path, [listed]), TASK, asked(0, 1)).answers
    with pytest.raises(DataError, match="in their order"):
        read_predictions(write(tmp_path, [listed]), TASK, asked(1, 0))


@pytest.mark.parametrize(
    ("box", "said"),
    [([21, 0, 10, 10], "Region [2]"), ([0, 0, 10, 6], "Region [1]"), ([10, 0, 10, 10], "a box at [10, 0, 10, 10]")],
)
def test_a_box_stands_for_the_region_it_overlaps(tmp_path: Path, box: list[float], said: str) -> None:
    regions = (Region.box(0, 0, 10, 10), Region.box(20, 0, 30, 10))
    items = [Item(id="1", image=Path("x.jpg"), image_id=1, question="?", regions=regions)]
    assert read_predictions(write(tmp_path, [{"id": 1, "bbox": box}]), TASK, items).answers["1"].text == said
    for wrong, message in (({"bbox": [1, 2, 0, 4]}, "expected bbox as x, y"), ({"bbox": box, "text": "x"}, "got both")):
        with pytest.raises(DataError, match=message):
            read_predictions(write(tmp_path, [{"id": 1, **wrong}]), TASK, items)


def test_separators_of_lines_within_a_text_are_text(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps({"id": k, "text": "a\u2028b\x85c"}, ensure_ascii=False) for k in (1, 2, 3)]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert read_predictions(path, TASK, ITEMS).answers["2"].text == "a\u2028b\x85c"


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected predictions at"):
        read_predictions(tmp_path / "none.json", TASK, ITEMS)
    for content, message in (
        (b"", "found none"),
        (b"{", "expected json, got"),
        (b"\xff\xfe", "UTF-8.*unpack"),
        (b"[" * 10**5, "json"),
    ):
        (tmp_path / "odd.json").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_predictions(tmp_path / "odd.json", TASK, ITEMS)

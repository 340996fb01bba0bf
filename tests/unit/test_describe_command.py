"""The verb ``describe``, as a person types it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import make_checkpoint

from regiongpt import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("describe")
    make_checkpoint(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    boxes = [
        {"image_id": 5, "bbox": [2, 2, 20, 20], "score": 0.4},
        {"image_id": 5, "bbox": [30, 5, 20, 30], "score": 0.9},
    ]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder


def describe(folder: Path, *words: str) -> int:
    model = ["--model", str(folder / "checkpoint"), "--device", "cpu", "--max-new-tokens", "6"]
    return cli.main(["describe", str(folder / "photo.png"), *words, *model])


def test_proposals_as_text_json_and_picture(folder, capsys):
    boxes, picture = str(folder / "boxes.json"), folder / "out.png"
    assert describe(folder, "--proposals", boxes, "--picture", str(picture)) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert [line[:4] for line in lines] == ["[1] ", "[2] "]
    assert Image.open(picture).width >= 640
    assert describe(folder, "--proposals", boxes, "--json", "--max-regions", "1", "--brief") == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert [entry["region"] for entry in record["regions"]] == [{"box": [30, 5, 50, 35]}]
    assert record["regions"][0]["score"] == 0.9
    assert record["left_out"] == 1
    assert "left out 1 of 2" in printed.err
    (folder / "again.json").write_text(printed.out)
    assert describe(folder, "--proposals", str(folder / "again.json"), "--int8") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_a_bad_entry_of_a_data_set_is_left_out_and_said(folder, capsys):
    entries = [{"id": k, "image_id": 1, "bbox": [5, 5, 20 * k, 9], "iscrowd": int(k == 2)} for k in (0, 1, 2)]
    data = {"images": [{"id": 1, "file_name": "set\\photo.png", "width": 60, "height": 40}], "annotations": entries}
    (folder / "set.json").write_text(json.dumps(data))
    assert describe(folder, "--proposals", str(folder / "set.json"), "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["left_out"] == 2
    assert "left out 2 of 3 regions (unusable: 1 box without size, 1 crowd)" in printed.err
    assert describe(folder, "--proposals", str(folder / "set.json"), "--crowds") == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_typed_regions_and_a_grid(folder, capsys):
    assert describe(folder, "--grid", "2", "--box", "1,1,9,9", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert [next(iter(entry["region"])) for entry in record["regions"]] == ["box", *["point"] * 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--proposals, --grid, --sam, --box"),
        (["--grid", "0"], "--grid: "),
        (["--grid", "2", "--proposals", "boxes.json"], "not several"),
        (["--grid", "2", "--image-id", "3"], "--image-id goes with --proposals"),
        (["--grid", "2", "--crowds"], "--crowds goes with --proposals"),
        (["--proposals", "none.json"], "none.json"),
        (["--grid", "2", "--max-regions", "0"], "--max-regions: "),
        (["--grid", "2", "--iou", "2"], "--iou: "),
        (["--grid", "2", "--min-score", "0.5"], "a score of every proposal"),
        (["--sam", "none", "--iou", "2"], "--iou: "),
        (["--sam", "none"], "SAM model at none"),
        (["--grid", "2", "--int8", "--dtype", "bfloat16"], "float32 with int8"),
        (["--grid", "2", "--picture", "out.xyz"], "out.xyz"),
        (["--grid", "2", "--temperature", "1"], "--temperature"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, words, message):
    assert describe(folder, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_nothing_left(folder, capsys):
    assert describe(folder, "--proposals", str(folder / "boxes.json"), "--min-score", "0.95") == 2
    assert "no region is left" in capsys.readouterr().err

"""``describe``, ``classify`` and ``locate``, and every verb over many images, as a person types them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from tiny_checkpoint import make_checkpoint

from regiongpt import cli
from regiongpt.inference import RegionPredictor


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
    images = folder / "images"
    images.mkdir()
    for name in ("b.jpg", "a.png", "c.webp"):
        Image.fromarray(np.roll(pixels, len(name), axis=1)).save(images / name)
    (images / "broken.jpg").write_bytes((images / "b.jpg").read_bytes()[:400])
    (images / "notes.txt").write_text("no image")
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
        (["--grid", "2", "--min-score", "0.5"], "no score to compare"),
        (["--sam", "none"], "SAM model at none"),
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


# ---------------------------------------------------------------------------------------------------------------------
# classify and locate


BOX = ("--box", "2,2,20,20")
SHORT = ["--max-new-tokens", "3"]


def run(folder: Path, verb: str, *words: str) -> int:
    return cli.main([verb, *words, "--model", str(folder / "checkpoint"), "--device", "cpu"])


def test_classify_prints_a_class_a_region(folder, capsys):
    photo = str(folder / "photo.png")
    words = [photo, *BOX, "--box", "30,5,50,35", "--choices", "cat, dog,a cup"]
    assert run(folder, "classify", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run(folder, "classify", *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)["regions"]
    assert lines == [f"[{n}] {each['label']} {each['probability']:.3f}" for n, each in enumerate(found, 1)]
    assert set(found[0]["probabilities"]) == {"cat", "dog", "a cup"}
    assert run(folder, "classify", photo, *BOX, "--label-set", "coco80", "--top-k", "2", "--generate") == 0
    assert capsys.readouterr().out.count(", ") == 1


def test_locate_prints_a_region_or_none(folder, capsys):
    words = [str(folder / "photo.png"), "the red cup", *BOX, "--box", "30,5,50,35"]
    assert run(folder, "locate", *words, "--by", "words") == 0
    line = capsys.readouterr().out
    assert run(folder, "locate", *words, "--by", "words", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert line == f"Region [{record['number']}] {record['probability']:.3f}\n"
    assert len(record["probabilities"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classify", "PHOTO", "--choices", "cat"], "expected regions"),
        (["classify", "PHOTO", *BOX, "--choices", "cat,cat"], "'cat' more than once"),
        (["classify", "PHOTO", *BOX, "--choices", "<region1>"], "<region1>"),
        (["classify", "PHOTO", *BOX, "--label-set", "LVIS"], "COCO-80"),
        (["classify", "PHOTO", *BOX, "--top-k", "0"], "--top-k"),
        (["classify", *BOX], "expected an image"),
        (["locate", "PHOTO", *BOX], "an image and an expression"),
        (["locate", "PHOTO", "a cup"], "expected regions"),
        (["locate", "PHOTO", "a cup", "--box", "90,90,99,99"], "60 x 40"),
        (["locate", "PHOTO", "<region2>", *BOX], "<region2>"),
        (["locate", "PHOTO", "a cup", *BOX, "--by", "luck"], "--by"),
        (["ask", "PHOTO", "caf\udce9?"], "UTF-8"),
        (["ask", "PHOTO", "What?", "--out", "out.txt"], ".jsonl"),
        (["ask", "PHOTO", "What?", "--out", "out.jsonl", "--json"], "leave one of them out"),
        (["ask", "PHOTO", "other.png", "What?", "--picture", "out.png"], "single image"),
        (["describe", "PHOTO", "other.png", "--proposals", "boxes.json", "--image-id", "5"], "single image"),
        (["ask", "PHOTO", "What?", "--picture", "PHOTO"], "would replace what is asked about"),
        (["ask", "PHOTO", "What?", "--picture", ""], "--picture: give a path"),
        (["ask", "PHOTO", "What?", "--overwrite"], "--overwrite goes with --out"),
        (["ask", "PHOTO", "other.png", "What is <region2>?", "--box", "1,1,9,9"], "<region2>"),
        (["ask", "x" * 5000, "What?"], "File name too long"),
        (["ask", "PHOTO", "What?", "--model", "nowhere"], "nowhere: not a checkpoint folder"),
        (["ask", "PHOTO", "What?", "--int8", "--dtype", "bfloat16"], "float32"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(folder, capsys, monkeypatch, words, message):
    monkeypatch.setattr(RegionPredictor, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert cli.main([str(folder / "photo.png") if word == "PHOTO" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Many images


def test_an_image_that_cannot_be_read_among_many_is_skipped_and_counted(folder, capsys):
    images = folder / "images"
    assert run(folder, "ask", str(images), str(images / "none.png"), "What is <region1>?", *BOX, *SHORT) == 1
    printed = capsys.readouterr()
    assert [line.split(": ")[0] for line in printed.out.splitlines()] == [
        str(images / name) for name in ("a.png", "b.jpg", "c.webp")
    ]
    errors = printed.err.splitlines()
    assert ["broken.jpg" in errors[0], "none.png" in errors[1]] == [True, True]
    assert errors[2].endswith("2 of 5 images were skipped")


def test_a_region_that_does_not_fit_one_of_many_images(folder, capsys, tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "small.png")
    words = [str(folder / "photo.png"), str(tmp_path / "small.png"), "--box", "30,5,50,35"]
    assert run(folder, "classify", *words, "--choices", "cat,dog", "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["image"] == words[0]
    assert "small.png: <region1> (--box)" in printed.err


def results(folder: Path, verb: str, out: Path, *words: str) -> Path:
    images = [str(folder / "images" / name) for name in ("a.png", "b.jpg")]
    assert run(folder, verb, *images, *words, *BOX, "--box", "30,5,50,35", "--out", str(out)) == 0
    return out


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("ask", ["What is <region1>?", *SHORT]),
        ("describe", SHORT),
        ("classify", ["--choices", "cat,dog"]),
        ("locate", ["a cup"]),
    ],
)
def test_results_as_json_lines_and_coco(folder, capsys, tmp_path, verb, words):
    lines = results(folder, verb, tmp_path / "out.jsonl", *words).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [Path(record["image"]).name for record in records] == ["a.png", "b.jpg"]
    assert all(len(record["regions"]) == 2 for record in records)
    capsys.readouterr()
    coco = COCO(results(folder, verb, tmp_path / "out.json", *words))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a.png", "b.jpg"]
    first, second, *_ = coco.loadAnns(coco.getAnnIds())
    assert (first["bbox"], second["bbox"]) == ([2, 2, 18, 18], [30, 5, 20, 30])
    names = {each["id"]: each["name"] for each in coco.loadCats(coco.getCatIds())}
    if verb == "classify":
        assert names == {1: "cat", 2: "dog"}
        assert names[first["category_id"]] == records[0]["regions"][0]["label"]
        assert first["score"] == pytest.approx(records[0]["regions"][0]["probability"])
    else:
        assert first["caption"] in (records[0].get("answer"), "a cup", records[0]["regions"][0].get("answer"))
    # What was written tells the next run which regions each image has.
    again = [str(folder / "images" / "b.jpg"), "--proposals", str(tmp_path / "out.json"), "--json"]
    assert run(folder, "describe", *again, "--max-new-tokens", "2") == 0
    assert "[\n" in capsys.readouterr().out


def test_results_replace_nothing_unless_told(folder, capsys, monkeypatch, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    words = ["ask", str(folder / "photo.png"), "What?", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(RegionPredictor, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
        assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run(folder, *words, *SHORT, "--overwrite") == 0
    assert json.loads(out.read_text())["question"] == "What?"


@pytest.mark.parametrize(("suffix", "left"), [(".jsonl", 1), (".json", 0)])
def test_a_run_that_is_stopped_leaves_whole_lines_or_nothing(folder, monkeypatch, tmp_path, suffix, left):
    out, ask, asked = tmp_path / f"out{suffix}", RegionPredictor.ask, []

    def stopped(*arguments, **options):
        asked.append(1)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return ask(*arguments, **options)

    monkeypatch.setattr(RegionPredictor, "ask", stopped)
    assert run(folder, "ask", str(folder / "images"), "What?", *SHORT, "--out", str(out)) == 130
    assert (
        [json.loads(line)["question"] for line in out.read_text().splitlines()] == ["What?"]
        if left
        else [path.name for path in tmp_path.iterdir()] == []
    )


def test_a_full_disk_is_one_line(folder, capsys, tmp_path):
    (tmp_path / "out.jsonl").symlink_to("/dev/full")
    assert (
        run(folder, "ask", str(folder / "photo.png"), "What?", "--out", str(tmp_path / "out.jsonl"), "--overwrite") == 2
    )
    assert "out.jsonl: cannot be written: No space left" in capsys.readouterr().err


def test_an_image_without_regions_among_many_has_an_empty_answer(folder, capsys):
    images = [str(folder / "images" / name) for name in ("a.png", "b.jpg")]
    boxes = str(folder / "boxes.json")
    assert run(folder, "describe", *images, "--proposals", boxes, "--min-score", "0.95", "--json") == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["regions"] for line in printed.out.splitlines()] == [[], []]
    assert printed.err.count("left out 2 of 2 regions") == 2

"""The command line in process: answers on standard output, and for whatever is wrong one line and exit code 2."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import make_checkpoint, make_parts

from regiongpt import cli
from regiongpt.inference import RegionPredictor

QUESTION = "What is <region1>?"
BOX = ["--box", "5,5,30,30"]
TWO = [*BOX, "--box", "30,5,50,35"]
SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and every kind of image and region file, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder)
    for name in ("empty", "images"):
        (folder / name).mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for name in ("photo.png", "images/a.png", "images/b.jpg", "images/c.webp"):
        Image.fromarray(np.roll(pixels, len(name), axis=1)).save(folder / name)
    (folder / "images" / "broken.jpg").write_bytes((folder / "images" / "b.jpg").read_bytes()[:400])
    (folder / "images" / "notes.txt").write_text("no image")
    (folder / "text.jpg").write_text("no image at all")
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:20]).save(folder / "mask_small.png")
    (folder / "rle.json").write_text(json.dumps({"size": [40, 60], "counts": [100, 200, 2100]}))
    (folder / "rle_broken.json").write_text("{")
    boxes = [{"bbox": [2, 2, 20, 20], "score": 0.4}, {"bbox": [30, 5, 20, 30], "score": 0.9}]
    (folder / "boxes.json").write_text(json.dumps([{"image_id": 5, **box} for box in boxes]))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs one command line in the folder of the files; returns exit code, standard output and standard error."""
    monkeypatch.chdir(files)

    def call(*arguments: str, model: str | None = "checkpoint") -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([*arguments, *(["--model", model, "--device", "cpu"] if model else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def is_one_line(err: str) -> bool:
    return err.startswith("regiongpt: error: ") and err.endswith("\n") and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# One image


def test_ask_prints_the_answer_alone(run):
    code, out, err = run("ask", "photo.png", QUESTION, *BOX, *SHORT)
    assert (code, err) == (0, "")
    assert out.strip()
    assert run("ask", *BOX, *SHORT, "photo.png", model="checkpoint")[0] == 2
    assert cli.main(["ask", *BOX, *SHORT, "--model", "checkpoint", "photo.png", "--", "-what is <region1>?"]) == 0


def test_regions_are_numbered_as_typed_across_kinds(run):
    code, out, err = run(
        *("ask", "photo.png", "--point", "9,9", "--box", "-5,-5.5,30,30"),
        "Compare <region1>, <region2>, <region3>, <region4>, <region5>, <region6> and <region7>.",
        *("--mask", "mask.png", "--json", "--polygon", "-1,5,20,5,20,30", "--rle", "rle.json"),
        *("--box=1,2,3,4", "--scribble", "5,5,30,30", *SHORT),
    )
    assert (code, err) == (0, "")
    record = json.loads(out)
    kinds = [next(iter(region)) for region in record["regions"]]
    assert kinds == ["point", "box", "mask", "polygon", "rle", "box", "scribble"]
    assert record["regions"][1] == {"box": [-5, -5.5, 30, 30]}
    assert set(record) >= {"image", "question", "answer", "cited", "warnings", "seconds"}


def test_fractions_of_the_image(run):
    words = ["ask", "photo.png", QUESTION, *SHORT, "--json"]
    pixels = ["--box", "6,10,30,30", "--polygon", "6,10,30,10,30,30", "--point", "30,20"]
    fractions = ["--box", "0.1,0.25,0.5,0.75", "--polygon", "0.1,0.25,0.5,0.25,0.5,0.75", "--point", "0.5,0.5"]
    expected = json.loads(run(*words, *pixels)[1])["regions"]
    assert json.loads(run(*words, *fractions, "--normalized")[1])["regions"] == expected


def test_a_region_never_mentioned_is_a_warning(run):
    code, out, err = run("ask", "photo.png", "What is <region2>?", *BOX, "--point", "9,9", *SHORT)
    assert (code, bool(out.strip()), err.count("\n")) == (0, True, 1)
    assert err.startswith("regiongpt: warning: ")
    assert "<region1>" in err


def test_describe_proposals_as_text_json_and_picture(run, files):
    words = ["describe", "photo.png", "--proposals", "boxes.json", *SHORT]
    code, out, _ = run(*words, "--picture", "out.png")
    assert (code, [line[:4] for line in out.splitlines()]) == (0, ["[1] ", "[2] "])
    assert Image.open(files / "out.png").width >= 640
    code, out, err = run(*words, "--json", "--max-regions", "1", "--brief")
    assert code == 0
    record = json.loads(out)
    assert [entry["region"] for entry in record["regions"]] == [{"box": [30, 5, 50, 35]}]
    assert (record["regions"][0]["score"], record["left_out"]) == (0.9, 1)
    assert "left out 1 of 2" in err
    (files / "again.json").write_text(out)
    assert run("describe", "photo.png", "--proposals", "again.json", *SHORT)[1].count("\n") == 1
    record = json.loads(run("describe", "photo.png", "--grid", "2", *BOX, "--json", *SHORT)[1])
    assert [next(iter(entry["region"])) for entry in record["regions"]] == ["box", *["point"] * 4]


def test_classify_prints_a_class_a_region(run):
    words = ["classify", "photo.png", *TWO, "--choices", "cat, dog,a cup"]
    lines = run(*words)[1].splitlines()
    found = json.loads(run(*words, "--json")[1])["regions"]
    assert lines == [f"[{n}] {each['label']} {each['probability']:.3f}" for n, each in enumerate(found, 1)]
    assert set(found[0]["probabilities"]) == {"cat", "dog", "a cup"}
    code, out, _ = run("classify", "photo.png", *BOX, "--label-set", "COCO-80", "--top-k", "2")
    assert (code, out.count(", ")) == (0, 1)


def test_locate_prints_a_region_or_none(run):
    words = ["locate", "photo.png", "the red cup", *TWO, "--by", "words"]
    record = json.loads(run(*words, "--json")[1])
    assert run(*words)[1] == f"Region [{record['number']}] {record['probability']:.3f}\n"
    assert len(record["probabilities"]) == 3


ASK = ["ask", "photo.png", QUESTION]
DESCRIBE = ["describe", "photo.png"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        # images
        (["ask", "nowhere.jpg", QUESTION, *BOX], ["nowhere.jpg", "no such file"]),
        (["ask", "empty", QUESTION, *BOX], ["empty", "no image"]),
        (["ask", "text.jpg", QUESTION, *BOX], ["text.jpg", "expected an image"]),
        (["classify", *BOX], ["expected an image"]),
        # regions
        ([*ASK, "--box", "30,30,5,5"], ["<region1>", "--box", "inverted"]),
        ([*ASK, "--box", "a,b,c,d"], ["<region1> (--box)", "X0,Y0,X1,Y1", "'a,b,c,d'"]),
        ([*ASK, "--box"], ["--box", "expected one argument"]),
        ([*ASK, "--box", "5,5,30,30", "--normalized"], ["<region1> (--box)", "normalized"]),
        ([*ASK, "--mask", "mask_small.png"], ["<region1>", "60 x 40", "60 x 20"]),
        ([*ASK, "--box", "0.1,0.1,0.5,0.5"], ["<region1>", "--normalized"]),
        ([*ASK, "--rle", "rle_broken.json"], ["JSON", "rle_broken.json"]),
        # questions, expressions, choices
        (["ask", "photo.png", "What is <region2>?", *BOX], ["<region2>", "1 region was given"]),
        (["ask", "photo.png", "What is <regionx>?", *BOX], ["<regionx>"]),
        (["ask", "photo.png", "", *BOX], ["question", "''"]),
        (["ask", "photo.png", "caf\udce9?"], ["UTF-8"]),
        (["classify", "photo.png", *BOX, "--choices", "cat,cat"], ["'cat' more than once"]),
        (["classify", "photo.png", *BOX, "--label-set", "LVIS"], ["COCO-80"]),
        (["locate", "photo.png", *BOX], ["an image and an expression"]),
        (["locate", "photo.png", "a cup"], ["expected regions"]),
        # proposals
        (DESCRIBE, ["--proposals, --grid, --sam, --box"]),
        ([*DESCRIBE, "--grid", "2", "--proposals", "boxes.json"], ["--proposals goes without --grid and --sam"]),
        ([*DESCRIBE, "--grid", "2", "--image-id", "3"], ["--image-id goes with --proposals"]),
        ([*DESCRIBE, "--proposals", "none.json"], ["none.json"]),
        ([*DESCRIBE, "--proposals", "boxes.json", "--min-score", "0.95"], ["no region is left"]),
        ([*DESCRIBE, "other.png", "--proposals", "boxes.json", "--image-id", "5"], ["single image"]),
        ([*DESCRIBE, "--grid", "2", "--min-score", "0.5"], ["no score"]),
        ([*DESCRIBE, "--sam", "none"], ["SAM model at none"]),
        # options
        ([*ASK, *BOX, "--temperature", "-1"], ["temperature", "-1"]),
        (["classify", "photo.png", *BOX, "--top-k", "0"], ["--top-k"]),
        ([*ASK, *BOX, "--picture", "out.xyz"], ["out.xyz", ".png"]),
        ([*ASK, *BOX, "--picture", "photo.png"], ["would replace what is asked about"]),
        (["ask", "photo.png", "other.png", "What?", "--picture", "out.png"], ["single image"]),
        ([*ASK, *BOX, "--out", "out.txt"], [".jsonl"]),
        ([*ASK, *BOX, "--out", "out.jsonl", "--json"], ["leave one of them out"]),
        ([*ASK, *BOX, "--overwrite"], ["--overwrite goes with --out"]),
        ([*ASK, *BOX, "--model", "nowhere"], ["nowhere: no checkpoint folder"]),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(run, monkeypatch, arguments, parts):
    monkeypatch.setattr(RegionPredictor, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    code, out, err = run(*arguments, model=None)
    assert (code, out) == (2, "")
    assert is_one_line(err), err
    for part in parts:
        assert part in err, err


# ---------------------------------------------------------------------------------------------------------------------
# Many images


def test_an_image_that_cannot_be_used_among_many_is_skipped_and_counted(run, tmp_path):
    code, out, err = run("ask", "images", "images/none.png", QUESTION, *BOX, *SHORT)
    assert code == 1
    assert [line.split(": ")[0] for line in out.splitlines()] == ["images/a.png", "images/b.jpg", "images/c.webp"]
    errors = err.splitlines()
    assert ["broken.jpg" in errors[0], "none.png" in errors[1]] == [True, True]
    assert errors[2].endswith("2 of 5 images were skipped")
    many = ["--out", str(tmp_path / "found.jsonl"), "--box", "10,5,50,35", "--grid", "24"]
    code, out, err = run("locate", "photo.png", "images", "the cat", *many)
    assert (code, err.count("question too long")) == (1, 4), err
    Image.new("RGB", (10, 10)).save(tmp_path / "small.png")
    words = ["photo.png", str(tmp_path / "small.png"), "--box", "30,5,50,35", "--choices", "cat,dog", "--json"]
    code, out, err = run("classify", *words)
    assert (code, json.loads(out)["image"]) == (1, "photo.png")
    assert "small.png: <region1> (--box)" in err


@pytest.mark.parametrize(
    ("verb", "words"),
    [("ask", [QUESTION, *SHORT]), ("describe", SHORT), ("classify", ["--choices", "cat,dog"]), ("locate", ["a cup"])],
)
def test_a_run_that_is_stopped_is_resumed(run, monkeypatch, tmp_path, verb, words):
    out, answer, asked = tmp_path / "out.jsonl", getattr(RegionPredictor, verb), []
    command = [verb, "images/a.png", "images/b.jpg", "images/c.webp", *words, *TWO, "--out", str(out)]

    def stopped(*arguments, **options):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(*arguments, **options)

    monkeypatch.setattr(RegionPredictor, verb, stopped)
    assert run(*command)[0] == 130
    first = out.read_text()
    out.write_text(first + '{"image": "images/b.j')  # as a kill may leave it
    code, told, _ = run(*command)
    assert (code, len(asked), told) == (0, 4, f"{out}: 3 of 3 images\n")
    assert out.read_text().startswith(first)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(record["image"]).name for record in records] == ["a.png", "b.jpg", "c.webp"]
    assert all(len(record["regions"]) == 2 for record in records)
    assert run(*command)[0] == 0
    assert len(asked) == 4, "all images were answered"


def test_results_replace_nothing_unless_told(run, tmp_path):
    out = tmp_path / "out.jsonl"
    words = ["ask", "photo.png", "What?", *SHORT, "--out", str(out)]
    for content in ("mine", "mine\n", '{"image": "photo.png", "request": "another"}\n'):
        out.write_text(content)
        code, _, err = run(*words)
        assert (code, out.read_text()) == (2, content)
        assert "--overwrite" in err
    assert run(*words, "--overwrite")[0] == 0
    assert json.loads(out.read_text())["question"] == "What?"
    assert run(*words, "--temperature", "1")[0] == 2, "answers of another request"


# ---------------------------------------------------------------------------------------------------------------------
# chat, weights, and what all commands share


@pytest.fixture
def chat(run, monkeypatch: pytest.MonkeyPatch):
    def call(lines: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return run("chat", "photo.png", *arguments, *SHORT)

    return call


def test_chat_answers_line_by_line_and_goes_on_after_an_error(chat):
    code, out, err = chat("What is <region1>?\n\nAnd <region2>?\nexit\nnot asked\n", *BOX, "--point", "9,9")
    assert (code, out.count("\n"), err) == (0, 2, "")
    code, out, err = chat("What is <region3>?\nWhat is <region1>?", *BOX)
    assert (code, out.count("\n"), is_one_line(err), "<region3>" in err) == (1, 1, True, True)


def test_weights_create_then_ask(run, tmp_path):
    vision, language = map(str, make_parts(tmp_path))
    out, parts = str(tmp_path / "made"), ["--vision", vision, "--language", language]
    assert run("weights", "create", *parts, "--out", out, "--refinement", "bilinear", model=None)[0] == 0
    code, _, err = run(*ASK, *BOX, *SHORT, model=out)
    assert code == 2
    assert "untrained" in err
    assert run(*ASK, *BOX, *SHORT, "--untrained", model=out)[1].strip()
    for arguments, part in (
        ([*parts, "--out", out], "empty folder"),
        ([*parts, "--llava", vision], "--llava"),
        (["--vision", str(tmp_path / "nowhere"), "--language", language], "nowhere"),
    ):
        code, _, err = run("weights", "create", "--out", str(tmp_path / "new"), *arguments, model=None)
        assert (code, is_one_line(err), part in err) == (2, True, True), err


MISTAKES = {
    "serve": ["--port x"],
    "train": [
        "table6_non",
        "/etc",
        "finetune_records --stage2.epoch 8",
        "finetune_records --data.mixture nowhere",
        "finetune_records --data.mixture . --model.init nowhere",
        "vicuna7b_stage2 --data.root .",
    ],
    "ablate": [
        "nothing nano --out x",
        "refinement nano --out x --data.root nowhere",
        "refinement nano --out x --variants cubic,none",
        "refinement nano --out x --eval.limits 3",
        "refinement nano --out x --stage2.lr nan",
        "refinement nano --out x --debug --task pope",
    ],
}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_and_mistakes_do_without_torch(verb, tmp_path):
    """Start-up stays fast because nothing heavy is imported before it is needed."""
    mistakes = [["x.jpg", "--bogus"], ["x.jpg", "What?"], *(line.split() for line in MISTAKES.get(verb, ()))]
    script = (
        "import sys; from regiongpt import cli\n"
        f"assert all(cli.main(['{verb}', *words]) == 2 for words in {mistakes})\n"
        f"try: cli.main(['{verb}', '--help'])\n"
        "except SystemExit as left: assert left.code == 0\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=False, text=True)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (0, len(mistakes)), done.stderr
    assert all(line.startswith("regiongpt: error: ") for line in lines)
    assert f"usage: regiongpt {verb}" in done.stdout


def test_a_model_loads_without_the_parts_of_transformers_that_it_never_uses():
    """A third of a second of a cold start."""
    script = (
        "import sys; from regiongpt.inference import over_images\n"
        "predictor = over_images.load_predictor(over_images.ModelOptions())\n"
        "from transformers import utils\n"
        "assert utils.is_accelerate_available() and predictor.engine.model\n"
        "print([name for name in ('scipy.optimize', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_ctrl_c_and_a_closed_pipe_end_quietly(run, monkeypatch):
    def raise_this(error: type[BaseException]):
        def handler(*_):
            raise error

        return handler

    monkeypatch.setitem(cli.VERBS, "ask", ("", raise_this(KeyboardInterrupt)))
    code, _, err = run(*ASK)
    assert (code, err.strip()) == (130, "")
    redirected = []
    monkeypatch.setitem(cli.VERBS, "ask", ("", raise_this(BrokenPipeError)))
    monkeypatch.setattr(os, "dup2", lambda *fds: redirected.append(fds))
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert cli.main(ASK) == 141
    assert len(redirected) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "coco_cls", "--data", ".", "--out", "runs"],
        ["evaluate", "pope", "--data", ".", "--images", ".", "--out", "runs"],
        ["convert", "llava", "--data", "a.json", "--images", ".", "--out", "records"],
    ],
)
def test_a_seed_is_refused_where_nothing_is_drawn(words, capsys):
    assert cli.main([*words, "--seed", "1"]) == 2
    assert "unrecognized arguments: --seed 1" in capsys.readouterr().err

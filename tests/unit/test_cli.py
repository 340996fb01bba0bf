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

QUESTION = "What is <region1>?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of photograph and region file, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    photo.save(folder / "photo.jpg")
    (folder / "text.jpg").write_text("no image at all")
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:20]).save(folder / "mask_small.png")
    (folder / "rle.json").write_text(json.dumps({"size": [40, 60], "counts": [100, 200, 2100]}))
    (folder / "rle_broken.json").write_text("{")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs one command line in the folder of the files; returns exit code, standard output and standard error."""
    monkeypatch.chdir(files)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def ask(run, checkpoint: Path):
    model = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "4"]
    return lambda *arguments: run("ask", *model, *arguments)


def is_one_line(err: str) -> bool:
    return err.startswith("regiongpt: error: ") and err.endswith("\n") and err.count("\n") == 1


def test_ask_prints_the_answer_alone(ask):
    code, out, err = ask("photo.jpg", QUESTION, "--box", "5,5,30,30")
    assert (code, err) == (0, "")
    assert out.strip()


def test_regions_are_numbered_as_typed_across_kinds(ask):
    code, out, err = ask(
        "photo.jpg",
        "--point",
        "9,9",
        "--box",
        "-5,-5.5,30,30",
        "Compare <region1>, <region2>, <region3>, <region4>, <region5>, <region6> and <region7>.",
        "--mask",
        "mask.png",
        "--json",
        "--polygon",
        "-1,5,20,5,20,30",
        "--rle",
        "rle.json",
        "--box=1,2,3,4",
        "--scribble",
        "5,5,30,30",
    )
    assert (code, err) == (0, "")
    record = json.loads(out)
    kinds = [next(iter(region)) for region in record["regions"]]
    assert kinds == ["point", "box", "mask", "polygon", "rle", "box", "scribble"]
    assert record["regions"][1] == {"box": [-5, -5.5, 30, 30]}
    assert set(record) >= {"image", "question", "answer", "cited", "warnings", "seconds"}


def test_a_mask_with_soft_edges_is_said_once(ask, files):
    soft = np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))
    Image.fromarray(soft).save(files / "mask_soft.png")
    code, out, err = ask("photo.jpg", QUESTION, "--mask", "mask_soft.png", "--json")
    assert code == 0
    assert err.count("more than two values") == err.count("\n") == 1
    from regiongpt.regions import Region

    assert Region.from_dict(json.loads(out)["regions"][0]) == Region.mask(soft >= 128)


def test_boxes_in_fractions_of_the_image(ask):
    answers = [
        ask("photo.jpg", QUESTION, *words)
        for words in (
            ["--box", "6,10,30,30"],
            ["--normalized", "--box", "0.1,0.25,0.5,0.75"],
        )
    ]
    assert len(set(answers)) == 1
    assert answers[0][0] == 0


@pytest.mark.parametrize(
    ("option", "pixels", "fractions"),
    [
        ("--polygon", "6,10,30,10,30,30", "0.1,0.25,0.5,0.25,0.5,0.75"),
        ("--point", "30,20", "0.5,0.5"),
        ("--scribble", "6,10,30,30", "0.1,0.25,0.5,0.75"),
    ],
)
def test_fractions_of_the_image_for_every_kind_with_numbers(ask, option, pixels, fractions):
    expected = json.loads(ask("photo.jpg", QUESTION, option, pixels, "--json")[1])["regions"]
    assert json.loads(ask("photo.jpg", QUESTION, option, fractions, "--normalized", "--json")[1])["regions"] == expected


def test_a_question_that_begins_with_a_dash_goes_behind_two(ask):
    assert ask("--box", "5,5,30,30", "photo.jpg", "--", "-what is <region1>?")[0] == 0


def test_a_region_never_mentioned_is_a_warning(ask):
    code, out, err = ask("photo.jpg", "What is <region2>?", "--box", "5,5,30,30", "--point", "9,9")
    assert code == 0
    assert out.strip()
    assert err.startswith("regiongpt: warning: ")
    assert "<region1>" in err
    assert err.count("\n") == 1


BOX = ["--box", "5,5,30,30"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        # photographs
        (["nowhere.jpg", QUESTION, *BOX], ["nowhere.jpg", "no such file"]),
        (["empty", QUESTION, *BOX], ["empty", "no image"]),
        (["text.jpg", QUESTION, *BOX], ["text.jpg", "expected an image"]),
        # boxes, polygons, points, scribbles
        (["photo.jpg", QUESTION, "--box", "30,30,5,5"], ["<region1>", "--box", "inverted"]),
        (["photo.jpg", QUESTION, "--box", "a,b,c,d"], ["<region1> (--box)", "X0,Y0,X1,Y1", "'a,b,c,d'"]),
        (["photo.jpg", QUESTION, "--box"], ["--box", "expected one argument"]),
        (["photo.jpg", QUESTION, *BOX, "--polygon", "1,1,9,9"], ["<region2>", "at least 3 points", "got 2"]),
        (["photo.jpg", QUESTION, "--point", "5"], ["<region1>", "2 numbers", "got 1"]),
        (["photo.jpg", QUESTION, "--box", "5,5,30,30", "--normalized"], ["<region1> (--box)", "normalized"]),
        (["photo.jpg", QUESTION, "--point", "5,5", "--normalized"], ["<region1> (--point)", "normalized"]),
        (["photo.jpg", QUESTION, "--mask", "mask.png", "--normalized"], ["--normalized"]),
        # masks and run lengths
        (["photo.jpg", QUESTION, "--mask", "mask_small.png"], ["<region1>", "60 x 40", "60 x 20"]),
        (["photo.jpg", QUESTION, "--mask", "text.jpg"], ["<region1>", "text.jpg", "expected an image"]),
        (["photo.jpg", QUESTION, "--box", "0.1,0.1,0.5,0.5"], ["<region1>", "--normalized"]),
        (["photo.jpg", QUESTION, "--rle", "rle_broken.json"], ["JSON", "rle_broken.json"]),
        # questions
        (["photo.jpg", "What is <region2>?", *BOX], ["<region2>", "1 region was given"]),
        (["photo.jpg", "What is <regionx>?", *BOX], ["<regionx>"]),
        (["photo.jpg", "", *BOX], ["question", "''"]),
        # options
        (["photo.jpg", QUESTION, *BOX, "--temperature", "-1"], ["temperature", "-1"]),
        (["photo.jpg", QUESTION, *BOX, "--seed", "x"], ["--seed", "'x'"]),
        (["photo.jpg", QUESTION, *BOX, "--picture", "out.xyz"], ["out.xyz", ".png"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(ask, arguments, parts):
    code, out, err = ask(*arguments)
    assert code == 2
    assert out == ""
    assert is_one_line(err), err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err


@pytest.fixture
def chat(run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def call(lines: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        model = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "4"]
        return run("chat", "photo.jpg", *arguments, *model)

    return call


def test_chat_answers_line_by_line(chat):
    code, out, err = chat("What is <region1>?\n\nAnd <region2>?\nexit\nnot asked\n", *BOX, "--point", "9,9")
    assert (code, err) == (0, "")
    assert out.count("\n") == 2


def test_an_error_does_not_end_a_chat(chat):
    code, out, err = chat("What is <region3>?\nWhat is <region1>?", *BOX)
    assert code == 1
    assert is_one_line(err)
    assert "<region3>" in err
    assert out.count("\n") == 1


def test_weights_create_then_ask(run, tmp_path):
    vision, language = make_parts(tmp_path)
    out = tmp_path / "made"
    parts = ["--vision", str(vision), "--language", str(language)]
    assert run("weights", "create", *parts, "--out", str(out), "--refinement", "bilinear")[0] == 0
    ask = ("ask", "photo.jpg", QUESTION, *BOX, "--model", str(out), "--max-new-tokens", "2")
    code, _, err = run(*ask)
    assert code == 2
    assert "untrained" in err
    code, answer, _ = run(*ask, "--untrained")
    assert code == 0
    assert answer
    code, _, err = run("weights", "create", *parts, "--out", str(out))
    assert code == 2
    assert "empty folder" in err
    for arguments, part in (
        ([*parts, "--refinement", "cubic"], "cubic"),
        ([*parts, "--chat-template", "alpaca"], "alpaca"),
        (["--vision", str(vision)], "--language"),
        ([*parts, "--llava", str(vision)], "--llava"),
        (["--vision", str(tmp_path / "nowhere"), "--language", str(language)], "nowhere"),
    ):
        code, _, err = run("weights", "create", *arguments, "--out", str(tmp_path / "new"))
        assert code == 2
        assert is_one_line(err), err
        assert part in err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_and_mistakes_do_without_torch(verb):
    """Start-up stays fast because nothing heavy is imported before it is needed."""
    script = (
        "import sys; from regiongpt import cli\n"
        f"assert [cli.main(['{verb}', *words]) for words in (['x.jpg', '--bogus'], ['x.jpg', 'What?'], [])] != 0\n"
        f"try: cli.main(['{verb}', '--help'])\n"
        "except SystemExit as left: assert left.code == 0\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert f"usage: regiongpt {verb}" in done.stdout


def test_ctrl_c_and_a_closed_pipe_end_quietly(run, monkeypatch):
    def raise_this(error: type[BaseException]):
        def handler(*_):
            raise error

        return handler

    monkeypatch.setitem(cli.VERBS, "ask", ("", raise_this(KeyboardInterrupt)))
    code, _, err = run("ask", "photo.jpg", QUESTION)
    assert (code, err.strip()) == (130, "")
    redirected = []
    monkeypatch.setitem(cli.VERBS, "ask", ("", raise_this(BrokenPipeError)))
    monkeypatch.setattr(os, "dup2", lambda *fds: redirected.append(fds))
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert cli.main(["ask", "photo.jpg", QUESTION]) == 141
    assert len(redirected) == 1

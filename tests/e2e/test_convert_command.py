"""The verb `convert` as a person types it, on files in their true layout, up to `inspect` of what it made."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from regiongpt import cli
from regiongpt.data.shards import RecordSet
from regiongpt.data.sources import CONVERTERS, load_converter

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("REGIONGPT_DATA", ROOT.parent / "shared" / "data"))
PHOTOS = DATA / "coco_photos"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures; COCO files of them, one with six things wrong; json lines."""
    root = tmp_path_factory.mktemp("files")
    (root / "images").mkdir()
    images = []
    for number in (1, 2, 3):
        Image.new("RGB", (80, 60), (40 * number, 90, 60)).save(root / "images" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 80, "height": 60})
    categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]

    def annotation(number: int, image: int, category: int, *box: float) -> dict[str, Any]:
        return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0}

    good = [annotation(n, 1 + n % 3, 17 + n % 2, 3 * n, 5, 20, 20) for n in range(1, 13)]
    whole = {"images": images, "annotations": good, "categories": categories}
    (root / "good.json").write_text(json.dumps(whole))
    bad = [
        annotation(20, 1, 17, 5, 5, 0, 9),
        annotation(21, 1, 17, 500, 5, 9, 9),
        annotation(22, 1, 99, 5, 5, 9, 9),
        annotation(23, 9, 17, 5, 5, 9, 9),
        annotation(1, 1, 17, 5, 5, 9, 9),
        annotation(24, 1, 17, float("nan"), 5, 9, 9),
    ]
    lost = {"id": 4, "file_name": "4.jpg", "width": 80, "height": 60}
    faulty = {**whole, "images": [*images, lost], "annotations": good + bad}
    (root / "bad.json").write_text(json.dumps(faulty))
    lines = [
        {
            "id": n,
            "image": f"{n}.jpg",
            "regions": [{"box": [2, 2, 30, 30], "category": "cat"}],
            "conversation": [{"task": "caption", "regions": [1], "answer": f"a cat in picture {n}"}],
        }
        for n in (1, 2, 3)
    ]
    (root / "own.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return root


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(files)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(list(map(str, arguments)))
        except SystemExit as leaving:  # argparse's way out of --help
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


COCO = ["convert", "coco", "--images", "images", "--instances"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}


def test_a_source_becomes_records_that_can_be_taught(run, tmp_path: Path):
    out = tmp_path / "records"
    code, printed, err = run(*COCO, "good.json", "--out", out)
    assert (code, err) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == "coco: 3 records, 3 images, 12 regions, 12 turns"
    assert re.fullmatch(rf"{re.escape(str(out))}: 1 shard, [\d.]+ MB; [\d.]+ s", lines[1])
    assert lines[2:] == ["nothing left out"]
    assert run("inspect", out, "--check")[:2] == (0, "3 records checked: every one can be taught\n")
    rows = load_dataset("parquet", data_files=str(out / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 3
    assert pq.read_schema(out / "records-00000.parquet").metadata[b"regiongpt_schema_version"] == b"1"


def test_what_is_left_out_is_counted_by_kind(run, tmp_path: Path):
    out = tmp_path / "records"
    code, printed, err = run(*COCO, "bad.json", "--out", out)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {*lines[0]} == {"kind", "file", "record", "reason"}
    assert all(line["file"] == "bad.json" and line["reason"] for line in lines)
    assert f"{len(lines)} left out, each with its reason in {out}/rejects.jsonl:" in printed
    counted = {kind: int(count) for count, kind in re.findall(r"^ +(\d+)  (.+)$", printed, re.MULTILINE)}
    assert sum(counted.values()) == len(lines)
    assert counted == json.loads((out / "manifest.json").read_text())["rejects"]
    for kind in ("box without size", "box outside the image", "unknown category", "duplicate id", "image file missing"):
        assert counted[kind] == 1, counted
    assert {kind for kind in counted if "finite" in kind}
    assert "12 regions" in printed, "whatever is good is kept"
    assert run("inspect", out)[1].count("box without size") == 1


def test_strict_fails_at_the_first(run, tmp_path: Path):
    code, printed, err = run(*COCO, "bad.json", "--out", tmp_path / "records", "--strict")
    assert (code, printed) == (2, "")
    assert err.startswith("regiongpt: error: bad.json, record ")
    assert err.count("\n") == 1
    assert run("inspect", tmp_path / "records")[0] == 2, "nothing is left that could be taken for a finished conversion"


def test_what_is_there_is_not_lost(run, tmp_path: Path):
    out = tmp_path / "records"
    assert run(*COCO, "good.json", "--out", out)[0] == 0
    before = content(out)
    code, printed, _ = run(*COCO, "good.json", "--out", out)
    assert code == 0
    assert "already converted, nothing to do" in printed
    for changed in (["good.json", "--seed", 1], ["bad.json"]):
        code, _, err = run(*COCO, *changed, "--out", out)
        assert code == 2
        assert "--overwrite" in err
    assert content(out) == before
    code, printed, _ = run(*COCO, "good.json", "--seed", 1, "--out", out, "--overwrite")
    assert code == 0
    assert "already" not in printed
    assert RecordSet(out).manifest.arguments["seed"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="shards have a process of their own on Linux")
def test_a_run_that_is_stopped_is_completed_by_the_same_command(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    # What a shell starts in the background would not hear the signal.
    request.addfinalizer(
        partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
    )
    command = [*COCO, "good.json", "--out"]
    assert run(*command, tmp_path / "whole")[0] == 0
    write_table = pq.write_table

    def stopped(table: Any, path: Path, **options: Any) -> None:
        write_table(table, path, **options)
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)  # the one that waits for this process ends it

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", stopped)
        assert run(*command, tmp_path / "stopped")[0] == 130
    assert [path.name for path in (tmp_path / "stopped").glob("records-*")] == []
    code, _, err = run("inspect", tmp_path / "stopped")
    assert code == 2
    assert "`regiongpt convert` to its end" in err
    assert run(*command, tmp_path / "stopped")[0] == 0
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_options_arrive_as_typed(run, files: Path, tmp_path: Path):
    code, _, _ = run(
        *COCO, "good.json", files / "bad.json", "--no-check-images", "--shapes", "both", "--out", tmp_path / "records"
    )
    assert code == 0
    arguments = RecordSet(tmp_path / "records").manifest.arguments
    assert arguments["instances"] == ["good.json", "bad.json"]
    assert arguments["check_images"] is False
    assert arguments["shapes"] == "both"
    assert arguments["images"] == "images"


def test_help_lists_every_source_and_each_its_options(run):
    code, printed, _ = run("convert", "--help")
    assert code == 0
    for name in CONVERTERS:
        assert re.search(rf"^    {name}\b", printed, re.MULTILINE)
        code, own, _ = run("convert", name, "--help")
        assert code == 0
        flat = " ".join(own.split())
        for option, field in load_converter(name).model_fields.items():
            assert f"--{option.replace('_', '-')}" in flat
            assert re.sub(r"\s", "", str(field.description)) in re.sub(r"\s", "", own)
        assert "--strict" in flat


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["convert"], ["SOURCE"]),
        (["convert", "imagenet"], ["'imagenet'", "coco", "jsonl"]),
        (["convert", "coco", "--images", "images", "--out", "x"], ["--instances"]),
        ([*COCO, "good.json"], ["--out"]),
        ([*COCO, "good.json", "--out", "x", "--sed", "1"], ["--sed"]),
        ([*COCO, "good.json", "--out", "x", "--seed", "one"], ["--seed", "'one'"]),
        ([*COCO, "good.json", "--out", "x", "--shapes", "round"], ["shapes", "round"]),
        ([*COCO, "none.json", "--out", "x"], ["none.json"]),
        ([*COCO, "good.json", "--images", "nowhere", "--out", "x"], ["nowhere"]),
        ([*COCO, "good.json", "--out", "good.json"], ["good.json"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, arguments: list[str], parts: list[str]):
    code, printed, err = run(*arguments)
    assert (code, printed) == (2, "")
    assert err.startswith("regiongpt: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_without_the_libraries_it_says_which_extra_to_install(run, monkeypatch: pytest.MonkeyPatch):
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else whole(name, *rest)
    )
    for command in ([*COCO, "good.json", "--out", "x"], ["inspect", "x"]):
        code, _, err = run(*command)
        assert code == 2
        assert "pyarrow" in err
        assert "pip install '.[data]'" in err


def test_help_does_without_torch():
    script = (
        "import sys, contextlib; from regiongpt import cli\n"
        "for verb in (['convert'], ['convert', 'coco'], ['inspect']):\n"
        "    with contextlib.suppress(SystemExit): cli.main([*verb, '--help'])\n"
        "sys.exit(bool({'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0

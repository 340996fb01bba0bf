"""The verb `convert` as a person types it, on files in their true layout, up to `inspect` of what it made."""

import importlib.util
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from converting import annotation, write_coco
from PIL import Image

from regiongpt import cli
from regiongpt.data.shards import RecordSet
from regiongpt.data.sources import CONVERTERS, load_converter


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures; COCO files of them, one with three things wrong."""
    root = tmp_path_factory.mktemp("files")
    good = [annotation(n, [3 * n, 5, 3, 9], image=1 + n % 2) for n in range(1, 13)]
    write_coco(root, good, name="good.json")
    bad = [annotation(20, [5, 5, 0, 9]), annotation(21, [500, 5, 9, 9]), annotation(22, [5, 5, 9, 9], category=99)]
    write_coco(root, good + bad, name="bad.json")
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main(list(map(str, arguments)))
        except SystemExit as leaving:  # argparse's way out of --help
            code = int(leaving.code or 0)
        return code, *capsys.readouterr()

    return call


COCO = ["convert", "coco", "--images", "images", "--instances"]


def test_a_source_becomes_records_that_can_be_taught(run, tmp_path: Path):
    out = tmp_path / "records"
    code, printed, err = run(*COCO, "good.json", "--out", out)
    assert (code, err) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == "coco: 2 records, 2 images, 12 regions, 12 turns"
    assert re.fullmatch(rf"{re.escape(str(out))}: 1 shard; [\d.]+ s", lines[1])
    assert lines[2:] == ["nothing left out"]
    assert run("inspect", out, "--check")[:2] == (0, "2 records checked: every one can be taught\n")
    assert pq.read_table(out / "records-00000.parquet").num_rows == 2
    assert pq.read_schema(out / "records-00000.parquet").metadata[b"regiongpt_schema_version"] == b"1"


def test_what_is_left_out_is_counted_by_kind(run, tmp_path: Path):
    out = tmp_path / "records"
    code, printed, err = run(*COCO, "bad.json", "--out", out)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert all({*line} == {"kind", "file", "record", "reason"} and line["file"] == "bad.json" for line in lines)
    counted = {kind: int(count) for count, kind in re.findall(r"^ +(\d+)  (.+)$", printed, re.MULTILINE)}
    assert counted == json.loads((out / "manifest.json").read_text())["rejects"]
    assert len(counted) == len(lines) == 3
    assert "12 regions" in printed, "whatever is good is kept"


def test_images_are_measured_as_they_are_now(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the same relative name, in another folder or written anew in the same process."""
    for size, regions in (((50, 20), 0), ((40, 20), 12)):
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / folder)
            write_coco(Path(), [annotation(n, [3 * n, 5, 3, 9]) for n in range(1, 13)])
            for number in (1, 2):
                Image.new("RGB", size).save(f"images/{number}.png")
            code, printed, err = run(*COCO, "instances.json", "--out", "records", "--overwrite")
            assert (code, err) == (0, "")
            assert f" {regions} regions" in printed


def test_strict_fails_at_the_first(run, tmp_path: Path):
    code, printed, err = run(*COCO, "bad.json", "--out", tmp_path / "records", "--strict")
    assert (code, printed, (tmp_path / "records").exists()) == (2, "", False)
    assert err.startswith("regiongpt: error: bad.json, record ")


def test_what_is_there_is_not_lost(run, tmp_path: Path):
    out = tmp_path / "records"
    assert run(*COCO, "good.json", "--out", out)[0] == 0
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    code, printed, _ = run(*COCO, "good.json", "--out", out)
    assert code == 0
    assert "already converted, nothing to do" in printed
    for changed in (["good.json", "--seed", 1], ["bad.json"]):
        code, _, err = run(*COCO, *changed, "--out", out)
        assert code == 2
        assert "--overwrite" in err
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before
    code, printed, _ = run(*COCO, "good.json", "--seed", 1, "--out", out, "--overwrite")
    assert code == 0
    assert "already" not in printed
    assert RecordSet(out).manifest.arguments["seed"] == 1


def test_help_lists_every_source_and_each_its_options(run):
    code, printed, _ = run("convert", "--help")
    assert code == 0
    for name in CONVERTERS:
        assert re.search(rf"^    {name}\b", printed, re.MULTILINE)
        code, own, _ = run("convert", name, "--help")
        assert code == 0
        for option, field in load_converter(name).model_fields.items():
            assert f"--{option.replace('_', '-')}" in own
            assert re.sub(r"\s", "", str(field.description)) in re.sub(r"\s", "", own)
        assert "--strict" in own


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["convert"], ["SOURCE"]),
        (["convert", "imagenet"], ["'imagenet'", "coco", "jsonl"]),
        ([*COCO, "good.json"], ["--out"]),
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
    assert all(part in err for part in parts)


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

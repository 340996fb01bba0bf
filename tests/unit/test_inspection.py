"""What records hold is counted exactly, every fault of a folder is told, and a person sees what a model is taught."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from converting import record
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil

from regiongpt import cli
from regiongpt.data import inspection
from regiongpt.data.inspection import statistics
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import MANIFEST, RecordSet, Rejects, file_identity, schema, write_records
from regiongpt.errors import CheckpointError, DataError
from regiongpt.model.processing import RegionGPTProcessor, prepare_tokenizer
from regiongpt.prompts import CHAT_TEMPLATES, NO_MATCH
from regiongpt.regions import Region

WIDTH, HEIGHT = 200, 100


def made(
    name: str, regions: list, turns: list[Turn], image: str = "a.png", size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Record:
    return record(name, *regions, image=image, size=size, turns=tuple(turns), source="hand")


def classify(number: int, answer: str) -> Turn:
    return Turn(task="classify", answer=answer, regions=(number,), label_set="COCO-80", guided=True)


CAT, DOG = (Region.box(0, 0, 20, 10), "cat"), (Region.box(100, 0, 200, 100), "dog")
MASK = (Region.rle({"size": [HEIGHT, WIDTH], "counts": [0, 50, HEIGHT * WIDTH - 50]}), "dog")
TALK = Turn(
    task="chat", question="How does <region1> relate to <region2>?", answer="It is left of it.\n\nNaïve 日本 🙂."
)
WHICH = Turn(task="locate", answer=NO_MATCH, regions=(1, 2), expression="a bird", guided=True)
RECORDS = [
    made("two", [CAT, DOG], [classify(1, "cat"), classify(2, "dog")]),
    made("talk", [CAT, MASK], [TALK], image="b.png"),
    made("which", [CAT, DOG], [WHICH]),
    made("text", [], [Turn(task="chat", question="Hi?", answer="A \x1b[31m<b>red</b> day.")], image=""),
]


def write(folder: Path, records: list[Record], images: Path) -> Path:
    rejects = Rejects()
    rejects.add("box without size", "instances.json", 7, "expected a width")
    write_records(folder, records, rejects, source="hand", images=str(images), inputs=[], arguments={})
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for name, level in (("a.png", 90), ("b.png", 200)):
        pixels = np.stack([np.full_like(rows, level), columns, 2 * rows], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("records") / "good", RECORDS, images)


@pytest.fixture(scope="module")
def processor() -> RegionGPTProcessor:
    return inspection.load_processor()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["inspect", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def rows_of(tables: list, header: str) -> dict[str, list[str]]:
    (table,) = (table for _, table in tables if table[0][0] == header)
    return {row[0]: row[1:] for row in table[1:]}


def test_the_statistics_are_those_counted_by_hand():
    tables = statistics("hand", RECORDS, {"box without size": 1})
    assert tables[0][1][0][1:4] == ["images", "regions", "average words"], "as in the paper's table"
    assert rows_of(tables, "data set") == {"hand": ["2", "6", "3.40", "2", "4", "5"]}
    assert {name: row[0] for name, row in rows_of(tables, "category").items()} == {"cat": "3", "dog": "3"}
    assert {name: row[0] for name, row in rows_of(tables, "kind of region").items()} == {"box": "5", "rle": "1"}
    assert rows_of(tables, "task") == {
        "classify": ["2", "2", "2", "1.00"],
        "chat": ["2", "0", "2", "5.50"],
        "locate": ["1", "1", "2", "4.00"],
    }
    # 200 of 20,000 pixels thrice, half the image twice, 50 pixels once.
    assert [row[0] for row in rows_of(tables, "share of the image").values()] == ["0", "0", "1", "3", "2"]
    assert rows_of(tables, "left out by the conversion") == {"box without size": ["1"]}


def test_areas_at_the_bounds_of_the_classes_and_outside():
    shapes = [(0, 0, 1, 1), (0, 0, 10, 10), (0, 0, 1000, 1000), (-9, -9, 1, 1), (9000, 0, 9999, 9)]
    turn = Turn(task="image_caption", answer="x")
    boxes = [Region.box(*shape) for shape in shapes]
    tables = statistics("hand", [made("areas", boxes, [turn], size=(1000, 1000))], {})
    assert [row[0] for row in rows_of(tables, "share of the image").values()] == ["2", "1", "0", "0", "1", "1"]


def put(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Replaces the rows of a folder behind the back of the checks that writing makes."""
    path = folder / "records-00000.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema()), path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"] = [{"file": path.name, "records": len(rows), "sha256": file_identity(path)["sha256"]}]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "region outside": ({"regions": (RecordRegion(region=Region.box(900, 0, 990, 9)),)}, "region that makes no sense"),
    "too few regions": ({"regions": ()}, "region that makes no sense"),
    "no answer": ({"turns": (classify(1, " "),)}, "record without a lesson"),
    "no expression": ({"turns": (Turn(task="locate", answer="Region [1]", regions=(1,)),)}, "record without a lesson"),
    "missing image": ({"image": "none.png"}, "image file missing"),
    "unreadable image": ({"image": "torn.png"}, "record without a lesson"),
    "image of another size": ({"height": 99}, "image of another size"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_fault_is_told_by_id_and_kind(name: str, images: Path, tmp_path: Path, processor: RegionGPTProcessor):
    changes, kind = BROKEN[name]
    whole = (images / "a.png").read_bytes()
    (images / "torn.png").write_bytes(whole[: len(whole) // 2])
    rows = [each.row() for each in (RECORDS[0], replace(RECORDS[0], id="hand/bad", **changes), *RECORDS[1:])]
    faults = list(inspection.check(RecordSet(put(write(tmp_path / "records", RECORDS, images), rows)), processor))
    assert [(record, fault.kind) for record, fault in faults] == [("hand/bad", kind)]
    assert faults[0][1].reason


def test_a_row_that_is_no_record_one_that_comes_twice_and_a_changed_shard(images: Path, tmp_path: Path, run):
    folder_of = write(tmp_path / "records", RECORDS, images)
    odd = RECORDS[0].row() | {"id": "hand/odd"}
    odd["regions"] = [{**odd["regions"][0], "kind": "blob"}]
    put(folder_of, [RECORDS[0].row(), odd, RECORDS[1].row(), RECORDS[1].row()])
    manifest = (folder_of / MANIFEST).read_text()
    (folder_of / MANIFEST).write_text(manifest.replace('"sha256": "', '"sha256": "0'))
    code, out, _ = run(folder_of, "--check")
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("records-00000.parquet: shard of other content: ")
    assert lines[1].startswith("hand/odd: record without a lesson: ")
    assert lines[2].startswith("hand/talk: duplicate id: ")
    assert lines[3] == "4 records checked: 3 faulty"


def test_an_answer_without_a_word_leaves_no_target(images: Path, tmp_path: Path):
    silent = replace(RECORDS[0], turns=(Turn(task="chat", question="Which of them?", answer="<region1>"),))
    folder_of = write(tmp_path / "records", [silent], images)
    # Where a region is read as its embedding alone, nothing but the end of the turn is left to be learnt.
    ((record, fault),) = inspection.check(RecordSet(folder_of), metaspace("vicuna_v1"))
    assert (record, fault.kind) == ("hand/two", "no target")


def test_a_broken_shard_is_one_line(images: Path, tmp_path: Path, run):
    shard = write(tmp_path / "records", RECORDS, images) / "records-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:2000])
    code, _, err = run(tmp_path / "records")
    assert (code, err.count("\n")) == (2, 1)
    assert "convert the source again" in err


def test_moved_images(folder: Path, images: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch):
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    assert run(folder, "--check", "--images", elsewhere)[0] == 1
    for name in ("a.png", "b.png"):
        (elsewhere / name).write_bytes((images / name).read_bytes())
    assert run(folder, "--check", "--images", elsewhere)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert run(folder, "--check", "--images", "moved")[0] == 0, "a relative path is that of where one is"


def test_a_record_is_found_by_place_and_by_id(folder: Path):
    records = RecordSet(folder)
    assert [inspection.find(records, which) for which in ("0", "3", "hand/talk")] == [0, 3, 1]
    for which in ("4", "hand/nobody"):
        with pytest.raises(DataError, match=which):
            inspection.find(records, which)


def metaspace(family: str) -> RegionGPTProcessor:
    """A tokenizer of Llama's kind: a blank is part of the word behind it, and is lost where a text begins with it."""
    spelt = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    merges = [("▁", letter) for letter in "acitW"]
    vocabulary = {token: number for number, token in enumerate([*spelt, *map("".join, merges)])}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    prepare_tokenizer(tokenizer, family)
    pixels = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return RegionGPTProcessor(pixels, tokenizer, 16, 4, [8, 8], chat_template=family)


@pytest.mark.parametrize("family", [*CHAT_TEMPLATES, ""])
def test_tokens_spell_the_conversation_and_the_marked_ones_its_answers(family: str):
    processor = metaspace(family) if family else inspection.load_processor()  # of bytes
    for index, each in enumerate(RECORDS):
        encoded = inspection.encode(each, processor, 0, index)
        shown = inspection.runs(encoded, processor)
        assert sum(run.tokens for run in shown) == len(encoded["input_ids"])
        assert sum(run.tokens for run in shown if run.target) == int((encoded["labels"] >= 0).sum())
        text = re.sub(r"\[\d\](?=<region)", "", inspection.marked(shown))  # as the model of the package writes them
        for message in each.messages(0, 0, index):
            words = message["content"].removeprefix("<image>\n").replace("\x1b", "\\x1b")
            assert words in text.replace("⟧\n", "⟧")
        # Between two questions, what is marked is the answer with at most blanks and the end of its turn.
        ends = "|".join(re.escape(token.content) for token in processor.tokenizer.added_tokens_decoder.values())
        plain = [re.sub(ends, "", run.text).strip() for run in shown if run.target]
        assert plain == [turn.answer for turn in each.turns]


def test_the_terminal_sees_no_control_character_of_the_data(folder: Path, run):
    code, out, _ = run(folder, "--record", "hand/text")
    assert code == 0
    assert "\x1b" not in out
    assert r"⟦ A \x1b[31m<b>red</b> day.</s>⟧" in out


def test_the_tables_of_a_folder_and_a_gallery_that_needs_no_other_file(folder: Path, tmp_path: Path, run):
    code, out, err = run(folder)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == ["hand", "2", "6", "3.40", "2", "4", "5"]
    path = tmp_path / "page.html"
    code, out, _ = run(folder, "--html", path)
    assert code == 0
    assert "page of 4 records" in out
    page = path.read_text(encoding="utf-8")
    assert not re.findall(r"https?://|<script|<link", page)
    assert page.count("data:image/jpeg;base64,") == 3
    assert page.count("<article>") == 4
    assert "<b>red</b>" not in page, "words of the data are no markup"
    assert "&lt;b&gt;red&lt;/b&gt;" in page
    assert page.count('class="chip"') > 6
    assert page.count('class="learnt"') > 4
    assert "box without size" in page
    code, _, err = run(folder, "--html", path, "--images", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "hand/two: " in err
    assert run(folder, "--html", path, "--count", 2)[0] == 0
    assert path.read_text(encoding="utf-8").count("<article>") == 2
    assert run(folder, "--html", path, "--record", "hand/which")[0] == 0
    assert path.read_text(encoding="utf-8").count("<article>") == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--count", "3"], ["--count", "--html"]),
        (["--count", "3", "--html", "x.html", "--record", "0"], ["--count", "--record"]),
        (["--seed", "1", "--check"], ["--seed", "--record"]),
        (["--images", "."], ["--images", "--check"]),
        (["--record", "99"], ["from 0 to 3", "99"]),
        (["--html", "nowhere/x.html"], ["nowhere/x.html", "no folder"]),
        (["--check", "--model", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    folder: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(folder, *arguments)
    assert code == 2
    assert err.startswith("regiongpt: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_a_checkpoint_without_a_processor(tmp_path: Path):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        inspection.load_processor(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        inspection.load_processor(tmp_path)

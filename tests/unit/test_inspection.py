"""What records hold is counted exactly, every fault of a folder is told, and a person sees what a model is taught."""

import json
import re
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
from regiongpt.model.processing import RegionGPTProcessor, prepare_tokenizer
from regiongpt.prompts import CHAT_TEMPLATES, NO_MATCH
from regiongpt.regions import Region

WIDTH, HEIGHT = 200, 100


def made(name: str, regions: list, turns: list[Turn], image: str = "a.png") -> Record:
    return record(name, *regions, image=image, size=(WIDTH, HEIGHT), turns=tuple(turns), source="hand")


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
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(folder / name)
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:9000])
    return folder


@pytest.fixture(scope="module")
def folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("records") / "good", RECORDS, images)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["inspect", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_the_statistics_are_those_counted_by_hand(folder: Path, run):
    first, by_task, kinds, categories, rejects = statistics("hand", RECORDS, {"box without size": 1})
    assert first[0][1:4] == ["images", "regions", "average words"], "as in the paper's table"
    assert first[1] == ["hand", "2", "6", "3.40", "2", "4", "5"]
    assert by_task[1:] == [
        ["chat", "2", "0", "2", "5.50"],
        ["classify", "2", "2", "2", "1.00"],
        ["locate", "1", "1", "2", "4.00"],
    ]
    assert kinds[1:] == [["box", "5", "83.3 %"], ["rle", "1", "16.7 %"]]
    assert sorted(row[:2] for row in categories[1:]) == [["cat", "3"], ["dog", "3"]]
    assert rejects[1:] == [["box without size", "1"]]
    code, out, err = run(folder)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == first[1]


def put(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Replaces the rows of a folder behind the back of the checks that writing makes."""
    path = folder / "records-00000.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema()), path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"] = [{"file": path.name, "records": len(rows), "sha256": file_identity(path)["sha256"]}]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


OUTSIDE = (RecordRegion(region=Region.box(900, 0, 990, 9)),)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"regions": OUTSIDE}, "region that makes no sense"),
        ({"turns": (classify(1, " "),)}, "record without a lesson"),
        ({"image": "none.png"}, "image file missing"),
        ({"image": "torn.png"}, "record without a lesson"),
        ({"height": 99}, "image of another size"),
    ],
)
def test_every_fault_is_told_by_id_and_kind(changes: dict[str, Any], kind: str, images: Path, tmp_path: Path):
    rows = [each.row() for each in (RECORDS[0], replace(RECORDS[0], id="hand/bad", **changes), *RECORDS[1:])]
    records = RecordSet(put(write(tmp_path / "records", RECORDS, images), rows))
    assert [(name, fault.kind) for name, fault in inspection.check(records, metaspace("plain"))] == [("hand/bad", kind)]


def test_a_row_that_is_no_record_one_that_comes_twice_and_a_changed_shard(images: Path, tmp_path: Path, run):
    folder_of = write(tmp_path / "records", RECORDS, images)
    first, second = (each.row() for each in RECORDS[:2])
    put(
        folder_of,
        [first, {**first, "id": "hand/odd", "regions": [{**first["regions"][0], "kind": "blob"}]}, second, second],
    )
    manifest = (folder_of / MANIFEST).read_text()
    (folder_of / MANIFEST).write_text(manifest.replace('"sha256": "', '"sha256": "0'))
    code, out, _ = run(folder_of, "--check")
    assert code == 1
    told = [
        "records-00000.parquet: shard of other content",
        "hand/odd: record without a lesson",
        "hand/talk: duplicate id",
    ]
    *faults, last = out.splitlines()[:4]
    assert [": ".join(line.split(": ")[:2]) for line in faults] == told
    assert last == "4 records checked: 3 faulty"


def test_an_answer_without_a_word_leaves_no_target(images: Path, tmp_path: Path):
    silent = replace(RECORDS[0], turns=(Turn(task="chat", question="Which of them?", answer="<region1>"),))
    folder_of = write(tmp_path / "records", [silent], images)
    # Where a region is read as its embedding alone, nothing but the end of the turn is left to be learnt.
    ((record, fault),) = inspection.check(RecordSet(folder_of), metaspace("vicuna_v1"))
    assert (record, fault.kind) == ("hand/two", "no target")


def test_moved_images(folder: Path, images: Path, tmp_path: Path, run):
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    assert run(folder, "--check", "--images", elsewhere)[0] == 1
    for name in ("a.png", "b.png"):
        (elsewhere / name).write_bytes((images / name).read_bytes())
    assert run(folder, "--check", "--images", elsewhere)[0] == 0


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


def test_a_record_is_shown_and_drawn_without_control_characters(folder: Path, images: Path, tmp_path: Path, run):
    code, out, _ = run(folder, "--record", "hand/text")
    assert code == 0
    assert "\x1b" not in out
    assert r"⟦ A \x1b[31m<b>red</b> day.</s>⟧" in out
    code, out, _ = run(folder, "--record", "0", "--picture", tmp_path / "drawn.png")
    assert code == 0
    assert "[1]     box within 0, 0, 20, 10  cat\n" in out
    with Image.open(tmp_path / "drawn.png") as drawn, Image.open(images / "a.png") as plain:
        assert drawn.convert("RGB").resize(plain.size).tobytes() != plain.tobytes()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--seed", "1", "--check"], ["--seed", "--record"]),
        (["--images", "."], ["--images", "--check"]),
        (["--record", "4"], ["from 0 to 3", "4"]),
        (["--record", "hand/nobody"], ["hand/nobody"]),
        (["--record", "0", "--picture", "nowhere/x.png"], ["nowhere/x.png", "no folder"]),
        (["--record", "3", "--picture", "x.png"], ["hand/text", "no image"]),
        (["--check", "--model", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    folder: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(folder, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert all(part in err for part in parts)

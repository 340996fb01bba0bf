"""Records and shards: every kind of region comes back, the same records give the same bytes, nothing half-written."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import converting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regiongpt.data.records import Record, Turn
from regiongpt.data.shards import MANIFEST, REJECTS, Manifest, RecordSet, Rejects, file_identity, write_records
from regiongpt.errors import DataError, RegionError
from regiongpt.prompts import QUESTIONS
from regiongpt.regions import Region

WIDTH, HEIGHT = 12, 9
x, y = st.floats(0, WIDTH), st.floats(0, HEIGHT)
points = st.tuples(x, y).map(list)
strokes = st.none() | st.floats(0.5, 9)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    flat = draw(st.lists(st.booleans(), min_size=WIDTH * HEIGHT, max_size=WIDTH * HEIGHT))
    pixels = np.array(flat).reshape(HEIGHT, WIDTH)
    pixels[draw(st.integers(0, HEIGHT - 1)), draw(st.integers(0, WIDTH - 1))] = True
    return pixels


boxes = st.tuples(st.floats(0, WIDTH - 1), st.floats(0, HEIGHT - 1), st.floats(0.1, 20), st.floats(0.1, 20))
regions = st.one_of(
    boxes.map(lambda box: Region.box(box[0], box[1], box[0] + box[2], box[1] + box[3])),
    masks().map(Region.mask),
    masks().map(lambda mask: Region.rle(Region.mask(mask).to_dict()["mask"])),
    st.lists(st.lists(points, min_size=3, max_size=6), min_size=1, max_size=3).map(Region.polygon),
    st.builds(Region.point, x, y, strokes),
    st.builds(Region.scribble, st.lists(points, min_size=1, max_size=5), strokes),
)


def record(number: int, *given: Region, **changed: Any) -> Record:
    named = [(each, "dog") for each in given]
    made = converting.record(str(number), *named, image=f"{number % 7}.jpg", size=(WIDTH, HEIGHT))
    return replace(made, **changed)


def save(out: Path, records: object, rejects: Rejects | None = None, **more: object) -> Manifest:
    given = {"source": "test", "images": "photos", "inputs": [], "arguments": {"seed": 0}}
    return write_records(out, records, rejects or Rejects(), **{**given, **more})  # type: ignore[arg-type]


def some(count: int) -> list[Record]:
    return [record(k, Region.box(0, 0, 1 + k % 9, 2), Region.point(3, 3)) for k in range(count)]


@given(st.lists(regions, max_size=6))
@settings(max_examples=15, deadline=None)
def test_every_kind_of_region_survives_a_shard(tmp_path_factory, given):
    out = tmp_path_factory.mktemp("records")
    turns = tuple(Turn(task="caption", regions=(n,), answer="a dog") for n in range(1, len(given) + 1))
    written = record(0, *given, **({"turns": turns} if turns else {}))
    try:
        written.check()
    except RegionError:  # a polygon on one line
        return
    save(out, [written])
    (read,) = RecordSet(out)
    assert read == written


def test_wordings_are_drawn_from_seed_epoch_and_index():
    asked = record(0, Region.box(0, 0, 4, 4), turns=3 * (Turn(task="caption", regions=(1,), answer="a"),))
    first = asked.messages(0, 0, 0)
    assert first == asked.messages(0, 0, 0)
    assert first[0]["content"].startswith("<image>\n")
    assert [said["role"] for said in first] == ["user", "assistant"] * 3
    others = [asked.messages(*place) for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(other != first for other in others)
    seen = {asked.messages(0, epoch, 0)[2]["content"] for epoch in range(120)}
    assert seen == {question.format(regions="<region1>") for question in QUESTIONS["caption"]}


def test_the_suffix_of_a_guided_turn_can_be_left_out_and_nothing_else_with_it():
    turns = (
        Turn(task="classify", answer="dog", regions=(1,), label_set="COCO-80", guided=True),
        Turn(task="locate", answer="Region [2]", regions=(1, 2), expression="the dog", guided=True),
        Turn(task="chat", answer="Yes.", question="Is <region1> a dog? Answer yes or no."),
    )
    one = record(0, Region.box(0, 0, 4, 4), Region.box(1, 1, 4, 4), turns=turns)
    guided, bare = (one.messages(0, 0, 0, suffixes) for suffixes in (True, False))
    for number in (0, 2):
        assert guided[number]["content"].removeprefix(bare[number]["content"]).startswith(" Answer")
    assert guided[4:] == bare[4:]
    assert guided[1::2] == bare[1::2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"turns": ()}, "at least one turn"),
        ({"image": ""}, "image for the regions"),
        ({"width": 0}, "image's size"),
        ({"turns": (Turn(task="caption", regions=(1,), answer=" "),)}, "answer"),
        ({"turns": (Turn(task="caption", regions=(2,), answer="a"),)}, "region2"),
        ({"turns": (Turn(task="caption", answer="a"),)}, "needs 1 region"),
        ({"turns": (Turn(task="locate", regions=(1,), answer="a"),)}, "expression"),
    ],
)
def test_a_record_that_teaches_nothing_is_told(changed, message):
    with pytest.raises((DataError, RegionError), match=message):
        record(0, Region.box(0, 0, 4, 4), **changed).check()


def test_the_same_records_give_the_same_bytes(tmp_path):
    first, second = (save(tmp_path / name, iter(some(50)), records_per_shard=20) for name in "ab")
    assert first == second
    assert [shard["records"] for shard in first.shards] == [20, 20, 10]
    for shard in first.shards:
        assert (tmp_path / "a" / shard["file"]).read_bytes() == (tmp_path / "b" / shard["file"]).read_bytes()
        assert file_identity(tmp_path / "a" / shard["file"])["sha256"] == shard["sha256"]
    assert first.counts == {"images": 7, "records": 50, "regions": 100, "task:image_caption": 50, "turns": 50}


def test_records_are_read_by_index_and_in_order(tmp_path):
    written = some(45)
    save(tmp_path, written, records_per_shard=20)
    read = RecordSet(tmp_path)
    assert [read[k] for k in (44, 0, 21)] == [written[k] for k in (44, 0, 21)]
    assert list(read) == written
    assert read.image_path(read[3]) == tmp_path / "photos" / "3.jpg"
    assert RecordSet(tmp_path, images="/elsewhere").image_path(read[3]) == Path("/elsewhere/3.jpg")


def test_what_cannot_be_learnt_is_left_out_and_counted(tmp_path):
    good = record(1, Region.box(0, 0, 4, 4))
    outside = record(2, Region.box(50, 0, 60, 4))
    mute = record(3, turns=())
    rejects = Rejects()
    manifest = save(tmp_path, [good, outside, mute, good], rejects)
    expected = {"duplicate id": 1, "record without a lesson": 1, "region that makes no sense": 1}
    assert manifest.rejects == dict(rejects.counts) == expected
    lines = [json.loads(line) for line in (tmp_path / REJECTS).read_text().splitlines()]
    assert [line["record"] for line in lines] == ["test/2", "test/3", "test/1"]
    assert list(RecordSet(tmp_path)) == [good]
    assert rejects.summary() == "3 left out: 1 duplicate id, 1 record without a lesson, 1 region that makes no sense"
    with pytest.raises(DataError, match=r"record test/2: region that makes no sense"):
        save(tmp_path, [good, outside], Rejects(strict=True))


def test_what_a_killed_run_left_is_not_read_and_the_next_run_removes_it(tmp_path):
    left = tmp_path / ".unfinished-1"
    left.mkdir()
    (left / "records-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="run `regiongpt convert`"):
        RecordSet(tmp_path)
    written = some(15)
    save(tmp_path, written)
    assert sorted(each.name for each in tmp_path.iterdir()) == [MANIFEST, "records-00000.parquet", REJECTS]
    assert list(RecordSet(tmp_path)) == written


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    def full(writer: pq.ParquetWriter, table: object) -> None:
        real(writer, table)
        if Path(writer.where).name.startswith("records-00001"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(tmp_path / "old", some(50))
    real = pq.ParquetWriter.write_table
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    for name in ("old", "new"):
        with pytest.raises(DataError, match=r"No space left on device; free some space"):
            save(tmp_path / name, some(60), records_per_shard=20)
    assert [each.name for each in tmp_path.iterdir()] == ["old"]
    assert len(RecordSet(tmp_path / "old")) == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "not a manifest of records"),
        ({"source": 3}, "not a manifest of records: source: "),
        ({"shards": [{"file": "records-00000.parquet"}]}, "not a manifest of records: shards.0"),
        ({"schema_version": 2}, "schema version 1, got 2"),
        ({"shards": []}, f"rejected everything; see its {REJECTS}"),
    ],
)
def test_a_manifest_that_is_none_is_told(tmp_path, content, message):
    whole = save(tmp_path, some(3)).model_dump()
    (tmp_path / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(DataError, match=message):
        RecordSet(tmp_path)


def test_an_image_outside_of_the_folder_is_not_read(tmp_path):
    save(tmp_path, [replace(some(1)[0], image="../a.png")])
    records = RecordSet(tmp_path)
    with pytest.raises(DataError, match="outside the image folder"):
        records.image_path(records[0])


def test_a_missing_or_broken_shard_is_told(tmp_path):
    save(tmp_path, some(30), records_per_shard=20)
    path = tmp_path / "records-00001.parquet"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="convert the source again"):
        RecordSet(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"records-00001\.parquet.*convert the source again"):
        RecordSet(tmp_path)

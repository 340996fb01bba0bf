"""RefCOCO, RefCOCO+ and RefCOCOg from both of their layouts, and the pickles that are refused."""

import collections
import json
import os
import pickle
from pathlib import Path

import pytest
from converting import CATEGORIES, annotation, run
from PIL import Image

from regiongpt.data.reading import load_plain_pickle
from regiongpt.data.refcoco import RefCocoConverter
from regiongpt.errors import ConfigError, DataError
from regiongpt.prompts import NO_MATCH, REC_SUFFIX, parse_region_answer
from regiongpt.regions import Region

WIDTH, HEIGHT = 80, 60
NAME = "COCO_train2014_{:012d}.jpg"


def ref(number: int, ann: int, image: int, *texts: object, split: str = "train") -> dict:
    sentences = [{"sent": text, "sent_id": 10 * number + k} for k, text in enumerate(texts)]
    return {"ref_id": number, "ann_id": ann, "image_id": image, "split": split, "sentences": sentences}


def thing(number: int, image: int, box: object = None, **more: object) -> dict:
    return annotation(number, [number % 7 * 10, 4, 9, 8] if box is None else box, image, **more)


def write(folder: Path, refs: list, annotations: list, protocol: int = 2) -> RefCocoConverter:
    numbers = sorted({each["image_id"] for each in annotations})
    images = [{"id": k, "file_name": NAME.format(k), "width": WIDTH, "height": HEIGHT} for k in numbers]
    (folder / "train2014").mkdir(exist_ok=True)
    for each in images:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "train2014" / each["file_name"])
    path = folder / "refs(umd).p"
    path.write_bytes(pickle.dumps(refs, protocol=protocol))
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "instances.json").write_text(json.dumps(content))
    return RefCocoConverter(images=folder / "train2014", refs=path, instances=folder / "instances.json")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_captions_are_dialogues(tmp_path, protocol):
    refs = [
        ref(1, 101, 5, "the left dog", "a brown  dog"),
        ref(2, 102, 6, "a puppy"),
        ref(3, 103, 5, "the right dog"),
        ref(4, 104, 5, "of another split", split="val"),
    ]
    annotations = [thing(101, 5), thing(103, 5), thing(104, 5), thing(102, 6)]
    made = write(tmp_path, refs, annotations, protocol=protocol).replace(task="caption")
    records, rejects = run(made)
    assert rejects == {}
    assert [record.id for record in records] == [
        "refcoco/refcocog-umd/train/5-1/caption",
        "refcoco/refcocog-umd/train/5-2/caption",
        "refcoco/refcocog-umd/train/6-1/caption",
    ]
    first, second, _ = records
    assert (first.image, first.width, first.height) == (NAME.format(5), WIDTH, HEIGHT)
    told = [("caption", "the left dog", (1,)), ("caption", "the right dog", (2,))]
    assert [(turn.task, turn.answer, turn.regions) for turn in first.turns] == told
    assert [(each.source_id, each.category) for each in first.regions] == [("101", "dog"), ("103", "dog")]
    assert first.regions[0].region == Region.box(30, 4, 39, 12)
    assert [(turn.answer, turn.regions) for turn in second.turns] == [("a brown dog", (1,))]
    of_val, _ = run(made.replace(split="val"))
    assert [turn.answer for record in of_val for turn in record.turns] == ["of another split"]


def test_a_choice_among_regions(tmp_path):
    annotations = [thing(100 + k, 5, [7 * k, 4, 6, 5 + k]) for k in range(9)]
    refs = [ref(k, 100 + k, 5, f"dog number {k}", f"the dog {k}") for k in range(9)]
    made = write(tmp_path, refs, annotations).replace(task="locate", candidates=4, no_match_share=0.3)
    records, rejects = run(made)
    assert rejects == {}
    assert len(records) == 18
    assert records == run(made)[0]
    assert records != run(made.replace(seed=1))[0]
    places = collections.Counter()
    for record in records:
        (turn,) = record.turns
        right = str(100 + int(turn.expression.split()[-1]))
        given = [each.source_id for each in record.regions]
        assert len(set(given)) == 4
        assert turn.regions == (1, 2, 3, 4)
        assert (turn.task, turn.guided) == ("locate", True)
        assert turn.text(0).endswith(f'which one fits "{turn.expression}"? {REC_SUFFIX}')
        chosen = parse_region_answer(turn.answer)
        assert chosen == (given.index(right) + 1 if right in given else None)
        places[chosen] += 1
    assert set(places) == {1, 2, 3, 4, None}
    assert all(turn.answer != NO_MATCH for record in run(made.replace(no_match_share=0))[0] for turn in record.turns)
    none, _ = run(made.replace(no_match_share=1, candidates=20))
    assert {(record.turns[0].answer, len(record.regions)) for record in none} == {(NO_MATCH, 8)}
    both, _ = run(made.replace(task="both"))
    assert [record.turns[0].task for record in both] == ["caption"] * 2 + ["locate"] * 18


def test_what_is_no_other_region(tmp_path):
    refs = [ref(1, 101, 5, "the dog"), ref(2, 102, 5, "The  dog", "a puppy"), ref(3, 110, 6, "alone")]
    annotations = [
        thing(101, 5, [0, 0, 20, 20]),
        thing(102, 5, [40, 0, 20, 20]),
        thing(103, 5, [0, 0, 20, 20.5]),
        thing(104, 5, [30, 0, 40, 40], iscrowd=1),
        thing(110, 6),
    ]
    made = write(tmp_path, refs, annotations).replace(task="locate", no_match_share=0)
    records, rejects = run(made)
    options = {record.turns[0].expression: {each.source_id for each in record.regions} for record in records}
    # 103 is 101 again, 104 a crowd, and either of 101 and 102 is "the dog".
    assert options == {"The dog": {"102", "103"}, "a puppy": {"101", "102", "103"}}
    assert rejects == {"no other region to choose": 2}


def test_what_is_left_out(tmp_path):
    refs = [
        ref(1, 101, 5, "a dog", "", 7, "see <image>"), ref(1, 101, 5, "again"), ref(2, 999, 5, "of no annotation"),
        ref(3, 101, 77, "of no image"), ref(4, 105, 5, "without size"), ref(5, 106, 5, "of no category"),
        {**ref(6, 101, 5, "a dog"), "ann_id": None}, {**ref(7, 101, 5), "sentences": ["a dog"]}, {"split": None}, "ref",
    ]  # fmt: skip
    annotations = [thing(101, 5), thing(102, 5), thing(105, 5, [1, 2, 0, 3]), thing(106, 5, category=3)]
    made = write(tmp_path, refs, annotations)
    records, rejects = run(made)
    assert [record.id.split("train/")[1] for record in records] == ["5-1/caption", "10/locate"]
    once = ["expression empty", "expression that is not text", "placeholder in the text", "duplicate id",
            "box without size", "unknown category"]  # fmt: skip
    many = {"files that do not belong together": 4, "record of another format": 4}
    assert rejects == {**dict.fromkeys(once, 1), **many}
    elsewhere = made.replace(images=tmp_path)
    assert run(elsewhere) == ([], {**rejects, "image file missing": 1})
    assert run(elsewhere.replace(check_images=False))[0] == records


def test_files_that_do_not_belong_together(tmp_path):
    made = write(tmp_path, [ref(1, 1, 5, "a dog"), ref(2, 2, 99, "a cat")], [thing(101, 5), thing(7, 8)])
    with pytest.raises(DataError, match=r"has none of its objects"):
        run(made)
    with pytest.raises(DataError, match="no references of the split 'testA'; give --split train"):
        run(made.replace(split="testA"))
    made.instances.write_text('{"images": []}')
    with pytest.raises(DataError, match=r"instances\.json"):
        run(made)


def test_options_that_do_not_fit(tmp_path):
    made = write(tmp_path, [ref(1, 101, 5, "a dog")], [thing(101, 5)])
    for options, message in [
        ({"dataset": "refcoco"}, "partition: refcoco has unc and google, got umd"),
        ({"instances": None}, "instances: give the instances.json that belongs to"),
        ({"refs": tmp_path / "refs.p"}, r"got none \(file refs.p\); give --dataset, or --partition"),
        ({"refs": tmp_path / "finetune_refcocog_val.json"}, "split: .*holds val, got train"),
    ]:
        with pytest.raises(ConfigError, match=message):
            made.replace(**options)
    (tmp_path / "refs.p").write_bytes(made.refs.read_bytes())
    records, _ = run(made.replace(refs=tmp_path / "refs.p", dataset="refcoco", partition="unc", task="caption"))
    assert records[0].id == "refcoco/refcoco-unc/train/5-1/caption"


def mdetr(folder: Path, *rows: tuple[int, int, str], dataset: str = "refcocog") -> Path:
    """One "image" an expression, with its own running ids, and the true ones beside them."""
    images, annotations = [], []
    for k, (image, ann, caption) in enumerate(rows):
        size = {"width": WIDTH, "height": HEIGHT, "file_name": NAME.format(image)}
        images.append({"id": k, "original_id": image, **size, "caption": caption, "dataset_name": dataset})
        annotations.append({**thing(ann, k), "id": k, "original_id": ann})
    content = {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}
    path = folder / "finetune_refcocog_train.json"
    path.write_text(json.dumps(content))
    return path


def test_the_json_layout_says_the_same(tmp_path):
    refs = [ref(1, 101, 5, "the left dog", "a brown dog"), ref(2, 102, 6, "a puppy"), ref(3, 103, 5, "the right dog")]
    made = write(tmp_path, refs, [thing(101, 5), thing(103, 5), thing(102, 6), thing(104, 6)])
    rows = [(5, 101, "the left dog"), (5, 101, "a brown dog"), (6, 102, "a puppy"), (5, 103, "the right dog")]
    path = mdetr(tmp_path, *rows)
    captions, _ = run(made.replace(refs=path, task="caption"))
    assert captions == run(made.replace(task="caption"))[0]
    # By itself it knows only the objects that are referred to.
    alone, rejects = run(made.replace(refs=path, instances=None, task="locate"))
    assert [record.turns[0].expression for record in alone] == ["the left dog", "a brown dog", "the right dog"]
    assert rejects == {"no other region to choose": 1}
    together, rejects = run(made.replace(refs=path, task="locate"))
    assert len(together) == 4
    assert rejects == {}
    mdetr(tmp_path, *rows, dataset="refcoco+")
    with pytest.raises(DataError, match=r"expected expressions of 'refcocog', got 'refcoco\+'; give --dataset"):
        run(made.replace(refs=path))


def test_faults_of_the_json_layout(tmp_path):
    made = write(tmp_path, [], [thing(101, 5)])
    path = mdetr(tmp_path, (5, 101, "a dog"), (5, 101, ""), (5, 101, "a dog"), (5, 102, "a cat"), (5, 103, "x"))
    content = json.loads(path.read_text())
    content["annotations"][2] = content["annotations"][1]
    content["annotations"].append({**thing(1, 70)})
    content["annotations"][3]["bbox"] = [900, 0, 1, 1]
    content["images"][4]["original_id"] = "5"
    content["images"].append(["a dog"])
    path.write_text(json.dumps(content))
    records, rejects = run(made.replace(refs=path, instances=None, task="caption"))
    assert [turn.answer for record in records for turn in record.turns] == ["a dog"]
    once = ["expression empty", "duplicate id", "files that do not belong together", "box outside the image"]
    assert rejects == {**dict.fromkeys(once, 1), "record of another format": 2}


def test_strings_of_python_2(tmp_path):
    # {'sent': 'caf\xe9', u'raw': u'caf\xe9', 'long': 5L} as Python 2 writes it with protocol 2.
    raw = b"\x80\x02}q\x00(U\x04sentq\x01U\x04caf\xe9q\x02"
    raw += b"X\x03\x00\x00\x00rawq\x03X\x05\x00\x00\x00caf\xc3\xa9q\x04U\x04longq\x05\x8a\x01\x05u."
    (tmp_path / "a.p").write_bytes(raw)
    assert load_plain_pickle(tmp_path / "a.p") == {"sent": "café", "raw": "café", "long": 5}


class _Evil:
    def __reduce__(self):
        return os.system, ("echo harm > harm",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("content", [_Evil(), [{"sent": collections.OrderedDict()}], eval])
def test_what_asks_for_code_is_refused(tmp_path, protocol, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.p").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(DataError, match=r"a\.p: .*could run \S*(system|OrderedDict|eval)"):
        load_plain_pickle(tmp_path / "a.p")
    assert not (tmp_path / "harm").exists()


WHOLE = pickle.dumps([{"a": list(range(100))}])


@pytest.mark.parametrize(
    "raw",
    [b"cbuiltins\neval\n(S'1'\ntR.", b"(S'1'\nibuiltins\neval\n.", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
     b"\x80\x02\x82\x01.", b"Pouter\n.", b"\x80\x04\x8c\x05outerQ.", b"", b"[1, 2]", WHOLE[:-1], WHOLE[:50]],
)  # fmt: skip
def test_what_is_no_plain_pickle_is_refused(tmp_path, raw):
    (tmp_path / "a.p").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.p: not a whole pickle of plain data"):
        load_plain_pickle(tmp_path / "a.p")

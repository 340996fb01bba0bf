"""COCO files: what becomes of each object and caption, samples that are exact, and every kind of fault."""

import json
from pathlib import Path

import pytest
from converting import annotation, run, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st

from regiongpt.data.coco import load_coco, normalise_caption, photo_sources
from regiongpt.data.reading import iter_array, iter_arrays
from regiongpt.data.shards import Rejects
from regiongpt.data.sources import CocoConverter
from regiongpt.errors import DataError
from regiongpt.regions import Region

RING = [1, 1, 9, 1, 9, 8]
BOX = [0, 0, 4, 4]


def coco(folder: Path, *files: Path, **options: object) -> CocoConverter:
    given = {"images": folder / "images", "instances": files or (folder / "instances.json",)}
    return CocoConverter(**{**given, **options})  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=5), st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_array_is_read_element_by_element(tmp_path_factory, elements, indent, plain):
    path = tmp_path_factory.mktemp("json") / "a.json"
    content = {"before": [[1], {"x": "]"}], "n": 12, "wanted": elements, "after": {}}
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=plain), encoding="utf-8")
    assert list(iter_array(path, "wanted")) == elements
    assert list(iter_arrays(path, ("before", "wanted"))) == [
        *(("before", each) for each in content["before"]),
        *(("wanted", each) for each in elements),
    ]


def test_a_file_that_breaks_off_anywhere_is_no_data(tmp_path):
    path = tmp_path / "a.json"
    text = json.dumps([{"id": k, "s": "é]"} for k in range(3)] + [12], ensure_ascii=False)
    for cut in range(1, len(text)):
        path.write_text(text[:cut], encoding="utf-8")
        with pytest.raises(DataError, match=r"a\.json: .*fetch it again"):
            list(iter_array(path))


def test_a_byte_that_is_not_utf_8_costs_no_more_than_its_text(tmp_path):
    path = write_coco(tmp_path, [annotation(1, BOX), annotation(2, BOX, category=1)])
    path.write_bytes(path.read_bytes().replace(b'"name": "person"', b'"name": "\xff"'))
    (record,), rejects = run(coco(tmp_path))
    assert [each.source_id for each in record.regions] == ["1"]
    assert rejects == {"text that is not Unicode": 1, "unknown category": 1}


@pytest.mark.parametrize(
    ("content", "key"),
    [(b"", "a"), (b"<html>", "a"), (b"[1]", "a"), (b'{"a": []}', None), (b'{"b": []}', "a"), (b'{"a": null}', "a"),
     (b'{"a": []} x', "a"), (b"\xff\xfe[\0", None), (b"[" * 100_000, None), (b"[" + b"1" * 5000 + b"]", None)],
)  # fmt: skip
def test_a_file_of_another_format_is_named(tmp_path, content, key):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: "):
        list(iter_array(tmp_path / "a.json", key))


def test_objects_of_an_image_are_one_conversation_in_a_fixed_order(tmp_path):
    write_coco(
        tmp_path, [annotation(7, [30, 10, 20, 5]), annotation(3, [1, 2, 3, 4], category=1), annotation(5, RING[:4])]
    )
    (record,), rejects = run(coco(tmp_path))
    assert rejects == {}
    assert (record.id, record.image, record.width, record.height) == ("coco/1", "1.png", 40, 20)
    assert [(r.region, r.category, r.source_id) for r in record.regions] == [
        (Region.box(1, 2, 4, 6), "person", "3"),
        (Region.box(1, 1, 10, 2), "dog", "5"),
        (Region.box(30, 10, 40, 15), "dog", "7"),
    ]
    assert [(turn.regions, turn.answer) for turn in record.turns] == [((1,), "person"), ((2,), "dog"), ((3,), "dog")]
    assert record.turns[0].text(0).endswith("Answer the question using COCO-80 category names.")
    records, _ = run(coco(tmp_path, objects_per_record=2))
    assert [record.id for record in records] == ["coco/1", "coco/1/2"]
    assert [each.source_id for record in records for each in record.regions] == ["3", "5", "7"]


def test_shapes(tmp_path):
    rle = {"size": [20, 40], "counts": [100, 30, 670]}
    shapes = [[RING, [20, 1, 30, 1, 30, 9]], rle, [], rle]
    given = [annotation(k, BOX, segmentation=shape, iscrowd=int(k == 4)) for k, shape in enumerate(shapes, 1)]
    write_coco(tmp_path, given)
    polygon = Region.polygon([RING, [20, 1, 30, 1, 30, 9]])
    (boxes,), rejects = run(coco(tmp_path))
    assert [each.region.kind for each in boxes.regions] == ["box"] * 3
    assert rejects == {"crowd": 1}
    (masks,), rejects = run(coco(tmp_path, shapes="mask"))
    assert [each.region for each in masks.regions] == [polygon, Region.rle(rle)]
    assert rejects == {"crowd": 1, "object without a mask": 1}
    (both,), rejects = run(coco(tmp_path, shapes="both"))
    assert [each.region.kind for each in both.regions] == ["box", "polygon", "box", "rle", "box"]
    assert [turn.regions for turn in both.turns] == [(1,), (2,), (3,), (4,), (5,)]
    assert rejects == {"crowd": 1}


@pytest.mark.parametrize("shapes", ["box", "mask", "both"])
def test_unusable_annotations_are_left_out_and_counted(tmp_path, shapes):
    faulty = {
        "unknown category": [annotation(11, BOX, category=99)],
        "box without size": [annotation(12, [0, 0, 0, 4])],
        "box that is not four numbers": [annotation(13, [0, 0, float("nan"), 4])],
        "box outside the image": [annotation(14, [50, 0, 4, 4]), annotation(15, [39.999, 0, 4, 0.01])],
        "annotation of an absent image": [annotation(16, BOX, image=9)],
        "record of another format": [
            annotation(17, [0, 0, 4]), annotation("", BOX), annotation(18, BOX, iscrowd=2), annotation(True, BOX),
            annotation(1 << 70, BOX), [],
        ],
        "duplicate id": [annotation(2, BOX)],
    }  # fmt: skip
    good = annotation(2, BOX, segmentation=[RING])
    write_coco(tmp_path, [good, *(each for many in faulty.values() for each in many)])
    (record,), rejects = run(coco(tmp_path, shapes=shapes))
    assert rejects == {kind: len(many) for kind, many in faulty.items()}
    assert {each.source_id for each in record.regions} == {"2"}
    with pytest.raises(DataError, match="record of another format"):
        list(coco(tmp_path, shapes=shapes).records(Rejects(strict=True)))


NO_SENSE, NO_NUMBERS = "mask that makes no sense", "polygon that is not numbers"


@pytest.mark.parametrize(
    ("segmentation", "kind"),
    [
        ([[1, 1, 5, 5]], "polygon of fewer than three points"),
        ([[1, 1, 5, 5, 9]], "polygon that is not pairs"),
        *((given, NO_NUMBERS) for given in ("polygon", {"points": RING}, [RING, [1, 1, 5, 1e300, 9, 9]])),
        *((given, NO_SENSE) for given in ([[1, 1, 5, 5, 9, 9]], [[50, 1, 55, 5, 59, 9]])),
        *(({"size": [20, 40], "counts": given}, NO_SENSE) for given in ([7], [800])),
        ({"size": [40, 20], "counts": [800]}, NO_SENSE),
    ],
)
def test_a_faulty_mask_costs_no_more_than_it_must(tmp_path, segmentation, kind):
    good = annotation(1, [0, 0, 9, 9], segmentation=[RING])
    write_coco(tmp_path, [good, annotation(2, [0, 0, 9, 9], segmentation=segmentation)])
    for shapes, found, left_out in (
        ("box", [("1", "box"), ("2", "box")], {}),
        ("both", [("1", "box"), ("1", "polygon"), ("2", "box")], {kind: 1}),
        ("mask", [("1", "polygon")], {kind: 1}),
    ):
        (record,), rejects = run(coco(tmp_path, shapes=shapes))
        assert [(each.source_id, each.region.kind) for each in record.regions] == found
        assert rejects == left_out


def test_polygons_in_doubt_are_looked_at_closely(tmp_path):
    bow = [0, 0, 8, 8, 8, 0, 0, 8]
    beyond = [30, 5, 60, 5, 60, 15]
    write_coco(tmp_path, [annotation(k, [0, 0, 40, 20], segmentation=[ring]) for k, ring in enumerate((bow, beyond))])
    (record,), rejects = run(coco(tmp_path, shapes="mask"))
    assert rejects == {}
    assert [each.region for each in record.regions] == [Region.polygon([bow]), Region.polygon([beyond])]


def test_unusable_images_are_left_out_and_counted(tmp_path):
    good = {"id": 1, "file_name": "1.png", "width": 40, "height": 20}
    changed = [{}, {"id": 5, "file_name": "no.png"}, {"id": 6, "width": 0}, {"id": 7, "width": 41},
               {"id": 8, "file_name": "../images/1.png"}, {"id": 9, "file_name": "bad.png"}, {"id": None}]  # fmt: skip
    annotations = [annotation(k, BOX, image=k) for k in (1, 5)]
    write_coco(tmp_path, annotations, [good, *({**good, **each} for each in changed)])
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    (record,), rejects = run(coco(tmp_path))
    assert record.id == "coco/1"
    kinds = ["annotation of an absent image", "duplicate id", "image file missing", "image of another size",
             "image outside the folder", "image without size", "record of another format"]  # fmt: skip
    assert rejects == dict.fromkeys([*kinds, "unreadable image"], 1)
    records, rejects = run(coco(tmp_path, check_images=False))
    assert [record.id for record in records] == ["coco/1", "coco/5"]
    assert "image file missing" not in rejects


def test_what_holds_for_a_whole_file_fails(tmp_path):
    path = write_coco(tmp_path, [], categories=[{"id": 1, "name": "forklift"}])
    with pytest.raises(DataError, match=r"not of COCO-80.*'forklift'"):
        run(coco(tmp_path))
    run(coco(tmp_path, label_set="WAREHOUSE"))
    write_coco(tmp_path, [], categories=[{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}])
    with pytest.raises(DataError, match="category 1 is both"):
        run(coco(tmp_path))
    write_coco(tmp_path, [])
    other = write_coco(tmp_path, [], name="other.json", categories=[{"id": 1, "name": "dog"}])
    with pytest.raises(DataError, match=r"category 1 to be 'person' as in instances\.json"):
        run(coco(tmp_path, path, other))


def test_an_image_of_two_files_comes_from_the_first(tmp_path):
    first = write_coco(tmp_path, [annotation(1, BOX)])
    second = write_coco(tmp_path, [annotation(1, BOX, image=2), annotation(2, BOX)], name="b.json")
    records, rejects = run(coco(tmp_path, first, second))
    assert [record.id for record in records] == ["coco/1"]
    assert rejects == {"duplicate id": 2, "annotation of an absent image": 2}


def test_categories_are_capped_exactly_over_all_files(tmp_path):
    images = [{"id": k, "file_name": "1.png", "width": 40, "height": 20} for k in range(1, 41)]
    annotations = [annotation(k, [k % 30, 0, 4, 4], image=k, category=(1, 18)[k % 4 == 0]) for k in range(1, 41)]
    annotations[0]["iscrowd"] = 1
    annotations[1]["bbox"] = [0, 0, 0, 0]
    first = write_coco(tmp_path, annotations[:20], images[:20])
    second = write_coco(tmp_path, annotations[20:], images[20:], name="b.json")
    drawn = []
    for seed in (0, 0, 1):
        records, rejects = run(coco(tmp_path, first, second, boxes_per_category=12, seed=seed))
        assert rejects == {"box without size": 1, "crowd": 1}
        regions = [each for record in records for each in record.regions]
        names = [each.category for each in regions]
        assert (names.count("person"), names.count("dog")) == (12, 10)
        assert not {"1", "2"} & {each.source_id for each in regions}
        drawn.append([each.source_id for each in regions])
    assert drawn[0] == drawn[1] != drawn[2]


def write_captions(folder: Path, captions: list) -> Path:
    (folder / "captions.json").write_text(json.dumps({"images": [], "annotations": captions}))
    return folder / "captions.json"


def test_captions_are_records_of_their_own(tmp_path):
    write_coco(tmp_path, [annotation(1, BOX)])
    given = [{"id": k, "image_id": 2 - k % 2, "caption": f" A dog\n{k}."} for k in range(6)]
    captions = (write_captions(tmp_path, given),)
    records, rejects = run(coco(tmp_path, captions=captions, captions_per_image=0))
    assert rejects == {}
    spoken = [f"coco/{image}/caption/{k}" for image, numbers in ((1, (1, 3, 5)), (2, (0, 2, 4))) for k in numbers]
    assert [record.id for record in records] == ["coco/1", *spoken]
    turn = records[1].turns[0]
    assert (turn.task, turn.answer, records[1].regions) == ("image_caption", "A dog 1.", ())
    one, _ = run(coco(tmp_path, captions=captions))
    assert [record.task for record in one] == ["classify", "image_caption", "image_caption"]
    assert {record.id for record in one} < {record.id for record in records}


def test_unusable_captions_are_counted(tmp_path):
    write_coco(tmp_path, [])
    given = [(1, 1, "A cat."), (1, 1, "A cat."), (2, 1, " "), (3, 77, "A bus."), (4, 1, None), (None, 1, "A cat.")]
    captions = [dict(zip(("id", "image_id", "caption"), each, strict=True)) for each in given]
    records, rejects = run(coco(tmp_path, captions=(write_captions(tmp_path, captions),)))
    assert [record.id for record in records] == ["coco/1/caption/1"]
    kinds = ["caption empty", "caption of an absent image", "caption that is not text", "duplicate id"]
    assert rejects == dict.fromkeys([*kinds, "record of another format"], 1)
    with pytest.raises(DataError, match="belong together"):
        run(coco(tmp_path, captions=(write_captions(tmp_path, captions[3:4]),)))


def test_annotated_images_and_their_crowds(tmp_path):
    ring = [30, 10, 40, 10, 40, 15]
    given = [
        annotation(7, [30, 10, 20, 5], segmentation=[ring, [1, 2]]),
        annotation(3, [1, 2, 3, 4], category=1, iscrowd=1),
        annotation(9, [0, 0, 0, 4]),
    ]
    write_coco(tmp_path, given, name="instances_train.json")
    data = load_coco(photo_sources(tmp_path, "train"))
    assert [image.image_id for image in data.images] == [1, 2]
    crowd, dog = data.images[0].objects
    assert (crowd.id, crowd.category, crowd.iscrowd, crowd.box) == (3, "person", True, (1, 2, 4, 6))
    assert (dog.id, dog.category, dog.iscrowd, dog.box) == (7, "dog", False, (30, 10, 40, 15))
    assert dog.polygons == (tuple(ring),)
    assert data.images[1].objects == ()
    assert data.skipped == {"box without size": 1, "polygon of fewer than three points": 1}
    with pytest.raises(DataError, match=r"instances_dev\.json"):
        photo_sources(tmp_path, "dev")


def test_captions_become_one_sentence():
    assert normalise_caption("  Two dogs\nrun . ") == "Two dogs run."
    assert normalise_caption("a cat sleeps. The sun shines.") == "A cat sleeps."
    assert normalise_caption("  ") == ""

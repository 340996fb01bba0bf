"""Visual Genome: the dialogue of an image, what is left out and why, and files in any order."""

import json
from pathlib import Path

import pytest
from converting import run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regiongpt.data.reading import clipped_box
from regiongpt.data.records import RecordRegion, Turn
from regiongpt.data.shards import Fault
from regiongpt.data.visual_genome import VisualGenomeConverter
from regiongpt.errors import DataError
from regiongpt.regions import MIN_AREA, Region

WIDTH, HEIGHT = 80, 60


def region(number: int, image: int, phrase: object = "a red door", **more: object) -> dict:
    box = {"x": 3, "y": 4, "width": 20, "height": 10}
    return {"region_id": number, "image_id": image, "phrase": phrase, **box, **more}


def thing(number: int, name: str, **more: object) -> dict:
    box = {"x": number % 50, "y": 4, "w": 20, "h": 10}
    return {"object_id": number, "names": [name], "synsets": [], "merged_object_ids": [], **box, **more}


def size(number: int, **more: object) -> dict:
    url = f"https://a.b/c/VG_100K_2/{number}.jpg"
    return {"image_id": number, "width": WIDTH, "height": HEIGHT, "url": url, **more}


def write(folder: Path, described: list, sizes: list | None = None, **others: list) -> VisualGenomeConverter:
    if sizes is None:
        numbers = sorted({entry["id"] for entry in described if isinstance(entry, dict) and "id" in entry})
        sizes = list(map(size, numbers))
    pictures = folder / "images" / "VG_100K_2"
    pictures.mkdir(parents=True, exist_ok=True)
    for entry in sizes:
        Image.new("RGB", (WIDTH, HEIGHT)).save(pictures / entry["url"].split("/")[-1])
    (folder / "region_descriptions.json").write_text(json.dumps(described))
    (folder / "image_data.json").write_text(json.dumps(sizes))
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return VisualGenomeConverter(
        images=folder / "images",
        regions=folder / "region_descriptions.json",
        image_data=folder / "image_data.json",
        **{name: folder / f"{name}.json" for name in others},
    )


def test_one_dialogue_an_image(tmp_path):
    made = write(tmp_path, [{"id": 2, "regions": [region(21, 2)]}, {"id": 1, "regions": [region(11, 1, " a  cat\n")]}])
    records, rejects = run(made)
    assert rejects == {}
    assert [record.id for record in records] == ["vg/2", "vg/1"]
    record = records[1]
    assert (record.image, record.width, record.height) == ("VG_100K_2/1.jpg", WIDTH, HEIGHT)
    assert record.regions == (RecordRegion(region=Region.box(3, 4, 23, 14), source_id="11"),)
    assert record.turns == (Turn(task="caption", answer="a cat", regions=(1,)),)
    assert record.turns[0].text(0) == "Describe <region1> briefly."


def test_ten_boxes_an_image_by_the_seed(tmp_path):
    many = [region(k, 1, f"thing {k}", x=k) for k in range(30)]
    made = write(tmp_path, [{"id": 1, "regions": many}, {"id": 2, "regions": [region(k, 2) for k in range(4)]}])
    first, _ = run(made)
    assert first == run(made)[0]
    assert [(len(record.regions), len(record.turns)) for record in first] == [(10, 10), (4, 4)]
    assert first[0] != run(made.replace(seed=1))[0][0]
    for turn in first[0].turns:
        (place,) = turn.regions
        assert turn.answer == f"thing {first[0].regions[place - 1].source_id}"
    # A sample does not hang on the other images of the file.
    assert run(write(tmp_path, [{"id": 1, "regions": many}]))[0] == first[:1]


def test_objects_and_relations(tmp_path):
    cat, mat = thing(5, "cat"), thing(6, "mat")
    related = [
        {"predicate": "ON", "relationship_id": 1, "subject": {**cat, "name": "cat"}, "object": mat},
        {"predicate": "under", "relationship_id": 2, "subject": mat, "object": {"object_id": 5}},
        {"predicate": "near", "relationship_id": 3, "subject": cat, "object": cat},
        {"predicate": "near", "relationship_id": 4, "subject": mat},
        {"predicate": "", "relationship_id": 5, "subject": cat, "object": mat},
        "near",
    ]
    # The objects come in another order than the images, and with an image that is nowhere else.
    made = write(
        tmp_path,
        [{"id": k, "regions": [region(k, k)]} for k in (1, 2)],
        objects=[{"image_id": k, "objects": [cat, mat] if k == 1 else []} for k in (9, 2, 1)],
        relationships=[{"image_id": 1, "relationships": related}],
    )
    records, rejects = run(made.replace(boxes_per_image=0))
    assert rejects == {
        "files that do not belong together": 1,
        "relation of an object to itself": 1,
        "predicate empty": 1,
        "record of another format": 2,
    }
    record = records[0]
    place = {each.category: number for number, each in enumerate(record.regions, 1)}
    cat_at, mat_at = place["cat"], place["mat"]
    assert {(turn.task, turn.answer, turn.regions) for turn in record.turns} == {
        ("caption", "a red door", (place[""],)),
        ("classify", "cat", (cat_at,)),
        ("classify", "mat", (mat_at,)),
        ("relation", f"Region [{cat_at}] on Region [{mat_at}]", (cat_at, mat_at)),
        ("relation", f"Region [{mat_at}] under Region [{cat_at}]", (mat_at, cat_at)),
    }
    assert not any(turn.guided for turn in record.turns)
    assert len(records[1].turns) == 1
    few, _ = run(made.replace(boxes_per_image=2))
    assert all(len(record.regions) <= 2 for record in few)


def test_what_is_left_out(tmp_path):
    bad = [
        region(1, 1), region(1, 1), region(3, 1, None), region(4, 1, x=500), region(7, 1, x="3"), region(8, 5),
        region(9, 1, "see <region1>"), region(10, 1, "half \ud800"), "region", {"phrase": "no id"},
    ]  # fmt: skip
    made = write(tmp_path, [{"id": 1, "regions": bad}, {"id": 1, "regions": []}, {"regions": []}, {"id": 2}])
    records, rejects = run(made)
    assert [len(record.turns) for record in records] == [1]
    once = ["expression that is not text", "box outside the image", "box that is not four numbers",
            "files that do not belong together", "placeholder in the text", "text that is not Unicode"]  # fmt: skip
    assert rejects == {"duplicate id": 2, "record of another format": 4, **dict.fromkeys(once, 1)}


def test_faults_of_images(tmp_path):
    sizes = [
        size(1, url="https://a.b/VG_100K/1.jpg"), size(2), size(2), size(3, height=HEIGHT + 1), size(4, width=0),
        size(6, url="https://a.b/../6.jpg"), size(7),
    ]  # fmt: skip
    made = write(tmp_path, [{"id": k, "regions": [region(k, k)]} for k in (1, 2, 3, 5, 7)], sizes)
    (tmp_path / "images" / "VG_100K_2" / "7.jpg").write_bytes(b"nothing")
    records, rejects = run(made)
    assert [record.id for record in records] == ["vg/2"]
    kinds = ["image file missing", "duplicate id", "image of another size", "record of another format",
             "image outside the folder", "files that do not belong together", "unreadable image"]  # fmt: skip
    assert rejects == dict.fromkeys(kinds, 1)
    records, _ = run(made.replace(check_images=False))
    assert [record.id for record in records] == ["vg/1", "vg/2", "vg/3", "vg/7"]


def test_files_that_do_not_belong_together(tmp_path):
    made = write(tmp_path, [{"id": 1, "regions": [region(1, 1)]}], [size(9)])
    with pytest.raises(DataError, match=r"none of its images is in .*; give two files of one release"):
        run(made)


@settings(deadline=None)
@given(st.tuples(*2 * [st.floats(-100, 200)], *2 * [st.floats(0.01, 300)]), st.integers(1, 90), st.integers(1, 90))
def test_boxes_become_their_part_of_the_image(box, width, height):
    x, y, w, h = box
    overlap = max(min(x + w, width) - max(x, 0), 0) * max(min(y + h, height) - max(y, 0), 0)
    if overlap < MIN_AREA:
        with pytest.raises(Fault, match="within"):
            clipped_box(box, width, height)
    else:
        assert Region.box(*clipped_box(box, width, height)).area(width, height) == pytest.approx(overlap)

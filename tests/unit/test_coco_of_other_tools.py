"""COCO files as CVAT, datumaro, Roboflow, supervision, Label Studio and LabelMe write them, wherever they are read."""

import json
from pathlib import Path
from typing import Any

import pytest
from converting import run
from PIL import Image

from regiongpt.data.coco import CocoSource, entry_of, load_coco
from regiongpt.data.shards import Rejects
from regiongpt.data.sources import CocoConverter, LvisConverter, summary
from regiongpt.data.sources import convert as convert_to
from regiongpt.errors import DataError
from regiongpt.evaluate.detection import CocoClassification
from regiongpt.inference.over_images import read_proposals
from regiongpt.regions import Region

RING = [5, 5, 25, 5, 25, 15, 5, 15]
RLE = {"size": [30, 40], "counts": [155, 10, 20, 10, 20, 10, 975]}
STROKE = Region.rle(RLE).bounds(40, 30)


def thing(number: object = 1, **more: object) -> dict[str, Any]:
    return {"id": number, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 10], **more}


def write(folder: Path, *annotations: dict, images: list | None = None, **more: object) -> Path:
    """An instances file with its one image, ``photo.png`` of 40 x 30 pixels."""
    Image.new("RGB", (40, 30)).save(folder / "photo.png")
    listed = images or [{"id": 1, "file_name": "photo.png", "width": 40, "height": 30}]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"annotations": annotations, "images": listed, "categories": categories, **more}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def convert(folder: Path, **options: object) -> tuple[list, dict[str, int]]:
    given = {"images": folder, "instances": (folder / "instances.json",), "label_set": "mine", **options}
    return run(CocoConverter(**given))


def asked(folder: Path, **options: object) -> CocoClassification:
    given = {"data": folder, "annotations": folder / "instances.json", "images": folder, "label_set": "mine"}
    return CocoClassification(**{**given, **options})


def proposed(folder: Path, **options: object) -> list[Region]:
    given = {"image": folder / "photo.png", **options}
    return [each.region for each in read_proposals(folder / "instances.json", 40, 30, **given)]


def regions(folder: Path, **options: object) -> list[Region]:
    return [each.region for record in convert(folder, **options)[0] for each in record.regions]


def test_crowds_are_counted_and_taken_where_asked_for(tmp_path: Path) -> None:
    write(tmp_path, thing(1, segmentation=RLE, iscrowd=1), thing(2, iscrowd="1"), thing(3, segmentation=RLE))
    assert convert(tmp_path)[1] == {"crowd": 2}
    assert regions(tmp_path, shapes="mask", crowds=True) == [Region.rle(RLE)] * 2
    task = asked(tmp_path)
    assert [item.id for item in task.items()] == ["3"]
    assert task.left_out.counts == {"crowd": 2}
    assert [item.id for item in asked(tmp_path, crowds=True).items()] == ["1", "2", "3"]
    assert len(proposed(tmp_path)) == 3


def test_a_file_of_crowds_alone_names_the_option_that_takes_them(tmp_path: Path) -> None:
    file = write(tmp_path, thing(1, segmentation=RLE, iscrowd=1), thing(2, segmentation=RLE, iscrowd=True))
    made = CocoConverter(images=tmp_path, instances=(file,), label_set="mine")
    written = convert_to(made, tmp_path / "out", strict=True)
    assert written.rejects == {"crowd": 2}
    assert "--crowds includes them" in summary(written, tmp_path / "out", 1)
    with pytest.raises(DataError, match="--crowds includes"):
        asked(tmp_path).items()


@pytest.mark.parametrize(
    "entry",
    [
        {"file_name": "photo.png", "coco_url": None},
        {"file_name": "photo.png", "coco_url": "http://host/val2017/renamed.png"},
        {"file_name": "set/photo.png"},
        {"file_name": "set\\photo.png"},
        {"coco_url": "http://host/val2017/photo.png"},
        {"file_name": "https://host/upload/photo.png"},
        {"file_name": "/data/local-files/?d=set/photo.png"},
        {"file_name": "other/photo.png"},
        {"file_name": "C:\\data\\photo.png"},
        {"file_name": "../photo.png"},
        {"file_name": "set//photo.png"},
    ],
)
def test_one_rule_finds_the_image_of_an_entry(tmp_path: Path, entry: dict) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    file = write(folder, thing(), images=[{"id": 1, "width": 40, "height": 30, **entry}])
    (record,), rejects = convert(folder)
    assert (rejects, (folder / record.image).is_file()) == ({}, True)
    assert run(LvisConverter(images=folder, instances=(file,)))[0][0].image == record.image
    assert asked(folder).items()[0].image.is_file()
    assert load_coco([CocoSource(instances=file, images=folder)]).images[0].path.is_file()
    assert len(proposed(folder)) == 1


def test_what_is_found_by_the_last_part_of_its_name_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("photo.png", "a/photo.png"):
        write(tmp_path, thing(), images=[{"id": 1, "file_name": name, "width": 40, "height": 30}])
        convert(tmp_path)
        proposed(tmp_path)
        assert caplog.text.count("only by file name") == 2 * (name != "photo.png")


def test_equal_base_names_in_different_folders_are_not_mixed_up(tmp_path: Path) -> None:
    names = [{"file_name": "a/1.png"}, {"file_name": "b\\1.png"}, {"coco_url": "http://host/c/2.png"},
             {"coco_url": "http://host/d/2.png"}]  # fmt: skip
    images = [{"id": k, "width": 40, "height": 30, **name} for k, name in enumerate(names, 1)]
    write(tmp_path, *(thing(k, image_id=k, bbox=[k, 1, 9, 9]) for k in (1, 2, 3, 4)), images=images)
    for name in ("a/1.png", "b/1.png", "2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    records, rejects = convert(tmp_path)
    assert [record.image for record in records] == ["a/1.png", "b/1.png"]
    assert rejects == {"annotation of an absent image": 2, "image file missing": 2}
    (record,), rejects = convert(tmp_path, images=tmp_path / "b")
    assert (record.id, record.image) == ("coco/2", "1.png")
    for name, left in (("a", 1), ("b", 2)):
        assert [box.bounds(40, 30)[0] for box in proposed(tmp_path, image=tmp_path / name / "1.png")] == [left]
    assert len(proposed(tmp_path, image="1.png", image_id="2")) == 1


@pytest.mark.parametrize("name", ["../photo.png", "/photo.png", "C:\\photo.png", "", None])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    file = write(tmp_path, thing(), images=[{"id": 1, "file_name": name, "width": 40, "height": 30}])
    expected = {"image outside the folder": 1, "annotation of an absent image": 1}
    assert convert(tmp_path, images=folder) == ([], expected)
    assert load_coco([CocoSource(instances=file, images=folder)]).skipped == expected
    with pytest.raises(DataError, match="outside the folder"):
        asked(tmp_path, images=folder).items()


@pytest.mark.parametrize(
    ("names", "image", "found"),
    [
        (["img\\1.jpg", "img\\2.jpg"], "1.jpg", 0),
        (["1.jpg", "a/1.jpg"], "a/1.jpg", 1),
        (["1.jpg", "a/1.jpg"], "1.jpg", 0),
        (["b/a/1.jpg", "c/a/1.jpg"], "c/a/1.jpg", 1),
        (["b/1.jpg", "c/1.jpg"], "1.jpg", "2 images that may be 1.jpg"),
        (["a_10.jpg", "a_11.jpg"], "000000000010.jpg", "no image called 000000000010.jpg"),
    ],
)
def test_the_entry_of_an_image(names: list[str], image: str, found: int | str) -> None:
    images = [{"id": 10 + k, "file_name": name} for k, name in enumerate(names)]
    if isinstance(found, str):
        with pytest.raises(DataError, match=rf"set\.json has {found}.*; give --image-id"):
            entry_of(images, image, "set.json")
    else:
        assert entry_of(images, image, "set.json") == images[found]


@pytest.mark.parametrize(
    ("size", "kind"),
    [({"width": 80.0, "height": "60"}, "image of another size"), ({"width": 0, "height": 0}, "image without size"),
     ({"width": 40}, "image without size"), ({"width": "x", "height": 30}, "image without size")],
)  # fmt: skip
def test_a_size_that_is_stated_is_held_against_the_image(tmp_path: Path, size: dict, kind: str) -> None:
    write(tmp_path, thing(), images=[{"id": 1, "file_name": "photo.png", **size}])
    assert convert(tmp_path)[1] == {kind: 1, "annotation of an absent image": 1}
    for more in ({}, {"image": "x.png", "image_id": 1}):
        with pytest.raises(DataError, match=kind):
            proposed(tmp_path, **more)


def test_a_size_that_is_not_stated_is_that_of_the_image(tmp_path: Path) -> None:
    write(tmp_path, thing(), images=[{"id": 1, "file_name": "photo.png"}])
    assert [(record.width, record.height) for record in convert(tmp_path)[0]] == [(40, 30)]
    assert convert(tmp_path, check_images=False)[1] == {"image without size": 1, "annotation of an absent image": 1}


@pytest.mark.parametrize("box", [None, [], [0, 0, 0, 0], [1, 2, float("nan"), 3]])
@pytest.mark.parametrize(
    ("segmentation", "bounds"), [([RING, [30, 20, 38, 20, 38, 28]], (5, 5, 38, 28)), (RLE, STROKE), ([RLE], STROKE)]
)
def test_a_box_follows_from_the_mask(tmp_path: Path, box: object, segmentation: object, bounds: tuple) -> None:
    file = write(tmp_path, thing(segmentation=segmentation, bbox=box))
    assert regions(tmp_path) == [Region.box(*bounds)]
    assert len(regions(tmp_path, shapes="mask")) == 1
    assert load_coco([CocoSource(instances=file, images=tmp_path)]).images[0].objects[0].box == bounds
    assert [region.bounds(40, 30) for region in proposed(tmp_path)] == [bounds]


def test_what_looks_normalized_is_left_out(tmp_path: Path) -> None:
    ring = [0.1, 0.1, 0.5, 0.1, 0.5, 0.5]
    write(tmp_path, thing(1, bbox=[0.1, 0.1, 0.4, 0.4]), thing(2, segmentation=[ring]), thing(3, segmentation=[RING]))
    assert convert(tmp_path)[1] == {"box that looks normalized": 1}
    assert regions(tmp_path, shapes="mask") == [Region.polygon([RING])]
    rejects = Rejects()
    assert proposed(tmp_path, rejects=rejects) == [Region.polygon([RING])]
    assert rejects.counts == {"box that looks normalized": 1, "region that makes no sense": 1}


def test_corners_in_place_of_a_size_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, thing(bbox=[20, 10, 39, 29]))
    for read in (convert, proposed):
        read(tmp_path)
        assert "not x0, y0, x1, y1" in caplog.text
        caplog.clear()


POINTS = [[5, 5], [25, 5], [25, 15], [5, 15]]
POLYGONS = [RING, [POINTS], POINTS, [list(map(str, RING))], [list(map(float, RING)), [1, 1]]]
RUNS = [{"size": [30.0, 40.0], "counts": [float(run) for run in RLE["counts"]]},
        {"size": ["30", "40"], "counts": RLE["counts"]}, {**RLE, "counts": "k4:d0000km0"}]  # fmt: skip


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        *((given, Region.polygon([RING])) for given in POLYGONS),
        *((given, Region.rle(RLE)) for given in RUNS),
        *((given, Region.box(5, 5, 25, 15)) for given in (None, [], [[]], {}, "")),
    ],
)
def test_every_way_to_write_a_mask(tmp_path: Path, segmentation: object, expected: Region) -> None:
    write(tmp_path, thing(segmentation=segmentation))
    assert proposed(tmp_path) == [expected]
    assert regions(tmp_path, shapes="both")[-1] == expected


def test_whole_numbers_as_floats_and_text_and_a_byte_order_mark(tmp_path: Path) -> None:
    image = {"id": 1.0, "file_name": "photo.png", "width": 40.0, "height": "30.0"}
    file = write(
        tmp_path, thing("7", image_id="1.0", category_id=1.0, bbox=["5", 5.0, "20", 10], iscrowd=0.0), images=[image]
    )
    file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    (record,), rejects = convert(tmp_path)
    assert (record.id, record.width, record.regions[0].source_id, rejects) == ("coco/1", 40, "7", {})
    assert record.regions[0].region == Region.box(5, 5, 25, 15) == proposed(tmp_path)[0]
    assert [item.id for item in asked(tmp_path).items()] == ["7"]


def test_ids_that_are_text(tmp_path: Path) -> None:
    image = {"id": "a-1", "file_name": "photo.png", "width": 40, "height": 30}
    names = [{"id": "c", "name": "cat"}]
    write(tmp_path, thing("x", image_id="a-1", category_id="c"), images=[image], categories=names)
    (record,), rejects = convert(tmp_path)
    assert (record.id, [each.source_id for each in record.regions], rejects) == ("coco/a-1", ["x"], {})
    assert [(item.id, item.image_id, item.truth) for item in asked(tmp_path).items()] == [("x", "a-1", "cat")]
    assert len(proposed(tmp_path)) == len(proposed(tmp_path, image_id="a-1")) == 1


def test_ids_are_needed_only_to_refer(tmp_path: Path) -> None:
    first, second = ({key: value for key, value in thing().items() if key != "id"} for _ in range(2))
    write(tmp_path, first, thing(9), {**second, "id": None, "bbox": [1, 1, 9, 9]}, thing(""))
    (record,), rejects = convert(tmp_path)
    assert [each.source_id for each in record.regions] == ["", "", "9"]
    assert rejects == {"record of another format": 1}
    assert [item.id for item in asked(tmp_path).items()] == ["annotations[0]", "annotations[2]", "9"]
    assert len(proposed(tmp_path)) == 3


ROOTS = [
    [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "cat"}],
    [{"id": 0, "name": "pets", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "pets"}],
    [{"id": 1, "name": "cat", "supercategory": ""}, {"id": 5, "name": "cat"}],
    [{"id": 0, "name": "_background_", "supercategory": None}, {"id": 1, "name": "cat", "supercategory": None}],
]


@pytest.mark.parametrize("categories", ROOTS)
def test_categories_that_nothing_has_are_no_names_to_choose(tmp_path: Path, categories: list) -> None:
    write(tmp_path, thing(), categories=[*categories, {"id": 3, "name": "dog"}])
    assert asked(tmp_path).items()[0].choices == ("cat", "dog")
    assert convert(tmp_path)[0][0].turns[0].answer == "cat"


def test_a_name_of_two_categories_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, thing(1, category_id=4), thing(2), categories=[{"id": 4, "name": "cat"}, {"id": 1, "name": "cat"}])
    items = asked(tmp_path).items()
    assert [(item.truth, item.choices) for item in items] == [("cat", ("cat",))] * 2
    assert "categories 1 and 4 are both called 'cat'" in caplog.text

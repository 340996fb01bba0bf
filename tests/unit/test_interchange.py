"""What other tools write becomes records, and what records hold becomes files that other tools read."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from regiongpt.data.convert.coco import CocoConverter
from regiongpt.data.interchange import (
    mask_png,
    mask_rle,
    read_label_png,
    read_label_studio,
    read_labelme,
    read_mask_png,
    record_of_detections,
    regions_of_detections,
    write_coco,
)
from regiongpt.data.label_tools import decode_label_studio_rle, label_studio_image
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError, RegionError
from regiongpt.regions import Region

# Label Studio's own code for 7 x 5 pixels (W x H) with rows 1 to 3 and columns 2 to 5 set.
STROKE = [
    *(0, 0, 0, 140, 57, 27, 254, 35, 0, 3, 254, 16, 8, 127, 225, 0, 135, 254, 16, 8, 127, 225, 0, 3, 254, 216, 0, 31),
    *(240, 128, 67, 255, 8, 4, 63, 240, 128, 67, 255, 8, 0, 31, 246, 192, 0, 255, 132, 2, 31, 248, 64, 33, 255, 132),
    *(2, 31, 248, 64, 0, 255, 195, 224, 0),
]
MASK = np.zeros((5, 7), bool)
MASK[1:4, 2:6] = True


def record(image: str, *regions: tuple[Region, str, str], width: int = 40, height: int = 20) -> Record:
    return Record(
        id=f"test/{image}",
        source="test",
        image=image,
        width=width,
        height=height,
        regions=tuple(RecordRegion(region=r, category=c, source_id=s) for r, c, s in regions),
        turns=(Turn(task="image_caption", answer="A dog."),),
    )


# ---------------------------------------------------------------------------------------------------------------------
# COCO json


def test_coco_json_is_what_pycocotools_and_the_converter_read(tmp_path, capsys):
    box, polygon = Region.box(1, 2, 11, 8), Region.polygon([[1, 1, 9, 1, 9, 8], [20, 1, 30, 1, 30, 9]])
    pixels = np.zeros((20, 40), bool)
    pixels[3:9, 5:12] = True
    records = [
        record("a.png", (box, "dog", "1"), (polygon, "cat", "2"), (Region.mask(pixels), "", "3")),
        record("b/c.png", (Region.point(20, 10, 4), "dog", "")),
        record("a.png", (box, "dog", "1"), (box, "cat", "1")),
        Record(id="t", source="s", image="", width=0, height=0, regions=(), turns=(Turn(task="chat", answer="a"),)),
    ]
    path = tmp_path / "instances.json"
    assert write_coco(records, path) == {"images": 2, "annotations": 5, "categories": 3}
    assert [each.name for each in tmp_path.iterdir()] == ["instances.json"]

    read = COCO(str(path))
    capsys.readouterr()
    assert [each["file_name"] for each in read.loadImgs(read.getImgIds())] == ["a.png", "b/c.png"]
    assert read.anns[1]["bbox"] == [1, 2, 10, 6]
    assert [read.cats[read.anns[k]["category_id"]]["name"] for k in range(1, 6)] == [
        "dog",
        "cat",
        "region",
        "dog",
        "cat",
    ]
    assert np.array_equal(read.annToMask(read.anns[3]).astype(bool), pixels)
    disk = Region.point(20, 10, 4).to_mask(40, 20)
    assert np.array_equal(read.annToMask(read.anns[4]).astype(bool), disk)
    assert read.anns[2]["area"] == pytest.approx(28 + 40)

    options = {"images": tmp_path, "instances": (path,), "label_set": "MINE", "check_images": False}
    (first, second) = CocoConverter(**options, shapes="both").records(Rejects(strict=True))
    assert [each.region for each in first.regions[:3]] == [box, Region.box(1, 1, 30, 9), polygon]
    assert first.regions[4].region == Region.rle(mask_rle(Region.mask(pixels), 40, 20))
    assert second.image == "b/c.png"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="none"):
        write_coco([], tmp_path / "none" / "a.json")


# ---------------------------------------------------------------------------------------------------------------------
# Masks


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_masks_survive_png_and_rle(width, height, data):
    flat = data.draw(st.lists(st.booleans(), min_size=width * height, max_size=width * height))
    pixels = np.array(flat).reshape(height, width)
    if not pixels.any():
        pixels[0, 0] = True
    region = Region.mask(pixels)
    assert read_mask_png(mask_png(region, width, height)) == region
    assert np.array_equal(Region.rle(mask_rle(region, width, height)).to_mask(width, height), pixels)


def test_every_kind_of_mask_file(tmp_path):
    values = np.zeros((4, 5), np.uint8)
    values[1, 1:3] = 1
    grey, palette, black_and_white, deep = (tmp_path / f"{name}.png" for name in ("l", "p", "1", "i16"))
    Image.fromarray(values).save(grey)
    indexed = Image.fromarray(values)
    indexed.putpalette([0, 0, 0, 255, 0, 0])
    indexed.save(palette)
    Image.fromarray(values > 0).save(black_and_white)
    Image.fromarray(values.astype(np.uint16) * 1000).save(deep)
    for path in (grey, palette, black_and_white, deep):
        assert read_mask_png(path) == Region.mask(values > 0)


def test_one_png_for_several_objects(tmp_path):
    values = np.array([[0, 1, 1], [7, 7, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_label_png(tmp_path / "a.png") == {1: Region.mask(values == 1), 7: Region.mask(values == 7)}
    with pytest.raises(DataError, match=r"a\.png: .*read_label_png"):
        read_mask_png(tmp_path / "a.png")


def test_files_that_are_no_masks(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    Image.new("L", (4, 4)).save(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no")
    for name, message in (
        ("rgb", "mode RGB"),
        ("empty", "at least one set pixel"),
        ("text", "text"),
        ("none", "none"),
    ):
        with pytest.raises(DataError, match=message):
            read_mask_png(tmp_path / f"{name}.png")


# ---------------------------------------------------------------------------------------------------------------------
# supervision


def detections(**given: object) -> object:
    boxes = np.array([[1, 2, 11, 8], [0, 0, 5, 5]], np.float32)
    return SimpleNamespace(**{"xyxy": boxes, "mask": None, "class_id": np.array([0, 1]), "data": {}, **given})


def test_detections_become_regions():
    masks = np.zeros((2, 20, 40), bool)
    masks[:, 3:5, 3:9] = True
    named = {"class_name": np.array(["dog", "cat"])}
    assert [(r.region, r.category) for r in regions_of_detections(detections(data=named))] == [
        (Region.box(1, 2, 11, 8), "dog"),
        (Region.box(0, 0, 5, 5), "cat"),
    ]
    (first, _) = regions_of_detections(detections(mask=masks), {0: "dog", 1: "cat"})
    assert (first.region, first.category) == (Region.mask(masks[0]), "dog")
    assert [each.category for each in regions_of_detections(detections(class_id=None))] == ["", ""]
    with pytest.raises(DataError, match="detection 1: expected a class among"):
        regions_of_detections(detections(), {0: "dog"})
    with pytest.raises(DataError, match=r"supervision\.Detections, got list"):
        regions_of_detections([])


def test_detections_become_a_record():
    made = record_of_detections(detections(), "a.png", 40, 20, {0: "dog", 1: "cat"})
    assert [(turn.task, turn.answer, turn.regions) for turn in made.turns] == [
        ("classify", "dog", (1,)),
        ("classify", "cat", (2,)),
    ]
    beyond = record_of_detections(
        detections(xyxy=[[-3, 0, 9, 9], [30, 5, 60, 9]]), "a.png", 40, 20, {0: "dog", 1: "cat"}
    )
    assert [each.region for each in beyond.regions] == [Region.box(0, 0, 9, 9), Region.box(30, 5, 40, 9)]
    with pytest.raises(DataError, match="pass names"):
        record_of_detections(detections(), "a.png", 40, 20)
    with pytest.raises(RegionError, match="detection 1"):
        record_of_detections(detections(xyxy=[[0, 0, 9, 9], [50, 0, 60, 9]]), "a.png", 40, 20, {0: "dog", 1: "cat"})


def test_detections_of_supervision_itself():
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    found = supervision.Detections(
        xyxy=np.array([[1, 2, 11, 8]], np.float32), class_id=np.array([3]), data={"class_name": np.array(["dog"])}
    )
    assert regions_of_detections(found)[0].region == Region.box(1, 2, 11, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Label Studio


def result(kind: str, value: dict, identity: str = "r", **more: object) -> dict:
    head = {"id": identity, "type": kind, "from_name": "tag", "to_name": "img"}
    return {**head, "original_width": 200, "original_height": 100, "image_rotation": 0, "value": value, **more}


def rectangle(identity: str = "r", label: str = "dog", **more: object) -> dict:
    value = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": [label]}
    return result("rectanglelabels", {**value, **more}, identity)


def export(folder: Path, *results: object, **more: object) -> tuple[list[Record], dict[str, int]]:
    task = {
        "id": 5,
        "data": {"image": "/data/upload/1/ab12-photo.jpg"},
        "annotations": [{"id": 9, "was_cancelled": False, "result": list(results)}],
        **more,
    }
    (folder / "export.json").write_text(json.dumps([task]))
    rejects = Rejects()
    records = list(read_label_studio(folder / "export.json", rejects))
    for each in records:
        each.check()
    return records, dict(rejects.counts)


def test_every_shape_of_label_studio(tmp_path):
    ellipse = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 0, "ellipselabels": ["plate"]}
    polygon = {"points": [[10, 10], [20, 10], [20, 50]], "closed": True, "polygonlabels": ["sail"]}
    keypoint = {"x": 50, "y": 50, "width": 2, "keypointlabels": ["nose"]}
    (made,), rejects = export(
        tmp_path,
        rectangle("a"),
        rectangle("b", rotation=90),
        result("ellipselabels", ellipse, "c"),
        result("polygonlabels", polygon, "d"),
        result("keypointlabels", keypoint, "e"),
    )
    assert rejects == {}
    assert (made.id, made.image, made.width, made.height) == ("label_studio/5/9", "ab12-photo.jpg", 200, 100)
    box, turned, oval, sail, nose = (each.region for each in made.regions)
    assert box == Region.box(20, 20, 80, 60)
    # A quarter turn clockwise about the top left corner: 60 x 40 pixels now lie to the left of it.
    assert turned.bounds(200, 100) == pytest.approx((0, 20, 20, 80))
    assert oval.bounds(200, 100) == pytest.approx((80, 30, 120, 70))
    assert oval.area(200, 100) == pytest.approx(np.pi * 20 * 20, rel=2e-3)
    assert sail == Region.polygon([[20, 10], [40, 10], [40, 50]])
    assert nose == Region.point(100, 50, 2)
    assert [turn.answer for turn in made.turns] == ["dog", "dog", "plate", "sail", "nose"]


def test_a_brush_stroke(tmp_path):
    value = {"format": "rle", "rle": STROKE, "brushlabels": ["paint"]}
    (made,), rejects = export(tmp_path, result("brushlabels", value, original_width=7, original_height=5))
    assert rejects == {}
    assert made.regions[0].region == Region.mask(MASK)
    with pytest.raises(ValueError, match="cut off"):
        decode_label_studio_rle(STROKE[:20], 140)
    _, rejects = export(tmp_path, result("brushlabels", value))
    assert rejects == {"record of another format": 1}


def test_labels_and_texts_of_one_region_belong_together(tmp_path):
    plain = {name: value for name, value in rectangle()["value"].items() if name != "rectanglelabels"}
    (made,), rejects = export(
        tmp_path,
        result("rectangle", plain),
        result("labels", {**plain, "labels": ["dog", "pet"]}),
        result("textarea", {**plain, "text": ["a brown dog"]}),
    )
    assert rejects == {}
    assert [(turn.task, turn.answer) for turn in made.turns] == [("classify", "dog, pet"), ("caption", "a brown dog")]
    assert len(made.regions) == 1


@pytest.mark.parametrize(
    ("faulty", "kind"),
    [
        (rectangle(x=200), "region that makes no sense"),
        (rectangle(width=0), "region that makes no sense"),
        (rectangle(x=float("nan")), "region that makes no sense"),
        (rectangle(x="left"), "record of another format"),
        (rectangle(label=" "), "label empty"),
        (result("rectanglelabels", {"rectanglelabels": ["dog"]}), "record of another format"),
        (result("rectangle", rectangle()["value"]), "region without a name"),
        (result("choices", {"choices": ["good"]}), "shape of another kind"),
        ({**rectangle(), "original_width": None}, "image without size"),
        ({**rectangle(), "original_width": 300}, "image of another size"),
        ({**rectangle(), "image_rotation": 90}, "turned image"),
        ({"id": "x"}, "record of another format"),
        (7, "record of another format"),
    ],
)
def test_unusable_drawings_are_counted(tmp_path, faulty, kind):
    if isinstance(faulty, dict):
        faulty = {**faulty, "id": "bad"}
    (made,), rejects = export(tmp_path, rectangle("good"), faulty)
    assert rejects == {kind: 1}
    assert [each.source_id for each in made.regions] == ["good"]


def test_tasks_without_sense_are_counted(tmp_path):
    cancelled = {"id": 1, "was_cancelled": True, "result": [rectangle()]}
    assert export(tmp_path, annotations=[cancelled]) == ([], {"cancelled annotation": 1})
    assert export(tmp_path, annotations=[{"id": 1}]) == ([], {"record of another format": 1})
    assert export(tmp_path, annotations=None) == ([], {"record of another format": 1})
    assert export(tmp_path, data={"image": 5}) == ([], {"record of another format": 1})
    assert export(tmp_path, data={"image": "http://x/.."}) == ([], {"image outside the folder": 1})
    assert export(tmp_path) == ([], {})


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/data/upload/1/ab12-photo.jpg", "ab12-photo.jpg"),
        ("/data/local-files/?d=photos/a%20b.jpg", "photos/a b.jpg"),
        ("s3://bucket/photos/a%20b.jpg", "a b.jpg"),
        ("https://example.com/a.jpg?size=large", "a.jpg"),
    ],
)
def test_addresses_of_label_studio(address, path):
    assert label_studio_image(address) == path


# ---------------------------------------------------------------------------------------------------------------------
# LabelMe


def shape(kind: str, points: list, label: str = "dog", **more: object) -> dict:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def labelme(folder: Path, *shapes: object, **more: object) -> tuple[list[Record], dict[str, int]]:
    content = {"version": "5.4.1", "flags": {}, "shapes": list(shapes), "imagePath": "..\\photos\\a.jpg"}
    (folder / "json").mkdir(exist_ok=True)
    path = folder / "json" / "a.json"
    path.write_text(json.dumps({**content, "imageData": None, "imageHeight": 20, "imageWidth": 40, **more}))
    rejects = Rejects()
    records = list(read_labelme([path], folder, rejects))
    for each in records:
        each.check()
    return records, dict(rejects.counts)


def test_every_shape_of_labelme(tmp_path):
    window = np.zeros((3, 4), bool)
    window[1:, 1:3] = True
    png = io.BytesIO()
    Image.fromarray(window).save(png, "PNG")
    (made,), rejects = labelme(
        tmp_path,
        shape("rectangle", [[11, 8], [1, -2]]),
        shape("polygon", [[1, 1], [9, 1], [9, 8]], description="a brown dog"),
        shape("circle", [[20, 10], [23, 14]]),
        shape("point", [[20, 10]]),
        shape("line", [[1, 1], [9, 9]]),
        shape("linestrip", [[1, 1], [9, 9], [20, 9]]),
        shape("mask", [[5, 6], [8, 8]], mask=base64.b64encode(png.getvalue()).decode()),
    )
    assert rejects == {}
    assert (made.id, made.image, made.width, made.height) == ("labelme/a/photos/a.jpg", "photos/a.jpg", 40, 20)
    whole = np.zeros((20, 40), bool)
    whole[7:9, 6:8] = True
    assert [each.region for each in made.regions] == [
        Region.box(1, 0, 11, 8),
        Region.polygon([[1, 1], [9, 1], [9, 8]]),
        Region.point(20, 10, 5),
        Region.point(20, 10),
        Region.scribble([[1, 1], [9, 9]]),
        Region.scribble([[1, 1], [9, 9], [20, 9]]),
        Region.mask(whole),
    ]
    assert [(turn.task, turn.answer) for turn in made.turns[:3]] == [
        ("classify", "dog"),
        ("classify", "dog"),
        ("caption", "a brown dog"),
    ]


@pytest.mark.parametrize(
    ("faulty", "kind"),
    [
        (shape("polygon", [[1, 1], [9, 1]]), "region that makes no sense"),
        (shape("rectangle", [[50, 1], [60, 9]]), "region that makes no sense"),
        (shape("rectangle", [[1, 1], [1, 9]]), "region that makes no sense"),
        (shape("polygon", [[1, 1], [9, float("nan")], [9, 9]]), "region that makes no sense"),
        (shape("polygon", []), "region that makes no sense"),
        (shape("polygon", None), "record of another format"),
        (shape("circle", [[1, 1]]), "record of another format"),
        (shape("point", []), "record of another format"),
        (shape("points", [[1, 1]]), "shape of another kind"),
        (shape("mask", [[5, 6], [8, 8]]), "record of another format"),
        (shape("mask", [[5, 6], [8, 8]], mask="bm8="), "record of another format"),
        (shape("polygon", [[1, 1], [9, 1], [9, 8]], label=""), "label empty"),
        ("shape", "record of another format"),
    ],
)
def test_unusable_shapes_are_counted(tmp_path, faulty, kind):
    (made,), rejects = labelme(tmp_path, shape("point", [[3, 3]]), faulty)
    assert rejects == {kind: 1}
    assert len(made.regions) == 1


def test_a_mask_beyond_the_image(tmp_path):
    mask = base64.b64encode(mask_png(Region.box(0, 0, 4, 4), 4, 4)).decode()
    assert labelme(tmp_path, shape("mask", [[38, 18], [41, 21]], mask=mask)) == ([], {"region that makes no sense": 1})


def test_files_of_labelme_without_sense_are_counted(tmp_path):
    dot = shape("point", [[3, 3]])
    assert labelme(tmp_path, dot, imagePath="../../a.jpg") == ([], {"image outside the folder": 1})
    assert labelme(tmp_path, dot, imagePath=None) == ([], {"record of another format": 1})
    assert labelme(tmp_path, dot, imageWidth=None) == ([], {"image without size": 1})
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (30, 10)).save(tmp_path / "photos" / "a.jpg")
    (made,), rejects = labelme(tmp_path, dot, imageWidth=None)
    assert ((made.width, made.height), rejects) == ((30, 10), {})
    (tmp_path / "b.json").write_text('{"shapes": [')
    counted = Rejects()
    assert list(read_labelme([tmp_path / "b.json"], tmp_path, counted)) == []
    assert counted.counts == {"truncated json": 1}
    with pytest.raises(DataError, match=r"none\.json"):
        list(read_labelme([tmp_path / "none.json"], tmp_path, Rejects()))

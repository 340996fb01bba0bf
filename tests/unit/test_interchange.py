"""What other tools write becomes records, and what records hold becomes files that other tools read."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from regiongpt.data.closed_sets import CocoConverter
from regiongpt.data.interchange import (
    mask_png,
    mask_rle,
    read_mask_png,
    record_of_detections,
    regions_of_detections,
    write_coco,
)
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError, RegionError
from regiongpt.regions import Region


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


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: Image.fromarray(np.array([[0, 1, 1], [7, 7, 0]], np.uint8)).save(path), RegionError),
        (lambda path: path.write_text("no"), DataError),
        (lambda path: None, DataError),
    ],
)
def test_files_that_are_no_masks(tmp_path, make, error):
    make(tmp_path / "a.png")
    with pytest.raises(error):
        read_mask_png(tmp_path / "a.png")


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
    masks[1] = False
    (_, boxed) = regions_of_detections(detections(mask=masks))
    assert boxed.region == Region.box(0, 0, 5, 5)
    with pytest.raises(DataError, match="detection 1: expected a class of"):
        regions_of_detections(detections(), {0: "dog"})
    for short, message in (({"mask": masks[:1]}, "2 masks"), ({"data": {"class_name": ["a"]}}, "2 names")):
        with pytest.raises(DataError, match=f"expected {message}, one a box, got 1"):
            regions_of_detections(detections(**short))
    with pytest.raises(DataError, match="words alone"):
        regions_of_detections(detections(data={"class_name": ["a", "<region1>"]}))
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

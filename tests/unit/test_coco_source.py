"""Reading COCO files: what is kept, what is left out and counted, and in which order."""

import numpy as np
import pytest
from converting import annotation, record, write_coco
from pycocotools.coco import COCO

from regiongpt.data import coco
from regiongpt.data.closed_sets import CocoConverter
from regiongpt.data.coco import load_coco, normalise_caption, photo_sources
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError
from regiongpt.regions import Region


def test_objects_and_crowds_in_a_fixed_order(tmp_path):
    ring = [30, 10, 40, 10, 40, 15]
    write_coco(
        tmp_path,
        [
            annotation(7, [30, 10, 20, 5], segmentation=[ring, [1, 2]]),
            annotation(3, [1, 2, 3, 4], category=1, iscrowd=1),
            annotation(9, [0, 0, 0, 4]),
        ],
        name="instances_train.json",
    )
    data = load_coco(photo_sources(tmp_path, "train"))
    assert [image.image_id for image in data.images] == [1, 2]
    crowd, dog = data.images[0].objects
    assert (crowd.id, crowd.category, crowd.iscrowd, crowd.box) == (3, "person", True, (1, 2, 4, 6))
    assert (dog.id, dog.category, dog.iscrowd, dog.box) == (7, "dog", False, (30, 10, 40, 15))
    assert dog.polygons == (tuple(ring),)
    assert data.images[1].objects == ()
    assert data.skipped == {"box without size": 1, "polygon of fewer than three points": 1}
    assert "left out: 1 box without size, 1 polygon" in data.report()


def test_a_missing_split_says_which_file_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"instances_dev\.json"):
        photo_sources(tmp_path, "dev")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a man on a horse", "A man on a horse."),
        ("  Two dogs\nrun . ", "Two dogs run."),
        ("A cat sleeps. The sun shines.", "A cat sleeps."),
        ("  ", ""),
    ],
)
def test_captions_become_one_sentence(raw, clean):
    assert normalise_caption(raw) == clean


def test_coco_json_is_what_pycocotools_and_the_converter_read(tmp_path, capsys):
    box, polygon = Region.box(1, 2, 11, 8), Region.polygon([[1, 1, 9, 1, 9, 8], [20, 1, 30, 1, 30, 9]])
    pixels = np.zeros((20, 40), bool)
    pixels[3:9, 5:12] = True
    records = [
        record("1", (box, "dog"), (polygon, "cat"), Region.mask(pixels)),
        record("2", (Region.point(20, 10, 4), "dog"), image="b/c.png"),
        record("3", (box, "dog"), (box, "cat")),
        record("4", image=""),
    ]
    path = tmp_path / "instances.json"
    assert coco.write_coco(records, path) == {"images": 2, "annotations": 5, "categories": 3}
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
    assert first.regions[4].region == Region.rle(Region.mask(pixels).to_coco(40, 20)["segmentation"])
    assert second.image == "b/c.png"

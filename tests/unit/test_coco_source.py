"""Reading COCO files: what is kept, what is left out and counted, and in which order."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from regiongpt.data.coco import CocoSource, load_coco, normalise_caption, photo_sources
from regiongpt.errors import DataError

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def annotation(number: int, box: list, image: int = 1, category: int = 18, **more: object) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, **more}


def write(folder: Path, annotations: list, images: list | None = None, captions: list | None = None) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for name in ("1.png", "2.png"):
        Image.new("RGB", (40, 20)).save(folder / "images" / name)
    if images is None:
        images = [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 20} for k in (2, 1)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "instances_train.json").write_text(json.dumps(content))
    if captions is not None:
        (folder / "captions_train.json").write_text(json.dumps({"annotations": captions}))
    return folder


def test_objects_and_crowds_in_a_fixed_order(tmp_path):
    ring = [30, 10, 40, 10, 40, 15]
    write(
        tmp_path,
        [
            annotation(7, [30, 10, 20, 5], segmentation=[ring, [1, 2]]),
            annotation(3, [1, 2, 3, 4], category=1, iscrowd=1),
            annotation(9, [0, 0, 0, 4]),
        ],
    )
    data = load_coco(photo_sources(tmp_path, "train"))
    assert [image.image_id for image in data.images] == [1, 2]
    crowd, dog = data.images[0].objects
    assert (crowd.id, crowd.category, crowd.iscrowd, crowd.box, crowd.polygons) == (
        3,
        "person",
        True,
        (1, 2, 4, 6),
        None,
    )
    assert (dog.id, dog.category, dog.iscrowd, dog.box) == (7, "dog", False, (30, 10, 40, 15))
    assert dog.polygons == (tuple(ring),)
    assert data.images[1].objects == ()
    assert data.skipped == {"box without size": 1, "polygon of fewer than three points": 1}
    assert "left out: 1 box without size, 1 polygon" in data.report()


def test_unusable_images_and_captions_are_counted(tmp_path):
    good = {"id": 1, "file_name": "1.png", "width": 40, "height": 20}
    images = [good, {**good, "id": 5, "file_name": "no.png"}, {**good, "id": 6, "width": 0}]
    # What annotations name must not lead out of their folder.
    outside = (str(Path(__file__).resolve()), "../images/1.png")
    images += [{**good, "id": 7 + number, "file_name": name} for number, name in enumerate(outside)]
    captions = [
        {"id": 2, "image_id": 1, "caption": " a dog   runs "},
        {"id": 1, "image_id": 1, "caption": "A cat."},
        {"id": 3, "image_id": 1, "caption": " . "},
        {"id": 4, "image_id": 77, "caption": "A bus."},
    ]
    data = load_coco(photo_sources(write(tmp_path, [], images, captions), "train"))
    assert data.images[0].captions == ("A cat.", "A dog runs.")
    assert data.skipped == {
        "caption of an absent image": 1,
        "image file missing": 1,
        "image outside the folder": 2,
        "image without size": 1,
    }


def test_the_first_source_of_an_image_counts(tmp_path):
    write(tmp_path, [annotation(1, [0, 0, 4, 4])])
    source = CocoSource(instances=tmp_path / "instances_train.json", images=tmp_path / "images")
    data = load_coco([source, source])
    assert [len(image.objects) for image in data.images] == [1, 0]
    assert data.skipped == {"annotation of an image left out": 1, "duplicate id": 2}


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


def test_real_photographs():
    default = Path(__file__).parents[3] / "shared" / "data"
    root = Path(os.environ.get("REGIONGPT_DATA", default)) / "coco_photos"
    if not root.is_dir():
        pytest.skip(f"no photographs at {root}; set REGIONGPT_DATA to the folder that holds coco_photos")
    data = load_coco(photo_sources(root, "dev"))
    assert len(data.images) == 301
    assert sum(len(image.objects) for image in data.images) == 2780
    assert data.skipped == {}

"""Reading COCO files: what is kept, what is left out and counted, and in which order."""

import pytest
from converting import annotation, write_coco

from regiongpt.data.coco import load_coco, normalise_caption, photo_sources
from regiongpt.errors import DataError


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

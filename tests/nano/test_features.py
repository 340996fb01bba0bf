"""The feature cache: damage is computed again or told, and never trained on; a full disk ends in one line."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from features import FeatureStore, blank_images, build_features
from learning import full_disk
from pictures import draw_pictures
from recipe import FeatureConfig

from regiongpt.data.coco import load_coco, photo_sources
from regiongpt.errors import DataError

IMAGES = 5


class Tower:
    """Features that are the mean of the pixels; it counts what it encodes."""

    def __init__(self) -> None:
        vision = SimpleNamespace(hidden_size=3, to_dict=dict)
        self.config = SimpleNamespace(vision_config=vision, tower_grid=(2, 2), region_crop=False)
        self.encoded = 0

    def pixels_of(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image).mean((0, 1), dtype=np.float32))[None]

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        self.encoded += 1
        return pixels[:, :, None, None].expand(1, 3, 2, 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root, IMAGES, "instances_train.json")
    return load_coco(photo_sources(root, "train")).images


def build(folder: Path, images: Any, **options: Any) -> tuple[FeatureStore, int]:
    """The cache, and how many views were encoded for it; blank images are encoded each time."""
    tower: Any = Tower()
    store = build_features(folder, images, tower, tower, FeatureConfig(**{"views": 2, **options}))
    return store, tower.encoded - len(blank_images())


def rows(store: FeatureStore) -> list[Any]:
    return [store.row(index, view).tolist() for index in range(IMAGES) for view in range(2)]


def test_a_cache_is_made_once(images: Any, tmp_path: Path) -> None:
    made, encoded = build(tmp_path, images)
    again, encoded_again = build(tmp_path, images)
    assert (encoded, encoded_again) == (2 * IMAGES, 0)
    assert rows(again) == rows(made)
    assert again.colours == made.colours
    assert any(made.colours)
    with pytest.raises(DataError, match=r"features of another recipe"):
        build(tmp_path, images, seed=1)


def test_a_cache_that_was_begun_is_gone_on_with(images: Any, tmp_path: Path) -> None:
    expected, _ = build(tmp_path, images)
    side = tmp_path / "progress.json"
    state = json.loads(side.read_text())
    state |= {"done": 3, **{name: state[name][:3] for name in ("colours", "checksums")}}
    side.write_text(json.dumps(state))
    store, encoded = build(tmp_path, images)
    assert encoded == 2 * (IMAGES - 3)
    assert rows(store) == rows(expected)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("progress.json", b""),
        ("progress.json", b'{"digest": "'),
        ("progress.json", b"[]"),
        ("progress.json", b'{"digest": "", "done": 5, "colours": [], "checksums": []}'),
        ("features.npy", b""),
        ("features.npy", b"\x93NUMPY\x01\x00"),
        ("features.npy", None),
    ],
)
def test_a_cache_that_was_cut_short_is_computed_again(
    file: str, content: bytes | None, images: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = rows(build(tmp_path, images)[0])
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[:-10] if content is None else content)
    with caplog.at_level(logging.WARNING):
        store, encoded = build(tmp_path, images)
    assert encoded == 2 * IMAGES
    assert rows(store) == expected
    assert f"{tmp_path}: damaged" in caplog.text


def test_a_row_that_is_not_what_was_written_is_told(images: Any, tmp_path: Path) -> None:
    build(tmp_path, images)
    with (tmp_path / "features.npy").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff")
    store, _ = build(tmp_path, images)
    store.row(IMAGES - 1, 0)
    with pytest.raises(DataError, match=f"features.npy: the features of image {IMAGES} are damaged; delete the folder"):
        store.row(IMAGES - 1, 1)


def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(images: Any, tmp_path: Path) -> None:
    expected = rows(build(tmp_path / "enough", images)[0])
    with full_disk(200), pytest.raises(DataError, match=r"cannot be written: .*; free some space"):
        build(tmp_path / "full", images)
    assert rows(build(tmp_path / "full", images)[0]) == expected


class Looking(Tower):
    """Sees the red of each crop, of 4 x 4 px; ``stops`` after so many images."""

    def __init__(self, stops: int = 100) -> None:
        super().__init__()
        vars(self.config).update(region_crop=True, crop_size=4, crop_channels=2)
        self.looked, self.stops = 0, stops

    def crop_inputs(self, image: Any, regions: Any) -> torch.Tensor:
        if self.looked == self.stops:
            raise KeyboardInterrupt
        self.looked += 1
        size = image.width + image.height
        boxes = torch.tensor([region.bounds(*image.size)[:2] for region in regions])
        return (boxes / size)[:, None, None, :].repeat(1, 3, 4, 1).repeat_interleave(2, -1)

    def encode_crops(self, crops: torch.Tensor) -> torch.Tensor:
        return crops[:, :, 0, 0, ::3]


def test_crops_are_made_once_and_go_on_after_a_stop(images: Any, tmp_path: Path) -> None:
    config = FeatureConfig(views=1)
    stopped: Any = Looking(stops=2)
    with pytest.raises(KeyboardInterrupt):
        build_features(tmp_path, images, stopped, stopped, config)
    tower: Any = Looking()
    crops = build_features(tmp_path, images, tower, tower, config).crops
    assert crops is not None
    assert tower.looked == IMAGES - 2
    whole: Any = Looking()
    afresh = build_features(tmp_path / "other", images, whole, whole, config).crops
    assert afresh is not None
    assert {key: row.tolist() for key, row in crops.items()} == {key: row.tolist() for key, row in afresh.items()}
    objects = [(image, each) for image in images for each in image.objects if not each.iscrowd]
    for place, (image, each) in enumerate(objects):
        seen = [value / (image.width + image.height) for value in each.box[:2]]
        expected = seen[::-1] if place % 2 else seen
        assert crops[image.image_id, each.id].tolist() == pytest.approx(expected, abs=1e-3)

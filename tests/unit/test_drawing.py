from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regiongpt.drawing import COLOURS, check_picture, draw_regions, save_picture
from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.regions import Region


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (120, 120, 120))


def count(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == colour).all(-1).sum())


def every_kind(width: int, height: int) -> list[Region]:
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    return [
        Region.box(1, 1, width / 2, height / 2),
        Region.mask(mask),
        Region.polygon([[width * 0.6, height * 0.1], [width * 0.9, height * 0.2], [width * 0.7, height * 0.6]]),
        Region.rle({"size": [height, width], "counts": [0, height * 2, height * (width - 2)]}),
        Region.point(width * 0.3, height * 0.8),
        Region.scribble([[width * 0.5, height * 0.9], [width * 0.9, height * 0.8]]),
    ]


def test_every_kind_is_outlined_in_its_colour():
    regions = every_kind(700, 500)
    picture = draw_regions(grey(700, 500), regions)
    assert picture.size == (700, 500)
    assert picture.mode == "RGB"
    for colour in COLOURS[: len(regions)]:
        assert count(picture, colour) > 40


def test_the_photograph_is_left_alone_outside_of_regions_and_tags():
    picture = np.asarray(draw_regions(grey(700, 500), [Region.box(300, 200, 400, 300)]))
    assert (picture[:150] == 120).all()
    assert (picture[:, 450:] == 120).all()


def test_a_region_at_the_border_is_closed_there():
    border = draw_regions(grey(700, 500), [Region.mask(np.ones((500, 700), bool))])
    assert count(border.crop((690, 0, 700, 500)), COLOURS[0]) > 400


def test_tags_of_equal_regions_do_not_hide_each_other():
    box = Region.box(100, 100, 400, 400)
    picture = draw_regions(grey(700, 500), [box, box, box, box])
    tags = [count(picture, colour) for colour in COLOURS[:4]]
    assert min(tags) > 150


def test_captions_and_dialogue_stand_beneath():
    regions = every_kind(700, 500)
    plain = draw_regions(grey(700, 500), regions)
    captions = ["a cat", None, "", "a cup " * 60, "point", "x" * 300]
    picture = draw_regions(grey(700, 500), regions, captions, dialogue=[("What is <region1>?", "A cat.")])
    assert picture.width == plain.width
    assert np.array_equal(np.asarray(picture)[:500], np.asarray(plain))
    assert picture.height > 500 + 10 * 18
    panel = picture.crop((0, 500, 700, picture.height))
    assert np.asarray(panel).min() < 60
    assert np.asarray(panel)[:, -6:].min() == 255


def test_errors():
    with pytest.raises(ConfigError, match="1 captions for 2 regions"):
        draw_regions(grey(9, 9), [Region.box(0, 0, 5, 5)] * 2, ["one"])
    with pytest.raises(RegionError, match="<region2>"):
        draw_regions(grey(9, 9), [Region.box(0, 0, 5, 5), Region.box(50, 50, 60, 60)])


@pytest.mark.parametrize("name", ["out.xyz", "out", "out.psd", "out.xbm", "none/out.png", "."])
def test_a_picture_that_cannot_be_written_is_known_before_it_is_drawn(tmp_path, name):
    with pytest.raises(ConfigError, match=r"can be written|no folder|end its name"):
        check_picture(tmp_path / name)
    check_picture(tmp_path / "out.JPG")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "size"), [("out.jpg", (70_000, 2)), ("out.webp", (20_000, 2))])
def test_a_picture_too_large_for_its_format_leaves_no_file(tmp_path, name, size):
    with pytest.raises(DataError, match="cannot be written"):
        save_picture(grey(*size), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_cut_short_by_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(self, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match="No space left"):
        save_picture(grey(9, 9), tmp_path / "out.png")
    assert not list(tmp_path.iterdir())

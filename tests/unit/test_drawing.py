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


MASK = np.zeros((500, 700), bool)
MASK[125:250, 175:350] = True
REGIONS = [
    Region.box(1, 1, 350, 250),
    Region.mask(MASK),
    Region.polygon([[420, 50], [630, 100], [490, 300]]),
    Region.rle({"size": [500, 700], "counts": [0, 1000, 349_000]}),
    Region.point(210, 400),
    Region.scribble([[350, 450], [630, 400]]),
]


def test_every_kind_is_outlined_in_its_colour():
    picture = draw_regions(grey(700, 500), REGIONS)
    assert (picture.size, picture.mode) == ((700, 500), "RGB")
    assert all(count(picture, colour) > 40 for colour in COLOURS[: len(REGIONS)])
    alone = np.asarray(draw_regions(grey(700, 500), [Region.box(300, 200, 400, 300)]))
    assert (alone[:150] == 120).all()
    assert (alone[:, 450:] == 120).all()
    border = draw_regions(grey(700, 500), [Region.mask(np.ones((500, 700), bool))])
    assert count(border.crop((690, 0, 700, 500)), COLOURS[0]) > 400


def test_tags_of_equal_regions_do_not_hide_each_other():
    picture = draw_regions(grey(700, 500), [Region.box(100, 100, 400, 400)] * 4)
    assert min(count(picture, colour) for colour in COLOURS[:4]) > 150


def test_captions_and_dialogue_stand_beneath():
    plain = draw_regions(grey(700, 500), REGIONS)
    captions = ["a cat", None, "", "a cup " * 60, "point", "x" * 300]
    picture = draw_regions(grey(700, 500), REGIONS, captions, dialogue=[("What is <region1>?", "A cat.")])
    assert picture.width == plain.width
    assert np.array_equal(np.asarray(picture)[:500], np.asarray(plain))
    assert picture.height > 500 + 10 * 18
    panel = picture.crop((0, 500, 700, picture.height))
    assert np.asarray(panel).min() < 60
    assert np.asarray(panel)[:, -6:].min() == 255


def test_errors():
    regions = [Region.box(0, 0, 5, 5), Region.box(50, 50, 60, 60)]
    with pytest.raises(ConfigError, match="1 captions for 2 regions"):
        draw_regions(grey(9, 9), regions, ["one"])
    with pytest.raises(RegionError, match="<region2>"):
        draw_regions(grey(9, 9), regions)


@pytest.mark.parametrize("name", ["out.xyz", "out", "out.psd", "out.xbm", "none/out.png", "."])
def test_a_picture_that_cannot_be_written_is_known_before_it_is_drawn(tmp_path, name):
    with pytest.raises(ConfigError, match=r"can be written|no folder|end its name"):
        check_picture(tmp_path / name)
    check_picture(tmp_path / "out.JPG")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_no_file(tmp_path, monkeypatch):
    for name, width in (("out.jpg", 70_000), ("out.webp", 20_000)):
        with pytest.raises(DataError, match="cannot be written"):
            save_picture(grey(width, 2), tmp_path / name)

    def full(self, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match="No space left"):
        save_picture(grey(9, 9), tmp_path / "out.png")
    assert not list(tmp_path.iterdir())

"""Images of every usual kind become upright 8-bit RGB; everything else is refused in one line."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regiongpt.errors import DataError
from regiongpt.images import MAX_PIXELS, SquareFrame, load_image

repeatable = settings(deadline=None, max_examples=60, derandomize=True)


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width, height, data=b""):
    """A PNG header that claims a size, with whatever pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def pixels(source, count=1):
    """The first pixels of an image."""
    image = load_image(source)
    assert image.mode == "RGB"
    found = [image.getpixel((x, 0)) for x in range(count)]
    return found if count > 1 else found[0]


def refused(source, says):
    with pytest.raises(DataError) as caught:
        load_image(source)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


PHOTO = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))


def test_every_source_gives_the_same_pixels(tmp_path):
    path = tmp_path / "photo.png"
    PHOTO.save(path)
    with open(path, "rb") as file:
        sources = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), file, Image.open(path)]
        sources += [PHOTO, np.asarray(PHOTO)]
        for source in sources:
            image = load_image(source)
            np.testing.assert_array_equal(np.asarray(image), np.asarray(PHOTO))
    path.unlink()
    image.tobytes()  # no longer depends on the file


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation):
    upright = Image.fromarray(np.arange(2 * 3, dtype=np.uint8).reshape(2, 3) * 40).convert("RGB")
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # the transpositions of PIL
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(saved(upright if undo is None else upright.transpose(undo), exif=exif))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(upright))
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(upright))


def test_grey_bilevel_palette_and_the_first_frame():
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    assert pixels(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)
    assert pixels(saved(Image.new("L", (3, 2), 77))) == (77, 77, 77)
    assert pixels(saved(Image.new("1", (3, 2), 1))) == (255, 255, 255)
    assert pixels(saved(Image.new("RGB", (3, 2), (10, 200, 30)).quantize(4))) == (10, 200, 30)


def test_transparency_lies_on_white():
    for colour, shown in (((255, 0, 0, 0), (255,) * 3), ((255, 0, 0, 255), (255, 0, 0)), ((0, 0, 0, 51), (204,) * 3)):
        assert pixels(Image.new("RGBA", (3, 2), colour)) == shown
    assert pixels(Image.new("LA", (3, 2), (0, 51))) == pixels(Image.new("RGBa", (3, 2), (0, 0, 0, 51))) == (204,) * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    grey = Image.fromarray(np.array([[0, 90]], np.uint8))
    colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    for picture, hidden, shown in ((palette, 0, (255, 0, 0)), (grey, 0, (90,) * 3), (colour, (1, 2, 3), (4, 5, 6))):
        assert pixels(saved(picture, transparency=hidden), 2) == [(255, 255, 255), shown]


DEEP = np.array([[0, 257, 128 * 257, 65535, 65535 - 257]], np.uint16)
SHALLOW = [0, 1, 128, 255, 254]


@pytest.mark.parametrize(
    "source",
    [
        saved(Image.fromarray(DEEP)),
        saved(Image.fromarray(DEEP), "TIFF"),
        Image.fromarray(DEEP),
        Image.fromarray(DEEP.astype(np.int32)),
        DEEP,
        np.repeat(DEEP[..., None], 3, axis=2),
    ],
    ids=["png", "tiff", "I;16", "I", "array", "colour array"],
)
def test_sixteen_bits_are_scaled_not_clipped(source):
    assert pixels(source, 5) == [(value,) * 3 for value in SHALLOW]


def test_arrays():
    grey = np.full((2, 3), 9, np.uint8)
    assert pixels(grey) == pixels(grey[..., None]) == (9, 9, 9)
    assert pixels(np.zeros((2, 3, 4), np.uint8)) == (255, 255, 255)
    assert pixels(np.arange(18, dtype=np.uint8).reshape(2, 3, 3)[:, ::-1]) == (6, 7, 8)


def test_missing_folder_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("a cat")
    for name, says in {
        "none.jpg": "none.jpg: there is no such file",
        "": "directory",
        "empty.jpg": "empty.jpg: expected an image, got an empty file",
        "text.jpg": "text.jpg: expected an image",
        "text.jpg/inner.jpg": "no such file",
        "bad\0name.jpg": "cannot be read",
    }.items():
        refused(tmp_path / name, says)
    for source, says in ((b"", "image bytes"), (io.StringIO("text"), "got str"), (42, "got int"), (None, "NoneType")):
        refused(source, says)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated_files_are_named(tmp_path, format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    whole = saved(noise, format)
    (tmp_path / "cut").write_bytes(whole[: len(whole) * 2 // 3])
    refused(tmp_path / "cut", "cut: expected an image, got one truncated")


@repeatable
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP"]), st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_files_never_raise_anything_else(format, place, value):
    data = bytearray(saved(PHOTO, format))
    data[place % len(data)] = value
    with contextlib.suppress(DataError):
        assert load_image(bytes(data)).mode == "RGB"


def test_decompression_bombs_are_refused_from_the_header(monkeypatch):
    for size in ((100_000, 100_000), (MAX_PIXELS + 1, 1)):
        refused(png(*size), f"{MAX_PIXELS:,}")
    refused(png(20_000, 8_000), "truncated")  # within the limit: it fails on its pixels, not on its size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    refused(png(100_000, 100_000), "got 100000 x 100000")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.ones((4, 4, 3)), "white may be 1 or 255"),
        (np.ones((4, 4), bool), "dtype bool"),
        (np.zeros((3, 4, 5), np.uint8), "(3, 4, 5); put the channels last"),
        (np.zeros((1, 4, 4, 3), np.uint8), "one image per call"),
        (Image.new("RGB", (0, 3)), "got 0 x 3"),
        (Image.new("F", (3, 2), 0.5), "float32 from 0.5"),
        (Image.new("I", (3, 2), 70_000), "to 70000"),
    ],
)
def test_pixels_of_unknown_shape_or_range_are_refused(source, says):
    refused(source, says)


@repeatable
@given(st.integers(1, 40), st.integers(1, 40))
def test_the_frame_moves_image_and_grid_together(width, height):
    """The square lines of a grid with one cell a pixel cut the image at its own pixels."""
    frame = SquareFrame(width, height)
    image = Image.new("RGB", (width, height), "white")
    square = np.asarray(frame.pad(image, (1, 2, 3)))
    assert square.shape == (frame.side, frame.side, 3)
    y_edges, x_edges = frame.edges(frame.side, frame.side)
    rows = (y_edges[:-1] >= 0) & (y_edges[1:] <= height)
    columns = (x_edges[:-1] >= 0) & (x_edges[1:] <= width)
    np.testing.assert_array_equal(np.logical_and.outer(rows, columns), (square == 255).all(axis=2))
    assert (square[~rows] == (1, 2, 3)).all()
    assert (rows.sum(), columns.sum()) == (height, width)

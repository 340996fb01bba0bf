"""Regions: areas are exact for every kind, on any grid, and every wrong region is named in one line."""

import json
import math
import pickle

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from regiongpt.errors import RegionError
from regiongpt.images import SquareFrame
from regiongpt.regions import KINDS, Region

repeatable = settings(deadline=None, max_examples=40, derandomize=True)


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def uncompressed(mask):
    flat = np.asarray(mask, bool).T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


@st.composite
def scenes(draw, kind=None):
    """A region of any kind that reaches into an image of width x height."""
    width, height = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    kind = kind or draw(st.sampled_from(KINDS))
    x = st.floats(-0.5 * width, 1.5 * width)
    y = st.floats(-0.5 * height, 1.5 * height)
    inside = st.tuples(st.floats(0, width), st.floats(0, height))
    size = st.none() | st.floats(0.3, 30)
    if kind == "box":
        (cx, cy), w, h = draw(inside), draw(st.floats(0.1, 50)), draw(st.floats(0.1, 50))
        return Region.box(cx - w, cy - h, cx + w, cy + h), width, height
    if kind in ("mask", "rle"):
        seed = draw(st.integers(0, 10_000))
        rng = np.random.default_rng(seed)
        mask = rng.random((height, width)) < rng.choice([0.02, 0.3, 0.9])
        mask[rng.integers(height), rng.integers(width)] = True
        if kind == "mask":
            return Region.mask(mask), width, height
        return Region.rle(draw(st.sampled_from([encode, uncompressed]))(mask)), width, height
    if kind == "point":
        return Region.point(*draw(inside), radius=draw(size)), width, height
    if kind == "scribble":
        points = [draw(inside), *draw(st.lists(st.tuples(x, y), max_size=6))]
        return Region.scribble(points, width=draw(size)), width, height
    cx, cy = draw(inside)
    triangle = [(cx - 1, cy - 1), (cx + 1.5, cy - 1), (cx, cy + 2)]  # so that something is always inside
    rings = draw(st.lists(st.lists(st.tuples(x, y), min_size=3, max_size=9), max_size=3))
    rings = [ring for ring in rings if len(set(ring)) >= 3]
    return Region.polygon([triangle, *rings]), width, height


def areas(region, y_edges, x_edges, width, height):
    """Exact area of the region in each cell of a grid, in square pixels."""
    return region._resolve(width, height).coverage(np.asarray(y_edges, float), np.asarray(x_edges, float))


@repeatable
@given(scenes(), st.integers(1, 30), st.integers(1, 30))
def test_coverage_of_a_padded_grid_adds_up_to_the_area(scene, grid_h, grid_w):
    region, width, height = scene
    frame = SquareFrame(width, height)
    coverage = areas(region, *frame.edges(grid_h, grid_w), width, height)
    assert coverage.shape == (grid_h, grid_w)
    assert coverage.min() >= 0
    assert coverage.sum(dtype=float) == pytest.approx(region.area(width, height), rel=1e-4)
    cell = frame.side**2 / grid_h / grid_w
    assert coverage.max() <= cell * (1 + 1e-5)
    weights = region.pool_weights(frame, grid_h, grid_w)
    assert weights.sum(dtype=float) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(weights * region.area(width, height), coverage, rtol=1e-4, atol=1e-4)


@repeatable
@given(scenes(), st.data())
def test_every_cell_of_any_grid_agrees_with_shapely(scene, data):
    """The lines of the grid are uneven and may lie outside the image."""
    region, width, height = scene
    shape = region._resolve(width, height)
    geometry = shapely.box(*shape.bounds) if region.kind == "box" else getattr(shape, "geometry", None)
    if geometry is None:
        pixels = region.to_mask(width, height)
        geometry = shapely.union_all([shapely.box(x, y, x + 1, y + 1) for y, x in np.argwhere(pixels)])
    lines = st.lists(st.floats(-20, 80).map(lambda v: round(v, 3)), min_size=2, max_size=6, unique=True).map(sorted)
    y_edges, x_edges = np.array(data.draw(lines)), np.array(data.draw(lines))
    expected = cells(geometry, y_edges, x_edges)
    np.testing.assert_allclose(areas(region, y_edges, x_edges, width, height), expected, rtol=1e-4, atol=1e-3)


def cells(geometry, y_edges, x_edges):
    """Area of a shapely geometry in each cell of a grid."""
    left, top = np.meshgrid(x_edges[:-1], y_edges[:-1])
    right, bottom = np.meshgrid(x_edges[1:], y_edges[1:])
    return shapely.area(shapely.intersection(shapely.box(left, top, right, bottom), geometry))


L_SHAPE = np.array([list("#..."), list("#..."), list("###."), list("....")]) == "#"


def test_mask_by_hand():
    region = Region.mask(L_SHAPE)
    assert region.check(4, 4) is region
    assert region.area(4, 4) == 5
    assert region.bounds(4, 4) == (0, 0, 3, 3)
    np.testing.assert_array_equal(areas(region, [0, 2, 4], [0, 2, 4], 4, 4), [[2, 0], [2, 1]])
    np.testing.assert_allclose(areas(region, [0.5, 2.5, 3.5], [0.5, 1.5, 9], 4, 4), [[1.25, 0.75], [0.5, 0.75]])
    np.testing.assert_array_equal(region.to_mask(4, 4), L_SHAPE)


def test_a_pixel_is_in_the_mask_if_half_of_it_is_inside_and_of_a_sliver_the_one_it_covers_most():
    for box, pixels in (((1.6, 2.1, 2.2, 2.3), [[2, 1]]), ((0.5, 1, 2.4, 2), [[1, 0], [1, 1]])):
        assert np.argwhere(Region.box(*box).to_mask(4, 4)).tolist() == pixels


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([[0, 0], [10, 10], [10, 0], [0, 10]], 50),  # a bow tie: both wings
        ([[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]], 100),  # closed by hand
        ([0, 0, 0, 10, 10, 10, 10, 0], 100),  # the other way round
        ([[0, 0, 10, 0, 10, 10, 0, 10]], 100),  # COCO's segmentation
        ([[[0, 0], [4, 0], [4, 4]], [[5, 5], [9, 5], [9, 9]]], 16),
        ([[[0, 0], [6, 0], [6, 6], [0, 6]], [[3, 0], [9, 0], [9, 6], [3, 6]]], 54),  # overlapping rings count once
        ([[0, 0, 4, 0, 4, 4], [[5, 5], [9, 5], [9, 9]]], 16),  # both notations
        ([[-5, -5], [5, -5], [5, 5], [-5, 5]], 25),
        ([[0, 0], [10, 0], [10, 10], [0, 10], [0, 0], [3, 3], [3, 6], [6, 6], [6, 3], [3, 3]], 91),  # a hole by a seam
    ],
)
def test_polygon_notations_and_knots(points, area):
    region = Region.polygon(points)
    assert region.area(10, 10) == pytest.approx(area)
    assert areas(region, [0, 3.3, 10], [0, 2.2, 7, 10], 10, 10).sum() == pytest.approx(area, rel=1e-5)
    assert region.to_mask(10, 10).sum() == pytest.approx(area, abs=10)


def test_default_sizes_grow_with_the_image():
    assert Region.point(500, 500).area(1000, 2000) == pytest.approx(math.pi * 30**2, rel=1e-3)
    stroke = Region.scribble([[500, 500], [600, 500]])
    assert stroke.area(2000, 1000) == pytest.approx(100 * 30 + math.pi * 225, rel=1e-3)
    assert Region.scribble([[5, 5], [5, 5]]).area(10, 10) == Region.scribble([[5, 5]]).area(10, 10)


@repeatable
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 999), st.sampled_from([0.02, 0.5, 0.98]))
def test_rle_decodes_as_pycocotools_does(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[0, 0] = True
    coded = encode(mask)
    text = {"size": coded["size"], "counts": coded["counts"].decode()}
    for rle in (coded, text, uncompressed(mask)):
        np.testing.assert_array_equal(Region.rle(rle).to_mask(width, height), mask)
    assert Region.rle(coded) == Region.rle(text) == Region.rle(uncompressed(mask))


@pytest.mark.parametrize(
    "counts",
    ["", "x~y", b"\x00\x01", "04P", "0?", "17O", [4, 4], [20, -4], [8.5, 7.5], [[8, 8]], ["16"], [10**30]],
    ids=str,
)
def test_malformed_rle_is_named(counts):
    with pytest.raises(RegionError, match=r"^<region2>: expected COCO RLE of 4 x 4 pixels"):
        Region.rle({"size": [4, 4], "counts": counts}).check(4, 4, "<region2>")


@pytest.mark.parametrize(
    ("region", "says"),
    [
        (Region.box(20, 5, 10, 15), "x0 < x1 and y0 < y1, got box (20, 5, 10, 15)"),
        (Region.box(10, 5, 10, 15), "empty"),
        (Region.box(math.nan, 5, 20, 15), "finite"),
        (Region.box(100, 5, 120, 15), "covers nothing of the image of 40 x 24 pixels"),
        (Region.box(1, 1, 1 + 1e-9, 2), "covers nothing"),
        (Region.polygon([[1, 1], [5, 5]]), "at least 3 points"),
        (Region.polygon([[0, 0], [5, 0], [5, 5], [5, 0], [10, 0], [10, -9]]), "covers nothing"),
        (Region.polygon([[1, 1], [5, math.nan], [9, 1]]), "finite coordinates in pixels, got nan"),
        (Region.point(60, 3), "covers nothing"),
        (Region.point(3, 3, radius=0), "radius above 0 pixels, got 0"),
        (Region.scribble([[3, math.inf], [1, 2]]), "finite"),
        (Region.scribble([[3, 3], [4, 4]], width=0), "width above 0"),
        (Region.mask(np.zeros((24, 40), bool)), "at least one set pixel"),
        (Region.mask(np.ones((40, 24), bool)), "40 x 24 pixels (W x H), got 24 x 40"),
        (Region.rle(encode(np.ones((12, 20)))), "40 x 24 pixels (W x H), got 20 x 12"),
    ],
)
def test_wrong_regions_are_named_in_one_line(region, says):
    with pytest.raises(RegionError) as caught:
        region.check(40, 24, name="<region3>")
    assert str(caught.value).startswith("<region3>: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(RegionError):
        region.pool_weights(SquareFrame(40, 24), 7, 7)


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (Region.polygon, ([1, 2, 3, 4, 5], [[1, 2, 3], [4, 5, 6]])),
        (lambda radius: Region.point(1, 2, radius), ("big", [1])),
        (Region.mask, ([[0, 1, 2]], [[0.0, 300.0, math.nan]], torch.ones(4, 4, device="meta"), torch.ones(4))),
        (Region.rle, ({"counts": "04"}, {"size": [4, 4], "counts": 7}, {"size": [4, "4"], "counts": "04"})),
        (Region.rle, ({"size": [10**6, 10**6], "counts": "0"},)),
        (lambda normalized: Region.box(0.1, 0.1, 0.5, 0.5, normalized=normalized), ("no", 2)),
        (Region.of, (torch.ones(4).to_sparse(), {"box": [0.1, 0.1, 0.5, 0.5], "normalized": 2})),
    ],
)
def test_what_cannot_be_a_region_is_refused_at_once(make, values):
    for value in values:
        with pytest.raises(RegionError, match=r"^region: expected"):
            make(value)


@repeatable
@given(scenes())
def test_json_round_trip(scene):
    region, width, height = scene
    again = Region.from_dict(json.loads(json.dumps(region.to_dict())))
    assert (again, hash(again), again.kind) == (region, hash(region), region.kind)
    assert again.area(width, height) == region.area(width, height)
    assert pickle.loads(pickle.dumps(region)) == region


@pytest.mark.parametrize(
    "value",
    [
        {}, {"box": [1, 2, 3]}, {"box": "1,2,3,4"}, {"box": [1, 2, 3, 4], "radius": 3}, {"point": [1, 2, 3]},
        {"mask": {"size": [4, 4], "counts": "0"}},
        "1,2,3,4", None, 5, [1, 2, 3], [1, 2, None, 4], [True, 1, 2, 3], [1j, 2, 3, 4], [[1, 2], [3]], ["1"] * 4,
    ],
)  # fmt: skip
def test_values_that_stand_for_no_region(value):
    with pytest.raises(RegionError, match=r"^<region2>: expected"):
        Region.list_of([Region.point(1, 2), value])


SOFT = np.array([[0, 1, 3, 127, 128, 200, 255, 255]], np.uint8)
INSIDE = SOFT >= 128


def soft_masks():
    flat, deep = np.zeros_like(SOFT), SOFT.astype(np.uint16) * 257
    yield from (SOFT, SOFT / 255, deep, SOFT.astype(int), torch.tensor(SOFT / 255))
    colour, cut = [SOFT, flat, flat], [flat + 9, flat + 9, flat + 9, SOFT]
    yield from (Image.fromarray(np.dstack(each)) for each in (colour, cut, [*colour, flat + 255]))
    yield from (Image.fromarray(np.dstack([flat, SOFT]), "LA"), Image.fromarray(SOFT), Image.fromarray(deep))
    yield Image.fromarray(SOFT).convert("RGB").quantize(8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_soft_edges_are_inside_from_half_on():
    for values in soft_masks():
        region = Region.mask(values)
        np.testing.assert_array_equal(region.to_mask(8, 1), INSIDE, err_msg=str(values))
        assert "more than two values" in region.note


def test_of_two_values_the_larger_is_inside():
    for values in ([[0, 1]], [[0, 7]], [[3, 200]], [[0.0, 1.0]], np.array([[0, 255]], np.uint8), [[False, True]]):
        region = Region.mask(values)
        np.testing.assert_array_equal(region.to_mask(2, 1), [[False, True]])
        assert region.note == ""
    assert Region.mask(np.ones((2, 2), int)).area(2, 2) == 4
    brush = np.zeros((1, 2, 4), np.uint8)
    brush[0, 1, 3] = 100  # one transparency throughout
    assert Region.mask(brush) == Region.mask([[False, True]])


def test_values_that_stand_for_regions():
    box = Region.box(1, 2, 3, 4)
    tensor = torch.tensor([1, 2, 3, 4], dtype=torch.bfloat16)
    for value in (box, [1, 2, 3, 4], (1.0, 2, 3, 4), np.array([1, 2, 3, 4]), tensor, {"box": [1, 2, 3, 4]}):
        assert Region.of(value) == box
        assert Region.list_of([value]) == [box]
    for values in ([1, 2, 3, 4], box, tensor, tensor[None], torch.tensor([1.0, 2, 3, 4], requires_grad=True)):
        assert Region.list_of(values) == [box]
    assert Region.list_of(np.stack([L_SHAPE] * 2)) == 2 * Region.list_of(L_SHAPE) == [Region.mask(L_SHAPE)] * 2
    assert Region.of(torch.tensor(L_SHAPE)) == Region.of(L_SHAPE) == Region.mask(L_SHAPE)
    assert Region.polygon(torch.tensor([[0, 0], [4, 0], [0, 4]])) == Region.polygon([0, 0, 4, 0, 0, 4])


def test_normalized_boxes():
    given = Region.box(0.1, 0.2, 0.5, 0.6, normalized=True)
    assert given.bounds(100, 50) == pytest.approx((10, 10, 50, 30))
    assert given != Region.box(0.1, 0.2, 0.5, 0.6)
    assert Region.from_dict(given.to_dict()) == given
    for region in (Region.box(0.1, 0.2, 0.5, 0.9), Region.box(0, 0, 1, 1), Region.polygon([0, 0, 1, 0, 1, 1])):
        with pytest.raises(RegionError, match="normalized"):
            region.check(40, 30)
        region.check(1, 1)
    Region.box(0, 0, 1, 1, normalized=False).check(40, 30)
    with pytest.raises(RegionError, match="normalized"):
        Region.box(10, 20, 30, 40, normalized=True)


def tangle(seed, points, width=80, height=60):
    return np.random.default_rng(seed).random((points, 2)) * (1.6 * width, 1.6 * height) - (0.3 * width, 0.3 * height)


@pytest.mark.parametrize("width", [0.5, 20])
def test_long_strokes_are_drawn_piece_by_piece(width):
    line = np.vstack([tangle(2, 60), [[20, 20]] * 3, [[20, 40], [60, 40]]])
    whole = shapely.make_valid(shapely.buffer(shapely.LineString(line), width / 2, quad_segs=32))
    y_edges, x_edges = SquareFrame(80, 60).edges(24, 24)
    expected = cells(shapely.intersection(whole, shapely.box(0, 0, 80, 60)), y_edges, x_edges)
    found = areas(Region.scribble(line, width=width), y_edges, x_edges, 80, 60)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    "region",
    [
        Region.polygon(tangle(0, 121)),
        Region.scribble(tangle(1, 601)),
        Region.scribble(np.arange(30_000).reshape(-1, 2) / 400),
    ],
    ids=["ring", "stroke", "long"],
)
def test_what_would_take_minutes_to_draw_is_refused(region):
    with pytest.raises(RegionError, match=r"region: .* (crosses itself|has) more than .*draw it with fewer points"):
        region.check(80, 60)

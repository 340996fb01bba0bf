"""Regions from files, grids and a segmenting model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamConfig, SamImageProcessorPil, SamModel

from regiongpt.data.shards import Rejects
from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.inference.over_images import Proposal, Segmenter, choose, grid_points, read_proposals
from regiongpt.regions import Region

WIDTH, HEIGHT = 60, 40
MASK = Region.mask(np.tri(HEIGHT, WIDTH, dtype=bool))


def read(folder: Path, data: object, **more: object) -> list[Proposal]:
    (folder / "boxes.json").write_text(json.dumps(data))
    return read_proposals(folder / "boxes.json", WIDTH, HEIGHT, **more)


def test_coco_results(tmp_path):
    rle = MASK.to_dict()["mask"]
    results = [
        {"image_id": 7, "category_id": 1, "bbox": [1, 2, 10.5, 20], "score": 0.5},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": rle, "score": 0.9},
        {"image_id": 7, "category_id": 1, "segmentation": [[0, 0, 20, 0, 20, 20]]},
    ]
    assert read(tmp_path, results) == [
        Proposal(region=Region.box(1, 2, 11.5, 22), score=0.5, place="boxes.json[0]"),
        Proposal(region=Region.rle(rle), score=0.9, place="boxes.json[1]"),
        Proposal(region=Region.polygon([[0, 0], [20, 0], [20, 20]]), place="boxes.json[2]"),
    ]


def test_regions_of_this_project(tmp_path):
    regions = [
        Region.box(1, 2, 3, 4),
        Region.point(5, 5, 3),
        Region.scribble([1, 1, 30, 30], 4),
        Region.polygon([0, 0, 9, 0, 9, 9]),
        Region.box(0.1, 0.1, 0.5, 0.5, normalized=True),
        MASK,
    ]
    entries = [region.to_dict() for region in regions]
    for data in (
        entries,
        {"image": "photo.jpg", "regions": entries},
        [{"region": entry, "score": 1} for entry in entries],
        [{**entry, "score": 1, "category": "cat"} for entry in entries],
    ):
        assert [proposal.region for proposal in read(tmp_path, data)] == regions


def test_one_image_of_several(tmp_path):
    boxes = [{"image_id": k, "bbox": [k, 0, 5, 5]} for k in (3, 42, 3)]
    assert [p.place for p in read(tmp_path, boxes, image="coco/000000000003.jpg")] == ["boxes.json[0]", "boxes.json[2]"]
    assert len(read(tmp_path, boxes, image="photo.jpg", image_id=42)) == 1
    assert len(read(tmp_path, boxes[:1], image="photo.jpg")) == 1
    images = [{"id": 42, "file_name": "train/photo.jpg"}, {"id": 3, "file_name": "other.jpg"}]
    assert len(read(tmp_path, {"images": images, "annotations": boxes}, image="x/photo.jpg")) == 1
    named = [{"image_id": name, "bbox": [1, 0, 5, 5]} for name in ("frame_9.jpg", "frame_10", "x.jpg")]
    for image, place in (("a/frame_9.jpg", 0), ("frame_10.png", 1)):
        assert [p.place for p in read(tmp_path, named, image=image)] == [f"boxes.json[{place}]"]
    with pytest.raises(DataError, match="which of the 1 images is frame_9"):
        read(tmp_path, named[1:2], image="frame_9.jpg")
    twice = [{"id": 3, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]
    with pytest.raises(DataError, match=r"no image called b\.jpg"):
        read(tmp_path, {"images": twice, "annotations": boxes}, image="b.jpg")
    rejects = Rejects()
    assert len(read(tmp_path, [*boxes, None, {"bbox": [1, 0, 5, 5]}], image_id=42, rejects=rejects)) == 1
    assert rejects.counts == {"record of another format": 2}, "of whatever image they are"
    with pytest.raises(DataError, match="no regions of image_id 9"):
        read(tmp_path, boxes, image_id=9)
    for more in ({}, {"image": "photo.jpg"}, {"image": "photo17.jpg"}):
        with pytest.raises(DataError, match="which of the 2 images"):
            read(tmp_path, boxes, **more)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty list of regions"),
        ({"boxes": []}, "expected a list of regions.*'boxes'"),
        (3, "expected a list of regions"),
    ],
)
def test_files_of_another_form(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, data)
    with pytest.raises(DataError, match=r"none\.json.*No such file"):
        read_proposals(tmp_path / "none.json", WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("entry", "kind", "reason"),
    [
        ([1, 2, 3, 4], "record of another format", "an object, got"),
        ({"bbox": ["a", 2, 3, 4]}, "record of another format", "in numbers"),
        ({"bbox": [1, 2, 0, 4]}, "box without size", "above 0"),
        ({"bbox": [1, 2, 3, 4], "score": None}, "score that is no number", "finite number"),
        ({"bbox": [1, 2, 3, 4], "segmentation": {"size": [4, 4], "counts": "04"}}, "RLE of another size", "60 x 40"),
        ({"segmentation": [[1, 1, 5, 5, 9]]}, "polygon that is not pairs", "x, y, x, y"),
        ({"box": [9, 2, 3, 4]}, "region that makes no sense", "x0 < x1"),
        ({"label": "cat"}, "record of another format", "'label'"),
    ],
)
def test_one_bad_entry_is_left_out_and_counted(tmp_path, entry, kind, reason):
    rejects = Rejects()
    assert [p.place for p in read(tmp_path, [entry, {"bbox": [1, 2, 3, 4]}], rejects=rejects)] == ["boxes.json[1]"]
    assert rejects.counts == {kind: 1}
    with pytest.raises(DataError, match=rf"boxes\.json: no region can be used: boxes\.json\[0\]: .*{reason}"):
        read(tmp_path, [entry])


def test_grid():
    points = [proposal.region.to_dict()["point"] for proposal in grid_points(2, WIDTH, HEIGHT)]
    assert points == [[15, 10], [45, 10], [15, 30], [45, 30]]


def test_choose_keeps_the_best_in_the_order_given():
    boxes = [Region.box(0, 0, 10, 10), Region.box(20, 20, 30, 30), Region.box(0, 0, 10, 8), Region.box(40, 0, 50, 9)]
    scores = [0.5, None, 0.9, 0.1]
    proposals = [Proposal(region=b, score=s, place=str(k)) for k, (b, s) in enumerate(zip(boxes, scores, strict=True))]

    def kept(**options: float) -> str:
        return "".join(proposal.place for proposal in choose(proposals, WIDTH, HEIGHT, **options))

    assert kept() == "0123"
    assert kept(most=3) == "023"
    assert kept(iou=0.7) == "123"  # the better one of 0 and 2, which overlap by 0.8
    assert kept(iou=0.8) == "0123"
    assert kept(iou=0.0, most=1) == "2"
    with pytest.raises(ConfigError, match="1: has no score"):
        kept(min_score=0.2)
    proposals[1] = Proposal(region=boxes[1], score=0.2, place="1")
    assert kept(min_score=0.2) == "012"


def test_choose_compares_masks_by_their_pixels():
    half = np.arange(HEIGHT)[:, None].repeat(WIDTH, 1) < 20
    regions = {0.3: Region.mask(half), 0.4: Region.box(0, 0, WIDTH, 20), 0.1: Region.mask(~half)}
    proposals = [Proposal(region=region, score=score) for score, region in regions.items()]
    assert [p.score for p in choose(proposals, WIDTH, HEIGHT, iou=0.9)] == [0.4, 0.1]
    assert choose([], WIDTH, HEIGHT, iou=0.5) == []


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "mlp_ratio": 2.0, "global_attn_indexes": [0], "window_size": 2,
            "num_pos_feats": 8, "mlp_dim": 32,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    SamModel(config).save_pretrained(folder)
    SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_segmenter(sam):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    segmenter = Segmenter(sam)
    found = segmenter.propose(photo, 3, min_quality=-9.0, min_stability=0.0)
    assert 1 <= len(found) <= 27  # three masks a point, less those with nothing in the image
    for proposal in found:
        assert proposal.region.kind == "mask"
        assert proposal.region.area(WIDTH, HEIGHT) >= 1
        assert proposal.score is not None
    assert segmenter.propose(photo, 3, min_quality=9.0) == []
    assert len(choose(found, WIDTH, HEIGHT, iou=0.5)) < len(found)


def test_not_a_sam_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"SAM model at .*none"):
        Segmenter(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="'clip'"):
        Segmenter(tmp_path)

"""A second look at regions, their own crops: what it sees, what it adds, when it is left out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from asking import boxes, photograph, tiny_parts
from PIL import Image

from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Drawn
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.run import answer_image, model_identity
from regiongpt.evaluate.task import Item
from regiongpt.images import load_image
from regiongpt.inference import Question, RegionPredictor
from regiongpt.regions import Region
from regiongpt.train.dataset import DataCollator, RecordDataset, answer_loss

TOWERS = ["clip_vision_model", "efficientnet_lite"]
DESCRIBE = "What is <region1>, beside <region2>?"


def looking(tower: str = "clip_vision_model", trained: bool = True, **options: Any) -> tuple[Any, Any]:
    """A model that looks twice, and one whose second look says something if it is ``trained``."""
    model, processor = tiny_parts(tower, "plain", region_crop=True, **options)
    if trained:
        torch.nn.init.normal_(model.refinement.crop_projection.weight, std=5.0)
    return model, processor


def colours(processor: Any, picture: Image.Image, region: Region) -> np.ndarray:
    """Red of the crop, (s, s), 0 to 255."""
    (pixels,) = processor.crop_inputs(picture, [region])
    each = processor.image_processor
    return (pixels[0].numpy() * each.image_std[0] + each.image_mean[0]) * 255


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_untrained_changes_nothing(tower: str) -> None:
    predictor = RegionPredictor(*looking(tower, trained=False)).set_image(photograph())
    regions = boxes(3)
    scene = predictor._here()
    fast, careful = (predictor.engine.pool(scene, regions, detail) for detail in ("fast", "careful"))
    assert torch.equal(fast, careful)
    assert len(scene.crops) == 3


def test_every_way_of_asking_looks_twice() -> None:
    predictor = RegionPredictor(*looking()).set_image(photograph())
    one, two = boxes(2)
    few: Any = {"max_new_tokens": 8}
    said = {}
    for detail in ("fast", "careful"):
        how = {"detail": detail, **few}
        said[detail] = [
            predictor.ask(DESCRIBE, [one, two], **how).text,
            "".join(predictor.stream(DESCRIBE, [one, two], **how)).strip(),
            predictor.conversation([one, two]).ask(DESCRIBE, **how).text,
            predictor.ask_many([Question(text=DESCRIBE, regions=[one, two], detail=detail)], **few)[0].text,
            [answer.text for answer in predictor.describe([one, two], **how)],
            predictor.classify([one, two], ["cat", "hot dog"], detail=detail)[0].probabilities["hot dog"],
            predictor.locate("the cat", [one, two], detail=detail).probability,
        ]
        assert len(set(said[detail][:4])) == 1
    assert all(fast != careful for fast, careful in zip(*said.values(), strict=True))


def test_regions_within_the_same_box_share_a_crop() -> None:
    predictor = RegionPredictor(*looking()).set_image(photograph())
    masks = [np.zeros((40, 60), dtype=bool) for _ in range(3)]
    for k, mask in enumerate(masks):
        mask[5 : 20 + k // 2, 10:30] = True
        mask[8 + k // 2, 12] = False
    regions = [Region.mask(mask) for mask in masks]
    predictor.describe(regions, detail="careful", max_new_tokens=1)
    assert len(predictor._here().crops) == 2


def test_batches_and_single_crops_are_alike_and_each_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = RegionPredictor(*looking("efficientnet_lite")).set_image(photograph())
    engine, scene, regions = predictor.engine, predictor._here(), boxes(20)
    counts, encode = [], engine.model.encode_image
    monkeypatch.setattr(engine.model, "encode_image", lambda pixels: counts.append(len(pixels)) or encode(pixels))
    together = engine.pool(scene, regions, "careful")
    assert counts == [16, 4]
    assert torch.equal(engine.pool(scene, regions[::-1], "careful").flip(0), together)
    assert counts == [16, 4]
    assert not torch.allclose(engine.pool(scene, regions), together, atol=1e-2)
    scene.crops.clear()
    alone = torch.cat([engine.pool(scene, [region], "careful") for region in regions])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("detail", ["fast", "careful"])
def test_the_processor_and_generate_say_what_the_predictor_says(detail: str) -> None:
    model, processor = looking(region_position=1.0)
    predictor = RegionPredictor(model, processor).set_image(photograph())
    regions, turns = boxes(2), [{"role": "user", "content": f"{DESCRIBE} And <region1>?"}]
    how: Any = {"images": [photograph()], "regions": regions, "detail": detail}
    inputs = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True, **how)
    for beams in (1, 2):
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=beams)
        written = processor.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if beams == 1:
            asked = predictor.ask(turns[0]["content"], regions, detail=detail, max_new_tokens=8)
            assert (asked.text, asked.warnings) == (written.strip(), ())
    if detail == "careful":
        features = model.encode_crops(inputs["region_crops"])
        logits = [model(**{**inputs, "region_crops": each}).logits for each in (inputs["region_crops"], features)]
        assert torch.equal(*logits)


def test_fast_and_careful_items_share_a_batch() -> None:
    model, processor = looking()
    turns = [{"role": "user", "content": "What is <region1>?"}]
    how: Any = {"image": photograph(), "add_generation_prompt": True}
    items = [
        processor.encode_conversation(turns, regions=boxes(count), detail=detail, **how)
        for count, detail in ((1, "careful"), (3, "fast"), (2, "careful"))
    ]
    batch = processor.collate([{**item, "warnings": []} for item in items])
    assert batch["region_crops"].shape[:2] == (3, 3)
    for row, item in enumerate(items):
        alone = model(**processor.collate([item])).logits[0]
        together = model(**batch).logits[row, : len(alone)]
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_a_crop_is_a_quarter_larger_than_its_region_and_stays_in_the_padded_image() -> None:
    _, processor = looking("efficientnet_lite")
    columns = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    picture = load_image(np.stack([columns] * 3, -1))
    middle = colours(processor, picture, Region.box(80, 40, 120, 60))  # 50 px around (100, 50)
    assert 74 <= middle[32, 0] <= 77
    assert 122 <= middle[32, -1] <= 125
    left = colours(processor, picture, Region.box(0, 40, 40, 60))  # shifted by 5 px
    assert left[32, 0] <= 2
    assert 47 <= left[32, -1] <= 50
    above = colours(processor, picture, Region.box(80, 0, 160, 10))  # the image begins half way down
    assert np.allclose(above[:26], processor.pad_fill[0], atol=1)
    assert 70 <= above[60, 0] <= 74
    whole = colours(processor, picture, Region.box(-50, -50, 300, 300))
    assert np.allclose(whole, colours(processor, picture, Region.box(0, 0, 200, 100)))
    outline = Region.polygon([(80, 40), (120, 40), (100, 60)])  # by its bounds, with nothing masked out
    assert np.allclose(colours(processor, picture, outline), middle)


def test_a_model_without_it_refuses() -> None:
    model, processor = tiny_parts()
    predictor = RegionPredictor(model, processor).set_image(photograph())
    region = boxes(1)
    for ask in (
        lambda: predictor.ask("Hello?", detail="careful"),
        lambda: predictor.describe(region, detail="careful"),
        lambda: predictor.locate("a cat", region, detail="careful"),
        lambda: predictor.answers([Question(text="Hello?", detail="careful")]),
        lambda: processor.encode_conversation([], photograph(), region, detail="careful"),
        lambda: model.encode_crops(torch.ones(1, 1, 3, 28, 28)),
    ):
        with pytest.raises(ConfigError, match="region_crop"):
            ask()
    with pytest.raises(ConfigError, match="detail"):
        predictor.ask("Hello?", detail="slow")
    turns = [{"role": "user", "content": "What is <region1>?"}]
    with pytest.raises(DataError, match="image"):
        looking()[1].encode_conversation(turns, regions=boxes(1), detail="careful", add_generation_prompt=True)


def test_training_leaves_half_of_the_crops_out_by_seed_item_and_region(tmp_path: Path) -> None:
    model, processor = looking(trained=False)
    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    regions = tuple(RecordRegion(region=region, category="cat") for region in boxes(12))
    turns = (Turn(task="classify", answer="cat", regions=(1,), label_set="COCO-80"),)
    record = Record(id="a", source="jsonl", image="photo.png", width=60, height=40, regions=regions, turns=turns)

    class Records(list[Record]):
        folder = tmp_path

        def image_path(self, record: Record) -> Path:
            return tmp_path / str(record.image)

    records: Any = Records([record] * 30)
    mixture: Any = SimpleNamespace(seed=0, draw=lambda item: Drawn(records=records, index=item % 30, times=item // 30))
    dataset = RecordDataset(mixture, processor, 60)

    def kept(item: int) -> list[bool]:
        return dataset[item]["region_crops"].flatten(1).any(1).tolist()

    drawn = [kept(item) for item in range(60)]
    assert drawn == [kept(item) for item in range(60)]
    assert 0.4 < np.mean(drawn) < 0.6
    assert len({tuple(each) for each in drawn}) > 50
    mixture.seed = 1
    assert kept(3) != drawn[3]
    batch = DataCollator(processor, ())([dataset[item] for item in range(4)])
    answer_loss(model.train(), dict(batch), None).backward()
    assert bool(model.refinement.crop_projection.weight.grad.any()), "what is untrained learns"


def test_an_evaluation_looks_twice_and_keeps_its_answers_apart(tmp_path: Path) -> None:
    model, processor = looking()
    Image.fromarray(photograph()).save(tmp_path / "photo.png")
    about: Any = {"image": tmp_path / "photo.png", "image_id": 1, "choices": ("cat", "hot dog")}
    items = [
        Item(id=str(k), question="What is <region1>?", regions=(each,), **about) for k, each in enumerate(boxes(2))
    ]
    predictor = RegionPredictor(model, processor)
    fast, careful = (answer_image(predictor, items, detail) for detail in ("fast", "careful"))
    assert all(one["scores"] != other["scores"] for one, other in zip(fast, careful, strict=True))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    keys = {
        model_identity(tmp_path / "model", "float32", "cpu", {"detail": detail})["key"]
        for detail in ("fast", "careful")
    }
    assert len(keys) == 2

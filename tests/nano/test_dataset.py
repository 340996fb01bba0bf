"""Training examples: isolated turns equal single-turn conversations; the order depends on the seed and epoch alone."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conversations import ClassStatistics, ConversationSampler
from dataset import ConversationDataset, shown_in_cells
from recipe import FeatureConfig
from tiny import save_language

from regiongpt import Region
from regiongpt.data.coco import ImageAnnotations, ObjectAnnotation
from regiongpt.data.facts import View
from regiongpt.model import weights
from regiongpt.prompts import COCO_80
from regiongpt.train.packing import isolate_turns, turn_numbers

TURNS = [
    ("What is <region2>?", "a cat"),
    ("Is <region1> left of <region2>?", "Yes."),
    ("Describe the image.", "So so."),
]


@pytest.fixture(scope="module")
def nano_like(tmp_path_factory):
    """A random model of nano's kind: EfficientNet-Lite tower, plain chat template, numbered regions."""
    folder = tmp_path_factory.mktemp("language")
    save_language(folder, max_position_embeddings=512)
    shape = {"image_size": 64, "image_grid": [2, 2], "refinement_channels": 16, "region_format": "[{n}]<region>"}
    return weights.create("efficientnet-lite2", folder, chat_template="plain", **shape)


def messages(turns):
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def encode(processor, turns, regions):
    example = processor.encode_conversation(messages(turns), regions=regions, image_size=(60, 40))
    generator = torch.Generator().manual_seed(3)
    example["vision_features"] = torch.randn(352 + 4 * 120 + 4 * 48 + 16, 2, 2, generator=generator)
    return example


@torch.no_grad()
def loss_sum(model, batch):
    return float(model(**batch, num_items_in_batch=1, loss_only=True).loss)


def test_isolated_turns_have_the_loss_of_single_turn_conversations(nano_like):
    model, processor = nano_like
    regions = [Region.box(2, 3, 20, 30), Region.box(30, 5, 55, 38)]
    whole = encode(processor, TURNS, regions)
    turns = turn_numbers(whole, processor.image_token_id)
    assert turns.unique().tolist() == [0, 1, 2, 3]
    mask, positions = isolate_turns(turns[None])
    isolated = {**processor.collate([whole]), "attention_mask": mask, "position_ids": positions}
    alone = [processor.collate([encode(processor, [turn], regions)]) for turn in TURNS]
    assert loss_sum(model, isolated) == pytest.approx(sum(loss_sum(model, each) for each in alone), rel=1e-5)
    # The same tokens with each turn seeing the ones before are another loss: the test can fail.
    together = {**processor.collate([whole])}
    assert loss_sum(model, together) != pytest.approx(loss_sum(model, isolated), rel=1e-5)


def annotated(count: int) -> list[ImageAnnotations]:
    """Images with one to four objects each."""

    def thing(k: int, j: int) -> ObjectAnnotation:
        return ObjectAnnotation(id=10 * k + j, category=("cat", "dog")[j % 2], box=(4.0 * j, 2.0, 4.0 * j + 20, 30.0))

    def image(k: int) -> ImageAnnotations:
        objects = tuple(thing(k, j) for j in range(1 + k % 4))
        return ImageAnnotations(path=Path(f"{k}.jpg"), image_id=k, width=60, height=40, objects=objects)

    return [image(k) for k in range(count)]


def dataset(processor, seed=0, images=23, epochs=2, crops=None):
    data = annotated(images)
    rows = {"row": lambda index, view: torch.full((1,), 10.0 * index + view), "place": lambda index: index}
    store = SimpleNamespace(colours=[{}] * images, blanks=None, crops=crops, **rows)
    sampler, views = ConversationSampler(ClassStatistics.of(data)), FeatureConfig(views=2)
    return ConversationDataset(data, store, sampler, processor, views, seed, epochs * images, 4, 0.5, (2, 2))


def test_every_epoch_holds_every_image_once_and_both_views_in_turn(nano_like):
    data = dataset(nano_like[1])
    drawn = [data.draw(item)[:2] for item in range(len(data))]
    for epoch in (drawn[:23], drawn[23:]):
        assert sorted(index for index, _ in epoch) == list(range(23))
    views = dict(drawn[:23])
    assert all(view != views[index] for index, view in drawn[23:])


def test_an_item_is_the_same_whatever_was_drawn_before_and_differs_between_seeds(nano_like):
    first, second = dataset(nano_like[1]), dataset(nano_like[1])
    for item in (5, 40):
        first[0]
        ours, theirs = first[item], second[item]
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["vision_features"], theirs["vision_features"])
    assert [first.draw(k)[0] for k in range(23)] != [dataset(nano_like[1], seed=1).draw(k)[0] for k in range(23)]


def test_cells_show_what_fills_them_and_small_things_that_lie_in_them():
    objects = (
        ObjectAnnotation(id=1, category="dog", box=(0.0, 0.0, 40.0, 20.0)),
        ObjectAnnotation(id=2, category="cup", box=(70.0, 30.0, 74.0, 34.0)),
    )
    image = ImageAnnotations(path=Path("a.jpg"), image_id=1, width=80, height=40, objects=objects)
    # The photograph lies in the middle of a square of side 80: cells of the 4 x 4 grid are 20 px, rows 1 and 2 hold it.
    shown = shown_in_cells(View(image), (4, 4)).reshape(4, 4, 80)
    assert [tuple(cell) for cell in zip(*shown[..., COCO_80.index("dog")].nonzero(), strict=True)] == [(1, 0), (1, 1)]
    assert [tuple(cell) for cell in zip(*shown[..., COCO_80.index("cup")].nonzero(), strict=True)] == [(2, 3)]
    assert shown.sum() == 3


def test_regions_come_with_the_crops_of_their_objects_but_for_half_of_them(nano_like):
    crops = {(k, 10 * k + j): np.full(2, 1 + 10 * k + j, np.float16) for k in range(23) for j in range(4)}
    data, left = dataset(nano_like[1], crops=crops), []
    for item in range(46):
        _, _, _, talk = data.draw(item)
        example = data[item]
        if not talk.objects:
            continue
        seen = example["region_crops"]
        expected = torch.tensor([[1.0 + each] * 2 for each in talk.objects])
        shown = seen.any(1)
        assert torch.equal(seen[shown], expected[shown])
        assert torch.equal(seen, data[item]["region_crops"])
        left += (~shown).tolist()
    assert 0.3 < np.mean(left) < 0.7

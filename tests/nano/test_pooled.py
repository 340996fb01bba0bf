"""Alignment's first part: what is pooled, and that refinement and connector alone learn from it."""

import copy

import numpy as np
import torch
from alignment import ClassWords, likeness
from features import FeatureStore
from pictures import annotated
from pooled import pool, train_pooled
from recipe import FeatureConfig, NanoStageConfig
from test_dataset import nano_like  # noqa: F401  # a fixture

from regiongpt.prompts import COCO_80

CHANNELS = 352 + 4 * 120 + 4 * 48 + 16
WHOLE = FeatureConfig(views=1)


def test_regions_and_cells_are_means_of_what_the_tower_saw(nano_like):  # noqa: F811
    model, _ = nano_like
    rows, columns = model.config.tower_grid
    image = annotated(("dog", (0, 0, 50, 80)), ("cat", (50, 0, 100, 80)))
    features = np.zeros((1, 1, CHANNELS, rows, columns), np.float16)
    features[..., : columns // 2], features[..., columns // 2 :] = 1, 3  # left and right
    found = pool([image], FeatureStore(features, [{}]), model, WHOLE)
    assert [COCO_80[k] for k in found.classes] == ["dog", "cat"]
    assert found.regions[:, 0].tolist() == [1, 3]
    assert found.crops is None
    assert found.cells.shape == (model.config.image_grid[0] * model.config.image_grid[1], CHANNELS)
    assert found.cells[:, 0].mean() == 2
    assert {COCO_80[k] for k in found.shown.any(0).nonzero()[:, 0]} == {"dog", "cat"}


def test_refinement_and_connector_learn_what_is_what(nano_like):  # noqa: F811
    model, processor = copy.deepcopy(nano_like[0]), nano_like[1]
    rng = np.random.default_rng(0)
    classes = ["dog", "cat", "car", "book"]
    images, features = [], rng.normal(0, 0.3, (16, 1, CHANNELS, *model.config.tower_grid)).astype(np.float16)
    for k in range(16):
        images.append(annotated((classes[k % 4], (0, 0, 100, 80))))
        features[k, :, 40 * (k % 4) : 40 * (k % 4) + 40] += 1
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.requires_grad_(False)
    model.refinement.requires_grad_(True)
    model.connector.requires_grad_(True)
    words = ClassWords(processor.tokenizer)
    pooled = pool(images, FeatureStore(features, [{}] * 16), model, WHOLE)
    train_pooled(model, words, pooled, NanoStageConfig(lr=3e-3), 400, 0)
    changed = {
        name.split(".")[0] for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])
    }
    assert changed == {"refinement", "connector"}
    with torch.no_grad():
        names = words(model.get_input_embeddings().weight)
        seen = model.refinement(pooled.regions.float()[:, :, None, None]).mean((2, 3))
        assert torch.equal(likeness(model.connector(seen), names).argmax(1), pooled.classes)

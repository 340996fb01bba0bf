"""int8 weights: smaller, nearly the same, and refused where they do not go."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_checkpoint import make_checkpoint
from torch import nn

from regiongpt.errors import ConfigError
from regiongpt.inference import RegionPredictor
from regiongpt.inference.engine import to_int8
from regiongpt.regions import Region

PHOTO = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_int8_is_smaller_and_nearly_the_same(checkpoint):
    plain = RegionPredictor.from_pretrained(checkpoint, device="cpu").set_image(PHOTO)
    small = RegionPredictor.from_pretrained(checkpoint, device="cpu", int8=True).set_image(PHOTO)
    assert nn.Linear not in {type(module) for module in small.engine.model.language_model.modules()}
    names, box = ["cat", "hot dog", "horse"], Region.box(4, 4, 30, 20)
    expected, found = (list(p.classify(box, names).probabilities.values()) for p in (plain, small))
    assert expected != found
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=0.15)
    assert small.ask("What is <region1>?", box, max_new_tokens=4).text


def test_int8_goes_with_float32_on_a_cpu_alone(checkpoint):
    with pytest.raises(ConfigError, match="float32 with int8"):
        RegionPredictor.from_pretrained(checkpoint, device="cpu", dtype="bfloat16", int8=True)
    with pytest.raises(ConfigError, match="device cpu with int8"):
        to_int8(tiny_model().to("meta"))
    model = tiny_model()
    model.language_model = torch.nn.Embedding(3, 3)
    with pytest.raises(ConfigError, match="no linear layers"):
        to_int8(model)

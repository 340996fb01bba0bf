"""The model: configuration, freezing, refinement and pooling, losses, batching, generation, saving."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGE, REGION, assert_same, text_config, tiny_config, tiny_inputs, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import regiongpt.model.modeling as modeling
from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.model import RegionGPTConfig
from regiongpt.model.configuration import REFINEMENTS
from regiongpt.model.modeling import Refinement, mask_pool

LITE = {"model_type": "efficientnet_lite", "variant": "efficientnet-lite0", "image_size": 32}


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sequences in one batch, padded on the left, with different numbers of regions and region tokens."""

    def padded(name: str, after: tuple[int, ...] = (), value: int = 0, left: bool = False) -> torch.Tensor:
        longest = max(part[name].shape[1] for part in parts)
        gaps = [longest - part[name].shape[1] for part in parts]
        sides = [(gap, 0) if left else (0, gap) for gap in gaps]
        return torch.cat(
            [F.pad(part[name], (*after, *side), value=value) for part, side in zip(parts, sides, strict=True)]
        )

    return {
        "input_ids": padded("input_ids", left=True),
        "attention_mask": padded("attention_mask", left=True),
        "pixel_values": torch.cat([p["pixel_values"] for p in parts]),
        "region_weights": padded("region_weights", (0, 0, 0, 0)),
        "region_ids": padded("region_ids", value=-1),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"refinement": "deconvolution"}, "refinement must be one of deconv, bilinear.*'deconvolution'"),
        ({"image_size": 30}, "multiple of the patch size, 7 px; got 30"),
        ({"image_grid": [17, 4]}, r"image_grid must be two numbers up to the refined grid \[16, 16\].*\[17, 4\]"),
        ({"region_position": -1}, "region_position must be at least 0.*; got -1"),
        (
            {"region_position": 1, "refinement": "none", "image_size": 21},
            r"region_position must be .* under 4 columns, as \[3, 3\]; got 1",
        ),
        ({"vision_config": 5}, "vision_config must be a configuration"),
        ({"image_grid": [0, 4]}, "image_grid must be two numbers"),
        ({"vision_feature_layer": -5}, "between -4 and 3; got -5"),
        ({"vision_config": text_config()}, "must be one of clip_vision_model.*'llama'"),
        ({"vision_config": {**LITE, "image_size": 48}}, "patch size, 32 px; got 48"),
        (
            {"image_connector": "downsample"},
            r"image_connector and region_connector must be one of .*\('mlp', 'shared'\)",
        ),
        ({"region_connector": "own"}, "image_connector and region_connector must be one of"),
    ],
)
def test_fields_are_checked_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        tiny_config(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("refinement", "scale"), REFINEMENTS.items())
def test_the_papers_grids(refinement: str, scale: int) -> None:
    config = RegionGPTConfig(refinement=refinement)
    assert config.tower_grid == (24, 24)
    assert config.refined_grid == (24 * scale, 24 * scale)
    assert config.num_image_tokens == 576


def test_the_tower_is_frozen_and_all_else_learns() -> None:
    model = tiny_model().train()
    inputs = tiny_inputs(model.config, [0, 1])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    model(**inputs, labels=labels, loss_only=True).loss.backward()
    assert not model.vision_tower.training
    assert model.refinement.training
    for name, parameter in model.named_parameters():
        if name.startswith("vision_tower."):
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name


@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_every_placeholder_gets_its_own_feature(refinement: str) -> None:
    model = tiny_model(refinement=refinement)
    inputs = tiny_inputs(model.config, [2, 0, 2])
    with torch.no_grad():
        visual = {k: v for k, v in inputs.items() if k != "attention_mask"}
        embeds = model.embed(**visual)[0]
        refined = model.refine(model.encode_image(inputs["pixel_values"]))
        regions = model.region_features(refined, inputs["region_weights"])[0]
        image = model.image_features(refined)[0]
        words = model.get_input_embeddings()(inputs["input_ids"])[0]
    ids = inputs["input_ids"][0]
    torch.testing.assert_close(embeds[ids == REGION], regions[[2, 0, 2]])
    torch.testing.assert_close(embeds[ids == IMAGE], image)
    torch.testing.assert_close(embeds[ids < IMAGE], words[ids < IMAGE])


def test_image_and_regions_share_one_connector() -> None:
    """A region that is one whole cell of the image grid is embedded as that image token is."""
    model = tiny_model()
    refined = model.refine(torch.randn(1, 32, 4, 4))
    weights = torch.zeros(1, 1, 16, 16)
    weights[..., 4:8, 8:12] = 1 / 16
    torch.testing.assert_close(
        model.region_features(refined, weights)[0, 0], model.image_features(refined)[0, 1 * 4 + 2]
    )


def test_precomputed_features_stand_in_for_pixels() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model.config, [0])
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs["vision_features"] = model.encode_image(inputs.pop("pixel_values")).double()
        torch.testing.assert_close(model(**inputs).logits, expected)
        embeds = model.embed(**{k: v for k, v in inputs.items() if k != "attention_mask"})
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)


@pytest.mark.parametrize("refinement", ["deconv", "bilinear"])
def test_batch_equals_one_by_one(refinement: str) -> None:
    model = tiny_model(refinement=refinement)
    rows = [[0, 1, 2, 0], [], [1], []]
    parts = [tiny_inputs(model.config, r, seed=i, regions=max(r, default=0) + 1) for i, r in enumerate(rows)]
    parts[3]["input_ids"][parts[3]["input_ids"] == IMAGE] = 7  # text without an image
    batch = joined(parts)
    with torch.no_grad():
        logits = model(**batch).logits
        for row, part in enumerate(parts):
            length = part["input_ids"].shape[1]
            torch.testing.assert_close(logits[row, -length:], model(**part).logits[0], rtol=1e-4, atol=1e-4)
    answers = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, part in enumerate(parts):
        alone = model.generate(**part, max_new_tokens=6, do_sample=False)[0, part["input_ids"].shape[1] :]
        assert answers[row, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda i: i.pop("pixel_values"), DataError, "give pixel_values or vision_features"),
        (lambda i: i["input_ids"].__setitem__((0, 1), 7), DataError, r"16 <image> tokens here; got \[15\]"),
        (lambda i: i.pop("region_weights"), RegionError, "region_weights or region_ids is missing"),
        (lambda i: i.update(region_ids=torch.tensor([[0]])), RegionError, r"\[2\] tokens and \[1\] ids"),
        (lambda i: i.update(region_ids=torch.tensor([[0, 3]])), RegionError, "rows of region_weights, 0 to 2; got 3"),
        (lambda i: i.update(region_weights=torch.rand(1, 3, 4, 4)), RegionError, r"refined grid \(16, 16\)"),
        (
            lambda i: (i.pop("pixel_values"), i.update(vision_features=torch.rand(1, 8, 4, 4))),
            DataError,
            r"vision_features must be .*32, 4, 4\); got \(1, 8, 4, 4\)",
        ),
    ],
)
def test_features_that_do_not_fit_the_text(change: Any, error: type[Exception], words: str) -> None:
    model = tiny_model()
    inputs = tiny_inputs(model.config, [0, 1])
    change(inputs)
    with pytest.raises(error, match=words) as raised:
        model(**inputs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_only_has_the_loss_and_the_gradients_of_the_whole(softcap: float | None) -> None:
    """Gemma 2 bends its logits after the head: that must happen to the chosen ones too."""
    shape = {"vocab_size": 62, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    gemma = AutoConfig.for_model(
        "gemma2", **shape, num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=softcap
    )
    model = tiny_model(text_config=gemma)
    inputs = joined([tiny_inputs(model.config, [0, 1], seed=0), tiny_inputs(model.config, [2], seed=1)])
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels[:, :-3] = -100
    results = []
    for loss_only in (False, True):
        model.zero_grad()
        output = model(**inputs, labels=labels, loss_only=loss_only, num_items_in_batch=7)
        output.loss.backward()
        results.append((output.loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_batch() -> None:
    model = tiny_model()
    parts = [tiny_inputs(model.config, rows, seed=i) for i, rows in enumerate([[0], [0, 1, 2]])]
    batch = joined(parts)
    labels = torch.where(batch["input_ids"] < IMAGE, batch["input_ids"], -100)
    labels[0, :-1] = -100  # a one-word answer beside a long one
    labels[1, :17] = -100
    whole = model(**batch, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    split = sum(
        model(**part, labels=label[None, -part["input_ids"].shape[1] :], num_items_in_batch=items).loss
        for part, label in zip(parts, labels, strict=True)
    )
    torch.testing.assert_close(split, whole)


@pytest.mark.parametrize("loss_only", [False, True])
def test_no_target_gives_no_loss_rather_than_nan(loss_only: bool) -> None:
    model = tiny_model()
    ids = tiny_inputs(model.config, [])
    assert model(**ids, labels=torch.full_like(ids["input_ids"], -100), loss_only=loss_only).loss == 0


def test_generate_with_and_without_a_cache_is_greedy() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model.config, [1, 0])
    call = {"max_new_tokens": 6, "do_sample": False}
    answer = model.generate(**inputs, **call)
    assert torch.equal(model.generate(**inputs, **call, use_cache=False), answer)
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": answer, "attention_mask": torch.ones_like(answer)}).logits[0]
    logits[:, [IMAGE, REGION]] = -torch.inf
    start = inputs["input_ids"].shape[1]
    assert torch.equal(logits[start - 1 : -1].argmax(-1), answer[0, start:])


def test_beams_encode_the_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    inputs = tiny_inputs(model.config, [1, 0])
    calls = []
    encode = modeling.tower_features
    monkeypatch.setattr(modeling, "tower_features", lambda *a: calls.append(a[1].shape[0]) or encode(*a))
    found = model.generate(**inputs, max_new_tokens=5, num_beams=4, num_return_sequences=3, do_sample=False)
    assert found.shape[0] == 3
    assert calls == [1]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_two_turns_with_one_cache_are_written_as_without(name: str) -> None:
    model = tiny_model()
    first = tiny_inputs(model.config, [2])
    call = {"max_new_tokens": 6, "do_sample": False}
    cache = DynamicCache(config=model.config.text_config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = model.generate(**first, **{name: cache}, **call)
        assert torch.equal(answer, model.generate(**first, **call))
        ids = torch.cat([answer, torch.tensor([[7, REGION, 9]])], dim=1)
        second = {**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(**{**second, "region_ids": torch.tensor([[2, 1]])}, **call)
        second["region_ids"] = torch.tensor([[1]])  # of what is not cached
        assert torch.equal(model.generate(**second, **{name: cache}, **call), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options", [*({"refinement": each} for each in REFINEMENTS), {"vision_config": LITE}, {"region_crop": True}]
)
def test_save_and_load_keep_the_logits(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model = tiny_model(text_config=text_config(tie_word_embeddings=tied), refinement_channels=8, **options)
    inputs = tiny_inputs(model.config, [0, 2])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in loaded.vision_tower.parameters())
    assert_same(model, loaded, inputs)
    head, words = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is words) == tied


def refinement_of(refinement: str, **options: object) -> Refinement:
    torch.manual_seed(0)
    return Refinement(tiny_config(refinement=refinement, **options)).eval()


@pytest.mark.parametrize("grid", [[4, 4], [3, 5], [1, 1]])
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_pooling_equals_pooling_the_explicit_map(refinement: str, grid: list[int]) -> None:
    image_grid = [min(n, 4 * REFINEMENTS[refinement]) for n in grid]
    module = refinement_of(refinement, image_grid=image_grid)
    with torch.no_grad():
        small = module(torch.randn(2, 32, 4, 4))
        explicit = F.interpolate(small, scale_factor=module.bilinear_scale, mode="bilinear")
        side = 4 * REFINEMENTS[refinement]
        assert explicit.shape == (2, 32, side, side)
        weights = torch.rand(2, 3, side, side)
        weights[0, 0] = 0
        weights[0, 0, side - 1, 0] = 1  # a single cell, in a corner
        weights /= weights.sum((2, 3), keepdim=True)
        torch.testing.assert_close(module.pool_regions(small, weights), mask_pool(explicit, weights), rtol=0, atol=1e-5)
        expected = F.adaptive_avg_pool2d(explicit, image_grid).flatten(2).transpose(1, 2)
        torch.testing.assert_close(module.pool_image(small), expected, rtol=0, atol=1e-5)


def test_deconvolution_is_the_papers_block() -> None:
    module = refinement_of("deconv")
    features = torch.randn(1, 32, 4, 4)
    finer = nn.ConvTranspose2d.forward(module.deconv_1, features)
    finer = F.layer_norm(finer.permute(0, 2, 3, 1), (32,), module.norm.weight, module.norm.bias).permute(0, 3, 1, 2)
    expected = F.gelu(nn.ConvTranspose2d.forward(module.deconv_2, F.gelu(finer)))
    assert expected.shape == (1, 32, 16, 16)
    torch.testing.assert_close(module(features), expected)


def test_fewer_channels_begin_with_a_one_by_one_convolution() -> None:
    module = refinement_of("bilinear", refinement_channels=8)
    features = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(module(features), F.conv2d(features, module.reduce.weight, module.reduce.bias))
    assert not list(refinement_of("bilinear").parameters())

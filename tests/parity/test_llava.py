"""A LLaVA-1.5 checkpoint keeps its logits when it becomes a RegionGPT without refinement."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same, text_config, tiny_tokenizer, tower_config
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration

from regiongpt.cli import main
from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.model import weights

PADDED_VOCABULARY = 320


def save_llava(folder: Path, **options: Any) -> LlavaForConditionalGeneration:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vocabulary = options.pop("vocab_size", PADDED_VOCABULARY)
    config = LlavaConfig(
        vision_config=tower_config("clip_vision_model"),
        text_config=text_config(vocab_size=vocabulary, tie_word_embeddings=options.get("tie_word_embeddings", False)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        **options,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"multimodal_projector_bias": False}, {"tie_word_embeddings": True}, {"vocab_size": 260}],
    ids=["padded vocabulary", "no projector bias", "tied", "full vocabulary"],
)
def test_image_prompt_has_llavas_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    llava = save_llava(tmp_path / "llava", **options)
    model, processor = weights.from_llava(tmp_path / "llava", out=tmp_path / "ours")
    image = llava.config.image_token_index
    assert model.config.image_token_id == image
    ids = torch.tensor([[1, *[image] * 16, 40, 41, 42], [1, 50, *[image] * 16, 44, 45]])
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=pixels).logits
        found = model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=1e-4)
    assert_same(model, weights.load(tmp_path / "ours")[0], {"input_ids": ids, "pixel_values": pixels})
    vocabulary = max(llava.config.text_config.vocab_size, len(processor.tokenizer))
    assert model.config.text_config.vocab_size == found.shape[-1] == vocabulary


def test_its_regions_are_said_to_be_untrained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llava(tmp_path / "llava")
    assert main(["weights", "create", "--llava", str(tmp_path / "llava"), "--out", str(tmp_path / "ours")]) == 0
    assert "regions mean nothing until stage 1 has run" in capsys.readouterr().out


def test_refinement_before_llavas_connector(tmp_path: Path) -> None:
    llava = save_llava(tmp_path)
    model, processor = weights.from_llava(tmp_path, refinement="deconv")
    assert processor.refined_grid == [16, 16]
    torch.testing.assert_close(
        model.connector.linear_2.weight, llava.model.multi_modal_projector.linear_2.weight, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vision_feature_layer": [-2, -1]}, "one vision feature layer"),
        ({"vision_feature_select_strategy": "full"}, "class token"),
    ],
)
def test_other_llavas_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    save_llava(tmp_path, **options)
    with pytest.raises(CheckpointError, match=words):
        weights.from_llava(tmp_path)


def test_unknown_template_is_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        weights.from_llava(tmp_path / "nowhere", chat_template="vicuna")

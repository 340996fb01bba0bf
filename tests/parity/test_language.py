"""Without an image, the model is its language model: same logits, same words."""

from typing import Any

import pytest
import torch
from tiny import IMAGE, WORDS, text_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
LANGUAGES: dict[str, Any] = {
    "llama": text_config(),
    "llama_tied": text_config(tie_word_embeddings=True),
    "qwen2": AutoConfig.for_model(
        "qwen2",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SMALL,
    ),
    "gpt2": AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL),
}


@pytest.fixture(params=LANGUAGES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model = tiny_model(text_config=LANGUAGES[request.param])
    plain = AutoModelForCausalLM.from_config(LANGUAGES[request.param]).eval()
    plain.load_state_dict(model.language_model.state_dict())
    plain.tie_weights()
    return model, plain


def test_text_only_logits(pair: tuple[Any, Any]) -> None:
    model, plain = pair
    ids = torch.randint(3, IMAGE, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits
        )
        kept = model(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
        torch.testing.assert_close(kept, plain(input_ids=ids, attention_mask=mask).logits[:, -2:])


def test_loss_is_the_language_models(pair: tuple[Any, Any]) -> None:
    model, plain = pair
    ids = torch.randint(3, IMAGE, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    for options in ({}, {"num_items_in_batch": torch.tensor(23)}):
        expected = plain(input_ids=ids, labels=labels, **options).loss
        torch.testing.assert_close(model(input_ids=ids, labels=labels, **options).loss, expected)
        alone = model(input_ids=ids, labels=labels, loss_only=True, **options)
        assert alone.logits is None
        torch.testing.assert_close(alone.loss, expected)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.8}, {"use_cache": False}], ids=str
)
def test_generate(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    model, plain = pair
    ids = torch.randint(3, IMAGE, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    # The placeholders are never written, so the plain model may not write them either.
    call = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **options}
    torch.manual_seed(3)
    expected = plain.generate(input_ids=ids, suppress_tokens=[IMAGE, IMAGE + 1], **call)
    torch.manual_seed(3)
    assert torch.equal(model.generate(input_ids=ids, **call), expected)

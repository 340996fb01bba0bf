"""Merged adapters answer as the adapters did, whatever layer they were on, tied or not."""

from pathlib import Path

import pytest
import torch
from tiny import text_config, tiny_inputs, tiny_model

from regiongpt.model import RegionGPTForConditionalGeneration
from regiongpt.train.recipe import LoraConfig
from regiongpt.train.stages import add_adapters, merge_adapters


@pytest.mark.parametrize("targets", [(), ("q_proj",), ("q_proj", "lm_head"), ("lm_head",)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_merged_model_answers_as_its_adapters_did(targets: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    model = tiny_model(text_config=text_config(tie_word_embeddings=tied)).eval().double()
    language = model.language_model
    inputs = tiny_inputs(model.config, [1, 2])
    words = language.get_input_embeddings().weight.detach().clone()
    add_adapters(language, LoraConfig(rank=2, targets=targets))
    for name, parameter in language.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        adapted = model(**inputs).logits
        merge_adapters(language)
        assert torch.equal(language.get_input_embeddings().weight, words)
        torch.testing.assert_close(model(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = RegionGPTForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(again(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)
    head = again.get_output_embeddings().weight
    assert (head is again.get_input_embeddings().weight) == (tied and "lm_head" not in targets)

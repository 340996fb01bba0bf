"""Tiny random parts that the model tests share: towers, language models, a tokenizer, inputs."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration
from regiongpt.prompts import COCO_80, NO_MATCH, QUESTIONS

VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {**VIT, "image_size": 28, "patch_size": 7},
    "siglip_vision_model": {**VIT, "image_size": 28, "patch_size": 7},
    "siglip2_vision_model": {**VIT, "num_patches": 16, "patch_size": 7},
    "dinov2": {**VIT, "image_size": 28, "patch_size": 7, "mlp_ratio": 2},
    "dinov2_with_registers": {**VIT, "image_size": 28, "patch_size": 7, "mlp_ratio": 2, "num_register_tokens": 3},
}
IMAGE, REGION, WORDS = 60, 61, 62


def tower_config(kind: str) -> Any:
    return AutoConfig.for_model(kind, **TOWERS[kind])


def text_config(**options: Any) -> LlamaConfig:
    shape: dict[str, Any] = {**VIT, "num_hidden_layers": 2, "vocab_size": WORDS}
    shape |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    # The usual 0.02 leaves so small a model all but indifferent to its input.
    return LlamaConfig(**{**shape, "initializer_range": 0.3, **options})


def tiny_config(kind: str = "clip_vision_model", **options: Any) -> RegionGPTConfig:
    settings = {"vision_config": tower_config(kind), "text_config": text_config(), "initializer_range": 0.3}
    return RegionGPTConfig(**{**settings, "image_token_id": IMAGE, "region_token_id": REGION, **options})


def tiny_model(kind: str = "clip_vision_model", seed: int = 0, **options: Any) -> RegionGPTForConditionalGeneration:
    torch.manual_seed(seed)
    return RegionGPTForConditionalGeneration(tiny_config(kind, **options)).eval()


def tiny_inputs(config: RegionGPTConfig, rows: list[int], seed: int = 0, regions: int = 3) -> dict[str, torch.Tensor]:
    """One sequence: the image, then words with a region token for each of ``rows``, then words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, IMAGE, (3 + len(rows),), generator=generator).tolist()
    ids = [1] + [IMAGE] * config.num_image_tokens + words[:3]
    for word in words[3:]:
        ids += [REGION, word]
    weights = torch.rand(1, regions, *config.refined_grid, generator=generator) ** 4
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, config.image_size, config.image_size, generator=generator),
        "region_weights": weights / weights.sum((2, 3), keepdim=True),
        "region_ids": torch.tensor([rows], dtype=torch.long),
    }


def assert_same(model: Any, other: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Every tensor is the same to the bit, and so are the logits but for where in memory the weights begin.

    The CPU's kernels sum in another order on weights that are not aligned, as those read from a file may not be.
    """
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@cache
def _bpe() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [*COCO_80, NO_MATCH, *(text for wordings in QUESTIONS.values() for text in wordings)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe.to_str()


def trained_bpe() -> Tokenizer:
    """A tokenizer that has read the questions."""
    return Tokenizer.from_str(_bpe())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three special tokens."""
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def save_language(folder: Path, **options: Any) -> LlamaForCausalLM:
    """A language model's folder: weights and tokenizer."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(text_config(vocab_size=len(tokenizer), **options)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def save_tower(folder: Path, model: PreTrainedModel) -> None:
    """A tower's folder: weights and image processor."""
    model.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


CHAT = (
    "{% for turn in messages %}USER: {% for part in turn['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endfor %}ASSISTANT:"
)


def save_llava(folder: Path) -> Path:
    """A LLaVA with random weights."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(
        **shape, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.5
    )
    vision = {"model_type": "clip_vision_model", **shape, "image_size": 32, "patch_size": 8}
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=16)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = [2, *range(40, 120)]  # random words end soon
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side), tokenizer, patch_size=8,
        chat_template=CHAT.replace("IMAGE", "<image>"), vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder

"""A complete checkpoint folder with random weights, small enough to load and ask in a second."""

from pathlib import Path

import torch
from tiny import trained_bpe
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from regiongpt.model import weights


def make_parts(folder: Path, context: int = 512) -> tuple[Path, Path]:
    """Folders of a tower and a language model, as a hub would have them."""
    torch.manual_seed(0)
    vision, language = folder / "vision", folder / "language"
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(tower).save_pretrained(vision)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(vision)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained_bpe(), bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(language)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(llama).save_pretrained(language)
    return vision, language


def make_checkpoint(folder: Path, context: int = 512) -> Path:
    """A checkpoint folder, with a little training feigned: an untrained one would refuse to answer."""
    vision, language = make_parts(folder, context)
    model, processor = weights.create(vision, language, chat_template="vicuna_v1")
    model.refinement.deconv_2.bias.data.fill_(1e-3)
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"

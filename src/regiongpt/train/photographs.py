"""What a recipe makes of annotated photographs before it learns: conversations, texts, a language model's shape.

Training and ``--plan`` both go by it.
"""

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import colours_of
from regiongpt.data.sampling import DEFAULT_MIX, ClassStatistics, ConversationSampler
from regiongpt.images import load_image
from regiongpt.model.processing import IGNORED
from regiongpt.prompts import COCO_80, REGION_TOKEN
from regiongpt.train.config import ModelConfig, TrainConfig
from regiongpt.train.dataset import Text, conversation_texts
from regiongpt.train.tokenizer import train_tokenizer

TEXT_LENGTH = 128
"""Tokens of an example of text alone."""

Document = tuple[list[int], list[int], list[int]]
"""Token ids, labels, and the class whose name stands in for a region at each token, else -1."""


def sampler_of(config: TrainConfig, images: Sequence[ImageAnnotations]) -> ConversationSampler:
    """What draws the recipe's conversations about the photographs."""
    return ConversationSampler(
        ClassStatistics.of(images),
        config.data.mix or DEFAULT_MIX,
        suffixes=config.data.suffixes,
        outline_share=config.data.outline_share,
    )


def texts_of(config: TrainConfig, images: Sequence[ImageAnnotations], sampler: ConversationSampler) -> list[Text]:
    """What the language model reads before it sees."""
    tokens = REGION_TOKEN * config.model.region_grid**2
    region_format = config.model.region_format.replace(REGION_TOKEN, tokens)
    return list(conversation_texts(images, sampler, region_format, config.seed))


def tokenizer_of(texts: Sequence[Text], shape: ModelConfig) -> Any:
    """A byte-level BPE of these texts."""
    plain = (f"{text.given}{text.learnt}".replace(REGION_TOKEN, "") for text in texts)
    return train_tokenizer(plain, shape.vocab_size, shape.max_length)


def documents_of(texts: Sequence[Text], tokenizer: Any) -> list[Document]:
    """The texts in tokens."""
    given = tokenizer([text.given for text in texts])["input_ids"]
    learnt = tokenizer([text.learnt for text in texts])["input_ids"]
    region = tokenizer.convert_tokens_to_ids(REGION_TOKEN)
    documents: list[Document] = []
    for text, before, after in zip(texts, given, learnt, strict=True):
        answer = [*after, tokenizer.eos_token_id]
        classes = iter([COCO_80.index(name) for name in text.categories])
        stand_ins = [next(classes) if token == region else -1 for token in before] + [-1] * len(answer)
        documents.append((before + answer, [IGNORED] * len(before) + answer, stand_ins))
    return documents


def language_of(shape: ModelConfig, tokenizer: Any) -> LlamaConfig:
    """The shape of the language model that a recipe trains for itself."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Colours(Sequence[dict[int, str]]):
    """The colours of each photograph's objects, looked at when they are asked for.

    Args:
        images: The photographs.
    """

    def __init__(self, images: Sequence[ImageAnnotations]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return colours_of(self.images[index], load_image(self.images[index].path))

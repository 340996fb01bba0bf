"""What a recipe makes of annotated photographs before it learns: conversations, texts, a language model's shape.

Training and ``--plan`` both go by it.
"""

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import colours_of
from regiongpt.data.sampling import DEFAULT_MIX, ClassStatistics, ConversationSampler
from regiongpt.errors import ConfigError
from regiongpt.images import load_image
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN
from regiongpt.train.recipe import ModelConfig, Recipe
from regiongpt.train.text import LENGTH, READING_MIX, Text, TextDataset, conversation_texts
from regiongpt.train.tokenizer import train_tokenizer

READ_GRID, MOST_REGION_GRID = 6, 4
"""Most rows and columns of an image in the texts, where a cell is a token of its own, and of a region."""


def sampler_of(config: Recipe, images: Sequence[ImageAnnotations]) -> ConversationSampler:
    """What draws the recipe's conversations about the photographs."""
    return ConversationSampler(
        ClassStatistics.of(images),
        config.data.mix or DEFAULT_MIX,
        suffixes=config.data.suffixes,
        outline_share=config.data.outline_share,
    )


def texts_of(config: Recipe, images: Sequence[ImageAnnotations], sampler: ConversationSampler) -> list[Text]:
    """What the language model reads before it sees."""
    drawn = ConversationSampler(
        sampler.statistics, READING_MIX, suffixes=config.data.suffixes, outline_share=config.data.outline_share
    )
    return list(conversation_texts(images, drawn, _format_of(config.model), _grid_of(config.model), config.seed))


def reading_of(config: Recipe, texts: Sequence[Text], tokenizer: Any) -> TextDataset:
    """The windows in which the language model reads them.

    Raises:
        ConfigError: A region takes so many tokens that several of them do not fit into a window.
    """
    shape = config.model
    if shape.region_grid > MOST_REGION_GRID:
        raise ConfigError(
            f"model.region_grid: expected at most {MOST_REGION_GRID} where the recipe trains its own language model, "
            f"which reads windows of {LENGTH} tokens, got {shape.region_grid}; give a trained one as model.language"
        )
    return TextDataset(texts, tokenizer, _format_of(shape), _grid_of(shape), config.seed, config.language.epochs)


def tokenizer_of(texts: Sequence[Text], shape: ModelConfig) -> Any:
    """A byte-level BPE of these texts."""
    plain = ("".join(text.pieces).replace(REGION_TOKEN, "").replace(IMAGE_TOKEN, "") for text in texts)
    return train_tokenizer(plain, shape.vocab_size, shape.max_length)


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


def _format_of(shape: ModelConfig) -> str:
    return shape.region_format.replace(REGION_TOKEN, REGION_TOKEN * shape.region_grid**2)


def _grid_of(shape: ModelConfig) -> tuple[int, int]:
    side = min(shape.image_grid or READ_GRID, READ_GRID)
    return side, side


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

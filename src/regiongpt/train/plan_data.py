"""How much a stage reads: its micro-batches, counted on the data itself or, where it is not at hand, supposed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regiongpt.data.mixture import Mixture
from regiongpt.errors import ConfigError
from regiongpt.model.processing import IGNORED, prepare_tokenizer
from regiongpt.prompts import template_family
from regiongpt.train.dataset import RecordDataset
from regiongpt.train.packing import plan_rows, width_cost
from regiongpt.train.recipe import DataSize, EngineConfig, ModelConfig
from regiongpt.train.shapes import ADDED_TOKENS, LANGUAGE_MODELS


@dataclass(frozen=True, kw_only=True)
class Item:
    """One conversation, counted.

    Attributes:
        tokens: Those of its image and regions among them.
        targets: Tokens that are learnt.
        regions: Of its record.
        image: Whether it has one.
    """

    tokens: float
    targets: float
    regions: float
    image: bool = True


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a stage reads in all.

    Attributes:
        items: Conversations.
        how: What the numbers rest on, for a person.
        tokens: Of all conversations.
        targets: Likewise.
        rows: Rows that go through the language model, each with its width: (how many of them, tokens in each).
        images: That go through the tower; a text among images takes a blank one with it.
        regions: Likewise.
        widest: Tokens in the largest micro-batch, its padding among them; and its images and targets.
    """

    items: int
    how: str
    tokens: float
    targets: float
    rows: tuple[tuple[float, float], ...]
    images: float
    regions: float
    widest: tuple[float, float, float]


def read(items: int, micro: int, item: Callable[[int], Item], sample: int, packing: int, cost: float) -> Reading:
    """Counts the micro-batches of a stage, all of them or a sample.

    Args:
        items: Conversations of the stage.
        micro: Conversations in a micro-batch.
        item: Counts one of them, by its number.
        sample: Most conversations to count.
        packing: Most tokens in a packed row; 0 where each conversation has a padded row.
        cost: See :func:`regiongpt.train.packing.width_cost`.
    """
    batches = -(-items // micro)
    counted = min(batches, max(1, sample // micro))
    numbers = [n * batches // counted for n in range(counted)]
    found = [[item(i) for i in range(n * micro, min((n + 1) * micro, items))] for n in numbers]
    seen = sum(len(batch) for batch in found)
    scale = items / seen
    rows: list[tuple[float, float]] = []
    images = regions = 0.0
    widest = (0.0, 0.0, 0.0)
    for batch in found:
        lengths = [int(each.tokens) for each in batch]
        packed = plan_rows(lengths, packing, cost) if packing else [[k] for k in range(len(batch))]
        width = max(sum(lengths[k] for k in row) for row in packed)
        rows.append((scale * len(packed), float(width)))
        shown = len(batch) if any(each.image for each in batch) else 0
        images += scale * shown
        regions += scale * len(batch) * max(each.regions for each in batch)
        widest = max(widest, (len(packed) * width, shown, sum(each.targets for each in batch)))
    every = [each for batch in found for each in batch]
    return Reading(
        items=items,
        how="counted on all" if seen == items else f"counted on {seen:,} of them",
        tokens=scale * sum(each.tokens for each in every),
        targets=scale * sum(each.targets for each in every),
        rows=tuple(rows),
        images=images,
        regions=regions,
        widest=widest,
    )


def suppose(
    size: DataSize, epochs: float, micro: int, image_tokens: int, packing: int, cost: float, where: str
) -> Reading:
    """The same from what a recipe supposes of data that is not at hand.

    Raises:
        ConfigError: It supposes nothing.
    """
    if not size.records or not size.answer_tokens:
        raise ConfigError(
            f"--plan: the data of {where} cannot be read here, and the recipe supposes nothing of it; give its folder, "
            f"or --plan.{where}.records, --plan.{where}.text_tokens and --plan.{where}.answer_tokens"
        )
    each = Item(tokens=image_tokens + size.text_tokens, targets=size.answer_tokens, regions=1)
    reading = read(max(1, round(epochs * size.records)), micro, lambda _: each, micro, packing, cost)
    return Reading(**{**vars(reading), "how": "supposed, see [plan]"})


def of_records(mixture: Mixture, processor: Any, longest: int | None, suffixes: bool) -> Callable[[int], Item]:
    """Counts a record of a mixture, its words tokenised and cut as in training, its image not opened."""
    dataset = RecordDataset(mixture, processor, len(mixture), longest, suffixes)

    def item(number: int) -> Item:
        record, example = dataset.words(mixture.draw(number))
        return Item(
            tokens=len(example["input_ids"]),
            targets=int((example["labels"] != IGNORED).sum()),
            regions=len(record.regions) * processor.tokens_per_region,
            image=bool(record.image),
        )

    return item


def of_photographs(draw: Callable[[int], Any], processor: Any) -> Callable[[int], Item]:
    """Counts a conversation about a photograph, as :meth:`ConversationDataset.draw` draws it."""

    def item(number: int) -> Item:
        conversation = draw(number)[-1]
        encoded = processor.encode_conversation(
            conversation.messages,
            region_weights=torch.zeros(len(conversation.regions) * processor.tokens_per_region, 1, 1),
        )
        targets = int((encoded["labels"] != IGNORED).sum())
        regions = len(conversation.regions) * processor.tokens_per_region
        return Item(tokens=len(encoded["input_ids"]), targets=targets, regions=regions)

    return item


def row_limit(engine: EngineConfig, text_config: Any) -> tuple[int, float]:
    """``packing`` and ``cost`` of :func:`read`."""
    longest = engine.pack_length or int(getattr(text_config, "max_position_embeddings", 0) or 4096)
    return (longest, width_cost(text_config)) if engine.packing else (0, 0.0)


def local_tokenizer(shape: ModelConfig) -> tuple[Any, str] | None:
    """The tokenizer of a new model with the tokens it will have, and its template; None where it is not at hand."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(shape.language, local_files_only=True)
    # Nothing in the cache, a hub that cannot be reached, a folder without one: each has an exception of its own.
    except Exception:
        return None
    family = shape.chat_template or template_family(tokenizer)
    prepare_tokenizer(tokenizer, family)
    return tokenizer, family


def vocabulary(shape: ModelConfig, text_config: Any) -> int:
    """Embeddings of the language model once ``<image>`` and ``<region>`` have been added."""
    found = local_tokenizer(shape) if Path(shape.language).is_dir() or shape.language not in LANGUAGE_MODELS else None
    tokens = len(found[0]) if found else LANGUAGE_TOKENS.get(shape.language, text_config.vocab_size) + ADDED_TOKENS
    return max(int(text_config.vocab_size), tokens)


LANGUAGE_TOKENS = {"Qwen/Qwen2.5-0.5B-Instruct": 151665, "Qwen/Qwen2.5-7B-Instruct": 151665}
"""Tokens of language models whose embeddings are padded beyond them."""

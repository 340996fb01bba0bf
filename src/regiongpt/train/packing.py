"""Several conversations in one row, kept apart by attention and positions.

A padded batch is as wide as its longest conversation, and the language model computes the rest of each row for nothing.
Packed, the conversations of a micro-batch lie end to end in as few rows as hold them. Each attends to itself alone, at
the positions it would have in a row of its own, so that loss and gradients are those of the padded batch.

Words and visual embeddings are looked up in the padded layout, which costs next to nothing and leaves images, regions
and their numbers with their conversations; what is moved into rows are the embeddings.

Shapes: B conversations, T tokens of the longest, P packed rows, W tokens of a row, D language model width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regiongpt.errors import ConfigError
from regiongpt.model.processing import IGNORED
from regiongpt.train.dataset import Example
from regiongpt.train.packed_attention import Units, attends_in_units

Collate = Callable[[list[Example]], dict[str, Any]]

PACKED = ("packed_from", "packed_labels", "packed_positions", "packed_documents", "packed_turns")
"""What a packed batch has besides the padded one: for each place in a row the token (B T) it holds, or -1; its label;
its position; its conversation, or -1; its turn, as :func:`regiongpt.train.dataset.turn_numbers` counts them."""


class PackedCollate:
    """Makes packed batches.

    Args:
        collate: Makes the padded batch, which the packed one refers to.
        longest: Most tokens in a row; a single conversation may be longer.
        width_cost: What a token costs besides attention, in multiples of attending to one more token; see
            :func:`width_cost`.
    """

    def __init__(self, collate: Collate, longest: int, width_cost: float) -> None:
        if longest < 1:
            raise ConfigError(f"engine.pack_length: expected at least 1 token, got {longest}")
        self.collate, self.longest, self.width_cost = collate, longest, width_cost

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The padded batch without its mask, positions and labels, and :data:`PACKED`."""
        batch = self.collate(examples)
        for name in ("attention_mask", "position_ids"):
            batch.pop(name, None)
        padded_BT = batch.pop("labels")
        rows = plan_rows([len(each["input_ids"]) for each in examples], self.longest, self.width_cost)
        width = max(sum(len(examples[k]["input_ids"]) for k in row) for row in rows)
        shape, fills = (len(rows), width), (-1, IGNORED, 0, -1, 0)
        packed = {name: torch.full(shape, fill) for name, fill in zip(PACKED, fills, strict=True)}
        tasks_BT = batch.pop("tasks", None)
        if tasks_BT is not None:
            packed["tasks"] = torch.full(shape, -1)
        for number, row in enumerate(rows):
            start = 0
            for k in row:
                length = len(examples[k]["input_ids"])
                place = (number, slice(start, start + length))
                labels = padded_BT[k, :length].clone()
                labels[0] = IGNORED  # the token before it belongs to another conversation
                turns = examples[k].get("turns", torch.zeros(length, dtype=torch.long))
                packed["packed_from"][place] = k * padded_BT.shape[1] + torch.arange(length)
                packed["packed_labels"][place] = labels
                packed["packed_positions"][place] = places_of(turns)
                packed["packed_documents"][place] = k
                packed["packed_turns"][place] = turns
                if tasks_BT is not None:
                    packed["tasks"][place] = tasks_BT[k, :length]
                start += length
        return {**batch, **packed}


def width_cost(text_config: Any) -> float:
    """What :class:`PackedCollate` takes, of a language model's configuration.

    Of a token, a layer multiplies by about 4 D^2 + 3 D M weights, and by 2 D numbers for each token it attends to; with
    a mask these are half as fast.
    """
    width = int(text_config.hidden_size)
    inner = int(getattr(text_config, "intermediate_size", None) or 4 * width)
    return (4 * width + 3 * inner) / 4


def plan_rows(lengths: Sequence[int], longest: int, cost: float) -> list[list[int]]:
    """Which conversations go into which row, so that the whole costs least.

    Args:
        lengths: Of the conversations, in tokens; at least one.
        longest: Most tokens in a row, but for a conversation that is longer by itself.
        cost: As ``width_cost`` of :class:`PackedCollate`.

    Returns:
        For each row the numbers of its conversations, all of them once.
    """
    limit = max(longest, *lengths)
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    best, least = [[k] for k in order], float("inf")
    for count in range(-(-sum(lengths) // limit), len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for k in order:
            emptiest = min(range(count), key=filled.__getitem__)
            rows[emptiest].append(k)
            filled[emptiest] += lengths[k]
        width = max(filled)
        if width <= limit and count * width * (cost + width) < least:
            best, least = rows, count * width * (cost + width)
    return best


def places_of(turns_T: Tensor) -> Tensor:
    """Position of each token of one conversation: in its own turn, behind what all turns see; (T,) int64."""
    own = turns_T[:, None] == torch.arange(int(turns_T.max()) + 1)
    count = own.long().cumsum(0).gather(1, turns_T[:, None])[:, 0]
    head = int((turns_T == 0).sum())
    return count - 1 + torch.where(turns_T > 0, head, 0)


def attention_mask(documents_PW: Tensor, turns_PW: Tensor) -> Tensor:
    """True where attention is allowed: within a conversation, to what came before, and between turns as isolated.

    Args:
        documents_PW: Conversation of each token, -1 in the padding, which sees itself.
        turns_PW: Turn of each token; 0 for what all turns of the conversation see.

    Returns:
        Boolean (P, 1, W, W).
    """
    width = documents_PW.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=documents_PW.device).tril()
    same = (documents_PW[:, :, None] == documents_PW[:, None, :]) & causal
    if bool(turns_PW.any()):
        query, key = turns_PW[:, :, None], turns_PW[:, None, :]
        same &= (query == key) | (key == 0)
    return same[:, None]


def answer_output(model: Any, batch: dict[str, Any], items: Any) -> Any:
    """The model's output with the loss of the answers, of a padded or a packed batch.

    Args:
        model: RegionGPT.
        batch: Its inputs with ``labels``; or what :class:`PackedCollate` has made.
        items: Target tokens of the optimiser step, over micro-batches and processes.
    """
    options = {"loss_only": True, "num_items_in_batch": items, "use_cache": False}
    if PACKED[0] not in batch:
        return model(**batch, **options)
    inputs = {name: value for name, value in batch.items() if name not in PACKED}
    from_PW, labels_PW, positions_PW, documents_PW, turns_PW = (batch[name] for name in PACKED)
    embeds_BTD = model.embed(**inputs)
    if attends_in_units(model.language_model):
        there_PW = documents_PW >= 0
        units = Units.of(documents_PW[there_PW], turns_PW[there_PW])
        return model(
            inputs_embeds=embeds_BTD.flatten(0, 1)[from_PW[there_PW]][None],
            labels=labels_PW[there_PW][None],
            position_ids=positions_PW[there_PW][None],
            # Given, so that none is made of the positions.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            units=units,
            **options,
        )
    embeds_PWD = embeds_BTD.flatten(0, 1)[from_PW.clamp_min(0)]
    return model(
        inputs_embeds=embeds_PWD,
        labels=labels_PW,
        position_ids=positions_PW,
        attention_mask=attention_mask(documents_PW, turns_PW),
        **options,
    )


def targets_in(batch: dict[str, Any]) -> Tensor:
    """Number of target tokens, padded or packed: the first token of a row is never one."""
    labels: Tensor = batch["labels"] if "labels" in batch else batch["packed_labels"]
    return (labels[:, 1:] != IGNORED).sum()

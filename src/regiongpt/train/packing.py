"""Conversations end to end in one row, each attending only to itself: loss and gradients are those of a padded batch.

Units (conversations, or isolated turns) attend by themselves.

B conversations, T tokens of the longest, N tokens of all, D language model width, H heads, E width of a head.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from regiongpt.errors import ConfigError
from regiongpt.model.processing import IGNORED

Example = dict[str, Any]
Collate = Callable[[list[Example]], dict[str, Any]]

ATTENTION = "regiongpt_units"
"""The name of attention in units in transformers' ``AttentionInterface``."""

PACKED = ("packed_from", "labels", "packed_positions", "packed_units")
"""What a packed batch has in place of mask and positions: for each place in the row (1, N) the token (B T) it
holds, its label and its position; and of each unit its tokens, and the number of the unit that it sees besides itself,
-1 for none."""


class PackedCollate:
    """Makes packed batches: words and visual embeddings stay in the padded layout, all else is laid out in the row."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The padded inputs without their mask, and :data:`PACKED`."""
        laid_out = ("labels", "tasks", "turns")
        batch = self.collate([{k: value for k, value in each.items() if k not in laid_out} for each in examples])
        batch.pop("attention_mask", None)
        row: list[tuple[Tensor, ...]] = []
        units: list[tuple[int, int]] = []
        for k, each in enumerate(examples):
            from_T = torch.arange(len(each["input_ids"])) + k * batch["input_ids"].shape[1]
            labels_T = each["labels"].clone()
            labels_T[0] = IGNORED  # the token before it is of another conversation
            turns_T = each.get("turns", torch.zeros_like(from_T))
            first, (turns, sizes) = len(units), torch.unique_consecutive(turns_T, return_counts=True)
            units += [(size, first if turn else -1) for turn, size in zip(turns.tolist(), sizes.tolist(), strict=True)]
            row.append((from_T, labels_T, isolate_turns(turns_T[None])[1][0]))
        batch |= {name: torch.cat(parts)[None] for name, parts in zip(PACKED, zip(*row, strict=True), strict=False)}
        if "tasks" in examples[0]:
            batch["tasks"] = torch.cat([each["tasks"] for each in examples])[None]
        return {**batch, "packed_units": units}


def isolate_turns(turns_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mask (B, 1, T, T) and positions (B, T) of padded conversations by their :func:`turn_numbers`.

    Turns are all 0 for a conversation whose turns see the earlier ones, and -1 in the padding.
    """
    query, key = turns_BT[:, :, None], turns_BT[:, None, :]
    mask = ((query == key) | ((key == 0) & (query > 0))).tril()  # padding sees itself
    # How many tokens a token sees is the place it stands at.
    return mask[:, None], mask.sum(-1) - 1


def turn_numbers(example: Example, image_token_id: int) -> Tensor:
    """Turn of each token of an example that begins with an image, (T,) int64: 0 before the first question, then 1, ...

    Ten turns about one image train ten answers for one image's tokens, but what an earlier turn said of a region
    answers a later one. Isolated turns see the image and themselves alone, at the positions of an only turn.
    """
    ids, is_target = example["input_ids"], example["labels"] != IGNORED
    # The line break after the image belongs to no turn: each question follows it, as the first one does.
    head = int((ids == image_token_id).nonzero()[-1]) + 2
    ends = is_target & ~torch.cat([is_target[1:], torch.tensor([False])])
    numbers = 1 + torch.cat([torch.tensor([0]), ends.cumsum(0)[:-1]])
    numbers[:head] = 0
    return numbers


def packed_output(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    """The model's output for a packed batch."""
    embeds_BTD = model.embed(**{name: value for name, value in batch.items() if name not in PACKED})
    from_N, labels, positions, units = (batch[name] for name in PACKED)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # given, so that none is made of the positions
    how = {"labels": labels, "position_ids": positions, "attention_mask": mask, "units": units, **options}
    return model(inputs_embeds=embeds_BTD.flatten(0, 1)[from_N], **how)


@lru_cache(maxsize=256)
def _seen(size: int, before: int, device: torch.device) -> Tensor:
    """What the tokens of a unit see of those before it, which is all, and of their own: bool (size, before + size)."""
    return torch.ones(size, before + size, dtype=torch.bool, device=device).tril(before)


def unit_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """Attention of one layer, as transformers calls it: (1, H, N, E) in units if there are any, else its ``sdpa``."""
    units: list[tuple[int, int]] | None = options.pop("units", None)
    if units is None:
        result: tuple[Tensor, Any] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys, values = (torch.split(each, [size for size, _ in units], 2) for each in (query, key, value))
    how: Any = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    outputs = []
    for (size, head), asked, own_keys, own_values in zip(units, queries, keys, values, strict=True):
        mask = None
        if head >= 0:
            mask = _seen(size, units[head][0], query.device)
            own_keys = torch.cat([keys[head], own_keys], 2)
            own_values = torch.cat([values[head], own_values], 2)
        outputs.append(F.scaled_dot_product_attention(asked, own_keys, own_values, mask, is_causal=head < 0, **how))
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, unit_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attend_in_units(language_model: Any) -> None:
    """Have a language model attend in units where a batch has them; ConfigError for one that cannot.

    That is one with an attention of its own, or whose layers see a window only: packing has one rule for all of them.
    """
    config, told = language_model.config.get_text_config(), ""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    own = not getattr(language_model, "_supports_attention_backend", False)
    if kinds - {"full_attention"} or (window and not kinds):
        told = "whose layers attend to all earlier tokens, got some with a window"
    elif own or config._attn_implementation not in ("sdpa", ATTENTION):
        told = "with torch's attention, got one with its own"
    if told:
        raise ConfigError(f"engine.packing: expected a language model {told}; give --engine.packing false")
    config._attn_implementation = ATTENTION

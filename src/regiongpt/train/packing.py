"""Several conversations in one row, each attending only to itself: loss and gradients are those of a padded batch.

B conversations, T tokens of the longest, P packed rows, W tokens of a row, D language model width, H heads,
N tokens of all units (conversations or isolated turns, which on a CPU attend by themselves), E width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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

PACKED = ("packed_from", "packed_labels", "packed_positions", "packed_documents", "packed_turns")
"""What a packed batch has in place of labels, mask and positions: for each place in a row the token (B T) it holds, or
-1; its label; its position; its conversation, or -1; its turn, as :func:`turn_numbers` counts them."""


class PackedCollate:
    """Makes packed batches: words and visual embeddings stay in the padded layout, all else is laid out in rows.

    A row has at most ``longest`` tokens; a single conversation may be longer.
    """

    def __init__(self, collate: Collate, longest: int, width_cost: float) -> None:
        self.collate, self.longest, self.width_cost = collate, longest, width_cost

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The padded inputs without their mask, and :data:`PACKED`."""
        laid_out = ("labels", "tasks", "turns")
        batch = self.collate([{k: value for k, value in each.items() if k not in laid_out} for each in examples])
        batch.pop("attention_mask", None)
        lengths = [len(each["input_ids"]) for each in examples]
        rows = plan_rows(lengths, self.longest, self.width_cost)
        shape = (len(rows), max(sum(lengths[k] for k in row) for row in rows))
        packed = {name: torch.full(shape, fill) for name, fill in zip(PACKED, (-1, IGNORED, 0, -1, 0), strict=True)}
        if "tasks" in examples[0]:
            packed["tasks"] = torch.full(shape, -1)
        for number, row in enumerate(rows):
            start = 0
            for k in row:
                each, length = examples[k], lengths[k]
                place = (number, slice(start, start + length))
                packed["packed_from"][place] = k * batch["input_ids"].shape[1] + torch.arange(length)
                packed["packed_labels"][place] = each["labels"]
                packed["packed_labels"][number, start] = IGNORED  # the token before it is of another conversation
                packed["packed_positions"][place] = torch.arange(length)
                packed["packed_documents"][place] = k
                if "turns" in each:
                    packed["packed_turns"][place] = each["turns"]
                    packed["packed_positions"][place] = isolate_turns(each["turns"][None])[1][0]
                if "tasks" in packed:
                    packed["tasks"][place] = each["tasks"]
                start += length
        return {**batch, **packed}


def width_cost(text_config: Any) -> float:
    """Cost of a token besides attention, in multiples of attending to one more token.

    A layer multiplies a token by about 4 D^2 + 3 D M weights, and by 2 D numbers for each token it attends to.
    """
    width = int(text_config.hidden_size)
    inner = int(getattr(text_config, "intermediate_size", None) or 4 * width)
    return (4 * width + 3 * inner) / 4


def plan_rows(lengths: Sequence[int], longest: int, cost: float) -> list[list[int]]:
    """The numbers of the conversations in each row, so that the whole costs least by :func:`width_cost`.

    A row has at most ``longest`` tokens, but for a conversation that is longer by itself.
    """
    limit = max(longest, *lengths)
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    best, least = [[k] for k in order], float("inf")
    for count in range(-(-sum(lengths) // limit), len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for k in order:
            emptiest = filled.index(min(filled))
            rows[emptiest].append(k)
            filled[emptiest] += lengths[k]
        width = max(filled)
        if width <= limit and count * width * (cost + width) < least:
            best, least = rows, count * width * (cost + width)
    return best


def attention_mask(documents_PW: Tensor, turns_PW: Tensor) -> Tensor:
    """Boolean (P, 1, W, W), True where attention is allowed: within a conversation, to what came before.

    Padding (conversation -1) sees itself; a turn sees itself and turn 0.
    """
    width = documents_PW.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=documents_PW.device).tril()
    same = (documents_PW[:, :, None] == documents_PW[:, None, :]) & causal
    if bool(turns_PW.any()):
        query, key = turns_PW[:, :, None], turns_PW[:, None, :]
        same &= (query == key) | (key == 0)
    return same[:, None]


def isolate_turns(turns_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mask (B, 1, T, T) and positions (B, T) of padded conversations by their :func:`turn_numbers`.

    Turns are all 0 for a conversation whose turns see the earlier ones, and -1 in the padding.
    """
    mask = attention_mask(turns_BT.clamp_max(0), turns_BT)
    # How many tokens a token sees is the place it stands at.
    return mask, mask[:, 0].sum(-1) - 1


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
    from_PW, labels, positions, documents, turns = (batch[name] for name in PACKED)
    if attends_in_units(model.language_model):  # the rows end to end, (1, N), without padding
        there_PW = documents >= 0
        from_PW, labels, positions = (each[there_PW][None] for each in (from_PW, labels, positions))
        options["units"] = units_of(documents[there_PW], turns[there_PW])
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # given, so that none is made of the positions
    else:
        mask = attention_mask(documents, turns)
    embeds = embeds_BTD.flatten(0, 1)[from_PW.clamp_min(0)]
    return model(inputs_embeds=embeds, labels=labels, position_ids=positions, attention_mask=mask, **options)


# -- attention in units ------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """What attends by itself; units lie in the order of their tokens."""

    size: int  # tokens
    head: int  # number of the unit that it sees besides itself, -1 for none
    mask: Tensor | None  # where it sees another one: bool (size, size of that one + size)


def units_of(documents_N: Tensor, turns_N: Tensor) -> list[Unit]:
    """Units of conversations that lie end to end, by conversation and turn (0: seen by all) of each token."""
    found, sizes_U = torch.unique_consecutive(torch.stack([documents_N, turns_N]), dim=1, return_counts=True)
    shared: dict[int, int] = {}
    units: list[Unit] = []
    for number, ((document, turn), size) in enumerate(zip(found.T.tolist(), sizes_U.tolist(), strict=True)):
        if turn == 0:
            shared[document] = number
        head = shared.get(document, -1) if turn else -1
        before = units[head].size if head >= 0 else 0
        units.append(
            Unit(size, head, torch.ones(size, before + size, dtype=torch.bool).tril(before) if before else None)
        )
    return units


def unit_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """Attention of one layer, as transformers calls it: (1, H, N, E) in units if there are any, else its ``sdpa``."""
    units: list[Unit] | None = options.pop("units", None)
    if units is None:
        result: tuple[Tensor, Any] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys, values = (torch.split(each, [unit.size for unit in units], 2) for each in (query, key, value))
    outputs = []
    for unit, asked, own_keys, own_values in zip(units, queries, keys, values, strict=True):
        if unit.head >= 0:
            own_keys = torch.cat([keys[unit.head], own_keys], 2)
            own_values = torch.cat([values[unit.head], own_values], 2)
        given: Any = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
        given["is_causal"] = unit.mask is None
        outputs.append(F.scaled_dot_product_attention(asked, own_keys, own_values, unit.mask, **given))
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, unit_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def require_packable(text_config: Any) -> None:
    """Raise ConfigError for a language model whose layers see a window only: packing has one rule for all of them."""
    kinds = set(getattr(text_config, "layer_types", None) or ())
    window = getattr(text_config, "sliding_window", None) if getattr(text_config, "use_sliding_window", True) else None
    if kinds - {"full_attention"} or (window and not kinds):
        told = "expected a language model whose layers attend to all earlier tokens, got some with a window"
        raise ConfigError(f"engine.packing: {told}; give --engine.packing false")


@contextmanager
def units_on_cpu(language_model: Any, device: torch.device) -> Iterator[None]:
    """Have a language model attend in units while it is trained, if it is on a CPU and its attention is ``sdpa``."""
    config = language_model.config.get_text_config()
    before = config._attn_implementation
    if device.type == "cpu" and before == "sdpa" and getattr(language_model, "_supports_attention_backend", False):
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def attends_in_units(language_model: Any) -> bool:
    """Whether :func:`units_on_cpu` has chosen units."""
    return bool(language_model.config.get_text_config()._attn_implementation == ATTENTION)

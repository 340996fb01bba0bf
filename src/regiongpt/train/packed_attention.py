"""Attention of packed conversations that computes no pair of tokens that do not see each other.

A mask over a whole row computes all pairs, and throws most of them away. On a CPU, where the kernels do not skip what
is masked, the tokens are cut into *units* instead, a conversation or an isolated turn each, and each unit attends by
itself: to its own tokens and, a turn, to those that all turns of its conversation see.

Shapes: H heads, N tokens of all units, E width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from regiongpt.errors import ConfigError

ATTENTION = "regiongpt_units"
"""The name of this attention in transformers' ``AttentionInterface``."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """What attends by itself, in the order of the tokens.

    Attributes:
        sizes: Tokens of each unit; their sum is N.
        heads: For each unit the number of the one that it sees besides itself, -1 for none.
        masks: For each unit that sees another one, bool (size, size of that one + size); None for the others.
    """

    sizes: list[int]
    heads: list[int]
    masks: list[Tensor | None]

    @classmethod
    def of(cls, documents_N: Tensor, turns_N: Tensor) -> "Units":
        """Those of conversations that lie end to end.

        Args:
            documents_N: Conversation of each token.
            turns_N: Turn of each token; 0 for what all turns of the conversation see.
        """
        both = torch.stack([documents_N, turns_N])
        found, sizes_U = torch.unique_consecutive(both, dim=1, return_counts=True)
        sizes: list[int] = sizes_U.tolist()
        shared: dict[int, int] = {}
        heads: list[int] = []
        masks: list[Tensor | None] = []
        for number, (document, turn) in enumerate(found.T.tolist()):
            if turn == 0:
                shared[document] = number
            head = shared.get(document, -1) if turn else -1
            heads.append(head)
            before = sizes[head] if head >= 0 else 0
            size = sizes[number]
            masks.append(torch.ones(size, before + size, dtype=torch.bool).tril(before) if before else None)
        return cls(sizes=sizes, heads=heads, masks=masks)


def unit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    units: Units | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Attention of one layer, as transformers calls it; without units that of its ``sdpa``.

    Args:
        module: The attention layer.
        query: (1, H, N, E).
        key: (1, H', N, E), where H' divides H.
        value: Likewise.
        attention_mask: Not looked at where there are units.
        dropout: Of the weights.
        scaling: Of the scores; E ** -0.5 by default.
        units: What attends by itself.
        **options: Of ``sdpa``.

    Returns:
        (1, N, H, E) and None.
    """
    if units is None:
        result: tuple[Tensor, Any] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return result
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys, values = (torch.split(each, units.sizes, 2) for each in (query, key, value))
    outputs = []
    for asked, head, mask, own_keys, own_values in zip(queries, units.heads, units.masks, keys, values, strict=True):
        if head >= 0:
            own_keys = torch.cat([keys[head], own_keys], 2)
            own_values = torch.cat([values[head], own_values], 2)
        outputs.append(
            F.scaled_dot_product_attention(
                asked, own_keys, own_values, mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, unit_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def require_packable(text_config: Any) -> None:
    """Raises ConfigError for a language model whose layers see a window only: packing has one rule for all of them."""
    kinds = set(getattr(text_config, "layer_types", None) or ())
    window = getattr(text_config, "sliding_window", None) if getattr(text_config, "use_sliding_window", True) else None
    if kinds - {"full_attention"} or (window and not kinds):
        told = ", ".join(sorted(kinds)) or f"a window of {window} tokens"
        raise ConfigError(
            f"engine.packing: expected a language model whose layers attend to all earlier tokens, got {told}; "
            "give --engine.packing false"
        )


@contextmanager
def units_on_cpu(language_model: Any, device: torch.device) -> Iterator[None]:
    """Has a language model attend in units while it is trained, where that is faster and it can.

    Args:
        language_model: Any ``AutoModelForCausalLM``.
        device: That it is trained on. Where it is no CPU, or attention is of another kind, masks are used.
    """
    config = language_model.config.get_text_config()
    able = getattr(language_model, "_supports_attention_backend", False) and config._attn_implementation == "sdpa"
    if device.type != "cpu" or not able:
        yield
        return
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def attends_in_units(language_model: Any) -> bool:
    """Whether :func:`units_on_cpu` has chosen units."""
    return bool(language_model.config.get_text_config()._attn_implementation == ATTENTION)

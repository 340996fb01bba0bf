"""Attention behind shared prefixes: to the prefix and to the sequence's own tokens apart, merged by their log-sum-exp.

Shapes: R sequences, N new tokens of all sequences one behind the other, n new tokens of a sequence, P tokens of a
prefix, S tokens of the longest sequence, H query heads, K key heads, G query heads of a key head, E width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from regiongpt.inference.prefix import STEP, Group, Plan, SuffixLayer

ATTENTION = "regiongpt_shared_prefix"
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""The CPU's fused attention with its log-sum-exp, which the public function keeps to itself."""


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer as transformers calls it, (1, H, N, E) to (1, N, H, E); the step says who sees whom.

    Raises:
        NotImplementedError: the architecture changes keys between cache and attention, adds a bias of its own, or has
            a sliding window that it does not hand over. ``decoder_for`` tries it first.
    """
    step = STEP.get()
    if step is None or step.written is None or step.written[1] is not key or position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} does not hand keys from its cache to its attention")
    if step.trial and sliding_window is None and _has_window(module):
        raise NotImplementedError(f"{type(module).__name__} has a window and tells its mask alone of it")
    layer = step.written[0]
    index = next(i for i, other in enumerate(step.cache.layers) if other is layer)
    plan = step.on(query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = sliding_window if sliding_window is not None and plan.reach > sliding_window else None
    query_HNE = query[0]
    out_HNE, lse_HN = _own(plan, query_HNE, layer, scale, softcap, window)
    heads, key_heads = query_HNE.shape[0], layer.keys.shape[1]
    for number, (segment, _begin, tokens) in enumerate(plan.segments):
        asked = query_HNE if tokens is None else query_HNE[:, tokens]
        folded = asked.reshape(1, key_heads, -1, asked.shape[-1])
        mask = None
        if window is not None:
            mask = plan.prefix_mask(number, query.dtype, window).repeat(1, 1, heads // key_heads, 1)
        keys, values = segment.keys[index][None], segment.values[index][None]
        out, lse = attend(folded, keys, values, scale, mask=mask, softcap=softcap, blind=window is not None)
        out, lse = out.reshape(*asked.shape[:2], -1), lse.reshape(asked.shape[:2])
        if tokens is None:
            out_HNE, lse_HN = _merge(out_HNE, lse_HN, out, lse)
        else:
            out_HNE[:, tokens], lse_HN[:, tokens] = _merge(out_HNE[:, tokens], lse_HN[:, tokens], out, lse)
    if s_aux is not None:
        sink_H1 = s_aux.to(lse_HN.dtype)[:, None]
        out_HNE = out_HNE * torch.sigmoid(lse_HN - sink_H1)[..., None].to(out_HNE.dtype)
    return out_HNE.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, shared_prefix_attention)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    blind: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention (B, K, n, E) over (B, K, S, E), and the log-sum-exp of its scores (B, K, n), in float32.

    ``mask`` (B, 1, n, S) is added to the scores; ``causal`` lets query i see the keys up to i; ``softcap`` bends the
    scores to within it; ``blind`` says that the mask may hide every key from a query, whose log-sum-exp is then -inf.
    """
    # One query a sequence is quicker without the fused kernel, and it promises nothing where a query sees no key.
    fusable = query.device.type == "cpu" and query.shape[2] > 1 and key.shape[-1] == value.shape[-1]
    if _FLASH is not None and fusable and softcap is None and not blind:
        out, lse = _FLASH(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        return out, lse
    scores = torch.matmul(query * scale, key.transpose(-1, -2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        n, s = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones((n, s), dtype=torch.bool, device=query.device).triu(1), float("-inf"))
    elif mask is not None:
        scores = scores + mask
    most = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - most)
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul((weights / total.clamp_min(1e-38)).to(value.dtype), value)
    return out, (most + total.log())[..., 0]


def _has_window(module: Any) -> bool:
    """Whether this layer's configuration says that it sees a window."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return bool(kinds[module.layer_idx] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _own(
    plan: Plan, query_HNE: Tensor, layer: SuffixLayer, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of the new tokens to their own sequences: (H, N, E) and (H, N)."""
    if plan.groups[0].tokens is None:
        return _own_of(plan.groups[0], query_HNE, layer, scale, softcap, window)
    out_HNE = query_HNE.new_empty((*query_HNE.shape[:2], layer.values.shape[-1]))
    lse_HN = query_HNE.new_empty(query_HNE.shape[:2], dtype=torch.float32)
    for group in plan.groups:
        tokens = group.tokens
        out_HNE[:, tokens], lse_HN[:, tokens] = _own_of(group, query_HNE[:, tokens], layer, scale, softcap, window)
    return out_HNE, lse_HN


def _own_of(
    group: Group, query_HNE: Tensor, layer: SuffixLayer, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    heads, tokens, _ = query_HNE.shape
    key_heads = layer.keys.shape[1]
    shared, rows, widest = heads // key_heads, group.size, group.widest
    keys = layer.keys[group.chosen][:, :, : group.longest]
    values = layer.values[group.chosen][:, :, : group.longest]
    if group.even:
        query_RHnE = query_HNE.reshape(heads, rows, widest, -1).transpose(0, 1)
    else:
        query_RHnE = query_HNE.new_zeros((rows, heads, widest, query_HNE.shape[-1]))
        query_RHnE[group.padded[0], :, group.padded[1]] = query_HNE.transpose(0, 1)
    causal = group.fresh and shared == 1 and window is None and widest > 1
    mask = None if causal else group.mask(query_HNE.dtype, window)
    if mask is not None and shared > 1 and widest > 1:
        mask = mask.repeat(1, 1, shared, 1)
    folded = query_RHnE.reshape(rows, key_heads, shared * widest, -1)
    out, lse = attend(folded, keys, values, scale, mask=mask, causal=causal, softcap=softcap)
    out_RHnE, lse_RHn = out.reshape(rows, heads, widest, -1), lse.reshape(rows, heads, widest)
    if group.even:
        return out_RHnE.transpose(0, 1).reshape(heads, tokens, -1), lse_RHn.transpose(0, 1).reshape(heads, tokens)
    out_NHE, lse_NH = out_RHnE[group.padded[0], :, group.padded[1]], lse_RHn[group.padded[0], :, group.padded[1]]
    return out_NHE.transpose(0, 1), lse_NH.transpose(0, 1)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over different keys as the one over all of them."""
    share = torch.sigmoid(other_lse - lse)[..., None].to(out.dtype)
    return torch.lerp(out, other, share), torch.logaddexp(lse, other_lse)

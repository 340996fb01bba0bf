"""Keys and values that many sequences begin with, stored once: a transformers cache and the attention that reads it.

A batch's sequences have beginnings in common (the system text and an image's tokens) and go on differently. A
:class:`Prefix` holds the keys and values of a beginning, whatever the number of sequences behind it; a
:class:`PrefixCache` holds what each sequence has of its own. A token attends to the one and to the other apart, and the
two results are merged by the logarithms of their sums of exponentials, which is exact. The tokens of all sequences go
through the language model one behind the other, as one row without padding.

Shapes: R sequences, N tokens of all sequences one behind the other, P tokens of a prefix, S longest sequence of its
own, C room for tokens, H query heads, K key heads, G query heads of a key head, E width of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "regiongpt_shared_prefix"
"""The name of this attention in transformers' ``AttentionInterface``."""
_GROWTH = 64
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""The CPU's fused attention that also gives the logarithm of the sum; the public function keeps it to itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Keys and values of tokens that any number of sequences begin with.

    Attributes:
        keys: of each layer, (K, P, E), rotated to their positions.
        values: of each layer, (K, P, E).
        parent: what comes before these tokens, stored by itself; None at the start of the text.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    parent: "Prefix | None" = None

    @property
    def own(self) -> int:
        """Tokens stored here."""
        return self.keys[0].shape[1]

    @property
    def length(self) -> int:
        """Tokens from the start of the text, those of the parents among them."""
        return sum(part.own for part in self.chain)

    @property
    def chain(self) -> tuple["Prefix", ...]:
        """This prefix and what comes before it, the first tokens first."""
        return (*self.parent.chain, self) if self.parent else (self,)

    @property
    def nbytes(self) -> int:
        """Memory of the tokens stored here."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def crop(self, length: int) -> "Prefix | None":
        """The first ``length`` tokens, in the same memory; None for none."""
        if length <= 0:
            return None
        before = self.length - self.own
        if self.parent is not None and length <= before:
            return self.parent.crop(length)
        kept = length - before
        if kept >= self.own:
            return self
        return Prefix(
            keys=tuple(key[:, :kept] for key in self.keys),
            values=tuple(value[:, :kept] for value in self.values),
            parent=self.parent,
        )


class SuffixLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """What the sequences have of their own in one layer: ``keys`` and ``values`` (R, K, C, E)."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for no token yet, of these heads, on this device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros((0, key_states.shape[1], 0, key_states.shape[3]))
        self.values = value_states.new_zeros((0, value_states.shape[1], 0, value_states.shape[3]))
        self.is_initialized = True

    def reserve(self, rows: int, room: int) -> None:
        """Grow to ``rows`` sequences of ``room`` tokens, with zeros: what is masked must still be a number."""
        self.keys, self.values = (_grown(part, rows, room) for part in (self.keys, self.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens (1, K, N, E) to their places, which the step at hand knows, and give them back."""
        step = _STEP.get()
        if step is None:
            raise RuntimeError("a PrefixCache is filled by Decoder.forward alone, not by a plain call of the model")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(len(step.cache.lengths), step.cache.room)
        slots, places = step.on(self.keys.device).places
        self.keys[slots, :, places] = key_states[0].transpose(0, 1)
        self.values[slots, :, places] = value_states[0].transpose(0, 1)
        step.written = (self, key_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many keys as queries: the masks of this cache are made by its own attention."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Room for tokens of a sequence."""
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.2x


class PrefixCache(Cache):  # type: ignore[misc]
    """The keys and values of a batch of sequences, each behind a shared :class:`Prefix`.

    Attributes:
        prefixes: of each sequence; None where it begins with the text itself.
        lengths: tokens that each sequence has of its own.
        room: tokens of its own that each sequence has memory for.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=SuffixLayer)
        self.prefixes: list[Prefix | None] = []
        self.lengths: list[int] = []
        self.room = 0

    def add(self, prefix: Prefix | None = None) -> int:
        """Begin a sequence behind a prefix; returns its row, the last one."""
        self.prefixes.append(prefix)
        self.lengths.append(0)
        return len(self.lengths) - 1

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """End a sequence. The last one takes its row."""
        last = len(self.lengths) - 1
        for layer in self.layers:
            if row != last and layer.is_initialized and last < len(layer.keys):
                used = self.lengths[last]
                layer.keys[row, :, :used] = layer.keys[last, :, :used]
                layer.values[row, :, :used] = layer.values[last, :, :used]
        self.prefixes[row], self.lengths[row] = self.prefixes[last], self.lengths[last]
        del self.prefixes[last], self.lengths[last]
        if not self.lengths:  # the next batch may need less room
            self.room = 0
            self.layers.clear()

    def total(self, row: int) -> int:
        """Tokens of a sequence with those of its prefix: the position of its next one."""
        prefix = self.prefixes[row]
        return self.lengths[row] + (prefix.length if prefix else 0)

    @torch.inference_mode()
    def keep(self, row: int, onto: Prefix | None = None) -> Prefix | None:
        """The tokens of a sequence as a prefix for others.

        Args:
            row: the sequence.
            onto: a prefix that the sequence's own begins with; it stays shared, and what comes behind it is copied. By
                default its whole prefix.

        Returns:
            A prefix of all the sequence's tokens, its memory apart from this cache's. None for no tokens.
        """
        prefix, used = self.prefixes[row], self.lengths[row]
        chain = prefix.chain if prefix else ()
        parent = prefix if onto is None else onto
        between = chain[chain.index(parent) + 1 :] if parent else chain
        if not used and not between:
            return parent
        keys, values = [], []
        for index in range(len(between[0].keys) if between else len(self.layers)):
            own_keys = [self.layers[index].keys[row, :, :used]] if used else []
            own_values = [self.layers[index].values[row, :, :used]] if used else []
            keys.append(torch.cat([*(part.keys[index] for part in between), *own_keys], dim=1))
            values.append(torch.cat([*(part.values[index] for part in between), *own_values], dim=1))
        return Prefix(keys=tuple(keys), values=tuple(values), parent=parent)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence with its prefix."""
        return max((self.total(row) for row in range(len(self.lengths))), default=0)

    def reserve(self, tokens: int) -> None:
        """Have room for sequences of this many tokens of their own."""
        if tokens > self.room:
            self.room = -(-tokens // _GROWTH) * _GROWTH

    @property
    def nbytes(self) -> int:
        """Memory of the sequences' own keys and values; the prefixes' is their own."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)


@dataclass(kw_only=True)
class Step:
    """One pass of new tokens through the language model, as its layers need to know it.

    Attributes:
        cache: where the tokens go.
        rows: the sequences that have new tokens, ascending.
        counts: how many each has, at least 1.
        tree: bool (n, n), which new token of a sequence attends to which of its others, itself among them; all counts
            are n then. None where each attends to all before it.
        written: the layer that was filled last, and with which keys.
    """

    cache: PrefixCache
    rows: Sequence[int]
    counts: Sequence[int]
    tree: Tensor | None = None
    written: tuple[SuffixLayer, Tensor] | None = None
    _plans: dict[torch.device, "_Plan"] = field(default_factory=dict)

    def on(self, device: torch.device) -> "_Plan":
        """The step's index tensors, made once a device."""
        if device not in self._plans:
            self._plans[device] = _Plan(self, device)
        return self._plans[device]

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Let this cache's layers and its attention find the step, in this thread alone."""
        token = _STEP.set(self)
        try:
            yield
        finally:
            _STEP.reset(token)


_STEP: ContextVar[Step | None] = ContextVar("regiongpt_step", default=None)


class _Plan:
    """Index tensors of a step on one device."""

    def __init__(self, step: Step, device: torch.device) -> None:
        cache, rows, counts = step.cache, list(step.rows), list(step.counts)
        self.device = device
        starts = [cache.lengths[row] for row in rows]
        counts_R, before_R = torch.tensor(counts), torch.tensor([cache.total(row) for row in rows])
        owner_N = torch.repeat_interleave(torch.arange(len(rows)), counts_R)
        column_N = torch.arange(len(owner_N)) - (counts_R.cumsum(0) - counts_R)[owner_N]
        self.places = (
            torch.tensor(rows)[owner_N].to(device),
            (torch.tensor(starts)[owner_N] + column_N).to(device),
        )
        depth_N = column_N if step.tree is None else (step.tree.sum(1).cpu() - 1)[column_N]
        self.position_N = (before_R[owner_N] + depth_N).to(device)
        self.reach = int(before_R.max()) + max(counts)
        self.segments = _segments([cache.prefixes[row] for row in rows], owner_N, device)
        # Sequences that go on by one token beside others that begin: padded to the same length they would cost as much.
        single = [place for place, count in enumerate(counts) if count == 1]
        mixed = step.tree is None and 0 < len(single) < len(counts)
        several = [place for place, count in enumerate(counts) if count > 1]
        self.groups = [
            _Group(
                [rows[place] for place in places],
                [counts[place] for place in places],
                [starts[place] for place in places],
                step.tree,
                torch.isin(owner_N, torch.tensor(places)).nonzero()[:, 0].to(device) if mixed else None,
                device,
            )
            for places in ([single, several] if mixed else [list(range(len(rows)))])
        ]
        self._masks: dict[Any, Tensor] = {}

    def prefix_mask(self, index: int, dtype: torch.dtype, window: int) -> Tensor:
        """The same for the tokens that come behind a segment, under a sliding window: (1, 1, N, P)."""
        key = ("prefix", index, dtype, window)
        if key not in self._masks:
            segment, begin, tokens = self.segments[index]
            position_N = self.position_N if tokens is None else self.position_N[tokens]
            places_P = begin + torch.arange(segment.own, device=self.device)
            mask = torch.zeros((len(position_N), segment.own), dtype=dtype, device=self.device)
            hidden = places_P <= position_N[:, None] - window
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))[None, None]
        return self._masks[key]


class _Group:
    """Sequences of a step whose attention to their own tokens is computed together.

    Attributes:
        tokens: their new tokens among the step's; None for all of them.
        widest: new tokens of the sequence that has most.
        longest: tokens of the longest sequence, the new ones among them.
        even: all have as many new tokens.
        fresh: none has any before these, so a plain causal attention will do.
        chosen: their rows in the cache.
        padded: of each new token its sequence and its place among the new ones, where they are not even.
    """

    def __init__(
        self,
        rows: list[int],
        counts: list[int],
        starts: list[int],
        tree: Tensor | None,
        tokens: Tensor | None,
        device: torch.device,
    ) -> None:
        self.tokens, self.device, self.size, self.widest = tokens, device, len(rows), max(counts)
        self.longest = max(start + count for start, count in zip(starts, counts, strict=True))
        self.even, self.level = min(counts) == self.widest, min(starts) == max(starts)
        self.fresh = not any(starts) and tree is None
        self.starts_R = torch.tensor(starts).to(device)
        self.tree = None if tree is None else tree.to(device)
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        self.chosen = slice(rows[0], rows[0] + len(rows)) if contiguous else torch.tensor(rows).to(device)
        if not self.even:
            columns = [(row, column) for row, count in enumerate(counts) for column in range(count)]
            owner_N, column_N = torch.tensor(columns).to(device).unbind(1)
            self.padded = (owner_N, column_N)
        self._masks: dict[Any, Tensor] = {}

    def mask(self, dtype: torch.dtype, window: int | None) -> Tensor | None:
        """What is added to the scores of the sequences' own keys: (R, 1, n, S); None where all may be seen."""
        if self.widest == 1 and self.level and window is None and self.tree is None:
            return None
        key = (dtype, window)
        if key not in self._masks:
            places_S = torch.arange(self.longest, device=self.device)
            query_Rn = self.starts_R[:, None] + torch.arange(self.widest, device=self.device)
            seen = places_S <= query_Rn[:, :, None]
            key_RS = places_S.expand(self.size, -1)
            if self.tree is not None:
                new_RS = places_S - self.starts_R[:, None]
                node_RS = new_RS.clamp(0, self.widest - 1)
                seen = (new_RS < 0)[:, None] | (self.tree[:, node_RS].transpose(0, 1) & (new_RS < self.widest)[:, None])
                depth_n = self.tree.sum(1) - 1
                query_Rn = self.starts_R[:, None] + depth_n
                key_RS = torch.where(new_RS < 0, key_RS, self.starts_R[:, None] + depth_n[node_RS])
            if window is not None:
                seen = seen & (key_RS[:, None] > query_Rn[:, :, None] - window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
            self._masks[key] = mask.masked_fill_(~seen, float("-inf"))[:, None]
        return self._masks[key]


def _segments(
    prefixes: Sequence[Prefix | None], owner_N: Tensor, device: torch.device
) -> list[tuple[Prefix, int, Tensor | None]]:
    """Each stored piece of the prefixes once: where it begins, and the tokens behind it (None for all of them)."""
    behind: dict[int, list[int]] = {}
    found: dict[int, tuple[Prefix, int]] = {}
    for row, prefix in enumerate(prefixes):
        begin = 0
        for segment in prefix.chain if prefix else ():
            found.setdefault(id(segment), (segment, begin))
            behind.setdefault(id(segment), []).append(row)
            begin += segment.own
    result: list[tuple[Prefix, int, Tensor | None]] = []
    for key, (segment, begin) in found.items():
        if len(behind[key]) == len(prefixes):
            result.append((segment, begin, None))
        else:
            tokens = torch.isin(owner_N, torch.tensor(behind[key])).nonzero()[:, 0]
            result.append((segment, begin, tokens.to(device)))
    return result


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
    """Attention of one layer, as transformers calls it.

    Args:
        module: the attention layer.
        query: (1, H, N, E), the tokens of all sequences one behind the other.
        key: what :meth:`SuffixLayer.update` gave back.
        value: likewise.
        attention_mask: not looked at; the step at hand says who sees whom.
        scaling: of the scores; E ** -0.5 by default.
        softcap: bends the scores to within this.
        sliding_window: a token sees this many, itself among them.
        s_aux: (H,), a score for attending to nothing.
        position_bias: refused.

    Returns:
        (1, N, H, E) and None.

    Raises:
        NotImplementedError: the architecture changes keys between cache and attention, or adds a bias of its own.
    """
    step = _STEP.get()
    if step is None or step.written is None or step.written[1] is not key or position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} does not hand keys from its cache to its attention")
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
    """Attention with the logarithm of the sum of the exponentials of its scores.

    Args:
        query: (B, K, n, E).
        key: (B, K, S, E).
        value: (B, K, S, E').
        scale: of the scores.
        mask: added to the scores, (B, 1, n, S) or what spreads to it.
        causal: query i sees the keys up to i; no mask then.
        softcap: bends the scores to within this.
        blind: the mask may hide every key from a query.

    Returns:
        (B, K, n, E') in the queries' dtype and (B, K, n) in float32; -inf there for a query that sees nothing.
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


def _own(
    plan: _Plan, query_HNE: Tensor, layer: SuffixLayer, scale: float, softcap: float | None, window: int | None
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
    group: _Group, query_HNE: Tensor, layer: SuffixLayer, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """The same for the sequences of one group."""
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


def _grown(part: Tensor, rows: int, room: int) -> Tensor:
    """The same (R, K, C, E), with zeros to at least this size."""
    if part.shape[0] >= rows and part.shape[2] >= room:
        return part
    grown = part.new_zeros((max(rows, part.shape[0]), part.shape[1], max(room, part.shape[2]), part.shape[3]))
    grown[: part.shape[0], :, : part.shape[2]] = part
    return grown

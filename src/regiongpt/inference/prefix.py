"""Keys and values that many sequences begin with, stored once: a transformers cache.

Shapes: R sequences, N new tokens of all sequences one behind the other, n new tokens of one sequence, P tokens of a
prefix, S tokens of the longest sequence, C room for tokens, K key heads, E width of a head.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_GROWTH = 64
"""Room for tokens grows by this many at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Keys and values, (K, P, E) for each layer, of tokens that any number of sequences begin with.

    Attributes:
        parent: the tokens before these, stored separately; None at the start of the text.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    parent: "Prefix | None" = None

    @property
    def own(self) -> int:
        """Tokens stored here."""
        return self.keys[0].shape[1]

    @cached_property
    def length(self) -> int:
        """Tokens from the start of the text."""
        return sum(part.own for part in self.chain)

    @property
    def chain(self) -> tuple["Prefix", ...]:
        """The parents, first tokens first, and this prefix."""
        return (*self.parent.chain, self) if self.parent else (self,)

    @property
    def nbytes(self) -> int:
        """Memory of the tokens stored here."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def joined(self) -> "Prefix":
        """The same tokens without a parent: every piece of a chain costs an attention of its own."""
        if self.parent is None:
            return self
        keys = zip(*(part.keys for part in self.chain), strict=True)
        values = zip(*(part.values for part in self.chain), strict=True)
        return Prefix(
            keys=tuple(torch.cat(parts, dim=1) for parts in keys),
            values=tuple(torch.cat(parts, dim=1) for parts in values),
        )

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
        keys, values = (tuple(part[:, :kept] for part in parts) for parts in (self.keys, self.values))
        return Prefix(keys=keys, values=values, parent=self.parent)


class SuffixLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """What the sequences have of their own in one layer: ``keys`` and ``values`` (R, K, C, E)."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with no rows and no room."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros((0, key_states.shape[1], 0, key_states.shape[3]))
        self.values = value_states.new_zeros((0, value_states.shape[1], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens (1, K, N, E) where the current step puts them, and return them."""
        step = STEP.get()
        if step is None:
            raise RuntimeError("a PrefixCache is filled by Decoder.forward alone, not by a plain call of the model")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        size = len(step.cache.lengths), step.cache.room
        self.keys, self.values = _grown(self.keys, *size), _grown(self.values, *size)
        slots, places = step.on(self.keys.device).places
        self.keys[slots, :, places] = key_states[0].transpose(0, 1)
        self.values[slots, :, places] = value_states[0].transpose(0, 1)
        step.written = (self, key_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many keys as queries: this cache's own attention makes the masks."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Room for tokens of a sequence."""
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.2x


class PrefixCache(Cache):  # type: ignore[misc]
    """The keys and values of a batch of sequences, each behind a shared :class:`Prefix` or none.

    ``lengths`` are the tokens that each sequence has of its own, ``room`` those that it has memory for.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=SuffixLayer)
        self.prefixes: list[Prefix | None] = []
        self.lengths: list[int] = []
        self.room = 0

    def add(self, prefix: Prefix | None = None) -> int:
        """Begin a sequence behind a prefix and return its row, the last one."""
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
        """Tokens of a sequence with its prefix: the position of its next one."""
        prefix = self.prefixes[row]
        return self.lengths[row] + (prefix.length if prefix else 0)

    @torch.inference_mode()
    def keep(self, row: int, onto: Prefix | None = None) -> Prefix | None:
        """Copy a sequence as a prefix for others; None if it is empty. ``onto``, or its whole prefix, stays shared."""
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
        """Memory of the sequences' own keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)


def _grown(part: Tensor, rows: int, room: int) -> Tensor:
    """(R, K, C, E) grown to at least this size with zeros: what is masked must still be a number."""
    if part.shape[0] >= rows and part.shape[2] >= room:
        return part
    grown = part.new_zeros((max(rows, part.shape[0]), part.shape[1], max(room, part.shape[2]), part.shape[3]))
    grown[: part.shape[0], :, : part.shape[2]] = part
    return grown


@dataclass(kw_only=True)
class Step:
    """One pass of new tokens through the language model, as its layers need to know it; see :meth:`Decoder.forward`."""

    cache: PrefixCache
    rows: Sequence[int]
    counts: Sequence[int]
    tree: Tensor | None = None
    trial: bool = False  # while trying whether the language model can share prefixes
    written: tuple[SuffixLayer, Tensor] | None = None  # the layer that was filled last, and with which keys
    _plans: dict[torch.device, "Plan"] = field(default_factory=dict)

    def on(self, device: torch.device) -> "Plan":
        """The step's index tensors, made once a device."""
        if device not in self._plans:
            self._plans[device] = Plan(self, device)
        return self._plans[device]


STEP: ContextVar[Step | None] = ContextVar("regiongpt_step", default=None)
"""The step of this thread, for the cache's layers and the attention."""


class Plan:
    """Index tensors of a step on one device.

    Attributes:
        places: row and place in the cache of each new token, as index tensors; as a slice and a number where one new
            token of each of a run of rows goes to the same place, which is quicker to write.
        position_N: of each new token in the text.
        reach: tokens of the longest text.
        segments: each stored piece of the prefixes: where it begins, and the tokens behind it (None for all).
        groups: sequences whose attention to their own tokens is computed together.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        cache, rows, counts = step.cache, list(step.rows), list(step.counts)
        self.device = device
        starts = [cache.lengths[row] for row in rows]
        counts_R, before_R = torch.tensor(counts), torch.tensor([cache.total(row) for row in rows])
        owner_N = torch.repeat_interleave(torch.arange(len(rows)), counts_R)
        column_N = torch.arange(len(owner_N)) - (counts_R.cumsum(0) - counts_R)[owner_N]
        self.places: tuple[slice, int] | tuple[Tensor, Tensor]
        if max(counts) == 1 and len(set(starts)) == 1 and rows == list(range(rows[0], rows[0] + len(rows))):
            self.places = slice(rows[0], rows[0] + len(rows)), starts[0]
        else:
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
            Group(
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
        """What is added to the scores of a segment's keys under a sliding window: (1, 1, N, P)."""
        key = ("prefix", index, dtype, window)
        if key not in self._masks:
            segment, begin, tokens = self.segments[index]
            position_N = self.position_N if tokens is None else self.position_N[tokens]
            places_P = begin + torch.arange(segment.own, device=self.device)
            mask = torch.zeros((len(position_N), segment.own), dtype=dtype, device=self.device)
            hidden = places_P <= position_N[:, None] - window
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))[None, None]
        return self._masks[key]


class Group:
    """Sequences of a step whose attention to their own tokens is computed together.

    Attributes:
        tokens: their new tokens among the step's; None for all of them.
        widest: most new tokens of a sequence.
        longest: tokens of the longest sequence, the new ones included.
        even: all have as many new tokens.
        fresh: none has any before these, so a plain causal attention will do.
        chosen: their rows in the cache.
        padded: sequence and place of each new token, where they are not even.
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
    rows: dict[int, list[int]] = {}
    for row, prefix in enumerate(prefixes):
        rows.setdefault(id(prefix), []).append(row)
    behind: dict[int, list[int]] = {}
    found: dict[int, tuple[Prefix, int]] = {}
    for mine in rows.values():  # a prefix at a time: hundreds of sequences have few
        begin, prefix = 0, prefixes[mine[0]]
        for segment in prefix.chain if prefix else ():
            found.setdefault(id(segment), (segment, begin))
            behind.setdefault(id(segment), []).extend(mine)
            begin += segment.own
    result: list[tuple[Prefix, int, Tensor | None]] = []
    for key, (segment, begin) in found.items():
        if len(behind[key]) == len(prefixes):
            result.append((segment, begin, None))
        else:
            tokens = torch.isin(owner_N, torch.tensor(behind[key])).nonzero()[:, 0]
            result.append((segment, begin, tokens.to(device)))
    return result

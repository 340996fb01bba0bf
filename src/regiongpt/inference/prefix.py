"""Keys and values that many sequences begin with, stored once: a transformers cache.

A batch's sequences have beginnings in common (the system text and an image's tokens) and go on differently. A
:class:`Prefix` holds the keys and values of a beginning, whatever the number of sequences behind it; a
:class:`PrefixCache` holds what each sequence has of its own. A token attends to the one and to the other apart, and the
two results are merged (``attention.py``). The tokens of all sequences go through the language model one behind the
other, as one row without padding (``step.py``).

Shapes: R sequences, N tokens of all sequences one behind the other, P tokens of a prefix, C room for tokens, K key
heads, E width of a head.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from regiongpt.inference.step import STEP

_GROWTH = 64
"""Room for tokens grows by this many at a time."""


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

    @cached_property
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

    def joined(self) -> "Prefix":
        """The same in one piece, in memory of its own where it was in several: each is an attention by itself."""
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
        step = STEP.get()
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


def _grown(part: Tensor, rows: int, room: int) -> Tensor:
    """The same (R, K, C, E), with zeros to at least this size."""
    if part.shape[0] >= rows and part.shape[2] >= room:
        return part
    grown = part.new_zeros((max(rows, part.shape[0]), part.shape[1], max(room, part.shape[2]), part.shape[3]))
    grown[: part.shape[0], :, : part.shape[2]] = part
    return grown

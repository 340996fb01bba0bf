"""One pass of new tokens through the language model, as every layer's cache and attention need to know it.

Shapes: R sequences, N new tokens of all sequences one behind the other, n new tokens of a sequence, P tokens of a
prefix, S tokens of the longest sequence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from regiongpt.inference.prefix import Prefix, PrefixCache, SuffixLayer


@dataclass(kw_only=True)
class Step:
    """One pass of new tokens through the language model, as its layers need to know it.

    Attributes:
        cache: where the tokens go.
        rows: the sequences that have new tokens, ascending.
        counts: how many each has, at least 1.
        tree: bool (n, n), which new token of a sequence attends to which of its others, itself among them; all counts
            are n then. None where each attends to all before it.
        trial: whether it is to be found out if the language model can go this way.
        written: the layer that was filled last, and with which keys.
    """

    cache: "PrefixCache"
    rows: Sequence[int]
    counts: Sequence[int]
    tree: Tensor | None = None
    trial: bool = False
    written: "tuple[SuffixLayer, Tensor] | None" = None
    _plans: dict[torch.device, "Plan"] = field(default_factory=dict)

    def on(self, device: torch.device) -> "Plan":
        """The step's index tensors, made once a device."""
        if device not in self._plans:
            self._plans[device] = Plan(self, device)
        return self._plans[device]

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Let this cache's layers and its attention find the step, in this thread alone."""
        token = STEP.set(self)
        try:
            yield
        finally:
            STEP.reset(token)


STEP: ContextVar[Step | None] = ContextVar("regiongpt_step", default=None)


class Plan:
    """Index tensors of a step on one device.

    Attributes:
        places: of each new token its row in the cache and its place there, as indices; two numbers in their stead where
            one new token of each of a run of rows goes to the same place, which is quicker to write.
        position_N: of each new token in the text.
        reach: tokens of the longest text.
        segments: each stored piece of the prefixes once: where it begins, and the tokens behind it (None for all).
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
        """What is added to the scores of a segment's keys under a sliding window: (1, 1, N, P), N tokens behind it."""
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
    prefixes: "Sequence[Prefix | None]", owner_N: Tensor, device: torch.device
) -> "list[tuple[Prefix, int, Tensor | None]]":
    """Each stored piece of the prefixes once: where it begins, and the tokens behind it (None for all of them)."""
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

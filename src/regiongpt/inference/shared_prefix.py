"""Runs a language model over many sequences with shared prefixes, whose keys and values are stored once.

New tokens attend to the prefixes and to their own sequence separately; the results are merged by their log-sum-exp.

Shapes: R sequences, N new tokens of all sequences in a row, n new tokens of one sequence, P tokens of a prefix, S
tokens of the longest sequence, C room for tokens, H query heads, K key heads, E width of a head, D model width, V
vocabulary, L logits wanted.
"""

import logging
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from regiongpt.model.modeling import cache_argument

_LOG = logging.getLogger(__name__)
ATTENTION = "regiongpt_shared_prefix"
_LAYERS = {"full_attention", "sliding_attention"}  # the kinds that the shared attention computes
_LEAN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}  # what LeanDecoder computes
_GROWTH = 64  # room for tokens grows by this many at a time
_PAGE, _PAD = 1024, 16  # float32 numbers in a page of memory, and in a line of the CPU's cache
# The CPU's fused attention with its log-sum-exp, which the public function keeps to itself.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Keys and values, (K, P, E) for each layer, of tokens that any number of sequences begin with.

    ``behind`` is the prefix that stands before these tokens, if any.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    behind: "Prefix | None" = None

    @cached_property
    def chain(self) -> "list[Prefix]":
        """This prefix and those before it, the first one first."""
        return [*(self.behind.chain if self.behind else ()), self]

    @cached_property
    def length(self) -> int:
        """Tokens of the whole chain."""
        return sum(each.keys[0].shape[1] for each in self.chain)

    @property
    def nbytes(self) -> int:
        """Memory of the whole chain."""
        return sum(part.nbytes for each in self.chain for part in (*each.keys, *each.values))

    @torch.inference_mode()
    def joined(self) -> "Prefix":
        """A copy of the whole chain in one piece, which a step attends to with fewer operations."""
        keys = tuple(torch.cat(parts, 1) for parts in zip(*(each.keys for each in self.chain), strict=True))
        values = tuple(torch.cat(parts, 1) for parts in zip(*(each.values for each in self.chain), strict=True))
        return Prefix(keys=keys, values=values)


class SuffixLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """The sequences' own tokens in one layer: ``keys`` and ``values`` (R, K, C, E)."""

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
            raise RuntimeError("a PrefixCache works only with Decoder.forward, not with a plain call of the model")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, room = len(step.cache.lengths), step.cache.room
        if self.keys.shape[0] < rows or self.keys.shape[2] < room:
            self.keys, self.values = _grown(self.keys, rows, room), _grown(self.values, rows, room)
        slots, places = step.places
        self.keys[slots, :, places] = key_states[0].transpose(0, 1)
        self.values[slots, :, places] = value_states[0].transpose(0, 1)
        step.written = (self, key_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many keys as queries: the shared attention makes its own masks."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Room for tokens of a sequence."""
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


class PrefixCache(Cache):  # type: ignore[misc]
    """The keys and values of a batch of sequences, each behind a shared :class:`Prefix` or none.

    ``lengths`` are the sequences' own tokens, ``room`` the tokens that memory is allocated for.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=SuffixLayer)
        self.prefixes: list[Prefix | None] = []
        self.lengths: list[int] = []
        self.room = 0

    def add(self, prefix: Prefix | None = None) -> None:
        """Begin a sequence behind a prefix, as the last row."""
        self.prefixes.append(prefix)
        self.lengths.append(0)

    def prefix(self, row: int) -> Prefix:
        """A sequence's tokens, for others to begin with."""
        keys, values = zip(*((layer.keys[row], layer.values[row]) for layer in self.layers), strict=True)
        end = self.lengths[row]
        keys, values = (tuple(part[:, :end] for part in parts) for parts in (keys, values))
        return Prefix(keys=keys, values=values, behind=self.prefixes[row])

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

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence with its prefix."""
        return max((self.total(row) for row in range(len(self.lengths))), default=0)


def _grown(part: Tensor, rows: int, room: int) -> Tensor:
    """(R, K, C, E) grown to at least this size with zeros: what is masked must still be a number."""
    grown = part.new_zeros((max(rows, part.shape[0]), part.shape[1], max(room, part.shape[2]), part.shape[3]))
    grown[: part.shape[0], :, : part.shape[2]] = part
    return grown


class Decoder:
    """Runs a language model over the sequences of a :class:`PrefixCache`; threads take turns.

    During a pass the language model's configuration names this package's attention: nobody else may call it then.
    """

    def __init__(self, language_model: Any) -> None:
        self.model, self.cache_argument = language_model, cache_argument(language_model)
        self.lock = threading.RLock()
        configs = {id(m.config): m.config for m in language_model.modules() if hasattr(m, "config")}
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]

    @torch.inference_mode()
    def read(self, embeds_PD: Tensor, behind: Prefix | None = None) -> Prefix:
        """Compute the keys and values of at least one token, after those of ``behind``."""
        cache = PrefixCache()
        cache.add(behind)
        self.forward(cache, embeds_PD, [len(embeds_PD)])
        return cache.prefix(0)

    @torch.inference_mode()
    def forward(
        self, cache: PrefixCache, embeds_ND: Tensor, counts: Sequence[int], logits: Sequence[int] | None = None
    ) -> Tensor:
        """Run new tokens of all of a cache's sequences; returns logits (L, V).

        Args:
            cache: what the sequences have read so far.
            embeds_ND: those of the first row first, without padding.
            counts: how many new tokens each row has, at least 1.
            logits: which of the N tokens to compute the head at; by default the last of each row.
        """
        wanted_L = torch.tensor(counts).cumsum(0) - 1 if logits is None else torch.tensor(logits)
        with self.lock:
            after = [known + count for known, count in zip(cache.lengths, counts, strict=True)]
            if max(after) > cache.room:  # exact at first: most sequences of a scored set never grow
                cache.room = max(after) if not cache.room else -(-max(after) // _GROWTH) * _GROWTH
            step = _Step(cache, counts, embeds_ND.device)
            token = STEP.set(step)
            try:
                found = self._run(step, embeds_ND, wanted_L.to(embeds_ND.device))
            finally:
                STEP.reset(token)
        cache.lengths = after  # only now: what an interrupted pass wrote is written over by the next
        return found

    def _run(self, step: "_Step", embeds_ND: Tensor, wanted_L: Tensor) -> Tensor:
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = ATTENTION
            output = self.model(
                inputs_embeds=embeds_ND[None],
                position_ids=step.position_N[None],
                use_cache=True,
                logits_to_keep=wanted_L,
                **{self.cache_argument: step.cache},
            )
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
        found: Tensor = output.logits[0]
        return found


class LeanDecoder(Decoder):
    """Runs the layers itself: transformers' own way through a layer costs more than a step's products."""

    def __init__(self, language_model: Any) -> None:
        super().__init__(language_model)
        # The CPU multiplies few rows by a matrix that lies transposed up to a third faster, unless its rows are a whole
        # number of memory pages apart: then they share places in the CPU's cache. The numbers stay the same.
        words = language_model.get_input_embeddings().weight
        with torch.inference_mode(False):
            linear = (each for each in language_model.modules() if isinstance(each, torch.nn.Linear))
            for weight in (each.weight for each in linear):
                if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight is not words:
                    wide, high = weight.shape
                    apart = wide + _PAD if wide % _PAGE == 0 else wide
                    weight.data = weight.new_empty(high, apart)[:, :wide].copy_(weight.data.t()).t()

    def _run(self, step: "_Step", embeds_ND: Tensor, wanted_L: Tensor) -> Tensor:
        model, x = self.model.model, embeds_ND
        last = len(model.layers) - 1
        cos_N1E, sin_N1E = (part[0][:, None] for part in model.rotary_emb(x, step.position_N[None]))
        half = cos_N1E.shape[-1] // 2
        sin_N1E = torch.cat([-sin_N1E[..., :half], sin_N1E[..., half:]], -1)
        for index, block in enumerate(model.layers):
            attention, y = block.self_attn, _normed(block.input_layernorm, x)
            parts: list[Tensor] = [each(y) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
            both = torch.cat(parts[:2], 1).view(len(x), -1, attention.head_dim)
            both = torch.addcmul(both * cos_N1E, both.roll(half, -1), sin_N1E)
            query = both[:, : -(parts[1].shape[1] // attention.head_dim)]
            key, value = both[:, query.shape[1] :], parts[2].view(len(x), -1, attention.head_dim)
            step.cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], index)
            query = query * attention.scaling
            if max(step.counts) == 1:
                out = self._attend(step, index, query).flatten(1)
            else:
                out = _shared_attention(step, index, query.transpose(0, 1), 1.0).transpose(0, 1).flatten(1)
            if index == last:  # of the other tokens only the keys and values are needed
                x, out = x[wanted_L], out[wanted_L]
            x = x + attention.o_proj(out)
            x = x + block.mlp(_normed(block.post_attention_layernorm, x))
        return self.model.lm_head(_normed(model.norm, x))  # type: ignore[no-any-return]

    def _attend(self, step: "_Step", index: int, query_RHE: Tensor) -> Tensor:
        """Attention of each sequence's one new token, whose query is scaled, to its prefixes and itself: (R, H, E)."""
        layer, group = step.cache.layers[index], step.groups[0]
        rows, heads, width = query_RHE.shape
        keys, values = (part[group.chosen][:, :, : group.longest] for part in (layer.keys, layer.values))
        query_RKgE = query_RHE.view(rows, keys.shape[1], -1, width)
        # Side by side: each prefix where it stands in its chain, then the sequence's own.
        longest = max((prefix.length for prefix, _ in step.prefixes), default=0)
        scores = query_RHE.new_full((*query_RKgE.shape[:3], longest + group.longest), float("-inf"))
        own_RKgS = query_RKgE @ keys.transpose(-1, -2)
        scores[..., longest:] = own_RKgS if group.mask is None else own_RKgS + group.mask
        shared = [
            (key, prefix.values[index], (tokens, ..., slice(prefix.length - key.shape[1], prefix.length)))
            for prefix, tokens in step.prefixes
            for key in [prefix.keys[index]]
        ]
        for key, _, place in shared:
            asked = query_RKgE[place[0]].transpose(0, 1)
            scores[place] = (asked.flatten(1, 2) @ key.transpose(-1, -2)).view(*asked.shape[:3], -1).transpose(0, 1)
        shares = scores.softmax(-1, torch.float32).to(values.dtype)
        out_RKgE: Tensor = shares[..., longest:] @ values
        for _, value, place in shared:
            share = shares[place].transpose(0, 1)
            out_RKgE[place[0]] += (share.flatten(1, 2) @ value).view(*share.shape[:3], -1).transpose(0, 1)
        return out_RKgE.view(rows, heads, -1)


def _normed(norm: Any, x: Tensor) -> Tensor:
    """What transformers' RMS norm, seven operations, computes, in one."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class RereadingDecoder(Decoder):
    """For language models with their own attention: caches only embeddings and recomputes every sequence."""

    def _run(self, step: "_Step", embeds_ND: Tensor, wanted_L: Tensor) -> Tensor:
        cache, found = step.cache, []
        cache.update(embeds_ND[None, None], embeds_ND[None, None, :, :0], 0)  # as the keys of a single layer
        for row, new_nD in enumerate(torch.split(embeds_ND, step.counts)):
            prefix = cache.prefixes[row]
            before = [part.keys[0][0] for part in (prefix.chain if prefix else ())]
            own = cache.layers[0].keys[row, 0, : cache.lengths[row]]
            whole = torch.cat([*before, own, new_nD])[None]
            found.append(self.model(inputs_embeds=whole, use_cache=False).logits[0, -len(new_nD) :])
        return torch.cat(found)[wanted_L]


@torch.inference_mode()
def decoder_for(language_model: Any) -> Decoder:
    """The first decoder that a trial on a few tokens finds right: the quickest first, last one that shares nothing."""
    name = type(language_model).__name__
    kinds = set(getattr(language_model.config.get_text_config(), "layer_types", None) or ())
    if getattr(language_model, "_supports_attention_backend", False) and kinds <= _LAYERS:
        device = next(language_model.parameters()).device
        embeds_ND = language_model.get_input_embeddings()(torch.arange(6, device=device))
        plain = language_model(inputs_embeds=embeds_ND[None], use_cache=False, logits_to_keep=1)
        expected_V = plain.logits[0, -1].float()
        lean = name in _LEAN and not any(_has_window(block.self_attn) for block in language_model.model.layers)
        for kind in (LeanDecoder, Decoder) if lean else (Decoder,):
            decoder, cache = kind(language_model), PrefixCache()
            try:
                cache.add(decoder.read(embeds_ND[:3]))
                decoder.forward(cache, embeds_ND[3:5], [2])
                found_V = decoder.forward(cache, embeds_ND[5:], [1])[0].float()
                # Half precision rounds; another attention than the model's own is off by as much as the logits vary.
                if (found_V - expected_V).abs().max() <= 0.2 * expected_V.std().clamp_min(1e-6):
                    return decoder
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever an architecture does that the shared way does not know
                _LOG.info("%s cannot share prefixes: %s", name, error)
    _LOG.warning("%s cannot share prefixes: each token recomputes the sequence, which is slow", name)
    return RereadingDecoder(language_model)


class _Step:
    """One pass of new tokens through the language model, as the cache's layers and the attention need to know it."""

    def __init__(self, cache: PrefixCache, counts: Sequence[int], device: torch.device) -> None:
        self.cache, self.counts = cache, list(counts)
        self.written: tuple[SuffixLayer, Tensor] | None = None  # the layer that was filled last, and its new keys
        starts, size = cache.lengths, len(counts)
        counts_R, before_R = torch.tensor(counts), torch.tensor([cache.total(row) for row in range(size)])
        owner_N = torch.repeat_interleave(torch.arange(size), counts_R)
        column_N = torch.arange(len(owner_N)) - (counts_R.cumsum(0) - counts_R)[owner_N]

        def tokens_of(rows: Sequence[int]) -> Tensor | slice:
            if len(rows) == size:
                return slice(None)
            return torch.isin(owner_N, torch.tensor(rows)).nonzero()[:, 0].to(device)

        # Row and place in the cache of each new token; a slice and a number, where they will do, are quicker.
        self.places: tuple[slice, int] | tuple[Tensor, Tensor]
        if max(counts) == 1 and len(set(starts)) == 1:
            self.places = slice(0, size), starts[0]
        else:
            self.places = owner_N.to(device), (torch.tensor(starts)[owner_N] + column_N).to(device)
        self.position_N = (before_R[owner_N] + column_N).to(device)
        self.reach = int(before_R.max()) + max(counts)  # tokens of the longest text
        behind: dict[Prefix, list[int]] = {}
        for row, prefix in enumerate(cache.prefixes):
            for part in prefix.chain if prefix else ():
                behind.setdefault(part, []).append(row)
        self.prefixes = [(prefix, tokens_of(rows)) for prefix, rows in behind.items()]
        # Sequences that continue by one token beside new ones: padded to one length they would cost as much.
        single = [row for row, count in enumerate(counts) if count == 1]
        several = [row for row, count in enumerate(counts) if count > 1]
        groups = [single, several] if single and several else [list(range(size))]
        self.groups = [_Group(rows, self.counts, starts, tokens_of(rows), device) for rows in groups]


STEP: ContextVar[_Step | None] = ContextVar("regiongpt_step", default=None)
"""The step of this thread, for the cache's layers and the attention."""


class _Group:
    """Sequences of a step whose attention to their own tokens is computed together."""

    def __init__(
        self, rows: list[int], counts: list[int], starts: list[int], tokens: Tensor | slice, device: torch.device
    ) -> None:
        counts, starts = [counts[row] for row in rows], [starts[row] for row in rows]
        self.tokens, self.size, self.widest = tokens, len(rows), max(counts)  # the tokens are theirs among the step's
        self.longest = max(start + count for start, count in zip(starts, counts, strict=True))
        run = range(rows[0], rows[0] + len(rows))
        self.chosen = slice(run.start, run.stop) if rows == list(run) else torch.tensor(rows).to(device)
        self.even = min(counts) == self.widest
        if not self.even:  # sequence and place of each new token
            columns = [(row, column) for row, count in enumerate(counts) for column in range(count)]
            self.padded = torch.tensor(columns).to(device).unbind(1)
        ends_Rn = torch.tensor(starts)[:, None] + torch.arange(self.widest)
        self.distance_R1nS = (ends_Rn[..., None] - torch.arange(self.longest)).to(device)[:, None]
        one_length = self.widest == 1 and min(starts) == max(starts)
        self.mask = None if one_length else _mask(self.distance_R1nS, torch.float32)

    def attend(
        self, query_HNE: Tensor, layer: SuffixLayer, scale: float, softcap: float | None, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of the new tokens to their own sequences: (H, N, E) and (H, N)."""
        heads, tokens, _ = query_HNE.shape
        key_heads, rows, widest = layer.keys.shape[1], self.size, self.widest
        keys, values = (part[self.chosen][:, :, : self.longest] for part in (layer.keys, layer.values))
        if self.even:
            query_RHnE = query_HNE.reshape(heads, rows, widest, -1).transpose(0, 1)
        else:
            query_RHnE = query_HNE.new_zeros((rows, heads, widest, query_HNE.shape[-1]))
            query_RHnE[self.padded[0], :, self.padded[1]] = query_HNE.transpose(0, 1)
        mask = self.mask if window is None else _mask(self.distance_R1nS, torch.float32, window)
        if mask is not None:
            mask = mask.to(query_HNE.dtype).repeat(1, 1, heads // key_heads if widest > 1 else 1, 1)
        folded = query_RHnE.reshape(rows, key_heads, -1, query_HNE.shape[-1])
        out, lse = attend(folded, keys, values, scale, mask=mask, softcap=softcap)
        out_RHnE, lse_RHn = out.reshape(rows, heads, widest, -1), lse.reshape(rows, heads, widest)
        if self.even:
            return out_RHnE.transpose(0, 1).reshape(heads, tokens, -1), lse_RHn.transpose(0, 1).reshape(heads, tokens)
        row_N, column_N = self.padded
        return out_RHnE[row_N, :, column_N].transpose(0, 1), lse_RHn[row_N, :, column_N].transpose(0, 1)


def _mask(distance: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """What is added to the scores of keys at a distance before their queries: -inf behind them or beyond a window."""
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer as transformers calls it, (1, H, N, E) to (1, N, H, E); the step says who sees whom.

    NotImplementedError for what ``decoder_for`` then leaves to the other decoder: keys that change between cache and
    attention, a bias or sinks, a sliding window that is not handed over.
    """
    step = STEP.get()
    own_terms = more.get("position_bias") is not None or more.get("s_aux") is not None
    if step is None or step.written is None or step.written[1] is not key or own_terms:
        raise NotImplementedError(f"{type(module).__name__} does more than attend to the keys in its cache")
    if sliding_window is None and _has_window(module):
        raise NotImplementedError(f"{type(module).__name__} has a sliding window only in its mask")
    index = step.cache.layers.index(step.written[0])
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = sliding_window if sliding_window is not None and step.reach > sliding_window else None
    return _shared_attention(step, index, query[0], scale, softcap, window).transpose(0, 1)[None], None


def _shared_attention(
    step: _Step, index: int, query_HNE: Tensor, scale: float, softcap: float | None = None, window: int | None = None
) -> Tensor:
    """Attention of a step's tokens in one layer to their prefixes and their own sequences: (H, N, E)."""
    layer = step.cache.layers[index]
    out_HNE = query_HNE.new_empty((*query_HNE.shape[:2], layer.values.shape[-1]))
    lse_HN = query_HNE.new_empty(query_HNE.shape[:2], dtype=torch.float32)
    for group in step.groups:
        own = group.attend(query_HNE[:, group.tokens], layer, scale, softcap, window)
        out_HNE[:, group.tokens], lse_HN[:, group.tokens] = own
    heads, key_heads, mask = query_HNE.shape[0], layer.keys.shape[1], None
    for prefix, tokens in step.prefixes:
        asked, keys, values = query_HNE[:, tokens], prefix.keys[index][None], prefix.values[index][None]
        if window is not None:
            place_P = torch.arange(prefix.length - keys.shape[2], prefix.length, device=keys.device)
            mask = _mask(step.position_N[tokens, None] - place_P, query_HNE.dtype, window).repeat(heads // key_heads, 1)
            mask = mask[None, None]
        folded = asked.reshape(1, key_heads, -1, asked.shape[-1])
        out, lse = attend(folded, keys, values, scale, mask=mask, softcap=softcap, blind=window is not None)
        out, lse = out.reshape(*asked.shape[:2], -1), lse.reshape(asked.shape[:2])
        # Two attentions over different keys as the one over all of them.
        share = torch.sigmoid(lse - lse_HN[:, tokens])[..., None].to(out.dtype)
        out_HNE[:, tokens] = torch.lerp(out_HNE[:, tokens], out, share)
        lse_HN[:, tokens] = torch.logaddexp(lse_HN[:, tokens], lse)
    return out_HNE


AttentionInterface.register(ATTENTION, shared_prefix_attention)


def _has_window(module: Any) -> bool:
    """Whether this layer's configuration has a sliding window."""
    config = getattr(module, "config", None)
    if kinds := getattr(config, "layer_types", None):
        return bool(kinds[module.layer_idx] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    blind: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention (B, K, n, E) over (B, K, S, E), and the log-sum-exp of its scores (B, K, n), in float32.

    ``mask`` (B, 1, n, S) is added to the scores; ``softcap`` bends them to within it; ``blind`` says that the mask may
    hide every key from a query, whose log-sum-exp is then -inf.
    """
    # One query a sequence is quicker without the fused kernel, and it promises nothing where a query sees no key.
    fusable = query.device.type == "cpu" and query.shape[2] > 1 and key.shape[-1] == value.shape[-1]
    if _FLASH is not None and fusable and softcap is None and not blind:
        out, lse = _FLASH(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse
    scores = torch.matmul(query * scale, key.transpose(-1, -2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    most = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - most)
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul((weights / total.clamp_min(1e-38)).to(value.dtype), value)
    return out, (most + total.log())[..., 0]

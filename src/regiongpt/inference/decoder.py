"""Runs a language model over many sequences behind shared prefixes, or behind copies where it cannot share them.

Shapes: N tokens of all sequences one behind the other, R sequences, D model width, V vocabulary, L logits wanted.
"""

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regiongpt.errors import ConfigError
from regiongpt.inference.attention import ATTENTION
from regiongpt.inference.prefix import STEP, Prefix, PrefixCache, Step
from regiongpt.model.modeling import CACHE, cache_argument

_LOG = logging.getLogger(__name__)
_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers, as transformers' configurations name them, that the shared attention computes."""


class Decoder:
    """Runs a language model over the sequences of a :class:`PrefixCache`.

    Threads take turns. While a pass runs, the language model's configuration names this package's attention: nobody
    else may call the model then.
    """

    shares = True
    """Whether a prefix is stored once, and trees are possible."""

    def __init__(self, language_model: Any) -> None:
        self.model = language_model
        self.cache_argument = cache_argument(language_model)
        self.lock = threading.RLock()
        self.trial = False
        configs = {id(m.config): m.config for m in language_model.modules() if hasattr(m, "config")}
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]

    def cache(self) -> PrefixCache:
        """Memory for a new batch."""
        return PrefixCache()

    def read(self, embeds_PD: Tensor, parent: Prefix | None = None) -> Prefix:
        """Compute the keys and values of a beginning, at least one token, behind ``parent``."""
        cache = self.cache()
        row = cache.add(parent)
        self.forward(cache, embeds_PD, [row], [len(embeds_PD)], logits=[len(embeds_PD) - 1])
        prefix = cache.keep(row)
        assert prefix is not None
        return prefix

    @torch.inference_mode()
    def forward(
        self,
        cache: PrefixCache,
        embeds_ND: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
        *,
        tree: Tensor | None = None,
        keep: bool = True,
        logits: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Run new tokens of some of a cache's sequences; returns logits (L, V).

        Args:
            cache: what the sequences have read so far.
            embeds_ND: embeddings of the new tokens, those of the first row first, without padding.
            rows: rows of the cache, ascending.
            counts: how many new tokens each of them has, at least 1.
            tree: bool (n, n): which new tokens of a sequence token i attends to, itself and its ancestors, besides all
                that the cache holds of the sequence; its position is its depth. All counts are n. By default each
                token attends to all before it.
            keep: False leaves the sequences as they were.
            logits: which of the N tokens to compute the head at; by default the last of each row.
        """
        if logits is None:
            logits = torch.tensor(counts).cumsum(0) - 1
        wanted = torch.as_tensor(logits, device=embeds_ND.device)
        step = Step(cache=cache, rows=rows, counts=counts, tree=tree, trial=self.trial)
        with self.lock, self._attention(step):
            cache.reserve(max(cache.lengths[row] + count for row, count in zip(rows, counts, strict=True)))
            output = self.model(
                inputs_embeds=embeds_ND[None],
                position_ids=step.on(embeds_ND.device).position_N[None],
                use_cache=True,
                logits_to_keep=wanted,
                **{self.cache_argument: cache},
            )
        if keep:  # only now: what an interrupted pass wrote is written over by the next
            for row, count in zip(rows, counts, strict=True):
                cache.lengths[row] += count
        found: Tensor = output.logits[0]
        return found

    @contextmanager
    def _attention(self, step: Step) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]
        token = STEP.set(step)
        try:
            for config in self._configs:
                config._attn_implementation = ATTENTION
            yield
        finally:
            STEP.reset(token)
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name


def decoder_for(language_model: Any) -> Decoder:
    """A decoder that shares prefixes, if a trial on a few tokens says that the model can, else one that copies."""
    config = language_model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(language_model, "_supports_attention_backend", False) and kinds <= _LAYERS:
        decoder = Decoder(language_model)
        if _shares(decoder):
            return decoder
    _LOG.warning(
        "%s does not attend through transformers' AttentionInterface in a way that can be shared; every sequence gets "
        "a copy of its prefix, one after the other, which takes more time and memory",
        type(language_model).__name__,
    )
    return PlainDecoder(language_model)


@torch.inference_mode()
def _shares(decoder: Decoder) -> bool:
    """Whether tokens behind a prefix get the logits that they have in a plain pass."""
    table = decoder.model.get_input_embeddings()
    device = next(decoder.model.parameters()).device
    embeds_ND = table(torch.arange(6, device=device))
    expected_V = decoder.model(inputs_embeds=embeds_ND[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
    decoder.trial = True
    try:
        cache = decoder.cache()
        row = cache.add(decoder.read(embeds_ND[:3]))
        found_V = decoder.forward(cache, embeds_ND[3:], [row], [3])[0].float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture does that the shared way does not know
        _LOG.info("%s cannot share prefixes: %s", type(decoder.model).__name__, error)
        return False
    finally:
        decoder.trial = False
    # Half precision rounds; another attention than the model's own is off by as much as the logits vary.
    return bool((found_V - expected_V).abs().max() <= 0.2 * expected_V.std().clamp_min(1e-6))


# ---------------------------------------------------------------------------------------------------------------------
# Language models that cannot share


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainPrefix(Prefix):
    """A beginning as a cache of the language model's own, ``state``, with its number of ``tokens``."""

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    state: Any
    tokens: int

    @property
    def own(self) -> int:
        """Tokens in the cache."""
        return self.tokens

    def crop(self, length: int) -> Prefix | None:
        """A copy cut to ``length`` tokens; None for none, or where the cache cannot be cut."""
        if length >= self.tokens:
            return self
        if length <= 0 or not getattr(self.state, "is_croppable", False):
            return None
        state = copy.deepcopy(self.state)
        try:
            state.crop(length - self.tokens)
        except RuntimeError:  # a window has dropped what would be needed again
            return None
        return PlainPrefix(state=state, tokens=length)


class PlainCache(PrefixCache):
    """A cache of the language model's own for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Any] = []

    def add(self, prefix: Prefix | None = None) -> int:
        """Begin a sequence with a copy of a prefix."""
        self.states.append(copy.deepcopy(prefix.state) if isinstance(prefix, PlainPrefix) else None)
        return super().add(prefix)

    def remove(self, row: int) -> None:
        """End a sequence. The last one takes its row."""
        self.states[row] = self.states[-1]
        self.states.pop()
        super().remove(row)

    def keep(self, row: int, onto: Prefix | None = None) -> Prefix | None:
        """All tokens of a sequence; nothing stays shared."""
        return PlainPrefix(state=copy.deepcopy(self.states[row]), tokens=self.total(row)) if self.total(row) else None


class PlainDecoder(Decoder):
    """A decoder for any model that keeps its past in a cache: one sequence at a time, without trees."""

    shares = False

    def cache(self) -> PrefixCache:
        """Memory for a new batch."""
        return PlainCache()

    @torch.inference_mode()
    def forward(
        self,
        cache: PrefixCache,
        embeds_ND: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
        *,
        tree: Tensor | None = None,
        keep: bool = True,
        logits: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Decoder.forward`, without trees; raises ConfigError where the language model keeps no cache."""
        assert isinstance(cache, PlainCache)
        assert tree is None
        found = []
        wanted = torch.tensor(counts).cumsum(0) - 1 if logits is None else torch.as_tensor(logits).cpu()
        begin = 0
        with self.lock:
            for row, count in zip(rows, counts, strict=True):
                state = cache.states[row] if keep else copy.deepcopy(cache.states[row])
                new_ND = embeds_ND[begin : begin + count]
                past = {} if state is None else {self.cache_argument: state}
                output = self.model(inputs_embeds=new_ND[None], use_cache=True, **past)
                if output.get(CACHE) is None:
                    raise ConfigError(
                        f"{type(self.model).__name__} returns no cache; choose a language model that does"
                    )
                mine = wanted[(wanted >= begin) & (wanted < begin + count)] - begin
                found.append(output.logits[0, mine.to(output.logits.device)])
                begin += count
                if keep:
                    cache.states[row] = output[CACHE]
                    cache.lengths[row] += count
        return torch.cat(found)

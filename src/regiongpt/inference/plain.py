"""The way of language models that cannot share a prefix: a cache of its own for every sequence.

Slower, and its memory grows with each sequence by the whole prefix, but it works with any model that keeps its past in
a cache, whatever its attention does.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regiongpt.errors import ConfigError
from regiongpt.inference.decoder import Decoder
from regiongpt.inference.prefix import Prefix, PrefixCache
from regiongpt.model.modeling import CACHE

_LOG = logging.getLogger(__name__)
_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers, as transformers' configurations name them, that :mod:`regiongpt.inference.prefix` computes."""


def decoder_for(language_model: Any) -> Decoder:
    """A decoder that shares prefixes where the language model can, else one that copies them.

    Whether it can is tried on a few tokens, not only read from its configuration.
    """
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


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainPrefix(Prefix):
    """A beginning as a cache of the language model's own, to be copied for each sequence.

    Attributes:
        state: the cache.
        tokens: how many it holds.
    """

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
        """All tokens of a sequence; nothing stays shared, so ``onto`` changes nothing."""
        return PlainPrefix(state=copy.deepcopy(self.states[row]), tokens=self.total(row)) if self.total(row) else None


class PlainDecoder(Decoder):
    """The methods of :class:`Decoder`, one sequence at a time and without trees."""

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
        """Run new tokens of some of a cache's sequences; see :meth:`Decoder.forward`.

        Raises:
            ConfigError: a tree, or a language model that keeps no cache.
        """
        assert isinstance(cache, PlainCache)
        if tree is not None:
            raise ConfigError("expected a language model that can share prefixes for a tree of answers; score chains")
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
                        f"{type(self.model).__name__} returns no cache, so its answers cannot be continued; choose a "
                        "language model that does"
                    )
                mine = wanted[(wanted >= begin) & (wanted < begin + count)] - begin
                found.append(output.logits[0, mine.to(output.logits.device)])
                begin += count
                if keep:
                    cache.states[row] = output[CACHE]
                    cache.lengths[row] += count
        return torch.cat(found)

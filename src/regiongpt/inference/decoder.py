"""A language model that continues many sequences at once behind shared beginnings.

Shapes: N tokens of all sequences one behind the other, R sequences, D model width, V vocabulary, L logits wanted.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regiongpt.inference.attention import ATTENTION
from regiongpt.inference.prefix import Prefix, PrefixCache, Step
from regiongpt.model.modeling import cache_argument


class Decoder:
    """Runs a language model over the sequences of a :class:`PrefixCache`.

    >>> decoder = Decoder(model.language_model)
    >>> prefix = decoder.read(embeds_PD)  # once an image
    >>> cache = decoder.cache()
    >>> rows = [cache.add(prefix) for _ in suffixes]
    >>> logits_RV = decoder.forward(cache, torch.cat(suffixes), rows, [len(suffix) for suffix in suffixes])
    >>> logits_RV = decoder.forward(cache, embed(logits_RV.argmax(-1)), rows, [1] * len(rows))

    Serves several threads, one after the other. While a pass runs, the language model's configuration names this
    package's attention: the model must not be called past this class then.

    Args:
        language_model: any ``AutoModelForCausalLM`` that attends through transformers' ``AttentionInterface``.
    """

    shares = True
    """Whether a prefix is stored once, and trees are possible."""

    def __init__(self, language_model: Any) -> None:
        self.model = language_model
        self.cache_argument = cache_argument(language_model)
        self.lock = threading.RLock()
        self.trial = False  # while it is found out whether the language model can go this way
        configs = {id(m.config): m.config for m in language_model.modules() if hasattr(m, "config")}
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]

    def cache(self) -> PrefixCache:
        """Memory for a new batch."""
        return PrefixCache()

    def read(self, embeds_PD: Tensor, parent: Prefix | None = None) -> Prefix:
        """Compute the keys and values of a beginning.

        Args:
            embeds_PD: its tokens, at least one.
            parent: what comes before them.
        """
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
        """Run new tokens of some of a cache's sequences.

        Args:
            cache: what the sequences have read so far.
            embeds_ND: embeddings of the new tokens, those of the first row first, with no padding between.
            rows: rows of the cache, ascending, none twice.
            counts: how many new tokens each of them has, at least 1.
            tree: bool (n, n): token i of a sequence attends to its token j, besides all that the cache holds of the
                sequence. Each token attends to itself and to its ancestors, and is at the position that follows from
                their number. All counts are n. By default each token attends to all before it.
            keep: False leaves the sequences as they were, as if the tokens had not been.
            logits: which of the N tokens to compute the head at; by default the last of each row.

        Returns:
            (L, V), in the language model's dtype.
        """
        if logits is None:
            logits = torch.tensor(counts).cumsum(0) - 1
        wanted = torch.as_tensor(logits, device=embeds_ND.device)
        step = Step(cache=cache, rows=rows, counts=counts, tree=tree, trial=self.trial)
        with self.lock, self._attention(), step.at_hand():
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
    def _attention(self) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = ATTENTION
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name

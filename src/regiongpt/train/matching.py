"""How a language model that is yet to be trained is made to compare what it reads.

Whether an image shows the thing that a word names, and which region does, is a search for an embedding like the word's.
A small model hardly finds out that there is something to search: from random weights, and after half an hour of texts,
it answered such questions about exact names at chance. Where some heads begin by attending to what is like the token
that they read for, and by handing on what they find, a few hundred windows are enough.

Such a beginning is called mimetic, because trained models come to look like it: Trockman and Kolter, *Mimetic
Initialization of Self-Attention Layers*, arXiv 2305.09828.
"""

from typing import Any

import torch
from torch import Tensor

FOUND = 0.3
"""Scale of what a comparing head reads from a token that it finds."""


@torch.no_grad()
def compare_at_first(model: Any, layers: int, seed: int) -> None:
    """Makes half the heads of the first layers attend to tokens like their own, and hand on what those hold.

    Query and key of a head become the same random orthonormal projection, so that the logit of two tokens is how alike
    they are within it; values another one, which the output undoes.

    Args:
        model: An untrained causal language model in Llama's architecture with as many keys as queries; changed in
            place. With rotary positions it compares near tokens best, and far ones by their slowly turning half.
        layers: How many layers from the first, or all where it has fewer; 0 leaves the model as it is.
        seed: Of the projections.
    """
    heads, size = model.config.num_attention_heads, model.config.head_dim
    for index, layer in enumerate(model.model.layers[:layers]):
        attention = layer.self_attn
        for head in range(heads // 2):
            rows = slice(head * size, (head + 1) * size)
            generator = torch.Generator().manual_seed((seed * len(model.model.layers) + index) * heads + head)
            alike, found = (_orthonormal(size, model.config.hidden_size, generator) for _ in range(2))
            attention.q_proj.weight[rows] = alike
            attention.k_proj.weight[rows] = alike
            attention.v_proj.weight[rows] = FOUND * found
            attention.o_proj.weight[:, rows] = found.T


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random rows, each of length one and at right angles to the others: (rows, columns)."""
    drawn = torch.randn(columns, rows, generator=generator)
    orthonormal: Tensor = torch.linalg.qr(drawn).Q
    return orthonormal.T

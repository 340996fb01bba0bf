"""Answers that cannot be off the list, with scores: every choice's likelihood behind one prompt.

The prompt goes through the language model once a question. Behind it go all answers together, as the tree of their
common beginnings: a node attends to the prompt and to its own ancestors alone, at the position it would have were it
the only answer. Eighty names cost as many tokens as they do not share, and no answer copies the prompt's cache.

Shapes: B questions, T prompt tokens, N logits (the prompt's last and one for each node), D model width, V vocabulary,
A answers, S steps (tokens of all answers).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regiongpt.inference.engine import ROWS, Engine, Scene, Turn

LOGITS = 2**26
"""Logits that one batch of questions may take: 256 MiB in float32."""


def score_answers(
    engine: Engine,
    scene: Scene,
    messages: Sequence[Turn],
    pooled: Sequence[Tensor],
    answers: Sequence[str],
    length_normalized: bool,
) -> list[list[float]]:
    """Probability of each answer to one question, for each of B sets of region features (R, D).

    Args:
        engine: the model.
        scene: the image asked about.
        messages: the conversation up to the question.
        pooled: what the question's placeholders stand for, B times.
        answers: at least one, no two alike.
        length_normalized: divide each answer's log likelihood by its number of tokens first.

    Returns:
        B rows of A probabilities, each row summing to 1.
    """
    if not pooled:
        return []
    n_regions = len(pooled[0])
    prompt = engine.encode(messages, n_regions)
    ids, rows = prompt["input_ids"].tolist(), prompt["region_ids"].tolist()
    wholes = [
        engine.encode([*messages, {"role": "assistant", "content": answer}], n_regions, answered=True)
        for answer in answers
    ]
    # A tokenizer may join the prompt's last letters with the answer's first: score from where they are all alike.
    shared = min(_common(ids, whole["input_ids"].tolist()) for whole in wholes)
    tree = Tree([_target_tokens(whole, shared) for whole in wholes])
    engine.room(shared, max(tree.lengths))
    alike = ids[:shared].index(engine.model.config.region_token_id) if rows else shared - 1
    vocabulary = engine.model.config.get_text_config().vocab_size
    size = max(1, min(ROWS, LOGITS // ((len(tree.tokens) + 1) * vocabulary)))
    results: list[list[float]] = []
    for start in range(0, len(pooled), size):
        embeds_BTD = engine.embed(scene, ids, rows, pooled[start : start + size])[:, :shared]
        scores_BA = score_tree(engine.model, embeds_BTD, alike, tree)
        if length_normalized:
            scores_BA = scores_BA / torch.tensor(tree.lengths, device=engine.device)
        results += scores_BA.softmax(-1).tolist()
    return results


@torch.inference_mode()
def score_tree(model: Any, embeds_BTD: Tensor, alike: int, tree: "Tree") -> Tensor:
    """Log likelihood of every path of a tree behind a prompt.

    Args:
        model: the whole model, with an attention that takes a mask for every pair of tokens (``eager`` or ``sdpa``).
        embeds_BTD: the prompts, (B, T, D).
        alike: how many tokens all prompts begin with in common, under T; these are computed once.
        tree: the answers.

    Returns:
        (B, A) float32.
    """
    rows, length = embeds_BTD.shape[:2]
    cache = None
    if rows > 1 and alike:
        cache = model(inputs_embeds=embeds_BTD[:1, :alike], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(rows)
    ahead = embeds_BTD if cache is None else embeds_BTD[:, alike:]
    first = model(inputs_embeds=ahead, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits_BNV = first.logits.float()
    if tree.tokens:
        tokens_BN = torch.tensor([tree.tokens], device=model.device).expand(rows, -1)
        hidden = torch.finfo(embeds_BTD.dtype).min
        mask_NN = torch.full((len(tree.tokens), len(tree.tokens)), hidden)
        for node, ancestors in enumerate(tree.ancestors):
            mask_NN[node, [*ancestors, node]] = 0.0
        mask = torch.cat([torch.zeros(len(tree.tokens), length), mask_NN], dim=1)
        behind = model(
            inputs_embeds=model.get_input_embeddings()(tokens_BN),
            attention_mask=mask.to(model.device, embeds_BTD.dtype).expand(rows, 1, -1, -1),
            position_ids=torch.tensor([[length + len(a) for a in tree.ancestors]], device=model.device),
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        logits_BNV = torch.cat([logits_BNV, behind.logits.float()], dim=1)
    parents, tokens, owners = (torch.tensor(column, device=model.device) for column in tree.steps)
    steps_BS = logits_BNV[:, parents, tokens] - logits_BNV.logsumexp(-1)[:, parents]
    scores = torch.zeros((rows, len(tree.lengths)), device=model.device)
    return scores.index_add_(1, owners, steps_BS)


class Tree:
    """Answers as token paths, merged where they begin alike.

    Attributes:
        tokens: of each node, its id. Nodes are the tokens that something follows, in the order of first use.
        ancestors: of each node, the nodes before it.
        lengths: of each answer, its number of tokens.
        steps: three parallel lists; for every token of every answer the place of the logits that predict it (0 the
            prompt's last, n + 1 those of node n), its id, and the answer it belongs to.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        self.ancestors: list[list[int]] = []
        self.lengths = [len(path) for path in paths]
        self.steps: tuple[list[int], list[int], list[int]] = ([], [], [])
        nodes: dict[tuple[int, ...], int] = {}
        for owner, path in enumerate(paths):
            above: list[int] = []
            for depth, token in enumerate(path):
                for column, value in zip(self.steps, (above[-1] + 1 if above else 0, token, owner), strict=True):
                    column.append(value)
                if depth + 1 == len(path):
                    continue  # nothing follows the last token, so its logits are not needed
                key = tuple(path[: depth + 1])
                if key not in nodes:
                    nodes[key] = len(self.tokens)
                    self.tokens.append(token)
                    self.ancestors.append(list(above))
                above.append(nodes[key])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _target_tokens(encoded: dict[str, Any], shared: int) -> list[int]:
    """The tokens behind ``shared`` others, up to the answer's end of turn."""
    targets = (encoded["labels"] >= 0).nonzero()
    tokens: list[int] = encoded["input_ids"][shared : int(targets[-1]) + 1].tolist()
    return tokens

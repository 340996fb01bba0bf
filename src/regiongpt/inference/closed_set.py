"""Answers that cannot be off the list, with scores: every choice's likelihood behind one prompt.

What all regions' prompts begin with goes through the language model once, and what each has of its own once for each.
Behind them go all answers together, as the tree of their common beginnings: a node attends to the prompt and to its own
ancestors alone, at the position it would have were it the only answer. A large tree goes in pieces, each with the
ancestors that it needs, so memory does not grow with the number of answers.

Shapes: B questions, R regions of a question, T prompt tokens, M nodes of a piece, E entries of the tree, A answers,
D model width, V vocabulary.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from regiongpt.errors import ConfigError
from regiongpt.inference.choice_tree import ChoiceTree, common_length
from regiongpt.inference.engine import Engine, Scene, TooLong, Turn, shared_tokens
from regiongpt.model.processing import expand_regions

TOKENS = 4096
"""Tokens of all questions of one forward pass."""
NODES = 512
"""Nodes of a piece of the tree: a pass compares all pairs of them for every question."""
LOGITS = 2**26
"""Logits of one forward pass: 256 MiB in float32."""
KEPT = 8
"""Closed sets, made ready for a question, that are kept for the next time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosedSet:
    """A question and its possible answers as tokens; of no image in particular.

    Attributes:
        ids: the prompt, up to where the first answers part.
        rows: for each region token in it the row of the region features that it stands for.
        tree: the answers from there on, their ends included.
    """

    ids: list[int]
    rows: list[int]
    tree: ChoiceTree


_READY: "WeakKeyDictionary[Engine, OrderedDict[Any, ClosedSet]]" = WeakKeyDictionary()
_LOCK = threading.Lock()


def closed_set(engine: Engine, messages: Sequence[Turn], n_regions: int, answers: Sequence[str]) -> ClosedSet:
    """Make the answers to a question ready to be scored; what was ready lately is not made again.

    Args:
        engine: the model.
        messages: the conversation up to the question.
        n_regions: how many regions the question has.
        answers: at least one.

    Raises:
        TooLong: the question and its longest answer do not fit the model's context.
    """
    key = (*((turn["role"], turn["content"]) for turn in messages), n_regions, engine.processor.chat_template)
    whole_key = (key, tuple(answers))
    with _LOCK:
        ready = _READY.setdefault(engine, OrderedDict())
        if whole_key in ready:
            ready.move_to_end(whole_key)
            return ready[whole_key]
    made = _closed_set(engine, messages, n_regions, answers)
    with _LOCK:
        ready[whole_key] = made
        while len(ready) > KEPT:
            ready.popitem(last=False)
    return made


def _closed_set(engine: Engine, messages: Sequence[Turn], n_regions: int, answers: Sequence[str]) -> ClosedSet:
    prompt = engine.encode(messages, n_regions)
    ids, rows = prompt["input_ids"].tolist(), prompt["region_ids"].tolist()
    # A tokenizer may join the prompt's last letters with the answer's first: score from where they begin to differ.
    shared, ends = len(ids), []
    kept = max(0, len(ids) - _JOINT)
    for whole in _wholes(engine, messages, n_regions, answers):
        shared = min(shared, common_length(ids, whole))
        # Only the end, from as far back as a joint can reach: the rest of the prompt would be kept for each answer.
        ends.append(whole[kept:])
    if shared < kept:
        raise ConfigError(
            f"expected a chat template that writes an answer behind its question, got one that changes the last "
            f"{len(ids) - shared} tokens of the question"
        )
    paths = [end[shared - kept :] for end in ends]
    longest = max(map(len, paths))
    if engine.room(shared, longest) < longest:
        raise TooLong(f"expected a question and an answer that fit the model's context, got {shared + longest} tokens")
    return ClosedSet(ids=ids[:shared], rows=rows, tree=ChoiceTree(paths))


def _wholes(engine: Engine, messages: Sequence[Turn], n_regions: int, answers: Sequence[str]) -> Iterator[list[int]]:
    """The tokens of the conversation with each of the answers, up to the answer's end of turn.

    The processor takes its time to check and render a conversation, so a large set's texts are made from one that it
    rendered, and go through the tokenizer together; what that gives is held against the processor's own tokens.
    """

    def plain(answer: str) -> list[int]:
        encoded = engine.encode([*messages, {"role": "assistant", "content": answer}], n_regions, answered=True)
        whole: list[int] = encoded["input_ids"][: int((encoded["labels"] >= 0).nonzero()[-1]) + 1].tolist()
        return whole

    processor = engine.processor
    rendered = processor.apply_chat_template([*messages, {"role": "assistant", "content": _MARK}], tokenize=False)
    text, _, _ = expand_regions(rendered, [], processor.region_format, n_regions)
    head, *tails = text.split(_MARK)
    begun, head = processor.split_begin(head)

    def quick(some: Sequence[str]) -> list[list[int]]:
        texts = [head + answer + tails[0] for answer in some]
        image = [processor.image_token_id] * processor.num_image_tokens
        found = []
        for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]:
            place = ids.index(processor.image_token_id)
            last = max(place for place, token in enumerate(ids) if token in processor.stop_token_ids)
            found.append(begun + ids[:place] + image + ids[place + 1 : last + 1])
        return found

    # Brackets make placeholders and control tokens, which the processor checks.
    simple = [re.search(r"[<>\[\]|]", answer) is None for answer in answers]
    samples = sorted((answer for answer, fits in zip(answers, simple, strict=True) if fits), key=len)[
        :: -(-len(answers) // 4)
    ]
    try:
        trusted = len(tails) == 1 and bool(samples) and quick(samples) == [plain(answer) for answer in samples]
    except ValueError:  # no image or no end of turn among the tokens
        trusted = False
    for start in range(0, len(answers), _TOGETHER):
        some = answers[start : start + _TOGETHER]
        quickly = iter(quick([a for a, fits in zip(some, simple[start:], strict=False) if fits]) if trusted else ())
        for answer, fits in zip(some, simple[start:], strict=False):
            yield next(quickly) if trusted and fits else plain(answer)


_JOINT = 64
"""Tokens at a prompt's end that an answer behind it may change."""
_MARK = "Xanthochroid"
"""Stands for an answer in a rendered conversation; no question has it."""
_TOGETHER = 1024
"""Conversations that are tokenized at a time."""


def log_likelihoods(engine: Engine, scene: Scene, closed: ClosedSet, pooled: Sequence[Tensor]) -> Tensor:
    """Log likelihood of every answer, its end included, for each of B sets of region features.

    Args:
        engine: the model.
        scene: the image asked about.
        closed: the question and its answers.
        pooled: what the question's placeholders stand for, (R, D) each.

    Returns:
        (B, A) float32, on the CPU.
    """
    tree = closed.tree
    budget = max(1, min(TOKENS, LOGITS // engine.model.config.get_text_config().vocab_size))
    size = max(1, min(NODES, len(tree.nodes), budget))
    batch = max(1, budget // size)
    rows = [torch.empty((0, len(tree.leaves)))]
    for start in range(0, len(pooled), batch):
        rows.append(_score(engine, scene, closed, pooled[start : start + batch], size))
    scores_BA = torch.cat(rows)
    if scores_BA.isnan().any():
        raise ConfigError(f"the model computes no numbers (NaN) in {engine.model.dtype}; load it in float32")
    return scores_BA


@torch.inference_mode()
def _score(engine: Engine, scene: Scene, closed: ClosedSet, pooled: Sequence[Tensor], size: int) -> Tensor:
    decoder, tree, count = engine.decoder, closed.tree, len(pooled)
    shared = shared_tokens(closed.ids, engine.model.config.region_token_id) if count > 1 else 0
    prompts = [engine.begin(scene, closed.ids, closed.rows, features, shared) for features in pooled]
    own = [embeds_ND for _, embeds_ND in prompts]
    cache = decoder.cache()
    rows = [cache.add(prefix) for prefix, _ in prompts]
    steps_BE = torch.zeros((count, len(tree.tokens)))
    first = decoder.forward(cache, torch.cat(own), rows, [len(embeds) for embeds in own])
    _fill(steps_BE, first[:, None], tree, tree.first, torch.zeros(len(tree.first), dtype=torch.long))
    embed = engine.model.get_input_embeddings()
    for piece in tree.pieces(size) if decoder.shares else tree.chains():
        nodes = len(piece.tokens)
        tokens_M = torch.from_numpy(piece.tokens).to(engine.device)
        wanted = torch.arange(count)[:, None] * nodes + torch.arange(piece.known, nodes)
        logits = decoder.forward(
            cache,
            embed(tokens_M).repeat(count, 1),
            rows,
            [nodes] * count,
            tree=torch.from_numpy(piece.visible) if decoder.shares else None,
            keep=False,
            logits=wanted.flatten(),
        ).view(count, nodes - piece.known, -1)
        _fill(steps_BE, logits, tree, piece.entries, torch.from_numpy(piece.rows - piece.known))
    return _sums(steps_BE, tree)


def _fill(steps_BE: Tensor, logits_BMV: Tensor, tree: ChoiceTree, entries: Any, rows: Tensor) -> None:
    """Write the log probabilities of entries that are predicted at ``rows`` of the logits."""
    normal_BM = torch.stack([logits.float().logsumexp(-1) for logits in logits_BMV])
    tokens = torch.from_numpy(tree.tokens[entries]).to(logits_BMV.device)
    rows = rows.to(logits_BMV.device)
    steps_BE[:, torch.from_numpy(entries)] = (logits_BMV[:, rows, tokens].float() - normal_BM[:, rows]).cpu()


def _sums(steps_BE: Tensor, tree: ChoiceTree) -> Tensor:
    """The sum of the steps that lead to each answer's end, (B, A)."""
    sums_BE = steps_BE.double()
    for depth in range(1, int(tree.depths.max()) + 1):
        entries = torch.from_numpy((tree.depths == depth).nonzero()[0])
        sums_BE[:, entries] += sums_BE[:, torch.from_numpy(tree.parents)[entries]]
    return sums_BE[:, torch.from_numpy(tree.leaves)].float()


def content_free(engine: Engine) -> Tensor:
    """Features (K, D) of a region of which nothing is known, with as many tokens as any region has.

    It is what the connector makes of the mean that it standardises its input by: the mean of the regions that the model
    was trained on where its recipe measured one, and else zero. Others were tried, and none is better than no
    calibration with the model that ships (``docs/performance.md``).
    """
    connector = engine.model.connector
    with torch.inference_mode():
        blank_1D = connector(connector.mean[None].to(connector.linear_1.weight.dtype))
    features: Tensor = blank_1D.repeat(engine.processor.tokens_per_region, 1)
    return features


def answer_scores(
    engine: Engine,
    scene: Scene,
    messages: Sequence[Turn],
    pooled: Sequence[Tensor],
    answers: Sequence[str],
    *,
    length_normalized: bool = False,
    calibrated: bool = False,
) -> Tensor:
    """Score of each answer to one question, for each of B sets of region features.

    Args:
        engine: the model.
        scene: the image asked about.
        messages: the conversation up to the question.
        pooled: what the question's placeholders stand for, (R, D), B times.
        answers: at least one, each once.
        length_normalized: divide each answer's log likelihood by its number of tokens.
        calibrated: take from each answer's log likelihood that of the same answer about regions of which nothing is
            known, in the same image.

    Returns:
        (B, A) float32 on the CPU; their softmax are the probabilities.

    Raises:
        TooLong: the question and its longest answer do not fit the model's context.
    """
    asked = list(pooled)
    if not asked:
        return torch.empty((0, len(answers)))
    closed = closed_set(engine, messages, len(asked[0]) // engine.processor.tokens_per_region, answers)
    if calibrated:
        blank_KD = content_free(engine)
        asked.append(blank_KD.repeat(len(asked[0]) // len(blank_KD), 1))
    scores_BA = log_likelihoods(engine, scene, closed, asked)
    if calibrated:
        scores_BA = scores_BA[:-1] - scores_BA[-1:]
    if length_normalized:
        scores_BA = scores_BA / torch.from_numpy(closed.tree.lengths)
    return scores_BA.float()

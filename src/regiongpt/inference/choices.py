"""Answers from a closed set, with scores: the likelihood of every choice behind one prompt.

The prompt goes through the language model once, and behind its cached keys and values all answers go together, as the
tree of their common beginnings. A large tree goes in pieces, each with the ancestors that it needs, so memory does not
grow with the number of answers.

Shapes: B questions, R regions of a question, K tokens of a region, T prompt tokens, E entries of the tree, A answers,
M nodes of a piece, P predictions of a piece, D model width, V vocabulary.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regiongpt.errors import ConfigError
from regiongpt.inference.engine import LEAST_ROOM, Engine, Scene, TooLong, Turn, question_turns, shared_tokens
from regiongpt.inference.options import By, ClassifyOptions, Options
from regiongpt.model.processing import expand_regions
from regiongpt.prompts import NO_MATCH, question, region_answer
from regiongpt.regions import Region

TOKENS = 4096
"""Tokens of all questions of one forward pass."""
NODES = 512
"""Nodes of a piece of the tree: a pass compares all pairs of them for every question."""
LOGITS = 2**26
"""Logits of one forward pass: 256 MiB in float32."""
KEPT = 8
"""Closed sets, made ready for a question, that are kept for the next time."""
_MARK = "Xanthochroid"
"""Stands for an answer in a rendered conversation; no question has it."""
_TOGETHER = 1024
"""Conversations that are tokenized at a time."""

Ints = NDArray[np.int64]


# ---------------------------------------------------------------------------------------------------------------------
# The tree of answers


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some nodes of a tree with all their ancestors, for one forward pass behind the prompt."""

    tokens: Ints  # (M,) an ancestor always before what continues it
    visible: NDArray[np.bool_]  # (M, M) row for column: each node sees its ancestors and itself
    known: int  # how many of the nodes, the first, are ancestors from an earlier piece
    rows: Ints  # (P,) which node's logits predict an entry; each entry is predicted in one piece alone
    entries: Ints  # (P,) the entry that it predicts


class ChoiceTree:
    """Answers as token paths of at least one token, merged where they begin alike.

    An entry is one token behind one beginning. Entries stand in preorder: right behind an entry comes all that
    continues it. So who may attend to whom is a comparison of two numbers an entry, never a table of all pairs, and a
    run of entries cut out anywhere needs nothing of the rest but the ancestors of its first.

    Attributes:
        tokens: (E,) the id of each entry.
        parents: (E,) the entry before it, -1 for what the prompt's last token predicts.
        depths: (E,) how many entries lead to it.
        leaves: (A,) the entry that ends each answer.
        lengths: (A,) tokens of each answer.
        nodes: the entries that something follows, which are all that a model has to read.
    """

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        assert paths
        assert all(paths)
        tokens: list[int] = []
        parents: list[int] = []
        leaves = [0] * len(paths)
        above: list[int] = []  # the entries of the last path
        before: Sequence[int] = ()
        for answer in sorted(range(len(paths)), key=lambda answer: list(paths[answer])):
            path = paths[answer]
            alike = common_length(before, path)
            del above[alike:]
            for token in path[alike:]:
                parents.append(above[-1] if above else -1)
                above.append(len(tokens))
                tokens.append(token)
            leaves[answer] = above[-1]
            before = path
        self.tokens: Ints = np.array(tokens)
        self.parents: Ints = np.array(parents)
        self.leaves: Ints = np.array(leaves)
        self.lengths: Ints = np.array([len(path) for path in paths])
        self.depths: Ints = np.zeros(len(tokens), np.int64)
        for entry, parent in enumerate(parents):
            if parent >= 0:
                self.depths[entry] = self.depths[parent] + 1
        self.nodes: Ints = np.unique(self.parents[self.parents >= 0])
        sizes = np.ones(len(tokens), np.int64)
        for entry in range(len(sizes) - 1, -1, -1):
            if parents[entry] >= 0:
                sizes[parents[entry]] += sizes[entry]
        self._ends = np.arange(len(sizes)) + sizes  # one past the last entry below each

    @property
    def first(self) -> Ints:
        """The entries that the prompt's own last token predicts."""
        return np.flatnonzero(self.parents < 0)

    def pieces(self, size: int) -> Iterator[Piece]:
        """Cut the tree into pieces of ``size`` new nodes, at least 1, and the ancestors that these need."""
        order = np.argsort(self.parents, kind="stable")
        sorted_parents = self.parents[order]
        for start in range(0, len(self.nodes), size):
            new = self.nodes[start : start + size]
            # In preorder whoever comes from before the piece lies above its first node too.
            kept = np.concatenate([self._ancestors(int(new[0])), new])
            visible = (kept[None, :] <= kept[:, None]) & (kept[:, None] < self._ends[kept][None, :])
            low, high = np.searchsorted(sorted_parents, new, "left"), np.searchsorted(sorted_parents, new, "right")
            counts = high - low
            entries = order[np.repeat(high - counts.cumsum(), counts) + np.arange(counts.sum())]
            known = len(kept) - len(new)
            rows = np.repeat(np.arange(known, len(kept)), counts)
            yield Piece(tokens=self.tokens[kept], visible=visible, known=known, rows=rows, entries=entries)

    def chains(self) -> Iterator[Piece]:
        """One piece an answer, for models that cannot be shown a tree; each predicts all entries of its answer."""
        for leaf in np.unique(self.leaves):
            path = np.concatenate([self._ancestors(int(leaf)), [leaf]])
            nodes = path[:-1]
            if count := len(nodes):
                visible = np.tri(count, dtype=bool)
                yield Piece(
                    tokens=self.tokens[nodes], visible=visible, known=0, rows=np.arange(count), entries=path[1:]
                )

    def _ancestors(self, entry: int) -> Ints:
        found: list[int] = []
        while (entry := int(self.parents[entry])) >= 0:
            found.append(entry)
        return np.array(found[::-1], np.int64)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosedSet:
    """A question and its possible answers as tokens; of no image in particular."""

    ids: list[int]  # the prompt, up to where the first answers part
    rows: list[int]  # for each region token in it the row of the region features that it stands for
    tree: ChoiceTree  # the answers from there on, their ends included


_READY: "WeakKeyDictionary[Engine, OrderedDict[Any, ClosedSet]]" = WeakKeyDictionary()
_LOCK = threading.Lock()


def closed_set(engine: Engine, messages: Sequence[Turn], n_regions: int, answers: Sequence[str]) -> ClosedSet:
    """Make the answers to a question ready to be scored; what was ready lately is not made again.

    Raises:
        TooLong: the question and its longest answer do not fit the model's context.
        ConfigError: the chat template does not write an answer as it is behind its question.
    """
    turns = tuple((turn["role"], turn["content"]) for turn in messages)
    key = (turns, n_regions, engine.processor.chat_template, tuple(answers))
    with _LOCK:
        ready = _READY.setdefault(engine, OrderedDict())
        if key in ready:
            ready.move_to_end(key)
            return ready[key]
    prompt = engine.encode_text(messages, n_regions)
    ids, rows = prompt["input_ids"].tolist(), prompt["region_ids"].tolist()
    # A tokenizer may join the prompt's last letters with the answer's first: score from where they begin to differ.
    shared, wholes = len(ids), list(_wholes(engine, messages, n_regions, answers))
    for whole in wholes:
        shared = min(shared, common_length(ids, whole))
    if not shared:
        raise ConfigError("the chat template changes the question when it writes an answer behind it")
    paths = [whole[shared:] for whole in wholes]
    longest = max(map(len, paths))
    if engine.room(shared, longest) < longest:
        raise TooLong(f"question and answer too long: {shared + longest} tokens; shorten them")
    made = ClosedSet(ids=ids[:shared], rows=rows, tree=ChoiceTree(paths))
    with _LOCK:
        ready[key] = made
        while len(ready) > KEPT:
            ready.popitem(last=False)
    return made


def _wholes(engine: Engine, messages: Sequence[Turn], n_regions: int, answers: Sequence[str]) -> Iterator[list[int]]:
    """Tokens of the conversation with each answer, to its end of turn; it is rendered once."""
    processor = engine.processor
    rendered = processor.apply_chat_template([*messages, {"role": "assistant", "content": _MARK}], tokenize=False)
    text, _, _ = expand_regions(rendered, [], processor.region_format, n_regions)
    head, *tails = text.split(_MARK)
    if len(tails) != 1:
        raise ConfigError("the chat template has to write an answer once and as it is, to score a closed set with it")
    begun, head = processor.split_begin(head)
    image, stops = [processor.image_token_id] * processor.num_image_tokens, set(processor.stop_token_ids)
    region, repeats = engine.model.config.region_token_id, processor.tokens_per_region
    for start in range(0, len(answers), _TOGETHER):
        texts = [head + processor.plain_words(answer) + tails[0] for answer in answers[start : start + _TOGETHER]]
        for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]:
            ids = [token for token in ids for _ in range(repeats if token == region else 1)]
            place = ids.index(processor.image_token_id)
            last = max(place for place, token in enumerate(ids) if token in stops)
            yield begun + ids[:place] + image + ids[place + 1 : last + 1]


def log_likelihoods(engine: Engine, scene: Scene, closed: ClosedSet, pooled: Sequence[Tensor]) -> Tensor:
    """Log likelihood (B, A) of every answer, its end included, for each of B sets of region features (R * K, D)."""
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
    sums_BE = steps_BE.double()
    for depth in range(1, int(tree.depths.max()) + 1):
        entries = torch.from_numpy((tree.depths == depth).nonzero()[0])
        sums_BE[:, entries] += sums_BE[:, torch.from_numpy(tree.parents)[entries]]
    return sums_BE[:, torch.from_numpy(tree.leaves)].float()


def _fill(steps_BE: Tensor, logits_BMV: Tensor, tree: ChoiceTree, entries: Any, rows: Tensor) -> None:
    """Write the log probabilities of entries that are predicted at ``rows`` of the logits."""
    normal_BM = torch.stack([logits.float().logsumexp(-1) for logits in logits_BMV])
    tokens = torch.from_numpy(tree.tokens[entries]).to(logits_BMV.device)
    rows = rows.to(logits_BMV.device)
    steps_BE[:, torch.from_numpy(entries)] = (logits_BMV[:, rows, tokens].float() - normal_BM[:, rows]).cpu()


def content_free(engine: Engine) -> Tensor:
    """Features (K, D) of a region of which nothing is known: what the connector makes of the mean that it subtracts."""
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
    """Scores (B, A) of the answers to one question for each of B sets of region features (R * K, D), on the CPU.

    ``length_normalized`` divides each log likelihood by the answer's number of tokens; ``calibrated`` subtracts that of
    the same answer about regions of which nothing is known. The softmax of the scores are probabilities.

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


# ---------------------------------------------------------------------------------------------------------------------
# The class of a region


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The class of one region, chosen from a closed set.

    Attributes:
        label: the likeliest choice.
        probability: of that choice, given that the answer is one of the choices.
        probabilities: of every choice, in the order given, summing to 1; or with ``top_k`` of the likeliest alone, the
            likeliest first.
        text: the answer as generated freely; None unless it was asked for.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    text: str | None = None

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` likeliest choices with their probabilities, the likeliest first."""
        return sorted(self.probabilities.items(), key=lambda choice: -choice[1])[: max(0, k)]


def classify_regions(
    engine: Engine, scene: Scene, regions: Sequence[Region], names: Sequence[str], options: ClassifyOptions
) -> list[Classified]:
    """What :meth:`RegionPredictor.classify` does, with checked names."""
    text = question("classify", regions=[1], label_set=options.label_set)
    scores_BA = answer_scores(
        engine,
        scene,
        question_turns((), text),
        engine.pool_each(scene, regions),
        names,
        length_normalized=options.length_normalized,
        calibrated=options.calibrated,
    )
    short = Options(max_new_tokens=LEAST_ROOM)
    free = engine.answer_each(scene, text, regions, short) if options.generate else []
    results = []
    # A row at a time: of thousands of names and hundreds of regions, only what is asked for is kept.
    for index, scores_A in enumerate(scores_BA):
        shares_A = scores_A.softmax(-1)
        if options.top_k is None:
            kept = dict(zip(names, shares_A.tolist(), strict=True))
        else:
            best = shares_A.topk(min(options.top_k, len(names)))
            kept = {names[k]: share for k, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        label = max(kept, key=kept.__getitem__)
        answer = free[index].text if free else None
        results.append(Classified(label=label, probability=kept[label], probabilities=kept, text=answer))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The region that an expression refers to


@dataclass(frozen=True, kw_only=True)
class Located:
    """Which of several regions fits an expression.

    Attributes:
        index: 0-based position in the list of regions given; None where none of them fits.
        number: the same, 1-based, as the model says it.
        text: the answer in the paper's words, ``Region [N]`` or the no-match sentence.
        probability: of that answer, given that the answer is one of the regions or none.
        probabilities: of each region, in the order given, and last of none; they sum to 1.
    """

    index: int | None
    number: int | None
    text: str
    probability: float
    probabilities: tuple[float, ...]


def locate_expressions(
    engine: Engine, scene: Scene, pooled: Sequence[Tensor], expressions: Sequence[str], by: By
) -> list[Located]:
    """What :meth:`RegionPredictor.locate` does, with checked arguments and the features (K, D) of each region."""
    numbers = range(1, len(pooled) + 1)
    answers = [*map(region_answer, numbers), NO_MATCH]
    asked = [question("locate", regions=numbers, expression=each) for each in expressions if by != "words"]
    # All made ready before the first is scored: what is too long is known at once.
    ready = [closed_set(engine, question_turns((), text), len(pooled), answers) for text in asked]
    called_ER = called(engine, scene, pooled, expressions) if by != "answer" and expressions else torch.empty(0)
    features = torch.cat(list(pooled))
    results = []
    for row in range(len(expressions)):
        if by == "words":
            shares = torch.cat([called_ER[row].softmax(-1), torch.zeros(1)])
        else:
            shares = log_likelihoods(engine, scene, ready[row], [features])[0].softmax(-1)
        if by == "both":
            none = shares[-1:]
            shares = torch.cat([(1 - none) * called_ER[row].softmax(-1), none])
        # Two regions that fit equally share their probability; that does not make it likelier that none fits.
        best = int(shares.argmax()) if by == "answer" or shares[-1] > 0.5 else int(shares[:-1].argmax())
        found = best if best < len(pooled) else None
        results.append(
            Located(
                index=found,
                number=None if found is None else found + 1,
                text=answers[best],
                probability=float(shares[best]),
                probabilities=tuple(shares.tolist()),
            )
        )
    return results


def called(engine: Engine, scene: Scene, pooled: Sequence[Tensor], expressions: Sequence[str]) -> Tensor:
    """Log likelihood (E, R) of each expression as what the model calls a region, each region by itself."""
    turns = question_turns((), question("refer", regions=[1]))
    different = list(dict.fromkeys(expressions))
    scores_RE = answer_scores(engine, scene, turns, pooled, different)
    return scores_RE.T[[different.index(each) for each in expressions]]

"""Answers from a closed set: the likelihood of every choice behind one prompt.

The prompt goes through the language model once, and behind it all answers as the tree of their common beginnings. A
large tree goes in pieces, each with the ancestors that it needs, so memory does not grow with the number of answers.

Shapes: B questions, R regions, K tokens of a region, E entries of the tree, A answers, L tokens of the longest answer,
M nodes of a piece, D model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regiongpt.errors import ConfigError
from regiongpt.inference.engine import (
    LEAST_ROOM,
    Engine,
    Scene,
    TooLong,
    Turn,
    question_turns,
    shared_tokens,
)
from regiongpt.inference.options import By, ClassifyOptions, Options
from regiongpt.inference.shared_prefix import PrefixCache
from regiongpt.model.processing import expand_regions
from regiongpt.prompts import NO_MATCH, question, region_answer
from regiongpt.regions import Region

TOKENS = 4096
"""Tokens of all questions of one forward pass."""
NODES = 512
"""Nodes of a piece of the tree: a pass compares all pairs of them for every question."""
LOGITS = 2**26
"""Logits of one forward pass: 256 MiB in float32."""
_MARK = "Xanthochroid"
"""Stands for an answer in a rendered conversation; no question has it."""
_TOGETHER = 1024
"""Conversations that are tokenized at a time."""

# ---------------------------------------------------------------------------------------------------------------------
# The tree of answers


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some nodes of a tree with all their ancestors, for one forward pass behind the prompt."""

    tokens: list[int]  # M, an ancestor always before what continues it
    visible_MM: Tensor  # row for column: each node sees its ancestors and itself
    known: int  # how many of the nodes, the first, are ancestors from an earlier piece
    rows: list[int]  # which new node's logits predict an entry
    entries: list[int]  # the entry that it predicts


class ChoiceTree:
    """Answers as token paths of at least one token, merged where they begin alike.

    An entry is one token behind one beginning. Entries stand in preorder, so a run of entries cut out anywhere needs
    nothing of the rest but the ancestors of its first.

    Attributes:
        tokens: (E) the id of each entry.
        parents: (E) the entry before it, -1 for what the prompt's last token predicts.
        paths: the entries of each answer.
    """

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        found: dict[tuple[int, int], int] = {}  # the entry of a token behind a parent
        self.paths: list[list[int]] = [[] for _ in answers]
        for answer in sorted(range(len(answers)), key=lambda answer: list(answers[answer])):
            entry = -1
            for token in answers[answer]:
                entry = found.setdefault((entry, token), len(found))
                self.paths[answer].append(entry)
        self.parents = [parent for parent, _ in found]
        self.tokens = [token for _, token in found]
        self._children: dict[int, list[int]] = {}
        for entry, parent in enumerate(self.parents):
            self._children.setdefault(parent, []).append(entry)
        self.first = self._children.pop(-1)
        """The entries that the prompt's own last token predicts."""
        self.nodes = sorted(self._children)
        """The entries that something follows, which are all that a model has to read."""

    def pieces(self, size: int) -> Iterator[Piece]:
        """Cut the tree into pieces of ``size`` new nodes, at least 1, and the ancestors that these need."""
        for start in range(0, len(self.nodes), size):
            new = self.nodes[start : start + size]
            kept: list[int] = []
            above = self.parents[new[0]]  # in preorder whoever comes from before the piece lies above its first node
            while above >= 0:
                kept.insert(0, above)
                above = self.parents[above]
            known = len(kept)
            kept += new
            place = {node: row for row, node in enumerate(kept)}
            visible_MM = torch.eye(len(kept), dtype=torch.bool)
            for row, node in enumerate(kept):
                if (parent := self.parents[node]) >= 0:
                    visible_MM[row] |= visible_MM[place[parent]]
            predicted = [(row, entry) for row, node in enumerate(new) for entry in self._children[node]]
            rows, entries = (list(each) for each in zip(*predicted, strict=True))
            tokens = [self.tokens[node] for node in kept]
            yield Piece(tokens=tokens, visible_MM=visible_MM, known=known, rows=rows, entries=entries)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosedSet:
    """A question and its possible answers as tokens; of no image in particular."""

    ids: list[int]  # the prompt, up to where the first answers part
    rows: list[int]  # for each region token in it the row of the region features that it stands for
    tree: ChoiceTree  # the answers from there on, their ends included


def closed_set(engine: Engine, messages: Sequence[Turn], n_regions: int, answers: Sequence[str]) -> ClosedSet:
    """Make the answers to a question ready to be scored; what was ready lately is not made again.

    Raises:
        TooLong: the question and its longest answer do not fit the model's context.
        ConfigError: the chat template does not write an answer as it is behind its question.
    """

    def make() -> ClosedSet:
        prompt = engine.encode_text(messages, n_regions)
        ids, rows = prompt["input_ids"].tolist(), prompt["region_ids"].tolist()
        # A tokenizer may join the prompt's last letters with the answer's first: score from where they begin to differ.
        shared, wholes = len(ids), list(_wholes(engine, messages, answers))
        for whole in wholes:
            pairs = enumerate(zip(ids[:shared], whole, strict=False))
            shared = next((k for k, (a, b) in pairs if a != b), min(shared, len(whole)))
        if not shared:
            raise ConfigError("the chat template changes the question when it writes an answer behind it")
        paths = [whole[shared:] for whole in wholes]
        longest = max(map(len, paths))
        if engine.room(shared, longest) < longest:
            raise TooLong(f"question and answer too long: {shared + longest} tokens; shorten them")
        return ClosedSet(ids=ids[:shared], rows=rows, tree=ChoiceTree(paths))

    turns = tuple((turn["role"], turn["content"]) for turn in messages)
    made: ClosedSet = engine.closed_sets.get((turns, n_regions, engine.processor.chat_template, tuple(answers)), make)
    return made


def _wholes(engine: Engine, messages: Sequence[Turn], answers: Sequence[str]) -> Iterator[list[int]]:
    """Tokens of the conversation with each answer, to its end of turn; it is rendered once."""
    processor = engine.processor
    rendered = processor.apply_chat_template([*messages, {"role": "assistant", "content": _MARK}], tokenize=False)
    text, _ = expand_regions(rendered, processor.region_format)
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
    rows = [torch.empty((0, len(tree.paths)))]
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
    cache = PrefixCache()
    for prefix, _ in prompts:
        cache.add(prefix)
    steps_BE = torch.zeros((count, len(tree.tokens) + 1), dtype=torch.float64)  # the last one pads the paths

    def fill(logits_BMV: Tensor, rows: list[int], entries: list[int]) -> None:
        """Write the log probabilities of entries that are predicted at ``rows`` of the logits."""
        normal_BM = torch.stack([logits.float().logsumexp(-1) for logits in logits_BMV])
        tokens = [tree.tokens[entry] for entry in entries]
        steps_BE[:, entries] = (logits_BMV[:, rows, tokens].float() - normal_BM[:, rows]).double().cpu()

    first = decoder.forward(cache, torch.cat(own), [len(embeds) for embeds in own])
    fill(first[:, None], [0] * len(tree.first), tree.first)
    embed = engine.model.get_input_embeddings()
    for piece in tree.pieces(size):
        nodes = len(piece.tokens)
        logits = decoder.forward(
            cache,
            embed(torch.tensor(piece.tokens, device=engine.device)).repeat(count, 1),
            [nodes] * count,
            tree=piece.visible_MM,
            keep=False,
            logits=(torch.arange(count)[:, None] * nodes + torch.arange(piece.known, nodes)).flatten(),
        )
        fill(logits.view(count, nodes - piece.known, -1), piece.rows, piece.entries)
    longest = max(map(len, tree.paths))
    paths_AL = torch.tensor([path + [len(tree.tokens)] * (longest - len(path)) for path in tree.paths])
    return torch.stack([steps_E[paths_AL].sum(-1) for steps_E in steps_BE]).float()


def answer_scores(
    engine: Engine, scene: Scene, messages: Sequence[Turn], pooled: Sequence[Tensor], answers: Sequence[str]
) -> Tensor:
    """Log likelihoods (B, A) of the answers to one question for each of B sets of region features (R * K, D).

    Their softmax are the probabilities, given that the answer is one of these.

    Raises:
        TooLong: the question and its longest answer do not fit the model's context.
    """
    if not pooled:
        return torch.empty((0, len(answers)))
    closed = closed_set(engine, messages, len(pooled[0]) // engine.processor.tokens_per_region, answers)
    return log_likelihoods(engine, scene, closed, pooled)


# ---------------------------------------------------------------------------------------------------------------------
# The class of a region


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The class of one region, chosen from a closed set.

    Attributes:
        label: the most probable choice.
        probability: of that choice, given that the answer is one of the choices.
        probabilities: of every choice, in the order given, summing to 1; or with ``top_k`` of the most probable alone,
            best first.
        text: the answer as generated freely; None unless it was asked for.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    text: str | None = None

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable choices with their probabilities, best first."""
        return sorted(self.probabilities.items(), key=lambda choice: -choice[1])[: max(0, k)]


def classify_regions(
    engine: Engine, scene: Scene, regions: Sequence[Region], names: Sequence[str], options: ClassifyOptions
) -> list[Classified]:
    """What :meth:`RegionPredictor.classify` does, with checked names."""
    text = question("classify", regions=[1], label_set=options.label_set)
    scores_BA = answer_scores(
        engine, scene, question_turns((), text), engine.pool_each(scene, regions, options.detail), names
    )
    short = Options(max_new_tokens=LEAST_ROOM, detail=options.detail)
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

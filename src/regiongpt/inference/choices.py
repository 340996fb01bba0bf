"""Answers from a closed set: the likelihood of every choice after one prompt.

The prompt goes through the language model once, and behind it the answers as trees of their common beginnings.

Shapes: B questions, R regions, K tokens of a region, E entries of a tree, A answers, M nodes of a tree, D model width,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
"""Nodes of a tree, unless a single answer has more: a pass compares all pairs of them for every question."""
LOGITS = 2**26
"""Logits of one forward pass: 256 MiB in float32."""
_MARK = "Xanthochroid"
"""Stands for an answer in a rendered conversation; never in a question."""
_TOGETHER = 1024
"""Conversations that are tokenized at a time."""

# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods


class ChoiceTree:
    """Some of the answers as token paths, merged where they begin alike.

    An entry is one token behind one beginning. The nodes are the entries that something follows: what a model has to
    read. An entry's parent is the node before it, -1 for what the prompt's last token predicts.
    """

    def __init__(self, answers: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        found: dict[tuple[int, int], int] = {}  # the entry of a token behind a parent
        self.answers = answers  # which of the set
        self.paths: list[list[int]] = []  # the entries of each answer
        for answer in answers:
            entries = [-1]
            for token in paths[answer]:
                entries.append(found.setdefault((entries[-1], token), len(found)))
            self.paths.append(entries[1:])
        self.parents, self.tokens = ([pair[k] for pair in found] for k in (0, 1))
        self.nodes = sorted({*self.parents} - {-1})
        self.place = {node: row for row, node in enumerate(self.nodes)}

    def visible(self) -> Tensor:
        """Which nodes (M, M) each node attends to: its ancestors and itself."""
        visible_MM = torch.eye(len(self.nodes), dtype=torch.bool)
        for row, node in enumerate(self.nodes):
            if (parent := self.parents[node]) >= 0:
                visible_MM[row] |= visible_MM[self.place[parent]]
        return visible_MM


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts both begin with."""
    return next((k for k, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _trees(paths: Sequence[Sequence[int]], size: int) -> list[ChoiceTree]:
    """The answers in trees of at most ``size`` nodes."""
    groups: list[list[int]] = [[]]
    nodes = 0
    for answer in sorted(range(len(paths)), key=lambda answer: list(paths[answer])):
        group, path = groups[-1], list(paths[answer])
        nodes += len(path) - (_common(paths[group[-1]], path) if group else 0)
        if group and nodes > size:
            groups.append([])
            nodes = len(path)
        groups[-1].append(answer)
    return [ChoiceTree(group, paths) for group in groups]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosedSet:
    """A question and its possible answers as tokens, for any image."""

    ids: list[int]  # the prompt, up to where the first answers part
    rows: list[int]  # for each region token in it the row of the region features that it stands for
    paths: list[list[int]]  # the answers from there on, their ends included
    trees: list[ChoiceTree]


def closed_set(engine: Engine, messages: Sequence[Turn], n_regions: int, answers: Sequence[str]) -> ClosedSet:
    """Prepare the answers to a question for scoring; recent ones are cached.

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
            shared = _common(ids[:shared], whole)
        if not shared:
            raise ConfigError("the chat template changes the question when an answer follows")
        paths = [whole[shared:] for whole in wholes]
        longest = max(map(len, paths))
        if engine.room(shared, longest) < longest:
            raise TooLong(f"question and answer too long: {shared + longest} tokens; shorten them")
        return ClosedSet(ids=ids[:shared], rows=rows, paths=paths, trees=_trees(paths, size))

    size = min(NODES, _budget(engine))
    turns = tuple((turn["role"], turn["content"]) for turn in messages)
    key = (turns, n_regions, engine.processor.chat_template, tuple(answers), size)
    made: ClosedSet = engine.closed_sets.get(key, make)
    return made


def _budget(engine: Engine) -> int:
    """Nodes of all questions of one forward pass."""
    return max(1, min(TOKENS, LOGITS // int(engine.model.config.get_text_config().vocab_size)))


def _wholes(engine: Engine, messages: Sequence[Turn], answers: Sequence[str]) -> Iterator[list[int]]:
    """Tokens of the conversation with each answer, to its end of turn; it is rendered once."""
    processor = engine.processor
    rendered = processor.apply_chat_template([*messages, {"role": "assistant", "content": _MARK}], tokenize=False)
    text, _ = expand_regions(rendered, processor.region_format)
    head, *tails = text.split(_MARK)
    if len(tails) != 1:
        raise ConfigError("closed-set scoring needs a chat template that writes an answer once and unchanged")
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


@torch.inference_mode()
def log_likelihoods(engine: Engine, scene: Scene, closed: ClosedSet, pooled: Sequence[Tensor]) -> Tensor:
    """Log likelihood (B, A) of every answer, its end included, for each of B sets of region features (R * K, D)."""
    scores_BA = torch.empty((len(pooled), len(closed.paths)))
    batch = max(1, _budget(engine) // max(1, *(len(tree.nodes) for tree in closed.trees)))
    for start in range(0, len(pooled), batch):
        some = pooled[start : start + batch]
        shared = shared_tokens(closed.ids, engine.model.config.region_token_id) if len(some) > 1 else 0
        prompts = [engine.begin(scene, closed.ids, closed.rows, features, shared) for features in some]
        cache, own = PrefixCache(), [embeds_ND for _, embeds_ND in prompts]
        for prefix, _ in prompts:
            cache.add(prefix)
        first_BV = engine.decoder.forward(cache, torch.cat(own), [len(embeds) for embeds in own])
        for tree in closed.trees:
            scores_BA[start : start + batch, tree.answers] = _score(engine, cache, first_BV, tree)
    if scores_BA.isnan().any():
        raise ConfigError(f"the model computes NaN in {engine.model.dtype}; load it in float32")
    return scores_BA


def _score(engine: Engine, cache: PrefixCache, first_BV: Tensor, tree: ChoiceTree) -> Tensor:
    """Log likelihoods (B, a) of a tree's answers, behind prompts whose last logits are ``first_BV``."""
    count, nodes = len(first_BV), len(tree.nodes)
    steps_BE = torch.zeros((count, len(tree.tokens) + 1), dtype=torch.float64)  # the last one pads the paths

    def fill(logits_BMV: Tensor, rows: dict[int, int]) -> None:
        """Write the log probabilities of the entries behind these parents, each with its row of the logits."""
        normal_BM = torch.stack([logits.float().logsumexp(-1) for logits in logits_BMV])
        entries = [entry for entry, parent in enumerate(tree.parents) if parent in rows]
        at, tokens = [rows[tree.parents[entry]] for entry in entries], [tree.tokens[entry] for entry in entries]
        steps_BE[:, entries] = (logits_BMV[:, at, tokens].float() - normal_BM[:, at]).double().cpu()

    fill(first_BV[:, None], {-1: 0})
    if nodes:
        ids = torch.tensor([tree.tokens[node] for node in tree.nodes], device=engine.device)
        embeds_ND = engine.model.get_input_embeddings()(ids).repeat(count, 1)
        everywhere, visible_MM = range(count * nodes), tree.visible()
        logits = engine.decoder.forward(
            cache, embeds_ND, [nodes] * count, tree=visible_MM, keep=False, logits=everywhere
        )
        fill(logits.view(count, nodes, -1), tree.place)
    longest = max(map(len, tree.paths))
    paths_AL = torch.tensor([path + [len(tree.tokens)] * (longest - len(path)) for path in tree.paths])
    return torch.stack([steps_E[paths_AL].sum(-1) for steps_E in steps_BE]).float()


def answer_scores(
    engine: Engine, scene: Scene, messages: Sequence[Turn], pooled: Sequence[Tensor], answers: Sequence[str]
) -> Tensor:
    """Log likelihoods (B, A) of the answers to one question for each of B sets of region features (R * K, D).

    Their softmax are the probabilities, given that the answer is one of these. Raises as :func:`closed_set` does.
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
        probability: probability of that choice, given that the answer is one of the choices.
        probabilities: one per choice, in the order given, summing to 1; with ``top_k`` only the most probable,
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
    """Implements :meth:`RegionPredictor.classify` for checked names."""
    text = question("classify", regions=[1], label_set=options.label_set)
    scores_BA = answer_scores(
        engine, scene, question_turns((), text), engine.pool_each(scene, regions, options.detail), names
    )
    short = Options(max_new_tokens=LEAST_ROOM, detail=options.detail)
    free = engine.answer_each(scene, text, regions, short) if options.generate else []
    results = []
    # A row at a time: of thousands of names and hundreds of regions, only what is asked for is kept.
    for index, scores_A in enumerate(scores_BA):
        found = classified(scores_A, names, options.top_k)
        results.append(replace(found, text=free[index].text) if free else found)
    return results


def classified(scores_A: Tensor, names: Sequence[str], top_k: int | None) -> Classified:
    """The result for one region, from the log likelihoods of all names."""
    shares_A = scores_A.softmax(-1)
    if top_k is None:
        kept = dict(zip(names, shares_A.tolist(), strict=True))
    else:
        best = shares_A.topk(min(top_k, len(names)))
        kept = {names[k]: share for k, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
    label = max(kept, key=kept.__getitem__)
    return Classified(label=label, probability=kept[label], probabilities=kept)


# ---------------------------------------------------------------------------------------------------------------------
# The region that an expression refers to


@dataclass(frozen=True, kw_only=True)
class Located:
    """Which of several regions fits an expression.

    Attributes:
        index: 0-based position in the list of regions given; None where none of them fits.
        number: the same, 1-based, as the model says it.
        text: the answer in the paper's words, ``Region [N]`` or the no-match sentence.
        probability: probability of that answer, given that the answer is one of the regions or none.
        probabilities: one per region, in the order given, and last that of no match; they sum to 1.
    """

    index: int | None
    number: int | None
    text: str
    probability: float
    probabilities: tuple[float, ...]


def locate_expressions(
    engine: Engine, scene: Scene, pooled: Sequence[Tensor], expressions: Sequence[str], by: By
) -> list[Located]:
    """Implements :meth:`RegionPredictor.locate` for checked arguments and the features (K, D) of each region."""
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
    """Log likelihood (E, R) of each expression as each region's name."""
    turns = question_turns((), question("refer", regions=[1]))
    different = list(dict.fromkeys(expressions))
    scores_RE = answer_scores(engine, scene, turns, pooled, different)
    return scores_RE.T[[different.index(each) for each in expressions]]

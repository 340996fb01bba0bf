"""Scores of texts: of answers from a closed set by the model, of captions by CLIP or SigLIP.

B questions, R regions, K tokens of a region, A answers, E expressions, L tokens of answers, D width, V vocabulary.
"""

import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.inference.engine import Engine, Scene, TooLong, Turn, pick_device, question_turns
from regiongpt.inference.options import By
from regiongpt.inference.shared_prefix import Prefix, PrefixCache
from regiongpt.model.processing import expand_regions
from regiongpt.prompts import NO_MATCH, definite, question, region_answer
from regiongpt.storage import read_json, reason, weights_digest

TOKENS = 4096
"""Tokens of a forward pass, unless a single question has more."""
LOGITS = 2**26
"""Logits of one forward pass: 256 MiB in float32."""
_MARK = "Xanthochroid"
"""Stands for an answer in a rendered conversation; never in a question."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosedSet:
    """A question and its possible answers as tokens, for any image."""

    ids: list[int]  # the prompt, up to where the first answers differ from it
    rows: list[int]  # for each region token in it the row of the region features that it stands for
    paths: list[list[int]]  # the answers from there on, their ends included


def closed_set(engine: Engine, messages: Sequence[Turn], n_regions: int, answers: Sequence[str]) -> ClosedSet:
    """Prepare the answers to a question for scoring, or find them cached; TooLong for the model's context."""

    def make() -> ClosedSet:
        prompt = engine.encode_text(messages, n_regions)
        ids, wholes = prompt["input_ids"].tolist(), _wholes(engine, messages, answers)
        # A tokenizer may join the prompt's last letters with the answer's first: score from where they begin to differ.
        shared = len(ids)
        for whole in wholes:
            pairs = zip(ids[:shared], whole, strict=False)
            shared = next((k for k, (one, other) in enumerate(pairs) if one != other), min(shared, len(whole)))
        if not shared:
            raise ConfigError("the chat template changes the question when an answer follows")
        paths = [whole[shared:] for whole in wholes]
        longest = max(map(len, paths))
        if engine.room(shared, longest) < longest:
            raise TooLong(f"question and answer too long: {shared + longest} tokens; shorten them")
        return ClosedSet(ids=ids[:shared], rows=prompt["region_ids"].tolist(), paths=paths)

    turns = tuple((turn["role"], turn["content"]) for turn in messages)
    key = (turns, n_regions, engine.processor.chat_template, tuple(answers))
    made: ClosedSet = engine.closed_sets.get(key, make)
    return made


def _wholes(engine: Engine, messages: Sequence[Turn], answers: Sequence[str]) -> list[list[int]]:
    """Tokens of the conversation with each answer, to its end of turn; it is rendered once."""
    processor = engine.processor
    rendered = processor.apply_chat_template([*messages, {"role": "assistant", "content": _MARK}], tokenize=False)
    text, _ = expand_regions(rendered, processor.region_format)
    head, *tails = text.split(_MARK)
    if len(tails) != 1:
        raise ConfigError("closed-set scoring needs a chat template that writes an answer once and unchanged")
    begun, head = processor.split_begin(head)
    counts = {processor.image_token_id: processor.num_image_tokens}
    written = [processor.write_citations(answer, messages[-1]["content"]) for answer in answers]
    texts = [head + processor.plain_words(answer) + tails[0] for answer in written]
    stops, wholes = set(processor.stop_token_ids), []
    for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]:
        last = max(place for place, token in enumerate(ids) if token in stops)
        wholes.append([*begun, *(token for token in ids[: last + 1] for _ in range(counts.get(token, 1)))])
    return wholes


@torch.inference_mode()
def log_likelihoods(engine: Engine, scene: Scene, closed: ClosedSet, pooled: Sequence[Tensor]) -> Tensor:
    """Log likelihood (B, A) of every answer, its end included, for each of B sets of region features (R, D)."""
    scores_BA = torch.empty((len(pooled), len(closed.paths)), dtype=torch.float64)
    budget = max(1, min(TOKENS, LOGITS // int(engine.model.config.get_text_config().vocab_size)))
    lengths = [len(path) - 1 for path in closed.paths]  # tokens to run: the first is predicted by the prompt
    ordered = sorted((answer for answer, length in enumerate(lengths) if length), key=lambda answer: lengths[answer])
    own_tokens = len(closed.ids) - engine.processor.num_image_tokens
    size = max(1, budget // max(1, own_tokens, sum(lengths)))  # questions at a time
    for start in range(0, len(pooled), size):
        some = pooled[start : start + size]
        prompts = [engine.begin(scene, closed.ids, closed.rows, each, repeated=len(pooled) > 1) for each in some]
        cache, own = PrefixCache(), [embeds_ND for _, embeds_ND in prompts]
        for prefix, _ in prompts:
            cache.add(prefix)
        logits_BV = engine.decoder.forward(cache, torch.cat(own), [len(embeds) for embeds in own]).float()
        first_A = torch.tensor([path[0] for path in closed.paths], device=logits_BV.device)
        scores_BA[start : start + size] = logits_BV.log_softmax(-1)[:, first_A].double().cpu()
        behind = [cache.prefix(row) for row in range(len(prompts))]
        left = [(row, answer) for row in range(len(prompts)) for answer in ordered]
        while left:
            totals = accumulate(lengths[answer] for _, answer in left)
            fits = max(1, next((k for k, total in enumerate(totals) if total > budget), len(left)))
            part, left = left[:fits], left[fits:]
            logs = _behind(engine, [behind[row] for row, _ in part], [closed.paths[answer] for _, answer in part])
            rows, answers = torch.tensor(part).T
            scores_BA[start + rows, answers] += logs
    if scores_BA.isnan().any():
        raise ConfigError(f"the model computes NaN in {engine.model.dtype}; load it in float32")
    return scores_BA.float()


def _behind(engine: Engine, prefixes: Sequence[Prefix], paths: Sequence[Sequence[int]]) -> Tensor:
    """Log likelihood (A,) of each path, but for its first token, behind its prefix."""
    cache, counts = PrefixCache(), [len(path) - 1 for path in paths]
    for prefix in prefixes:
        cache.add(prefix)
    read_L, next_L = (
        torch.tensor([token for path in paths for token in path[some]], device=engine.device)
        for some in (slice(None, -1), slice(1, None))
    )
    embeds_LD = engine.model.get_input_embeddings()(read_L)
    logits_LV = engine.decoder.forward(cache, embeds_LD, counts, range(len(read_L))).float()
    logs_L = (logits_LV.gather(1, next_L[:, None])[:, 0] - logits_LV.logsumexp(-1)).double().cpu()
    return torch.stack([own.sum() for own in torch.split(logs_L, counts)])


def answer_scores(
    engine: Engine, scene: Scene, messages: Sequence[Turn], pooled: Sequence[Tensor], answers: Sequence[str]
) -> Tensor:
    """Log likelihoods (B, A) of answers to one question for each of B sets of region features (R, D)."""
    if not pooled:
        return torch.empty((0, len(answers)))
    closed = closed_set(engine, messages, len(pooled[0]), answers)
    return log_likelihoods(engine, scene, closed, pooled)


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The class of one region, chosen from a closed set; probabilities given that the answer is one of the choices."""

    label: str  # the most probable choice
    probability: float
    probabilities: dict[str, float]  # as the choices are ordered, summing to 1; with top_k the best alone, best first

    def top(self, k: int) -> list[tuple[str, float]]:
        """The ``k`` most probable choices with their probabilities, best first."""
        return sorted(self.probabilities.items(), key=lambda choice: -choice[1])[:k]


def classified(scores_A: Tensor, names: Sequence[str], top_k: int | None) -> Classified:
    """The result for one region, from the log likelihoods of all names."""
    best = scores_A.topk(min(top_k or 1, len(names))).indices.tolist()
    shares = scores_A.softmax(-1).tolist()
    kept = {names[k]: shares[k] for k in (range(len(names)) if top_k is None else best)}
    label = names[best[0]]
    return Classified(label=label, probability=kept[label], probabilities=kept)


@dataclass(frozen=True, kw_only=True)
class Located:
    """Which of several regions fits an expression; probabilities given that the answer is one of them or none."""

    index: int | None  # 0-based position in the list of regions given; None where none of them fits
    number: int | None  # the same, 1-based, as the model says it
    text: str  # the answer in the paper's words, ``Region [N]`` or the no-match sentence
    probability: float  # of that answer
    probabilities: tuple[float, ...]  # one per region, in the order given, and last that of no match; they sum to 1


def locate_expressions(
    engine: Engine, scene: Scene, pooled: Sequence[Tensor], expressions: Sequence[str], by: By
) -> list[Located]:
    """Implements :meth:`RegionPredictor.locate` for checked arguments and the features (1, D) of each region."""
    numbers = range(1, len(pooled) + 1)
    answers = [*map(region_answer, numbers), NO_MATCH]
    asked = [question("locate", regions=numbers, expression=each) for each in expressions if by != "words"]
    # All made ready before the first is scored: what is too long is known at once.
    ready = [closed_set(engine, question_turns((), text), len(pooled), answers) for text in asked]
    if by != "answer" and expressions:
        # A name of one region is definite, so "cup" and "a cup" are also held against it as "the cup".
        names = [(each, definite(each)) for each in expressions]
        different = list(dict.fromkeys(name for both in names for name in both))
        turns = question_turns((), question("refer", regions=[1]))
        scores_ER = answer_scores(engine, scene, turns, pooled, different).T
    results = []
    for row in range(len(expressions)):
        logs = torch.zeros(len(answers))
        if by != "words":
            logs = log_likelihoods(engine, scene, ready[row], [torch.cat(list(pooled))])[0].log_softmax(-1)
        if by != "answer":
            called_R = scores_ER[[different.index(name) for name in names[row]]].logsumexp(0).log_softmax(-1)
            # The words alone always choose; for no match they count as equally likely for every region.
            no_match = -math.log(len(pooled)) if by == "both" else -math.inf
            logs = logs + torch.cat([called_R, torch.tensor([no_match])])
        shares = logs.softmax(-1)
        # Two regions that fit equally share their probability; that does not make it likelier that none fits.
        best = int(shares.argmax()) if by == "answer" or shares[-1] > 0.5 else int(shares[:-1].argmax())
        found = best if best < len(pooled) else None
        number, each = None if found is None else found + 1, tuple(shares.tolist())
        results.append(
            Located(index=found, number=number, text=answers[best], probability=each[best], probabilities=each)
        )
    return results


class Similarity:
    """Scores captions of crops by CLIP or SigLIP; ``identity`` stands for the model.

    A caption longer than the text tower's window is scored sentence by sentence, a sentence that is longer still in
    halves. The score is the cosine of crop and part, averaged over the parts with their numbers of tokens as weights;
    ``least`` is that of the worst part. CheckpointError where the folder holds no CLIP or SigLIP model.
    """

    def __init__(self, path: Path, device: str | None = None) -> None:
        kind = read_json(path / "config.json", CheckpointError).get("model_type")
        if kind not in ("clip", "siglip"):
            raise CheckpointError(f"{path}: expected a CLIP or SigLIP model, got {kind!r}")
        self._device = pick_device(device)
        try:
            self._model = AutoModel.from_pretrained(path).to(self._device).eval()
            self._processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be loaded: {reason(error)}") from None
        self._pads, self._lock = kind == "siglip", threading.Lock()  # one batch at a time
        self.window = int(self._model.config.text_config.max_position_embeddings)
        self.identity = f"{path.resolve().name} {weights_digest(path)}"

    def score(self, crops: Sequence[Image.Image], captions: Sequence[str]) -> list[dict[str, float]]:
        """Cosines of crops and their captions; NaN-free, ``{"similarity": ..., "least": ...}`` each."""
        parts = [self.parts(caption) for caption in captions]
        flat = [part for own in parts for part in own]
        # SigLIP was trained on text padded to its window and attends to the padding; CLIP is the other way round.
        padded = {"padding": "max_length", "max_length": self.window} if self._pads else {"padding": True}
        tokens = {**self._processor.tokenizer(flat, return_tensors="pt", **padded).to(self._device)}
        if self._pads:
            tokens = {"input_ids": tokens["input_ids"]}
        pixels = self._processor.image_processor(images=list(crops), return_tensors="pt").to(self._device)
        with self._lock, torch.inference_mode():
            seen, read = _unit(self._model.get_image_features(**pixels)), _unit(self._model.get_text_features(**tokens))
        found = []
        for own, features, crop in zip(parts, read.split([len(own) for own in parts]), seen, strict=True):
            cosines = (features @ crop).double().cpu().numpy()
            mean = np.average(cosines, weights=[self._length(part) for part in own])
            found.append({"similarity": float(mean), "least": float(cosines.min())})
        return found

    def parts(self, caption: str) -> list[str]:
        """A caption as it is if it fits the window, else its sentences, each halved between words until it fits."""
        if self._length(caption) <= self.window:
            return [caption]
        pieces = re.findall(r"\S.*?(?:[.!?]+(?=\s)|$)", caption, re.DOTALL)
        if len(pieces) == 1:
            words_of = caption.split(" ")
            joint, pieces = (" ", words_of) if len(words_of) > 1 else ("", list(caption))
            middle = len(pieces) // 2
            pieces = [joint.join(pieces[:middle]), joint.join(pieces[middle:])]
        return [part for piece in pieces for part in self.parts(piece)]

    def _length(self, text: str) -> int:
        return len(self._processor.tokenizer(text)["input_ids"])


def _unit(output: Any) -> Any:
    """Normalized features, of transformers that returns them by themselves or in an output."""
    features = getattr(output, "pooler_output", output)
    return features / features.norm(dim=-1, keepdim=True)

"""CIDEr, METEOR, BLEU, ROUGE-L and SPICE of captions, on the words that the reference tokenizer finds."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.bootstrap import Floats, Statistic, mean_statistic, ratio, sum_statistic
from regiongpt.evaluate.metrics.java import COUNTS, find_package, meteor_counts, scored_words, spice_scores

METRICS: Final = ("CIDEr", "METEOR", "ROUGE_L", "BLEU", "SPICE")
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75
_STAGES = np.array([1.0, 0.6, 0.8, 0.6])  # exact words, stems, synonyms, paraphrases


@dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """One metric over a set of captions: its value, the (n,) captions' own scores, and the statistic."""

    value: float
    items: Floats
    statistic: Statistic


def caption_scores(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Sequence[str] = ("CIDEr", "METEOR", "ROUGE_L", "BLEU"),
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, CaptionScore]:
    """Score captions against references by the metrics of the COCO caption evaluation.

    Args:
        captions: n texts; ``""`` for an item without an answer, which scores 0.
        references: Texts to compare each with, at least one of them with a word; those without are left out.
        metrics: Some of :data:`METRICS`.
        clusters: Image of each caption, for the statistics; by default each its own.

    Returns:
        By metric: ``CIDEr`` (in [0, 10]; it depends on the whole set), ``METEOR``, ``ROUGE_L``, ``BLEU_1`` to
        ``BLEU_4``, ``SPICE`` (in [0, 1]).

    Raises:
        ConfigError: No such metric; pycocoevalcap or Java is missing.
        DataError: Nothing to score, or an item has no reference with words.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"metrics: {name!r} is not among {', '.join(METRICS)}")
    if not captions or len(captions) != len(references):
        raise DataError(f"{len(captions)} captions for {len(references)} items; give one for each")
    said, wanted = tokenized(captions, references)
    images = list(clusters) if clusters is not None else list(range(len(captions)))
    found: dict[str, CaptionScore] = {}
    for name in metrics:
        if name == "METEOR":
            counts = _best_counts(said, wanted)
            statistic = sum_statistic(images, meteor_addends(counts), meteor_scores)
            found[name] = CaptionScore(value=statistic.value(), items=meteor_scores(counts), statistic=statistic)
        elif name == "BLEU":
            found |= _bleu(said, wanted, images)
        else:
            items = spice_scores(said, wanted) if name == "SPICE" else _reference_scores(name, said, wanted)
            statistic = replace(mean_statistic(images, items.tolist()), most=10.0 if name == "CIDEr" else 1.0)
            found[name] = CaptionScore(value=float(np.mean(items)), items=items, statistic=statistic)
    return found


def tokenized(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The scored words of captions and references; DataError where an item has no reference with words."""
    flat = iter(scored_words([text for those in references for text in those]))
    wanted = [[words for _ in those if (words := next(flat))] for those in references]
    for number, those in enumerate(wanted):
        if not those:
            raise DataError(f"references[{number}]: no reference has a word, in {list(references[number])!r}")
    return scored_words(captions), wanted


def meteor_scores(counts: Floats) -> Floats:
    """METEOR of captions, or of whole sets by their summed counts.

    Args:
        counts: (N, 23), for a set the sum of its :func:`meteor_addends`. Words and function words of caption and
            reference; for each stage the content and the function words matched of both; chunks; words matched of both.
    """
    counts = np.asarray(counts, np.float64).reshape(-1, COUNTS)
    lengths, functions, chunks, matched = counts[:, :2], counts[:, 2:4], counts[:, 20], counts[:, 21:]
    stages = counts[:, 4:20].reshape(-1, 4, 4)
    content, function = stages[:, :, :2], stages[:, :, 2:]
    found = np.einsum("s,nsk->nk", _STAGES, _DELTA * content + (1 - _DELTA) * function)
    size = _DELTA * (lengths - functions) + (1 - _DELTA) * functions
    precision, recall = np.nan_to_num(ratio(found, size)).T
    mean = ratio(precision * recall, (1 - _ALPHA) * recall + _ALPHA * precision)
    fragments = ratio(chunks, matched.mean(axis=1))
    penalty = _GAMMA * np.where(_is_whole(counts), 0.0, fragments) ** _BETA
    result: Floats = np.nan_to_num(mean * (1 - penalty))
    return result


def meteor_addends(counts: Floats) -> Floats:
    """What each caption's counts (N, 23) add to those of a set: a caption matched whole adds no chunk."""
    added = np.array(counts, np.float64)
    added[_is_whole(added), 20] = 0.0
    return added


def _is_whole(counts: Floats) -> NDArray[np.bool_]:
    """Whether caption and reference match word by word, in one piece."""
    matched = counts[:, 4:20].reshape(-1, 4, 2, 2).sum(axis=(1, 2))
    whole: NDArray[np.bool_] = (matched == counts[:, :2]).all(axis=1) & (counts[:, 20] == 1)
    return whole


def _best_counts(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> Floats:
    """METEOR's counts of each caption against that of its references which scores best."""
    pairs = [(text, each) for text, those in zip(said, wanted, strict=True) for each in those]
    counts = meteor_counts([text for text, _ in pairs], [each for _, each in pairs])
    scores = meteor_scores(counts)
    ends = np.cumsum([len(those) for those in wanted])
    best = [start + int(np.argmax(scores[start:end])) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return counts[best]


def _reference_scores(name: str, said: Sequence[str], wanted: Sequence[Sequence[str]]) -> Floats:
    module, kind = {"CIDEr": ("cider.cider", "Cider"), "ROUGE_L": ("rouge.rouge", "Rouge")}[name]
    given = {number: list(those) for number, those in enumerate(wanted)}
    scorer = getattr(_pycocoevalcap(module), kind)()
    _, items = scorer.compute_score(given, {number: [text] for number, text in enumerate(said)})
    return np.asarray(items, np.float64)


def _bleu(said: Sequence[str], wanted: Sequence[Sequence[str]], images: Sequence[Hashable]) -> dict[str, CaptionScore]:
    scorer = _pycocoevalcap("bleu.bleu_scorer").BleuScorer(n=4)
    for text, those in zip(said, wanted, strict=True):
        scorer += (text, list(those))
    values, items = scorer.compute_score(option="closest", verbose=0)
    sums = [
        [c["testlen"], min((abs(n - c["testlen"]), n) for n in c["reflen"])[1], *c["guess"], *c["correct"]]
        for c in scorer.ctest
    ]

    # The scorer's own guards against division by 0.
    def combine(n: int, totals: Floats) -> Floats:
        shares = (totals[:, 6 : 6 + n] + 1e-15) / (totals[:, 2 : 2 + n] + 1e-9)
        short = (totals[:, 0] + 1e-15) / (totals[:, 1] + 1e-9)
        result: Floats = np.prod(shares, axis=1) ** (1 / n) * np.exp(np.minimum(0.0, 1 - 1 / short))
        return result

    return {
        f"BLEU_{n}": CaptionScore(
            value=float(values[n - 1]),
            items=np.asarray(items[n - 1], np.float64),
            statistic=sum_statistic(images, sums, partial(combine, n)),
        )
        for n in (1, 2, 3, 4)
    }


def _pycocoevalcap(module: str) -> Any:
    find_package()
    return import_module(f"pycocoevalcap.{module}")

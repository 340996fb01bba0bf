"""CIDEr, METEOR, BLEU, ROUGE-L and SPICE of captions, on the words that the reference tokenizer finds."""

import json
import subprocess
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.metrics.bootstrap import Floats, Statistic, mean_statistic, sum_statistic
from regiongpt.evaluate.metrics.meteor import find_java, meteor_addends, meteor_counts, meteor_scores
from regiongpt.evaluate.metrics.ptb import scored_words

METRICS: Final = ("CIDEr", "METEOR", "ROUGE_L", "BLEU", "SPICE")
_EXTRA = "install it with: pip install regiongpt[evaluate]"
_SPICE_SECONDS = 6 * 3600.0


@dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """One metric over a set of captions.

    Attributes:
        value: Of the set. METEOR and BLEU sum counts over the set, so theirs is not the mean of the captions' scores.
        items: (n,) of each caption.
        statistic: For intervals and comparisons.
    """

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
    """Scores captions against references by the metrics of the COCO caption evaluation.

    Args:
        captions: n texts as they were written; ``""`` for an item without an answer, which scores 0.
        references: Of each, the texts to compare with, at least one of them with a word. One without words is left out,
            where the reference scripts count it as an empty caption.
        metrics: Some of :data:`METRICS`; METEOR and SPICE run Java.
        clusters: Image of each caption, for the statistics; default: each its own.

    Returns:
        By metric: ``CIDEr`` (in [0, 10]), ``METEOR``, ``ROUGE_L``, ``BLEU_1`` to ``BLEU_4``, ``SPICE`` (all in [0, 1]).
        CIDEr weighs words by how few of the set's items they occur in, so a part of a set scores otherwise.

    Raises:
        ConfigError: No such metric; a library or Java is missing.
        DataError: Nothing to score, or an item has no reference with words.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
    if not captions or len(captions) != len(references):
        raise DataError(f"expected as many captions as items, and some, got {len(captions)} for {len(references)}")
    said, wanted = tokenized(captions, references)
    images = list(clusters) if clusters is not None else list(range(len(captions)))
    found: dict[str, CaptionScore] = {}
    for name in metrics:
        if name == "METEOR":
            counts = meteor_counts(said, wanted)
            statistic = sum_statistic(images, meteor_addends(counts), meteor_scores)
            value = statistic.value()
            found[name] = CaptionScore(value=value, items=meteor_scores(counts), statistic=statistic)
        elif name == "BLEU":
            found |= _bleu(said, wanted, images)
        else:
            items = {"CIDEr": _cider, "ROUGE_L": _rouge, "SPICE": _spice}[name](said, wanted)
            statistic = replace(mean_statistic(images, items.tolist()), most=10.0 if name == "CIDEr" else 1.0)
            found[name] = CaptionScore(value=float(np.mean(items)), items=items, statistic=statistic)
    return found


def tokenized(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The scored words of captions and references, read in the order in which the reference scripts read them.

    Raises:
        DataError: An item has no reference with words.
    """
    flat = scored_words([text for those in references for text in those])
    wanted: list[list[str]] = []
    at = 0
    for number, those in enumerate(references):
        words = [text for text in flat[at : at + len(those)] if text]
        at += len(those)
        if not words:
            raise DataError(f"references[{number}]: expected a reference with at least one word, got {list(those)!r}")
        wanted.append(words)
    return scored_words(captions), wanted


def _cider(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> Floats:
    return _reference_scores("cider.cider", "Cider", said, wanted)


def _rouge(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> Floats:
    return _reference_scores("rouge.rouge", "Rouge", said, wanted)


def _reference_scores(module: str, kind: str, said: Sequence[str], wanted: Sequence[Sequence[str]]) -> Floats:
    scorer = getattr(_pycocoevalcap(module), kind)()
    given = {number: list(those) for number, those in enumerate(wanted)}
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
    return {
        f"BLEU_{n}": CaptionScore(
            value=float(values[n - 1]),
            items=np.asarray(items[n - 1], np.float64),
            statistic=sum_statistic(images, sums, _Bleu(n)),
        )
        for n in (1, 2, 3, 4)
    }


@dataclass(frozen=True)
class _Bleu:
    """BLEU of sets from their summed counts, with the scorer's own guards against division by 0."""

    n: int

    def __call__(self, totals: Floats) -> Floats:
        length, wanted, guesses, right = totals[:, 0], totals[:, 1], totals[:, 2:6], totals[:, 6:10]
        shares = (right[:, : self.n] + 1e-15) / (guesses[:, : self.n] + 1e-9)
        short = (length + 1e-15) / (wanted + 1e-9)
        result: Floats = np.prod(shares, axis=1) ** (1 / self.n) * np.exp(np.minimum(0.0, 1 - 1 / short))
        return result


def find_spice() -> Path:
    """The folder of SPICE with its parser.

    Raises:
        ConfigError: pycocoevalcap or the parser is missing.
    """
    folder = Path(str(_pycocoevalcap("spice").__file__)).parent
    lacking = [
        name
        for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
        if not (folder / "lib" / name).is_file()
    ]
    if lacking:
        raise ConfigError(
            f"expected {' and '.join(lacking)} in {folder / 'lib'} for SPICE, found none: its parser comes with no "
            "package; take them from https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip (500 MB), "
            "or leave SPICE out of --metrics"
        )
    return folder


def _spice(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> Floats:
    program, folder = find_java(), find_spice()
    given = [{"image_id": k, "test": text, "refs": list(wanted[k])} for k, text in enumerate(said)]
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "asked.json", Path(place) / "answered.json"
        asked.write_text(json.dumps(given), encoding="utf-8")
        command = [program, "-Xmx8G", "-jar", "spice-1.0.jar", str(asked), "-out", str(answered), "-subset", "-silent"]
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, timeout=_SPICE_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"SPICE: expected Java to score the captions, got: {error}") from error
        if run.returncode or not answered.is_file():
            words = " ".join(run.stderr.decode("utf-8", "replace").split())[-300:]
            raise ConfigError(f"SPICE: expected scores, but Java ended with code {run.returncode}: {words}")
        scores: Mapping[int, Any] = {
            entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(answered.read_text(encoding="utf-8"))
        }
    return np.array([float(scores[k]) for k in range(len(said))])


def _pycocoevalcap(module: str) -> Any:
    if find_spec("pycocoevalcap") is None:
        raise ConfigError(f"expected pycocoevalcap, which scores captions; {_EXTRA}")
    from importlib import import_module

    return import_module(f"pycocoevalcap.{module}")

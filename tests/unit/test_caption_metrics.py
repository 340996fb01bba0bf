"""The programs that captions are scored by: what they are given, and every way in which they can let us down."""

import sys
from pathlib import Path

import numpy as np
import pytest
from evaluating import need_java

from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate import caption_metrics
from regiongpt.evaluate.caption_metrics import caption_scores, find_java, meteor_counts, meteor_scores, scored_words

# What METEOR 1.5 printed for "a red bears on the table" against "the red bear on a table", for the empty caption
# against "a red bear", and for 12 words against 7.
PRINTED = np.zeros((3, 23))
PRINTED[0, [*range(10), 20, 21, 22]] = [6, 6, 3, 3, 2, 2, 3, 3, 1, 1, 4, 6, 6]
PRINTED[1, [1, 3]] = [3, 1]
PRINTED[2, [*range(8), 20, 21, 22]] = [12, 7, 4, 2, 4, 4, 1, 1, 2, 5, 5]


def test_no_caption_is_lost_or_runs_into_another() -> None:
    need_java()
    captions = {
        "": "",
        "...": "",
        "The man's (red) hat.": "the man 's -lrb- red -rrb- hat",
        "isn't it 'new', \"he\" said?": "is n't it new he said",
        "a\nb\r\nc": "a b c",
        "a\rb\u2028c\x85d\x0be": "a b c d e",
        "emoji \U0001f600 here, half \ud83d of one": "emoji here half of one",
        "see <a href='x": "see < a href = x",
        "y'> of a dog": "y > of a dog",
        "<b>bold</b> <i class='x'>": "<b> bold </b> <i\u00a0class='x'>",
        "=.[^x= mouth": None,
        "dog " * 20_000: "dog " * 19_999 + "dog",
        "x" * 100_000: "x" * 100_000,
        "\n": "",
    }
    found = scored_words(list(captions))
    assert len(found) == len(captions)
    for (caption, words), got in zip(captions.items(), found, strict=True):
        assert words is None or got == words, caption[:50]
    # One that ends in an abbreviation is read with the next, as lines of a file are.
    assert scored_words(["plan B.", "The next", "plan B.", "next"]) == ["plan b", "the next", "plan b.", "next"]
    assert scored_words([""]) == [""]
    assert scored_words([]) == []
    with pytest.raises(DataError, match=r"references\[1\]: no reference has a word"):
        caption_scores(["a", "b"], [["a dog"], ["...", ""]], metrics=("ROUGE_L",))


def test_meteor_follows_from_the_counts() -> None:
    assert meteor_scores(PRINTED)[1:] == pytest.approx([0, 0.34885174167642846], abs=1e-12)


@pytest.mark.slow
def test_meteor_counts_odd_captions_and_takes_the_best_reference() -> None:
    need_java()
    captions = ["a red bears on the table", "a | b ||| c", "SCORE ||| x", "caf\u00e9", ""]
    counts = meteor_counts(captions, ["the red bear on a table", "a b", "x", "caf\u00e9", "a red bear"])
    assert counts[[0, -1]].tolist() == PRINTED[:2].tolist()
    assert meteor_scores(counts)[3] == 1
    found = caption_scores(["a red bear"] * 2, [["a cat", "a red bear", "a red dog"], ["a cat"]], metrics=("METEOR",))
    assert found["METEOR"].items[0] == 1
    assert found["METEOR"].items[1] < 0.5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.stderr.write('Error: no memory'); sys.exit(3)", "ended with code 3: Error: no memory"),
        ("print('6 6 3')", "answered"),
    ],
    ids=["dies", "says too little"],
)
def test_a_program_that_fails_is_one_line(body: str, message: str, tmp_path: Path, monkeypatch) -> None:
    need_java()
    program = tmp_path / "java"
    program.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(caption_metrics, "find_java", lambda: str(program))
    with pytest.raises(ConfigError, match=f"METEOR {message}"):
        meteor_counts(["a dog"] * 5, ["a dog"] * 5)
    with pytest.raises(ConfigError, match="the tokenizer "):
        scored_words(["a dog"] * 5)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(caption_metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Java, .*; install it with: pip install '\.\[evaluate\]'"):
        find_java()
    with pytest.raises(ConfigError, match="pycocoevalcap; install it with"):
        scored_words(["a"])

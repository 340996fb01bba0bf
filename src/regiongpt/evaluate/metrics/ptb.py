"""Words of captions as the reference scorers count them, without Java.

Captions are scored on the words that the Penn Treebank tokenizer of CoreNLP 3.4.1 finds, in lower case and without
punctuation; who splits words otherwise gets other figures. What is a word stands in
:mod:`regiongpt.evaluate.metrics.ptb_grammar`; here is what becomes of each.
"""

import re
from array import array
from collections.abc import Sequence
from typing import Final

from regiongpt.evaluate.metrics.lexing import Rule
from regiongpt.evaluate.metrics.ptb_grammar import ptb_lexer

PUNCTUATION: Final = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that the scorers drop. Brackets come in lower case and so are not dropped, which the figures rest on too."""

_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_CURRENCIES = {"\u00a2": "cents", "\u00a3": "#", "\u0080": "$", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$"}
_FIXED = {"dash": "--", "dots": "...", "less": "<", "greater": ">"}
_MAPPED = {"bracket": _BRACKETS, "fraction": _FRACTIONS, "currency": _CURRENCIES}
_CURLY = (
    (re.compile("[\u0091\u2018\u201b\u2039]"), "`"),
    (re.compile("[\u0092\u2019\u203a]"), "'"),
    (re.compile("[\u0093\u201c\u00ab]"), "``"),
    (re.compile("[\u0094\u201d\u00bb]"), "''"),
)
_TRAILING = " \t\n\u000b\f\r\u0085"
_ABBREVIATED = re.compile(r"\.\s*\Z")
# Letters between blanks are a word by every rule, but for these few: most of a caption needs no automaton.
_PLAIN = re.compile(r" *([A-Za-z]+)(?= |\Z)")
_SPLIT = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])


def scored_words(captions: Sequence[str]) -> list[str]:
    """The words that scorers see of each caption: joined by blanks, in lower case, without punctuation.

    A few abbreviations are read by what comes next, and the reference reads captions as lines of one file. A caption
    that ends in one therefore looks at the next caption here too: the same list gives the same words.

    Args:
        captions: In the order in which the reference would read them; line breaks count as blanks.
    """
    return [" ".join(word for word in words if word not in PUNCTUATION) for words in tokenize(captions)]


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """All tokens of each caption, in lower case; see :func:`scored_words`."""
    lines = [caption.replace("\n", " ") for caption in captions]
    found: list[list[str]] = []
    after = ""
    for number, line in enumerate(reversed(lines)):
        found.append(_tokens(line, after))
        ended = "\n" if number else ""  # behind the last line the file ends
        after = f"\n{line}{ended if line.strip() else after}"
    return found[::-1]


def _tokens(line: str, after: str) -> list[str]:
    """The tokens of a line, given the text behind it."""
    lexer = ptb_lexer()
    own = _units(line)
    whole = own + _units(after if _ABBREVIATED.search(line) else after[:1])
    found: list[str] = []
    at = 0
    simple = line if len(line) == len(own) else ""
    while at < len(own):
        plain = _PLAIN.match(simple, at)
        if plain and (word := plain[1].lower()) not in _SPLIT:
            found.append(word)
            at = plain.end()
            continue
        rule, end = lexer.match(whole, at)
        if rule is None or end > len(own):  # a token never leaves its line, whatever is quoted or marked up there
            whole = own + _units("\n")
            rule, end = lexer.match(whole, at)
            end = min(end, len(own))
        if rule is None:
            raise AssertionError(f"no rule for {line[at:]!r}")
        token, end = _token(rule, own[at:end].tobytes().decode("utf-16-le", "surrogatepass"), end)
        at = end
        if token:
            found.append(token.lower())
    if found:
        found[-1] = found[-1].rstrip()
    return found


def _units(text: str) -> "array[int]":
    return array("H", text.encode("utf-16-le", "surrogatepass"))


def _token(rule: Rule, text: str, end: int) -> tuple[str, int]:
    """What a match becomes, ``""`` for nothing, and where the next token begins."""
    name = rule.name
    if name == "word":
        text = text.replace("\u00ad", "") or "-"
    elif name == "nothing":
        text = ""
    elif name in _FIXED:
        text = _FIXED[name]
    elif name in _MAPPED:
        text = _MAPPED[name].get(text, text)
    elif name.startswith("split"):  # of "cannot" and "gonna", the second word comes next
        last = int(name[-1])
        text, end = text[:-last], end - last
    elif name == "ampersand":
        text = re.sub("&amp;", "&", text, flags=re.IGNORECASE)
    elif name == "spaced":  # one token, though written with blanks
        text = text.replace(" ", "\u00a0")
    elif name == "joined":
        text = text.replace(" ", "\u00a0").replace("(", "-LRB-").replace(")", "-RRB-")
    elif name == "hyphens":
        text = "--" if len(text) in (3, 4) else text
    elif name.endswith("quote"):
        text = _quotes(text, opening=name.startswith("opening"))
    elif name == "trimmed":
        text = text.rstrip(_TRAILING)
    elif name == "acronym":
        trimmed = text.rstrip(_TRAILING)
        end -= len(text) - len(trimmed) + 1  # the full stop comes once more, as the end of the sentence
        text = trimmed[:-1] if len(trimmed) == 2 else trimmed
    elif name == "sentence":
        end -= 1
    return text, end


def _quotes(text: str, *, opening: bool) -> str:
    single, double = ("`", "``") if opening else ("'", "''")
    text = text.replace("&apos;", single).replace("'", single).replace('"', double).replace("&quot;", double)
    for pattern, plain in _CURLY:
        text = pattern.sub(plain, text)
    return text

"""Puts facts into varied English: noun phrases and referring expressions.

A random generator picks among tables of wordings; each sentence stands alone.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
HEADS = {"skis": "pair of", "scissors": "pair of", "broccoli": "piece of"}
PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"} | {word: word for word in HEADS}
RELATIONS = {
    "to the left of": ("to the left of", "left of", "on the left of"),
    "to the right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
    "inside": ("within the area of",),
    "around": ("around",),
    "overlapping": ("overlapping", "partly overlapping"),
}
EXPRESSIONS = {
    "class": ("the {n}", "the {n}", "the only {n}"),
    "colour": ("the {v} {n}", "the {n} that is {v}", "the {v} {n}"),
    "place": ("the {n} {v}", "the {n} that is {v}", "the {n} {v} of the image"),
    "relation": ("the {n} {v}", "the {n} that is {v}"),
    "left": ("the leftmost {n}", "the {n} furthest to the left", "the {n} on the far left"),
    "right": ("the rightmost {n}", "the {n} furthest to the right", "the {n} on the far right"),
    "top": ("the topmost {n}", "the highest {n}", "the {n} nearest the top"),
    "bottom": ("the lowest {n}", "the bottommost {n}", "the {n} nearest the bottom"),
    "large": ("the largest {n}", "the biggest {n}", "the {n} that looks largest"),
    "small": ("the smallest {n}", "the {n} that looks smallest"),
}


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely."""
    return options[int(rng.random() * len(options))]


def plural(category: str) -> str:
    """``"dogs"``, ``"people"``, ``"pairs of skis"``."""
    word = PLURALS.get(category) or category + ("es" if category.endswith(("s", "x", "ch", "sh")) else "s")
    head = HEADS.get(category)
    return f"{head.replace(' ', 's ')} {word}" if head else word


def noun(category: str, *adjectives: str) -> str:
    """The class with its adjectives and no article: ``"small red car"``, ``"pair of black skis"``."""
    words = " ".join((*filter(None, adjectives), category))
    return f"{HEADS[category]} {words}" if category in HEADS else words


def with_article(phrase: str) -> str:
    """Puts ``a`` or ``an`` before a noun phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def relation_words(rng: np.random.Generator, how: str) -> str:
    """One wording of a relation of :func:`regiongpt.data.facts.relation`; pairs such as 'above and ...' stay as is."""
    return pick(rng, RELATIONS.get(how, (how,)))


def express(rng: np.random.Generator, category: str, kind: str, value: str) -> str:
    """Words one of the facts of :func:`regiongpt.data.facts.distinctions` as a referring expression."""
    if kind == "relation":
        how, anchor = value.split("|")
        value = f"{relation_words(rng, how)} the {noun(anchor)}"
    if kind == "colour" and category in HEADS:
        return f"the {noun(category, value)}"
    return pick(rng, EXPRESSIONS[value if kind == "most" else kind]).format(n=noun(category), v=value)

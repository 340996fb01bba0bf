"""Puts facts into varied English: noun phrases, region descriptions and referring expressions.

The wordings are tables; a random generator picks among them. A sentence says only what :mod:`regiongpt.data.facts`
vouches for, and each stands alone, so that turns may come in any order.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from regiongpt.data.facts import View, ViewObject, neighbours, place_name, relation, size_name

T = TypeVar("T")
HEADS = {"skis": "pair of", "scissors": "pair of", "broccoli": "piece of"}
PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"} | {word: word for word in HEADS}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {
    "to the left of": ("to the left of", "left of", "on the left of"),
    "to the right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
    "inside": ("within the area of",),
    "around": ("around",),
    "overlapping": ("overlapping", "partly overlapping"),
}
SIZE_SENTENCES = {
    "tiny": ("{it} is tiny in the image.", "{it} takes up only a tiny part of the image."),
    "small": ("{it} takes up a small part of the image.", "{it} is small in the image."),
    "medium-sized": ("{it} takes up a fair part of the image.", "{it} is of medium size in the image."),
    "large": ("{it} takes up a large part of the image.", "{it} is large in the image."),
    "huge": ("{it} fills much of the image.", "{it} takes up a huge part of the image."),
}
FRAMES = ("the image", "the image", "the picture", "the photo")
BRIEF = ("{A}.", "{A} {place}.", "{A} {near}.", "{A} {place}, {near}.")
OPENINGS = (
    "{A} {place}.",
    "This is {a} {place}.",
    "The region shows {a} {place}.",
    "There is {a} {place}.",
    "{A} can be seen {place}.",
    "We see {a} {place}, {near}.",
    "{A} {near}.",
    "This is {a}, {near}.",
    "The region contains {a}, which is {near}.",
    "{A} {place}, {near}.",
    "What is shown is {a} {near}.",
    "This region is {a}.",
)
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


def mention(view: View, other: ViewObject, beside: ViewObject) -> str:
    """Names a neighbour of ``beside``: ``"the cup"`` when the view has just one, else ``"a"`` or ``"another"``."""
    if other.iscrowd:
        return f"a group of {plural(other.category)}"
    word = noun(other.category)
    if other.category == beside.category:
        return f"another {word}"
    return f"the {word}" if view.count(other.category) == 1 else with_article(word)


def describe(
    rng: np.random.Generator, view: View, each: ViewObject, colours: Mapping[int, str], brief: bool = False
) -> str:
    """Describes one object: class always, colour where known, and size, place, neighbours and number in varied order.

    Args:
        rng: Picks the wording.
        view: What is seen.
        each: Its object to describe.
        colours: As :func:`regiongpt.data.facts.colours_of` gives.
        brief: One phrase instead of one or two sentences.

    Returns:
        Text that names the class.
    """
    frame = pick(rng, FRAMES)
    size = size_name(each.box, view.width, view.height)
    place = place_name(each.box, view.width, view.height)
    near = neighbours(view, each, 2)
    adjective = size if each.category != "person" and rng.random() < (0.25 if brief else 0.5) else ""
    a = with_article(noun(each.category, adjective, colours.get(each.id, "")))
    slots = {"a": a, "A": a[0].upper() + a[1:]}
    if place is not None:
        slots["place"] = f"{place} of {frame}" if place == "across most" or rng.random() < 0.7 else place
    if near:
        slots["near"] = f"{relation_words(rng, near[0][1])} {mention(view, near[0][0], each)}"
    fitting = [t for t in (BRIEF if brief else OPENINGS) if all(f"{{{s}}}" not in t or s in slots for s in _SLOTS)]
    opening = pick(rng, fitting)
    text = opening.format(**slots)
    if brief or rng.random() < 0.15:
        return text
    it = f"The {noun(each.category)}" if each.category == "person" or rng.random() < 0.4 else "It"
    more = [] if adjective else [pick(rng, SIZE_SENTENCES[size]).format(it=it)]
    if "{place}" not in opening and place is not None:
        more.append(f"{it} is {slots['place']}.")
    if "{near}" not in opening and near:
        more.append(f"{it} is {slots['near']}.")
        other = near[0][0]
        turned = relation(other.box, each.box)
        if turned is not None:
            what = mention(view, other, each)
            more.append(f"{what[0].upper()}{what[1:]} is {relation_words(rng, turned)} it.")
    if len(near) > 1:
        how, what = relation_words(rng, near[1][1]), mention(view, near[1][0], each)
        lead = f"{it} is {slots['near']} and" if "{near}" not in opening else f"{it} is also"
        more.append(f"{lead} {how} {what}.")
    count = view.count(each.category)
    if count == 1:
        more.append(f"{it} is the only {noun(each.category)} in {frame}.")
    elif count is not None and count < len(NUMBERS):
        more.append(f"{it} is one of {NUMBERS[count]} {plural(each.category)} in {frame}.")
    return f"{text} {pick(rng, more)}" if more else text


_SLOTS = ("place", "near")


def express(rng: np.random.Generator, category: str, kind: str, value: str) -> str:
    """Words one of the facts of :func:`regiongpt.data.facts.distinctions` as a referring expression."""
    if kind == "relation":
        how, anchor = value.split("|")
        value = f"{relation_words(rng, how)} the {noun(anchor)}"
    if kind == "colour" and category in HEADS:
        return f"the {noun(category, value)}"
    return pick(rng, EXPRESSIONS[value if kind == "most" else kind]).format(n=noun(category), v=value)

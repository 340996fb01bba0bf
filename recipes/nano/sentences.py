"""Answers in varied English: descriptions, relations, yes and no. Each sentence stands alone."""

from collections.abc import Mapping

import numpy as np

from regiongpt.data.facts import View, ViewObject, neighbours, place_name, relation, size_name
from regiongpt.data.wording import noun, pick, plural, relation_words, with_article

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
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
APART = (
    "The {a} is {how} the {b}.",
    "The {a} is {how} the {b}.",
    "Region [{i}], {an_a}, is {how} Region [{j}], {an_b}.",
    "The {a} in Region [{i}] is {how} the {b} in Region [{j}].",
    "Region [{i}] is {how} Region [{j}].",
    "In the image, the {a} is {how} the {b}.",
)
ALIKE = (
    "The {a} in Region [{i}] is {how} the {b} in Region [{j}].",
    "Region [{i}] is {how} Region [{j}].",
    "Region [{i}], {an_a}, is {how} Region [{j}], another {b}.",
    "Both are {bs}; Region [{i}] is {how} Region [{j}].",
)
YES = ("Yes.", "Yes.", "Yes, there {is_are} {some} in {frame}.", "Yes, {frame} shows {some}.")
NO = ("No.", "No.", "No, there is no {n} in {frame}.", "No, {frame} does not show any {ns}.")


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


def relate(rng: np.random.Generator, a: ViewObject, b: ViewObject, how: str) -> str:
    """How object ``a`` lies to object ``b``; ``{i}`` and ``{j}`` stand for the numbers of their regions."""
    return pick(rng, ALIKE if a.category == b.category else APART).format(
        a=noun(a.category),
        b=noun(b.category),
        an_a=with_article(noun(a.category)),
        an_b=with_article(noun(b.category)),
        bs=plural(b.category),
        how=relation_words(rng, how),
        i="{i}",
        j="{j}",
    )


def say_presence(rng: np.random.Generator, view: View, category: str) -> str:
    """Whether a class is in the view, 'Yes' or 'No' first; at times with the number."""
    frame = pick(rng, FRAMES)
    if category not in view.by_category:
        return pick(rng, NO).format(n=noun(category), ns=plural(category), frame=frame)
    count = view.count(category)
    if count == 1:
        some = with_article(noun(category))
    elif count is not None and count < len(NUMBERS):
        some = f"{NUMBERS[count]} {plural(category)}"
    else:
        some = plural(category) if count is None else f"many {plural(category)}"
    return pick(rng, YES).format(is_are="is" if count == 1 else "are", some=some, frame=frame)

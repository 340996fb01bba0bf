"""Answers in varied English: descriptions, relations, yes and no. Each sentence stands alone."""

from collections.abc import Mapping

import numpy as np
from expressions import neighbours, relation_words

from regiongpt.data.facts import (
    ALIKE,
    APART,
    BRIEF,
    FRAMES,
    MORE,
    NO,
    NUMBERS,
    OPENINGS,
    SIZED,
    YES,
    View,
    ViewObject,
    mention,
    noun,
    pick,
    place_name,
    plural,
    relation,
    size_name,
    with_article,
)

_MOST = NUMBERS.index("many")


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
    """
    frame = pick(rng, FRAMES)
    size = size_name(each.box, view.width, view.height)
    place = place_name(each.box, view.width, view.height)
    near = neighbours(view, each, 2)
    adjective = size if each.category != "person" and rng.random() < (0.25 if brief else 0.5) else ""
    a = with_article(noun(each.category, adjective, colours.get(each.id, "")))
    slots = {"a": a, "A": a[0].upper() + a[1:], "frame": frame, "only": noun(each.category)}
    if place is not None:
        slots["place"] = f"{place} of {frame}" if place == "across most" or rng.random() < 0.7 else place
    if near:
        slots["near"] = f"{relation_words(rng, near[0][1])} {mention(view, near[0][0], each)}"
    fitting = [t for t in (BRIEF if brief else OPENINGS) if all(f"{{{s}}}" not in t or s in slots for s in _SLOTS)]
    opening = pick(rng, fitting)
    text = opening.format(**slots)
    if brief or rng.random() < 0.15:
        return text
    slots["it"] = f"The {noun(each.category)}" if each.category == "person" or rng.random() < 0.4 else "It"
    more = [] if adjective else [pick(rng, SIZED[size]).format(**slots)]
    if "{place}" not in opening and place is not None:
        more.append(MORE["place"].format(**slots))
    if "{near}" not in opening and near:
        more.append(MORE["near"].format(**slots))
        other = near[0][0]
        turned = relation(other.box, each.box)
        if turned is not None:
            what = mention(view, other, each)
            how = relation_words(rng, turned)
            more.append(MORE["turned"].format(Other=what[0].upper() + what[1:], how=how, **slots))
    if len(near) > 1:
        near2 = f"{relation_words(rng, near[1][1])} {mention(view, near[1][0], each)}"
        more.append(MORE["also" if "{near}" in opening else "both"].format(near2=near2, **slots))
    count = view.count(each.category)
    if count == 1:
        more.append(MORE["only"].format(**slots))
    elif count is not None and count < _MOST:
        more.append(MORE["one of"].format(number=NUMBERS[count], counted=plural(each.category), **slots))
    return f"{text} {pick(rng, more)}" if more else text


_SLOTS = ("place", "near")


def relate(rng: np.random.Generator, a: ViewObject, b: ViewObject, how: str) -> str:
    """How object ``a`` lies to object ``b``; ``{i}`` and ``{j}`` stand for the numbers of their regions."""
    return pick(rng, ALIKE if a.category == b.category else APART).format(
        first=noun(a.category),
        second=noun(b.category),
        a_first=with_article(noun(a.category)),
        a_second=with_article(noun(b.category)),
        boths=plural(b.category),
        how=relation_words(rng, how),
        i="{i}",
        j="{j}",
    )


def say_presence(rng: np.random.Generator, view: View, category: str) -> str:
    """Whether a class is in the view, 'Yes' or 'No' first; at times with the number."""
    frame = pick(rng, FRAMES)
    if category not in view.by_category:
        return pick(rng, NO).format(none=noun(category), nones=plural(category), frame=frame)
    count = view.count(category)
    some = plural(category)
    if count == 1:
        some = with_article(noun(category))
    elif count is not None:
        some = f"{NUMBERS[min(count, _MOST)]} {plural(category)}"
    return pick(rng, YES).format(is_are="is" if count == 1 else "are", some=some, frame=frame)

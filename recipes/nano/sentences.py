"""Answers in plain English, which say of a region only what the region itself shows. Each sentence stands alone."""

import numpy as np

from regiongpt.data.coco import Box
from regiongpt.data.facts import (
    ALIKE,
    APART,
    BRIEF,
    FRAMES,
    NO,
    OPENINGS,
    OVERLAP,
    PLACED,
    SIZED,
    YES,
    View,
    ViewObject,
    noun,
    pick,
    place_name,
    plural,
    size_name,
    with_article,
)

# Fewer phrases that claim the same are learned sooner.
_SAME = {
    "on the left side": "on the left", "on the right side": "on the right", "in the upper part": "at the top",
    "in the lower part": "at the bottom", "across the top": "at the top", "across the bottom": "at the bottom",
    "across the middle": "in the centre", "in the middle": "in the centre",
}  # fmt: skip


def plain_place(box: Box, width: float, height: float) -> str | None:
    """Where a box is, in one of few phrases."""
    place = place_name(box, width, height)
    return _SAME.get(place, place) if place else None


def place_words(rng: np.random.Generator, view: View, each: ViewObject) -> str | None:
    """Where an object is, at times with "of the image" behind it; None where that is not clear."""
    place = plain_place(each.box, view.width, view.height)
    return f"{place} of {pick(rng, FRAMES)}" if place and (place == "across most" or rng.random() < 0.7) else place


def describe(
    rng: np.random.Generator,
    view: View,
    each: ViewObject,
    brief: bool = False,
    word: str = "",
) -> str:
    """Describes one object: class or a wider word, size and place in one of two sentences.

    Args:
        rng: Picks the wording.
        view: What is seen.
        each: Its object to describe.
        brief: One phrase instead of one or two sentences.
        word: What to call it instead of its class.
    """
    size = size_name(each.box, view.width, view.height)
    place = place_words(rng, view, each)
    adjective = size if each.category != "person" and rng.random() < (0.25 if brief else 0.5) else ""
    a = with_article(noun(word or each.category, adjective))
    opening = pick(rng, [t for t in (BRIEF if brief else OPENINGS) if place or "{place}" not in t])
    text = opening.format(a=a, A=a[0].upper() + a[1:], place=place)
    if brief:
        return text
    if place and "{place}" not in opening:
        return f"{text} {PLACED.format(place=place)}"
    return text if adjective else f"{text} {SIZED[size]}"


def relate(rng: np.random.Generator, a: ViewObject, b: ViewObject, how: str) -> str:
    """How object ``a`` lies to object ``b``; ``{i}`` and ``{j}`` stand for the numbers of their regions."""
    if how in ("overlapping", "inside", "around"):
        wordings = [each for each in OVERLAP if a.category != b.category or "{i}" in each]
    else:
        wordings = list(ALIKE if a.category == b.category else APART)
    return pick(rng, wordings).format(
        first=noun(a.category),
        second=noun(b.category),
        boths=plural(b.category),
        how=how,
        overlap="overlap",
        i="{i}",
        j="{j}",
    )


def say_presence(rng: np.random.Generator, view: View, category: str) -> str:
    """Whether a class is in the view, 'Yes' or 'No' first; never how many."""
    frame = pick(rng, FRAMES)
    if category not in view.by_category:
        return pick(rng, NO).format(none=noun(category), nones=plural(category), frame=frame)
    return pick(rng, YES).format(some=with_article(noun(category)), frame=frame)

"""Expressions that refer to one object of an annotated image.

A superlative needs 6 % of the image side, or 1.6 times the area, over every rival.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from regiongpt.data.facts import (
    CELLS,
    HEADS,
    LIMITS,
    RELATIONS,
    VAGUE,
    View,
    ViewObject,
    clashing,
    noun,
    pick,
    place_name,
    relation,
    with_article,
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


def neighbours(view: View, each: ViewObject, limit: int = 3) -> list[tuple[ViewObject, str]]:
    """The nearest objects of different classes to which an object clearly relates, with its relation to each."""
    x0, y0, x1, y1 = each.box
    ranked = []
    for other in view.objects:
        if other.id != each.id and other.area >= 0.001 * view.width * view.height:
            a0, b0, a1, b1 = other.box
            gap = max(a0 - x1, x0 - a1, 0.0) + max(b0 - y1, y0 - b1, 0.0)
            ranked.append((gap / (other.area**0.5), other.id, other))
    found: list[tuple[ViewObject, str]] = []
    classes: set[str] = set()
    for _, _, other in sorted(ranked)[:12]:
        how = relation(each.box, other.box) if other.category not in classes else None
        if how is not None:
            found.append((other, how))
            classes.add(other.category)
            if len(found) == limit:
                break
    return found


def distinctions(view: View, each: ViewObject, colours: Mapping[int, str]) -> list[tuple[str, str]]:
    """All facts that single out an object among everything in the image.

    Returns:
        (kind, value) pairs that :func:`express` takes; none when a crowd or a cut piece of the class leaves it open.
    """
    count = view.count(each.category)
    if count is None or each.iscrowd:
        return []
    rivals = [other for other in view.by_category[each.category] if other.id != each.id]
    if not rivals:
        return [("class", "")]
    if len(rivals) > 7:  # beyond this the annotators may have left some out
        return []
    facts: list[tuple[str, str]] = []
    colour = colours.get(each.id)
    if colour is not None and not any(clashing(colour, colours.get(other.id)) for other in rivals):
        facts.append(("colour", colour))
    place = place_name(each.box, view.width, view.height)
    cell = next((cell for cell, name in CELLS.items() if name == place), None)
    if place and cell and all(_elsewhere(cell, other, view) for other in rivals):
        facts.append(("place", place))
    facts.extend(("most", which) for which in _superlatives(view, each, rivals))
    for anchor, how in neighbours(view, each):
        if anchor.category == each.category or anchor.iscrowd or view.count(anchor.category) != 1 or how in VAGUE:
            continue
        words = set(how.split(" and "))
        others = [relation(other.box, anchor.box) for other in rivals]
        if all(other is not None and not words & set(other.split(" and ")) for other in others):
            facts.append(("relation", f"{how}|{anchor.category}"))
    return facts


def _elsewhere(cell: tuple[int, int], other: ViewObject, view: View) -> bool:
    """Whether a rival is clearly out of a cell: its centre at least 8 % of a side beyond the cell's limits."""
    centre = ((other.box[1] + other.box[3]) / 2 / view.height, (other.box[0] + other.box[2]) / 2 / view.width)
    return any(
        share < LIMITS[k][0] - 0.08 or share > LIMITS[k][1] + 0.08 for share, k in zip(centre, cell, strict=True)
    )


def _superlatives(view: View, each: ViewObject, rivals: Sequence[ViewObject]) -> list[str]:
    found = []
    for axis, side, names in ((0, view.width, ("left", "right")), (1, view.height, ("top", "bottom"))):
        low, high = each.box[axis], each.box[axis + 2]
        margin = 0.12 * side  # twice the 6 %, since sums of two edges are compared
        if all(o.box[axis] + o.box[axis + 2] - low - high >= margin and o.box[axis] >= low for o in rivals):
            found.append(names[0])
        if all(low + high - o.box[axis] - o.box[axis + 2] >= margin and o.box[axis + 2] <= high for o in rivals):
            found.append(names[1])
    if all(each.area >= 1.6 * o.area for o in rivals):
        found.append("large")
    if all(1.6 * each.area <= o.area for o in rivals):
        found.append("small")
    return found


def relation_words(rng: np.random.Generator, how: str) -> str:
    """One wording of what :func:`relation` gives; pairs such as 'above and ...' stay as they are."""
    return pick(rng, RELATIONS.get(how, (how,)))


def express(rng: np.random.Generator, category: str, kind: str, value: str) -> str:
    """Words one of :func:`distinctions` as a referring expression."""
    if kind == "relation":
        how, anchor = value.split("|")
        value = f"{relation_words(rng, how)} the {noun(anchor)}"
    if kind == "colour" and category in HEADS:
        return f"the {noun(category, value)}"
    return pick(rng, EXPRESSIONS[value if kind == "most" else kind]).format(n=noun(category), v=value)


def fitting_expression(
    rng: np.random.Generator, view: View, target: ViewObject, options: Sequence[ViewObject], colours: Mapping[int, str]
) -> tuple[str, str] | None:
    """A kind and an expression that fits the target alone: ("the ...") in the view, ("a ...") among the options."""
    alike = [each for each in options if each.category == target.category and each.id != target.id]
    colour = colours.get(target.id)
    found = distinctions(view, target, colours)
    if not alike:
        found.append(("a class", ""))
    if colour is not None and not any(clashing(colour, colours.get(each.id)) for each in alike):
        found.append(("a colour", colour))
    if not found:
        return None
    kind, value = pick(rng, found)
    if kind.startswith("a "):
        return kind, with_article(noun(target.category, value))
    return kind, express(rng, target.category, kind, value)

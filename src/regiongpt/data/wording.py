"""Facts in English: one table of templates, filled to write and matched to read; and questions made of facts.

A random generator picks among the wordings; each sentence stands alone.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np

from regiongpt.data.coco import Box, ImageAnnotations
from regiongpt.data.facts import COLOURS, NUMBERS, PLACES, SIZES, Claim, View, ViewObject, clashing, distinctions
from regiongpt.errors import ConfigError
from regiongpt.prompts import COCO_80, question, region_answer
from regiongpt.regions import Region

T = TypeVar("T")
HEADS = {"skis": "pair of", "scissors": "pair of", "broccoli": "piece of"}
PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep"} | {word: word for word in HEADS}
FRAMES = ("the image", "the image", "the picture", "the photo")
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
CALLED = "It is {a}."
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
SIZED = {
    "tiny": ("{it} is tiny in the image.", "{it} takes up only a tiny part of the image."),
    "small": ("{it} takes up a small part of the image.", "{it} is small in the image."),
    "medium-sized": ("{it} takes up a fair part of the image.", "{it} is of medium size in the image."),
    "large": ("{it} takes up a large part of the image.", "{it} is large in the image."),
    "huge": ("{it} fills much of the image.", "{it} takes up a huge part of the image."),
}
MORE = {
    "place": "{it} is {place}.",
    "near": "{it} is {near}.",
    "turned": "{Other} is {how} it.",
    "both": "{it} is {near} and {near2}.",
    "also": "{it} is also {near2}.",
    "only": "{it} is the only {only} in {frame}.",
    "one of": "{it} is one of {number} {counted} in {frame}.",
}
APART = (
    "The {first} is {how} the {second}.",
    "The {first} is {how} the {second}.",
    "Region [{i}], {a_first}, is {how} Region [{j}], {a_second}.",
    "The {first} in Region [{i}] is {how} the {second} in Region [{j}].",
    "Region [{i}] is {how} Region [{j}].",
    "In the image, the {first} is {how} the {second}.",
)
ALIKE = (
    "The {first} in Region [{i}] is {how} the {second} in Region [{j}].",
    "Region [{i}] is {how} Region [{j}].",
    "Region [{i}], {a_first}, is {how} Region [{j}], another {second}.",
    "Both are {boths}; Region [{i}] is {how} Region [{j}].",
)
YES = ("Yes.", "Yes.", "Yes, there {is_are} {some} in {frame}.", "Yes, {frame} shows {some}.")
NO = ("No.", "No.", "No, there is no {none} in {frame}.", "No, {frame} does not show any {nones}.")


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


def mention(view: View, other: ViewObject, beside: ViewObject) -> str:
    """Names a neighbour of ``beside``: ``"the cup"`` when the view has just one, else ``"a"`` or ``"another"``."""
    if other.iscrowd:
        return f"a group of {plural(other.category)}"
    word = noun(other.category)
    if other.category == beside.category:
        return f"another {word}"
    return f"the {word}" if view.count(other.category) == 1 else with_article(word)


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


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_SINGULAR = {noun(name): name for name in COCO_80}
_PLURAL = {plural(name): name for name in COCO_80}
_HOW = {words: how for how, wordings in RELATIONS.items() for words in wordings} | {
    each: each
    for level in ("above", "below")
    for side in ("left", "right")
    for each in [f"{level} and to the {side} of"]
}
_OPPOSITE = {"left": "right", "above": "below", "inside": "around"}
_OPPOSITE |= {b: a for a, b in _OPPOSITE.items()}
_PHRASE = re.compile(
    rf"(?:{_any(HEADS.values())} )?(?:(?P<size>{_any(name for _, name in SIZES)}) )?"
    rf"(?:(?P<colour>{_any(COLOURS)}) )?(?P<name>{_any(COCO_80)})"
)
_N, _NS = _any(_SINGULAR), _any(_PLURAL)
_A = rf"[Aa]n? {re.sub('P<[a-z]+>', ':', _PHRASE.pattern)}"
_MENTION = rf"(?:(?:[Tt]he|[Aa]nother|[Aa]n?) {_N}|[Aa] group of {_NS})"
_NEAR = rf"{_any(_HOW)} {_MENTION}"
_SLOTS = dict.fromkeys(("a", "A", "a_first", "a_second"), _A)
_SLOTS |= dict.fromkeys(("first", "second", "only", "none"), _N) | dict.fromkeys(("boths", "counted", "nones"), _NS)
_SLOTS |= {"near": _NEAR, "near2": _NEAR, "Other": _MENTION, "how": _any(_HOW), "frame": _any(FRAMES)}
_SLOTS |= {"n": _any([*_SINGULAR, *COCO_80]), "it": rf"It|The {_N}", "is_are": "is|are", "number": _any(NUMBERS)}
_SLOTS |= {"place": rf"{_any(PLACES)}(?: of {_any(FRAMES)})?", "some": rf"an? {_N}|(?:{_any(NUMBERS)} )?{_NS}"}
_SLOTS |= {"i": r"[1-9]\d*", "j": r"[1-9]\d*"}


@cache
def _grammar(task: str) -> list[tuple[re.Pattern[str], tuple[Claim, ...]]]:
    """Patterns of a task's sentences, each with the claims that stand in no slot."""
    described: list[tuple[str, tuple[Claim, ...]]] = [(each, ()) for each in (*BRIEF, *OPENINGS, *MORE.values())]
    described += [(each, (Claim("size", size),)) for size, templates in SIZED.items() for each in templates]
    tables: dict[str, list[tuple[str, tuple[Claim, ...]]]] = {
        "describe": described,
        "classify": [("{n}", ()), (CALLED, ()), *described],
        "relation": [(each, ()) for each in (*APART, *ALIKE)],
        "presence": [(each, ()) for each in (*YES, *NO) if "{" in each]
        + [(f"{word.capitalize()}.", (Claim("presence", word, region=0),)) for word in ("yes", "no")],
    }

    def compiled(template: str) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", template)
        return re.compile("".join(rf"(?P<{p}>{_SLOTS[p]})" if k % 2 else re.escape(p) for k, p in enumerate(parts)))

    return [(compiled(template), claims) for template, claims in tables[task]]


def read(task: str, text: str) -> tuple[list[Claim], list[str]]:
    """The claims of an answer, each once, and those of its sentences that no template of the task writes.

    Args:
        task: ``describe`` (of brief ones too), ``classify`` (with or without the closed set), ``relation``,
            ``presence``.
        text: The answer.
    """
    claims: dict[Claim, None] = {}
    unread = []
    for sentence in re.split(r"(?<=\.) ", text.strip()):
        found = next(((m, more) for each, more in _grammar(task) if (m := each.fullmatch(sentence))), None)
        if found is None:
            unread.append(sentence)
        else:
            claims |= dict.fromkeys([*found[1], *_meant(found[0].groupdict())])
    return list(claims), unread


def _meant(found: Mapping[str, str]) -> Iterator[Claim]:
    """What the words in the slots of a template claim."""
    i, j = int(found.get("i", 1)), int(found.get("j", 2))
    for slot, words in found.items():
        if slot in ("a", "A", "a_first", "a_second", "first", "second", "n") or (slot == "it" and words != "It"):
            phrase = words if slot in ("first", "second", "n") else words.split(" ", 1)[1]
            match = _PHRASE.fullmatch(phrase)
            assert match
            yield Claim("class", match["name"], region=j if slot.endswith("second") else i)
            yield from (Claim(kind, match[kind]) for kind in ("size", "colour") if match[kind])
        elif slot == "boths":
            yield from (Claim("class", _PLURAL[words], region=k) for k in (i, j))
        elif slot == "place":
            yield Claim("place", words.split(" of the ")[0])
        elif slot in ("near", "near2"):
            how = max((each for each in _HOW if words.startswith(f"{each} ")), key=len)
            yield Claim("relation", _HOW[how], _named(words[len(how) + 1 :]))
        elif slot == "Other":
            turned = " ".join(_OPPOSITE.get(word, word) for word in _HOW[found["how"]].split())
            yield Claim("relation", turned, _named(words))
        elif slot == "how" and "Other" not in found:
            yield Claim("relation", _HOW[words], region=i, to=j)
        elif slot == "only":
            yield Claim("count", "one", _SINGULAR[words])
        elif slot == "counted":
            yield Claim("count", found["number"], _PLURAL[words])
        elif slot in ("none", "nones"):
            yield Claim("presence", "no", _named(words), region=0)
        elif slot == "some":
            number, _, rest = words.partition(" ")
            yield Claim("presence", "yes", _named(words), region=0)
            if number in NUMBERS:
                yield Claim("count", number, _named(rest), region=0)


def _named(words: str) -> str:
    """The class in a phrase that ends in it."""
    known = {**_SINGULAR, **_PLURAL}
    return known[max((each for each in known if words.endswith(each)), key=len)]


# ---------------------------------------------------------------------------------------------------------------------
# Questions with one right answer, always the same, in the first wording

LOCATED_AMONG = 5
"""Boxes that an expression is held against."""


@dataclass(frozen=True, kw_only=True)
class DevQuestion:
    """One question with one right answer about a whole image."""

    image: ImageAnnotations
    task: str  # a key of prompts.QUESTIONS
    text: str  # without <image>
    regions: list[Region]  # what its placeholders stand for, in pixels of the image
    answer: str  # class name or "Region [n]"; for a description the class name it must contain
    category: str  # of the object asked about
    share: float = 0.0  # area of the object's box as a share of the image
    kind: str = ""  # of expression that the answer rests on
    expression: str = ""  # what to find, for "locate"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as chat messages."""
        return [{"role": "user", "content": f"<image>\n{self.text}"}]


def dev_questions(
    images: Sequence[ImageAnnotations], task: str, seed: int = 0, colours: Mapping[int, str] | None = None
) -> list[DevQuestion]:
    """The questions of one task.

    Args:
        images: Whole images, not views.
        task: ``"classify"``, ``"describe"`` or ``"caption"``: one question for each box that is not a crowd.
            ``"locate"``: up to three an image, each among five boxes with an expression that fits one alone.
        seed: Picks candidates and expressions.
        colours: Annotation id -> colour over all images, for expressions; None leaves colours out.

    Raises:
        ConfigError: Another task.
    """

    def ask(image: ImageAnnotations, boxes: Sequence[Box], each: Any, **more: Any) -> DevQuestion:
        area = (each.box[2] - each.box[0]) * (each.box[3] - each.box[1])
        regions, share = [Region.box(*box) for box in boxes], area / (image.width * image.height)
        return DevQuestion(image=image, task=task, regions=regions, category=each.category, share=share, **more)

    if task in ("classify", "describe", "caption"):
        text = question(task, 0, regions=[1])
        return [
            ask(image, [each.box], each, text=text, answer=each.category)
            for image in images
            for each in image.objects
            if not each.iscrowd
        ]
    if task != "locate":
        raise ConfigError(f"expected classify, describe, caption or locate, got {task!r}")
    found: list[DevQuestion] = []
    for index, image in enumerate(images):
        rng, view = np.random.default_rng((seed, index)), View(image)
        for _ in range(3 if len(view.askable) >= LOCATED_AMONG else 0):
            options = [view.askable[k] for k in rng.permutation(len(view.askable))[:LOCATED_AMONG]]
            target = options[int(rng.integers(LOCATED_AMONG))]
            expression = fitting_expression(rng, view, target, options, colours or {})
            if expression is not None:
                kind, text = expression
                asked = question(task, 0, regions=range(1, LOCATED_AMONG + 1), expression=text)
                more = {"text": asked, "answer": region_answer(options.index(target) + 1)}
                found.append(ask(image, [o.box for o in options], target, kind=kind, expression=text, **more))
    return found


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

"""Conversations about views of annotated images, made of facts.

One conversation holds many turns, so that the image's tokens are read once for all of them. Each turn stands alone:
none refers back to another. Every random choice comes from (seed, index, epoch), never from global state.

Paper: §3.2, Table 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from expressions import distinctions, express, fitting_expression
from numpy.typing import NDArray
from sentences import describe, place_words, relate, say_presence

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import (
    CALLED,
    CHECKED,
    COLOURS,
    COMPARED,
    MIN_AREA,
    OBJECT,
    OTHER,
    PLACED,
    SHOWN,
    SIZED,
    UNKNOWN,
    UNNAMED,
    View,
    ViewObject,
    clashing,
    noun,
    pick,
    plural,
    relation,
    size_name,
    with_article,
)
from regiongpt.errors import ConfigError, RegionError
from regiongpt.prompts import COCO_80, COMMON, NO_MATCH, OFF_TOPIC, question, region_answer
from regiongpt.regions import Region

DEFAULT_MIX: Mapping[str, float] = {
    "classify": 10,
    "describe": 2,
    "caption": 1,
    "refer": 0,
    "relation": 1,
    "locate": 1.5,
    "presence": 2,
    "locate_each": 0,
    "presence_each": 0,
    "image_caption": 1,
    "where": 0.5,
    "size": 0.3,
    "colour": 0.5,
    "check": 1,
    "compare": 0.4,
    "count": 0.1,
    "other": 0.4,
}
"""How many turns of each task a conversation holds on average; a fraction is a chance."""

CANDIDATES = (2, 3, 3, 4, 4, 5, 5, 5, 5, 6, 7, 8)
NO_MATCH_SHARE = 0.15
# Names in a question about several of them: this many present, and as many absent.
MOST_ASKED = 5
# How the absent classes of presence questions are drawn. A class is asked for in vain about as often as it is there:
# from absent ones drawn evenly it learned that whatever is common is there.
ABSENT = ("tempting", "common", "any", "tempting", "common")
# Without the suffix that asks for a category name, the answer is a sentence (paper Figure 1).
FREE_SHARE = 0.15
JITTER = 0.06
# An area so many times another is bigger; one up to so many times is about the same.
BIGGER, SAME = 1.5, 1.15
# A human caption still holds for a crop that keeps this much of the image.
CAPTION_COVERAGE = 0.75
# What is said of a whole image: classes of which one object fills this much of it, so many at most.
PROMINENT, MOST_SHOWN = 0.08, 3

_INDEX = {name: k for k, name in enumerate(COCO_80)}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns about one view of one image.

    Attributes:
        messages: User and assistant turns by turns; the first begins with ``<image>`` on its own line.
        regions: What ``<region1>``, ``<region2>``, ... stand for, in pixels of the view.
        tasks: The task of each pair of turns, in order.
        categories: The class of each region, in order.
        objects: The id of its annotation.
    """

    messages: list[dict[str, str]]
    regions: list[Region]
    tasks: list[str]
    categories: list[str]
    objects: list[int]


@dataclass(frozen=True)
class ClassStatistics:
    """How often classes occur, and which occur together: for rare classes first and for tempting absent ones.

    Attributes:
        boxes: Single objects per class of :data:`COCO_80`, shape (80,).
        together: Images holding both classes, shape (80, 80); the diagonal counts images per class.
        confused: Mean probability that objects of a class were given for each class, shape (80, 80), if measured.
    """

    boxes: NDArray[np.float64]
    together: NDArray[np.float64]
    confused: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, images: Sequence[ImageAnnotations]) -> "ClassStatistics":
        """Counts over a list of images; ConfigError for a class that is not one of COCO's 80."""
        boxes, together = np.zeros(80), np.zeros((80, 80))
        for image in images:
            here = set()
            for each in image.objects:
                if each.category not in _INDEX:
                    raise ConfigError(f"{image.path.name}: expected COCO-80 category names, got {each.category!r}")
                boxes[_INDEX[each.category]] += not each.iscrowd
                here.add(_INDEX[each.category])
            rows = sorted(here)
            together[np.ix_(rows, rows)] += 1
        return cls(boxes, together)

    def absent(self, rng: np.random.Generator, view: View, how: str) -> str | None:
        """A class that is certainly absent from the view: "any"; "common", as often as images hold it; or "tempting".

        A tempting one goes with a class that is there, or is what that is taken for.
        """
        weights = np.array([name not in view.by_category and name not in view.maybe for name in COCO_80], dtype=float)
        images = np.maximum(self.together.diagonal(), 1.0)
        here = [_INDEX[name] for name in view.by_category]
        if how == "common" or (how == "tempting" and not here):
            weights *= images
        elif how == "tempting":
            pull = (self.together[here] / images[here, None]).sum(axis=0)
            if self.confused is not None:
                taken = self.confused[here].sum(axis=0) * weights
                pull = pull / max((pull * weights).sum(), 1e-6) + taken / max(taken.sum(), 1e-6)
            weights *= pull + 1e-6
        total = weights.sum()
        return COCO_80[int(rng.choice(80, p=weights / total))] if total > 0 else None

    def taken_for(self, rng: np.random.Generator, category: str) -> str:
        """Another class: half of the time one that the class is taken for, where measured, else as common as any."""
        weights = np.sqrt(self.boxes + 1)
        if self.confused is not None and rng.random() < 0.5:
            weights = self.confused[_INDEX[category]] + 1e-6
        weights = weights * np.array([other != category for other in COCO_80])
        return COCO_80[int(rng.choice(80, p=weights / weights.sum()))]


@dataclass(frozen=True)
class _Plan:
    """One turn before its regions have numbers: ``write`` takes the numbers of ``objects``."""

    task: str
    objects: tuple[ViewObject, ...]
    write: Callable[[list[int]], tuple[str, str]]


@dataclass(frozen=True)
class ConversationSampler:
    """Makes conversations whose every answer is true of the view.

    Args:
        statistics: Class statistics of the training images.
        mix: Average number of turns a conversation has of each task, keys of :data:`DEFAULT_MIX`.
        regions_per_image: Most distinct regions in a conversation. Where an image has more objects, those of rare
            classes come first (weight 1/sqrt(boxes of the class), halved for people).
        suffixes: Whether questions end with the suffix that fixes the format of their answer.
        outline_share: Share of the regions with an outline, in [0, 1], that are given by it rather than by their box.
        present_share: Share of the questions about one class's presence, in [0, 1], that ask for one that is there.
    """

    statistics: ClassStatistics
    mix: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    regions_per_image: int = 12
    suffixes: bool = True
    outline_share: float = 0.5
    present_share: float = 0.5

    def sample(
        self,
        view: View,
        colours: Mapping[int, str],
        seed: int,
        index: int,
        epoch: int,
        words: Mapping[int, str] | None = None,
    ) -> Conversation:
        """One conversation; the same arguments always give the same one.

        Args:
            view: What the model sees.
            colours: Annotation id -> colour, as :func:`regiongpt.data.facts.colours_of` gives; ``{}`` names none.
            seed: Seed of the run.
            index: Place of the image in the run's list.
            epoch: How often the image has come before.
            words: Annotation id -> what sentences call the object, where that is not its class but one of
                :data:`regiongpt.data.facts.GROUPS` or :data:`regiongpt.data.facts.OBJECT`; None where they may name
                whatever is there.

        Returns:
            At least one pair of turns. Objects under 4 px^2 of the view, and crowds, are not asked about.
        """
        rng = np.random.default_rng((seed, index, epoch))
        chosen = self._choose(rng, view)
        makers: dict[str, Callable[[], _Plan | None]] = {
            "refer": lambda: _refer(rng, view, chosen, colours),
            "relation": lambda: _relate(rng, chosen, words is None),
            "locate": lambda: self._locate(rng, view, chosen, colours),
            "locate_each": lambda: _locate_each(rng, chosen),
            "presence": lambda: self._presence(rng, view),
            "presence_each": lambda: self._presence_each(rng, view),
            "image_caption": lambda: _caption(rng, view) if words is None else _shown(rng, view),
            "where": lambda: _where(rng, view, chosen),
            "size": lambda: _size(rng, view, chosen),
            "colour": lambda: _colour(rng, chosen),
            "check": lambda: self._check(rng, chosen, words is None),
            "compare": lambda: _compare(rng, chosen),
            "count": lambda: _count(rng),
            "other": lambda: _other(rng, chosen),
        }
        plans: list[_Plan | None] = []
        for task, mean in self.mix.items():
            turns = int(mean + rng.random())
            if task == "classify":
                plans += [self._classify(rng, each, (words or {}).get(each.id, "")) for each in chosen[:turns]]
            elif task in ("describe", "caption"):
                # From the far end, so that a described object has seldom been classified in another turn.
                taken = sum(plan is not None and plan.task in ("describe", "caption") for plan in plans)
                for each in chosen[::-1][taken : taken + turns] or chosen[:turns]:
                    plans.append(_describe(rng, view, each, task, (words or {}).get(each.id, "")))
            else:
                plans += [makers[task]() for _ in range(turns)]
        made = [plan for plan in plans if plan] or [plan for plan in [self._presence(rng, view)] if plan]
        return _write(rng, view, made, self.outline_share)

    def _choose(self, rng: np.random.Generator, view: View) -> list[ViewObject]:
        """Objects to ask about, in random order weighted to rare classes (keys u^(1/w), drawn without replacement)."""
        objects = view.askable
        if not objects:
            return []
        weights = np.array([max(self.statistics.boxes[_INDEX[each.category]], 1.0) ** -0.5 for each in objects])
        weights *= np.array([0.5 if each.category == "person" else 1.0 for each in objects])
        order = np.argsort(-np.log(rng.random(len(objects)) + 1e-12) / weights)[: self.regions_per_image]
        return [objects[k] for k in rng.permutation(order)]

    def _classify(self, rng: np.random.Generator, each: ViewObject, word: str) -> _Plan:
        wording, guided = int(rng.integers(10)), rng.random() >= FREE_SHARE
        called = UNNAMED if word == OBJECT else CALLED.format(a=with_article(noun(word or each.category)))
        answer = each.category if guided else called

        def write(numbers: list[int]) -> tuple[str, str]:
            suffix = guided and self.suffixes
            return question("classify", wording, regions=numbers, label_set="COCO-80", guided=suffix), answer

        return _Plan("classify", (each,), write)

    def _presence(self, rng: np.random.Generator, view: View) -> _Plan | None:
        there = sorted(set(view.by_category) - view.maybe)
        category: str | None
        if there and rng.random() < self.present_share:
            category = pick(rng, there)
        else:
            category = self.statistics.absent(rng, view, pick(rng, ABSENT))
        if category is None:
            return None
        text = question("presence", int(rng.integers(10)), category=category)
        answer = say_presence(rng, view, category)
        return _Plan("presence", (), lambda numbers: (text, answer))

    def _check(self, rng: np.random.Generator, chosen: Sequence[ViewObject], named: bool) -> _Plan | None:
        """Whether an object is of a class: its own, or another."""
        if not chosen:
            return None
        each = pick(rng, chosen)
        name = self.statistics.taken_for(rng, each.category) if rng.random() < 0.5 else ""
        wording = CHECKED["yes"] if not name else CHECKED["no"] if named else OTHER
        answer = wording.format(a=with_article(noun(each.category)))
        return _common(rng, "check", (each,), answer, a=with_article(noun(name or each.category)))

    def _presence_each(self, rng: np.random.Generator, view: View) -> _Plan | None:
        """Whether several classes are there, about as many of which are as are not."""
        there = sorted(set(view.by_category) - view.maybe)
        asked = {there[k]: "yes" for k in rng.permutation(len(there))[:MOST_ASKED]}
        for turn in range(max(1, len(asked))):
            absent = self.statistics.absent(rng, view, ABSENT[turn % len(ABSENT)])
            if absent is not None:
                asked[absent] = "no"
        if not asked:
            return None
        names = [list(asked)[k] for k in rng.permutation(len(asked))]
        text = question("presence_each", int(rng.integers(10)), expression=", ".join(names))
        answer = ", ".join(f"{name} {asked[name]}" for name in names)
        return _Plan("presence_each", (), lambda numbers: (text, answer))

    def _locate(
        self, rng: np.random.Generator, view: View, chosen: Sequence[ViewObject], colours: Mapping[int, str]
    ) -> _Plan | None:
        """A choice among candidates: by a fact true of one alone, or by an expression that fits none."""
        if len(chosen) < 2:
            return None
        size = min(pick(rng, CANDIDATES), len(chosen))
        options = [chosen[k] for k in rng.permutation(len(chosen))[:size]]
        target: ViewObject | None = None
        expression: str | None = None
        if rng.random() < NO_MATCH_SHARE:
            expression = self._unfitting(rng, view, options, colours)
        else:
            for target in options[:3]:
                fitting = fitting_expression(rng, view, target, options, colours)
                if fitting is not None:
                    expression = fitting[1]
                    break
        if expression is None:
            return None
        wording, text = int(rng.integers(10)), expression
        order = tuple(options[k] for k in rng.permutation(size))

        def write(numbers: list[int]) -> tuple[str, str]:
            answer = NO_MATCH if target is None else region_answer(numbers[order.index(target)])
            return question("locate", wording, regions=numbers, expression=text, guided=self.suffixes), answer

        return _Plan("locate", order, write)

    def _unfitting(
        self, rng: np.random.Generator, view: View, options: Sequence[ViewObject], colours: Mapping[int, str]
    ) -> str | None:
        """An expression that none of the options fits: of an object left out, of another colour, of an absent class."""
        which = rng.random()
        inside = {each.id for each in options}
        if which < 0.35:
            outside = [each for each in view.askable if each.id not in inside]
            for k in rng.permutation(len(outside))[:3]:
                facts = distinctions(view, outside[k], colours)
                if facts:
                    return express(rng, outside[k].category, *pick(rng, facts))
        if which < 0.6:
            for each in options:
                alike = [colours.get(other.id) for other in view.by_category[each.category]]
                if view.count(each.category) is not None and None not in alike:
                    free = [name for name in COLOURS if not any(clashing(name, other) for other in alike)]
                    if free:
                        return with_article(noun(each.category, pick(rng, free)))
        category = self.statistics.absent(rng, view, pick(rng, ("any", "tempting")))
        if category is None:
            return None
        word = noun(category)
        return f"the {word}" if rng.random() < 0.6 else with_article(word)


def _locate_each(rng: np.random.Generator, chosen: Sequence[ViewObject]) -> _Plan | None:
    """Which of several regions bears which name, of the names that one of them alone bears."""
    options = [chosen[k] for k in rng.permutation(len(chosen))[: pick(rng, CANDIDATES)]]
    classes = [each.category for each in options]
    sought = [each for each in options if classes.count(each.category) == 1][:MOST_ASKED]
    if len(options) < 2 or not sought:
        return None
    wording = int(rng.integers(10))
    order, asked = (tuple(each[k] for k in rng.permutation(len(each))) for each in (options, sought))

    def write(numbers: list[int]) -> tuple[str, str]:
        text = question("locate_each", wording, regions=numbers, expression=", ".join(each.category for each in asked))
        return text, ", ".join(f"{each.category} [{numbers[order.index(each)]}]" for each in asked)

    return _Plan("locate_each", order, write)


def _describe(rng: np.random.Generator, view: View, each: ViewObject, task: str, word: str) -> _Plan:
    wording = int(rng.integers(10))
    return _worded(task, wording, (each,), describe(rng, view, each, task == "caption", word))


def _refer(
    rng: np.random.Generator, view: View, chosen: Sequence[ViewObject], colours: Mapping[int, str]
) -> _Plan | None:
    """A true expression that fits one object alone, of up to four objects the first that has one."""
    for k in rng.permutation(len(chosen))[:4]:
        if facts := distinctions(view, chosen[k], colours):
            wording = int(rng.integers(10))
            text = express(rng, chosen[k].category, *pick(rng, facts)).replace("the only ", "the ")
            return _worded("refer", wording, (chosen[k],), text)
    return None


def _relate(rng: np.random.Generator, chosen: Sequence[ViewObject], named: bool) -> _Plan | None:
    """How one object lies to another, of up to four pairs the first that clearly relates."""
    pairs = [rng.permutation(len(chosen))[:2] for _ in range(4 if len(chosen) > 1 else 0)]
    for a, b in ((chosen[i], chosen[j]) for i, j in pairs):
        how = relation(a.box, b.box)
        if how is not None:
            wording = int(rng.integers(10))
            return _worded("relation", wording, (a, b), relate(rng, a, b, how) if named else UNKNOWN)
    return None


def _worded(task: str, wording: int, objects: tuple[ViewObject, ...], answer: str) -> _Plan:
    def write(numbers: list[int]) -> tuple[str, str]:
        i, j = (*numbers, 0)[:2]
        return question(task, wording, regions=numbers), answer.replace("{i}", str(i)).replace("{j}", str(j))

    return _Plan(task, objects, write)


def _common(rng: np.random.Generator, task: str, objects: tuple[ViewObject, ...], answer: str, **slots: str) -> _Plan:
    """One of the questions that people ask, with its answer."""
    text = pick(rng, COMMON[task])

    def write(numbers: list[int]) -> tuple[str, str]:
        r, s = (*(f"<region{number}>" for number in numbers), "", "")[:2]
        return text.format(r=r, s=s, **slots), answer

    return _Plan(task, objects, write)


def _where(rng: np.random.Generator, view: View, chosen: Sequence[ViewObject]) -> _Plan | None:
    each = pick(rng, chosen) if chosen else None
    place = place_words(rng, view, each) if each else None
    return _common(rng, "where", (each,), PLACED.format(place=place)) if each and place else None


def _size(rng: np.random.Generator, view: View, chosen: Sequence[ViewObject]) -> _Plan | None:
    if not chosen:
        return None
    each = pick(rng, chosen)
    return _common(rng, "size", (each,), SIZED[size_name(each.box, view.width, view.height)])


def _colour(rng: np.random.Generator, chosen: Sequence[ViewObject]) -> _Plan | None:
    """A model of this size said "black" of almost everything."""
    return _common(rng, "colour", (pick(rng, chosen),), UNKNOWN) if chosen else None


def _compare(rng: np.random.Generator, chosen: Sequence[ViewObject]) -> _Plan | None:
    if len(chosen) < 2:
        return None
    a, b = (chosen[k] for k in rng.permutation(len(chosen))[:2])
    times = a.area / b.area
    how = "bigger than" if times >= BIGGER else "smaller than" if times <= 1 / BIGGER else "about as big as"
    if how == "about as big as" and not 1 / SAME <= times <= SAME:
        return None
    return _common(rng, "compare", (a, b), COMPARED[how])


def _count(rng: np.random.Generator) -> _Plan:
    return _common(rng, "count", (), UNKNOWN, ns=plural(pick(rng, COCO_80)))


def _other(rng: np.random.Generator, chosen: Sequence[ViewObject]) -> _Plan:
    """A question that no image answers."""
    text = pick(rng, [each for each in OFF_TOPIC["trained"] if chosen or "<region1>" not in each])
    objects = (pick(rng, chosen),) if "<region1>" in text else ()
    return _Plan("other", objects, lambda numbers: (text.replace("<region1>", f"<region{(*numbers, 0)[0]}>"), UNKNOWN))


def of_blank(talk: Conversation) -> Conversation | None:
    """The questions of a conversation that a blank image leaves without an answer, and what to say to them."""
    messages: list[dict[str, str]] = []
    tasks = []
    for asked, task in zip(talk.messages[::2], talk.tasks, strict=True):
        if task in ("classify", "describe", "caption", "refer", "colour", "check", "image_caption", "presence"):
            text = asked["content"].removeprefix("<image>\n")
            messages.append({"role": "user", "content": text if messages else f"<image>\n{text}"})
            messages.append({"role": "assistant", "content": "No." if task == "presence" else UNKNOWN})
            tasks.append(task)
    return replace(talk, messages=messages, tasks=tasks) if tasks else None


def _caption(rng: np.random.Generator, view: View) -> _Plan | None:
    """A human caption, where the crop leaves it true; a mirrored view takes none that speaks of left or right."""
    captions = [
        text
        for text in view.annotations.captions
        if view.coverage >= CAPTION_COVERAGE and not (view.flip and {"left", "right"} & set(text.lower().split()))
    ]
    if not captions:
        return None
    text, answer = question("image_caption", int(rng.integers(10))), pick(rng, captions)
    return _Plan("image_caption", (), lambda numbers: (text, answer))


def _shown(rng: np.random.Generator, view: View) -> _Plan | None:
    """The classes of the largest objects, largest first."""
    whole = view.width * view.height
    large = sorted((each for each in view.askable if each.area >= PROMINENT * whole), key=lambda each: -each.area)
    names = list(dict.fromkeys(each.category for each in large))[:MOST_SHOWN]
    if not names:
        return None
    some = dict(
        zip(("some", "second_thing", "third_thing"), (with_article(noun(each)) for each in names), strict=False)
    )
    text, answer = question("image_caption", int(rng.integers(10))), SHOWN[len(names) - 1].format(**some)
    return _Plan("image_caption", (), lambda numbers: (text, answer))


def _write(rng: np.random.Generator, view: View, plans: Sequence[_Plan], outline_share: float) -> Conversation:
    """Number the regions that are used, in an order that tells nothing, and put the turns into one."""
    used = {each.id: each for plan in plans for each in plan.objects}
    order = [list(used)[k] for k in rng.permutation(len(used))]
    number = {each_id: k + 1 for k, each_id in enumerate(order)}
    messages: list[dict[str, str]] = []
    tasks: list[str] = []
    for k in rng.permutation(len(plans)):
        asked, answer = plans[k].write([number[each.id] for each in plans[k].objects])
        messages.append({"role": "user", "content": asked if messages else f"<image>\n{asked}"})
        messages.append({"role": "assistant", "content": answer})
        tasks.append(plans[k].task)
    return Conversation(
        messages=messages,
        regions=[_region(rng, view, used[k], outline_share) for k in order],
        tasks=tasks,
        categories=[used[k].category for k in order],
        objects=order,
    )


def _region(rng: np.random.Generator, view: View, each: ViewObject, outline_share: float) -> Region:
    """The polygon, where there is one, in its share of the times; else the box with each side moved by up to 6 %."""
    if each.source.polygons is not None and rng.random() < outline_share:
        shape = Region.polygon(view.rings(each))
        try:
            if shape.area(round(view.width), round(view.height)) >= MIN_AREA:
                return shape
        except RegionError:  # an outline that encloses nothing, or nothing that the crop kept: the box stands in
            pass
    x0, y0, x1, y1 = each.box
    a, b, c, d = rng.uniform(-JITTER, JITTER, 4) * (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    return Region.box(max(x0 + a, 0.0), max(y0 + b, 0.0), min(x1 + c, view.width), min(y1 + d, view.height))

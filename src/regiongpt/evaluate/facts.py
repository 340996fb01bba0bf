"""Truth of a model's claims: each is parsed by the grammar of the training text, and judged.

The judges are annotations and pixels; undecided claims are counted separately.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
from pydantic import Field

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.facts import (
    GROUPS,
    UNKNOWN,
    Claim,
    View,
    ViewObject,
    holds,
    noun,
    plural,
    read,
    read_colours,
    relation,
    with_article,
)
from regiongpt.data.shards import many
from regiongpt.errors import DataError
from regiongpt.evaluate.bootstrap import SumStatistic, ratio, sum_statistic
from regiongpt.evaluate.task import Answer, Item, Measured, Scored, Task, given, images_of, listed
from regiongpt.prompts import COCO_80, COMMON, OFF_TOPIC, question
from regiongpt.regions import Region

KINDS: Final = ("class", "colour", "size", "place", "relation", "presence")
RELATED: Final = 3
"""Most pairs of regions per image, and most regions that the questions of :data:`COMMON` are about."""
_GRAMMARS: Final = {"ask": "classify", "brief": "describe", "image": "image_caption"}
# Tokens of an answer; 32 of any other.
_ROOM: Final = {"classify": 16, "ask": 64, "describe": 64, "brief": 40, "relation": 48, "image": 48}
_SHOWN: Final = 8  # values of a kind, and sentences that were not read


class Judged(NamedTuple):
    """A claim of the answer to one item, and whether it is true; None if undecided."""

    item: int
    claim: Claim
    true: bool | None


class Facts(Task):
    """Describes and names every object, relates some pairs, and asks about present and absent classes."""

    name: ClassVar[str] = "facts"
    summary: ClassVar[str] = "truth of the claims in a model's answers; needs only COCO annotations"
    by: ClassVar[tuple[str, ...]] = ("question",)

    split: str = "dev"
    """instances_SPLIT.json in the folder, with images/."""
    seed: int = Field(default=0, ge=0)
    """Random seed."""

    @cached_property
    def _images(self) -> dict[int, ImageAnnotations]:
        data = load_coco(photo_sources(self.data, self.split))
        self.left_out.counts.update(data.skipped)
        return {image.image_id: image for image in data.images}

    @cached_property
    def _view(self) -> Callable[[int], tuple[View, dict[int, str]]]:
        return cache(lambda number: (View(self._images[number]), read_colours(self._images[number])))

    def inputs(self) -> list[Path]:
        """The annotations."""
        return [source.instances for source in photo_sources(self.data, self.split)]

    def read_items(self) -> list[Item]:
        """Items by image: of each object, of pairs of objects that clearly relate, of classes."""
        items = [item for image in self._images.values() for item in self._asked(image)]
        if not items:
            raise DataError(f"{self.data}: no annotated objects of COCO's 80 classes to ask about")
        return items

    def _asked(self, image: ImageAnnotations) -> Iterator[Item]:
        view, rng = View(image), np.random.default_rng((self.seed, abs(image.image_id)))
        known = [each for each in view.askable if each.category in COCO_80]

        def item(kind: str, number: str, text: str, objects: Sequence[ViewObject], **more: Any) -> Item:
            return Item(
                id=f"{kind}-{image.image_id}-{number}",
                image=image.path,
                image_id=image.image_id,
                size=(image.width, image.height),
                question=text,
                regions=tuple(Region.box(*each.box) for each in objects),
                max_new_tokens=_ROOM.get(kind, 32),
                groups={"question": kind},
                detail={"objects": [each.id for each in objects], **more},
                truth=more.get("asked") or ", ".join(each.category for each in objects),
            )

        for each in known:
            for kind, task in (("describe", "describe"), ("brief", "caption"), ("classify", "classify")):
                yield item(kind, str(each.id), question(task, 0, regions=[1]), [each])
            yield item("ask", str(each.id), "What is <region1>?", [each])
        pairs = [(a, b) for a in known for b in known if a is not b and relation(a.box, b.box)]
        for k in rng.permutation(len(pairs))[:RELATED]:
            a, b = pairs[k]
            yield item("relation", f"{a.id}-{b.id}", question("relation", 0, regions=[1, 2]), pairs[k])
            text = COMMON["compare"][0].format(r="<region1>", s="<region2>")
            yield item("compare", f"{a.id}-{b.id}", text, pairs[k])
        names = [name for name in COCO_80 if name in view.by_category]
        for k in rng.permutation(len(known))[:RELATED]:
            each = known[k]
            others = [name for name in COCO_80 if name != each.category]
            name = each.category if rng.random() < 0.5 else others[int(rng.integers(len(others)))]
            for kind in ("where", "size", "colour", "check"):
                text = COMMON[kind][0].format(r="<region1>", a=with_article(noun(name)))
                yield item(kind, str(each.id), text, [each], **({"asked": name} if kind == "check" else {}))
        yield item("image", "0", question("image_caption", 0), [])
        for name in names[:1]:
            yield item("count", name, COMMON["count"][0].format(ns=plural(name)), [])
        for k in rng.permutation(len(OFF_TOPIC["asked"]))[:2].tolist():
            text = OFF_TOPIC["asked"][k]
            if known or "<region1>" not in text:
                yield item("other", str(k), text, known[:1] if "<region1>" in text else [])
        here = sorted(set(view.by_category) & set(COCO_80))
        absent = [name for name in COCO_80 if name not in view.by_category]
        for name in (*here, *(absent[k] for k in rng.permutation(len(absent))[: len(here)])):
            yield item("presence", name, question("presence", 0, category=name), [], asked=name)

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """The share of true claims by kind, and of regions on which two questions are answered alike."""
        judged: list[Judged] = []
        unread = Counter[str]()
        texts = given(items, answers, "text")
        for place, text in enumerate(texts):
            task = items[place].groups["question"]
            claims, rest = read(_GRAMMARS.get(task, task), text) if text else ([], [])
            unread.update(rest)
            judged += [Judged(place, claim, self._true(items[place], claim)) for claim in claims]
        agreement, named = _agreement(items, judged), _named(items, judged)
        # The nearest of a list of names, which one must be picked from, claims nothing; coco_cls measures that.
        judged = [each for each in judged if items[each.item].groups["question"] != "classify"]
        protocols = {}
        rows = [["kind", "says", "claims", "true", "false", "undecided", "true if always said, %"]]
        for kind in ("all", *KINDS):
            own = [each for each in judged if kind in ("all", each.claim.kind)]
            if not own:
                continue
            decided = [each for each in own if each.true is not None]
            statistics = {"true": _share(items, [(each.item, each.true) for each in decided])}
            if kind != "all":
                said = Counter(each.claim.value for each in own)
                always = {value: self._always(items, own, value) for value, _ in said.most_common(_SHOWN)}
                statistics["constant"] = max(always.values(), key=lambda share: share.value())
                for value, share in always.items():
                    true = [each.true for each in own if each.claim.value == value]
                    counts = (len(true), *map(true.count, (True, False, None)))
                    rows.append([kind, value, *map(str, counts), f"{100 * share.value():.1f}"])
            statistics["undecided"] = _share(items, [(each.item, each.true is None) for each in own])
            by_item: dict[int, list[bool]] = {}
            for each in decided:
                by_item.setdefault(each.item, []).append(bool(each.true))
            shares = {place: sum(true) / len(true) for place, true in by_item.items()}
            protocols[f"claims, {kind}"] = Scored(
                statistics=statistics,
                scores={"true": [shares.get(place) for place in range(len(items))]},
                of={name: int(share.sums[:, 1].sum()) for name, share in statistics.items()},
            )
        protocols["agreement"], protocols["named"] = agreement, named
        protocols["declined"] = _declined(items, texts)
        notes = []
        if unread:
            shown = listed([f"{sentence!r} ({count})" for sentence, count in unread.most_common()], _SHOWN)
            notes.append(f"{many(unread.total(), 'sentence')} not parsed, so not judged: {shown}")
        return Measured(
            protocols=protocols,
            pinned={
                "split": self.split,
                "questions": f"each object described, named and asked about, {RELATED} relations an image, the classes "
                f"there and as many absent ones, seed {self.seed}",
                "true": "by annotations and pixels, of the claims that these decide",
                "constant": "the value that is true most often, said in every claim of the kind",
            },
            notes=notes,
            tables={"What is said": rows},
        )

    def _true(self, item: Item, claim: Claim) -> bool | None:
        view, colours = self._view(int(item.image_id))
        objects = {each.id: each for each in view.objects}
        about = [objects[each] for each in item.detail["objects"]]
        return holds(claim, view, about, colours, item.detail.get("asked", ""))

    def _always(self, items: Sequence[Item], judged: Sequence[Judged], value: str) -> SumStatistic:
        """The share of true claims if all said this value, among those it would decide."""
        said = [(each.item, self._true(items[each.item], replace(each.claim, value=value))) for each in judged]
        return _share(items, [(place, true) for place, true in said if true is not None])


def _share(items: Sequence[Item], found: Sequence[tuple[int, bool | float | None]]) -> SumStatistic:
    """The mean of scores by the place of their item; over all images, so that two models' can be compared."""
    sums = np.zeros((len(items), 2))
    for place, score in found:
        sums[place] += float(score or 0), 1
    return sum_statistic(images_of(items), sums, lambda s: ratio(s[:, 0], s[:, 1]))


def _declined(items: Sequence[Item], texts: Sequence[str | None]) -> Scored:
    """The share of answers that say they can't tell: to what can be answered, and to what can not."""
    scores: dict[str, list[float | None]] = {"answerable": [], "unanswerable": []}
    for item, text in zip(items, texts, strict=True):
        kind = "unanswerable" if item.groups["question"] in ("count", "other") else "answerable"
        # Many objects have no clear colour, and nano has learned neither those nor relations.
        known = text is not None and item.groups["question"] not in ("colour", "relation")
        for name, found in scores.items():
            found.append(float(text == UNKNOWN) if known and name == kind else None)
    return _means(items, scores)


def _named(items: Sequence[Item], judged: Sequence[Judged]) -> Scored:
    """The share of descriptions that name a class, and of those that say a wider word for it."""
    said = {each.item: each.claim.value in GROUPS for each in judged if each.claim.kind == "class"}
    described = [item.groups["question"] == "describe" for item in items]
    return _means(
        items,
        {
            name: [float(said.get(k) is wide) if asked else None for k, asked in enumerate(described)]
            for name, wide in (("class", False), ("wider word", True))
        },
    )


def _means(items: Sequence[Item], scores: Mapping[str, Sequence[float | None]]) -> Scored:
    """Means of the scores that there are."""
    known = {name: [(k, score) for k, score in enumerate(found) if score is not None] for name, found in scores.items()}
    return Scored(
        statistics={name: _share(items, found) for name, found in known.items()},
        scores=scores,
        of={name: len(found) for name, found in known.items()},
    )


def _agreement(items: Sequence[Item], judged: Sequence[Judged]) -> Scored:
    """Share of the classes chosen by ``classify`` that the other answers agree with, of those that name one."""
    said: dict[tuple[str, Any, Any], str] = {}
    for each in judged:
        item, claim = items[each.item], each.claim
        if claim.kind in ("class", "presence") and claim.region < 2 and item.groups["question"] != "image":
            about = item.detail.get("asked") or item.detail["objects"][0]
            said.setdefault((item.groups["question"], item.image_id, about), claim.value)
    pairs: dict[str, list[float | None]] = {"describe": [], "brief": [], "ask": [], "presence": []}
    for item in items:
        image, objects = item.image_id, item.detail["objects"]
        name = said.get(("classify", image, objects[0])) if item.groups["question"] == "classify" else None
        for task, found in pairs.items():
            other = said.get((task, image, name if task == "presence" else objects[0])) if name else None
            agrees = other == "yes" if task == "presence" else name in GROUPS.get(other or "", (other,))
            found.append(None if other is None else float(agrees))
    return _means(items, {f"{task} and classify": found for task, found in pairs.items()})

"""Conversations: the same for the same seed, well formed, and every answer true of the view."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conversations import ClassStatistics, Conversation, ConversationSampler, of_blank
from pictures import annotated
from sentences import describe, say_presence

from regiongpt.data.coco import ImageAnnotations, ObjectAnnotation
from regiongpt.data.facts import COLOURS, OBJECT, UNKNOWN, UNNAMED, View, ViewObject, holds, read
from regiongpt.prompts import (
    COCO_80,
    NO_MATCH,
    OFF_TOPIC,
    check_placeholders,
    closed_set_suffix,
    parse_region_answer,
    placeholders,
)

KINDS = ("person", "person", "person", "dog", "cup", "cup", "car", "chair", "laptop", "book")


def made(seed: int, count: int = 10, captions: tuple[str, ...] = ()) -> ImageAnnotations:
    rng = np.random.default_rng(seed)
    objects = []
    for k in range(count):
        x, y, w, h = rng.uniform(0, 150), rng.uniform(0, 90), rng.uniform(8, 50), rng.uniform(8, 30)
        ring = (x, y, x + w, y, x + w, y + h, x, y + h)
        polygons = (ring,) if k % 2 else None
        box, number = (x, y, x + w, y + h), 100 * seed + k
        objects.append(ObjectAnnotation(id=number, category=KINDS[k % len(KINDS)], box=box, polygons=polygons))
    path = Path(f"{seed}.jpg")
    return ImageAnnotations(path=path, image_id=seed, width=200, height=120, objects=tuple(objects), captions=captions)


IMAGES = [made(seed) for seed in range(30)]
SAMPLER = ConversationSampler(ClassStatistics.of(IMAGES))


@pytest.mark.parametrize("flip", [False, True])
def test_conversations_are_well_formed_and_the_same_for_the_same_arguments(flip):
    for index, image in enumerate(IMAGES):
        view = View(image, (20, 10, 180, 110), flip)
        talk = SAMPLER.sample(view, {}, 0, index, 0)
        assert SAMPLER.sample(view, {}, 0, index, 0) == talk
        assert all(SAMPLER.sample(view, {}, *other) != talk for other in ((1, index, 0), (0, index + 1, 0)))
        texts = [message["content"] for message in talk.messages]
        assert [message["role"] for message in talk.messages] == ["user", "assistant"] * len(talk.tasks)
        assert texts[0].startswith("<image>\n")
        assert "".join(texts).count("<image>") == 1
        assert check_placeholders(texts, len(talk.regions)) == []
        assert len(talk.regions) <= SAMPLER.regions_per_image
        for region in talk.regions:
            region.check(160, 100)


def owner(view: View, bounds: tuple) -> str:
    """Class of the object whose box is closest to a region's."""
    return closest(view, bounds).category


def closest(view: View, bounds: tuple) -> ViewObject:
    return min(view.objects, key=lambda o: float(np.abs(np.subtract(o.box, bounds)).max()))


def turns_of(sampler: ConversationSampler) -> Iterator[tuple[View, Conversation, str, str, str]]:
    """Every turn of one conversation about each image: the view, the conversation, its task, question and answer."""
    for index, image in enumerate(IMAGES):
        view = View(image)
        talk = sampler.sample(view, {}, 0, index, 0)
        for asked, said, task in zip(talk.messages[::2], talk.messages[1::2], talk.tasks, strict=True):
            yield view, talk, task, asked["content"], said["content"]


def test_answers_are_true():
    seen: Counter[str] = Counter()
    for view, talk, task, text, answer in turns_of(SAMPLER):
        classes = [owner(view, region.bounds(200, 120)) for region in talk.regions]
        numbers = placeholders(text)
        seen[task] += 1
        if task == "classify":
            name = classes[numbers[0] - 1]
            assert answer == name if text.endswith(closed_set_suffix()) else name in answer
        elif task in ("describe", "caption"):
            assert classes[numbers[0] - 1] in answer
        elif task == "locate":
            chosen = parse_region_answer(answer)
            if answer == NO_MATCH:
                seen["no match"] += 1
                assert chosen is None
            else:
                assert chosen in numbers
                assert classes[chosen - 1] in text
        elif task == "presence":
            asked_for = max((c for c in COCO_80 if re.search(rf"\b{c}\b", text)), key=len)
            assert answer.startswith("Yes" if asked_for in view.by_category else "No")
            seen[answer.split(".")[0].split(",")[0]] += 1
    assert all(seen[task] > 5 for task in ("classify", "describe", "caption", "relation", "locate", "presence"))
    assert seen["no match"] > 0
    assert 0.3 < seen["Yes"] / (seen["Yes"] + seen["No"]) < 0.7


def test_what_a_region_is_called_fits_it_alone():
    sampler = ConversationSampler(ClassStatistics.of(IMAGES), mix={"refer": 3})
    seen = 0
    for view, talk, _, text, answer in turns_of(sampler):
        assert sum(task == "refer" for task in talk.tasks) == 3
        region = talk.regions[placeholders(text)[0] - 1].bounds(200, 120)
        name = owner(view, region)
        assert name in answer
        assert answer.startswith("the ")
        if "leftmost" in answer:
            seen += 1
            alike = [each.box[0] for each in view.by_category[name]]
            assert abs(min(alike) - region[0]) < 5
    assert seen > 1


def test_lists_are_true_and_whole():
    sampler = ConversationSampler(ClassStatistics.of(IMAGES), mix={"locate_each": 2, "presence_each": 2})
    seen: Counter[str] = Counter()
    for view, talk, task, text, answer in turns_of(sampler):
        classes = [owner(view, region.bounds(200, 120)) for region in talk.regions]
        offered, items = placeholders(text), answer.split(", ")
        seen[task] += len(items)
        for item in items:
            name, _, found = item.rpartition(" ")
            assert name in text
            if task == "locate_each":
                assert [n for n in offered if classes[n - 1] == name] == [int(found.strip("[]"))]
            else:
                assert (found == "yes") == (name in view.by_category)
                seen[found] += 1
    assert seen["locate_each"] > 60
    assert seen["presence_each"] > 200
    assert 0.4 < seen["yes"] / seen["presence_each"] < 0.6


def test_rare_classes_come_first_where_there_are_more_objects_than_slots():
    (one,) = made(0, 1).objects
    crowd = [replace(one, id=k, category="toaster" if k == 7 else "person") for k in range(19)]
    image = replace(made(0, 1), objects=tuple(crowd))
    sampler = ConversationSampler(ClassStatistics.of([image] * 20), mix={"classify": 5}, regions_per_image=5)
    asked = [m["content"] for k in range(40) for m in sampler.sample(View(image), {}, 0, k, 0).messages[1::2]]
    assert sum("toaster" in answer for answer in asked) > 30


def test_captions_only_where_they_stay_true():
    image = made(3, captions=("A dog on the left of a car.", "A dog by a car."))
    sampler = ConversationSampler(ClassStatistics.of([image]), mix={"image_caption": 1, "presence": 0.01})

    def captions(view):
        talks = [sampler.sample(view, {}, 0, 0, epoch) for epoch in range(10)]
        told = [pair for talk in talks for pair in zip(talk.tasks, talk.messages[1::2], strict=True)]
        return {said["content"] for task, said in told if task == "image_caption"}

    assert captions(View(image)) == set(image.captions)
    assert captions(View(image, flip=True)) == {"A dog by a car."}
    assert captions(View(image, crop=(0, 0, 100, 120))) == set()


@pytest.mark.parametrize("flip", [False, True])
def test_every_sentence_is_read_back_and_none_of_its_claims_is_false(flip):
    asked = ("where", "size", "colour", "check", "compare", "count", "other")
    mix = {"classify": 4, "describe": 8, "caption": 4, "relation": 6, "presence": 8, "image_caption": 2}
    mix |= dict.fromkeys(asked, 3)
    sampler = ConversationSampler(ClassStatistics.of(IMAGES), mix)
    kinds: Counter[str] = Counter()
    for index, image in enumerate(IMAGES):
        view = View(image, (20, 10, 180, 110), flip)
        colours = {each.id: COLOURS[each.id % 11] for each in image.objects if each.id % 3}
        for epoch in range(3):
            words = {each.id: OBJECT for each in image.objects[::2]} if epoch else None
            talk = sampler.sample(view, colours, 0, index, epoch, words)
            for asked, said, task in zip(talk.messages[::2], talk.messages[1::2], talk.tasks, strict=True):
                claims, unread = read("describe" if task == "caption" else task, said["content"])
                assert not unread
                assert claims or said["content"] in (UNKNOWN, UNNAMED, "An object.")
                kinds.update(claim.kind for claim in claims)
                numbers = placeholders(asked["content"])
                about = [closest(view, talk.regions[number - 1].bounds(160, 100)) for number in numbers]
                if task == "relation":  # regions are cited by the numbers of the conversation
                    about = [closest(view, region.bounds(160, 100)) for region in talk.regions]
                    names = [about[number - 1] for number in numbers]
                    about = about if "Region" in said["content"] else names
                wanted = max((c for c in COCO_80 if re.search(rf"\b{c}\b", asked["content"])), key=len, default="")
                assert not any(holds(claim, view, about, colours, wanted) is False for claim in claims), said
    assert set(kinds) == {"class", "size", "place", "relation", "presence"}


def test_a_crowd_is_there():
    view = View(annotated(("person", (0, 0, 50, 50), {"iscrowd": True})))
    assert say_presence(np.random.default_rng(0), view, "person").startswith("Yes")


def test_descriptions_say_what_the_region_itself_shows():
    view = View(annotated(("dog", (0, 0, 30, 30)), ("cup", (60, 0, 80, 20)), ("cup", (60, 60, 80, 80))))
    rng = np.random.default_rng(0)
    texts = {describe(rng, view, view.objects[0], brief=k % 3 == 0) for k in range(300)}
    assert len(texts) > 20
    for text in texts:
        assert "dog" in text
        assert not any(wrong in text for wrong in ("{", "  ", "cup", "only", "None", "lower", "right"))
        assert text.endswith(".")


def test_what_a_blank_image_does_not_show_is_declined():
    for index, image in enumerate(IMAGES):
        talk = SAMPLER.sample(View(image), {}, 0, index, 0)
        blank = of_blank(talk)
        if blank is None:
            continue
        texts = [message["content"] for message in blank.messages]
        assert texts[0].startswith("<image>\n")
        assert "".join(texts).count("<image>") == 1
        for said, task in zip(texts[1::2], blank.tasks, strict=True):
            assert said == ("No." if task == "presence" else UNKNOWN)


def test_what_is_evaluated_off_topic_is_not_trained_on():
    assert not set(OFF_TOPIC["trained"]) & set(OFF_TOPIC["asked"])

"""What sentences call an object: the words follow the certainty, and change nothing else of a conversation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from alignment import ClassWords
from conversations import ClassStatistics, ConversationSampler
from features import FeatureStore
from naming import Namer, certainty, group_shares
from pictures import annotated
from test_dataset import nano_like  # noqa: F401  # a fixture

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import GROUPS, OBJECT, UNKNOWN, View, read
from regiongpt.prompts import COCO_80


def test_the_certainty_is_the_lowest_above_which_enough_is_right():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32)
    right = np.array([True, True, False, True, False])
    assert certainty(scores, right, 0.9) == pytest.approx(0.8)
    assert certainty(scores, right, 0.75) == pytest.approx(0.6)
    assert certainty(scores, right, 0.5) == pytest.approx(0.5)
    assert certainty(scores, ~right, 0.99) == float("inf")


def test_a_wider_word_is_as_likely_as_its_classes_together():
    shares = np.zeros((1, 80), np.float32)
    shares[0, [COCO_80.index("cat"), COCO_80.index("dog"), COCO_80.index("person")]] = 0.3, 0.4, 0.3
    assert dict(zip(GROUPS, group_shares(shares)[0].tolist(), strict=True))["animal"] == pytest.approx(0.7)


def test_objects_are_called_by_their_words():
    image = annotated(("dog", (10, 10, 40, 50)), ("car", (50, 20, 95, 60)), ("book", (5, 60, 20, 80)))
    mix = {"classify": 3, "describe": 3, "relation": 2, "check": 3}
    sampler = ConversationSampler(ClassStatistics.of([image]), mix=mix)
    view = View(image)
    words = {image.objects[0].id: "animal", image.objects[2].id: "object"}
    seen = set()
    for epoch in range(40):
        hedged = sampler.sample(view, {}, 0, 0, epoch, words)
        for task, asked, answer in zip(hedged.tasks, hedged.messages[::2], hedged.messages[1::2], strict=True):
            text = answer["content"]
            if task == "relation":
                assert text == UNKNOWN
            elif text not in COCO_80:
                assert "dog" not in text or text.startswith("Yes") or "dog" in asked["content"]
                assert not read(task, text)[1], text
                seen |= {claim.value for claim in read(task, text)[0] if claim.kind == "class"}
    assert {"animal", "car", "another"} <= seen


@pytest.fixture
def namer(nano_like) -> tuple[Namer, FeatureStore, list[ImageAnnotations]]:  # noqa: F811
    """Of an untrained model, and one image of five objects."""
    model, processor = nano_like
    objects = [(name, (5 * k, 10, 5 * k + 30, 60)) for k, name in enumerate(("dog", "cat", "book", "dog", "car"))]
    features = torch.randn(1, 1, 352 + 4 * 120 + 4 * 48 + 16, 2, 2, generator=torch.Generator().manual_seed(0))
    store = FeatureStore(features.half().numpy(), [{}])
    return Namer(model, processor, ClassWords(processor.tokenizer)), store, [annotated(*objects)]


@pytest.mark.parametrize("sure", [0.0, 0.5, 1.0])
def test_the_words_of_objects_are_true_and_as_many_as_asked_for(namer, sure):
    says, store, (image,) = namer
    says.measure([image], store, sure, {1})
    view = View(image)
    spoken = says.words(view, store.row(0, 0), None, [False] * len(view.askable))
    assert spoken == says.words(view, store.row(0, 0), None, [True] * len(view.askable))
    rows = says.confused.sum(1)
    assert rows[COCO_80.index("dog")] == pytest.approx(1)
    assert rows[COCO_80.index("bus")] == 0
    classes = {each.id: each.category for each in image.objects}
    assert all(word == OBJECT or classes[key] in GROUPS[word] for key, word in spoken.items())
    assert set(spoken) <= set(classes)
    assert len(spoken) == 0 if sure == 0 else len(spoken) > 0


def test_words_follow_what_is_seen_and_the_model_as_it_was(namer, nano_like):  # noqa: F811
    says, store, (image,) = namer
    view, features = View(image), store.row(0, 0)
    before = says.shares(view, features, None)
    assert not np.allclose(before, says.shares(view, 3 * features.flip(0), None))
    parameter = next(iter(nano_like[0].connector.parameters()))
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    assert np.array_equal(before, says.shares(view, features, None))
    with torch.no_grad():
        parameter.copy_(kept)
    says.least = [(2.0, 2.0), (0.0, 0.0)]
    spoken = says.words(view, features, None, [False, True, False, True, True])
    assert list(spoken) == [each.id for each, second in zip(view.askable, (0, 1, 0, 1, 1), strict=True) if not second]


def test_what_is_taken_for_a_present_class_is_asked_about_and_yes_as_often_as_set():
    image = annotated(("dog", (10, 10, 40, 50)))
    statistics = ClassStatistics.of([image])
    confused = np.zeros((80, 80))
    confused[COCO_80.index("dog"), COCO_80.index("cat")] = 1.0
    rng = np.random.default_rng(0)
    tempting = replace(statistics, confused=confused)
    assert {tempting.absent(rng, View(image), "tempting") for _ in range(20)} == {"cat"}
    assert len({statistics.absent(rng, View(image), "tempting") for _ in range(20)}) > 5
    sampler = ConversationSampler(statistics, mix={"presence": 50}, present_share=0.9)
    answers = [m["content"] for m in sampler.sample(View(image), {}, 0, 0, 0).messages[1::2]]
    assert 40 <= sum(answer.startswith("Yes") for answer in answers) < 50


def test_common_classes_are_asked_for_in_vain_too_and_regions_held_against_what_they_are_taken_for():
    crowd = [annotated(*[("person", (k, 10, k + 8, 50)) for k in range(0, 80, 8)]) for _ in range(300)]
    image = annotated(("dog", (10, 10, 40, 50)))
    statistics = ClassStatistics.of([*crowd, image])
    rng = np.random.default_rng(0)
    drawn = {how: [statistics.absent(rng, View(image), how) for _ in range(40)] for how in ("common", "any")}
    assert drawn["common"].count("person") > 25 > 5 > drawn["any"].count("person")
    assert "dog" not in drawn["common"] + drawn["any"]
    confused = np.zeros((80, 80))
    confused[COCO_80.index("dog"), COCO_80.index("cat")] = 1.0
    taken = [replace(statistics, confused=confused).taken_for(rng, "dog") for _ in range(40)]
    assert 10 < taken.count("cat") < 40
    assert "dog" not in taken

"""Facts on hand-made views: each is checked where it is clear, and silent where it is not."""

import json
from collections import Counter

import numpy as np
import pytest
from expressions import distinctions, neighbours
from pictures import annotated
from PIL import Image

from regiongpt.data.facts import (
    Claim,
    View,
    clashing,
    colour_name,
    colours_of,
    holds,
    noun,
    place_name,
    plural,
    read,
    relation,
    size_name,
    with_article,
)
from regiongpt.errors import DataError
from regiongpt.evaluate.facts import Facts
from regiongpt.evaluate.task import Answer, Item, Result


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((10, 10, 12), "black"), ((245, 245, 240), "white"), ((128, 130, 127), "grey"), ((200, 20, 25), "red"),
        ((245, 130, 20), "orange"), ((240, 220, 40), "yellow"), ((30, 140, 40), "green"), ((30, 60, 200), "blue"),
        ((120, 40, 170), "purple"), ((250, 150, 170), "pink"), ((110, 70, 40), "brown"), ((225, 200, 165), None),
    ],
)  # fmt: skip
def test_plain_paints_have_their_names(rgb, name):
    assert colour_name(np.full((50, 3), rgb, dtype=np.uint8)) == name


def test_a_colour_must_dominate():
    red, blue, beige = (200, 20, 25), (30, 60, 200), (225, 200, 165)

    def mixed(*parts):
        return colour_name(np.repeat(np.array([p[0] for p in parts], np.uint8), [p[1] for p in parts], axis=0))

    assert mixed((red, 60), (blue, 37)) == "red"
    assert mixed((red, 60), (blue, 40)) is None
    assert mixed((red, 44), (beige, 20), (blue, 20), ((10, 10, 10), 16)) is None
    assert mixed(((10, 10, 10), 58), (red, 22), (blue, 20)) is None
    assert colour_name(np.zeros((0, 3), np.uint8)) is None


def test_colours_come_from_the_object_and_not_from_what_lies_over_it():
    pixels = np.full((100, 100, 3), (30, 140, 40), np.uint8)
    pixels[10:50, 10:90] = (200, 20, 25)  # a car ...
    pixels[15:45, 30:50] = (30, 60, 200)  # ... with a suitcase before it
    ring = {"polygons": ((60.0, 60.0, 90.0, 60.0, 60.0, 90.0),)}
    pixels[60:90, 60:90][np.add.outer(np.arange(30), np.arange(30)) < 30] = (240, 220, 40)
    image = annotated(
        ("car", (10, 10, 90, 50)), ("suitcase", (30, 15, 50, 45)), ("dog", (60, 60, 90, 90), ring),
        ("person", (0, 60, 40, 100)), ("cup", (50, 60, 54, 64)),
    )  # fmt: skip
    assert colours_of(image, pixels) == {1: "red", 2: "blue", 3: "yellow"}
    with pytest.raises(DataError, match=r"\(100, 100, 3\), got \(50, 100, 3\)"):
        colours_of(image, pixels[:50])


@pytest.mark.parametrize(
    ("box", "size", "place"),
    [
        ((0, 0, 5, 5), "tiny", "in the upper left"),
        ((45, 45, 60, 60), "small", "in the centre"),
        ((70, 40, 100, 60), "medium-sized", "on the right"),
        ((30, 60, 70, 100), "large", "at the bottom"),
        ((5, 5, 95, 95), "huge", "across most"),
        ((0, 0, 100, 30), "large", "across the top"),
        ((0, 0, 20, 100), "large", "on the left side"),
        ((30, 0, 40, 10), "small", "in the upper part"),
        ((30, 58, 40, 72), "small", "in the lower half"),
        ((32, 30, 36, 38), "tiny", "in the upper half"),
        ((34, 45, 36, 47), "tiny", "in the left half"),
    ],
)
def test_size_and_place(box, size, place):
    assert size_name(box, 100, 100) == size
    assert place_name(box, 100, 100) == place


@pytest.mark.parametrize(
    ("a", "b", "how"),
    [
        ((0, 40, 10, 60), (50, 40, 60, 60), "to the left of"),
        ((50, 40, 60, 60), (0, 40, 10, 60), "to the right of"),
        ((40, 0, 60, 10), (40, 50, 60, 60), "above"),
        ((40, 50, 60, 60), (40, 0, 60, 10), "below"),
        ((0, 0, 10, 10), (50, 50, 60, 60), "above and to the left of"),
        ((20, 20, 30, 30), (10, 10, 60, 60), "inside"),
        ((10, 10, 60, 60), (20, 20, 30, 30), "around"),
        ((0, 0, 40, 40), (20, 5, 60, 45), "overlapping"),
        ((0, 0, 40, 40), (28, 28, 70, 70), None),
    ],
)
def test_relations(a, b, how):
    assert relation(a, b) == how


def test_mirroring_a_view_mirrors_its_relations():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = np.sort(rng.uniform(0, 100, (2, 2, 2)), axis=1)
        image = annotated(*(("cup", (c[0][0], c[0][1], c[1][0], c[1][1])) for c in corners))
        straight, mirrored = View(image).objects, View(image, flip=True).objects
        how = relation(straight[0].box, straight[1].box)
        swapped = relation(mirrored[0].box, mirrored[1].box)
        side = {"left": "right", "right": "left"}
        expected = how and " ".join(side.get(word, word) for word in how.split())
        assert swapped == expected


def test_a_view_maps_boxes_and_rings_by_crop_then_flip():
    ring = (20.0, 10.0, 40.0, 10.0, 40.0, 30.0)
    image = annotated(("dog", (20, 10, 40, 30), {"polygons": (ring,)}), width=100, height=80)
    view = View(image, crop=(10, 5, 60, 45), flip=True)
    assert (view.width, view.height) == (50, 40)
    assert view.objects[0].box == (20, 5, 40, 25)
    assert view.rings(view.objects[0]) == [[40, 5, 20, 5, 20, 25]]
    assert view.coverage == pytest.approx(0.25)
    with pytest.raises(DataError, match="inside 100x80"):
        View(image, crop=(10, 5, 10, 45))


def test_what_a_crop_leaves_too_little_of_is_neither_there_nor_absent():
    image = annotated(
        ("dog", (0, 0, 10, 10)), ("dog", (60, 0, 80, 10)), ("cup", (48, 0, 58, 10)), ("cat", (40, 0, 54, 10))
    )
    view = View(image, crop=(0, 0, 50, 100))
    assert [o.category for o in view.objects] == ["dog", "cat"]
    assert view.maybe == {"cup"}
    assert (view.count("dog"), view.count("cup"), view.count("bus")) == (1, None, 0)


def test_crowds_are_seen_but_neither_counted_nor_asked_about():
    view = View(annotated(("person", (0, 0, 50, 50), {"iscrowd": True}), ("person", (60, 0, 90, 90))))
    assert [o.id for o in view.askable] == [2]
    assert view.count("person") is None
    assert distinctions(view, view.objects[1], {}) == []


def test_neighbours_are_near_clear_and_of_different_classes():
    bottles = [("bottle", (left, 40, left + 10, 50)) for left in (55, 90)]
    view = View(annotated(("cup", (40, 40, 50, 50)), *bottles, ("cat", (40, 60, 50, 70))))
    found = [(o.id, how) for o, how in neighbours(view, view.objects[0])]
    assert found == [(2, "to the left of"), (4, "above")]


def test_distinctions_hold_for_one_object_alone():
    cars = [("car", box) for box in ((0, 40, 20, 60), (40, 40, 60, 60), (78, 40, 98, 62))]
    view = View(annotated(*cars, ("dog", (45, 80, 55, 90))))
    first, second, third, dog = view.objects
    colours = {1: "red", 2: "green", 3: "green"}
    assert distinctions(view, dog, colours) == [("class", "")]
    assert distinctions(view, first, colours) == [("colour", "red"), ("place", "on the left"), ("most", "left")]
    assert distinctions(view, second, colours) == [("place", "in the centre")]
    assert ("most", "right") in distinctions(view, third, colours)
    assert not any(kind == "colour" for kind, _ in distinctions(view, third, colours))
    assert not any(kind == "colour" for kind, _ in distinctions(view, first, {1: "red", 2: "green"}))


def test_largest_and_relation_to_a_single_anchor():
    view = View(annotated(("cup", (10, 40, 30, 60)), ("cup", (68, 44, 78, 54)), ("tv", (40, 40, 60, 60))))
    assert ("most", "large") in distinctions(view, view.objects[0], {})
    assert ("relation", "to the left of|tv") in distinctions(view, view.objects[0], {})
    assert ("relation", "to the right of|tv") in distinctions(view, view.objects[1], {})


def test_colours_that_may_pass_for_each_other_clash():
    assert [clashing("red", other) for other in ("orange", None, "green")] == [True, True, False]


def test_nouns():
    assert [plural(c) for c in ("person", "bus", "knife", "skis", "sandwich", "sheep")] == [
        "people", "buses", "knives", "pairs of skis", "sandwiches", "sheep",
    ]  # fmt: skip
    assert with_article(noun("skis", "small", "black")) == "a pair of small black skis"
    assert with_article(noun("orange")) == "an orange"


@pytest.fixture(scope="module")
def judged_view() -> tuple[View, dict[int, str]]:
    """Two dogs, the left one brown, on the left and in the lower right; a cup in the centre; a crowd of people."""
    view = View(
        annotated(
            ("dog", (2, 40, 22, 60)), ("dog", (78, 78, 98, 98)), ("cup", (47, 47, 53, 53)),
            ("person", (40, 0, 60, 10), {"iscrowd": True}),
        )
    )  # fmt: skip
    return view, {1: "brown"}


@pytest.mark.parametrize(
    ("task", "text", "true"),
    [
        ("classify", "dog", [True]),
        ("classify", "It is a cat.", [False]),
        ("classify", "I can't tell.", []),
        ("describe", "A brown dog on the left of the image.", [True, True, True]),
        ("describe", "A green dog in the lower left.", [True, False, False]),
        ("describe", "This is a black dog at the top of the photo.", [True, None, False]),
        ("describe", "There is a large dog in the left half.", [True, False, True]),
        ("describe", "A dog. It takes up a fair part of the image.", [True, True]),
        ("describe", "A dog. It is in the lower half of the picture.", [True, None]),
        ("relation", "The dog is to the left of the cup.", [True, True, True]),
        ("relation", "It is below the cup.", [False, True]),
        ("relation", "Region [1] and Region [2] overlap.", [False]),
        ("relation", "Both are cups; Region [2] is above Region [1].", [True, False, False]),
        ("relation", "Region [1] is to the left of Region [3].", [False]),
        ("relation", "Region [2] and Region [2] overlap.", [False]),
        ("compare", "Yes, it is bigger in the image.", [True]),
        ("compare", "No, they are about the same size in the image.", [False]),
        ("check", "Yes, it is a dog.", [True]),
        ("check", "No, it is a small cat.", [False, False]),
        ("check", "No, it is something else.", [False]),
        ("describe", "A medium-sized brown animal on the left. It is on the left.", [True, True, True, True]),
        ("describe", "A piece of food.", [False]),
        ("describe", "A brown object on the left.", [True, True]),
        ("classify", "It is something I can't name.", []),
        ("colour", "It is brown.", [True]),
        ("where", "It is on the right.", [False]),
        ("size", "It fills much of the image.", [False]),
        ("image_caption", "There is a cup, a dog and a pair of skis.", [True, True, False]),
        ("presence", "No.", [False]),
        ("presence", "Yes, I can see a dog.", [True]),
        ("presence", "Yes, there is a cat in the photo.", [False]),
        ("presence", "No, I can't see any buses.", [True]),
    ],
)
def test_claims_are_read_and_held_against_the_view(judged_view, task, text, true):
    view, colours = judged_view
    claims, unread = read(task, text)
    assert not unread
    regions = [view.objects[0], view.objects[2]] if task in ("relation", "compare", "presence") else view.objects[:1]
    assert [holds(claim, view, regions, colours, "dog") for claim in claims] == true


def test_what_no_template_writes_is_not_read():
    assert read("describe", "A dog. It barks. Dog?")[1] == ["It barks.", "Dog?"]
    assert read("presence", "Maybe.") == ([], ["Maybe."])
    assert read("relation", "Region [0] is above Region [1].") == ([], ["Region [0] is above Region [1]."])


def test_a_place_and_its_name_agree():
    rng = np.random.default_rng(0)
    for _ in range(300):
        x, y = np.sort(rng.uniform(0, 100, (2, 2)), axis=1)
        view = View(annotated(("cup", (x[0], y[0], x[1], y[1]))))
        place = place_name(view.objects[0].box, 100, 100)
        assert place is None or holds(Claim("place", place), view, view.objects, {})


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> tuple[Facts, list[Item]]:
    """A brown dog on the left, and a cup in the centre, of one image."""
    root = tmp_path_factory.mktemp("facts")
    (root / "images").mkdir()
    pixels = np.full((100, 200, 3), (225, 200, 165), np.uint8)
    pixels[30:70, 5:45] = (110, 70, 40)
    Image.fromarray(pixels).save(root / "images" / "1.png")
    boxes = {7: ("dog", [5, 30, 40, 40]), 8: ("cup", [90, 40, 20, 20])}
    names = {"dog": 18, "cup": 47}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 200, "height": 100}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": names[name], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, (name, box) in boxes.items()
        ],
        "categories": [{"id": number, "name": name} for name, number in names.items()],
    }
    (root / "instances_dev.json").write_text(json.dumps(content))
    task = Facts(data=root)
    return task, task.items()


def scores(facts: tuple[Facts, list[Item]], said: dict[str, str]) -> Result:
    task, items = facts
    return task.score(items, {item.id: Answer(text=said.get(item.id, "")) for item in items}, resamples=0)


def test_every_object_some_pairs_and_as_many_classes_as_are_not_there_are_asked_about(facts):
    _, items = facts
    asked = Counter(item.groups["question"] for item in items)
    assert asked == dict.fromkeys(
        ("describe", "brief", "classify", "ask", "relation", "compare", "where", "size", "colour", "check", "other"), 2
    ) | {"presence": 4, "count": 1, "image": 1}
    assert [item.truth for item in items if item.groups["question"] == "presence"][:2] == ["cup", "dog"]


def test_the_share_of_true_claims_stands_beside_what_a_constant_would_reach(facts):
    said = {
        "describe-1-7": "A brown dog on the left of the image.",
        "describe-1-8": "A blue dog. It is on the left of the image.",
        "relation-1-7-8": "Region [1] is to the left of Region [2].",
        "relation-1-8-7": "Region [1] is to the left of Region [2].",
        "presence-1-dog": "Yes, there is a dog in the image.",
        "presence-1-cup": "No. I see none.",
    }
    result = scores(facts, said)
    found = {
        name: {k: (v["value"], v["of"]) for k, v in each.items()} for name, each in result.data["protocols"].items()
    }
    half = {"true": (0.5, 2), "constant": (0.5, 2), "undecided": (0.0, 2)}
    assert found["claims, class"] == found["claims, place"] == found["claims, relation"] == half
    assert found["claims, colour"] == {"true": (1.0, 1), "constant": (1.0, 1), "undecided": (0.5, 2)}
    assert found["claims, presence"]["true"] == (0.5, 2)
    assert "claims, size" not in found
    assert any("1 sentence not parsed, so not judged: 'I see none.' (1)" in note for note in result.data["notes"])
    (rows,) = result.data["tables"].values()
    assert ["colour", "blue", "1", "0", "0", "1", "0.0"] in rows
    assert ["class", "dog", "2", "1", "1", "0", "50.0"] in rows


def test_what_is_declined_of_what_can_and_can_not_be_answered(facts):
    asked = [item.id for item in facts[1] if item.groups["question"] in ("count", "colour")]
    unknown = ("classify-1-7", *asked)
    found = scores(facts, dict.fromkeys(unknown, "I can't tell.")).data["protocols"]["declined"]
    assert found["answerable"]["value"] == 1 / found["answerable"]["of"]
    assert (found["unanswerable"]["value"], found["unanswerable"]["of"]) == (1 / 3, 3)


def test_answers_about_one_region_agree_or_not(facts):
    said = {
        "classify-1-7": "dog", "describe-1-7": "A dog.", "brief-1-7": "A cat.", "ask-1-7": "It is a dog.",
        "classify-1-8": "cup", "describe-1-8": "A piece of tableware.", "ask-1-8": "Cup!", "brief-1-8": "An object.",
        "presence-1-dog": "Yes.", "presence-1-cup": "No.", "image-1-0": "There is a dog.",
    }  # fmt: skip
    figures = scores(facts, said).data["protocols"]["agreement"]
    shares = {name.split()[0]: (each["value"], each["of"]) for name, each in figures.items()}
    assert shares == {"describe": (1.0, 2), "brief": (0.0, 1), "ask": (1.0, 1), "presence": (0.5, 2)}
    named = scores(facts, said).data["protocols"]["named"]
    assert {name: each["value"] for name, each in named.items()} == {"class": 0.5, "wider word": 0.5}


def test_a_choice_among_given_names_is_no_claim(facts):
    found = scores(facts, {"classify-1-7": "cup", "describe-1-7": "A dog."}).data["protocols"]
    assert found["claims, class"]["true"] == found["claims, all"]["true"]
    assert (found["claims, class"]["true"]["value"], found["claims, class"]["true"]["of"]) == (1.0, 1)

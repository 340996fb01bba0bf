"""The benchmarks: which questions they ask, and what they make of answers."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import need_java
from PIL import Image

from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate import caption_metrics, task_class
from regiongpt.evaluate.choosing import candidates_of, read_proposals
from regiongpt.evaluate.pope import build_questions
from regiongpt.evaluate.predictions import read_predictions
from regiongpt.evaluate.run import load_items
from regiongpt.evaluate.task import Answer, Result, Task
from regiongpt.prompts import NO_MATCH
from regiongpt.regions import Region

NAMES = ("cat", "dog", "bird", "car", "bus", "cup", "fork", "spoon")


def dump(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def photos(folder: Path, objects: Mapping[int, list[tuple[int, list[float]]]], **more: Any) -> Path:
    """A folder with instances_dev.json: by image id, categories and boxes; images of 200 x 100 pixels."""
    (folder / "images").mkdir(exist_ok=True)
    annotations = []
    for image, those in objects.items():
        for category, box in those:
            number = 10 * image + len([a for a in annotations if a["image_id"] == image])
            area = box[2] * box[3]
            each = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
            annotations.append(each)
    content = {
        "images": [{"id": k, "file_name": f"{k:012d}.jpg", "width": 200, "height": 100} for k in objects],
        "annotations": annotations + more.get("annotations", []),
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES, 1)],
    }
    dump(folder / "instances_dev.json", content)
    return folder


def values(result: Result, protocol: str) -> dict[str, float | None]:
    return {name: each["value"] for name, each in result.data["protocols"][protocol].items()}


def classes(folder: Path, **options: Any) -> Task:
    return task_class("coco_cls")(data=folder, split="dev", label_set="things", **options)


@pytest.fixture
def two_images(tmp_path: Path) -> Path:
    crowd = {"id": 90, "image_id": 1, "category_id": 1, "bbox": [150, 0, 40, 40], "area": 900, "iscrowd": 1}
    broken = {"id": 91, "image_id": 1, "category_id": 2, "bbox": [500, 0, 10, 10], "area": 100, "iscrowd": 0}
    objects = {1: [(1, [0, 0, 20, 20]), (2, [40, 0, 50, 50])], 2: [(1, [0, 0, 100, 100])]}
    return photos(tmp_path, objects, annotations=[crowd, broken])


def test_asks_about_each_object_but_crowds(two_images: Path) -> None:
    task = classes(two_images)
    items = task.items()
    assert [(item.id, item.truth, item.groups["size"]) for item in items] == [
        ("10", "cat", "small"),
        ("11", "dog", "medium"),
        ("20", "cat", "large"),
    ]
    assert items[0].question.endswith("Answer the question using things category names.")
    assert items[0].choices == NAMES
    assert task.left_out.counts == {"box outside the image": 1, "crowd": 1}
    assert [item.id for item in classes(two_images, limit=1).items()] == ["10", "11"]
    assert not classes(two_images, choices=False).items()[0].choices
    assert classes(two_images, guided=False).items()[0].question == items[0].question.split(" Answer the")[0]


def test_three_protocols_by_hand(two_images: Path) -> None:
    task = classes(two_images)
    items = task.items()

    def scores(best: str, value: float) -> tuple[float, ...]:
        return tuple(value if name == best else (1 - value) / (len(NAMES) - 1) for name in NAMES)

    answers = {
        "10": Answer(text="cat.", probability=0.9, scores=scores("cat", 0.9)),
        "11": Answer(text="Dog", probability=0.8, scores=scores("dog", 0.8)),
        "20": Answer(text="dog", probability=0.4, scores=scores("dog", 0.4)),
    }
    result = task.score(items, answers, resamples=10)
    assert list(result.data["protocols"]) == ["generate and match", "generate with probability", "score all choices"]
    matched = values(result, "generate and match")
    assert (matched["accuracy"], matched["valid_answers"], matched["class_average"]) == pytest.approx(
        (1 / 3, 2 / 3, 1 / 4)
    )
    # One of two cats is found, and not the dog: "Dog" is not in the list, and the other answer is elsewhere.
    assert matched["AP"] == pytest.approx((51 / 101 + 0) / 2)
    assert values(result, "score all choices")["accuracy"] == pytest.approx(2 / 3)
    assert values(result, "score all choices")["AP"] == pytest.approx(1)
    assert any("1 answer not in the list, most often 'Dog' (1)" in note for note in result.data["notes"])
    table = result.data["tables"]["Confusion matrix, generate and match"]
    assert table[1:] == [["cat", "1", "1", "0"], ["dog", "0", "0", "1"]]
    assert result.rows[1]["scores"]["generate and match.accuracy"] == 0
    assert result.data["breakdowns"]["generate and match"]["size"]["small"]["accuracy"] == 1
    json.dumps(result.data)


def test_answers_decide_which_protocols_there_are(two_images: Path) -> None:
    task = classes(two_images)
    items = task.items()
    for probability, note in (
        (None, "2 of 3 items have no answer and count as wrong (annotation ids 11, 20)"),
        (0.5, "'generate with probability' is not measured: 2 answers without a probability (annotation ids 11, 20)"),
    ):
        said = {item.id: Answer(text="cat") for item in items[: 1 if probability is None else None]}
        result = task.score(items, {**said, "10": Answer(text="cat", probability=probability)}, resamples=0)
        assert list(result.data["protocols"]) == ["generate and match"]
        assert note in result.data["notes"]
    with pytest.raises(DataError, match="item 10: 2 scores, not 8"):
        task.score(items, {"10": Answer(scores=(0.5, 0.5))})
    with pytest.raises(DataError, match="no item has an answer"):
        task.score(items, {})


def test_masks_and_the_list_of_names(two_images: Path) -> None:
    with pytest.raises(DataError, match="no objects to ask about"):
        classes(two_images, region="mask").items()
    with pytest.raises(ConfigError, match="region: input should be 'box' or 'mask', got 'both'"):
        classes(two_images, region="both")
    content = json.loads((two_images / "instances_dev.json").read_text())
    content["categories"].append({"id": 99, "name": "spoonful"})
    dump(two_images / "instances_dev.json", content)
    with pytest.raises(ConfigError, match="COCO-80 has no category spoonful"):
        task_class("coco_cls")(data=two_images, split="dev").items()
    with pytest.raises(DataError, match=r"instances_val2017\.json .*--annotations"):
        task_class("coco_cls")(data=two_images).items()


def test_lvis_names_its_images_by_their_address(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "000000000005.jpg").touch()
    image = {"id": 5, "width": 100, "height": 100, "coco_url": "http://images.cocodataset.org/val2017/000000000005.jpg"}
    content = {
        "images": [image],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9]]}
        ],
        "categories": [{"id": 3, "name": "aerosol_can"}],
    }
    dump(tmp_path / "lvis.json", content)
    task = task_class("coco_cls")(
        data=tmp_path, split="val2017", annotations=tmp_path / "lvis.json", label_set="LVIS", region="mask"
    )
    (item,) = task.items()
    assert item.image == tmp_path / "val2017" / "000000000005.jpg"
    assert item.regions[0].kind == "polygon"
    answers = {"1": Answer(text="aerosol_can")}
    assert "LVIS" not in task.score([item], answers, resamples=0).data["pinned"]["scorer"]

    content["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    content["categories"][0]["frequency"] = "c"
    dump(tmp_path / "lvis.json", content)
    result = task.score(task.items(), answers, resamples=0)
    assert "LVIS' rules" in result.data["pinned"]["scorer"]
    assert values(result, "generate and match")["AP_common"] == pytest.approx(1)
    assert values(result, "generate and match")["AP_rare"] is None
    assert [result.data["protocols"]["generate and match"][f"AP_{part}"]["of"] for part in ("rare", "common")] == [0, 1]


def line(image: int, ann: int, text: str, box: list[float] | None = None) -> str:
    return json.dumps({"image_id": image, "ann_id": ann, "bbox_xywh": box or [10, 10, 50, 40], "sent": text})


@pytest.fixture
def expressions(tmp_path: Path) -> Path:
    lines = [line(1, 7, "the red dog"), line(1, 7, "dog on the left"), line(1, 8, "a cat", [70, 10, 20, 20])]
    lines += [line(2, 9, "a bus"), line(2, 9, "..."), line(2, 6, "!"), line(2, 5, "no box", [0, 0, 0, 5])]
    (tmp_path / "refs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def captions(folder: Path, **options: Any) -> Task:
    need_java()
    given = {"metrics": ("CIDEr", "ROUGE_L"), **options}
    return task_class("refcocog_caption")(data=folder, refs=folder / "refs.jsonl", images=folder, **given)


def test_references_are_grouped_as_said(expressions: Path) -> None:
    task = captions(expressions)
    items = task.items()
    assert {item.id: item.detail["references"] for item in items} == {
        "7": ["the red dog", "dog on the left"],
        "8": ["a cat"],
        "9": ["a bus"],
    }
    assert task.left_out.counts == {"reference without words": 2, "box without size": 1}
    alone = captions(expressions, grouping="expression").items()
    assert [item.detail["references"] for item in alone] == [["the red dog"], ["dog on the left"], ["a cat"], ["a bus"]]
    result = task.score(items, {"7": Answer(text="The red dog."), "8": Answer(text="a cat")}, resamples=20)
    assert [row["scores"]["generate.ROUGE_L"] for row in result.rows] == pytest.approx([1, 1, 0])
    assert "all expressions of an object" in result.data["pinned"]["references"]
    assert any("1 of 3 items has no answer" in note for note in result.data["notes"])
    with pytest.raises(ConfigError, match=r"metrics\.0: input should be 'METEOR'"):
        captions(expressions, metrics=("BERT",))


def test_what_scoring_needs_is_asked_for_before_the_answers(expressions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_java()
    task = captions(expressions)
    monkeypatch.setattr(caption_metrics, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(expressions))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ConfigError, match="Java, which was not found; install it with"):
        task.items()


def test_visual_genome_by_split(tmp_path: Path) -> None:
    need_java()
    (tmp_path / "images").mkdir()
    box = {"x": 3, "y": 4, "width": 20, "height": 10}
    described = [
        {
            "id": k,
            "regions": [
                {"region_id": 10 * k + n, "image_id": k, "phrase": f"phrase {n}", **box, "x": 3 if n < 2 else 9}
                for n in range(3)
            ],
        }
        for k in (1, 2)
    ]
    sizes = [{"image_id": k, "width": 80, "height": 60, "url": f"https://a.b/VG_100K/{k}.jpg"} for k in (1, 2)]
    dump(tmp_path / "region_descriptions.json", described)
    dump(tmp_path / "image_data.json", sizes)
    splits = dump(tmp_path / "splits.json", {"train": [1], "test": [2]})

    def task(**options: Any) -> Task:
        return task_class("vg_caption")(data=tmp_path, splits=splits, metrics=("ROUGE_L",), **options)

    assert [item.id for item in task().items()] == ["20", "21", "22"]
    assert [item.detail["references"] for item in task().items()] == [["phrase 0"], ["phrase 1"], ["phrase 2"]]
    assert task().items()[0].image == tmp_path / "images" / "VG_100K" / "2.jpg"
    with pytest.raises(DataError, match="image ids under 'val'"):
        task(split="val").items()


def proposals(folder: Path, entries: list[dict[str, Any]]) -> Path:
    return dump(folder / "proposals.json", entries)


def rec(folder: Path, **options: Any) -> Task:
    return task_class("refcocog_rec")(data=folder, refs=folder / "refs.jsonl", images=folder, **options)


def test_the_object_is_added_where_no_proposal_finds_it(expressions: Path) -> None:
    near = {"image_id": 1, "bbox": [12, 10, 50, 40], "score": 0.9}
    far = {"image_id": 1, "bbox": [100, 10, 10, 10], "score": 0.8}
    proposals(expressions, [far, near, {"image_id": 3, "bbox": [0, 0, 1, 1], "score": 1}])
    task = rec(expressions)
    items = task.items()
    by_text = {item.expression: item for item in items}
    found, added = by_text["the red dog"], by_text["a cat"]
    assert (found.groups["injected"], len(found.regions)) == ("no", 2)
    assert (added.groups["injected"], len(added.regions)) == ("yes", 3)
    assert (by_text["a bus"].groups["injected"], len(by_text["a bus"].regions)) == ("yes", 1)
    assert found.choices == ("Region [1]", "Region [2]", NO_MATCH)
    assert [item.regions for item in items] == [item.regions for item in task.items()]

    answers = {item.id: Answer(text=item.truth) for item in items}
    result = task.score(items, answers, resamples=0)
    injected = sum(item.groups["injected"] == "yes" for item in items)
    assert values(result, "generate, ground truth injected")["accuracy"] == 1
    assert values(result, "generate, ground truth injected")["injected_share"] == pytest.approx(injected / len(items))
    assert values(result, "generate, without injection")["accuracy"] == pytest.approx(1 - injected / len(items))

    answers[found.id] = Answer(text="Region [9]")
    answers[added.id] = Answer(text=NO_MATCH)
    scores = {item.id: [float(choice == item.truth) for choice in item.choices] for item in items}
    scores[added.id] = [0.0] * (len(added.choices) - 1) + [1.0]
    answers = {name: replace(answer, scores=tuple(scores[name])) for name, answer in answers.items()}
    by_choice = values(task.score(items, answers, resamples=0), "score all choices, ground truth injected")
    assert (by_choice["accuracy"], by_choice["no_match"]) == pytest.approx((1 - 1 / len(items), 1 / len(items)))
    worse = values(task.score(items, answers, resamples=0), "generate, ground truth injected")
    assert worse["accuracy"] == pytest.approx(1 - 2 / len(items))
    assert (worse["invalid"], worse["no_match"]) == pytest.approx((1 / len(items), 1 / len(items)))


def test_what_each_region_is_called_is_a_protocol_of_its_own(expressions: Path, tmp_path: Path) -> None:
    proposals(expressions, [{"image_id": 1, "bbox": [12, 10, 50, 40], "score": 0.9}])
    task = rec(expressions)
    items = task.items()
    rows = [
        {"id": item.id, "called": [-1.0 if k + 1 in item.detail["right"] else -2.0 for k in range(len(item.regions))]}
        for item in items
    ]
    path = tmp_path / "predictions.json"
    dump(path, rows)
    answers = read_predictions(path, task, items).answers
    found = task.score(items, answers, resamples=0)
    assert list(found.data["protocols"]) == [
        "call each region, ground truth injected",
        "call each region, without injection",
    ]
    assert values(found, "call each region, ground truth injected")["accuracy"] == 1
    dump(path, [{**rows[0], "called": [0.5] * 9}, *rows[1:]])
    with pytest.raises(DataError, match=r"called: give a number for each of \d regions, got 9"):
        read_predictions(path, task, items)


def test_scores_of_proposals(expressions: Path) -> None:
    one, two = {"image_id": 1, "bbox": [0, 0, 5, 5]}, {"image_id": 1, "bbox": [0, 0, 9, 9]}
    proposals(expressions, [one, two])
    with pytest.raises(ConfigError, match=r"no scores to rank candidates.*--top 0"):
        rec(expressions).items()
    assert len(rec(expressions, top=0).items()[0].regions) == 3
    proposals(expressions, [one, {**two, "score": 1}])
    with pytest.raises(DataError, match="1 of 2 candidates have no score"):
        rec(expressions, top=0).items()
    proposals(expressions, [{**one, "score": value} for value in (None, 0.5)])
    task = rec(expressions, top=0)
    task.items()
    assert task.left_out.counts["score that is no number"] == 1
    # Those below 0 are scores too.
    proposals(expressions, [{"image_id": 1, "bbox": [0, 0, 5 + k, 5], "score": -1.5 - k} for k in range(4)])
    first = next(item for item in rec(expressions, top=2).items() if item.image_id == 1)
    assert {Region.box(0, 0, 5, 5), Region.box(0, 0, 6, 5)} < set(first.regions)
    assert len(first.regions) == 3


def test_proposals_of_another_split_or_form(expressions: Path, tmp_path: Path) -> None:
    proposals(expressions, [{"image_id": 77, "bbox": [0, 0, 5, 5], "score": 1}])
    with pytest.raises(DataError, match="is the file of another split"):
        rec(expressions).items()
    whole = proposals(expressions, [{"image_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}]).read_text()
    (expressions / "proposals.json").write_text(whole.removesuffix("]") + ', {"image_id": 1')
    with pytest.raises(DataError, match="fetch it again"):
        load_items(rec(expressions))
    from regiongpt.data.shards import Rejects

    odd = [
        {"image_id": 1, "bbox": [0, 0, float("nan"), 5], "score": 1},
        5,
        {"image_id": 1, "bbox": [0, 0, 0, 5], "score": 1},
    ]
    good = {"image_id": 1, "bbox": [0, 0, 5, 5], "score": 0.3}
    asked = {1: expressions / "1.jpg"}
    with pytest.raises(DataError, match="1 record of another format"):
        read_proposals(proposals(expressions, odd), asked, 1, Rejects())
    rejects = Rejects()
    found = read_proposals(proposals(expressions, [*odd, good, {**good, "score": 0.7}]), asked, 1, rejects)
    assert found == {1: [(0, 0, 5, 5)]}
    assert rejects.counts == {"record of another format": 1, "box that is not four numbers": 1, "box without size": 1}


def test_a_proposal_outside_its_image_is_left_out_and_counted(expressions: Path) -> None:
    Image.new("RGB", (120, 60)).save(expressions / "1.png")
    lines = [json.loads(line) for line in (expressions / "refs.jsonl").read_text().splitlines()]
    named = [{**line, "file_name": "1.png"} if line["image_id"] == 1 else line for line in lines]
    (expressions / "refs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    inside = {"image_id": 1, "bbox": [110, 50, 500, 500], "score": 0.5}
    outside = [{"image_id": 1, "bbox": box, "score": 0.9} for box in ([120, 0, 5, 5], [-9, 0, 9, 5], [0, 60, 9, 9])]
    proposals(expressions, [*outside, inside])
    task = rec(expressions, top=1)
    items = [item for item in task.items() if item.image_id == 1]
    assert task.left_out.counts["box outside the image"] == 3
    assert {region for item in items for region in item.regions} >= {Region.box(110, 50, 120, 60)}
    assert all(len(item.regions) == 2 for item in items)
    result = task.score(items, {item.id: Answer(text=item.truth) for item in items}, resamples=0)
    assert any("box outside the image" in note for note in result.data["notes"])


def test_the_place_of_the_object_tells_nothing() -> None:
    proposed = [(float(k), 0.0, k + 5.0, 5.0) for k in (20, 40, 60)]
    places = [candidates_of((0, 0, 9, 9), proposed, (0, k))[0].index((0, 0, 9, 9)) for k in range(200)]
    assert all(30 < places.count(k) < 70 for k in range(4))


def test_expressions_written_from_annotations(tmp_path: Path) -> None:
    names = ["person", "dog", "cat", "car", "bus", "cup"]
    boxes = [[10.0 + 30 * k, 10.0, 20.0, 30.0] for k in range(6)]
    folder = photos(tmp_path, {1: [(k + 1, box) for k, box in enumerate(boxes)]})
    content = json.loads((folder / "instances_dev.json").read_text())
    content["categories"] = [{"id": k, "name": name} for k, name in enumerate(names, 1)]
    dump(folder / "instances_dev.json", content)
    (folder / "images" / "000000000001.jpg").touch()
    task = task_class("coco_rec")(data=folder)
    items = task.items()
    assert items
    assert all(len(item.regions) == 5 and len(item.choices) == 6 for item in items)
    result = task.score(items, {item.id: Answer(text=item.truth) for item in items}, resamples=0)
    assert values(result, "generate") == {"accuracy": 1, "no_match": 0, "invalid": 0, "chance": pytest.approx(0.2)}
    # An image that cannot be read is said when it is asked about, and --limit counts those that are asked about.
    assert task_class("coco_rec")(data=folder, limit=1).items()


def published(folder: Path) -> Path:
    name = "COCO_val2014_000000000042.jpg"
    asked = [("Is there a dog in the image?", "yes"), ("Is there a cat in the image?", "no")]
    lines = [
        {"question_id": k, "image": name, "text": text, "label": label} for k, (text, label) in enumerate(asked, 1)
    ]
    lines.append({"question_id": 2, "image": name, "text": "again?", "label": "no"})
    lines.append({"question_id": 3, "image": name, "text": "Is it?", "label": "maybe"})
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "000000000042.jpg").touch()
    for strategy in ("random", "popular", "adversarial"):
        (folder / f"coco_pope_{strategy}.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_published_questions_are_read(tmp_path: Path) -> None:
    folder = published(tmp_path)
    task = task_class("pope")(data=folder, strategy="popular")
    items = task.items()
    assert [(item.id, item.truth, item.image_id) for item in items] == [("1", "yes", 42), ("2", "no", 42)]
    assert items[0].image == folder / "images" / "000000000042.jpg"
    assert task.left_out.counts == {"duplicate id": 1, "question of another form": 1}
    everything = task_class("pope")(data=folder, suffix="Answer yes or no.").items()
    assert [item.id for item in everything] == [
        f"{strategy}-{k}" for strategy in ("random", "popular", "adversarial") for k in (1, 2)
    ]
    assert everything[0].question == "Is there a dog in the image? Answer yes or no."

    said = {"1": Answer(text="Certainly"), "2": Answer(text="There is no cat.")}
    result = task.score(items, said, resamples=0)
    assert values(result, "first word, popular")["unparsable"] == 1
    assert values(result, "first word, popular")["accuracy"] == 0
    assert values(result, "published script, popular")["accuracy"] == 1
    assert values(result, "published script, popular")["yes_ratio"] == 0.5


def test_questions_follow_popes_rules() -> None:
    classes = {
        1: ["cat", "dog", "bird", "car"],
        2: ["cat", "bus"],
        3: ["cat", "bus", "cup", "fork"],
        4: ["spoon", "bus"],
        5: ["dog", "spoon", "zebra"],
    }
    names = {k: f"{k}.jpg" for k in classes}
    for strategy in ("random", "popular", "adversarial"):
        asked = build_questions(classes, names, strategy, pairs=2, seed=4)
        assert {each.image_id for each in asked} == {1, 3, 5}
        for number in (1, 3, 5):
            mine = [each for each in asked if each.image_id == number]
            assert [each.label for each in mine] == ["yes", "no", "yes", "no"]
            assert len({each.category for each in mine}) == 4
            assert all((each.category in classes[number]) == (each.label == "yes") for each in mine)
        assert asked == build_questions(classes, names, strategy, pairs=2, seed=4)
    popular = [each for each in build_questions(classes, names, "popular", pairs=2) if each.image_id == 1]
    # In three images and in two, more than any other class that image 1 lacks.
    assert [each.category for each in popular if each.label == "no"] == ["bus", "spoon"]
    found = [each for each in build_questions(classes, names, "adversarial", pairs=2) if each.image_id == 1]
    for yes, no in zip(found[::2], found[1::2], strict=True):
        assert yes.category != "cat" or no.category == "bus"  # the absent class that most often occurs with cats
    assert all(each.text == f"Is there a {each.category} in the image?" for each in asked)
    with pytest.raises(DataError, match=r"no image has more than 3 classes .* among 1 image of 1 class;"):
        build_questions({1: ["cat"]}, {1: "1.jpg"}, "random")
    with pytest.raises(ConfigError, match="got 'rare'"):
        task_class("pope")(data="x", strategy="rare")


def test_questions_are_built_from_annotations(tmp_path: Path) -> None:
    crowd = {"id": 95, "image_id": 1, "category_id": 8, "bbox": [0, 0, 9, 9], "area": 30, "iscrowd": 1}
    box = [0.0, 0.0, 9.0, 9.0]
    folder = photos(
        tmp_path, {1: [(1, box), (2, box), (3, box)], 2: [(4, box), (5, box), (6, box), (7, box)]}, annotations=[crowd]
    )
    items = task_class("pope")(data=folder, split="dev", strategy="random").items()
    assert {item.image_id for item in items} == {1, 2}  # image 1 has its fourth class in a crowd
    assert not any(item.groups["category"] == "spoon" and item.truth == "no" for item in items if item.image_id == 1)
    with pytest.raises(DataError, match=r"coco_pope_<strategy>\.json"):
        task_class("pope")(data=tmp_path / "images").items()

"""The benchmarks: which questions they ask, and what they make of answers."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pope_questions
import pytest
from evaluating import need_java
from PIL import Image

from regiongpt.data.shards import Rejects
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate import caption_metrics, task_class
from regiongpt.evaluate.referring import candidates_of, read_proposals
from regiongpt.evaluate.run import load_items
from regiongpt.evaluate.task import Answer, Result, Task
from regiongpt.prompts import NO_MATCH
from regiongpt.regions import Region

NAMES = ("cat", "dog", "bird", "car", "bus", "cup", "fork", "spoon")


def dump(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def photos(folder: Path, objects: Mapping[int, list[tuple[int, list[float]]]], more: Sequence[Any] = ()) -> Path:
    """A folder with instances_dev.json: by image id, categories and boxes; images of 200 x 100 pixels."""
    (folder / "images").mkdir(exist_ok=True)
    annotations = [
        {"id": 10 * image + k, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        for image, those in objects.items()
        for k, (category, box) in enumerate(those)
    ]
    content = {
        "images": [{"id": k, "file_name": f"{k:012d}.jpg", "width": 200, "height": 100} for k in objects],
        "annotations": [*annotations, *more],
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES, 1)],
    }
    dump(folder / "instances_dev.json", content)
    return folder


def values(result: Result, protocol: str) -> dict[str, float | None]:
    return {name: each["value"] for name, each in result.data["protocols"][protocol].items()}


def classes(folder: Path, **options: Any) -> Task:
    return task_class("coco_cls")(data=folder, **{"split": "dev", "label_set": "things", **options})


@pytest.fixture
def two_images(tmp_path: Path) -> Path:
    crowd = {"id": 90, "image_id": 1, "category_id": 1, "bbox": [150, 0, 40, 40], "area": 900, "iscrowd": 1}
    broken = {"id": 91, "image_id": 1, "category_id": 2, "bbox": [500, 0, 10, 10], "area": 100, "iscrowd": 0}
    objects = {1: [(1, [0, 0, 20, 20]), (2, [40, 0, 50, 50])], 2: [(1, [0, 0, 100, 100])]}
    return photos(tmp_path, objects, [crowd, broken])


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
    three = matched["accuracy"], matched["valid_answers"], matched["class_average"]
    assert three == pytest.approx((1 / 3, 2 / 3, 1 / 4))
    # One of two cats is found, and not the dog: "Dog" is not in the list, and the other answer is elsewhere.
    assert matched["AP"] == pytest.approx((51 / 101 + 0) / 2)
    assert values(result, "score all choices")["accuracy"] == pytest.approx(2 / 3)
    assert values(result, "score all choices")["AP"] == pytest.approx(1)
    assert any("1 answer not in the list, most often 'Dog' (1)" in note for note in result.data["notes"])
    assert "most often confused: cat as dog (1)" in result.data["notes"]
    assert result.rows[1]["scores"]["generate and match.accuracy"] == 0
    assert result.data["breakdowns"]["generate and match"]["size"]["small"]["accuracy"] == 1
    json.dumps(result.data)


def test_answers_decide_which_protocols_there_are(two_images: Path) -> None:
    task = classes(two_images)
    items = task.items()
    one, others = {"10": Answer(text="cat", probability=0.5)}, {item.id: Answer(text="cat") for item in items[1:]}
    for said, note in (
        (others, "1 of 3 items has no answer, which counts as wrong (10)"),
        (one | others, "'generate with probability' is not measured: 2 answers without a probability (11, 20)"),
    ):
        result = task.score(items, said, resamples=0)
        assert list(result.data["protocols"]) == ["generate and match"]
        assert note in result.data["notes"]
    with pytest.raises(DataError, match="no item has an answer"):
        task.score(items, {})


def test_masks_and_the_list_of_names(two_images: Path) -> None:
    with pytest.raises(DataError, match="no objects to ask about"):
        classes(two_images, region="mask").items()
    content = (two_images / "instances_dev.json").read_text()
    (two_images / "instances_mug.json").write_text(content.replace('"cup"', '"mug"'))
    with pytest.raises(ConfigError, match="COCO-80 has no category mug"):
        classes(two_images, split="mug", label_set="COCO-80").items()
    with pytest.raises(DataError, match=r"instances_val2017\.json .*--annotations"):
        classes(two_images, split="val2017").items()


def test_lvis_names_its_images_by_their_address(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    image = tmp_path / "val2017" / "000000000005.jpg"
    image.touch()
    thing = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9]]}
    content = {
        "images": [{"id": 5, "width": 100, "height": 100, "coco_url": f"http://host/val2017/{image.name}"}],
        "annotations": [thing],
        "categories": [{"id": 3, "name": "aerosol_can"}],
    }
    path = dump(tmp_path / "lvis.json", content)
    task = classes(tmp_path, annotations=path, label_set="LVIS", region="mask")
    (item,) = task.items()
    assert (item.image, item.regions[0].kind) == (image, "polygon")
    answers = {"1": Answer(text="aerosol_can")}
    assert "LVIS" not in task.score([item], answers, resamples=0).data["pinned"]["scorer"]

    content["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    content["categories"][0]["frequency"] = "c"
    dump(path, content)
    result = task.score(task.items(), answers, resamples=0)
    assert "LVIS' rules" in result.data["pinned"]["scorer"]
    found = result.data["protocols"]["generate and match"]
    assert (found["AP_rare"]["value"], found["AP_rare"]["of"]) == (None, 0)
    assert (found["AP_common"]["value"], found["AP_common"]["of"]) == (pytest.approx(1), 1)


@pytest.fixture
def expressions(tmp_path: Path) -> Path:
    """RefCOCOg's files: objects 7 and 8 in image 1, and 9 in image 2, of 120 x 60 pixels each."""
    boxes = {7: (1, [10, 10, 50, 40]), 8: (1, [70, 10, 20, 20]), 9: (2, [10, 10, 50, 40]), 5: (2, [0, 0, 0, 5])}
    said = {7: ["the red dog", "dog on the left"], 8: ["a cat"], 9: ["a bus", "..."], 5: ["no box"]}
    refs = [
        {
            **{"ref_id": ann, "ann_id": ann, "image_id": boxes[ann][0], "split": "val"},
            "sentences": [{"sent_id": 10 * ann + k, "sent": text} for k, text in enumerate(texts)],
        }
        for ann, texts in said.items()
    ]
    (tmp_path / "refs(umd).p").write_bytes(pickle.dumps(refs))
    for number in (1, 2):
        Image.new("RGB", (120, 60)).save(tmp_path / f"{number}.png")
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 120, "height": 60} for k in (1, 2)],
        "annotations": [
            {"id": ann, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": 0}
            for ann, (image, box) in boxes.items()
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    dump(tmp_path / "instances.json", content)
    return tmp_path


def captions(folder: Path, **options: Any) -> Task:
    need_java()
    return task_class("refcocog_caption")(**{"data": folder, "metrics": ("CIDEr", "ROUGE_L"), **options})


def test_references_are_grouped_as_said(expressions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = captions(expressions)
    items = task.items()
    references = {"7": ["the red dog", "dog on the left"], "8": ["a cat"], "9": ["a bus"]}
    assert {item.id: item.detail["references"] for item in items} == references
    assert task.left_out.counts["reference without words"] == task.left_out.counts["box without size"] == 1
    alone = captions(expressions, grouping="expression").items()
    assert [item.detail["references"] for item in alone] == [["the red dog"], ["dog on the left"], ["a cat"], ["a bus"]]
    result = task.score(items, {"7": Answer(text="The red dog."), "8": Answer(text="a cat")}, resamples=20)
    assert [row["scores"]["generate.ROUGE_L"] for row in result.rows] == pytest.approx([1, 1, 0])
    assert result.data["pinned"]["references"] == "grouped by object"
    assert any("1 of 3 items has no answer" in note for note in result.data["notes"])
    with pytest.raises(ConfigError, match=r"metrics\.0: input should be 'METEOR'"):
        captions(expressions, metrics=("BERT",))
    with pytest.raises(DataError, match="split 'test'"):
        captions(expressions, split="test").items()
    # What scoring needs is looked for before the model is asked.
    monkeypatch.setattr(caption_metrics, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(expressions))
    with pytest.raises(ConfigError, match="Java, which was not found; install it with"):
        task.items()


def test_visual_genome_by_split(tmp_path: Path) -> None:
    need_java()
    (tmp_path / "images").mkdir()
    box = {"x": 3, "y": 4, "width": 20, "height": 10}
    regions = [{"region_id": n, "image_id": n // 10, "phrase": f"phrase {n}", **box} for n in (10, 20, 21)]
    described = [{"id": k, "regions": [each for each in regions if each["image_id"] == k]} for k in (1, 2)]
    sizes = [{"image_id": k, "width": 80, "height": 60, "url": f"https://a.b/VG_100K/{k}.jpg"} for k in (1, 2)]
    dump(tmp_path / "region_descriptions.json", described)
    dump(tmp_path / "image_data.json", sizes)
    splits = dump(tmp_path / "splits.json", {"train": [1], "test": [2]})
    task = task_class("vg_caption")(data=tmp_path, splits=splits, metrics=("ROUGE_L",))
    items = task.items()
    assert [(item.id, item.detail["references"]) for item in items] == [("20", ["phrase 20"]), ("21", ["phrase 21"])]
    assert items[0].image == tmp_path / "images" / "VG_100K" / "2.jpg"
    assert len(task.replace(splits=None).items()) == 3
    with pytest.raises(DataError, match="image ids under 'val'"):
        task.replace(split="val").items()


def rec(folder: Path, **options: Any) -> Task:
    return task_class("refcocog_rec")(data=folder, **options)


def test_the_object_is_added_where_no_proposal_finds_it(expressions: Path) -> None:
    near = {"image_id": 1, "bbox": [12, 10, 50, 40], "score": 0.9}
    far = {"image_id": 1, "bbox": [100, 10, 10, 10], "score": 0.8}
    dump(expressions / "proposals.json", [far, near, {"image_id": 3, "bbox": [0, 0, 1, 1], "score": 1}])
    task = rec(expressions)
    items = task.items()
    found, added, alone = items[0], items[2], items[3]
    assert (found.groups["injected"], len(found.regions)) == ("no", 2)
    assert (added.groups["injected"], len(added.regions)) == ("yes", 3)
    assert (alone.groups["injected"], len(alone.regions)) == ("yes", 1)
    assert found.choices == ("Region [1]", "Region [2]", NO_MATCH)
    said = {item.id: item.truth for item in items}
    injected = sum(item.groups["injected"] == "yes" for item in items) / len(items)
    answers = {name: Answer(text=text) for name, text in said.items()}
    right = values(task.score(task.items(), answers, resamples=0), "generate")
    assert (right["accuracy"], right["without_injection"]) == (1, pytest.approx(1 - injected))

    said |= {found.id: "Region [9]", added.id: NO_MATCH}
    scores = {item.id: [float(choice == item.truth) for choice in item.choices] for item in items}
    scores[added.id] = [0.0] * (len(added.choices) - 1) + [1.0]
    answers = {name: Answer(text=text, scores=scores[name]) for name, text in said.items()}
    result, share = task.score(items, answers, resamples=0), 1 / len(items)
    by_choice = values(result, "score all choices")
    assert (by_choice["accuracy"], by_choice["no_match"]) == pytest.approx((1 - share, share))
    worse = values(result, "generate")
    assert (worse["accuracy"], worse["invalid"], worse["no_match"]) == pytest.approx((1 - 2 * share, share, share))


def test_the_best_proposals_inside_the_image_are_taken(expressions: Path) -> None:
    # Scores below 0 are scores too.
    dump(
        expressions / "proposals.json", [{"image_id": 1, "bbox": [0, 0, 5 + k, 5], "score": -1.5 - k} for k in range(4)]
    )
    first = rec(expressions, top=2).items()[0]
    assert {Region.box(0, 0, 5, 5), Region.box(0, 0, 6, 5)} < set(first.regions)
    assert [len(rec(expressions, top=top).items()[0].regions) for top in (2, 0)] == [3, 5]
    outside = [{"image_id": 1, "bbox": box, "score": 0.9} for box in ([120, 0, 5, 5], [-9, 0, 9, 5], [0, 60, 9, 9])]
    dump(expressions / "proposals.json", [*outside, {"image_id": 1, "bbox": [110, 50, 500, 500], "score": 0.5}])
    task = rec(expressions, top=1)
    items = [item for item in task.items() if item.image_id == 1]
    assert task.left_out.counts["box outside the image"] == 3
    assert all(Region.box(110, 50, 120, 60) in item.regions and len(item.regions) == 2 for item in items)
    result = task.score(items, {item.id: Answer(text=item.truth) for item in items}, resamples=0)
    assert any("box outside the image" in note for note in result.data["notes"])


def test_proposals_of_another_split_or_form(expressions: Path) -> None:
    dump(expressions / "proposals.json", [{"image_id": 77, "bbox": [0, 0, 5, 5], "score": 1}])
    with pytest.raises(DataError, match="is the file of another split"):
        rec(expressions).items()
    good = {"image_id": 1, "bbox": [0, 0, 5, 5], "score": 0.3}
    odd = [{**good, "bbox": [0, 0, float("nan"), 5]}, 5, {**good, "bbox": [0, 0, 0, 5]}, {**good, "score": None}]
    odd += [{"image_id": 1, "bbox": [0, 0, 5, 5]}]
    rejects = Rejects()
    path = dump(expressions / "proposals.json", [*odd, good, {**good, "score": 0.7}])
    assert read_proposals(path, {1: (120, 60)}, 1, rejects) == {1: [(0, 0, 5, 5)]}
    assert rejects.counts == {
        **{"record of another format": 2, "box that is not four numbers": 1, "box without size": 1},
        "score that is no number": 1,
    }


def test_the_place_of_the_object_tells_nothing() -> None:
    proposed = [(float(k), 0.0, k + 5.0, 5.0) for k in (20, 40, 60)]
    places = [candidates_of((0, 0, 9, 9), proposed, (0, k))[0].index((0, 0, 9, 9)) for k in range(200)]
    assert all(30 < places.count(k) < 70 for k in range(4))


def test_published_questions_are_read(tmp_path: Path) -> None:
    name = "COCO_val2014_000000000042.jpg"
    asked = [("Is there a dog in the image?", "yes"), ("Is there a cat in the image?", "no")]
    asked += [("again?", "no"), ("Is there a bus in the image?", "maybe")]
    lines = [
        {"question_id": k, "image": name, "text": text, "label": label}
        for k, (text, label) in zip((1, 2, 2, 3), asked, strict=True)
    ]
    task = task_class("pope")(data=tmp_path)
    with pytest.raises(DataError, match="coco_pope_"):
        task.items()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000000042.jpg").touch()
    for strategy in ("random", "popular"):
        (tmp_path / f"coco_pope_{strategy}.json").write_text("\n".join(map(json.dumps, lines)))
    items = task.items()
    assert [item.id for item in items] == ["random-1", "random-2", "popular-1", "popular-2"]
    assert {(item.truth, item.image_id) for item in items} == {("yes", 42), ("no", 42)}
    assert items[0].image == tmp_path / "images" / "000000000042.jpg"
    assert task.left_out.counts == {"duplicate id": 2, "question of another form": 2}
    (tmp_path / "coco_pope_popular.json").write_text(json.dumps(lines[0]) + '\n{"question_id"')
    with pytest.raises(DataError, match=r"popular\.json: ends within a line"):
        task.items()

    said = {"popular-1": Answer(text="Certainly"), "popular-2": Answer(text="There is no cat.")}
    result = task.score(items, said, resamples=0)
    found = values(result, "popular")
    assert (found["unparsable"], found["accuracy"], found["yes_ratio"]) == (1, 1, 0.5)
    assert values(result, "random")["accuracy"] == 0


@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
def test_questions_follow_popes_rules(strategy: str) -> None:
    have = {1: "cat dog bird car", 2: "cat bus", 3: "cat bus cup fork", 4: "spoon bus", 5: "dog spoon zebra"}
    classes = {k: set(text.split()) for k, text in have.items()}
    found = pope_questions.build_questions(classes, dict.fromkeys(classes, ""), strategy, pairs=2, seed=4)
    assert found == pope_questions.build_questions(classes, dict.fromkeys(classes, ""), strategy, pairs=2, seed=4)
    assert [each["label"] for each in found] == ["yes", "no"] * 6
    names = [str(each["text"]).split()[3] for each in found]
    for place, number in enumerate((1, 3, 5)):
        mine = names[4 * place : 4 * place + 4]
        assert len(set(mine)) == 4
        assert [name in classes[number] for name in mine] == [True, False] * 2
    if strategy == "popular":  # in three images and in two, more than any other class that image 1 lacks
        assert names[1:4:2] == ["bus", "spoon"]
    if strategy == "adversarial" and "cat" in names[:4]:  # the absent class that most often occurs with cats
        assert names[names.index("cat") + 1] == "bus"


def test_questions_about_annotated_images_can_be_asked(tmp_path: Path) -> None:
    objects = {
        number: [(k, [0.0, 0.0, 9.0, 9.0]) for k in kinds] for number, kinds in ((1, range(1, 5)), (2, (5, 6, 7)))
    }
    words = ["--data", str(photos(tmp_path, objects)), "--out", str(tmp_path / "out")]
    assert pope_questions.main(words) == 0
    (tmp_path / "images" / "000000000001.jpg").touch()
    items = load_items(task_class("pope")(data=tmp_path / "out", images=tmp_path / "images"))
    assert (len(items), {item.image_id for item in items}) == (18, {1})

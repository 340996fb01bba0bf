"""Conversations: people's own json lines, and LLaVA's files."""

import json
from pathlib import Path

import pytest
from converting import run
from PIL import Image

from regiongpt.data.chat import JsonlConverter, LlavaConverter
from regiongpt.data.shards import Rejects, usable
from regiongpt.errors import DataError
from regiongpt.prompts import REC_SUFFIX

BOX = {"box": [1, 2, 20, 15]}
CHAT = {"question": "What is <region1>?", "answer": "A cup."}


def line(*turns: object, **more: object) -> dict:
    return {"image": "a.png", "regions": [BOX], "conversation": list(turns or [CHAT]), **more}


def write(folder: Path, lines: list) -> JsonlConverter:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / "images" / "a.png")
    text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines)
    (folder / "own.jsonl").write_text(text)
    return JsonlConverter(images=folder / "images", data=folder / "own.jsonl")


def test_every_form_of_a_line(tmp_path):
    rle = {"size": [30, 40], "counts": [600, 30, 570]}
    regions = [{**BOX, "category": "cup"}, {"polygon": [[[1, 1], [9, 1], [9, 9]]]}, {"rle": rle}, {"mask": rle},
               {"point": [5, 6], "radius": 3}, {"scribble": [[1, 1], [9, 9]], "width": 2}]  # fmt: skip
    turns = [
        {"question": "How do <region1> and <region2> differ?", "answer": "In size."},
        {"task": "caption", "regions": [1], "answer": "a cup"},
        {"task": "locate", "regions": [1, 3], "expression": "the cup", "answer": "Region [1]", "guided": True},
        {"task": "classify", "regions": [1], "answer": "cup", "label_set": "COCO-80", "guided": True},
        {"task": "presence", "category": "cat", "answer": "No."},
        {"task": "describe", "question": "What is <region2>?", "answer": "A spoon."},
    ]
    whole = line(*turns, id="one", width=40, height=30, regions=regions)
    text = {"conversation": [{"question": "Who?", "answer": "Me."}], "id": 7}
    (first, second, third), rejects = run(write(tmp_path, [whole, "", line(), text]))
    assert rejects == {}
    assert [record.id for record in (first, second, third)] == ["jsonl/one", "jsonl/line-3", "jsonl/7"]
    assert [each.region.kind for each in first.regions] == ["box", "polygon", "rle", "mask", "point", "scribble"]
    assert (first.image, first.regions[0].category) == ("a.png", "cup")
    texts = [turn.text(0) for turn in first.turns]
    assert texts[:2] == ["How do <region1> and <region2> differ?", "Describe <region1> briefly."]
    assert texts[2].endswith(REC_SUFFIX)
    assert texts[3].endswith("using COCO-80 category names.")
    assert texts[4:] == ["Is there a cat in the image?", "What is <region2>?"]
    assert (second.width, second.height) == (40, 30)
    assert (third.image, third.width) == ("", 0)


CHOICE = {"task": "locate", "regions": [1], "expression": "it", "answer": "Region [2]", "guided": True}
NAMED = {"task": "classify", "regions": [1], "answer": "mug", "label_set": "COCO-80", "guided": True}
FAULTS = [
    ("{", "line that is not json", "expected a JSON object"),
    (line(regons=[]), "unknown key", "'regons'; did you mean 'regions'?"),
    (line({**CHAT, "answer": " "}), "record without a lesson", "turn 1: expected an answer, got an empty one"),
    (line({**CHAT, "question": " "}), "question empty", "turn 1"),
    (line({**CHAT, "regions": [1]}), "record of another format", "leave out regions"),
    (line({**CHAT, "question": "<image> What?"}), "placeholder in the text", "the image always comes first"),
    (line({**CHAT, "question": "Is <region2> red?"}), "region that makes no sense", "<region2> stands for region 2"),
    (line({**CHAT, "question": "Is <region> red?"}), "region that makes no sense", "<region1>, <region2>"),
    (line({"task": "caption", "regions": [2], "answer": "x"}), "region that makes no sense", "1 region was given"),
    (line({"task": "guess", "answer": "x"}), "unknown task", "expected a task among classify, describe"),
    (line(CHOICE), "answer that is no option", "expected Region [1] or 'No corresponding options found.'"),
    (line(NAMED), "unknown category", "expected a name of COCO-80, got 'mug'"),
    (line(conversation=None), "record of another format", "conversation: "),
    (line(regions=[{"box": [1, 2, 3]}]), "region that makes no sense", "<region1>"),
    (line(regions=[{"box": [60, 2, 70, 9]}]), "region that makes no sense", "<region1>"),
    (line(regions=[{"box": [0.1, 0.1, 0.5, 0.5], "normalized": True}]), "box in fractions", "<region1>: multiply"),
    (line(regions=[{**BOX, "category": 1}]), "record of another format", "<region1>: expected category as text"),
    (line(width=41, height=30), "image of another size", "41 x 30"),
    (line({"task": "presence", "category": "a <region of it", "answer": "No."}), "placeholder in the text", "plain"),
    (line(id=["a"]), "record of another format", "id: expected text or a whole number"),
]


@pytest.mark.parametrize(("bad", "kind", "reason"), FAULTS, ids=[f"{k}-{each[1]}" for k, each in enumerate(FAULTS)])
def test_faults_are_told_with_their_reason(tmp_path, bad, kind, reason):
    made, rejects = write(tmp_path, [line(id="good"), bad, line(id="last")]), Rejects()
    records = list(usable(made.records(rejects), rejects, "jsonl"))
    assert [record.id for record in records] == ["jsonl/good", "jsonl/last"]
    assert rejects.counts == {kind: 1}
    assert reason in rejects.last
    with pytest.raises(DataError, match=r"own\.jsonl, record 2|jsonl, record jsonl/line-2"):
        list(usable(made.records(Rejects(strict=True)), Rejects(strict=True), "jsonl"))


def test_ids_and_ends(tmp_path):
    made = write(tmp_path, [line(id="a"), line(id="a"), line(id="line-4"), line(), json.dumps(line())[:-5]])
    made.data.write_bytes(b"\xef\xbb\xbf" + made.data.read_bytes().rstrip(b"\n"))
    records, rejects = run(made)
    assert [record.id for record in records] == ["jsonl/a", "jsonl/line-4"]
    assert rejects == {"duplicate id": 2, "truncated json": 1}
    made.data.write_bytes(json.dumps(line()).encode() + b'\n{"id": "\xff"}\n')
    assert run(made)[1] == {"text that is not Unicode": 1}
    made.data.write_text("<html>\n</html>\n")
    with pytest.raises(DataError, match=r"own\.jsonl: no line is a JSON object"):
        run(made)


def entry(name: object, *said: object, image: object = "a.png") -> dict:
    conversation = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": conversation}


def llava(folder: Path, entries: object, **options: str) -> LlavaConverter:
    images = write(folder, []).images
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(images / "turned.jpg", exif=turned)
    (folder / "mix.json").write_text(json.dumps(entries))
    return LlavaConverter(images=images, data=folder / "mix.json", **options)


def test_questions_of_llava_stand_as_they_are(tmp_path):
    entries = [
        entry("004539375", "Render a clear summary of the photo.\n<image>", "select luxury furniture"),
        entry(33471, "<image>\nWhat colour is it?", " Red. ", "And\nthis?", "Blue."),
        entry("x", "Who are you?", "A model.", image=None),
        entry("33471", "What is <image> about?", "A bus.", image="turned.jpg"),
    ]
    records, rejects = run(llava(tmp_path, entries))
    assert rejects == {}
    assert [record.id for record in records] == ["llava/004539375-0", "llava/33471-1", "llava/x-2", "llava/33471-3"]
    frames = [(record.image, record.width, record.height) for record in records]
    assert frames == [("a.png", 40, 30), ("a.png", 40, 30), ("", 0, 0), ("turned.jpg", 30, 40)]
    assert [[(turn.task, turn.question, turn.answer) for turn in record.turns] for record in records] == [
        [("chat", "Render a clear summary of the photo.", "select luxury furniture")],
        [("chat", "What colour is it?", "Red."), ("chat", "And\nthis?", "Blue.")],
        [("chat", "Who are you?", "A model.")],
        [("chat", "What is  about?", "A bus.")],
    ]
    assert records[0].messages(0, 5, 0)[0]["content"] == "<image>\nRender a clear summary of the photo."
    assert records[2].messages(0, 0, 0)[0]["content"] == "Who are you?"


def test_captions_of_images(tmp_path):
    entries = [entry("a", "Caption it.\n<image>", "a chair"), entry("b", "Hello.", "Hi.", image=None)]
    (record,), rejects = run(llava(tmp_path, entries, task="image_caption"))
    assert [(turn.task, turn.question) for turn in record.turns] == [("image_caption", "Caption it.")]
    assert rejects == {"caption without an image": 1}


def test_what_is_left_out_of_llava(tmp_path):
    good = entry("good", "<image>\nWhat?", "A cup.")
    asked, answered = good["conversations"]

    def said(*messages: dict) -> dict:
        return {**good, "conversations": list(messages)}

    bad = {
        "message empty": [entry("a", "What?", ""), entry("b", "<image>", "A cup.")],
        "question without an answer": [entry("c", "What?", "A cup.", "And?")],
        "roles out of turn": [said(asked, asked, answered), said(answered), said({"from": "system", "value": "."})],
        "placeholder in the text": [
            entry("d", "What is <region1>?", "A cup."), entry("e", "<image> and <image>", "Two."),
            entry("f", "What is <image>?", "A tag.", image=None), entry("g", "What?", "See <image>."),
        ],
        "record of another format": [
            entry("h", "What?", 5), entry("i", "What?", "A cup.", image=["a.png"]), entry("j"), {"id": "k"},
            {**good, "id": None}, "text",
        ],
        "text that is not Unicode": [entry("l", "What?", "Half \ud800.")],
        "image outside the folder": [entry("m", "What?", "A cup.", image="../secret.jpg")],
        "image file missing": [entry("n", "What?", "A cup.", image="none.jpg")],
    }  # fmt: skip
    records, rejects = run(llava(tmp_path, [good, *(each for many in bad.values() for each in many)]))
    assert [record.id for record in records] == ["llava/good-0"]
    assert rejects == {kind: len(many) for kind, many in bad.items()}

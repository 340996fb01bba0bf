"""LLaVA's conversations: questions as they stand, the image's placeholder gone, and what is left out."""

import json
from pathlib import Path

import pytest
from converting import run
from PIL import Image

from regiongpt.data.chat import LlavaConverter
from regiongpt.errors import ConfigError, DataError


def entry(name: object, *said: object, image: object = "00453/a.jpg", **more: object) -> dict:
    conversation = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
    pictured = {} if image is None else {"image": image}
    return {"id": name, **pictured, "conversations": conversation, **more}


def write(folder: Path, entries: list, **options: str) -> LlavaConverter:
    (folder / "images" / "00453").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / "images" / "00453" / "a.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "images" / "turned.jpg", exif=turned)
    (folder / "mix.json").write_text(json.dumps(entries))
    return LlavaConverter(images=folder / "images", data=folder / "mix.json", **options)


def test_questions_stand_as_they_are(tmp_path):
    made = write(
        tmp_path,
        [
            entry("004539375", "Render a clear summary of the photo.\n<image>", "select luxury furniture"),
            entry(33471, "<image>\nWhat colour is it?", " Red. ", "And\nthis?", "Blue."),
            entry("x", "Who are you?", "A model.", image=None),
            entry("33471", "What is <image> about?", "A bus.", image="turned.jpg"),
        ],
    )
    records, rejects = run(made)
    assert rejects == {}
    assert [record.id for record in records] == ["llava/004539375-0", "llava/33471-1", "llava/x-2", "llava/33471-3"]
    frames = [(record.image, record.width, record.height) for record in records]
    assert frames == [("00453/a.jpg", 40, 30), ("00453/a.jpg", 40, 30), ("", 0, 0), ("turned.jpg", 30, 40)]
    said = [[(turn.question, turn.answer) for turn in record.turns] for record in records]
    assert said == [
        [("Render a clear summary of the photo.", "select luxury furniture")],
        [("What colour is it?", "Red."), ("And\nthis?", "Blue.")],
        [("Who are you?", "A model.")],
        [("What is  about?", "A bus.")],
    ]
    assert {turn.task for record in records for turn in record.turns} == {"chat"}
    assert records[0].messages(0, 5, 0)[0]["content"] == "<image>\nRender a clear summary of the photo."
    assert records[2].messages(0, 0, 0)[0]["content"] == "Who are you?"


def test_captions_of_images(tmp_path):
    entries = [entry("a", "Caption it.\n<image>", "a chair"), entry("b", "Hello.", "Hi.", image=None)]
    records, rejects = run(write(tmp_path, entries, task="image_caption"))
    assert [(turn.task, turn.question) for turn in records[0].turns] == [("image_caption", "Caption it.")]
    assert records[0].messages(0, 0, 0)[0]["content"] == "<image>\nCaption it."
    assert rejects == {"caption without an image": 1}
    with pytest.raises(ConfigError, match=r"task: .*'chat' or 'image_caption'"):
        write(tmp_path, entries, task="caption")


def test_what_is_left_out(tmp_path):
    good = entry("good", "<image>\nWhat?", "A cup.")
    twice = {"from": "human", "value": "Again?"}
    odd = [
        good,
        entry("a", "<image>\nWhat?", ""),
        entry("b", "<image>", "A cup."),
        entry("c", "<image>\nWhat?", "A cup.", "And?"),
        {**good, "id": "d", "conversations": [good["conversations"][0], twice, good["conversations"][1]]},
        {**good, "id": "e", "conversations": good["conversations"][1:]},
        {**good, "id": "f", "conversations": [{"from": "system", "value": "Be kind."}, *good["conversations"]]},
        entry("g", "<image>\nWhat is <region1>?", "A cup."),
        entry("h", "<image> and <image>", "Two."),
        entry("i", "What is <image>?", "A tag.", image=None),
        entry("j", "<image>\nWhat?", "See <image>."),
        entry("k", "<image>\nWhat?", 5),
        entry("l", "<image>\nWhat?", "Half \ud800."),
        entry("m", "<image>\nWhat?", "A cup.", image="../secret.jpg"),
        entry("n", "<image>\nWhat?", "A cup.", image="none.jpg"),
        entry("o", "<image>\nWhat?", "A cup.", image=["00453/a.jpg"]),
        entry("p"),
        {"id": "q"},
        {**good, "id": None},
        "text",
    ]
    records, rejects = run(write(tmp_path, odd))
    assert [record.id for record in records] == ["llava/good-0"]
    assert rejects == {
        "message empty": 2,
        "question without an answer": 1,
        "roles out of turn": 3,
        "placeholder in the text": 4,
        "record of another format": 6,
        "text that is not Unicode": 1,
        "image outside the folder": 1,
        "image file missing": 1,
    }


def test_another_file_is_told(tmp_path):
    made = write(tmp_path, [])
    made.data.write_text('{"images": []}')
    with pytest.raises(DataError, match=r"mix\.json: expected json that is an array"):
        run(made)

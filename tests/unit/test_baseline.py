"""Other models of transformers that answer the benchmarks: what they are given, and what becomes of their answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import draw_pictures
from PIL import Image
from tiny import CHAT, save_llava, tiny_tokenizer
from transformers import (
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from regiongpt import Region
from regiongpt.cli import main
from regiongpt.drawing import draw_regions
from regiongpt.evaluate.run import answer_batch
from regiongpt.evaluate.task import Item
from regiongpt.inference import vision_language
from regiongpt.inference.vision_language import Said, VisionLanguageModel
from regiongpt.prompts import question

BOX, OTHER, THIN = Region.box(10, 15, 50, 45), Region.box(60, 0, 100, 30), Region.box(0, 0, 50, 2)
NAMES = ("cat", "dog")
ASKED = question("classify", 0, regions=[1])


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """A Qwen2.5-VL with random weights; its processor has no part for videos, which needs torchvision."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("qwen"), tiny_tokenizer()
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    start, end, image, video = map(tokenizer.convert_tokens_to_ids, special)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**shape, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "rope_parameters": rope, "pad_token_id": 0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
                     "max_position_embeddings": 512},
        vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 56}, image_token_id=image,
        video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *_: None)
        template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=template)
        patch.setattr(vision_language.AutoProcessor, "from_pretrained", lambda *_: processor)
        return VisionLanguageModel(folder, "--baseline", "cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8))


def given(model: VisionLanguageModel, chat: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """What generation starts from: the tensors, and the text without the image's tokens."""
    seen: dict[str, Any] = {}
    generate = model._model.generate
    monkeypatch.setattr(model._model, "generate", lambda **inputs: seen.update(inputs) or generate(**inputs))
    model.ask([chat], 2)
    text = model.processor.tokenizer.decode(seen["input_ids"][0])
    return seen, text.replace("<image>", "").replace("<|image_pad|>", "")


def padded(image: Image.Image) -> Image.Image:
    """On a square of the mean colour of CLIP's images, by hand."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize(
    ("region_as", "words"),
    [
        ("outline", "the region represented by the outlined region?"),
        ("crop", "the region represented by this image?"),
        ("coordinates", "the region represented by the region [0.10, 0.35, 0.50, 0.65]?"),
    ],
)
def test_llava_is_given_all_of_the_image_and_shares_of_the_square(llava, photo, monkeypatch, region_as, words):
    model = VisionLanguageModel(llava, "--baseline", "cpu")
    seen, text = given(model, model.region_chat(photo, ASKED, [BOX], region_as, NAMES), monkeypatch)
    listed = "Answer with one of these names alone: cat, dog."
    assert text == f"USER:  What category name best describes {words} {listed} ASSISTANT:"
    pictures = {"outline": draw_regions(photo, [BOX], plain=True), "crop": photo.crop((10, 15, 50, 45))}
    shown = padded(pictures.get(region_as, photo))
    pixels = model.processor.image_processor(images=shown, return_tensors="pt")["pixel_values"]
    assert torch.equal(seen["pixel_values"], pixels)


def test_qwen_is_given_pixels_of_the_image_as_it_is_resized(qwen, photo, monkeypatch):
    seen, text = given(qwen, qwen.region_chat(photo, ASKED, [BOX], "coordinates"), monkeypatch)
    assert seen["image_grid_thw"].tolist() == [[1, 4, 8]]  # of 14 pixels: 60 x 100 became 56 x 112
    assert "represented by the region [11, 14, 56, 42]? Answer the question using COCO-80 category names." in text
    crop, _ = given(qwen, qwen.region_chat(photo, ASKED, [BOX], "crop"), monkeypatch)
    assert crop["image_grid_thw"].tolist() == [[1, 4, 6]]  # 30 x 40 became 56 x 84, the least that it takes


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen2_vl", "<|box_start|>(100,250),(500,750)<|box_end|>"),
        ("qwen3_vl", "[100, 250, 500, 750]"),
        ("internvl", "<box>[[100, 250, 500, 750]]</box>"),
    ],
)
def test_families_without_a_model_here_get_thousandths(family, text):
    model = VisionLanguageModel.__new__(VisionLanguageModel)
    model.family, model.processor = family, None
    assert model.box_text(BOX, (100, 60)) == text


def test_several_regions_have_numbers(qwen, photo):
    asked = question("locate", 0, regions=[1, 2], expression="a dog")
    (written,), (drawn,) = (qwen.region_chat(photo, asked, [BOX, OTHER], how) for how in ("coordinates", "outline"))
    assert "denoted by region 1 [11, 14, 56, 42] and region 2 [67, 0, 112, 28], which" in written["content"][1]["text"]
    assert written["content"][1]["text"].endswith("the template Region [x]. x is its number.")
    assert drawn["content"][1]["text"].startswith("The regions are outlined and numbered in the image. From the")
    one = qwen.region_chat(photo, ASKED, [BOX], "outline")[0]["content"][0]["image"]
    tagged = draw_regions(photo, [BOX])
    inside = np.s_[130:250, 100:290]  # of the box, clear of its outline, in the image enlarged to 640
    enlarged = photo.resize((640, 384), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(one)[inside], np.asarray(enlarged)[inside])
    assert not np.array_equal(np.asarray(tagged)[inside], np.asarray(enlarged)[inside])


def test_questions_are_answered_together_as_alone_and_one_that_cannot_be_asked_spoils_none(qwen, photo, tmp_path):
    photo.save(tmp_path / "a.png")
    photo.crop((0, 0, 33, 57)).save(tmp_path / "b.png")
    Image.new("RGB", (500, 2)).save(tmp_path / "thin.png")
    asked = {"image_id": 1, "sure": True, "max_new_tokens": 4}
    texts = {"a.png": ["What is it?", "What is <region1>?", "word " * 200], "b.png": ["Why?"], "thin.png": ["What?"]}
    items = [
        Item(id=text, image=tmp_path / name, question=text, regions=(BOX,) * ("region" in text), **asked)
        for name, own in texts.items()
        for text in own
    ]
    items.append(Item(id="lost", image=tmp_path / "c.png", question="What?", **asked))
    items.append(Item(id="outside", image=tmp_path / "b.png", question="<region1>?", regions=(OTHER,), **asked))
    items.append(Item(id="line", image=tmp_path / "thin.png", question="<region1>?", regions=(THIN,), **asked))
    together = answer_batch(qwen, items, "coordinates")
    alone = [answer_batch(qwen, [item], "coordinates")[0] for item in items]
    assert [each.get("text") for each in together] == [each.get("text") for each in alone]
    whys = ["", "", "too long", "", "aspect ratio", "no such file", "covers nothing", "aspect ratio"]
    assert all(why in each.get("refused", "") for why, each in zip(whys, together, strict=True))
    assert [bool(each.get("refused")) for each in together] == [bool(why) for why in whys]


def test_a_probability_is_of_the_text_and_its_end(llava, photo):
    model = VisionLanguageModel(llava, "--baseline", "cpu")
    chat = model.region_chat(photo, "What is it?")
    (said,) = model.ask([chat], 8, sure=True)
    assert said.ended
    inputs = model.processor.apply_chat_template(
        [chat], tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs={"return_tensors": "pt"}
    )
    whole = model._model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = model._model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits
    start = inputs["input_ids"].shape[1]
    steps = logits[0, start - 1 : -1].log_softmax(-1)
    assert said.probability == pytest.approx(float(steps.gather(1, whole[0, start:, None]).sum().exp()), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root, 3, "instances_dev.json")
    questions = [{"image": "1.png", "text": "Is there a cat in the image?", "label": "yes"}]
    (root / "coco_pope_random.json").write_text("\n".join(map(json.dumps, questions)))
    return root


def run(data: Path, out: Path, *words: object, task: str = "coco_cls") -> int:
    split = ["--split", "dev"] if task == "coco_cls" else []
    return main(["evaluate", task, "--data", str(data), *split, "--out", str(out), *map(str, words)])


def read(path: Path) -> Any:
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(path.read_text())
    )


def test_answers_are_kept_and_scored_and_a_finished_run_asks_nothing(data, llava, tmp_path, monkeypatch, capsys):
    said = ["cat", " dog.\n", "Cat", "dog", "a cat", "cat"]  # the truth is cat, dog, cat, dog, cat, dog
    asked: list[Any] = []

    def answers(model: VisionLanguageModel, chats: list[Any], most: int, **how: Any) -> list[Said]:
        if most == 1:  # when it is loaded
            return []
        asked.append(len(chats))
        return [Said(said[sum(asked[:-1]) + k], True, 9, 2, 0.9 - k / 10) for k in range(len(chats))]

    monkeypatch.setattr(VisionLanguageModel, "ask", answers)
    words = ["--baseline", llava, "--region-as", "crop", "--batch-size", "4"]
    assert run(data, tmp_path / "out", *words) == 0
    assert asked == [4, 2]
    assert f"answers of the baseline {'/'.join(llava.parts[-2:])} (llava), regions as crop" in capsys.readouterr().out
    folder = tmp_path / "out" / "coco_cls"
    assert "answers of the baseline" in (folder / "index.html").read_text()
    rows = read(folder / "predictions.jsonl")
    assert [row["text"] for row in rows] == [text.strip() for text in said]
    assert [row["probability"] for row in rows] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.9, 0.8])
    results = read(folder / "result.json")["protocols"]
    assert set(results) == {"generate and match", "generate with probability"}
    assert results["generate and match"]["accuracy"]["value"] == pytest.approx(3 / 6)
    assert results["generate and match"]["valid_answers"]["value"] == pytest.approx(4 / 6)
    # As any system's answers are scored.
    assert run(data, tmp_path / "again", "--predictions", folder / "predictions.jsonl") == 0
    assert read(tmp_path / "again" / "coco_cls" / "result.json")["protocols"] == results
    assert run(data, tmp_path / "out", *words) == 0
    assert run(data, tmp_path / "out", "--baseline", llava, "--region-as", "outline") == 2
    assert "another model, other settings" in capsys.readouterr().err
    assert sum(asked) == 6


def test_a_random_model_answers_what_it_says(data, llava, tmp_path):
    assert run(data, tmp_path / "cls", "--baseline", llava, "--region-as", "coordinates", "--limit", "1") == 0
    assert run(data, tmp_path / "pope", "--baseline", llava, task="pope") == 0
    model = VisionLanguageModel(llava, "--baseline", "cpu")
    picture = Image.open(data / "images" / "1.png")
    asked = model.region_chat(picture, "Is there a cat in the image?")
    (row,) = read(tmp_path / "pope" / "pope" / "predictions.jsonl")
    assert row["text"] == model.ask([asked], 8)[0].text.strip()
    first = read(data / "instances_dev.json")["annotations"][0]["bbox"]
    box = Region.box(*first[:2], first[0] + first[2], first[1] + first[3])
    asked = model.region_chat(picture, ASKED, [box], "coordinates", NAMES)
    row = read(tmp_path / "cls" / "coco_cls" / "predictions.jsonl")[0]
    assert row["text"] == model.ask([asked], 16)[0].text.strip()


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("coco_cls", ["--baseline", "LLAVA"], "coco_cls asks about regions; give --region-as"),
        ("pope", ["--baseline", "LLAVA", "--region-as", "crop"], "no question of pope is about a region"),
        ("facts", ["--baseline", "LLAVA", "--region-as", "crop"], "facts: reads the sentences"),
        ("coco_cls", ["--baseline", "LLAVA", "--region-as", "crop", "--choices"], "--choices: a baseline's names"),
        ("drawn", ["--baseline", "LLAVA", "--region-as", "crop"], "asks about several regions at once"),
        ("pope", ["--baseline", "LLAVA", "--detail", "careful"], "--detail: for RegionGPT checkpoints alone"),
        ("pope", ["--baseline", "LLAVA", "--model", "x"], "--model: for RegionGPT checkpoints alone"),
        ("pope", ["--batch-size", "2"], "--batch-size: only with --baseline"),
        ("pope", ["--baseline", "LLAVA", "--predictions", "x"], "--baseline: no model is run"),
        ("coco_cls", ["--baseline", "IDEFICS", "--region-as", "coordinates"], "no convention known for idefics3"),
        ("pope", ["--baseline", "NANO"], "a RegionGPT checkpoint; give it as --model"),
        ("pope", ["--baseline", "TEXT"], "cannot load it as a vision-language model"),
        ("pope", ["--baseline", "nowhere"], "nowhere/config.json: not a readable JSON file"),
        ("pope", ["--baseline", "LLAVA", "--dtype", "int8"], "int8 is for RegionGPT checkpoints alone"),
        ("pope", ["--baseline", "BARE"], "no chat template"),
        ("pope", ["--baseline", "BLIND"], "cannot load it as a vision-language model"),
        ("pope", ["--baseline", "TORN"], "does not take an image and a text"),
        ("pope", ["--baseline", "MUTE"], "transformers cannot answer: The total number of <image> tokens"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(data, llava, tmp_path, capsys, monkeypatch, task, words, message):
    from evaluating import Drawn, register

    register(monkeypatch)
    pair = [Item(id="1", image=data / "images" / "1.png", image_id=1, question="Which?", regions=(BOX, BOX))]
    monkeypatch.setattr(Drawn, "read_items", lambda self: pair)
    for name, lacking in {"BARE": "chat_template", "BLIND": "processor_config", "TORN": "", "MUTE": ""}.items():
        if name in words:
            (tmp_path / name).mkdir()
            for file in llava.iterdir():
                if not (lacking and lacking in file.name):
                    (tmp_path / name / file.name).write_bytes(file.read_bytes())
    for name, template in {"TORN": "{{ messages[0].content.strip() }}", "MUTE": "nothing"}.items():
        if name in words:
            (tmp_path / name / "chat_template.jinja").write_text(template)
    (tmp_path / "IDEFICS").mkdir()
    (tmp_path / "IDEFICS" / "config.json").write_text('{"model_type": "idefics3"}')
    (tmp_path / "NANO").mkdir()
    (tmp_path / "NANO" / "config.json").write_text('{"model_type": "regiongpt"}')
    LlamaConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "TEXT")
    named = [llava if word == "LLAVA" else tmp_path / word if word.isupper() else word for word in words]
    assert run(data, tmp_path / "out", *named, task=task) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("regiongpt: error: ")

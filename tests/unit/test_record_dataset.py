"""Records as training examples: what is learnt under every chat template, what is cut, what is refused."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_tokenizer
from tiny_checkpoint import make_checkpoint
from transformers import SiglipImageProcessorPil

from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Drawn
from regiongpt.errors import DataError
from regiongpt.model import weights
from regiongpt.model.processing import IGNORED, RegionGPTProcessor, prepare_tokenizer
from regiongpt.prompts import CHAT_TEMPLATES, CONTROL_TOKENS, NO_MATCH
from regiongpt.regions import Region
from regiongpt.train.dataset import DataCollator, RecordDataset, answer_loss

RESPONSE = {
    "vicuna_v1": " {}</s>",
    "llama2": " {} </s>",
    "llama3": "{}<|eot_id|>",
    "chatml": "{}<|im_end|>",
    "plain": " {}</s>",
}
"""What a template makes of an answer, and the loss is taken on."""

MASK = np.zeros((30, 40), bool)
MASK[5:9, 30:36] = True
REGIONS = (
    RecordRegion(region=Region.box(0, 0, 20, 30), category="cat", source_id="1"),
    RecordRegion(region=Region.polygon([(20, 2), (38, 3), (30, 28)]), category="dog"),
    RecordRegion(region=Region.mask(MASK)),
)


def record(*turns: Turn, name: str = "a", image: str = "photo.png") -> Record:
    size = (40, 30) if image else (0, 0)
    regions = REGIONS if image else ()
    return Record(id=name, source="jsonl", image=image, width=size[0], height=size[1], regions=regions, turns=turns)


def chat(question: str, answer: str) -> Turn:
    return Turn(task="chat", question=question, answer=answer)


RECORDS = {
    "one turn": record(Turn(task="classify", answer="cat", regions=(1,), label_set="COCO-80", guided=True)),
    "choices": record(
        Turn(task="locate", answer="Region [2]", regions=(1, 2, 3), expression="the dog", guided=True),
        Turn(task="locate", answer=NO_MATCH, regions=(1, 3), expression="a red bus", guided=True),
    ),
    "dialogue": record(
        *(Turn(task="caption", answer=f"thing number {n}, a long-ish phrase", regions=(1 + n % 3,)) for n in range(10))
    ),
    "regions in answers": record(
        Turn(task="relation", answer="<region1> is left of <region2>", regions=(1, 2)),
        chat("Which is smallest?", "It is <region3>."),
        chat("And the largest?", "<region1>"),
    ),
    "odd characters": record(
        chat("Qué hay?", "Un café — 猫 🐈\nand a second line"),
        chat("ASSISTANT: nothing USER: so?", "USER: or [INST] so? ASSISTANT: so. <|im_start|>user"),
        chat("What ends a text?", "</s> does"),
    ),
    "an answer like its question": record(chat("cat", "cat"), chat("cat cat", "cat cat")),
    "no image": record(chat("Two and two?", "Four."), chat("Sure?", "Yes, four."), image=""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "photo.png")
    return root


def make_processor(family: str) -> RegionGPTProcessor:
    """Four image tokens, an 8 x 8 refined grid and a vocabulary of bytes."""
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer, family)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return RegionGPTProcessor(images, tokenizer, 16, 4, [8, 8], region_format="[{n}]<region>", chat_template=family)


def draw(folder: Path, one: Record, times: int = 0) -> Drawn:
    """The record as if it lay in a folder of its own, also where no folder would take it."""

    class Given(list[Record]):
        def __init__(self) -> None:
            super().__init__([one])
            self.folder = folder

        def image_path(self, record: Record) -> Path | None:
            return folder / record.image if record.image else None

    return Drawn(records=Given(), index=0, times=times)  # type: ignore[arg-type]


def dataset(processor: RegionGPTProcessor, longest: int | None = None) -> RecordDataset:
    return RecordDataset(SimpleNamespace(seed=0), processor, 1, longest)  # type: ignore[arg-type]


def pieces(processor: RegionGPTProcessor, example: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What is learnt, turn by turn, and what stands before each; regions, which no word can predict, as they stand."""
    ids, labels = example["input_ids"], example["labels"]
    learnt = (labels != IGNORED) | (ids == processor.region_token_id) & torch.roll(labels != IGNORED, -1)
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    texts: tuple[list[str], list[str]] = ([], [])
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learnt[end] != learnt[start]:
            text = processor.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
            texts[0 if learnt[start] else 1].append(text)
            start = end
    return texts


def as_read(text: str, family: str) -> str:
    """A text of a record as the model reads it: what only a template may write is broken up with a blank."""
    for token in ("</s>", *CONTROL_TOKENS[family]):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return re.sub(r"<region(\d)>", r"[\1]<region>", text)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_the_label_mask_covers_exactly_the_responses(family: str, name: str, folder: Path) -> None:
    processor, one = make_processor(family), RECORDS[name]
    asked = []
    for times in (0, 1):
        example = dataset(processor).encode(draw(folder, one, times))
        learnt, before = pieces(processor, example)
        asked.append(before)
        assert learnt == [RESPONSE[family].format(as_read(turn.answer, family)) for turn in one.turns]
        questions = [message["content"] for message in one.messages(0, times, 0)[::2]]
        for question, text in zip(questions, before, strict=False):
            assert as_read(question.removeprefix("<image>\n"), family) in text
        assert example["input_ids"].tolist().count(processor.image_token_id) == (4 if one.image else 0)
    assert (asked[0] != asked[1]) or name != "dialogue"


def test_image_and_regions_are_those_of_inference(folder: Path) -> None:
    processor = make_processor("plain")
    one = RECORDS["choices"]
    example = dataset(processor).encode(draw(folder, one))
    expected = processor.encode_conversation(
        one.messages(0, 0, 0), image=folder / "photo.png", regions=[each.region for each in one.regions]
    )
    for name in ("input_ids", "labels", "pixel_values", "region_weights", "region_ids"):
        assert torch.equal(example[name], expected[name]), name


def test_a_long_conversation_is_cut_where_a_turn_ends(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    processor = make_processor("vicuna_v1")
    whole = dataset(processor).encode(draw(folder, RECORDS["dialogue"]))
    parts = [record(*RECORDS["dialogue"].turns[:turns]) for turns in (2, 3)]
    ends = [len(dataset(processor).encode(draw(folder, part))["labels"]) for part in parts]
    for limit, length in ((ends[0], ends[0]), (ends[1] - 1, ends[0]), (ends[1], ends[1])):
        data = dataset(processor, limit)
        with caplog.at_level(logging.WARNING):
            example = data.encode(draw(folder, RECORDS["dialogue"]))
            data.encode(draw(folder, RECORDS["dialogue"]))
        assert len(example["input_ids"]) == length
        assert torch.equal(example["labels"], whole["labels"][:length])
        assert int((example["input_ids"] == processor.region_token_id).sum()) == len(example["region_ids"])
        assert len(caplog.records) == 1
        assert f"{len(whole['labels'])} tokens in 10 turn(s)" in caplog.text
        caplog.clear()


def test_a_long_answer_is_cut_and_a_question_that_leaves_no_room_for_one_is_refused(folder: Path) -> None:
    processor = make_processor("plain")
    one = record(chat("What is <region1>?", "A cat on <region1>, " + "a very long tale " * 9 + "of <region2>"))
    whole = dataset(processor).encode(draw(folder, one))
    example = dataset(processor, 90).encode(draw(folder, one))
    assert torch.equal(example["input_ids"], whole["input_ids"][:90])
    assert torch.equal(example["labels"], whole["labels"][:90])
    assert example["region_ids"].tolist() == [0, 0]
    with pytest.raises(DataError, match="record a: a question leaves no room for an answer in the context of 12"):
        dataset(processor, 12).encode(draw(folder, one))


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (record(chat("What is <region1>?", " ")), "expected an answer as message 2 of 2"),
        (record(chat("What is it?", "<region9>")), "<region9> stands for region 9"),
        (record(chat("What?", "A cat"), image="text.png"), "text.png: expected an image"),
        (record(chat("What?", "A cat"), image="wide.png"), "expected an image of 40 x 30 pixels, got 41 x 30"),
    ],
)
def test_a_record_from_which_nothing_can_be_learnt_is_refused_by_its_name(
    one: Record, message: str, folder: Path
) -> None:
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (41, 30)).save(folder / "wide.png")
    with pytest.raises(DataError, match=f"record a: .*{message}.*regiongpt inspect"):
        dataset(make_processor("plain")).encode(draw(folder, one))


def test_texts_without_an_image_train_in_one_batch_with_the_others(tmp_path: Path, folder: Path) -> None:
    model, processor = weights.load(make_checkpoint(tmp_path, context=2048))
    names = ("one turn", "no image", "regions in answers", "no image")
    examples = [dataset(processor).encode(draw(folder, RECORDS[name])) for name in names]
    collate = DataCollator(processor)
    with torch.no_grad():
        together = float(answer_loss(model, collate(examples), 1))
        alone = [float(answer_loss(model, collate([example]), 1)) for example in examples]
    assert together == pytest.approx(sum(alone), rel=1e-4)
    assert alone[1] == alone[3]
    assert "pixel_values" not in collate([examples[1], examples[3]])

"""What the language model reads before it sees: texts that do not see each other, exercises in finding a name."""

import numpy as np
import pytest
import torch
from conversations import ClassStatistics, ConversationSampler
from reading import (
    FIRST,
    LENGTH,
    READING_MIX,
    UNKNOWN,
    Text,
    TextDataset,
    conversation_texts,
    exercise,
    placing,
)
from sentences import plain_place
from test_dataset import annotated

from regiongpt.data.facts import size_name
from regiongpt.model.processing import IGNORED
from regiongpt.prompts import COCO_80, IMAGE_TOKEN, REGION_TOKEN
from regiongpt.train.stages import train_tokenizer

FORM = "[{n}]<region>"


@pytest.fixture(scope="module")
def tokenizer():
    lines = [*COCO_80, "Find each of these names among the regions.", "What is [1]? Is there a cat? Region [2]"]
    return train_tokenizer(lines, 600, 512)


def conversations(form=FORM, grid=(2, 2)):
    data = annotated(9)
    sampler = ConversationSampler(ClassStatistics.of(data), READING_MIX)
    return list(conversation_texts(data, sampler, form, grid, 0))


@pytest.mark.parametrize("form", [FORM, "<region>"])
def test_each_region_of_a_text_has_its_class_and_each_cell_one_that_it_shows(form):
    texts = conversations(form)
    for text in texts:
        assert "".join(text.pieces).count(REGION_TOKEN) == len(text.shown)
        assert len(text.cells) == 4 * text.pieces[0].count(IMAGE_TOKEN)
        if len(text.shown) == 1 and text.pieces[1][1:] in COCO_80:
            assert COCO_80[text.shown[0]] == text.pieces[1][1:]
    assert any(text.shown and text.cells for text in texts)
    assert any(text.shown and not text.cells for text in texts)
    cells = {cell for text in texts for cell in text.cells}
    assert cells
    assert cells <= {*range(UNKNOWN + 1)}


def test_an_exercise_numbers_every_name_by_its_region():
    for seed in range(40):
        text = exercise(FORM, np.random.default_rng(seed), listed := seed % 2 == 1)
        names = [COCO_80[index] for index in text.shown]
        assert len(set(names)) == len(names) >= 2
        whole = "".join(text.pieces).split("\n")[1]
        for number, name in enumerate(names, 1):
            assert f" {name} [{number}]" * listed in whole
            assert f" {name}{number}" * (not listed) in whole
        assert set("".join(text.pieces[1::2])) == set("12345"[: len(names)])


def test_windows_hold_whole_texts_apart_and_depend_on_the_item_alone(tokenizer):
    texts = conversations()
    data = TextDataset(texts, tokenizer, FORM, (2, 2), seed=0, epochs=2)
    region, image = (tokenizer.convert_tokens_to_ids(token) for token in (REGION_TOKEN, IMAGE_TOKEN))
    assert len(data) == -(-2 * data.tokens // LENGTH)
    for item in range(len(data)):
        window = data[item]
        assert {tuple(window[name].shape) for name in ("input_ids", "labels", "stand_ins", "turns")} == {(LENGTH,)}
        begins = window["input_ids"] == tokenizer.bos_token_id
        assert torch.equal(begins.cumsum(0)[window["turns"] >= 0], window["turns"][window["turns"] >= 0])
        stands = (window["input_ids"] == region) | (window["input_ids"] == image)
        assert torch.equal(window["stand_ins"] >= 0, stands)
        learnt = window["labels"] != IGNORED
        assert learnt.any()
        assert torch.equal(window["labels"][learnt], window["input_ids"][learnt])
        if item < FIRST * len(data):
            assert window["blurs"] == 0
    again = TextDataset(texts, tokenizer, FORM, (2, 2), seed=0, epochs=2)
    assert torch.equal(again[3]["input_ids"], data[3]["input_ids"])
    other = TextDataset(texts, tokenizer, FORM, (2, 2), seed=1, epochs=2)
    assert not torch.equal(other[3]["input_ids"], data[3]["input_ids"])


def test_an_exercise_in_placing_says_where_each_region_is_or_how_large():
    rng = np.random.default_rng(0)
    for _ in range(100):
        text = placing(FORM, rng, (2, 2))
        assert len(text.boxes) == len(text.shown) == len(text.pieces[1::2])
        for given, said in zip(text.pieces[::2], text.pieces[1::2], strict=False):
            box = text.boxes[int(given[-1]) - 1 if len(text.boxes) > 1 else 0]
            assert said.strip() in (plain_place(box, 1, 1), size_name(box, 1, 1))


BOX = (0.1, 0.2, 0.3, 0.4)


def test_only_what_is_learnt_is_a_target_and_an_image_takes_its_cells(tokenizer):
    text = Text(
        pieces=(f"{IMAGE_TOKEN}\n[1]{REGION_TOKEN}\n cat", "1", " dog", "2", ""),
        shown=(3,),
        cells=(5, UNKNOWN),
        boxes=(BOX,),
    )
    data = TextDataset([text], tokenizer, FORM, (2, 2), seed=0, epochs=1)
    ids, labels, shown, boxes = data.documents[0]
    targets = [token for token in labels if token != IGNORED]
    assert tokenizer.decode(targets) == "12"
    assert ids.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) == 2
    assert [each for each in shown if each >= 0] == [5, UNKNOWN, 3]
    assert [each for each in boxes if any(each)] == [BOX]
    assert tokenizer.eos_token_id not in ids

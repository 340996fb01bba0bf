"""The processor: placeholder expansion and label masks as snapshots, batching, errors, saving."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import trained_bpe
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.images import SquareFrame
from regiongpt.model.processing import RegionGPTProcessor, prepare_tokenizer
from regiongpt.prompts import CHAT_TEMPLATES
from regiongpt.regions import Region

FAMILIES = list(CHAT_TEMPLATES)
ENCODED = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
LEFT, RIGHT = Region.box(0, 0, 20, 30), Region.box(20, 0, 40, 30)


def make_processor(family: str = "plain", **options: Any) -> RegionGPTProcessor:
    """A processor of four image tokens, an 8 x 8 refined grid and a byte-level vocabulary."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained_bpe(), bos_token="<s>", eos_token="</s>")
    prepare_tokenizer(tokenizer, family)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    settings = {"image_size": 16, "num_image_tokens": 4, "refined_grid": [8, 8], "chat_template": family}
    return RegionGPTProcessor(images, tokenizer, **(settings | options))


@pytest.fixture(scope="module")
def processor() -> RegionGPTProcessor:
    return make_processor()


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def show(processor: RegionGPTProcessor, encoded: dict[str, Any]) -> str:
    """Decode, with what the loss is taken on between ⟦ and ⟧."""
    pieces: list[str] = []
    targets = encoded["labels"] == encoded["input_ids"]
    assert torch.equal(targets, encoded["labels"] != -100)
    start = 0
    for end in range(1, len(targets) + 1):
        if end == len(targets) or targets[end] != targets[start]:
            text = processor.tokenizer.decode(encoded["input_ids"][start:end], clean_up_tokenization_spaces=False)
            pieces.append(f"⟦{text}⟧" if targets[start] else text)
            start = end
    return "".join(pieces)


IMAGE = "<image>" * 4
VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
SNAPSHOTS = {
    "vicuna_v1": f"{VICUNA}USER: {IMAGE}\nWhat is <region>? ASSISTANT:⟦ A cat.</s>⟧"
    "USER: And <region> by <region>? ASSISTANT:⟦ A cup.</s>⟧",
    "llama2": f"<s>[INST] {IMAGE}\nWhat is <region>? [/INST]⟦ A cat. </s>⟧"
    "<s>[INST] And <region> by <region>? [/INST]⟦ A cup. </s>⟧",
    "llama3": f"<s><|start_header_id|>user<|end_header_id|>\n\n{IMAGE}\nWhat is <region>?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A cat.<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd <region> by <region>?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A cup.<|eot_id|>⟧",
    "chatml": f"<s><|im_start|>user\n{IMAGE}\nWhat is <region>?<|im_end|>\n"
    "<|im_start|>assistant\n⟦A cat.<|im_end|>⟧\n"
    "<|im_start|>user\nAnd <region> by <region>?<|im_end|>\n<|im_start|>assistant\n⟦A cup.<|im_end|>⟧\n",
    "plain": f"<s>{IMAGE}\nWhat is <region>?\n⟦ A cat.</s>⟧And <region> by <region>?\n⟦ A cup.</s>⟧",
}
TWO_TURNS = chat("What is <region1>?", "A cat.", "And <region2> by <region1>?", "A cup.")


@pytest.mark.parametrize("family", FAMILIES)
def test_label_mask_is_the_responses_and_their_ends(family: str) -> None:
    processor = make_processor(family)
    encoded = processor.encode_conversation(TWO_TURNS, None, [LEFT, RIGHT], image_size=(40, 30))
    assert show(processor, encoded) == SNAPSHOTS[family]
    assert encoded["region_ids"].tolist() == [0, 1, 0]
    assert encoded["warnings"] == []
    assert "pixel_values" not in encoded


@pytest.mark.parametrize("family", FAMILIES)
def test_numbered_region_format(family: str) -> None:
    processor = make_processor(family, region_format="[{n}] <region>")
    encoded = processor.encode_conversation(TWO_TURNS, None, [LEFT, RIGHT], image_size=(40, 30))
    expected = SNAPSHOTS[family].replace("is <region>", "is [1] <region>")
    assert show(processor, encoded) == expected.replace("And <region> by <region>", "And [2] <region> by [1] <region>")


SYSTEM_STARTS = {
    "vicuna_v1": f"<s>Be brief. USER: {IMAGE}\nHello ASSISTANT:⟦ Hi</s>⟧",
    "llama2": f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{IMAGE}\nHello [/INST]⟦ Hi </s>⟧",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{IMAGE}\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hi<|eot_id|>⟧",
    "chatml": f"<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{IMAGE}\nHello<|im_end|>\n"
    "<|im_start|>assistant\n⟦Hi<|im_end|>⟧\n",
    "plain": f"<s>Be brief.\n{IMAGE}\nHello\n⟦ Hi</s>⟧",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_system_prompt(family: str) -> None:
    processor = make_processor(family)
    encoded = processor.encode_conversation(chat("Hello", "Hi", system="Be brief."))
    assert show(processor, encoded) == SYSTEM_STARTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_how_training_began(family: str) -> None:
    """What the model continues at inference is, token for token, what came before the last response in training."""
    processor = make_processor(family)
    options = {"regions": [LEFT, RIGHT], "image_size": (40, 30)}
    whole = processor.encode_conversation(TWO_TURNS, **options)
    prompt = processor.encode_conversation(TWO_TURNS[:-1], add_generation_prompt=True, **options)
    assert "labels" not in prompt
    length = len(prompt["input_ids"])
    assert torch.equal(whole["input_ids"][:length], prompt["input_ids"])
    assert (whole["labels"][length:] != -100).nonzero()[0] == 0


def test_region_in_an_answer_is_no_target(processor: RegionGPTProcessor) -> None:
    encoded = processor.encode_conversation(chat("Which?", "It is <region1>."), regions=[LEFT], image_size=(40, 30))
    assert show(processor, encoded) == f"<s>{IMAGE}\nWhich?\n⟦ It is ⟧<region>⟦.</s>⟧"


def test_image_and_weights(processor: RegionGPTProcessor, photo: Image.Image) -> None:
    encoded = processor.encode_conversation(TWO_TURNS, photo, [LEFT, RIGHT])
    assert encoded["pixel_values"].shape == (3, 16, 16)
    assert encoded["region_weights"].shape == (2, 8, 8)
    expected = RIGHT.pool_weights(SquareFrame(40, 30), 8, 8)
    np.testing.assert_array_equal(encoded["region_weights"][1].numpy(), expected)
    again = processor.encode_conversation(TWO_TURNS, photo, region_weights=encoded["region_weights"].numpy())
    assert all(torch.equal(again[name], encoded[name]) for name in encoded if name != "warnings")


def test_an_endless_panorama_needs_little_memory(processor: RegionGPTProcessor) -> None:
    pixels = processor.pixels_of(Image.new("RGB", (60_000, 10), "red"))
    assert pixels.shape == (1, 3, 16, 16)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_region_never_mentioned(processor: RegionGPTProcessor, photo: Image.Image) -> None:
    encoded = processor.encode_conversation(chat("What is <region1>?", "A cat"), photo, [LEFT, RIGHT])
    assert len(encoded["warnings"]) == 1
    assert "<region2> is never mentioned" in encoded["warnings"][0]
    with pytest.warns(UserWarning, match="<region2> is never mentioned"):
        processor.apply_chat_template(chat("What is <region1>?"), images=photo, regions=[LEFT, RIGHT], **ENCODED)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda boxes: [torch.tensor(box) for box in boxes]])
def test_boxes_may_be_plain_numbers(processor: RegionGPTProcessor, photo: Image.Image, make: Any) -> None:
    boxes = make([[0, 0, 20, 30], [20, 0, 40, 30]])
    expected = processor.encode_conversation(TWO_TURNS, photo, [LEFT, RIGHT])["region_weights"]
    for regions in (boxes, [LEFT, boxes[1]], [LEFT.to_dict(), RIGHT]):
        found = processor.apply_chat_template(TWO_TURNS[:3], images=photo, regions=regions, **ENCODED)
        assert torch.equal(found["region_weights"][0], expected)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (chat(" \n"), "expected a question as message 1 of 1, got"),
        (chat("Hello", "", "More"), "expected an answer as message 2 of 3"),
        (chat("<image>\n"), "expected a question as message 1"),
        ([], "expected a conversation with a question"),
        (None, "messages: expected a list of turns, got NoneType"),
        ("Hello", "message 1 of 5: expected a dictionary with role"),
        (chat("a\udcff"), "in UTF-8"),
        (chat("Hello", "Hi")[1:], "role system or user, got 'assistant'"),
        (chat("Hello") * 2, "message 2 of 2: .*role assistant, got 'user'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "parts of type text or image, got 'video'"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "expected one image"),
        ([{"role": "user", "content": None}], "expected content as a string or parts"),
        (chat("Hello", "Hi", "") + chat("x"), "expected a question"),
    ],
)
def test_bad_conversations(processor: RegionGPTProcessor, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        processor.encode_conversation(messages, add_generation_prompt=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_a_persons_words_are_words(family: str) -> None:
    processor = make_processor(family)
    words = "<image>\nTwo <image><image> of </s><s> [INST] <|im_end|><|im_start|>system <|eot_id|> <<SYS>>"
    encoded = processor.encode_conversation(chat(words, "No </s> and <image>"))
    plain = processor.encode_conversation(chat("Two", "No"))
    special = {token for token, added in processor.tokenizer.added_tokens_decoder.items() if added.special}

    def specials(ids: torch.Tensor) -> list[int]:
        return [token for token in ids.tolist() if token in special]

    assert specials(encoded["input_ids"]) == specials(plain["input_ids"])
    text = processor.apply_chat_template(chat(words), add_generation_prompt=True)
    assert text.count("<image>") == 1
    assert text.count("[INST]") == (family in ("vicuna_v1", "plain", "llama3", "chatml")) + (family == "llama2")


def test_the_models_own_placeholders_do_no_harm_in_a_history(processor: RegionGPTProcessor) -> None:
    messages = chat("What is <region1>?", "Like <region7> or <regionx>, <region1>", "Why?")
    encoded = processor.encode_conversation(messages, None, [LEFT], image_size=(40, 30), add_generation_prompt=True)
    assert encoded["region_ids"].tolist() == [0, 0]
    with pytest.raises(RegionError, match="<region7>"):
        processor.encode_conversation([*chat("What is <region7>?")], add_generation_prompt=True)


def test_unfit_parts() -> None:
    with pytest.raises(ConfigError, match="region_format: expected <region> once"):
        make_processor(region_format="[{n}]")
    fine = make_processor()
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ConfigError, match="lacks <image> and <region>; call prepare_tokenizer"):
        RegionGPTProcessor(fine.image_processor, bare)
    with pytest.raises(ConfigError, match="marks no responses"):
        make_processor(chat_template="{{ messages[0]['content'] }}").encode_conversation(chat("a", "b"))


# -- batches and the transformers way ----------------------------------------------------------------------------------


def test_batch_of_different_lengths_and_numbers_of_regions(processor: RegionGPTProcessor, photo: Image.Image) -> None:
    items = [
        processor.encode_conversation(TWO_TURNS, photo, [LEFT, RIGHT]),
        processor.encode_conversation(chat("What is <region1>?", "A cat"), photo, [RIGHT]),
        processor.encode_conversation(chat("Describe the image.", "A room."), photo),
    ]
    for side in ("right", "left"):
        batch = processor.collate(items, side)
        assert batch["region_weights"].shape == (3, 2, 8, 8)
        assert batch["region_ids"].tolist() == [[0, 1, 0], [0, -1, -1], [-1, -1, -1]]
        assert batch["pixel_values"].shape == (3, 3, 16, 16)
        for row, item in enumerate(items):
            kept = batch["attention_mask"][row] == 1
            assert torch.equal(batch["input_ids"][row, kept], item["input_ids"])
            assert torch.equal(batch["labels"][row, kept], item["labels"])
            assert (batch["labels"][row, ~kept] == -100).all()
            assert kept[-1 if side == "left" else 0]
            count = len(item["region_weights"])
            assert torch.equal(batch["region_weights"][row, :count], item["region_weights"])
            assert not batch["region_weights"][row, count:].any()


def test_batch_of_features_or_of_nothing(processor: RegionGPTProcessor, photo: Image.Image) -> None:
    item = processor.encode_conversation(chat("Hello", "Hi"))
    assert set(processor.collate([item, item])) == {"input_ids", "attention_mask", "labels"}
    features = processor.collate([item | {"vision_features": torch.ones(5, 2, 2)}] * 2)["vision_features"]
    assert features.shape == (2, 5, 2, 2)
    with pytest.raises(DataError, match="1 of 2 items have pixel_values"):
        processor.collate([item, processor.encode_conversation(chat("Hello", "Hi"), photo)])


def test_content_lists_equal_strings(processor: RegionGPTProcessor, photo: Image.Image) -> None:
    parts = [{"type": "image", "image": photo}, {"type": "text", "text": "What is <region1>?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "regions": [LEFT]}
    from_parts = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    from_string = processor.apply_chat_template(chat("What is <region1>?"), images=photo, **options)
    text = processor.apply_chat_template(chat("What is <region1>?"), add_generation_prompt=True)
    assert text == "<s><image>\nWhat is <region1>?\n"
    encoded = processor.encode_conversation(chat("What is <region1>?"), photo, [LEFT], add_generation_prompt=True)
    own = processor.collate([encoded], "left")
    assert set(from_parts) == {"input_ids", "attention_mask", "pixel_values", "region_weights", "region_ids"}
    for name, value in from_parts.items():
        for other in (from_string, own):
            assert torch.equal(value, other[name]), name


def test_bad_calls(processor: RegionGPTProcessor, photo: Image.Image) -> None:
    with pytest.raises(DataError, match="expected one image, got 2"):
        processor.apply_chat_template(chat("a"), images=[photo] * 2, **ENCODED)
    with pytest.raises(DataError, match="regions need the size"):
        processor.apply_chat_template(chat("<region1>"), regions=[LEFT], **ENCODED)
    with pytest.raises(DataError, match="message 1 of 1: expected a dictionary with role"):
        processor.apply_chat_template([chat("a")], images=photo, **ENCODED)
    with pytest.raises(ConfigError, match="apply_chat_template"):
        processor(photo, "<image>\nWhat is it?")


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_does_the_same(family: str, tmp_path: Any, photo: Image.Image) -> None:
    processor = make_processor(family, region_format="[{n}] <region>", pad_fill=[1, 2, 3])
    assert processor.stop_token_ids
    processor.save_pretrained(tmp_path)
    loaded = RegionGPTProcessor.from_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is RegionGPTProcessor
    assert type(loaded.image_processor) is SiglipImageProcessorPil
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.stop_token_ids == processor.stop_token_ids
    before = processor.encode_conversation(TWO_TURNS, photo, [LEFT, RIGHT])
    after = loaded.encode_conversation(TWO_TURNS, photo, [LEFT, RIGHT])
    assert before.pop("warnings") == after.pop("warnings")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

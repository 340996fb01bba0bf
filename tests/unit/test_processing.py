"""The processor: placeholder expansion and label masks as snapshots, batching, errors, saving."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_language, save_tower, tower_config, trained_bpe
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, SiglipImageProcessorPil

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.images import SquareFrame
from regiongpt.model import weights
from regiongpt.model.processing import RegionGPTProcessor, prepare_tokenizer
from regiongpt.prompts import CHAT_TEMPLATES
from regiongpt.regions import Region

FAMILIES = list(CHAT_TEMPLATES)
ENCODED = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
LEFT, RIGHT = Region.box(0, 0, 20, 30), Region.box(20, 0, 40, 30)


def make_processor(family: str = "plain", tokenizer: Any = None, **options: Any) -> RegionGPTProcessor:
    """A processor of four image tokens, an 8 x 8 refined grid and, by default, a byte-level vocabulary."""
    if tokenizer is None:
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


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


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


# What a system text changes in them.
SYSTEM = {
    "vicuna_v1": (VICUNA, "<s>Be brief. "),
    "llama2": ("[INST] ", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n"),
    "llama3": ("<s>", "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"),
    "chatml": ("<s>", "<s><|im_start|>system\nBe brief.<|im_end|>\n"),
    "plain": ("<s>", "<s>Be brief.\n"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_label_mask_is_the_responses_and_their_ends(family: str) -> None:
    options: dict[str, Any] = {"regions": [LEFT, RIGHT], "image_size": (40, 30)}
    processor, expected = make_processor(family), SNAPSHOTS[family]
    encoded = processor.encode_conversation(TWO_TURNS, **options)
    assert show(processor, encoded) == expected
    assert encoded["region_ids"].tolist() == [0, 1, 0]
    assert encoded["warnings"] == []
    assert "pixel_values" not in encoded
    prompted = processor.encode_conversation([{"role": "system", "content": "Be brief."}, *TWO_TURNS], **options)
    assert show(processor, prompted) == expected.replace(*SYSTEM[family], 1)
    processor = make_processor(family, region_format="[{n}] <region>")
    numbered = expected.replace("is <region>", "is [1] <region>")
    numbered = numbered.replace("And <region> by <region>", "And [2] <region> by [1] <region>")
    assert show(processor, processor.encode_conversation(TWO_TURNS, **options)) == numbered


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
    panorama = Image.new("RGB", (60_000, 10), "red")  # its square would take 10 GB
    assert processor.pixels_of(panorama).shape == (1, 3, 16, 16)
    encoded = processor.encode_conversation(TWO_TURNS, photo, [LEFT, RIGHT])
    assert encoded["pixel_values"].shape == (3, 16, 16)
    assert encoded["region_weights"].shape == (2, 8, 8)
    expected = RIGHT.pool_weights(SquareFrame(40, 30), 8, 8)
    np.testing.assert_array_equal(encoded["region_weights"][1].numpy(), expected)
    again = processor.encode_conversation(TWO_TURNS, photo, region_weights=encoded["region_weights"].numpy())
    assert all(torch.equal(again[name], encoded[name]) for name in encoded if name != "warnings")


def test_region_never_mentioned(processor: RegionGPTProcessor, photo: Image.Image) -> None:
    encoded = processor.encode_conversation(chat("What is <region1>?", "A cat"), photo, [LEFT, RIGHT])
    assert ["<region2> is never mentioned" in warning for warning in encoded["warnings"]] == [True]
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
    for name in ("framing", "mask_weights", "citations"):
        with pytest.raises(ConfigError, match=f"{name}: expected .* got 'other'"):
            make_processor(**{name: "other"})
    with pytest.raises(ConfigError, match="mask_weights: sampled ones go with framing stretch"):
        make_processor(mask_weights="sampled")
    fine = make_processor()
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ConfigError, match="lacks <image> and <region>; call prepare_tokenizer"):
        RegionGPTProcessor(fine.image_processor, bare)
    with pytest.raises(ConfigError, match="marks no responses"):
        make_processor(chat_template="{{ messages[0]['content'] }}").encode_conversation(chat("a", "b"))


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


# What was trained is what answers: prompts tokenize as the language model's own tokenizer does, saved or not.

LETTERS = [chr(code) for code in range(33, 127)]
PIECES = ["<unk>", "<s>", "</s>", "▁", "\n", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
FAST, LLAMA = {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "LlamaTokenizer"}
LOWER, PREPEND = normalizers.Lowercase(), [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]


def special(text: str, **options: Any) -> AddedToken:
    return AddedToken(text, special=True, **{"normalized": False, **options})


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama, legacy": ({"scheme": "always"}, {**LLAMA, "legacy": True, "add_bos_token": True}),
    "llama, not legacy": ({"scheme": "always"}, {**LLAMA, "legacy": False, "add_bos_token": True}),
    "llama, legacy not said": ({}, {**LLAMA, "legacy": None}),
    "llama, no begin token added": ({}, {**LLAMA, "add_bos_token": False}),
    "a blank at the start alone": ({}, FAST),
    "a blank after every special token": ({"scheme": "always"}, FAST),
    "a blank by the normalizer": ({"scheme": "never", "normalizer": normalizers.Sequence(PREPEND)}, FAST),
    "lower case": ({"normalizer": LOWER}, FAST),
    "begin token that strips": ({"begin": special("<s>", rstrip=True)}, FAST),
    "end token that strips": ({"end": special("</s>", lstrip=True, rstrip=True)}, FAST),
    "placeholders that strip": ({"more": [special("<region>", lstrip=True), special("<image>", rstrip=True)]}, FAST),
    "placeholders known as words": ({"more": [AddedToken("<image>", normalized=False)]}, FAST),
}
TALK = chat("Is  <region1>a Cat, or <region1>?", "It's <region1>.", "Why?", "So.")


def save_tokenizer(
    folder: Path,
    scheme: str = "first",
    normalizer: Any = None,
    begin: Any = None,
    end: Any = None,
    more: Any = (),
    **config: Any,
) -> Path:
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(PIECES)}, [("▁", letter) for letter in LETTERS], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([special("<unk>"), begin or special("<s>"), end or special("</s>")])
    tokenizer.add_tokens(list(more))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return folder


def ids(processor: RegionGPTProcessor, talk: list[dict[str, str]] = TALK, **options: Any) -> list[int]:
    one_region = torch.full((1, 8, 8), 1 / 64)
    return processor.encode_conversation(talk, region_weights=one_region, **options)["input_ids"].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_tokenized_as_by_the_tokenizer_itself_before_and_after_saving(kind, family, tmp_path):
    backend, config = KINDS[kind]
    processor = make_processor(
        family, AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, **backend, **config)), num_image_tokens=1
    )
    processor.save_pretrained(tmp_path / "saved")
    loaded = RegionGPTProcessor.from_pretrained(tmp_path / "saved")
    assert ids(loaded) == ids(processor)
    for talk in (TALK[:1], TALK[:3]):
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True).replace("<region1>", "<region>")
        begun = [1] if prompt.startswith("<s>") else []
        for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
            expected = tokenizer(prompt.removeprefix("<s>"), add_special_tokens=False)["input_ids"]
            assert ids(processor, talk, add_generation_prompt=True) == begun + expected


@pytest.mark.parametrize("legacy", [True, False, None])
def test_a_created_checkpoint_reads_as_its_language_model(legacy, tmp_path):
    torch.manual_seed(0)
    save_tower(tmp_path / "tower", AutoModel.from_config(tower_config("clip_vision_model")))
    save_language(tmp_path / "language")
    save_tokenizer(tmp_path / "language", scheme="always", **LLAMA, legacy=legacy)
    _, processor = weights.create(tmp_path / "tower", tmp_path / "language", tmp_path / "out", chat_template="plain")
    own = AutoTokenizer.from_pretrained(tmp_path / "language")("A cat\n", add_special_tokens=False)["input_ids"]
    asked = {"talk": chat("A cat"), "with_image": False, "add_generation_prompt": True}
    for each in (processor, weights.load(tmp_path / "out")[1]):
        assert ids(each, **asked) == [1, *own]


def test_special_tokens_are_words_in_any_case(tmp_path):
    tokens = {"begin": special("<s>", normalized=True), "end": special("</s>", normalized=True)}
    folder = save_tokenizer(tmp_path, normalizer=LOWER, **tokens, **FAST)
    processor = make_processor("vicuna_v1", AutoTokenizer.from_pretrained(folder))
    found = ids(processor, chat("Say </S> and <S>"), add_generation_prompt=True)
    assert 2 not in found
    assert found.count(1) == 1


class Shouting(PreTrainedTokenizerFast):
    def __call__(self, text: Any, **options: Any) -> Any:
        return super().__call__(text.upper(), **options)


def test_a_tokenizer_that_reads_otherwise_once_saved_is_refused(tmp_path):
    folder = save_tokenizer(tmp_path, **FAST)
    with pytest.raises(ConfigError, match="Shouting reads a text differently once saved"):
        prepare_tokenizer(Shouting.from_pretrained(folder), "plain")

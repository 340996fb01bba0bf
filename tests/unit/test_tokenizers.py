"""What was trained is what answers: prompts tokenize as the language model's own tokenizer does, saved or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_language, save_tower, tower_config
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, SiglipImageProcessorPil

from regiongpt.errors import ConfigError
from regiongpt.model import weights
from regiongpt.model.processing import RegionGPTProcessor, prepare_tokenizer
from regiongpt.prompts import CHAT_TEMPLATES

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
TALK = [
    {"role": "user", "content": "Is  <region1>a Cat, or <region1>?"},
    {"role": "assistant", "content": "It's <region1>."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


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


def make_processor(tokenizer: Any, family: str) -> RegionGPTProcessor:
    prepare_tokenizer(tokenizer, family)
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    shape = {"image_size": 16, "num_image_tokens": 1, "refined_grid": [2, 2]}
    return RegionGPTProcessor(images, tokenizer, chat_template=family, **shape)


def ids(processor: RegionGPTProcessor, talk: list[dict[str, str]] = TALK, **options: Any) -> list[int]:
    one_region = torch.full((1, 2, 2), 0.25)
    return processor.encode_conversation(talk, region_weights=one_region, **options)["input_ids"].tolist()


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_tokenized_as_by_the_tokenizer_itself_before_and_after_saving(kind, family, tmp_path):
    backend, config = KINDS[kind]
    processor = make_processor(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, **backend, **config)), family)
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
    asked = {"talk": [{"role": "user", "content": "A cat"}], "with_image": False, "add_generation_prompt": True}
    for each in (processor, weights.load(tmp_path / "out")[1]):
        assert ids(each, **asked) == [1, *own]


def test_special_tokens_in_a_persons_words_are_words_in_any_case(tmp_path):
    tokens = {"begin": special("<s>", normalized=True), "end": special("</s>", normalized=True)}
    folder = save_tokenizer(tmp_path, normalizer=LOWER, **tokens, **FAST)
    processor = make_processor(AutoTokenizer.from_pretrained(folder), "vicuna_v1")
    found = ids(processor, [{"role": "user", "content": "Say </S> and <S>"}], add_generation_prompt=True)
    assert 2 not in found
    assert found.count(1) == 1


class Shouting(PreTrainedTokenizerFast):
    def __call__(self, text: Any, **options: Any) -> Any:
        return super().__call__(text.upper(), **options)


def test_a_tokenizer_that_reads_otherwise_once_saved_is_refused(tmp_path):
    folder = save_tokenizer(tmp_path, **FAST)
    with pytest.raises(ConfigError, match="Shouting reads a text differently once saved"):
        prepare_tokenizer(Shouting.from_pretrained(folder), "plain")

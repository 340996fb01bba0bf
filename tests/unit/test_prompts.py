"""Questions, placeholders, answers and chat templates."""

import pytest

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.prompts import (
    COCO_80,
    COCO_IDS,
    NO_MATCH,
    QUESTIONS,
    check_placeholders,
    definite,
    indefinite,
    parse_region_answer,
    placeholders,
    question,
    region_answer,
    template_family,
)


def test_placeholders_come_in_order_with_repeats() -> None:
    assert placeholders("Is <region2> left of <region1>, or <region2> of <region12>?") == [2, 1, 2, 12]
    assert placeholders("What is this?") == []


@pytest.mark.parametrize(
    "text",
    [
        "<region>", "<region0>", "<region01>", "<regionx>", "<region 1>", "<region-1>", "<region1", "<Region1>",
        "<region²>", f"<region{'9' * 40}>", "<region of interest, as marked>",
    ],
)  # fmt: skip
def test_what_begins_like_a_placeholder_and_is_none_is_named(text: str) -> None:
    with pytest.raises(RegionError, match="expected <region1>") as error:
        placeholders(f"Is <region1> what {text} is?")
    assert text[:20] in str(error.value)


def test_unknown_region_is_an_error_that_names_it() -> None:
    with pytest.raises(RegionError, match="<region2> stands for region 2, but 1 region was given"):
        check_placeholders("What is <region2>?", 1)
    with pytest.raises(RegionError, match="no region was given"):
        check_placeholders("What is <region1>?", 0)


def test_region_never_mentioned_is_a_warning() -> None:
    assert check_placeholders(["What is <region1>?", "And <region3>?"], 3) == [
        "region 2 was given but <region2> is never mentioned, so it has no influence on the answer"
    ]
    assert check_placeholders(["What is <region1>?", "And <region2>?"], 2) == []


def test_first_wordings_are_the_papers() -> None:
    assert question("classify", regions=[1]) == (
        "What category name best describes the region represented by <region1>? "
        "Answer the question using COCO-80 category names."
    )
    assert question("classify", 1, regions=[3], guided=False) == "How would you label the section <region3>?"
    assert question("locate", regions=[1, 2, 3], expression="a red cup") == (
        'From the provided masks denoted by <region1>, <region2> and <region3>, which one fits "a red cup"? '
        "Answer the question using the template Region [x]."
    )
    assert question("describe", regions=[2]) == "Describe in detail the object located at <region2> in the image."
    assert question("relation", regions=[1, 2]) == "Describe the relationship between <region1> and <region2>."
    assert question("presence", category="airplane") == "Is there an airplane in the image?"


@pytest.mark.parametrize("task", QUESTIONS)
def test_every_wording_uses_its_slots(task: str) -> None:
    assert len(set(QUESTIONS[task])) == 10
    several = {"relation": [1, 2], "locate": [1, 2, 3], "locate_each": [1, 2, 3]}
    regions = [] if task.startswith(("presence", "image")) else several.get(task, [1])
    for index in range(10):
        text = question(task, index, regions=regions, expression="the red {cup}", category="cat")
        assert sorted(placeholders(text)) == regions
        assert ("the red {cup}" in text) == (task in ("locate", "locate_each", "presence_each"))
        assert ("a cat" in text) == (task == "presence")
    assert question(task, 10, regions=regions, expression="x", category="cat") == question(
        task, 0, regions=regions, expression="x", category="cat"
    )


@pytest.mark.parametrize(
    ("task", "slots", "message"),
    [
        ("classify", {}, "needs 1 region"),
        ("relation", {"regions": [1, 2, 3]}, "needs 2 region"),
        ("locate", {"regions": [1]}, "needs expression"),
        ("presence_each", {"expression": " "}, "needs expression"),
        ("presence", {}, "needs category"),
    ],
)
def test_a_question_lacking_something_is_refused(task: str, slots: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        question(task, **slots)
    with pytest.raises(ConfigError, match="expected a task among classify"):
        question("detect")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (region_answer(2), 2),
        ("Region [12] .", 12),
        (" region 3.", 3),
        (NO_MATCH, None),
        ("no corresponding options found", None),
        ("Region [0]", "invalid"),
        ("Region [1] or Region [2]", "invalid"),
        (f"Region [{'9' * 5000}]", "invalid"),
        ("the red cup", "invalid"),
        ("", "invalid"),
    ],
)
def test_answers_are_read_back(text: str, expected: object) -> None:
    assert parse_region_answer(text) == expected


def test_coco_names_and_ids() -> None:
    assert len(COCO_80) == len(COCO_IDS) == len(set(COCO_80)) == 80
    pairs = dict(zip(COCO_80, COCO_IDS, strict=True))
    assert [pairs[name] for name in ("person", "stop sign", "tv", "toothbrush")] == [1, 13, 72, 90]


def test_articles() -> None:
    words = ["cat", "elephant", "skis", "broccoli"]
    assert [indefinite(word) for word in words] == ["a cat", "an elephant", "a pair of skis", "some broccoli"]


def test_a_name_is_definite_whatever_article_it_comes_with():
    assert [definite(name) for name in ("cat", "a cat", "An ear", "The red cup", "theatre")] == [
        "the cat", "the cat", "the ear", "the red cup", "the theatre",
    ]  # fmt: skip


class _Tokenizer:
    def __init__(self, name: str = "", template: str | None = None, added: tuple[str, ...] = ()):
        self.name_or_path, self.chat_template, self.added = name, template, added

    def get_added_vocab(self) -> dict[str, int]:
        return dict.fromkeys(self.added, 0)


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (_Tokenizer("lmsys/vicuna-7b-v1.5"), "vicuna_v1"),
        (_Tokenizer("meta-llama/Llama-2-7b-chat-hf"), "llama2"),
        (_Tokenizer("meta-llama/Llama-2-7b-hf"), "plain"),
        (_Tokenizer("meta-llama/Meta-Llama-3-8B-Instruct"), "llama3"),
        (_Tokenizer("Qwen/Qwen2.5-0.5B-Instruct"), "chatml"),
        (_Tokenizer("gpt2"), "plain"),
        (_Tokenizer(template="{{ '<|im_start|>' }}"), "chatml"),
        (_Tokenizer(template="{{ '[INST]' }}"), "llama2"),
        (_Tokenizer(template="{{ 'USER: ' }}"), "vicuna_v1"),
        (_Tokenizer(added=("<|start_header_id|>",)), "llama3"),
        (_Tokenizer("some/model"), "plain"),
    ],
)
def test_template_family_is_guessed(model: object, family: str) -> None:
    assert template_family(model) == family

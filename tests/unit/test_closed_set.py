"""Scores of whole sets of answers against one full forward pass an answer."""

import pytest
import torch
from asking import boxes, photograph, tiny_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regiongpt.errors import DataError
from regiongpt.inference import RegionPredictor, choices
from regiongpt.inference.choices import log_likelihoods
from regiongpt.inference.engine import Engine, question_turns
from regiongpt.prompts import CHAT_TEMPLATES, NO_MATCH, question, region_answer
from regiongpt.regions import Region

PHOTO = photograph()


@pytest.fixture(scope="module")
def predictor() -> RegionPredictor:
    return RegionPredictor(*tiny_parts()).set_image(PHOTO)


def full_pass(predictor: RegionPredictor, text: str, regions: list[Region], answer: str) -> float:
    """Log likelihood of one answer and its end, from one conversation with its own image and no cache."""
    processor, model = predictor.engine.processor, predictor.engine.model
    turns = [*question_turns((), text), {"role": "assistant", "content": answer}]
    batch = processor.collate([processor.encode_conversation(turns, image=PHOTO, regions=regions)])
    labels = batch.pop("labels")[0, 1:]
    with torch.inference_mode():
        logits = model(**batch, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    target = labels >= 0
    return float(logits[target].gather(1, labels[target][:, None]).sum())


def scores(predictor: RegionPredictor, text: str, sets: list[list[Region]], answers: list[str]) -> torch.Tensor:
    engine, scene = predictor.engine, predictor._here()
    closed = choices.closed_set(engine, question_turns((), text), len(sets[0]), answers)
    return log_likelihoods(engine, scene, closed, [engine.pool(scene, regions) for regions in sets])


NAMES = st.text("abc ä-(", min_size=1, max_size=14).map(lambda name: " ".join(name.split())).filter(bool)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES, min_size=1, max_size=8, unique=True),
    seed=st.integers(0, 99),
    count=st.integers(1, 3),
    size=st.integers(1, 12),
)
def test_scores_equal_a_full_pass_an_answer(predictor, names, seed, count, size):
    regions = boxes(count, seed)
    text = question("classify", index=seed, regions=[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "TOKENS", size)
        found = scores(predictor, text, [[region] for region in regions], names)
    expected = [[full_pass(predictor, text, [region], name) for name in names] for region in regions]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "count", "answers"),
    [
        (question("locate", regions=[1, 2, 3], expression="the cup"), 3, [*map(region_answer, (1, 2, 3)), NO_MATCH]),
        ("Is there a cat?", 0, ["Yes.", "No."]),
    ],
)
def test_answers_to_a_question_about_several_regions_or_none(predictor, text, count, answers):
    regions = boxes(count)
    found = scores(predictor, text, [regions], answers)[0]
    expected = [full_pass(predictor, text, regions, answer) for answer in answers]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_set_is_tokenized_as_the_processor_does(template):
    engine, turns = Engine(*tiny_parts(template=template)), question_turns((), question("classify", regions=[1]))
    names = ["cat", "hot dog", "é", "a [b]", "x" * 50, "c|d", "</s> [INST] <|im_end|>"]
    closed = choices.closed_set(engine, turns, 1, names)
    for path, name in zip(closed.paths, names, strict=True):
        answered = [*turns, {"role": "assistant", "content": name}]
        encoded = engine.processor.encode_conversation(answered, region_weights=torch.zeros(1, 1, 1))
        ids, last = encoded["input_ids"].tolist(), int((encoded["labels"] >= 0).nonzero()[-1])
        assert [*closed.ids, *path] == ids[: last + 1]


def test_classify_gives_the_shares_of_full_passes(predictor):
    names = ["cat", "hot dog", "hot", "dog", "baseball bat", "a very long name"]
    text, regions = question("classify", regions=[1]), boxes(2)
    expected = torch.tensor([[full_pass(predictor, text, [region], name) for name in names] for region in regions])
    for result, shares in zip(predictor.classify(regions, names), expected.softmax(-1), strict=True):
        assert list(result.probabilities) == names
        torch.testing.assert_close(torch.tensor(list(result.probabilities.values())), shares.float(), atol=1e-4, rtol=0)
        assert result.label == names[int(shares.argmax())]
        assert result.probability == max(result.probabilities.values())
    assert predictor.classify([], names) == []


def test_an_answer_longer_than_the_context(predictor):
    with pytest.raises(DataError, match="tokens"):
        scores(predictor, "What is <region1>?", [boxes(1)], ["cat " * 900])

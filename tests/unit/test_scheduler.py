"""Questions that share a batch: threads, streams, budgets, stop strings, sampling, and what ends before its time."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from asking import boxes, photograph, tiny_parts
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.inference import Question, RegionPredictor
from regiongpt.inference.scheduler import TextReader, draw
from regiongpt.regions import Region

BOXES = boxes(4)
LONG = {"max_new_tokens": 40}


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


@pytest.fixture
def predictor(parts) -> RegionPredictor:
    return RegionPredictor(*parts).set_image(photograph())


@pytest.fixture
def encoded(parts, monkeypatch) -> Counter:
    """How often the tower ran."""
    count: Counter = Counter()
    run = parts[0].encode_image

    def counted(pixels):
        count["images"] += 1
        return run(pixels)

    monkeypatch.setattr(parts[0], "encode_image", counted)
    return count


def some_questions(count: int = 6) -> list[Question]:
    return [
        Question(text="What is <region1>" + ", really" * (place % 3) + "?", regions=[BOXES[place % 4]])
        for place in range(count)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Many questions


def test_many_questions_come_in_their_order_with_timings(predictor):
    asked = [*some_questions(), Question(text="Why?", max_new_tokens=1), Question(text="<region2>?", regions=BOXES[:2])]
    found = predictor.ask_many(asked, max_new_tokens=7)
    alone = [
        predictor.ask(each.text, each.regions, history=each.history, max_new_tokens=each.max_new_tokens or 7)
        for each in asked
    ]
    assert [answer.text for answer in found] == [answer.text for answer in alone]
    assert [answer.warnings for answer in found] == [answer.warnings for answer in alone]
    assert found[-2].tokens == 1
    assert all(answer.seconds > 0 for answer in found)
    assert found[-1].warnings  # <region1> was never mentioned
    assert predictor.ask_many([]) == []


def test_many_images_are_encoded_once_each(predictor, encoded, tmp_path):
    from PIL import Image

    pictures = [photograph(seed) for seed in (1, 2)]
    path = tmp_path / "two.png"
    Image.fromarray(pictures[1]).save(path)
    images = [None, pictures[0], path, pictures[0].copy(), str(path), pictures[1]]
    asked = [Question(text="What is <region1>?", regions=BOXES[0], image=image) for image in images]
    found = [answer.text for answer in predictor.ask_many(asked, max_new_tokens=6)]
    assert encoded["images"] == 2
    expected = []
    for image in (photograph(), pictures[0], pictures[1], pictures[0], pictures[1], pictures[1]):
        expected.append(predictor.set_image(image).ask("What is <region1>?", BOXES[0], max_new_tokens=6).text)
    assert found == expected
    assert encoded["images"] == 2


def test_answers_come_as_they_finish_and_may_be_left(predictor):
    asked = [Question(text="Why?", max_new_tokens=30), Question(text="Why?", max_new_tokens=1)]
    answers = predictor.answers(asked)
    assert next(answers)[0] == 1
    answers.close()
    assert predictor.engine.scheduler.active == 0


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (Question(text=" "), DataError, "question 3: expected a question"),
        (Question(text="<region2>?", regions=BOXES[:1]), RegionError, "question 3: .*<region2>"),
        (Question(text="?", regions=[Region.box(90, 90, 99, 99)]), RegionError, "question 3: <region1>"),
        (Question(text="?", image="no/such/file.png"), DataError, "question 3: no/such/file.png"),
        (Question(text="?", stop=[""]), ConfigError, "question 3: stop: "),
        ("What?", ConfigError, "question 3: expected a Question"),
    ],
)
def test_bad_questions_are_found_before_the_first_is_answered(predictor, monkeypatch, bad, kind, message):
    monkeypatch.setattr(predictor.engine.decoder, "forward", lambda *_, **__: pytest.fail("something was generated"))
    with pytest.raises(kind, match=message):
        predictor.answers([*some_questions(2), bad])


def test_one_of_several_wrong_regions_is_named_by_its_own_number(predictor):
    many = [*boxes(130), Region.box(90, 90, 99, 99)]
    with pytest.raises(RegionError, match="<region131>"):
        predictor.describe(many)


# ---------------------------------------------------------------------------------------------------------------------
# Encoded images


def test_encoded_images_are_found_by_their_pixels_and_forgotten_by_age(parts, encoded):
    predictor = RegionPredictor(*parts, images=2)
    for seed in (0, 1, 0, 2, 0, 1):
        predictor.set_image(photograph(seed).copy())
    # 0 and 1, then 2 in place of 1, then 1 again
    assert encoded["images"] == 4
    none = RegionPredictor(*parts, images=0).set_image(photograph())
    first = none.ask("What?", max_new_tokens=3).text
    assert none.set_image(photograph()).ask("What?", max_new_tokens=3).text == first
    assert encoded["images"] == 6
    with pytest.raises(ConfigError, match="images: "):
        RegionPredictor(*parts, images=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Threads


def test_threads_have_images_of_their_own(parts):
    predictor = RegionPredictor(*parts)
    expected = {
        seed: predictor.set_image(photograph(seed)).ask("What is <region1>?", BOXES[:1], **LONG).text
        for seed in range(4)
    }
    found: dict[int, list[str]] = {}
    ready = threading.Barrier(4)

    def work(seed: int) -> None:
        predictor.set_image(photograph(seed))
        ready.wait()
        texts = [predictor.ask("What is <region1>?", BOXES[:1], **LONG).text for _ in range(2)]
        found[seed] = [*texts, "".join(predictor.stream("What is <region1>?", BOXES[:1], **LONG)).strip()]

    last: list[str] = []
    without = threading.Thread(target=lambda: last.append(predictor.ask("What is <region1>?", BOXES[:1], **LONG).text))
    without.start()
    without.join()
    assert last == [expected[3]], "a thread that set no image asks about the last"
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [text] * 3 for seed, text in expected.items()}
    assert predictor.engine.scheduler.active == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_pass_that_fails_ends_what_was_in_it_and_nothing_else(predictor, monkeypatch, kind):
    expected = predictor.ask("What?", **LONG).text
    stream = predictor.stream("What?", **LONG)
    next(stream)

    def fail(*_, **__):
        raise kind("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(predictor.engine.decoder, "forward", fail)
        with pytest.raises(kind):
            predictor.ask("What?")
    with pytest.raises(RuntimeError, match=r"interrupted|out of memory"):
        list(stream)
    assert predictor.ask("What?", **LONG).text == expected


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def test_a_stop_string_ends_the_answer(predictor):
    whole = predictor.ask("Describe <region1>.", BOXES[:1], **LONG)
    stop = whole.text[10:13]
    before = whole.text[: whole.text.index(stop)]
    cut = predictor.ask("Describe <region1>.", BOXES[:1], stop=["no such text", stop], **LONG)
    assert cut.text == before.strip()
    assert cut.complete
    assert cut.tokens < whole.tokens
    streamed = list(predictor.stream("Describe <region1>.", BOXES[:1], stop=stop, **LONG))
    assert "".join(streamed).strip() == before.strip()
    many = predictor.ask_many([Question(text="Describe <region1>.", regions=BOXES[:1], stop=stop)], **LONG)
    assert many[0].text == before.strip()
    conversation = predictor.conversation(BOXES[:1])
    assert conversation.ask("Describe <region1>.", stop=stop, **LONG).text == before.strip()
    assert conversation.messages[-1]["content"] == before.strip()


class Letters:
    """A tokenizer of one byte a token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_are_whole_characters_and_never_taken_back():
    reader, pieces = TextReader(Letters(), stop=["END"]), []
    for byte in "Zwei Kätzchen, 猫と犬 EN route END never".encode():
        reader.push(byte)
        pieces.append(reader.take())
    reader.finish()
    pieces.append(reader.take(final=True))
    assert "".join(pieces) == "Zwei Kätzchen, 猫と犬 EN route "
    assert {"ä", "猫", "EN "} <= set(pieces)
    assert "E" not in pieces
    assert reader.stopped
    unfinished = TextReader(Letters())
    for byte in "Kä".encode()[:-1]:
        unfinished.push(byte)
    assert unfinished.text == "K"
    unfinished.finish()
    assert unfinished.text == "K\ufffd"


# ---------------------------------------------------------------------------------------------------------------------
# Budget


def test_the_token_budget_bounds_memory_and_changes_no_answer(parts, monkeypatch):
    predictor = RegionPredictor(*parts).set_image(photograph())
    expected = [answer.text for answer in predictor.describe(BOXES * 5, max_new_tokens=5)]
    tight = RegionPredictor(*parts, token_budget=90).set_image(photograph())
    most, forward = [0], tight.engine.decoder.forward

    def watched(cache, *arguments, **options):
        most[0] = max(most[0], len(cache.lengths))
        return forward(cache, *arguments, **options)

    monkeypatch.setattr(tight.engine.decoder, "forward", watched)
    assert [answer.text for answer in tight.describe(BOXES * 5, max_new_tokens=5)] == expected
    assert 1 <= most[0] <= 4
    with pytest.raises(ConfigError, match="token budget"):
        tight.describe(BOXES, max_new_tokens=200)
    with pytest.raises(ConfigError, match="token_budget: "):
        RegionPredictor(*parts, token_budget=0)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_what_is_drawn_does_not_depend_on_the_company(predictor):
    options = {"temperature": 1.2, "top_p": 0.9, "max_new_tokens": 9}
    asked = [Question(text="What is <region1>?", regions=[box], seed=place) for place, box in enumerate(BOXES)]
    together = [answer.text for answer in predictor.ask_many(asked, **options)]
    alone = [predictor.ask(each.text, each.regions, seed=each.seed, **options).text for each in asked]
    assert together == alone
    same = [Question(text="What?")] * 4
    first = [answer.text for answer in predictor.ask_many(same, seed=5, **options)]
    assert [answer.text for answer in predictor.ask_many(same, seed=5, **options)] == first
    assert len(set(first)) > 1
    assert [answer.text for answer in predictor.ask_many(same[:2], seed=5, **options)] == first[:2]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert len({predictor.ask("What?", **options).text for _ in range(4)}) > 1, "without a seed"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.3), (1.0, 1e-6), (1e-310, 1.0)]
)
def test_draws_follow_the_distribution_of_transformers(temperature, top_p):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    scores[3] = float("-inf")
    if temperature < 1e-300:  # transformers overflows; the likeliest is what is left
        assert {draw(scores, temperature, top_p, at) for at in (0.0, 0.9)} == {int(scores.argmax())}
        return
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores[None]))
    expected = warped.softmax(-1)[0].numpy()
    draws = 4000
    counts = np.bincount(
        [draw(scores, temperature, top_p, (place + 0.5) / draws) for place in range(draws)], minlength=12
    )
    np.testing.assert_allclose(counts / draws, expected, atol=2 / draws)

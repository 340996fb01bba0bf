"""The predictor and its shared batch on a tiny random model: questions, conversations, threads, budgets, sampling."""

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from asking import boxes, photograph, tiny_parts
from PIL import Image
from tiny import text_config
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError
from regiongpt.images import load_image
from regiongpt.inference import Question, RegionPredictor, scheduler
from regiongpt.inference import predictor as predictor_module
from regiongpt.inference.choices import answer_scores
from regiongpt.inference.engine import question_turns
from regiongpt.inference.scheduler import TextReader, draw
from regiongpt.prompts import COCO_80, question
from regiongpt.regions import Region

BOXES = boxes(4)
BOX, OTHER, OUTSIDE = BOXES[0], Region.polygon([[30, 5], [58, 8], [44, 36]]), Region.box(90, 90, 99, 99)
ASK = "Describe <region1>."
SHORT, LONG = {"max_new_tokens": 8}, {"max_new_tokens": 40}


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


def test_classify_defaults_to_coco(predictor):
    result = predictor.classify(BOX)
    assert tuple(result.probabilities) == COCO_80
    assert sum(result.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_locate_by_what_each_region_is_called_and_by_both(predictor):
    expressions, regions = ["the red cup", "a dog", "the red cup"], [BOX, OTHER, BOX]
    by_answer, by_words, by_both = (predictor.locate(expressions, regions, by=by) for by in ("answer", "words", "both"))
    assert predictor.locate(expressions, regions) == by_both
    engine, scene = predictor.engine, predictor._here()
    turns = question_turns((), question("refer", regions=[1]))
    for k, expression in enumerate(expressions):
        names = {"the red cup": ["the red cup"], "a dog": ["a dog", "the dog"]}[expression]
        alone = [answer_scores(engine, scene, turns, engine.pool_each(scene, [r]), names) for r in regions]
        expected = torch.cat(alone).logsumexp(1).softmax(0)
        torch.testing.assert_close(torch.tensor(by_words[k].probabilities[:3]), expected, atol=1e-4, rtol=1e-4)
        assert by_words[k].probabilities[3] == 0
        assert by_words[k].index is not None
        both = torch.tensor(by_answer[k].probabilities) * torch.cat([expected, torch.tensor([1 / 3])])
        both /= both.sum()
        torch.testing.assert_close(torch.tensor(by_both[k].probabilities), both, atol=1e-4, rtol=1e-4)
        assert by_both[k].index == (None if both[3] > 0.5 else int(both[:3].argmax()))


def test_conversation_equals_ask_with_history_about_the_image_it_began_with(predictor, monkeypatch):
    conversation = predictor.conversation([BOX, OTHER])
    predictor.set_image(255 - photograph())
    first = conversation.ask(ASK, **SHORT)
    second = "".join(conversation.stream("And <region2>?", **SHORT)).strip()
    history = [{"role": "user", "content": ASK}, {"role": "assistant", "content": first.text}]
    predictor.set_image(photograph())
    assert predictor.ask("And <region2>?", [BOX, OTHER], history=history, **SHORT).text == second
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"] * 2
    before = list(conversation.messages)
    with pytest.raises(RegionError, match="<region3>"):
        conversation.ask("And <region3>?")
    assert conversation.messages == before
    with monkeypatch.context() as patch:
        patch.setattr(predictor.engine.decoder, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            list(conversation.stream("And <region1>?"))
    assert conversation.messages == before
    pieces = conversation.stream("And <region1>?", max_new_tokens=20)
    begun = next(pieces)
    pieces.close()
    assert conversation.messages[-1]["content"] == begun.strip()


def test_how_a_mask_was_read_is_a_warning_wherever_it_is_asked_about(predictor):
    soft, short = Region.mask(np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))), {"max_new_tokens": 2}
    talk = predictor.conversation([soft])
    for answer in (
        predictor.ask(ASK, soft, **short),
        predictor.ask_many([Question(text=ASK, regions=soft)], **short)[0],
        predictor.describe([BOX, soft], **short)[1],
        talk.ask(ASK, **short),
    ):
        assert answer.warnings[0].startswith("<region1>: the mask has more than two values")
    assert talk.ask("And <region1>?", **short).warnings == ()


def test_a_long_conversation_forgets_its_oldest_turns():
    parts = tiny_parts(language=lambda size: text_config(vocab_size=size, max_position_embeddings=200))
    conversation = RegionPredictor(*parts).set_image(photograph()).conversation([BOX])
    warned = False
    for _ in range(6):
        conversation.ask("What is in <region1>, and what colour does it have?", max_new_tokens=24)
        warned = warned or any("forgot" in warning for warning in conversation.warnings)
    assert warned
    with pytest.raises(DataError, match="of the model's 200 tokens"):
        conversation.ask("why " * 200)


def test_regions_that_an_answer_names_are_cited_or_warned_of(predictor, monkeypatch):
    text = "Region [2] is left of region [1], unlike Region [7]. Region [2]!"
    processor = predictor.engine.processor
    tokens = [*processor.tokenizer(text)["input_ids"], processor.stop_token_ids[0]]
    monkeypatch.setattr(
        scheduler, "choose", lambda logits, jobs, never: [tokens[min(len(job.tokens), len(tokens) - 1)] for job in jobs]
    )
    warning = "the answer names region 7, but 2 regions were given"
    answer = predictor.ask("Are <region1> and <region2> alike?", [BOX, OTHER])
    assert (answer.text, answer.cited, answer.warnings, answer.complete) == (text, (2, 1), (warning,), True)
    short = predictor.ask("Are <region1> and <region2> alike?", [BOX, OTHER], max_new_tokens=4)
    assert (short.complete, short.warnings) == (False, ())
    talk = predictor.conversation([BOX, OTHER])
    assert talk.ask("Are <region1> and <region2> alike?").warnings == talk.warnings == (warning,)
    assert "".join(talk.stream("Sure?")) == text
    assert talk.warnings == (warning,)
    assert predictor.describe(BOX).warnings[0] == "the answer names region 2, but 1 region was given"


def third(bad: Any) -> Any:
    """Ask something as the last of three questions."""
    return lambda p: p.answers([Question(text="What?"), Question(text="Why?"), bad])


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (DataError, "expected a question", lambda p: p.ask("  ")),
        (ConfigError, "at least one choice", lambda p: p.classify(BOX, [])),
        (ConfigError, "max_new_tokens", lambda p: p.ask("What?", max_new_tokens=0)),
        (RegionError, "got none", lambda p: p.locate("a cup", [])),
        (DataError, "UTF-8", lambda p: p.ask("caf\udce9?")),
        (DataError, "history", lambda p: p.ask("What?", history=["Hello"])),
        (RegionError, "<region1>.*inverted", lambda p: p.stream(ASK, [Region.box(9, 9, 2, 2)])),
        (RegionError, "60 x 40", lambda p: p.conversation([Region.mask(np.ones((5, 5), bool))])),
        (RegionError, "<region131>", lambda p: p.describe([*boxes(130), OUTSIDE])),
        (ConfigError, "stop", lambda p: p.stream("What?", stop=5)),
        (ConfigError, "bogus", lambda p: p.ask("What?", bogus=1)),
        (ConfigError, "questions", lambda p: p.ask_many(Question(text="What?"))),
        (ConfigError, "brief", lambda p: p.describe(BOX, brief="x")),
        (ConfigError, "top_k", lambda p: p.classify(BOX, top_k="x")),
        (DataError, "expected expression", lambda p: p.locate(5, [BOX])),
        (RegionError, "<region2>", lambda p: p.locate("<region2>", [BOX])),
        (RegionError, "<region1>.*60 x 40", lambda p: p.locate("a cup", [OUTSIDE])),
        (ConfigError, "by: .*'luck'", lambda p: p.locate("a cup", [BOX], by="luck")),
        (DataError, "question 3: expected a question", third(Question(text=" "))),
        (RegionError, "question 3: .*<region2>", third(Question(text="<region2>?", regions=[BOX]))),
        (RegionError, "question 3: <region1>", third(Question(text="?", regions=[OUTSIDE]))),
        (DataError, "question 3: no/such/file.png", third(Question(text="?", image="no/such/file.png"))),
        (ConfigError, "question 3: stop: ", third(Question(text="?", stop=[""]))),
        (ConfigError, "question 3: expected a Question", third("What?")),
        (CheckpointError, "nowhere", lambda p: p.from_pretrained("nowhere")),
        *(
            (ConfigError, name, lambda p, own={name: value}: p.from_pretrained("nowhere", **own))
            for name, value in {"device": "gpu", "dtype": "int4", "images": -1, "rows": 0, "token_budget": 0}.items()
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(predictor, monkeypatch, kind, message, call):
    monkeypatch.setattr(predictor.engine.decoder, "forward", lambda *_, **__: pytest.fail("something was computed"))
    with pytest.raises(kind, match=message):
        call(predictor)


def test_half_precision():
    model, processor = tiny_parts()
    predictor = RegionPredictor(model.bfloat16(), processor).set_image(photograph())
    assert predictor.ask(ASK, [BOX], **SHORT).text
    assert predictor.classify(BOX, ["cat", "hot dog"]).label in ("cat", "hot dog")


def test_many_questions_come_in_their_order_with_timings(predictor):
    asked = [
        Question(text="What is <region1>" + ", really" * (place % 3) + "?", regions=[BOXES[place % 4]])
        for place in range(6)
    ]
    asked += [Question(text="Why?", max_new_tokens=1), Question(text="<region2>?", regions=BOXES[:2])]
    found = predictor.ask_many(asked, max_new_tokens=7)
    alone = [predictor.ask(each.text, each.regions, max_new_tokens=each.max_new_tokens or 7) for each in asked]
    assert [(answer.text, answer.warnings) for answer in found] == [(each.text, each.warnings) for each in alone]
    assert found[-2].tokens == 1
    assert all(answer.seconds > 0 for answer in found)
    assert found[-1].warnings  # <region1> was never mentioned
    assert predictor.ask_many([]) == []


def broken(*_, **__):
    raise RuntimeError("broken")


def test_a_file_is_decoded_once_for_its_questions(predictor, monkeypatch, tmp_path):
    path, decoded = tmp_path / "one.png", []
    Image.fromarray(photograph(5)).save(path)
    monkeypatch.setattr(predictor_module, "load_image", lambda image: decoded.append(image) or load_image(image))
    predictor.ask_many([Question(text=ASK, regions=BOX, image=path)] * 5, **SHORT)
    assert decoded == [path] * 2  # checked, then answered


def test_many_images_are_encoded_once_each(predictor, encoded, tmp_path):
    pictures = [photograph(seed) for seed in (1, 2)]
    path = tmp_path / "two.png"
    Image.fromarray(pictures[1]).save(path)
    images = [None, pictures[0], path, pictures[0].copy(), str(path), pictures[1]]
    found = predictor.ask_many([Question(text=ASK, regions=BOX, image=image) for image in images], **SHORT)
    assert encoded["images"] == 2
    for answer, seed in zip(found, (0, 1, 2, 1, 2, 2), strict=True):
        assert answer.text == predictor.set_image(photograph(seed)).ask(ASK, BOX, **SHORT).text
    assert encoded["images"] == 2


def test_answers_come_as_they_finish_and_may_be_left(predictor):
    answers = predictor.answers([Question(text="Why?", max_new_tokens=30), Question(text="Why?", max_new_tokens=1)])
    assert next(answers)[0] == 1
    answers.close()
    assert predictor.engine.scheduler.running == []


def test_encoded_images_are_found_by_their_pixels_and_forgotten_by_age(parts, encoded):
    predictor = RegionPredictor(*parts, images=2)
    for seed in (0, 1, 0, 2, 0, 1):
        predictor.set_image(photograph(seed).copy())
    # 0 and 1, then 2 in place of 1, then 1 again
    assert encoded["images"] == 4
    none = RegionPredictor(*parts, images=0)
    assert len({none.set_image(photograph()).ask("What?", **SHORT).text for _ in range(2)}) == 1
    assert encoded["images"] == 6


def test_threads_have_images_of_their_own(parts):
    predictor = RegionPredictor(*parts)
    expected = {seed: predictor.set_image(photograph(seed)).ask(ASK, BOX, **LONG).text for seed in range(4)}
    found: dict[int, list[str]] = {}
    ready = threading.Barrier(4)

    def work(seed: int) -> None:
        predictor.set_image(photograph(seed))
        ready.wait()
        texts = [predictor.ask(ASK, BOX, **LONG).text for _ in range(2)]
        found[seed] = [*texts, "".join(predictor.stream(ASK, BOX, **LONG)).strip()]

    def run(threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    last: list[str] = []
    run([threading.Thread(target=lambda: last.append(predictor.ask(ASK, BOX, **LONG).text))])
    assert last == [expected[3]], "a thread that set no image asks about the last"
    run([threading.Thread(target=work, args=(seed,)) for seed in range(4)])
    assert found == {seed: [text] * 3 for seed, text in expected.items()}
    assert predictor.engine.scheduler.running == []


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


def test_a_stop_string_ends_the_answer(predictor):
    whole = predictor.ask(ASK, BOX, **LONG)
    stop = whole.text[10:13]
    before = whole.text[: whole.text.index(stop)].strip()
    cut = predictor.ask(ASK, BOX, stop=["no such text", stop], **LONG)
    assert (cut.text, cut.complete) == (before, True)
    assert cut.tokens < whole.tokens
    pieces = list(predictor.stream(ASK, BOX, stop=stop, **LONG))
    assert "".join(pieces).strip() == before
    assert len(pieces) > 1
    assert predictor.ask_many([Question(text=ASK, regions=BOX, stop=stop)], **LONG)[0].text == before
    conversation = predictor.conversation(BOX)
    assert conversation.ask(ASK, stop=stop, **LONG).text == before
    assert conversation.messages[-1]["content"] == before


class Letters:
    """A tokenizer of one byte a token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_are_whole_characters_and_never_taken_back():
    reader, pieces = TextReader(Letters(), stop=["END"]), []
    for byte in "Zwei Kätzchen, 猫と犬 EN route END never".encode():
        reader.read(byte)
        pieces.append(reader.take())
    reader.read(final=True)
    pieces.append(reader.take(final=True))
    assert "".join(pieces) == "Zwei Kätzchen, 猫と犬 EN route "
    assert {"ä", "猫", "EN "} <= set(pieces)
    assert "E" not in pieces
    assert reader.stopped
    unfinished = TextReader(Letters())
    for byte in "Kä".encode()[:-1]:
        unfinished.read(byte)
    assert unfinished.text == "K"
    unfinished.read(final=True)
    assert unfinished.text == "K\ufffd"


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


def test_what_is_drawn_does_not_depend_on_the_company(predictor):
    options = {"temperature": 1.2, "top_p": 0.9, "max_new_tokens": 9}
    asked = [Question(text=ASK, regions=[box], seed=place) for place, box in enumerate(BOXES)]
    together = [answer.text for answer in predictor.ask_many(asked, **options)]
    assert together == [predictor.ask(each.text, each.regions, seed=each.seed, **options).text for each in asked]
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
    draws = 4000
    drawn = [draw(scores, temperature, top_p, (place + 0.5) / draws) for place in range(draws)]
    shares = np.bincount(drawn, minlength=12) / draws
    np.testing.assert_allclose(shares, warped.softmax(-1)[0].numpy(), atol=2 / draws)

"""The predictor against the plain transformers way, on a tiny random model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint

from regiongpt.errors import CheckpointError, ConfigError, DataError, RegionError
from regiongpt.inference import Question, RegionPredictor, scheduler
from regiongpt.inference.choices import answer_scores
from regiongpt.inference.engine import question_turns
from regiongpt.prompts import COCO_80, question
from regiongpt.regions import Region

BOX, OTHER = Region.box(4, 4, 30, 20), Region.polygon([[30, 5], [58, 8], [44, 36]])
ASK = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def predictor(checkpoint: Path, photo: np.ndarray) -> RegionPredictor:
    return RegionPredictor.from_pretrained(checkpoint, device="cpu").set_image(photo)


def plain_generate(predictor: RegionPredictor, photo: np.ndarray, text: str, regions: list[Region]) -> str:
    """The same question through the processor and ``generate`` alone."""
    processor, model = predictor.engine.processor, predictor.engine.model
    messages = [{"role": "user", "content": text}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, images=[photo], regions=regions
    )
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip()


def test_ask_equals_generate(predictor, photo):
    text = "What is <region1> doing next to <region2>, and why <region1>?"
    answer = predictor.ask(text, [BOX, OTHER], **ASK)
    assert answer.text == plain_generate(predictor, photo, text, [BOX, OTHER])
    assert answer.text
    assert answer.seconds > 0
    assert not answer.warnings


def test_stream_pieces_join_to_the_answer(predictor):
    asked = predictor.ask("Describe <region1>.", [BOX], max_new_tokens=80)
    pieces = list(predictor.stream("Describe <region1>.", [BOX], max_new_tokens=80))
    assert "".join(pieces).strip() == asked.text
    assert len(pieces) > 1


def test_classify_defaults_to_coco(predictor):
    result = predictor.classify(BOX)
    assert tuple(result.probabilities) == COCO_80
    assert sum(result.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert predictor.classify([]) == []


def test_locate_by_what_each_region_is_called_and_by_both(predictor):
    expressions, regions = ["the red cup", "a dog", "the red cup"], [BOX, OTHER, BOX]
    by_answer, by_words, by_both = (predictor.locate(expressions, regions, by=by) for by in ("answer", "words", "both"))
    assert predictor.locate(expressions, regions) == by_both
    engine, scene = predictor.engine, predictor._here()
    turns = question_turns((), question("refer", regions=[1]))
    for k, expression in enumerate(expressions):
        alone = [answer_scores(engine, scene, turns, engine.pool_each(scene, [r]), [expression]) for r in regions]
        expected = torch.cat(alone)[:, 0].softmax(0)
        torch.testing.assert_close(torch.tensor(by_words[k].probabilities[:3]), expected, atol=1e-4, rtol=1e-4)
        assert by_words[k].probabilities[3] == 0
        assert by_words[k].index is not None
        none = by_answer[k].probabilities[3]
        found = torch.tensor(by_both[k].probabilities)
        torch.testing.assert_close(found[:3], (1 - none) * expected, atol=1e-4, rtol=1e-4)
        assert found[3] == pytest.approx(none, abs=1e-5)
        best = None if none > 0.5 else by_words[k].index
        assert by_both[k].index == best


def test_conversation_equals_ask_with_history_about_the_image_it_began_with(predictor, photo):
    conversation = predictor.conversation([BOX, OTHER])
    predictor.set_image(255 - photo)
    first = conversation.ask("What is <region1>?", **ASK)
    second = "".join(conversation.stream("And <region2>?", **ASK)).strip()
    history = [{"role": "user", "content": "What is <region1>?"}, {"role": "assistant", "content": first.text}]
    assert predictor.set_image(photo).ask("And <region2>?", [BOX, OTHER], history=history, **ASK).text == second
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"] * 2
    before = list(conversation.messages)
    with pytest.raises(RegionError, match="<region3>"):
        conversation.ask("And <region3>?")
    assert conversation.messages == before


def test_how_a_mask_was_read_is_a_warning_wherever_it_is_asked_about(predictor):
    soft, short = Region.mask(np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))), {"max_new_tokens": 2}
    talk = predictor.conversation([soft])
    for answer in (
        predictor.ask("What is <region1>?", soft, **short),
        predictor.ask_many([Question(text="What is <region1>?", regions=soft)], **short)[0],
        predictor.describe([BOX, soft], **short)[1],
        talk.ask("What is <region1>?", **short),
    ):
        assert answer.warnings[0].startswith("<region1>: the mask has more than two values")
    assert talk.ask("And <region1>?", **short).warnings == ()


def test_a_long_conversation_forgets_its_oldest_turns(tmp_path, photo):
    predictor = RegionPredictor.from_pretrained(make_checkpoint(tmp_path, context=200), device="cpu").set_image(photo)
    conversation = predictor.conversation([BOX])
    warned = False
    for _ in range(6):
        conversation.ask("What is in <region1>, and what colour does it have?", max_new_tokens=24)
        warned = warned or any("forgot" in warning for warning in conversation.warnings)
    assert warned
    with pytest.raises(DataError, match="of the model's 200 tokens"):
        conversation.ask("why " * 200)


def written(predictor, monkeypatch, text: str) -> None:
    """Have the model write a text, whatever it is asked."""
    processor = predictor.engine.processor
    tokens = [*processor.tokenizer(text)["input_ids"], processor.stop_token_ids[0]]
    monkeypatch.setattr(
        scheduler, "choose", lambda logits, jobs, never: [tokens[min(len(job.tokens), len(tokens) - 1)] for job in jobs]
    )


def test_regions_that_an_answer_names_are_cited_or_warned_of(predictor, monkeypatch):
    text = "Region [2] is left of region [1], unlike Region [7]. Region [2]!"
    written(predictor, monkeypatch, text)
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


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (DataError, "expected a question", lambda p: p.ask("  ")),
        (ConfigError, "at least one choice", lambda p: p.classify(BOX, [])),
        (ConfigError, "max_new_tokens", lambda p: p.ask("What?", max_new_tokens=0)),
        (RegionError, "got none", lambda p: p.locate("a cup", [])),
        (DataError, "UTF-8", lambda p: p.ask("caf\udce9?")),
        (DataError, "history", lambda p: p.ask("What?", history=["Hello"])),
        (RegionError, "<region1>.*inverted", lambda p: p.stream("What is <region1>?", [Region.box(9, 9, 2, 2)])),
        (RegionError, "60 x 40", lambda p: p.conversation([Region.mask(np.ones((5, 5), bool))])),
        (ConfigError, "stop", lambda p: p.stream("What?", stop=5)),
        (ConfigError, "bogus", lambda p: p.ask("What?", bogus=1)),
        (ConfigError, "questions", lambda p: p.ask_many(Question(text="What?"))),
        (ConfigError, "brief", lambda p: p.describe(BOX, brief="x")),
        (ConfigError, "top_k", lambda p: p.classify(BOX, top_k="x")),
        (DataError, "expected expression", lambda p: p.locate(5, [BOX])),
        (RegionError, "<region2>", lambda p: p.locate("<region2>", [BOX])),
        (RegionError, "<region1>.*60 x 40", lambda p: p.locate("a cup", [Region.box(90, 90, 99, 99)])),
        (ConfigError, "by: .*'luck'", lambda p: p.locate("a cup", [BOX], by="luck")),
    ],
)
def test_bad_questions(predictor, monkeypatch, kind, message, call):
    monkeypatch.setattr(predictor.engine.decoder, "forward", lambda *_, **__: pytest.fail("something was computed"))
    with pytest.raises(kind, match=message):
        call(predictor)


def test_bad_checkpoints_devices_and_dtypes(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        RegionPredictor.from_pretrained(tmp_path / "nowhere")
    for name, value in {"device": "gpu", "dtype": "int8", "images": -1, "rows": 0, "pictures": 3}.items():
        with pytest.raises(ConfigError, match=name):
            RegionPredictor.from_pretrained(**{"path": checkpoint, name: value})


def test_half_precision(checkpoint, photo):
    predictor = RegionPredictor.from_pretrained(checkpoint, device="cpu", dtype="bfloat16").set_image(photo)
    assert predictor.ask("What is <region1>?", [BOX], **ASK).text
    assert predictor.classify(BOX, ["cat", "hot dog"]).label in ("cat", "hot dog")

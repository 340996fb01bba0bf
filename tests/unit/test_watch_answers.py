"""Asking a model that is being trained: always the same questions, and nothing of it is changed."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import draw_pictures
from tiny_checkpoint import make_checkpoint

from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects, write_records
from regiongpt.distributed import Processes
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import weights
from regiongpt.regions import Region
from regiongpt.train.answers import Question, ask, load_questions
from regiongpt.train.loop import run_stage
from regiongpt.train.recipe import DataConfig, EngineConfig, StageConfig


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    draw_pictures(root, 5, "instances_dev.json")
    return root


@pytest.fixture(scope="module")
def records(photographs: Path) -> Path:
    """Three records about two pictures, and one without any."""
    cat = RecordRegion(region=Region.box(4, 4, 30, 40), category="cat")
    ask_class = Turn(task="classify", answer="cat", regions=(1,), label_set="COCO-80", guided=True)
    caption = Turn(task="caption", answer="a red cat", regions=(1,))
    made = [
        Record(id=f"{name}/{turn.task}", source="s", image=name, width=96, height=64, regions=(cat,), turns=(turn,))
        for name, turn in (("1.png", ask_class), ("1.png", caption), ("2.png", caption))
    ]
    talk = Turn(task="chat", question="Two and two?", answer="Four.")
    made.append(Record(id="talk", source="s", image="", width=0, height=0, regions=(), turns=(talk,)))
    images = str(photographs / "images")
    write_records(photographs / "dev", made, Rejects(), source="s", images=images, inputs=[], arguments={})
    write_records(photographs / "talk", made[3:], Rejects(), source="s", images=images, inputs=[], arguments={})
    return photographs / "dev"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("parts"))


def test_records_give_one_question_an_image(records: Path) -> None:
    found = load_questions(DataConfig(mixture="m", dev_mixture=str(records)), 8, 0)
    assert sorted(each.image.name for each in found) == ["1.png", "2.png"]
    for each in found:
        assert "<image>" not in each.text
        assert "<region1>" in each.text
        assert each.expected in ("cat", "a red cat")
    assert found == load_questions(DataConfig(mixture="m", dev_mixture=str(records)), 8, 0)
    assert len(load_questions(DataConfig(mixture="m", dev_mixture=str(records)), 1, 0)) == 1
    with pytest.raises(DataError, match="talk: no dev data with regions to ask about"):
        load_questions(DataConfig(dev_mixture=str(records.with_name("talk"))), 4, 0)


def test_asking_leaves_a_model_in_training_as_it_was(checkpoint: Path, records: Path) -> None:
    model, processor = weights.load(checkpoint)
    model.train()
    model.vision_tower.eval()
    watched = load_questions(DataConfig(dev_mixture=str(records)), 2, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert any(modes)
    assert not all(modes)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    answers = ask(model, processor, watched)
    assert len(answers) == 2
    assert answers == ask(model, processor, watched)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    encoded = processor.encode_conversation(
        [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}], with_image=False
    )
    model(input_ids=encoded["input_ids"][None], labels=encoded["labels"][None]).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_a_question_without_an_answer_does_not_end_the_training(
    checkpoint: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = weights.load(checkpoint)
    model.train()
    (good,) = load_questions(DataConfig(dev_mixture=str(records)), 1, 0)
    lost = Question(name="lost", image=tmp_path / "lost.png", regions=good.regions, text="?", expected="")
    answers = ask(model, processor, [lost, good])
    assert answers[0].startswith("(no answer: ")
    assert not answers[1].startswith("(no answer: ")
    assert "lost: no answer" in caplog.text
    assert model.training


def test_a_model_in_shards_is_not_asked(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regiongpt.train.loop.connect", lambda: Processes(rank=0, count=2, local=0))
    questions = load_questions(DataConfig(dev_mixture=str(records)), 1, 0)
    sharded = EngineConfig(sharding="fsdp")
    with pytest.raises(ConfigError, match=r"watch.answer_steps: .*--engine.sharding ddp"):
        run_stage("stage2", None, [], None, None, StageConfig(), tmp_path, 0, engine=sharded, questions=questions)  # type: ignore[arg-type]

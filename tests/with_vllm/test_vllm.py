"""`--engine vllm` against our own engine, on a tiny model in float32. `make test-vllm` runs it where vLLM is."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment that has it")

from asking import photograph, tiny_parts
from serving import QUESTION, TWO, Served, chat_body, data_uri, regions_body, serving, wait_for
from tiny import text_config

from regiongpt.errors import ConfigError
from regiongpt.inference import RegionPredictor
from regiongpt.regions import Region
from regiongpt.serve import vllm
from regiongpt.serve.options import ServeOptions
from regiongpt.serve.vllm import VllmEngine

# Warnings of vLLM's own.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]
REGIONS = [Region.of(each) for each in TWO]
QUESTIONS = [QUESTION, "What is <region1>?", "Describe <region2> in detail.", "Is <region2> left of <region1>?"]
CHAT = "v1/chat/completions"


@pytest.fixture(scope="module")
def predictor() -> RegionPredictor:
    def language(size: int) -> object:
        return text_config(vocab_size=size, max_position_embeddings=2048, head_dim=32)

    return RegionPredictor(*tiny_parts(language=language, seed=1))


@pytest.fixture(scope="module")
def engine(predictor: RegionPredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("tiny")
    predictor.engine.model.save_pretrained(folder / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        made = VllmEngine(predictor.engine, folder / "checkpoint", ServeOptions(engine="vllm"))
    yield made
    made.scheduler.llm.engine_core.shutdown()


@pytest.fixture(scope="module")
def served(engine: VllmEngine) -> Iterator[Served]:
    with serving(engine) as running:
        yield running


def test_greedy_answers_of_many_clients_are_our_own(predictor: RegionPredictor, served: Served) -> None:
    def ask(asked: tuple[int, str]) -> tuple[str, int]:
        image, question = asked
        body = chat_body(question, data_uri(photograph(image)), max_tokens=40)
        answer = served.post(CHAT, body).json()
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

    asked = [(image, question) for question in QUESTIONS for image in range(4)]
    expected = []
    for image, question in asked:
        answer = predictor.set_image(photograph(image)).ask(question, REGIONS, max_new_tokens=40)
        expected.append((answer.text, answer.tokens))
    assert len(set(expected)) > len(QUESTIONS)  # the model looks at what it is shown
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, asked)) == expected


def test_what_vllm_has_read_of_an_image_is_read_once(engine: VllmEngine, served: Served) -> None:
    image = data_uri(photograph(7))
    words = "Look at the image as closely as you can, at all that is in it, and answer. " * 4
    served.post(CHAT, chat_body(f"{words}What is <region1>?", image))
    before = engine.scheduler.reused
    served.post(CHAT, chat_body(f"{words}What is <region2>?", image))
    assert engine.scheduler.reused - before >= engine.model.config.num_image_tokens
    before = engine.scheduler.reused
    served.post(CHAT, chat_body(f"{words}What is <region2>?", data_uri(photograph(8))))
    assert engine.scheduler.reused - before < engine.model.config.num_image_tokens  # another image


def test_a_stream_ends_at_a_stop_text(predictor: RegionPredictor, served: Served) -> None:
    predictor.set_image(photograph())
    whole = predictor.ask(QUESTION, REGIONS, max_new_tokens=40).text
    stop = whole[len(whole) // 2 :][:3]
    expected = predictor.ask(QUESTION, REGIONS, max_new_tokens=40, stop=stop)
    with served.http() as client:
        body = chat_body(max_tokens=40, stop=stop, stream=True, stream_options={"include_usage": True})
        lines = [line[6:] for line in client.post(CHAT, json=body).text.split("\n\n") if line]
    *events, usage = [json.loads(line) for line in lines[:-1]]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert (text.strip(), lines[-1]) == (expected.text, "[DONE]")
    assert usage["usage"]["completion_tokens"] == expected.tokens


def test_a_seed_repeats_an_answer(served: Served) -> None:
    def ask(seed: int) -> str:
        answer = served.post(CHAT, chat_body(max_tokens=20, temperature=1.5, seed=seed)).json()
        return str(answer["choices"][0]["message"]["content"])

    assert ask(1) == ask(1) != ask(2)


def cancelled(served: Served) -> float:
    (sample,) = (each for each in served.service.metrics.cancelled.collect()[0].samples if each.name.endswith("_total"))
    return float(sample.value)


def test_closing_a_stream_ends_its_answer(engine: VllmEngine, served: Served) -> None:
    body, before = chat_body(max_tokens=1000, temperature=2, seed=3, stream=True), cancelled(served)
    with served.http() as client, client.stream("POST", CHAT, json=body) as stream:
        assert next(stream.iter_lines()).startswith("data: ")
    wait_for(lambda: cancelled(served) == before + 1 and not engine.scheduler.running)
    assert not engine.scheduler.llm.has_unfinished_requests()
    assert served.post(CHAT, chat_body()).status_code == 200


def test_a_failed_step_leaves_nothing_behind(engine: VllmEngine, served: Served, monkeypatch) -> None:
    llm = engine.scheduler.llm
    whole = served.post(CHAT, chat_body()).json()["choices"]
    with monkeypatch.context() as patch:
        patch.setattr(llm, "step", lambda: 1 / 0)
        assert served.post(CHAT, chat_body("What is <region1>?")).status_code == 500
    assert not llm.has_unfinished_requests()
    assert served.post(CHAT, chat_body()).json()["choices"] == whole


def test_regions_are_described_classified_and_located_as_by_our_own(predictor: RegionPredictor, served: Served) -> None:
    predictor.set_image(photograph())
    described = served.post("v1/regions/describe", regions_body(max_tokens=12)).json()["regions"]
    assert [each["answer"] for each in described] == [
        each.text for each in predictor.describe(REGIONS, max_new_tokens=12)
    ]
    answer = served.post("v1/regions/classify", regions_body(choices=["cat", "dog", "car"])).json()
    expected = predictor.classify(REGIONS, ["cat", "dog", "car"])
    for found, own in zip(answer["regions"], expected, strict=True):
        assert found["probabilities"] == pytest.approx(own.probabilities, rel=1e-4)
    located = served.post("v1/regions/locate", regions_body(expression="the cat")).json()["results"]
    assert [each["number"] for each in located] == [predictor.locate("the cat", REGIONS).number]


def test_what_does_not_start_is_one_line(predictor: RegionPredictor, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(vllm, "export", lambda *_: tmp_path / "empty")
    with pytest.raises(ConfigError, match="--engine vllm") as caught:
        VllmEngine(predictor.engine, tmp_path, ServeOptions(engine="vllm"))
    assert "\n" not in str(caught.value)


def test_a_server_whose_vllm_has_died_says_so(engine: VllmEngine, served: Served) -> None:
    for process in engine.scheduler.llm.engine_core.resources.engine_manager.processes:
        process.kill()
    with served.http() as client:
        wait_for(lambda: client.get("healthz").status_code == 503)
    assert served.post(CHAT, chat_body()).status_code in (500, 503)
    assert served.post(CHAT, chat_body()).status_code == 503

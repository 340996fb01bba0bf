"""The server over real connections, against the same questions asked in Python."""

import base64
import http.client
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from asking import photograph, tiny_parts
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx
import openai
from serving import (
    QUESTION,
    TWO,
    Served,
    chat_body,
    data_uri,
    messages,
    png,
    regions_body,
    serving,
    wait_for,
)

from regiongpt.errors import ConfigError
from regiongpt.inference import RegionPredictor, scheduler
from regiongpt.regions import Region
from regiongpt.serve import app, images
from regiongpt.serve.guard import ApiError
from regiongpt.serve.options import KEYS, ServeOptions

ALICE, BOB = "alice-0123456789abcdef", "bobby-0123456789abcdef"
REGIONS = [Region.of(each) for each in TWO]
CHAT, DESCRIBE, CLASSIFY, LOCATE = "chat/completions", "regions/describe", "regions/classify", "regions/locate"


@pytest.fixture(scope="module")
def predictor() -> RegionPredictor:
    return RegionPredictor(*tiny_parts(seed=1)).set_image(photograph())


@pytest.fixture(scope="module")
def served(predictor: RegionPredictor):
    with serving(predictor.engine) as running:
        yield running


def mistake(response: httpx.Response) -> tuple[int, Any]:
    """The status and code of an error, in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return response.status_code, error["code"]


def events(response: httpx.Response) -> list[Any]:
    """What a stream says, without its end."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text(response: httpx.Response) -> str:
    """An answer, in a stream or whole."""
    if response.headers["Content-Type"] == "application/json":
        return response.json()["choices"][0]["message"]["content"]
    return "".join(each["choices"][0]["delta"].get("content", "") for each in events(response)).strip()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch, predictor: RegionPredictor) -> None:
    """No answer ends by itself, and every step takes its time."""
    monkeypatch.setattr(predictor.engine.scheduler, "_stop_ids", frozenset())
    slowed(monkeypatch, predictor)


def slowed(monkeypatch: pytest.MonkeyPatch, predictor: RegionPredictor, seconds: float = 0.01) -> None:
    """Make every step of the batch take its time."""
    step = predictor.engine.scheduler._step
    monkeypatch.setattr(predictor.engine.scheduler, "_step", lambda: (time.sleep(seconds), step())[1])


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_chat_by_the_official_client_equals_ask(served: Served, predictor):
    asked = predictor.ask(QUESTION, REGIONS, max_new_tokens=8)
    with served.openai() as client:
        asking = client.chat.completions.create
        answer = asking(model="tiny", messages=messages(), extra_body={"regions": TWO}, max_tokens=8)
        assert [model.id for model in client.models.list()] == ["tiny"]
    assert answer.choices[0].message.content == asked.text
    assert answer.choices[0].finish_reason == ("stop" if asked.complete else "length")
    assert answer.usage.completion_tokens == asked.tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + asked.tokens
    assert answer.model_extra == {"cited": list(asked.cited), "warnings": list(asked.warnings)}


def test_a_stream_is_the_answer_in_pieces(served: Served, predictor):
    asked = predictor.ask(QUESTION, REGIONS, max_new_tokens=60)
    ways = {"max_completion_tokens": 60, "stream": True, "stream_options": {"include_usage": True}}
    with served.openai() as client:
        asking = client.chat.completions.create
        chunks = list(asking(model="tiny", messages=messages(), extra_body={"regions": TWO}, **ways))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces).strip() == asked.text
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == ("stop" if asked.complete else "length")
    assert chunks[-1].usage.completion_tokens == asked.tokens


def test_regions_as_parts_are_numbered_in_order(served: Served, predictor):
    parts = [
        {"type": "region", "region": TWO[0]},
        {"type": "text", "text": " or "},
        {"type": "region", "region": TWO[1]},
    ]
    body = {"messages": messages("Which is red, ", None, *parts), "max_tokens": 8}
    asked = predictor.ask("Which is red, <region1> or <region2>", REGIONS, max_new_tokens=8)
    assert text(served.post(f"v1/{CHAT}", body)) == asked.text


def test_a_conversation_goes_on_with_its_uploaded_image(served: Served, predictor):
    first = predictor.ask(QUESTION, REGIONS, max_new_tokens=8).text
    history = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first}]
    asked = predictor.ask("And <region2>?", REGIONS, history=history, max_new_tokens=8)
    with served.http() as client:
        kept = client.post("v1/images", content=png(photograph()), headers={"Content-Type": "image/png"}).json()
        turns = [*messages(QUESTION, kept["id"]), history[1], {"role": "user", "content": "And <region2>?"}]
        assert text(client.post(f"v1/{CHAT}", json={"messages": turns, "regions": TWO, "max_tokens": 8})) == asked.text
        assert (kept["width"], kept["height"]) == (60, 40)


def test_regions_of_every_kind_are_described_as_in_python(served: Served, predictor):
    mask = Region.mask(np.pad(np.ones((20, 20), bool), ((10, 10), (20, 20))))
    kinds = [
        *TWO,
        {"box": [0.1, 0.1, 0.5, 0.9], "normalized": True},
        {"point": [20, 20], "radius": 6},
        {"scribble": [[5, 5], [40, 30]], "width": 4},
        {"rle": mask.to_dict()["mask"]},
        mask.to_dict(),
        [3, 3, 20, 30],
    ]
    regions = [Region.of(each) for each in kinds]
    asked = predictor.describe(regions, max_new_tokens=8)
    body = {**regions_body(), "regions": kinds, "max_tokens": 8}
    answer = served.post(f"v1/{DESCRIBE}", body).json()
    assert [each["answer"] for each in answer["regions"]] == [each.text for each in asked]
    assert [Region.of(each["region"]) for each in answer["regions"]] == regions
    assert answer["usage"]["completion_tokens"] == sum(each.tokens for each in asked)
    streamed = events(served.post(f"v1/{DESCRIBE}", {**body, "stream": True}))
    assert {each["index"]: each["answer"] for each in streamed} == {n: each.text for n, each in enumerate(asked)}
    brief = served.post(f"v1/{DESCRIBE}", {**body, "brief": True}).json()
    short = predictor.describe(regions, brief=True, max_new_tokens=8)
    assert [each["answer"] for each in brief["regions"]] == [each.text for each in short]


@pytest.mark.parametrize("more", [{}, {"top_k": 2}])
def test_classify_as_in_python(served: Served, predictor, more):
    choices = ["cat", "dog", "teddy bear"]
    answer = served.post(f"v1/{CLASSIFY}", regions_body(choices=choices, **more)).json()
    for each, expected in zip(answer["regions"], predictor.classify(REGIONS, choices, **more), strict=True):
        assert each["label"] == expected.label
        assert each["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)


@pytest.mark.parametrize("by", ["both", "answer", "words"])
def test_locate_as_in_python(served: Served, predictor, by):
    expressions = ["the red cup", "a dog"]
    answer = served.post(f"v1/{LOCATE}", regions_body(expression=expressions, by=by)).json()
    for each, expected in zip(answer["results"], predictor.locate(expressions, REGIONS, by=by), strict=True):
        assert (each["number"], each["answer"]) == (expected.number, expected.text)
        assert each["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)


def test_a_careful_server_looks_twice(predictor):
    model, processor = tiny_parts(seed=1, region_crop=True)
    torch.nn.init.normal_(model.refinement.crop_projection.weight, std=5.0)
    twice = RegionPredictor(model, processor).set_image(photograph())
    asked = [twice.ask(QUESTION, REGIONS, max_new_tokens=8, detail=detail).text for detail in ("fast", "careful")]
    probabilities = twice.classify(REGIONS, ["cat", "dog"], detail="careful")[0].probabilities
    with serving(twice.engine, detail="careful") as running:
        assert text(running.post(f"v1/{CHAT}", chat_body())) == asked[1] != asked[0]
        answer = running.post(f"v1/{CLASSIFY}", regions_body(choices=["cat", "dog"])).json()
    assert answer["regions"][0]["probabilities"] == pytest.approx(probabilities, abs=1e-4)
    with pytest.raises(ConfigError, match="region_crop"):
        app.create_app(predictor.engine, ServeOptions(detail="careful"), "tiny")


def test_the_documented_examples_work(served: Served):
    with served.http() as client:
        document = client.get("openapi.json").json()
        asked = 0
        for path, operations in document["paths"].items():
            content = operations.get("post", {}).get("requestBody", {}).get("content", {})
            if "application/json" in content:
                name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                for example in document["components"]["schemas"][name]["examples"]:
                    assert client.post(path, json=example).status_code == 200, (path, example)
                    asked += 1
    assert asked >= 5


def test_an_image_of_several_requests_is_encoded_once(served: Served):
    before = served.service.worker.encoded
    image = data_uri(photograph(77))
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: text(served.post(f"v1/{CHAT}", chat_body(image=image))), range(4)))) == 1
    assert served.service.worker.encoded == before + 1


# ---------------------------------------------------------------------------------------------------------------------
# Many clients


def test_clients_are_never_mixed_up(served: Served, predictor):
    plain = RegionPredictor(predictor.engine.model, predictor.engine.processor)

    def expected(n: int) -> tuple[str, Any]:
        plain.set_image(photograph(n % 3))
        region = [Region.box(n, n, 30 + n, 20 + n)]
        if n % 4 == 3:
            return "", plain.classify(region, ["cat", "dog", "cup"])[0].probabilities
        return plain.ask(f"What is <region1>, {n}?", region, max_new_tokens=5 + n).text, None

    def answer(n: int) -> tuple[str, Any]:
        image, region = data_uri(photograph(n % 3)), {"box": [n, n, 30 + n, 20 + n]}
        if n % 4 == 3:
            body = {"image": image, "regions": [region], "choices": ["cat", "dog", "cup"]}
            return "", served.post(f"v1/{CLASSIFY}", body).json()["regions"][0]["probabilities"]
        body = chat_body(f"What is <region1>, {n}?", image, regions=[region], max_tokens=5 + n, stream=n % 2 == 0)
        return text(served.post(f"v1/{CHAT}", body)), None

    wanted = [expected(n) for n in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for (said, shares), (right, probabilities) in zip(pool.map(answer, range(16)), wanted, strict=True):
            assert said == right
            assert shares == (probabilities and pytest.approx(probabilities, abs=1e-4))


def test_a_client_with_many_regions_does_not_hold_up_another(predictor, monkeypatch):
    slowed(monkeypatch, predictor)
    predictor.engine.scheduler.rows, rows = 4, predictor.engine.scheduler.rows
    finished = []

    def ask(key: str, path: str, body: Any) -> None:
        assert running.post(path, body, key).status_code == 200
        finished.append(key)

    with serving(predictor.engine, [ALICE, BOB]) as running:
        many = {**regions_body(max_tokens=30), "regions": [[n, n, n + 9, n + 9] for n in range(20)]}
        first = threading.Thread(target=ask, args=(ALICE, f"v1/{DESCRIBE}", many))
        first.start()
        wait_for(lambda: len(predictor.engine.scheduler.running) == 4)
        ask(BOB, f"v1/{CHAT}", chat_body())
        first.join()
    predictor.engine.scheduler.rows = rows
    assert finished == [BOB, ALICE]


@pytest.mark.parametrize("stream", [True, False])
def test_who_has_gone_leaves_the_batch_at_once(served: Served, predictor, monkeypatch, endless, stream):
    jobs = []
    submit = predictor.engine.scheduler.submit
    monkeypatch.setattr(predictor.engine.scheduler, "submit", lambda job: (jobs.append(job), submit(job)))
    body = chat_body("Go on about <region1> and <region2>.", max_tokens=400, stream=stream)
    where = urlsplit(served.address)
    connection = http.client.HTTPConnection(where.hostname, where.port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    if stream:
        assert connection.getresponse().read(20)
    wait_for(lambda: len(predictor.engine.scheduler.running) == 1 and len(jobs[0].tokens) > 2)
    connection.sock.close() if connection.sock else None
    connection.close()
    wait_for(lambda: len(predictor.engine.scheduler.running) == 0)
    wait_for(lambda: served.server.guard.open == 0)
    assert jobs[0].cancelled
    assert len(jobs[0].tokens) < 400


def test_a_failure_of_the_model_ends_its_own_request_alone(served: Served, predictor, monkeypatch):
    choose = scheduler.choose

    def poisoned(logits: Any, jobs: Any, never: Any) -> Any:
        if any(job.options.seed == 666 and len(job.tokens) >= 3 for job in jobs):
            raise RuntimeError("out of memory")
        return choose(logits, jobs, never)

    texts = [f"What is <region{n % 2 + 1}>, {n}?" for n in range(4)]
    wanted = [predictor.ask(each, REGIONS, max_new_tokens=30).text for each in texts]
    monkeypatch.setattr(scheduler, "choose", poisoned)
    slowed(monkeypatch, predictor)
    bodies = [chat_body(each, max_tokens=30, stream=n == 1) for n, each in enumerate(texts)]
    bodies.append(chat_body(QUESTION, max_tokens=400, seed=666))
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda body: served.post(f"v1/{CHAT}", body), bodies))
    assert mistake(found[-1]) == (500, "model_failed")
    assert list(map(text, found[:-1])) == wanted
    assert served.post(f"v1/{CHAT}", bodies[0]).status_code == 200


def test_the_event_loop_goes_on_while_an_image_is_encoded(served: Served, predictor, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    encode = predictor.engine.model.encode_image

    def slow(pixels: Any) -> Any:
        entered.set()
        assert leave.wait(20)
        return encode(pixels)

    monkeypatch.setattr(predictor.engine.model, "encode_image", slow)
    with ThreadPoolExecutor(1) as pool, served.http() as client:
        answer = pool.submit(served.post, f"v1/{CHAT}", chat_body(image=data_uri(photograph(78))))
        assert entered.wait(20)
        assert client.get("healthz").json()["status"] == "ok"
        leave.set()
        assert answer.result().status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# Limits and mistakes

POINTS = [[n % 50, n % 30] for n in range(41)]
LIMITS = {
    "max_bytes": 50_000,
    "max_pixels": 3000,
    "max_regions": 3,
    "max_values": 80,
    "max_tokens": 64,
    "max_turns": 3,
    "max_text": 200,
    "max_choices": 3,
}


@pytest.fixture(scope="module")
def limited(predictor):
    with serving(predictor.engine, **LIMITS) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHAT, chat_body(image="data:image/png;base64," + "A" * 50_000), 413, "max_bytes"),
        (CHAT, chat_body(image=data_uri(np.zeros((60, 60, 3), np.uint8))), 400, "max_pixels"),
        (CHAT, chat_body(regions=TWO * 2), 400, "max_regions"),
        (DESCRIBE, regions_body() | {"regions": TWO * 2}, 400, "max_regions"),
        (DESCRIBE, regions_body() | {"regions": [{"scribble": POINTS}]}, 413, "max_values"),
        (CHAT, chat_body(max_tokens=65), 400, "max_tokens"),
        (DESCRIBE, regions_body(max_tokens=65), 400, "max_tokens"),
        (CHAT, {"messages": messages() + [{"role": "user", "content": "And?"}] * 3}, 400, "max_turns"),
        (CHAT, chat_body("why? " * 50), 400, "max_text"),
        (CLASSIFY, regions_body(choices=["cat" * 70]), 400, "max_text"),
        (CLASSIFY, regions_body(choices=list("abcd")), 400, "max_choices"),
        (LOCATE, regions_body(expression=list("abcd")), 400, "max_choices"),
        (LOCATE, regions_body(expression=["a", "b"]), 400, "max_choices"),
    ],
)
def test_a_limit_is_named(limited: Served, path, body, status, code):
    response = limited.post(f"v1/{path}", body)
    assert mistake(response) == (status, code)
    assert code in response.json()["error"]["message"]


def test_a_body_without_a_length_is_cut_off(limited: Served):
    with limited.http() as client:
        response = client.post("v1/images", content=iter([b"x" * 30_000, b"x" * 30_000]))
    assert mistake(response) == (413, "max_bytes")


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_ends(predictor, endless, stream):
    with serving(predictor.engine, max_seconds=1.0) as running:
        body = chat_body("Go on.", regions=[], max_tokens=400, stream=stream)
        response = running.post(f"v1/{CHAT}", body)
        if stream:
            last = response.text.rstrip().rsplit("\n\n", 1)[1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "max_seconds"
        else:
            assert mistake(response) == (408, "max_seconds")
        wait_for(lambda: len(predictor.engine.scheduler.running) == 0)


BOX = {"box": [4, 4, 30, 20]}
NOISE = "data:image/png;base64," + base64.b64encode(b"no image").decode()
HALF = "data:image/png;base64," + base64.b64encode(png(photograph())[:2000]).decode()


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHAT, [], 400, None),
        (CHAT, {"messages": []}, 400, None),
        (CHAT, chat_body(tools=[]), 400, "unknown_parameter"),
        (CHAT, chat_body(n=2), 400, None),
        (CHAT, chat_body(temperature=-1), 400, None),
        (CHAT, chat_body(model="gpt"), 404, "model_not_found"),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}, 400, "image"),
        (CHAT, {"messages": messages() + messages(image=data_uri(photograph(1)))}, 400, "image"),
        (CHAT, {"messages": [*messages(), {"role": "assistant", "content": "Yes."}]}, 400, None),
        (CHAT, {"messages": messages() * 2, "regions": TWO}, 400, None),
        (CHAT, chat_body(" "), 400, None),
        (CHAT, chat_body("What is <region3>?"), 400, "region"),
        (CHAT, chat_body("What is <region>?"), 400, "region"),
        (CHAT, chat_body("word " * 600), 400, "context_length_exceeded"),
        (CHAT, chat_body(stop=[""]), 400, None),
        (CHAT, chat_body(stop="." * 101), 400, None),
        (CHAT, chat_body(image=NOISE), 400, "image"),
        (CHAT, chat_body(image=HALF), 400, "image"),
        (CHAT, chat_body(image="data:image/png;base64,%%%"), 400, "image"),
        (CHAT, chat_body(image="/etc/passwd"), 400, "image"),
        (CHAT, chat_body(image="file:///etc/passwd"), 400, "image"),
        (CHAT, chat_body(image="https://example.com/a.png"), 403, "url_not_allowed"),
        (CHAT, chat_body(image="sha256:00"), 404, "image_not_found"),
        (DESCRIBE, regions_body() | {"regions": []}, 400, None),
        (DESCRIBE, regions_body() | {"regions": [{"circle": [1, 2]}]}, 400, "region"),
        (DESCRIBE, regions_body() | {"regions": [{"box": [1, 2, float("nan"), 4]}]}, 400, "region"),
        (DESCRIBE, regions_body() | {"regions": [{"point": [0, 1e-300], "radius": 5e-324}]}, 400, "region"),
        (DESCRIBE, regions_body() | {"regions": [{"box": [900, 900, 990, 990]}]}, 400, "region"),
        (DESCRIBE, regions_body() | {"regions": [{"rle": {"size": [9000, 9000], "counts": "0"}}]}, 400, "region"),
        (DESCRIBE, regions_body() | {"regions": [{"rle": {"size": [40, 60], "counts": "\ud800"}}]}, 400, "region"),
        (DESCRIBE, regions_body() | {"regions": [[[True, False], [True, True], [1, 1], [0, 0]]]}, 400, "region"),
        (CLASSIFY, regions_body(choices=["cat", "cat"]), 400, None),
        (CLASSIFY, regions_body(choices=["\ud800"]), 400, None),
        (LOCATE, regions_body(expression=""), 400, None),
        (LOCATE, regions_body(expression="<region9>"), 400, "region"),
    ],
)
def test_a_mistake_is_named(served: Served, path, body, status, code):
    with served.http() as client:
        content = json.dumps(body).encode()
        response = client.post(f"v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert mistake(response) == (status, code)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_is_refused(served: Served, content):
    with served.http() as client:
        response = client.post(f"v1/{CHAT}", content=content, headers={"Content-Type": "application/json"})
        assert mistake(response)[0] == 400
        assert mistake(client.post(f"v1/{CHAT}", content=content))[0] == 400


def test_one_connection_serves_many_requests_after_mistakes_too(served: Served):
    where = urlsplit(served.address)
    connection = http.client.HTTPConnection(where.hostname, where.port)
    for body, status in [(chat_body(), 200), (chat_body(n=2), 400), (chat_body(stream=True), 200), (chat_body(), 200)]:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        if status == 200 and body.get("stream") is None:
            socket = connection.sock
        response = connection.getresponse()
        assert (response.status, connection.sock) == (status, socket)
        response.read()
    connection.close()


def test_a_full_queue_says_when_to_come_again(predictor, endless):
    with serving(predictor.engine, queue=1) as running, running.openai() as client:
        body = chat_body("Go on.", regions=[], max_tokens=400, stream=True)
        with running.http() as first, first.stream("POST", f"v1/{CHAT}", json=body) as stream:
            pieces = stream.iter_raw()
            assert next(pieces)
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="tiny", messages=messages())
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            assert caught.value.code == "queue_full"
            assert mistake(running.post("v1/images", {}))[0] == 429
        wait_for(lambda: running.server.guard.open == 0)
        assert client.chat.completions.create(model="tiny", messages=messages("Hi"), max_tokens=2, timeout=60)


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask


def test_a_key_is_needed_and_images_belong_to_it(predictor):
    with serving(predictor.engine, [ALICE, BOB]) as running:
        for key in ("wrong-0123456789abcdef", ALICE[:-1], "ä" * 20):
            header = [(b"Authorization", f"Bearer {key}".encode())]
            refused = httpx.get(f"{running.address}v1/models", headers=header)
            assert mistake(refused) == (401, "invalid_api_key")
        assert httpx.get(f"{running.address}metrics").status_code == 401
        assert httpx.get(f"{running.address}healthz").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            running.openai("wrong-0123456789abcdef").models.list()
        with running.http(ALICE) as alice, running.http(BOB) as bob:
            kept = alice.post("v1/images", content=png(photograph())).json()["id"]
            assert alice.post(f"v1/{CHAT}", json=chat_body(image=kept)).status_code == 200
            assert mistake(bob.post(f"v1/{CHAT}", json=chat_body(image=kept))) == (404, "image_not_found")
            assert "regiongpt_open_requests" in alice.get("metrics").text


def test_other_sites_cannot_use_a_browser_on_this_machine(served: Served):
    with served.http() as client:
        assert mistake(client.get("v1/models", headers={"Host": "evil.example"})) == (403, "host")
        assert mistake(client.get("v1/models", headers={"Origin": "https://evil.example"})) == (403, "host")
        assert client.get("v1/models", headers={"Origin": served.address.rstrip("/")}).status_code == 200
        response = client.options("v1/models", headers={"Origin": served.address.rstrip("/")})
        assert response.status_code == 405
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_no_file_but_the_pages_can_be_reached(predictor):
    with serving(predictor.engine, [ALICE]) as running, httpx.Client(base_url=running.address) as client:
        for path in ("page/../app.py", "page/%2e%2e/app.py", "page/%00", "page", "etc/passwd", "page//etc/passwd"):
            assert mistake(client.get(path))[0] == 404
        page = client.get("/")
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert client.get("/", headers={"If-None-Match": page.headers["ETag"]}).status_code == 304
        script = client.get("page/app.js")
        assert (script.headers["Content-Type"], script.headers["Cache-Control"]) == (
            "text/javascript; charset=utf-8",
            "no-cache",
        )


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"host": "0.0.0.0"}, "api-keys"),
        ({"host": "example.com"}, "api-keys"),
        ({"api_keys": "missing"}, "missing"),
        ({"api_keys": "empty"}, "no key"),
        ({"api_keys": "short"}, "16"),
        ({"api_keys": "good", "no_auth": True}, "cannot be combined"),
    ],
)
def test_an_open_address_needs_a_key(tmp_path, monkeypatch, options, wrong):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEYS, raising=False)
    for name, text in (("empty", " \n"), ("short", "abc"), ("good", f"{ALICE}\n{BOB}\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=wrong):
        ServeOptions(**options).keys()
    assert ServeOptions(host="0.0.0.0", api_keys="good").keys() == [ALICE, BOB]
    assert ServeOptions(host="0.0.0.0", no_auth=True).keys() == []
    assert ServeOptions().keys() == []
    monkeypatch.setenv(KEYS, f"{ALICE} {BOB}")
    assert ServeOptions(host="0.0.0.0").keys() == [ALICE, BOB]


def test_a_port_that_is_taken_is_one_line(served: Served):
    with pytest.raises(ConfigError, match="in use"):
        app.bind(ServeOptions(port=urlsplit(served.address).port))


# ---------------------------------------------------------------------------------------------------------------------
# Images


def test_images_go_after_a_while(predictor, monkeypatch):
    pictures = images.Pictures(ServeOptions(keep_images=2, keep_seconds=100), predictor.engine.processor)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    first, second, third = (pictures.read(png(photograph(n))) for n in range(3))
    pictures.keep(first, "me")
    with ThreadPoolExecutor(8) as pool:  # several requests about one image
        assert set(pool.map(lambda _: pictures.find(first.id, "me"), range(500))) == {first}
    for each in (first, second, third):
        assert pictures.keep(each, "me") == now + 100
    with pytest.raises(ApiError, match="upload"):
        pictures.find(first.id, "me")
    now += 60
    assert pictures.find(second.id, "me") is second
    now += 60
    assert pictures.find(second.id, "me")
    with pytest.raises(ApiError, match="upload"):
        pictures.find(third.id, "me")


def test_an_upright_image_is_measured_as_it_is_shown(served: Served):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph()).save(file, "JPEG", exif=exif)
    with served.http() as client:
        kept = client.post("v1/images", content=file.getvalue()).json()
    assert (kept["width"], kept["height"]) == (40, 60)


class _Response(io.BytesIO):
    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        super().__init__(body)
        self.status, self.headers = status, headers


@pytest.mark.parametrize(
    ("url", "answers", "result"),
    [
        ("https://good.example/a.png", [_Response(200, b"bytes")], b"bytes"),
        ("https://good.example/a", [_Response(302, Location="https://inside.example/b")], 400),
        ("https://good.example/a", [_Response(404)], 400),
        ("https://good.example/a", [_Response(200, b"x" * 200)], 413),
        ("https://good.example:22/a", [], 403),
        ("https://me@good.example/a", [], 403),
        ("https://evil.example/a", [], 403),
        ("https://inside.example/a", [], 403),
        ("https://[::1/a", [], 400),
    ],
)
def test_only_allowed_public_urls_are_fetched(monkeypatch, url, answers, result):
    waiting = list(answers)

    class Connection(http.client.HTTPConnection):
        def request(self, *arguments: Any, **more: Any) -> None:
            assert (self.host, self.sock) == ("good.example", ("93.184.215.14", 443))

        def close(self) -> None: ...
        def getresponse(self) -> _Response:
            return waiting.pop(0)

    addresses = {"good.example": ["93.184.215.14"], "inside.example": ["93.184.215.14", "10.0.0.1"]}
    monkeypatch.setattr(images.http.client, "HTTPConnection", Connection)
    monkeypatch.setattr(images.socket, "create_connection", lambda address, timeout: address)
    monkeypatch.setattr(images.ssl.SSLContext, "wrap_socket", lambda context, plain, server_hostname: plain)
    monkeypatch.setattr(
        images.socket, "getaddrinfo", lambda host, *_, **__: [(0, 0, 0, "", (each, 443)) for each in addresses[host]]
    )
    allowed = ("good.example", "inside.example")
    if isinstance(result, bytes):
        assert images.fetch(url, allowed, 100) == result
    else:
        with pytest.raises(ApiError) as caught:
            images.fetch(url, allowed, 100)
        assert caught.value.status == result


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1", "0.0.0.0"]
)
def test_private_addresses_are_refused(monkeypatch, address):
    monkeypatch.setattr(images.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    with pytest.raises(ApiError, match="private"):
        images.public_address("good.example")

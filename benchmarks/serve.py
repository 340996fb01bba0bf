"""Measure `regiongpt serve`: many clients at once, the first word of a stream, disconnects, and a fuzzed schema.

    python benchmarks/serve.py load --clients 64 --seconds 120
    python benchmarks/serve.py first-word
    python benchmarks/serve.py disconnect --times 1000
    python benchmarks/serve.py fuzz --cases 5000     # needs: pip install schemathesis

Each starts a server of its own on a free port, prints a line of JSON, and exits with 1 where it finds a fault.
"""

import argparse
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skimage import data
from stamp import stamp

from regiongpt import Question, Region, RegionPredictor

PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket")
QUESTIONS = (
    "Describe <region1> and its surroundings.",
    "What is <region1>?",
    "Where is <region1> relative to <region2>?",
)


class Server:
    """A server in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "regiongpt.cli", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://([\d.]+):(\d+)/", self.process.stdout.readline())
        if found is None:
            raise SystemExit("the server has not started")
        self.host, self.port = found[1], int(found[2])

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own."""
        return http.client.HTTPConnection(self.host, self.port, timeout=300)

    def rss(self) -> float:
        """Resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def files(self) -> int:
        """Open files and connections."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def metric(self, name: str) -> float:
        """The sum of what /metrics tells under a name."""
        connection = self.connect()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}(\{{| )", line))

    def settled(self) -> None:
        """Wait until no request is open."""
        while self.metric("regiongpt_open_requests") > 0:
            time.sleep(0.05)


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    server = Server(*options)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(130)
        if code:
            print(f"the server has ended with {code}", file=sys.stderr)


def post(connection: http.client.HTTPConnection, path: str, body: Any) -> tuple[int, Any]:
    is_file = isinstance(body, bytes)
    kind = "image/png" if is_file else "application/json"
    connection.request("POST", path, body if is_file else json.dumps(body), {"Content-Type": kind})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def photographs() -> list[Any]:
    return [getattr(data, name)() for name in PHOTOGRAPHS]


def upload(server: Server, pixels: Any) -> str:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    status, kept = post(server.connect(), "/v1/images", file.getvalue())
    assert status == 200, kept
    return kept["id"]


def question(client: int, photo: int, pixels: Any) -> tuple[str, list[list[float]]]:
    """What a client asks about a photograph: regions of its own, no two clients' alike."""
    height, width = pixels.shape[:2]
    x, y = (37 * client + 11 * photo) % (width // 2), (53 * client + 7 * photo) % (height // 2)
    boxes = [
        [x, y, x + width // 3, y + height // 3],
        [x + width // 4, y + height // 4, x + width // 2, y + height // 2],
    ]
    text = QUESTIONS[(client + photo) % len(QUESTIONS)]
    return text, boxes if "<region2>" in text else boxes[:1]


def body(image: str, text: str, boxes: list[list[float]], **more: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "regions": boxes, "max_tokens": 64, **more}


def load(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Clients that ask about four images all the time, against one that asks alone."""
    photos = photographs()
    asked = {(n, p): question(n, p, photos[p]) for n in range(options.clients) for p in range(len(photos))}
    predictor = RegionPredictor.from_pretrained()
    listed = [Question(text=text, regions=[Region.box(*box) for box in boxes], image=photos[p], max_new_tokens=64)
              for (_, p), (text, boxes) in asked.items()]  # fmt: skip
    right = {key: answer.text for key, answer in zip(asked, predictor.ask_many(listed), strict=True)}
    del predictor
    lock = threading.Lock()
    found: dict[str, Any] = {"seconds": [], "failed": 0, "mixed": 0, "others": 0, "regions": 0}

    def client(server: Server, images: list[str], number: int, until: float) -> None:
        connection, turn = server.connect(), 0
        while time.perf_counter() < until:
            key = number, (number + turn) % len(images)
            text, boxes = asked[key]
            began = time.perf_counter()
            status, answer = post(connection, "/v1/chat/completions", body(images[key[1]], text, boxes))
            took = time.perf_counter() - began
            said = answer["choices"][0]["message"]["content"] if status == 200 else None
            with lock:
                found["seconds"].append(took)
                found["failed"] += status != 200
                found["regions"] += len(boxes)
                if status == 200 and said != right[key]:
                    found["others"] += 1
                    found["mixed"] += said in right.values()
            turn += 1

    def phase(server: Server, images: list[str], clients: int, seconds: float) -> dict[str, Any]:
        found.update(seconds=[], failed=0, mixed=0, others=0, regions=0)
        began = time.perf_counter()
        threads = [threading.Thread(target=client, args=(server, images, n, began + seconds)) for n in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent, times = time.perf_counter() - began, sorted(found["seconds"])
        return {
            "clients": clients,
            "requests": len(times),
            "requests_per_second": round(len(times) / spent, 2),
            "regions_per_second": round(found["regions"] / spent, 2),
            "median_ms": round(1e3 * statistics.median(times)),
            "p99_ms": round(1e3 * times[int(0.99 * (len(times) - 1))]),
            "failed": found["failed"],
            "answers_of_others": found["mixed"],
            "answers_unlike_python": found["others"],
        }

    with serving() as server:
        images = [upload(server, pixels) for pixels in photos]
        phase(server, images, 4, 3)  # encodes the images
        alone = phase(server, images, 1, options.alone)
        many = phase(server, images, options.clients, options.seconds)
    gain = round(many["requests_per_second"] / alone["requests_per_second"], 2)
    result = {"alone": alone, "many": many, "gain": gain, "answers": len(set(right.values()))}
    return result, many["failed"] == 0 and many["answers_of_others"] == 0


def first_word(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The first word of a stream against the same question asked in Python, by turns."""
    pixels = photographs()[0]
    predictor = RegionPredictor.from_pretrained().set_image(pixels)
    text, box = QUESTIONS[0], [120, 15, 440, 290]
    served, python = [], []
    with serving() as server:
        image, connection = upload(server, pixels), server.connect()
        payload = json.dumps(body(image, text, [box], stream=True))
        for _ in range(options.times + 3):
            began = time.perf_counter()
            pieces = predictor.stream(text, [Region.box(*box)], max_new_tokens=64)
            next(pieces)
            python.append(time.perf_counter() - began)
            list(pieces)
            time.sleep(0.05)
            began = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            while True:
                event = json.loads(response.readline().removeprefix(b"data: "))
                response.readline()
                if event["choices"][0]["delta"].get("content"):
                    break
            served.append(time.perf_counter() - began)
            response.read()
            time.sleep(0.05)
    middle = [round(1e3 * statistics.median(times[3:]), 1) for times in (python, served)]
    return {"python_ms": middle[0], "served_ms": middle[1], "ratio": round(middle[1] / middle[0], 2)}, True


def disconnect(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Clients that go away in the middle of a stream."""

    def go_away(server: Server, image: str, times: int) -> None:
        for n in range(times):
            connection = server.connect()
            text = f"Describe <region1> and its surroundings. {n}"
            payload = json.dumps(body(image, text, [[120, 15, 440, 290]], stream=True))
            connection.request("POST", "/v1/chat/completions", payload, {"Content-Type": "application/json"})
            connection.getresponse().readline()
            connection.close()
        server.settled()

    with serving() as server:
        image = upload(server, photographs()[0])
        go_away(server, image, 100)
        before = {"rss_mib": round(server.rss(), 1), "files": server.files()}
        go_away(server, image, options.times)
        time.sleep(2)
        after = {"rss_mib": round(server.rss(), 1), "files": server.files()}
        gone = server.metric("regiongpt_cancelled_total")
        status, _ = post(server.connect(), "/v1/chat/completions", body(image, QUESTIONS[1], [[120, 15, 440, 290]]))
    fine = status == 200 and after["files"] <= before["files"] + 1 and after["rss_mib"] < before["rss_mib"] + 50
    return {"before": before, "after": after, "cancelled": gone, "afterwards": status}, fine


def fuzz(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Fuzz the API by its own schema, with a real image as often as not."""
    with serving("--max-seconds", "30") as server, tempfile.TemporaryDirectory() as folder:
        image = upload(server, photographs()[0])
        connection = server.connect()
        connection.request("GET", "/openapi.json")
        document = json.loads(connection.getresponse().read())
        for kind, field in (
            ("ImageUrl", "url"),
            *((f"{each}Request", "image") for each in ("Describe", "Classify", "Locate")),
        ):
            properties = document["components"]["schemas"][kind]["properties"]
            properties[field] = {"anyOf": [{"const": image}, {"const": image}, properties[field]]}
        for kind in ("ChatRequest", "DescribeRequest", "ClassifyRequest", "LocateRequest"):
            properties = document["components"]["schemas"][kind]["properties"]
            properties["model"] = {"anyOf": [{"const": "regiongpt-nano"}, {"type": "null"}]}
        path = Path(folder) / "openapi.json"
        path.write_text(json.dumps(document))
        rss, codes = [round(server.rss())], []
        for seed in ("1", "2"):  # what the first half leaves behind is no leak unless the second leaves as much
            command = [
                str(Path(sys.executable).with_name("schemathesis")), "run", str(path),
                "--url", f"http://{server.host}:{server.port}",
                "--checks", "not_a_server_error,response_schema_conformance,content_type_conformance",
                "--max-examples", str(options.cases // 20), "--request-timeout", "60", "--seed", seed,
                "--continue-on-failure", "--suppress-health-check", "all", "--phases", "examples,coverage,fuzzing",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
            server.settled()
            codes.append(done.returncode)
            rss.append(round(server.rss()))
        failed = server.metric(r'regiongpt_requests_total\{[^}]*status="5\d\d"\}')
        counted = server.metric("regiongpt_requests_total")
    result = {"requests": counted, "server_errors": failed, "schemathesis": codes, "rss_mib": rss}
    return result, not failed and not any(codes) and rss[2] - rss[1] < 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, dest="kind")
    for name, run in (("load", load), ("first-word", first_word), ("disconnect", disconnect), ("fuzz", fuzz)):
        kind = kinds.add_parser(name, help=run.__doc__)
        kind.set_defaults(run=run)
        kind.add_argument("--clients", type=int, default=64)
        kind.add_argument("--seconds", type=float, default=120.0)
        kind.add_argument("--alone", type=float, default=20.0, help="seconds of one client at a time")
        kind.add_argument("--times", type=int, default=1000 if name == "disconnect" else 60)
        kind.add_argument("--cases", type=int, default=5000)
    options = parser.parse_args()
    result, fine = options.run(options)
    given = {key: value for key, value in vars(options).items() if key != "run"}
    print(json.dumps({**result, **stamp(given, {})}))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

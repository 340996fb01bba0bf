"""An OpenAI-compatible endpoint with faults to switch on, for tests and benchmarks; runs in a process of its own.

It answers about what it was shown: the same prompt and picture get the same text. Every request is noted, so that a
test can count what was asked twice.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FAULTS = (
    "malformed", "no_reason", "length", "empty", "rate_limit", "server_error", "cut_connection", "refused",
)  # fmt: skip


class Endpoint:
    """The server; ``control`` is a file of json that changes how it behaves while it runs.

    ``latency`` seconds an answer takes, ``slots`` answers at a time, ``down`` refuses everyone, ``key`` the right key,
    each of :data:`FAULTS` the share of requests that it strikes, ``retry_after`` seconds with each rate limit.
    """

    def __init__(self, control: Path, log: Path, parse: bool) -> None:
        self.control, self.parse = control, parse
        self.log = log.open("a", buffering=1)
        self.changed = 0.0
        self.settings: dict[str, Any] = {}
        self.read()
        self.slots = asyncio.Semaphore(self.settings.get("slots", 64))
        self.counts: Counter[str] = Counter()

    def read(self) -> None:
        changed = self.control.stat().st_mtime
        if changed != self.changed:
            self.settings = json.loads(self.control.read_text())
            self.changed = changed

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().lower().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                status, answer, more = await self.answer(head.split()[1].decode(), headers, body)
                if status == 0:
                    break
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                extra = "".join(f"{name}: {value}\r\n" for name, value in more.items())
                start = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
                writer.write(f"{start}{extra}\r\n".encode() + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, Any]]:
        self.read()
        wanted = self.settings
        if wanted.get("down"):
            return (0, None, {}) if wanted["down"] == "cut" else (503, {"error": {"message": "down"}}, {})
        if "key" in wanted and headers.get("authorization") != f"bearer {wanted['key']}":
            return 401, {"error": {"message": "Incorrect API key provided"}}, {}
        if path == "/v1/models":
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in wanted["models"]]
            return 200, {"object": "list", "data": models}, {}
        if path != "/v1/chat/completions":
            return 404, {"detail": "Not Found"}, {}
        name = hashlib.sha1(body).hexdigest()
        self.counts[name] += 1
        if wanted.get("keep"):
            with (self.control.parent / "bodies.jsonl").open("a") as file:
                file.write(f"{body.decode()}\n")
        if wanted.get("no_vision"):
            return 400, {"error": {"message": "this is not a multimodal model"}}, {}
        fault = self.fault(name)
        if wanted.get("strict") and b"structured_outputs" in body:
            return 400, {"error": {"message": "Unrecognized request argument supplied: structured_outputs"}}, {}
        if fault == "rate_limit":
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": wanted.get("retry_after", 0.05)}
        if fault == "server_error":
            self.log.write(f"struck {name}\n")
            again = {"Retry-After": wanted.get("retry_after", 0)}
            return wanted.get("status", 501), {"error": {"message": "broken"}}, again
        if fault == "cut_connection":
            return 0, None, {}
        if fault == "refused":
            return 400, {"error": {"message": "image too large"}}, {}
        self.log.write(f"asked {name}\n")
        async with self.slots:
            await asyncio.sleep(wanted.get("latency", 0.0))
        if fault == "malformed":
            return 200, b'{"id": "x", "choices": [', {}
        text = self.text(body, name) if self.parse else f"A thing that is called {name[:12]}, seen from close by."
        self.log.write(f"done {name}\n")
        if fault == "empty":
            return 200, self.completion("  ", "stop"), {}
        return 200, self.completion(text, {"no_reason": None, "length": "length"}.get(fault, "stop")), {}

    def fault(self, name: str) -> str:
        """Which fault strikes; another one when the same is asked again."""
        share = int(hashlib.sha1(f"{name} {self.counts[name]}".encode()).hexdigest()[:8], 16) / 2**32
        for fault in FAULTS:
            share -= self.settings.get(fault, 0.0)
            if share < 0:
                return fault
        return ""

    @staticmethod
    def completion(text: str, reason: str | None) -> dict[str, Any]:
        return {
            "id": "x", "object": "chat.completion", "created": 0, "model": "mock-vlm",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }  # fmt: skip

    @staticmethod
    def text(body: bytes, name: str) -> str:
        """What a careful model might say: the question's end, and the size and mean colour of the picture."""
        from PIL import Image

        asked = json.loads(body)
        if choices := asked.get("structured_outputs", {}).get("choice"):
            return str(choices[-1])
        parts = asked["messages"][-1]["content"]
        question = " ".join(part["text"] for part in parts if part["type"] == "text")
        picture = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
            colour = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
            return (
                f"A picture of {image.width} by {image.height}, mostly {colour}. Asked: {question[-60:]} ({name[:6]})"
            )


class Running:
    """An endpoint that runs, as its user sees it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def set(self, **settings: Any) -> None:
        """Change how it behaves from now on; what is not named goes back to its default."""
        beside = self.folder / "control.tmp"
        beside.write_text(json.dumps({"models": ["mock-vlm"], **settings}))
        beside.replace(self.folder / "control.json")

    def asked(self, what: str = "asked") -> Counter[str]:
        """How often each request came, or was answered (``done``), or struck by a server error (``struck``)."""
        return Counter(line.split()[1] for line in self._lines() if line.startswith(what))

    def done(self) -> Counter[str]:
        return self.asked("done")

    def bodies(self) -> list[dict[str, Any]]:
        """What was asked, as it came, while ``keep`` was set."""
        return [json.loads(line) for line in (self.folder / "bodies.jsonl").read_text().splitlines()]

    def _lines(self) -> list[str]:
        return (self.folder / "log.txt").read_text().splitlines()


@contextmanager
def running(folder: Path, parse: bool = True, **settings: Any) -> Iterator[Running]:
    """Start an endpoint for the length of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = Running(folder, "")
    endpoint.set(**settings)
    command = [sys.executable, __file__, str(folder), *(["--parse"] if parse else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        endpoint.url = f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        yield endpoint
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parse", action="store_true")
    options = parser.parse_args()
    endpoint = Endpoint(options.folder / "control.json", options.folder / "log.txt", options.parse)
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0, limit=1 << 24, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # not left behind when a test is killed
        await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(main())

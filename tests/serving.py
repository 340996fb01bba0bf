"""A server in this process, on a port of its own, around a tiny model."""

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from asking import photograph
from openai import OpenAI
from PIL import Image

from regiongpt.inference.engine import Engine
from regiongpt.serve.app import Server, bind, create_app
from regiongpt.serve.options import ServeOptions

TWO = [{"box": [4, 4, 30, 20]}, {"polygon": [[30, 5], [58, 8], [44, 36]]}]
QUESTION = "What is <region1> doing next to <region2>?"


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def messages(text: str = QUESTION, image: str | None = None, *parts: dict[str, Any]) -> list[Any]:
    url = data_uri(photograph()) if image is None else image
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}, *parts]
    return [{"role": "user", "content": content}]


def chat_body(text: str = QUESTION, image: str | None = None, **more: Any) -> dict[str, Any]:
    return {"messages": messages(text, image), "regions": TWO, "max_tokens": 8, **more}


def regions_body(**more: Any) -> dict[str, Any]:
    return {"image": data_uri(photograph()), "regions": TWO, **more}


def wait_for(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread is about to do; fails after so long that it will never come."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.002)


@dataclass
class Served:
    """A running server."""

    server: Server
    address: str
    key: str = "none-is-needed-here"

    @property
    def service(self) -> Any:
        return self.server.guard.service

    def http(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers={"Authorization": f"Bearer {key or self.key}"}, timeout=60)

    def openai(self, key: str | None = None) -> OpenAI:
        return OpenAI(base_url=f"{self.address}v1", api_key=key or self.key, max_retries=0)

    def post(self, path: str, body: Any, key: str | None = None) -> httpx.Response:
        with self.http(key) as client:
            return client.post(path, json=body)


@contextmanager
def serving(engine: Engine, keys: Sequence[str] = (), **options: Any) -> Iterator[Served]:
    """A server that ends with the block, after what runs."""
    settings = ServeOptions(port=0, **options)
    bound, address = bind(settings)
    server = Server(create_app(engine, settings, "tiny", keys))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Served(server, address, *keys[:1])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()

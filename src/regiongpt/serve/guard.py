"""Checks of every request: host, key, queue, size and time; headers and counts of responses."""

import asyncio
import hashlib
import hmac
import logging
import math
import re
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from regiongpt.serve.errors import ApiError, over, too_slow
from regiongpt.serve.options import ServeOptions, is_loopback

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; font-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
READING_SECONDS = 30.0
"""How much longer than ``max_seconds`` a client may take to read its answer."""


class Metrics:
    """The counters behind /metrics."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("regiongpt_requests", "Requests", ["path", "status"], registry=own)
        self.seconds = Histogram("regiongpt_request_seconds", "Time", ["path"], registry=own, buckets=SECONDS)
        self.first = Histogram("regiongpt_first_word_seconds", "To a stream's start", registry=own, buckets=SECONDS)
        self.tokens = Counter("regiongpt_tokens", "Tokens read and written", ["kind"], registry=own)
        self.regions = Counter("regiongpt_regions", "Regions asked about", registry=own)
        self.cancelled = Counter("regiongpt_cancelled", "Requests whose client has gone", registry=own)
        rows = (1, 2, 4, 8, 16, 32, 64, 128)
        self.steps = Histogram("regiongpt_batch_rows", "Answers in a step", registry=own, buckets=rows)
        self.open = Gauge("regiongpt_open_requests", "Requests running or waiting", registry=own)
        self.encoded = Gauge("regiongpt_encoded_images", "Images encoded so far", registry=own)


class Guard:
    """The outermost layer of the application ``app``; clients show one of ``keys``, if there are any."""

    def __init__(self, app: ASGIApp, options: ServeOptions, keys: Sequence[str], metrics: Metrics) -> None:
        self.app, self.options, self.metrics = app, options, metrics
        self.service: Any = None
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.draining = False
        self.open = 0  # requests running or waiting
        self._lasted = 1.0  # seconds of a request, lately
        metrics.open.set_function(lambda: self.open)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":  # a websocket that nobody answers is refused by the server
            await self._handle(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status, ended, size, counted = time.perf_counter(), 0, False, 0, scope["method"] == "POST"
        most = self.options.max_bytes

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise over("max_bytes", most, "the body is larger", 413)
            return message

        async def answer(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                timeout.reschedule(loop.time() + self.options.max_seconds + READING_SECONDS)
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            else:
                ended = not message.get("more_body")
            await send(message)

        loop = asyncio.get_running_loop()
        timeout = asyncio.timeout(self.options.max_seconds)
        self.open += counted
        try:
            async with timeout:
                try:
                    self._check(scope)
                    await self.app(scope, limited, answer)
                except ApiError as error:
                    await error.response()(scope, receive, answer)
        except TimeoutError:
            if status:
                raise  # the client sees that the response breaks off
            status = 408
            await too_slow().response()(scope, receive, send)
        except Exception:
            log.exception("a request has failed")
            if not ended:
                raise
        finally:
            self.open -= counted
            took = time.perf_counter() - began
            self._lasted += 0.1 * (took - self._lasted) * counted
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(took)

    def _check(self, scope: Scope) -> None:
        headers, path, options = Headers(scope=scope), scope["path"], self.options
        self._check_host(headers)
        client = str((scope.get("client") or ("",))[0])
        if self._digests and (path.startswith("/v1/") or path == "/metrics"):
            word, _, key = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
            same = [hmac.compare_digest(digest, each) for each in self._digests]  # all of them, however soon one fits
            if word.lower() != "bearer" or not any(same):
                raise ApiError(401, "give a valid API key as Authorization: Bearer KEY", "invalid_api_key")
            client = f"key {same.index(True)}"
        scope["state"] = {"client": client}
        if scope["method"] != "POST":
            return
        if self.draining:
            raise ApiError(503, "the server is shutting down", "shutting_down", wait=5)
        if self.open > options.queue:
            wait = min(60, max(1, math.ceil(self._lasted * self.open / options.rows)))
            message = f"{options.queue} requests are running or waiting already (queue); try again later"
            raise ApiError(429, message, "queue_full", wait=wait)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > options.max_bytes:
            raise over("max_bytes", options.max_bytes, f"the body has {int(length):,} bytes", 413)

    def _check_host(self, headers: Headers) -> None:
        """Refuse other sites' pages in a browser on this machine, whatever they call its address."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if not self._digests and is_loopback(self.options.host) and not is_loopback(name.strip("[]")):
            raise ApiError(403, f"this server is not {name[:80]!r}; use its own address", "host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "pages of other sites may not use this server", "host")

"""Errors in OpenAI's shape, counts, and the checks of every request: host, key, queue, size, time and disconnects."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from regiongpt.errors import RegionError, RegionGPTError
from regiongpt.inference.engine import TooLong
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
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
READING_SECONDS = 30.0
"""How much longer than ``max_seconds`` a client may take to read its answer."""


class ApiError(RegionGPTError):
    """A refused or failed request, with a body in OpenAI's shape; it may be tried again after ``wait`` seconds."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if wait is None else {"Retry-After": str(wait)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        known = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else known.get(status, "invalid_request_error")
        self.body = json.dumps({"error": {"message": str(self), "type": kind, "param": param, "code": code}})

    def response(self) -> Response:
        """The error as a response."""
        return Response(self.body, self.status, self.headers, "application/json")


def over(limit: str, most: float, got: str, status: int = 400, param: str | None = None) -> ApiError:
    """The error of a request beyond a limit."""
    return ApiError(status, f"{got}, at most {most:,.0f} ({limit})", limit, param)


def too_slow() -> ApiError:
    """The error of a request beyond its time."""
    return ApiError(408, "the request took too long (max_seconds)", "max_seconds")


def api_error(error: Exception) -> ApiError:
    """Any error as one of the API: a mistake of the client's, or a failure of the server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        found = error.errors()
        first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not valid JSON")
        where = ".".join(map(str, first["loc"][1:]))[:200]
        if first["type"] == "extra_forbidden":
            return ApiError(400, f"{where}: unknown parameter", "unknown_parameter", where)
        return ApiError(400, f"{where}: {first['msg']}".removeprefix(": "), None, where or None)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(error.status_code, str(error.detail), code)
    if isinstance(error, RegionGPTError):
        codes = {TooLong: "context_length_exceeded", RegionError: "region"}
        return ApiError(400, str(error), codes.get(type(error)))
    return ApiError(500, f"the server failed: {type(error).__name__}", "server_failed")


class Metrics:
    """The counters behind /metrics."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("regiongpt_requests", "Requests", ["path", "status"], registry=own)
        self.seconds = Histogram("regiongpt_request_seconds", "Time", ["path"], registry=own, buckets=SECONDS)
        self.first = Histogram("regiongpt_first_word_seconds", "To a stream's start", registry=own, buckets=SECONDS)
        self.tokens = Counter("regiongpt_tokens", "Tokens read and written", ["kind"], registry=own)
        self.cancelled = Counter("regiongpt_cancelled", "Requests whose client has gone", registry=own)
        self.steps = Histogram("regiongpt_batch_rows", "Answers in a step", registry=own, buckets=SIZES)
        self.open = Gauge("regiongpt_open_requests", "Requests running or waiting", registry=own)
        self.encoded = Gauge("regiongpt_encoded_images", "Images encoded so far", registry=own)


class Guard:
    """The outermost layer of the application ``app``; clients show one of ``keys``, if there are any."""

    def __init__(self, app: ASGIApp, options: ServeOptions, keys: Sequence[str], service: Any) -> None:
        self.app, self.options, self.service, self.metrics = app, options, service, service.metrics
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.draining: Callable[[], bool] = lambda: False
        self.open = 0  # requests running or waiting
        self.metrics.open.set_function(lambda: self.open)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, counted, loop = time.perf_counter(), scope["method"] == "POST", asyncio.get_running_loop()
        status, ended, gone = 0, False, False

        async def given() -> Message:
            return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

        async def answer(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                timeout.reschedule(loop.time() + self.options.max_seconds + READING_SECONDS)
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store" if scope["path"].startswith("/v1/") else "no-cache")
            else:
                ended = not message.get("more_body")
            await send(message)

        async def watch() -> None:
            """End the request when its client has gone."""
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            if not ended:
                gone = True
                timeout.reschedule(loop.time())

        self.open += counted
        try:
            async with asyncio.timeout(self.options.max_seconds) as timeout:
                try:
                    self._check(scope)
                    bodies = [await self._body(scope, receive)]
                    watching = asyncio.create_task(watch())
                    try:
                        await self.app(scope, given, answer)
                    finally:
                        watching.cancel()
                except ApiError as error:
                    await error.response()(scope, receive, answer)
        except TimeoutError:
            if status and not gone:
                raise  # the client sees that the response breaks off
            if not gone:
                status = 408
                await too_slow().response()(scope, receive, send)
        except Exception:
            log.exception("a request has failed")
            if not ended:
                raise
        finally:
            self.open -= counted
            if ticket := scope.get("state", {}).get("ticket"):
                ticket.cancelled = True  # unless it is finished
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.cancelled.inc(gone)
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        headers, path, options = Headers(scope=scope), scope["path"], self.options
        # Other sites' pages in a browser on this machine are refused, whatever they call its address.
        host, origin = headers.get("host", ""), headers.get("origin")
        name = re.sub(r":\d+$", "", host)
        if not self._digests and is_loopback(options.host) and not is_loopback(name.strip("[]")):
            raise ApiError(403, f"this server is not {name[:80]!r}; use its own address", "host")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "pages of other sites may not use this server", "host")
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
        if self.draining():
            raise ApiError(503, "the server is shutting down", "shutting_down", wait=5)
        if self.open > options.queue:
            message = f"{options.queue} requests are running or waiting already (queue); try again later"
            raise ApiError(429, message, "queue_full", wait=5)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request, as far as it is within its limits."""
        body, more, options = bytearray(), True, self.options
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)  # a client that has gone sends no more
            if len(body) > options.max_bytes:
                raise over("max_bytes", options.max_bytes, "the body is larger", 413)
        # JSON is parsed in the event loop, in one go, and thousands of points take long; an image is no JSON.
        if scope["path"] != "/v1/images" and (values := body.count(b",") + 1) > options.max_values:
            raise over("max_values", options.max_values, f"the body has {values:,} values", 413)
        return bytes(body)

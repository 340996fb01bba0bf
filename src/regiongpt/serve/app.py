"""The application: its routes, and the server that runs it."""

import asyncio
import json
import math
import mimetypes
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import regiongpt
from regiongpt.errors import ConfigError, RegionError, RegionGPTError
from regiongpt.inference.engine import Answer, Engine, TooLong
from regiongpt.prompts import LABEL_SETS
from regiongpt.serve import schema
from regiongpt.serve.errors import ApiError, too_slow
from regiongpt.serve.guard import Guard, Metrics
from regiongpt.serve.images import Picture, Pictures
from regiongpt.serve.options import Limits, ServeOptions
from regiongpt.serve.tasks import Preparation
from regiongpt.serve.worker import Ticket, Worker
from regiongpt.storage import reason

T = TypeVar("T")
Asked = TypeVar("Asked", schema.ChatRequest, schema.DescribeRequest, schema.ClassifyRequest, schema.LocateRequest)
Events = AsyncGenerator[list[dict[str, Any]], None]
THREADS = 2
"""Threads that read JSON, decode images and measure regions."""


class Service:
    """The model at work for the routes."""

    def __init__(self, engine: Engine, options: ServeOptions, name: str, metrics: Metrics) -> None:
        self.options, self.name, self.metrics = options, name, metrics
        self.worker = Worker(engine, options.scenes, metrics.steps.observe)
        self.pictures = Pictures(options, engine.processor.pixels_of)
        self.prepare = Preparation(engine, options, self.pictures, name)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
        metrics.encoded.set_function(lambda: self.worker.encoded)

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of work that would keep the event loop from others."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def check_model(self, asked: str | None) -> None:
        """Refuse a model that is not served."""
        if asked not in (None, self.name):
            raise ApiError(404, f"no model {asked[:80]!r}; this is {self.name!r}", "model_not_found", "model")

    async def answer(self, request: Request, asked: Asked, prepare: Callable[[Asked, str], Ticket]) -> Response:
        """Make a request ready, and answer it whole or in a stream, for as long as its client waits."""
        self.check_model(asked.model)
        began = time.perf_counter()

        async def work() -> Response:
            ticket = await self._ticket(lambda: prepare(asked, request.state.client))
            self.metrics.regions.inc(len(ticket.weights) // self.worker.engine.processor.tokens_per_region)
            self.metrics.tokens.labels("read").inc(ticket.prompt_tokens)
            if ticket.stream is not None:
                return await self._stream(self._events(ticket), began)
            found = dict([value async for _, value in self._results(ticket)])
            # Probabilities of thousands of choices take long to write.
            whole = ticket.respond([found[place] for place in range(len(found))])
            return Response(await self.aside(json.dumps, whole), media_type="application/json")

        async def gone() -> Response:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.metrics.cancelled.inc()
            raise ClientDisconnect

        tasks = [asyncio.ensure_future(work()), asyncio.ensure_future(gone())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return (tasks[0] if tasks[0] in done else tasks[1]).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ticket(self, prepare: Callable[[], Ticket]) -> Ticket:
        """Create and submit a ticket, off the event loop."""

        def make() -> Ticket:
            ticket = prepare()
            self.worker.submit(ticket)
            return ticket

        made = self.threads.submit(make)
        try:
            return await asyncio.wrap_future(made)
        except asyncio.CancelledError:
            made.add_done_callback(_cancel)
            raise

    async def _results(self, ticket: Ticket) -> AsyncIterator[tuple[str, Any]]:
        """The results of a ticket; leaving the iteration ends its work."""
        try:
            async for kind, value in ticket.results():
                if kind == "result" and isinstance(value[1], Answer):
                    self.metrics.tokens.labels("written").inc(value[1].tokens)
                yield kind, value
        finally:
            ticket.cancel()

    async def _events(self, ticket: Ticket) -> Events:
        """The events of a stream, from the first result on."""
        assert ticket.stream is not None
        waiting = ticket.stream("begin", None)
        async for kind, value in self._results(ticket):
            if events := [*waiting, *ticket.stream(kind, value)]:
                yield events
            waiting = []

    async def _stream(self, source: Events, began: float) -> Response:
        """A stream of events, once the first is there: until then errors have their own status."""
        first = await anext(source)
        self.metrics.first.observe(time.perf_counter() - began)
        until, whole = began + self.options.max_seconds, False

        async def lines() -> AsyncIterator[str]:
            nonlocal whole
            events: list[dict[str, Any]] | None = first
            try:
                while events is not None:
                    yield "".join(f"data: {json.dumps(event)}\n\n" for event in events)
                    events = await asyncio.wait_for(anext(source, None), until - time.perf_counter())
                yield "data: [DONE]\n\n"
            except TimeoutError:
                yield f"data: {too_slow().body}\n\n"
            except (ApiError, RegionGPTError) as error:
                yield f"data: {api_error(error).body}\n\n"
            whole = True

        async def close() -> None:
            self.metrics.cancelled.inc(not whole)
            await source.aclose()

        return EventStream(lines(), close)


def _cancel(made: "Future[Ticket]") -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().cancel()


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed in any case."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


class JsonRoute(APIRoute):
    """A route that parses large JSON off the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with our kind of request."""
        handle = super().get_route_handler()

        class JsonRequest(Request):
            async def json(self) -> Any:
                data = await self.body()
                return json.loads(data) if len(data) < 65536 else await asyncio.to_thread(json.loads, data)

        async def read(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return read


def api_error(error: Exception) -> ApiError:
    """Any error that is the client's mistake, as one of the API."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        found = error.errors()
        first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
        where = ".".join(map(str, first["loc"][1:]))[:200]
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not valid JSON")
        unknown = first["type"] == "extra_forbidden"
        message = "unknown parameter" if unknown else str(first["msg"])
        code = "unknown_parameter" if unknown else None
        return ApiError(400, f"{where}: {message}" if where else message, code, where or None)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(error.status_code, str(error.detail), code)
    codes = {TooLong: "context_length_exceeded", RegionError: "region"}
    return ApiError(400, str(error), next((code for kind, code in codes.items() if isinstance(error, kind)), None))


def create_app(engine: Engine, options: ServeOptions, name: str, keys: Sequence[str] = ()) -> Guard:
    """The application around a model.

    Args:
        engine: the model.
        options: limits and sizes.
        name: name of the model in the API.
        keys: API keys; none if no key is needed.
    """
    metrics, created = Metrics(), int(time.time())
    service = Service(engine, options, name, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)
        service.threads.shutdown(wait=False, cancel_futures=True)

    # The documentation's own page would load scripts from elsewhere.
    app = FastAPI(title="RegionGPT", version=regiongpt.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    guard = Guard(app, options, keys, metrics)
    guard.service = service

    def answers(kind: type[Any], stream: bool = False) -> dict[str, Any]:
        """Documentation of a route's responses."""
        streamed: dict[str, Any] = {"content": {"text/event-stream": {}}} if stream else {}
        failed = {"model": schema.ErrorAnswer, "description": "an error"}
        return {"response_model": None, "responses": {200: {"model": kind, **streamed}, "4XX": failed, "5XX": failed}}

    @app.post("/v1/chat/completions", **answers(schema.ChatAnswer, stream=True))
    async def chat(asked: schema.ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation about an image and its regions."""
        return await service.answer(request, asked, service.prepare.chat)

    @app.post("/v1/regions/describe", **answers(schema.DescribeAnswer, stream=True))
    async def describe(asked: schema.DescribeRequest, request: Request) -> Response:
        """Describe each region, or caption it in a few words; a stream has each as soon as it is finished."""
        return await service.answer(request, asked, service.prepare.describe)

    @app.post("/v1/regions/classify", **answers(schema.ClassifyAnswer))
    async def classify(asked: schema.ClassifyRequest, request: Request) -> Response:
        """Choose the class of each region from a closed set, with probabilities."""
        return await service.answer(request, asked, service.prepare.classify)

    @app.post("/v1/regions/locate", **answers(schema.LocateAnswer))
    async def locate(asked: schema.LocateRequest, request: Request) -> Response:
        """Choose the region that an expression, or each of several, refers to, or none."""
        return await service.answer(request, asked, service.prepare.locate)

    def image(picture: Picture, expires: float) -> dict[str, Any]:
        size = {"width": picture.width, "height": picture.height, "bytes": picture.bytes}
        return {"object": "image", "id": picture.id, **size, "expires_at": int(expires)}

    binary = {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}, "required": True}

    @app.post("/v1/images", **answers(schema.ImageAnswer), openapi_extra={"requestBody": binary})
    async def upload(request: Request) -> dict[str, Any]:
        """Keep an image for a while, so that a conversation sends it once."""
        return image(*await service.aside(service.pictures.keep, await request.body(), request.state.client))

    @app.get("/v1/images/{image_id}", **answers(schema.ImageAnswer))
    async def kept_image(image_id: str, request: Request) -> dict[str, Any]:
        """An image that is kept, from now on as long as a new one."""
        return image(*service.pictures.kept(image_id, request.state.client))

    @app.delete("/v1/images/{image_id}", **answers(schema.ImageAnswer))
    async def forget_image(image_id: str, request: Request) -> dict[str, Any]:
        """Keep an image no longer."""
        return image(*service.pictures.kept(image_id, request.state.client, forget=True))

    def model() -> dict[str, Any]:
        limits = {field: getattr(options, field) for field in Limits.model_fields}
        head = {"id": name, "object": "model", "created": created, "owned_by": "regiongpt"}
        return {**head, "limits": limits, "label_sets": list(LABEL_SETS)}

    @app.get("/v1/models", **answers(dict[str, Any]))
    async def models() -> dict[str, Any]:
        """The one model there is, with the limits of requests."""
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{model_id}", **answers(dict[str, Any]))
    async def one_model(model_id: str) -> dict[str, Any]:
        """The model by its name."""
        service.check_model(model_id)
        return model()

    @app.get("/healthz", **answers(dict[str, Any]))
    async def health() -> Response:
        """Whether the server works."""
        failed = service.worker.failed or engine.scheduler.dead
        status = "shutting_down" if guard.draining else "failed" if failed else "ok"
        return JSONResponse({"status": status, "version": regiongpt.__version__}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Counts for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    for path, (data, kind) in page_files().items():
        app.add_route(path, _file(data, kind), include_in_schema=False)

    async def refused(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    for kind_of_error in (RegionGPTError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind_of_error, refused)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, f"the server failed: {type(error).__name__}", "server_failed").response()

    return guard


def page_files() -> dict[str, tuple[bytes, str]]:
    """The page's files by their paths on the server, in memory: no request reaches the disk."""
    folder = Path(__file__).parent / "page"
    found = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = file.relative_to(folder).as_posix()
        kind = "text/javascript" if file.suffix == ".js" else mimetypes.guess_type(name)[0]
        path = "/" if name == "index.html" else f"/page/{name}"
        found[path] = file.read_bytes(), kind or "application/octet-stream"
    return found


def _file(data: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    headers = {"ETag": f'"{sha256(data).hexdigest()[:32]}"', "Cache-Control": "no-cache"}

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    return file


class Server(uvicorn.Server):
    """A server that, when stopped, finishes running requests and refuses new ones."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        drain = math.ceil(guard.options.max_seconds)
        quiet: dict[str, Any] = {"log_level": "warning", "server_header": False, "ws": "none"}
        super().__init__(uvicorn.Config(guard, timeout_graceful_shutdown=drain, timeout_keep_alive=30, **quiet))

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop taking requests."""
        self.guard.draining = True
        super().handle_exit(sig, frame)


def bind(options: ServeOptions) -> tuple[socket.socket, str]:
    """The socket to serve at, and its address; ConfigError if it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        bound = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"--host {options.host} --port {options.port}: {reason(error)}; give another") from None
    host = f"[{options.host}]" if ":" in options.host else options.host
    return bound, f"http://{host}:{bound.getsockname()[1]}/"


def serve(engine: Engine, options: ServeOptions, name: str, keys: Sequence[str]) -> None:
    """Serve a model until a signal ends it."""
    bound, address = bind(options)
    server = Server(create_app(engine, options, name, keys))
    print(f"draw and ask at {address} (Ctrl-C ends)", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn sends it to itself once more at the end
    server.run(sockets=[bound])

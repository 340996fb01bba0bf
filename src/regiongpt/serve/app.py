"""The application: its routes, and the server that runs it."""

import asyncio
import json
import math
import mimetypes
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

import regiongpt
from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.inference.engine import Answer, Engine
from regiongpt.serve import schema
from regiongpt.serve.guard import ApiError, Guard, Metrics, api_error, too_slow
from regiongpt.serve.images import Pictures
from regiongpt.serve.options import Limits, ServeOptions
from regiongpt.serve.tasks import Tasks
from regiongpt.serve.worker import Event, Ticket, Worker
from regiongpt.storage import reason

THREADS = 2
"""Threads that decode images, measure regions and write long answers."""
PAGE = Path(__file__).parent / "page"
mimetypes.add_type("text/javascript", ".js")  # whatever this machine takes it for


class Service:
    """The model at work for the routes."""

    def __init__(self, engine: Engine, options: ServeOptions, name: str) -> None:
        self.options, self.name, self.metrics = options, name, Metrics()
        self.worker = Worker(engine, options.scenes, self.metrics.steps.observe)
        self.pictures = Pictures(options, engine.processor)
        self.tasks = Tasks(engine, options, self.pictures, name)
        self.metrics.encoded.set_function(lambda: self.worker.encoded)

    async def answer(self, request: Request, asked: Any, prepare: Callable[[Any, str], Ticket]) -> Response:
        """Make a request ready, hand it in, and answer it whole or in a stream."""
        began = asyncio.get_running_loop().time()
        if asked.model not in (None, self.name):
            raise ApiError(404, f"no model {asked.model[:80]!r}; this is {self.name!r}", "model_not_found", "model")
        ticket = request.state.ticket = await asyncio.to_thread(prepare, asked, request.state.client)
        self.metrics.tokens.labels("read").inc(ticket.prompt_tokens)
        self.worker.submit(ticket)
        events = self._events(ticket, began + self.options.max_seconds)
        if ticket.stream is None or not asked.stream:
            found = dict([value async for kind, value in events if kind == "result"])
            whole = ticket.respond([found[place] for place in range(len(found))])
            # Thousands of probabilities take long to write; the C encoder would keep the event loop from its lock.
            text = await asyncio.to_thread(lambda: "".join(json.JSONEncoder().iterencode(whole)))
            return Response(text, media_type="application/json")
        parts = ticket.stream(events)
        first = await anext(parts)  # until it is there, errors have their own status
        self.metrics.first.observe(asyncio.get_running_loop().time() - began)

        async def lines() -> AsyncIterator[str]:
            try:
                yield f"data: {json.dumps(first)}\n\n"
                async for part in parts:
                    yield f"data: {json.dumps(part)}\n\n"
                yield "data: [DONE]\n\n"
            except RegionGPTError as error:
                yield f"data: {api_error(error).body}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _events(self, ticket: Ticket, until: float) -> AsyncIterator[Event]:
        """The pieces and results of a ticket."""
        while True:
            try:
                async with asyncio.timeout_at(until):
                    kind, value = await ticket.events.get()
            except TimeoutError:
                raise too_slow() from None
            if kind == "done":
                return
            if kind == "error":
                raise value
            if kind == "result" and isinstance(value[1], Answer):
                self.metrics.tokens.labels("written").inc(value[1].tokens)
            yield kind, value


def create_app(engine: Engine, options: ServeOptions, name: str, keys: Sequence[str] = ()) -> Guard:
    """The application around a model called ``name``; clients need one of ``keys``, if there are any.

    Raises:
        ConfigError: the model takes no second look.
    """
    engine.processor.check_detail(options.detail)
    service, created = Service(engine, options, name), int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    # The documentation's own page would load scripts from elsewhere.
    app = FastAPI(title="RegionGPT", version=regiongpt.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    guard = Guard(app, options, keys, service)

    def answers(kind: Any, stream: bool = False) -> dict[str, Any]:
        """Documentation of a route's responses."""
        streamed: dict[str, Any] = {"content": {"text/event-stream": {}}} if stream else {}
        failed = {"model": schema.ErrorAnswer, "description": "an error"}
        return {"response_model": None, "responses": {200: {"model": kind, **streamed}, "4XX": failed, "5XX": failed}}

    @app.post("/v1/chat/completions", **answers(schema.ChatAnswer, stream=True))
    async def chat(asked: schema.ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation about an image and its regions."""
        return await service.answer(request, asked, service.tasks.chat)

    @app.post("/v1/regions/describe", **answers(schema.DescribeAnswer, stream=True))
    async def describe(asked: schema.DescribeRequest, request: Request) -> Response:
        """Describe each region, or caption it in a few words; a stream has each as soon as it is finished."""
        return await service.answer(request, asked, service.tasks.describe)

    @app.post("/v1/regions/classify", **answers(schema.ClassifyAnswer))
    async def classify(asked: schema.ClassifyRequest, request: Request) -> Response:
        """Choose the class of each region from a closed set, with probabilities."""
        return await service.answer(request, asked, service.tasks.classify)

    @app.post("/v1/regions/locate", **answers(schema.LocateAnswer))
    async def locate(asked: schema.LocateRequest, request: Request) -> Response:
        """Choose the region that an expression, or each of several, refers to, or none."""
        return await service.answer(request, asked, service.tasks.locate)

    binary = {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}, "required": True}

    @app.post("/v1/images", **answers(schema.ImageAnswer), openapi_extra={"requestBody": binary})
    async def upload(request: Request) -> dict[str, Any]:
        """Keep an image for a while, so that a conversation sends it once."""
        picture = await asyncio.to_thread(service.pictures.read, await request.body())
        expires = int(service.pictures.keep(picture, request.state.client))
        return {"id": picture.id, "width": picture.width, "height": picture.height, "expires_at": expires}

    @app.get("/v1/models", **answers(dict[str, Any]))
    async def models() -> dict[str, Any]:
        """The one model there is, with the limits of requests."""
        limits = options.model_dump(include=set(Limits.model_fields))
        model = {"id": name, "object": "model", "created": created, "owned_by": "regiongpt", "limits": limits}
        return {"object": "list", "data": [model]}

    @app.get("/healthz", **answers(dict[str, Any]))
    async def health() -> Response:
        """Whether the server works."""
        failed = service.worker.failed or engine.scheduler.dead
        status = "shutting_down" if guard.draining() else "failed" if failed else "ok"
        return JSONResponse({"status": status, "version": regiongpt.__version__}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Counts for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    async def refused(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    for kind in (RegionGPTError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)

    page = StaticFiles(directory=PAGE)
    app.mount("/page", page)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return await page.get_response("index.html", request.scope)

    return guard


class Server(uvicorn.Server):
    """A server that, when stopped, finishes running requests and refuses new ones."""

    def __init__(self, guard: Guard) -> None:
        self.guard, guard.draining = guard, lambda: self.should_exit
        drain = math.ceil(guard.options.max_seconds)
        quiet: dict[str, Any] = {"log_level": "warning", "server_header": False, "ws": "none"}
        super().__init__(uvicorn.Config(guard, timeout_graceful_shutdown=drain, timeout_keep_alive=30, **quiet))


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

"""Any OpenAI-compatible endpoint (vLLM, SGLang, a hosted one), kept as full as it lets itself be."""

import asyncio
import base64
import io
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, cast

from PIL import Image

from regiongpt.annotate.captioners import Captioner, Failed, Reply, Request, Stopped
from regiongpt.annotate.options import Options
from regiongpt.errors import ConfigError, DataError
from regiongpt.storage import reason

_TRIES: Final = 6
"""Retries of a request while the endpoint answers others."""
_OVERLOADED: Final = (408, 409, 429)


class Busy(Exception):
    """The endpoint cannot answer at the moment: it is asked too much (``overloaded``), down or slow."""

    def __init__(self, told: str, overloaded: bool = False, wait: float = 0.0) -> None:
        super().__init__(told)
        self.overloaded, self.wait = overloaded, wait  # seconds


class Slots:
    """Adaptive limit of requests in flight, at most ``most``; DataError after ``patience`` seconds without an answer.

    Each answer adds a slot while others wait, so they double with each round; beyond what was once too much a round
    adds one. Too many requests (429) take a tenth of the slots, any other trouble half.
    """

    def __init__(self, most: int, patience: float) -> None:
        self.most, self.patience, self.limit, self.ceiling = most, patience, float(min(8, most)), float(most)
        self.waiting = self.under_way = self.answered = 0
        self.stopped, self._turn, self._free = asyncio.Event(), asyncio.Lock(), asyncio.Event()
        self._troubles = self._row = 0  # total, and since the last answer
        self._silent_since = self._open_at = 0.0  # the first trouble after the last answer, when to send again

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it; exceptions in the block adapt the limit."""
        self.waiting += 1
        async with self._turn:  # in the order of arrival, so that regions of an image go together
            while self.under_way >= int(self.limit):
                self._free.clear()
                await self._free.wait()
        self.waiting, self.under_way = self.waiting - 1, self.under_way + 1
        try:
            while not self.stopped.is_set() and (wait := self._open_at - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.stopped.wait(), wait)
            if self.stopped.is_set():
                raise Stopped
            troubles = self._troubles
            try:
                yield
            except Busy as error:
                if troubles == self._troubles:  # requests in flight together count once
                    self._trouble(error)
                raise
            except Failed:
                self._success()
                raise
            self._success()
        finally:
            self.under_way -= 1
            self._free.set()

    def _success(self) -> None:
        self.answered, self._row = self.answered + 1, 0
        if self.waiting:
            self.limit = min(self.most, self.limit + (1 if self.limit < self.ceiling else 1 / self.limit))

    def _trouble(self, error: Busy) -> None:
        now = time.monotonic()
        self._silent_since = self._silent_since if self._row else now
        self._troubles, self._row = self._troubles + 1, self._row + 1
        backoff = 0.0 if error.overloaded else min(15.0, 0.1 * 2 ** min(self._row, 10))
        self._open_at = now + max(error.wait, backoff)
        self.limit = max(1.0, self.limit * (0.9 if error.overloaded else 0.5))
        self.ceiling = self.limit if error.overloaded else self.ceiling
        if (silent := max(error.wait, now - self._silent_since)) > self.patience:
            told = f"no answer for {silent:.0f} s ({error}), --patience is {self.patience:g}"
            raise DataError(f"{told}; answers so far are kept: run the command again")


class Endpoint(Captioner):
    """A model behind an address; retries are made here, not by the client."""

    wants_image = False

    def __init__(self, options: Options) -> None:
        try:
            import openai
            import tenacity
        except ImportError:
            raise ConfigError("--captioner: an endpoint needs the openai client: pip install '.[annotate]'") from None
        self._openai, self._tenacity = openai, tenacity
        self.url, self.options = str(options.captioner), options
        self.slots = Slots(options.concurrency, options.patience)
        self._length_option, self._structured = "max_tokens", True
        at: Any = {"base_url": self.url, "api_key": os.environ.get(options.key_variable) or "none", "max_retries": 0}
        try:
            with openai.OpenAI(**at, timeout=options.timeout) as client:
                served = [model.id for model in client.models.list().data]
        except Exception as error:  # a page that is no API makes anything of the client
            wrong, told = self._wrong(error), "no OpenAI-compatible endpoint answers there"
            if not isinstance(wrong, ConfigError):
                wrong = ConfigError(f"{self.url}: {told}: {wrong}; start it, or check the address")
            raise wrong from None
        self.model = options.served_model or (served[0] if len(served) == 1 else "")
        if self.model not in served:
            raise ConfigError(f"{self.url}: serves {', '.join(served[:9]) or 'nothing'}; pick one by --served-model")
        super().__init__({"captioner": "endpoint", "model": self.model})
        http = openai.DefaultAioHttpClient(timeout=options.timeout)
        self._client: Any = openai.AsyncOpenAI(**at, timeout=options.timeout, http_client=http)

    def stop(self) -> None:
        """Release waiting requests, even if the endpoint is down."""
        self.slots.stopped.set()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def picture(self, image: Image.Image) -> dict[str, Any]:
        """A JPEG as the part of a message."""
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    def has_room(self, begun: int) -> bool:
        """While fewer requests wait than would fill half of the slots."""
        return self.slots.waiting < max(4, self.slots.limit / 2) and begun < 2 * self.slots.limit + 8

    async def ask(self, request: Request) -> Reply:
        """Ask until there is an answer, in a slot of its own each time."""
        answered, faults = self.slots.answered, 0

        def is_at_fault(state: Any) -> bool:
            """Whether it failed repeatedly while others were answered, so that this is no outage."""
            nonlocal answered, faults
            faults += self.slots.answered > answered and not state.outcome.exception().overloaded
            answered = self.slots.answered
            return faults >= _TRIES

        async def send() -> Reply:
            async with self.slots.one():
                return await self._send(request)

        busy, pause = self._tenacity.retry_if_exception_type(Busy), self._tenacity.wait_random(0.0, 0.2)
        retrying: Any = self._tenacity.AsyncRetrying(retry=busy, wait=pause, stop=is_at_fault, reraise=True)
        try:
            return cast(Reply, await retrying(send))
        except Busy as error:
            raise Failed("endpoint trouble", f"{_TRIES} tries: {error}") from None

    async def _send(self, request: Request) -> Reply:
        """One request and its complete answer."""
        began = time.perf_counter()
        more: dict[str, Any] = {self._length_option: self.options.max_new_tokens}
        if request.choices and self._structured:
            more["extra_body"] = {"structured_outputs": {"choice": request.choices}}
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=request.messages(request.picture), temperature=self.options.temperature,
                seed=request.seed, **more,
            )  # fmt: skip
        except self._openai.APIError as error:
            wrong = self._wrong(error)
            if "extra_body" in more and "structured_outputs" in str(wrong):  # not vLLM: it chooses in its own words
                self._structured = False
            elif "max_tokens" in more and "max_completion_tokens" in str(wrong):  # some hosted models require it
                self._length_option = "max_completion_tokens"
            else:
                raise wrong from None
            return await self._send(request)
        content = response.http_response.content
        try:
            body = json.loads(content)
            choice, usage = body["choices"][0], body.get("usage") or {}
            text, finish = choice["message"]["content"], choice["finish_reason"]
            tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError):
            told = f"expected a chat completion, got {content[:80]!r}"
            raise Failed("malformed answer", told, again=True) from None
        if finish not in ("stop", "length"):
            told = f"expected finish_reason 'stop', got {finish!r}"
            raise Failed("unfinished answer", told, again=finish is None, tokens=tokens)
        return Reply(
            text=str(text or ""), ended=finish == "stop", tokens_in=tokens[0], tokens_out=tokens[1],
            seconds=time.perf_counter() - began, model=str(body.get("model") or ""),
        )  # fmt: skip

    def _wrong(self, error: Any) -> Exception:
        """What an exception of the client means: Busy, ConfigError, or Failed."""
        if not isinstance(error, self._openai.APIStatusError):
            told = type(error).__name__
            while error.__cause__ is not None:
                error = error.__cause__
            return Busy(f"{told}: {reason(error)}")
        status = error.status_code
        told = f"status {status}: {reason(error).removeprefix(f'Error code: {status} - ')}"
        if status in _OVERLOADED or status >= 500:
            wait = error.response.headers.get("retry-after", "")
            return Busy(told, status in _OVERLOADED, float(wait) if wait.replace(".", "", 1).isdigit() else 0.0)
        if status in (401, 403):
            told = f"refuses the key ({told}); put a valid one in {self.options.key_variable}"
            return ConfigError(f"{self.url}: {told}")
        if status in (404, 405):
            return ConfigError(f"{self.url}: not an OpenAI-compatible endpoint ({told}); does its address end in /v1?")
        return Failed("refused by the endpoint", told)

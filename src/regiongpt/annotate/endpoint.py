"""Any OpenAI-compatible endpoint (vLLM, SGLang, a hosted one), kept as full as it lets itself be."""

import asyncio
import base64
import io
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from PIL import Image

from regiongpt.annotate.captioners import Asking, Captioner, Failed, Reply, Request, Stopped, checked, messages
from regiongpt.errors import ConfigError, DataError
from regiongpt.storage import reason

_TRIES: Final = 6
"""How often a request is sent again to an endpoint that answers others meanwhile."""
_OVERLOADED: Final = (408, 409, 429)


class Busy(Exception):
    """The endpoint cannot answer at the moment: too much is asked, it is down, or it is slow."""

    overloaded, wait = False, 0.0


class Slots:
    """How many requests may be under way, at most ``most``, which adapts to what the endpoint can take.

    It doubles with each round of answers, and creeps from where the endpoint once had too much. Too many requests (429)
    take a tenth of it, any other trouble half; and nothing is sent until the endpoint wants to be asked again.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.active = most, min(8, most), 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.successes = self.troubles = 0
        self.silent_since = self._open_at = 0.0  # the first trouble after the last answer, when to send again
        self._timer: asyncio.TimerHandle | None = None
        self._row = self._count = 0  # troubles in a row, answers in this round
        self._ceiling, self._full = 2 * most, True

    @asynccontextmanager
    async def one(self) -> AsyncIterator[int]:
        """Wait for a slot and hold it; gives how many troubles there were before."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queue.append(place)
        self.wake()
        try:
            await place
            yield self.troubles
        finally:
            if place.done() and not place.cancelled():
                self.active -= 1
                self.wake()

    def wake(self, now: bool = False) -> None:
        """Hand free slots to those that wait, at once or when the endpoint wants to be asked again."""
        self._open_at = 0.0 if now else self._open_at
        wait = self._open_at - time.monotonic()
        if wait > 0 and self.queue:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(wait + 0.001, self.wake)
            return
        while self.queue and self.active < self.limit:
            place = self.queue.popleft()
            if not place.done():
                self.active += 1
                place.set_result(None)

    def success(self) -> None:
        """An answer came; after a round of them in which others had to wait there are more slots."""
        self.successes += 1
        self._row, self._count = 0, self._count + 1
        self._full &= bool(self.queue)
        if self._count >= max(self.limit, 8):
            more = self.limit if 2 * self.limit <= self._ceiling else 1
            self.limit = min(self.most, self.limit + more) if self._full else self.limit
            self._count, self._full = 0, True

    def trouble(self, error: Busy, before: int) -> None:
        """A request could not be answered; of those sent after as many troubles ``before`` one counts."""
        if before != self.troubles:
            return
        now = time.monotonic()
        self.silent_since = self.silent_since if self._row else now
        self.troubles, self._row, self._count = self.troubles + 1, self._row + 1, 0
        if error.overloaded:
            self._ceiling, self._open_at = self.limit, now + error.wait
        else:
            self._open_at = now + max(error.wait, min(15.0, 0.1 * 2 ** min(self._row, 10)))
        self.limit = max(1, int(self.limit * (0.9 if error.overloaded else 0.5)))


class Endpoint(Captioner):
    """A model behind an address; retries are this class's alone, the client's are off."""

    def __init__(self, asking: Asking) -> None:
        try:
            import openai
            import tenacity
        except ImportError:
            told = "an endpoint needs the openai client; install it: pip install '.[annotate]'"
            raise ConfigError(f"--captioner: {told}") from None
        self._openai, self._tenacity = openai, tenacity
        self._client: Any = None
        self.url, self.asking = str(asking.captioner), asking
        self.model = asking.served_model or ""
        self.slots = Slots(asking.concurrency)
        self._length_option, self._structured = "max_tokens", True

    async def open(self) -> None:
        """Find the model, and show it a picture."""
        # Concurrency is bounded here, and each request has the time of its own.
        self._client = self._openai.AsyncOpenAI(
            base_url=self.url, api_key=os.environ.get(self.asking.key_variable) or "none", max_retries=0,
            timeout=self.asking.timeout, http_client=self._openai.DefaultAioHttpClient(timeout=self.asking.timeout),
        )  # fmt: skip
        try:
            served = [model.id for model in (await self._client.models.list()).data]
        except self._openai.APIConnectionError as error:
            raise ConfigError(f"{self.url}: no endpoint answers there: {_root(error)}; start it first") from None
        except self._openai.APIStatusError as error:
            raise self._wrong(error) from None
        except Exception as error:  # whatever a page that is no API makes of the client
            raise ConfigError(f"{self.url}: not an OpenAI-compatible endpoint: {reason(error)}") from None
        if not self.model and len(served) != 1:
            raise ConfigError(f"{self.url}: serves {', '.join(served[:9]) or 'nothing'}; give --served-model")
        self.model = self.model or served[0]
        if served and self.model not in served:
            raise ConfigError(f"{self.url}: no model {self.model!r}; it serves {', '.join(served[:9])}")
        self.identity = {"captioner": "endpoint", "model": self.model}
        look = Request(stage="image", text="What colour is this?", picture=self.picture(Image.new("RGB", (64, 64))))
        try:
            await self._send(look, most=1)
        except Failed as error:
            if error.kind == "refused by the endpoint":
                told = f"takes no pictures: {error.reason}; serve a vision-language model"
                raise ConfigError(f"{self.url}: {self.model} {told}") from None
        except Busy:
            pass  # a busy endpoint is there

    def stop(self) -> None:
        """Let go what waits, even for an endpoint that is down."""
        super().stop()
        self.slots.wake(now=True)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()

    def picture(self, image: Image.Image) -> dict[str, Any]:
        """A JPEG as the part of a message."""
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    def has_room(self, begun: int) -> bool:
        """While fewer requests wait than would fill half of the slots."""
        return len(self.slots.queue) < max(4, self.slots.limit // 2) and begun < 2 * self.slots.limit + 8

    async def ask(self, request: Request) -> Reply:
        """Ask until there is an answer, in a slot of its own each time."""
        seen, faults = self.slots.successes, 0

        def is_at_fault(state: Any) -> bool:
            """Whether it failed again and again while others were answered: not what an outage looks like."""
            nonlocal seen, faults
            faults += self.slots.successes > seen and not state.outcome.exception().overloaded
            seen = self.slots.successes
            return faults >= _TRIES

        again, wait = self._tenacity.retry_if_exception_type(Busy), self._tenacity.wait_random(0.0, 0.2)
        try:
            retrying = self._tenacity.AsyncRetrying(retry=again, wait=wait, stop=is_at_fault, reraise=True)
            reply: Reply = await retrying(self._in_slot, request)
        except Busy as error:
            raise Failed("endpoint trouble", f"{_TRIES} tries: {error}") from None
        return reply

    async def _in_slot(self, request: Request) -> Reply:
        if self.stopping:
            raise Stopped
        async with self.slots.one() as before:
            if self.stopping:
                raise Stopped
            try:
                reply = await self._send(request)
            except Busy as error:
                self.slots.trouble(error, before)
                silent = max(error.wait, time.monotonic() - self.slots.silent_since)
                if silent > self.asking.patience:
                    told = f"no answer for {silent:.0f} s ({error}), --patience is {self.asking.patience:g}"
                    raise DataError(f"{self.url}: {told}; what is finished is kept: run the command again") from None
                raise
            except Failed:
                self.slots.success()
                raise
            self.slots.success()
            return reply

    async def _send(self, request: Request, most: int = 0) -> Reply:
        """One request and its answer, which has to be whole."""
        began = time.perf_counter()
        options: dict[str, Any] = {self._length_option: most or self.asking.max_new_tokens}
        if request.choices and self._structured:
            options["extra_body"] = {"structured_outputs": {"choice": request.choices}}
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages(request, request.picture), temperature=self.asking.temperature,
                seed=request.seed, **options,
            )  # fmt: skip
        except self._openai.APIStatusError as error:
            wrong = self._wrong(error)
            if "extra_body" in options and "structured_outputs" in str(wrong):  # not vLLM: it chooses in its own words
                self._structured = False
            elif "max_tokens" in options and "max_completion_tokens" in str(wrong):  # as some hosted models want it
                self._length_option = "max_completion_tokens"
            else:
                raise wrong from None
            return await self._send(request, most)
        except self._openai.APIConnectionError as error:  # time-outs too
            raise Busy(f"{type(error).__name__}: {_root(error)}") from None
        return _read(response.http_response.content, time.perf_counter() - began, most or self.asking.max_new_tokens)

    def _wrong(self, error: Any) -> Exception:
        """What an HTTP status means."""
        status = error.status_code
        told = reason(Exception(str(getattr(error, "message", error))))
        if status in _OVERLOADED or status >= 500:
            busy, header = Busy(f"status {status}: {told}"), error.response.headers.get("retry-after", "")
            busy.overloaded = status in _OVERLOADED
            busy.wait = float(header) if header.replace(".", "", 1).isdigit() else 0.0
            return busy
        if status in (401, 403):
            return ConfigError(f"{self.url}: refuses the key ({told}); put the right one in {self.asking.key_variable}")
        if status in (404, 405):
            told = f"not an OpenAI-compatible endpoint (status {status}: {told}); does its address end in /v1?"
            return ConfigError(f"{self.url}: {told}")
        return Failed("refused by the endpoint", f"status {status}: {told}")


def _read(content: bytes, seconds: float, most: int) -> Reply:
    """The answer in a response's body; Failed unless it is whole."""
    try:
        body = json.loads(content)
        choice, usage = body["choices"][0], body.get("usage") or {}
        text, finish = choice["message"]["content"], choice["finish_reason"]
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        model = str(body.get("model") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Failed("malformed answer", f"expected a chat completion, got {content[:80]!r}", again=True) from None
    if finish not in ("stop", "length"):
        told = f"expected finish_reason 'stop', got {finish!r}"
        raise Failed("unfinished answer", told, again=finish is None, tokens=tokens)
    reply = Reply(text=str(text or ""), tokens_in=tokens[0], tokens_out=tokens[1], seconds=seconds, model=model)
    found = checked(reply, finish == "stop", most, again=True)
    if isinstance(found, Failed):
        raise found
    return found


def _root(error: BaseException) -> str:
    """What began a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)

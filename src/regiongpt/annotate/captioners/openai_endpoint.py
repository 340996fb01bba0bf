"""Any OpenAI-compatible endpoint (vLLM, SGLang, a hosted one), kept as full as it lets itself be."""

import asyncio
import base64
import io
import json
import os
import time
from collections import deque
from typing import Any, Final

from PIL import Image

from regiongpt.annotate.captioners import Asking, Captioner, Failed, Reply, Request, Stopped
from regiongpt.errors import ConfigError, DataError
from regiongpt.storage import reason

_TRIES: Final = 6
"""How often a request is sent again to an endpoint that answers others meanwhile."""
_OVERLOADED: Final = (408, 409, 429)
_REFUSED: Final = "refused by the endpoint"


class Busy(Exception):
    """The endpoint cannot answer at the moment: too much is asked, it is down, or it is slow."""

    def __init__(self, why: str, overloaded: bool, wait: float = 0.0) -> None:
        super().__init__(why)
        self.overloaded, self.wait = overloaded, wait


class Slots:
    """How many requests may be under way, at most ``most``, which adapts to what the endpoint can take.

    It doubles as long as that brings more answers a second, and now and then tries a few more. Too many requests (429)
    take a tenth of it, any other trouble half; and nothing is sent until the endpoint wants to be asked again.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.active = most, min(8, most), 0
        self.queue: deque[asyncio.Future[None]] = deque()
        self.successes, self.silent_since = 0, 0.0  # since the first trouble after the last answer
        self._timer: asyncio.TimerHandle | None = None
        self._open_at = self._settled_at = 0.0
        self._troubles = self._rounds = self._count = 0  # in a row, since the beginning, in this round
        self._best = self._seconds = 0.0
        self._ceiling, self._doubling, self._saturated = most, True, True
        self._began = time.monotonic()

    async def acquire(self) -> None:
        """Wait for a slot."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queue.append(place)
        self.wake()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.active -= 1
        self.wake()

    def open(self) -> None:
        """Send again at once."""
        self._open_at = 0.0
        self.wake()

    def wake(self) -> None:
        """Hand free slots to those that wait, now or when the endpoint wants to be asked again."""
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
        """An answer came."""
        self.successes += 1
        self._troubles = 0
        self._saturated &= bool(self.queue)
        self._count += 1
        if self._count >= max(self.limit, 8):
            self._end_round()

    def trouble(self, error: Busy) -> None:
        """A request could not be answered; all that were under way together count once."""
        if time.monotonic() < self._settled_at:
            return
        if not self._troubles:
            self.silent_since = time.monotonic()
        self._troubles += 1
        if error.overloaded:
            self._ceiling = self.limit
        self._doubling = not error.overloaded  # after an outage, back to where it was in a few rounds
        self._best = 0.0
        self.limit = max(1, int(self.limit * (0.9 if error.overloaded else 0.5)))
        backoff = 0.0 if error.overloaded else min(15.0, 0.1 * 2 ** min(self._troubles, 10))
        self._open_at = time.monotonic() + max(error.wait, backoff)
        self._settled_at = self._open_at + (self._seconds or 0.2)
        self._began, self._count, self._saturated = time.monotonic(), 0, True

    def _end_round(self) -> None:
        """Compare the answers a second with those of the limit before, and choose the next limit."""
        self._seconds = max(time.monotonic() - self._began, 1e-6)
        rate, self._rounds = self._count / self._seconds, self._rounds + 1
        if self._saturated and self._doubling:
            self._doubling = rate > 1.15 * self._best
            if self._doubling:
                self.limit = min(self.most, self.limit * 2)
            self._best = rate
        elif self._saturated and (self.limit < self._ceiling or self._rounds % 8 == 0):
            self.limit = min(self.most, self.limit + max(1, self.limit // 32))
        self._began, self._count, self._saturated = time.monotonic(), 0, True
        self.wake()


class Endpoint(Captioner):
    """A model behind an address; retries are this class's alone, the client's are off."""

    def __init__(self, asking: Asking) -> None:
        try:
            import openai
            import tenacity
        except ImportError:
            raise ConfigError(
                "--captioner: an endpoint needs the openai client; install it: pip install '.[annotate]'"
            ) from None
        self._openai, self._tenacity = openai, tenacity
        self.url, self.asking = str(asking.captioner), asking
        self.model = asking.served_model or ""
        self.slots = Slots(asking.concurrency)
        self._length_option, self._structured = "max_tokens", True

    async def open(self) -> None:
        """Find the model, and show it a picture."""
        key = os.environ.get(self.asking.key_variable) or "none"
        # Concurrency is bounded here, and each request has the time of its own.
        self._client = self._openai.AsyncOpenAI(
            base_url=self.url,
            api_key=key,
            max_retries=0,
            timeout=self.asking.timeout,
            http_client=self._openai.DefaultAioHttpClient(timeout=self.asking.timeout),
        )
        try:
            served = [model.id for model in (await self._client.models.list()).data]
        except self._openai.APIConnectionError as error:
            raise ConfigError(f"{self.url}: no endpoint answers there: {_root(error)}; start it first") from None
        except self._openai.APIStatusError as error:
            raise self._wrong(error) from None
        except Exception as error:  # whatever a page that is no API makes of the client
            raise ConfigError(f"{self.url}: not an OpenAI-compatible endpoint: {reason(error)}") from None
        if not self.model:
            if len(served) != 1:
                raise ConfigError(f"{self.url}: serves {', '.join(served[:9]) or 'nothing'}; give --served-model")
            self.model = served[0]
        elif served and self.model not in served:
            raise ConfigError(f"{self.url}: no model {self.model!r}; it serves {', '.join(served[:9])}")
        self.identity = {"captioner": "endpoint", "model": self.model}
        look = Request(stage="image", text="What colour is this?", picture=self.picture(Image.new("RGB", (64, 64))))
        for again in (True, False):
            try:
                await self._send(look, most=1)
            except Failed as error:
                if again and "max_completion_tokens" in error.reason:  # what some hosted models want instead
                    self._length_option = "max_completion_tokens"
                    continue
                if error.kind == _REFUSED:
                    raise ConfigError(
                        f"{self.url}: {self.model} takes no pictures: {error.reason}; serve a vision-language model"
                    ) from None
            except Busy:
                pass  # a busy endpoint is there
            return

    def stop(self) -> None:
        """Let go what waits, even for an endpoint that is down."""
        super().stop()
        self.slots.open()

    async def close(self) -> None:
        """Close the connections."""
        if hasattr(self, "_client"):
            await self._client.close()

    def picture(self, image: Image.Image) -> str:
        """A JPEG as the address that a message carries."""
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()

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

        retrying = self._tenacity.AsyncRetrying(
            retry=self._tenacity.retry_if_exception_type(Busy),
            wait=self._tenacity.wait_random(0.0, 0.2),
            stop=is_at_fault,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return await self._in_slot(request)
        except Busy as error:
            raise Failed("endpoint trouble", f"{_TRIES} tries: {error}") from None
        raise AssertionError("tenacity returns or raises")

    async def _in_slot(self, request: Request) -> Reply:
        if self.stopping:
            raise Stopped
        await self.slots.acquire()
        try:
            if self.stopping:
                raise Stopped
            reply = await self._send(request)
        except Busy as error:
            self.slots.trouble(error)
            silent = max(error.wait, time.monotonic() - self.slots.silent_since)
            if silent > self.asking.patience:
                told = f"no answer for {silent:.0f} s ({error}), --patience is {self.asking.patience:g}"
                raise DataError(f"{self.url}: {told}; what is finished is kept: run the same command again") from None
            raise
        except Failed:
            self.slots.success()
            raise
        finally:
            self.slots.release()
        self.slots.success()
        return reply

    async def _send(self, request: Request, most: int = 0) -> Reply:
        """One request and its answer, which has to be whole."""
        began = time.perf_counter()
        lead = [{"type": "text", "text": request.lead}] if request.lead else []
        picture = {"type": "image_url", "image_url": {"url": request.picture}}
        options: dict[str, Any] = {self._length_option: most or self.asking.max_new_tokens}
        if request.choices and self._structured:
            options["extra_body"] = {"structured_outputs": {"choice": list(request.choices)}}
        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "user", "content": [*lead, picture, {"type": "text", "text": request.text}]}],
                temperature=self.asking.temperature,
                seed=request.seed,
                **options,
            )
        except self._openai.APIStatusError as error:
            wrong = self._wrong(error)
            if "extra_body" in options and "structured_outputs" in str(wrong):  # not vLLM: it chooses in its own words
                self._structured = False
                return await self._send(request)
            raise wrong from None
        except self._openai.APIConnectionError as error:  # time-outs too
            raise Busy(f"{type(error).__name__}: {_root(error)}", overloaded=False) from None
        return _read(response.http_response.content, time.perf_counter() - began, self.asking.max_new_tokens)

    def _wrong(self, error: Any) -> Exception:
        """What an HTTP status means."""
        status = error.status_code
        told = reason(Exception(str(getattr(error, "message", error))))
        if status in _OVERLOADED or status >= 500:
            header = error.response.headers.get("retry-after", "")
            wait = float(header) if header.replace(".", "", 1).isdigit() else 0.0
            return Busy(f"status {status}: {told}", status in _OVERLOADED, wait)
        if status in (401, 403):
            return ConfigError(f"{self.url}: refuses the key ({told}); put the right one in {self.asking.key_variable}")
        if status in (404, 405):
            return ConfigError(
                f"{self.url}: not an OpenAI-compatible endpoint (status {status}: {told}); ends it in /v1?"
            )
        return Failed(_REFUSED, f"status {status}: {told}")


def _read(content: bytes, seconds: float, most: int) -> Reply:
    """The answer in a response's body; Failed unless it is whole."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        usage = body.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        model = str(body.get("model") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Failed("malformed answer", f"expected a chat completion, got {content[:80]!r}", again=True) from None
    if finish == "length":
        raise Failed("cut off", f"no end within {most} tokens; raise --max-new-tokens", tokens=tokens)
    if finish != "stop":
        told = f"expected finish_reason 'stop', got {finish!r}"
        raise Failed("unfinished answer", told, again=finish is None, tokens=tokens)
    if not isinstance(text, str) or not text.strip():
        raise Failed("empty answer", "expected words, got none", again=True, tokens=tokens)
    return Reply(text=text.strip(), tokens_in=tokens[0], tokens_out=tokens[1], seconds=seconds, model=model)


def _root(error: BaseException) -> str:
    """What began a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)

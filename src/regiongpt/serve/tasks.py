"""Prepares requests for the model: checks limits, and turns images, regions and prompts into tensors.

This runs in threads beside the model's, and finds every mistake that a client can make.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regiongpt.errors import RegionError, short
from regiongpt.inference.choices import answer_scores, classified, closed_set, locate_expressions
from regiongpt.inference.engine import Answer, Engine, Scene, Turn, question_turns
from regiongpt.inference.options import Options
from regiongpt.prompts import NO_MATCH, check_choices, check_placeholders, check_text, question, region_answer
from regiongpt.serve import schema
from regiongpt.serve.errors import ApiError, over
from regiongpt.serve.images import Picture, Pictures
from regiongpt.serve.options import ServeOptions
from regiongpt.serve.worker import Ask, Result, Task, Ticket

TOKENS = 128
"""Tokens of an answer, unless the request says how many."""
MASKS = 4
"""Masks of the largest image that a request may have."""
SCORED = 8
"""Regions whose choices are scored between two steps of the answers that are being written."""


class Preparation:
    """Makes tickets of the requests of clients."""

    def __init__(self, engine: Engine, options: ServeOptions, pictures: Pictures, name: str) -> None:
        self.engine, self.options, self.pictures, self.name = engine, options, pictures, name
        self._nothing = engine.model.connector.mean.new_empty(0)  # in place of the features, which come later

    def chat(self, request: schema.ChatRequest, client: str) -> Ticket:
        """A conversation that awaits an answer."""
        turns, image, listed = self._conversation(request)
        ways = request.model_dump(include={"temperature", "top_p", "stop"}, exclude_none=True)
        wanted = self._tokens(request.max_completion_tokens or request.max_tokens)
        # With a seed of its own, a draw can be repeated should the batch fail.
        seed = secrets.randbits(62) if request.seed is None else request.seed
        options = Options(max_new_tokens=wanted, seed=seed, **ways)
        picture = self.pictures.find(image, client)
        weights = self._regions(listed, picture)
        prompt = self.engine.prompt(turns, self._nothing, len(listed), wanted)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}

        def task(engine: Engine, scene: Scene, pooled: Tensor) -> Iterator[Ask]:
            ready = replace(prompt, pooled=pooled)
            yield Ask(place=0, prompt=ready, job=engine.job(scene, ready, options, streams=request.stream))

        def chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            return {**head, "object": "chat.completion.chunk", "choices": [choice]}

        def respond(found: list[Answer]) -> dict[str, Any]:
            said = {"role": "assistant", "content": found[0].text}
            choice = {"index": 0, "message": said, "finish_reason": _finish(found[0]), "logprobs": None}
            whole = {**head, "object": "chat.completion", "choices": [choice]}
            return {**whole, "usage": _usage(len(prompt.ids), found), **_named(found[0])}

        def stream(kind: str, value: Any) -> list[dict[str, Any]]:
            if kind == "begin":
                return [chunk({"role": "assistant", "content": ""})]
            if kind == "piece":
                return [chunk({"content": value})]
            last = [{**chunk({}, _finish(value[1])), **_named(value[1])}]
            if request.stream_options and request.stream_options.include_usage:
                last.append({**chunk({}), "choices": [], "usage": _usage(len(prompt.ids), [value[1]])})
            return last

        return Ticket(
            client=client,
            picture=picture,
            weights=weights,
            task=task,
            respond=respond,
            stream=stream if request.stream else None,
            pieces=request.stream,
            prompt_tokens=len(prompt.ids),
        )

    def describe(self, request: schema.DescribeRequest, client: str) -> Ticket:
        """Regions to describe, each by itself."""
        wanted = self._tokens(request.max_tokens)
        options = Options(max_new_tokens=wanted)
        turns = question_turns((), question("caption" if request.brief else "describe", regions=[1]))
        prompt = self.engine.prompt(turns, self._nothing, 1, wanted)
        if len(request.regions) > 1:
            prompt = prompt.for_many(self.engine.model.config.region_token_id)
        tokens = len(prompt.ids) * len(request.regions)

        def task(engine: Engine, scene: Scene, pooled: Tensor) -> Iterator[Ask]:
            for place, features in enumerate(self._each(pooled)):
                ready = replace(prompt, pooled=features)
                yield Ask(place=place, prompt=ready, job=engine.job(scene, ready, options))

        def said(place: int, answer: Answer) -> dict[str, Any]:
            own = {"answer": answer.text, "complete": answer.complete, "warnings": list(answer.warnings)}
            return {"region": _echo(request.regions[place]), **own}

        def respond(found: list[Answer]) -> dict[str, Any]:
            return {"regions": list(map(said, range(len(found)), found)), "usage": _usage(tokens, found)}

        def stream(kind: str, value: Any) -> list[dict[str, Any]]:
            return [] if kind == "begin" else [{"index": value[0], **said(*value)}]

        ticket = self._ticket("describe", request, client, task, respond)
        ticket.prompt_tokens, ticket.stream = tokens, stream if request.stream else None
        return ticket

    def classify(self, request: schema.ClassifyRequest, client: str) -> Ticket:
        """Regions to choose a name for, each by itself."""
        self._texts(request.choices or [], "choices")
        names = check_choices(request.choices, request.label_set)
        turns = question_turns((), question("classify", regions=[1], label_set=request.label_set))
        closed_set(self.engine, turns, 1, names)  # makes it ready; what is too long is known at once

        def task(engine: Engine, scene: Scene, pooled: Tensor) -> Iterator[Result]:
            each = self._each(pooled)
            for start in range(0, len(each), SCORED):
                scores_BA = answer_scores(engine, scene, turns, each[start : start + SCORED], names)
                for place, scores_A in enumerate(scores_BA, start):
                    found = classified(scores_A, names, request.top_k)
                    shares = {"probability": found.probability, "probabilities": found.probabilities}
                    yield place, {"label": found.label, **shares}

        def respond(found: list[dict[str, Any]]) -> dict[str, Any]:
            return {"regions": [{"region": _echo(r), **each} for r, each in zip(request.regions, found, strict=True)]}

        return self._ticket("classify", request, client, task, respond)

    def locate(self, request: schema.LocateRequest, client: str) -> Ticket:
        """Expressions to find the region of."""
        given = [request.expression] if isinstance(request.expression, str) else request.expression
        self._texts(given, "expression")
        count = len(request.regions)
        for each in given:
            check_text(each, "an expression such as 'the red cup'")
            check_placeholders(each, count)
        self._limit("max_choices", count * len(given), "pairs of an expression and a region", "expression")
        expressions, numbers = [each.strip() for each in given], range(1, count + 1)
        if request.by != "words":  # what is too long is known at once
            turns = question_turns((), question("locate", regions=numbers, expression=max(expressions, key=len)))
            closed_set(self.engine, turns, count, [*map(region_answer, numbers), NO_MATCH])

        def task(engine: Engine, scene: Scene, pooled: Tensor) -> Iterator[Result]:
            for place, expression in enumerate(expressions):
                (found,) = locate_expressions(engine, scene, self._each(pooled), [expression], request.by)
                shares = {"probability": found.probability, "probabilities": list(found.probabilities)}
                yield place, {"expression": expression, "number": found.number, "answer": found.text, **shares}

        def respond(found: list[dict[str, Any]]) -> dict[str, Any]:
            return {"regions": list(map(_echo, request.regions)), "results": found}

        return self._ticket("locate", request, client, task, respond)

    # -----------------------------------------------------------------------------------------------------------------

    def _each(self, pooled: Tensor) -> list[Tensor]:
        """Features (K, D) of each region."""
        return list(torch.split(pooled, self.engine.processor.tokens_per_region))

    def _tokens(self, wanted: int | None) -> int:
        self._limit("max_tokens", wanted or 0, "tokens", "max_tokens")
        return wanted or min(TOKENS, self.options.max_tokens)

    def _texts(self, texts: Sequence[str], param: str) -> None:
        self._limit("max_choices", len(texts), "of them", param)
        self._limit("max_text", sum(map(len, texts)), "characters", param)

    def _limit(self, name: str, count: int, what: str, param: str, times: int = 1) -> None:
        if count > (most := times * getattr(self.options, name)):
            raise over(name, most, f"{count:,} {what}", param=param)

    def _ticket(
        self,
        name: str,
        request: schema.RegionsRequest,
        client: str,
        task: Task,
        respond: Callable[[Any], dict[str, Any]],
    ) -> Ticket:
        began = time.perf_counter()
        picture = self.pictures.find(request.image, client)

        def answer(found: list[Any]) -> dict[str, Any]:
            seconds = round(time.perf_counter() - began, 3)
            return {"object": f"regions.{name}", "model": self.name, **respond(found), "seconds": seconds}

        weights = self._regions(request.regions, picture)
        return Ticket(client=client, picture=picture, weights=weights, task=task, respond=answer)

    def _regions(self, listed: Sequence[Any], picture: Picture) -> Tensor:
        """The regions' pooling weights (R * K, gh, gw)."""
        width, height = picture.width, picture.height
        self._limit("max_regions", len(listed), "regions", "regions")
        self._limit("max_points", sum(map(_count, listed)), "points of polygons and scribbles", "regions")
        masks, weights = 0, [torch.empty((0, *self.engine.processor.refined_grid))]
        for number, value in enumerate(listed, 1):
            name = f"<region{number}>"
            if isinstance(value, dict):
                coded = value.get("mask", value.get("rle"))
                masks += isinstance(coded, dict)
                # Before it is decoded: a few bytes can stand for any number of pixels.
                if isinstance(coded, dict) and (size := coded.get("size")) != [height, width]:
                    raise RegionError(f"{name}: expected a mask of size {[height, width]} (H, W), got {short(size)}")
                self._limit("max_pixels", masks * width * height, "pixels of masks", "regions", times=MASKS)
            elif len(value) != 4 or any(isinstance(each, list) for each in value):
                raise RegionError(f"{name}: expected an object such as {{'box': [x0, y0, x1, y1]}}, or 4 numbers")
            # One by one: only one mask at a time takes memory.
            weights.append(self.engine.processor.region_inputs([value], width, height, number))
        return torch.cat(weights)

    def _conversation(self, request: schema.ChatRequest) -> tuple[list[Turn], str, list[Any]]:
        """The turns, the image, and the regions: those beside the messages, then those in them."""
        self._limit("max_turns", len(request.messages), "messages", "messages")
        regions, images, turns = list(request.regions), dict[str, None](), list[Turn]()
        for message in request.messages:
            turns.append({"role": message.role, "content": _text(message, regions, images)})
        self._limit("max_text", sum(len(turn["content"]) for turn in turns), "characters", "messages")
        if len(images) != 1:
            raise ApiError(400, f"expected one image in the conversation, got {len(images)}", "image", "messages")
        if turns[-1]["role"] != "user":
            raise ApiError(400, "the last message must be from the user", param="messages")
        check_text(turns[-1]["content"], "a question such as 'What is <region1>?'")
        return turns, next(iter(images)), regions


def _text(message: schema.Message, regions: list[Any], images: dict[str, None]) -> str:
    """The text of a message, whose images and regions are added to those before."""
    if isinstance(message.content, str):
        return message.content
    text, before = "", ""
    for part in message.content:
        if not isinstance(part, schema.TextPart) and message.role != "user":
            raise ApiError(400, f"{message.role}: only the user may give images and regions", param="messages")
        if isinstance(part, schema.ImagePart):
            images[part.image_url.url] = None
            continue
        if isinstance(part, schema.RegionPart):
            regions.append(part.region)
            text += f"<region{len(regions)}>"
        else:
            text += "\n" * (before == "text") + part.text
        before = part.type
    return text


def _count(region: Any) -> int:
    """Points of a polygon or scribble, whatever its nesting."""
    numbers, stack = 0, [region.get("polygon"), region.get("scribble")] if isinstance(region, Mapping) else []
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack.extend(value)
        else:
            numbers += value is not None
    return -(-numbers // 2)


def _echo(region: Any) -> Any:
    return region if isinstance(region, dict) else {"box": region}


def _finish(answer: Answer) -> str:
    return "stop" if answer.complete else "length"


def _named(answer: Answer) -> dict[str, Any]:
    return {"cited": list(answer.cited), "warnings": list(answer.warnings)}


def _usage(read: int, found: Sequence[Answer]) -> dict[str, int]:
    written = sum(answer.tokens for answer in found)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

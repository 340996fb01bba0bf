"""Makes requests ready in threads beside the model's: finds a client's mistakes, and turns all into tensors."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regiongpt.errors import RegionError, short
from regiongpt.inference.choices import answer_scores, classified, closed_set, locate_expressions
from regiongpt.inference.engine import Answer, Engine, Scene, Turn, question_turns
from regiongpt.inference.options import Options
from regiongpt.prompts import NO_MATCH, check_choices, check_placeholders, check_text, question, region_answer
from regiongpt.regions import Region
from regiongpt.serve import schema
from regiongpt.serve.guard import ApiError, over
from regiongpt.serve.images import Pictures
from regiongpt.serve.options import ServeOptions
from regiongpt.serve.worker import Ask, Event, Result, Ticket

Json = dict[str, Any]
TOKENS = 128
"""Tokens of an answer, unless the request says how many."""
MASKS = 4
"""Masks of the largest image that a request may have."""
SCORED = 8
"""Regions whose choices are scored between two steps of the answers that are being written."""


class Tasks:
    """Makes tickets of the requests of clients."""

    def __init__(self, engine: Engine, options: ServeOptions, pictures: Pictures, name: str) -> None:
        self.engine, self.options, self.pictures, self.name = engine, options, pictures, name
        self._nothing = engine.model.connector.mean.new_empty(0)  # in place of the features, which come later

    def chat(self, request: schema.ChatRequest, client: str) -> Ticket:
        """A conversation that awaits an answer."""
        turns, image, regions = self._conversation(request)
        ways = request.model_dump(include={"temperature", "top_p", "stop"}, exclude_none=True)
        wanted = self._tokens(request.max_completion_tokens or request.max_tokens)
        # With a seed of its own, a draw can be repeated should the batch fail.
        seed = secrets.randbits(62) if request.seed is None else request.seed
        options = Options(max_new_tokens=wanted, seed=seed, **ways)
        prompt = self.engine.prompt(turns, self._nothing, len(regions), wanted)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}

        def task(scene: Scene, pooled: Tensor) -> Iterator[Ask]:
            ready = replace(prompt, pooled=pooled)
            yield Ask(place=0, prompt=ready, job=self.engine.job(scene, ready, options, streams=request.stream))

        def completion(part: str, said: Json, answer: Answer | None = None) -> Json:
            finish = ("stop" if answer.complete else "length") if answer else None
            choice = {"index": 0, part: said, "finish_reason": finish, "logprobs": None}
            named = {"cited": list(answer.cited), "warnings": list(answer.warnings)} if answer else {}
            kind = "chat.completion" if part == "message" else "chat.completion.chunk"
            return {**head, "object": kind, "choices": [choice], **named}

        def respond(found: list[Answer]) -> Json:
            said = {"role": "assistant", "content": found[0].text}
            return {**completion("message", said, found[0]), "usage": _usage(len(prompt.ids), found)}

        async def stream(events: AsyncIterator[Event]) -> AsyncIterator[Json]:
            role = {"role": "assistant"}
            async for kind, value in events:
                if kind == "piece":
                    if said := value.lstrip() if role else value:
                        yield completion("delta", {**role, "content": said})
                        role = {}
                else:
                    yield completion("delta", role, value[1])
                    if (request.stream_options or {}).get("include_usage"):
                        yield {**completion("delta", {}), "choices": [], "usage": _usage(len(prompt.ids), [value[1]])}

        return self._ticket(client, image, regions, task, respond, stream, len(prompt.ids))

    def describe(self, request: schema.DescribeRequest, client: str) -> Ticket:
        """Regions to describe, each by itself."""
        wanted = self._tokens(request.max_tokens)
        options = Options(max_new_tokens=wanted)
        turns = question_turns((), question("caption" if request.brief else "describe", regions=[1]))
        prompt = self.engine.prompt(turns, self._nothing, 1, wanted)
        read = len(prompt.ids) * len(request.regions)

        def task(scene: Scene, pooled: Tensor) -> Iterator[Ask]:
            for place, features in enumerate(torch.split(pooled, 1)):
                ready = replace(prompt, pooled=features, repeated=len(request.regions) > 1)
                yield Ask(place=place, prompt=ready, job=self.engine.job(scene, ready, options))

        def said(place: int, answer: Answer) -> Json:
            own = {"answer": answer.text, "complete": answer.complete, "warnings": list(answer.warnings)}
            return {"region": _echo(request.regions[place]), **own}

        def respond(found: list[Answer]) -> Json:
            return {"regions": list(map(said, range(len(found)), found)), "usage": _usage(read, found)}

        async def stream(events: AsyncIterator[Event]) -> AsyncIterator[Json]:
            async for _, (place, answer) in events:
                yield {"index": place, **said(place, answer)}

        return self._ticket(client, request.image, request.regions, task, respond, stream, read)

    def classify(self, request: schema.ClassifyRequest, client: str) -> Ticket:
        """Regions to choose a name for, each by itself."""
        self._texts(request.choices or [], "choices")
        names = check_choices(request.choices, request.label_set)
        turns = question_turns((), question("classify", regions=[1], label_set=request.label_set))
        closed_set(self.engine, turns, 1, names)  # makes it ready; what is too long is known at once

        def task(scene: Scene, pooled: Tensor) -> Iterator[Result]:
            each = torch.split(pooled, 1)
            for start in range(0, len(each), SCORED):
                scores_BA = answer_scores(self.engine, scene, turns, each[start : start + SCORED], names)
                for place, scores_A in enumerate(scores_BA, start):
                    found = classified(scores_A, names, request.top_k)
                    shares = {"probability": found.probability, "probabilities": found.probabilities}
                    yield place, {"region": _echo(request.regions[place]), "label": found.label, **shares}

        return self._ticket(client, request.image, request.regions, task, lambda found: {"regions": found})

    def locate(self, request: schema.LocateRequest, client: str) -> Ticket:
        """Expressions to find the region of."""
        given = [request.expression] if isinstance(request.expression, str) else request.expression
        numbers = range(1, len(request.regions) + 1)
        self._texts(given, "expression")
        self._limit("max_choices", len(numbers) * len(given), "pairs of an expression and a region", "expression")
        for each in given:
            check_text(each, "an expression such as 'the red cup'")
            check_placeholders(each, len(numbers))
        expressions = [each.strip() for each in given]
        if request.by != "words":  # what is too long is known at once
            turns = question_turns((), question("locate", regions=numbers, expression=max(expressions, key=len)))
            closed_set(self.engine, turns, len(numbers), [*map(region_answer, numbers), NO_MATCH])

        def task(scene: Scene, pooled: Tensor) -> Iterator[Result]:
            for place, expression in enumerate(expressions):
                (found,) = locate_expressions(self.engine, scene, torch.split(pooled, 1), [expression], request.by)
                shares = {"probability": found.probability, "probabilities": list(found.probabilities)}
                yield place, {"expression": expression, "number": found.number, "answer": found.text, **shares}

        return self._ticket(client, request.image, request.regions, task, lambda found: {"results": found})

    def _ticket(self, client: str, image: str, regions: Sequence[Any], *work: Any) -> Ticket:
        """The ticket of a task, with its image and what its regions are pooled by."""
        self._limit("max_regions", len(regions), "regions", "regions")
        picture, processor = self.pictures.find(image, client), self.engine.processor
        width, height = picture.width, picture.height
        masks, weights, boxes = 0, [processor.region_inputs([], width, height)], list[Region]()
        for number, value in enumerate(regions, 1):
            name = f"<region{number}>"
            coded = value.get("mask", value.get("rle")) if isinstance(value, dict) else None
            if isinstance(coded, dict):
                masks += 1
                # Before it is decoded: a few bytes can stand for any number of pixels.
                if (size := coded.get("size")) != [height, width]:
                    raise RegionError(f"{name}: expected a mask of size {[height, width]} (H, W), got {short(size)}")
                self._limit("max_pixels", masks * width * height, "pixels of masks", "regions", times=MASKS)
            elif isinstance(value, list) and (len(value) != 4 or any(isinstance(each, list) for each in value)):
                raise RegionError(f"{name}: expected an object such as {{'box': [x0, y0, x1, y1]}}, or 4 numbers")
            # One by one: only one mask at a time takes memory.
            region = Region.of(value, name)
            weights.append(processor.region_inputs([region], width, height, number))
            if self.options.detail == "careful":  # a second look is taken at what is around the box
                boxes.append(Region.box(*region.bounds(width, height), normalized=False))
        return Ticket(client, picture, torch.cat(weights), boxes, *work)

    def _conversation(self, request: schema.ChatRequest) -> tuple[list[Turn], str, list[Any]]:
        """The turns, the image, and the regions: those beside the messages, then those in them."""
        self._limit("max_turns", len(request.messages), "messages", "messages")
        regions, images, turns = list(request.regions), dict[str, None](), list[Turn]()
        for message in request.messages:
            parts = message.content
            if isinstance(parts, str):
                parts = [schema.TextPart(type="text", text=parts)]
            text, before = "", ""
            for part in parts:
                if part.type != "text" and message.role != "user":
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
            turns.append({"role": message.role, "content": text})
        self._limit("max_text", sum(len(turn["content"]) for turn in turns), "characters", "messages")
        if len(images) != 1:
            raise ApiError(400, f"expected one image in the conversation, got {len(images)}", "image", "messages")
        if turns[-1]["role"] != "user":
            raise ApiError(400, "the last message must be from the user", param="messages")
        check_text(turns[-1]["content"], "a question such as 'What is <region1>?'")
        return turns, next(iter(images)), regions

    def _tokens(self, wanted: int | None) -> int:
        self._limit("max_tokens", wanted or 0, "tokens", "max_tokens")
        return wanted or min(TOKENS, self.options.max_tokens)

    def _texts(self, texts: Sequence[str], param: str) -> None:
        self._limit("max_choices", len(texts), "of them", param)
        self._limit("max_text", sum(map(len, texts)), "characters", param)

    def _limit(self, name: str, count: int, what: str, param: str, times: int = 1) -> None:
        if count > (most := times * getattr(self.options, name)):
            raise over(name, most, f"{count:,} {what}", param=param)


def _echo(region: Any) -> Json:
    return region if isinstance(region, dict) else {"box": region}


def _usage(read: int, found: Sequence[Answer]) -> dict[str, int]:
    written = sum(answer.tokens for answer in found)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

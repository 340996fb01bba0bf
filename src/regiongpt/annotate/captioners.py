"""Captioners: whatever answers about an image and its regions, behind one small interface; those of this machine."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from regiongpt.annotate.plan import WORDING, draw
from regiongpt.data.coco import ImageAnnotations, ObjectAnnotation
from regiongpt.data.facts import View, ViewObject, colours_of, neighbours, place_name, size_name
from regiongpt.data.records import RecordRegion
from regiongpt.data.wording import noun, plural, with_article
from regiongpt.errors import CheckpointError, ConfigError, RegionGPTError
from regiongpt.prompts import indefinite, question
from regiongpt.regions import Region
from regiongpt.settings import Settings
from regiongpt.storage import read_json, reason


class Asking(Settings):
    """Who captions, and how it is asked."""

    captioner: str | None = None
    """address of an OpenAI-compatible endpoint, folder of a transformers or RegionGPT model, or facts (default: the
    model of this package)"""
    served_model: str | None = None
    """name of the model at an endpoint (default: the only one there)"""
    key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the endpoint's key"""
    max_new_tokens: PositiveInt = 512
    """longest answer in tokens; one that is cut off there does not count as finished"""
    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token each time"""
    concurrency: PositiveInt = 256
    """most requests under way at an endpoint; how many there are adapts below that"""
    timeout: PositiveFloat = 120.0
    """seconds until a request counts as lost"""
    patience: PositiveFloat = 600.0
    """seconds that an endpoint may be silent before the run ends"""
    batch_size: PositiveInt = 8
    """images or crops at a time, for a model on this machine"""
    device: str | None = None
    """of a model on this machine: cuda, cuda:N, mps or cpu"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of a model on this machine"""
    input_price: NonNegativeFloat | None = None
    """of a million tokens read, for --max-cost and the statistics"""
    output_price: NonNegativeFloat | None = None
    """of a million tokens written"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to ask: the global caption (``image``), one region's (``region``), or which region a caption means."""

    stage: Literal["image", "region", "locate"]
    text: str  # behind the picture
    lead: str = ""  # the global caption, before it
    picture: Any = None  # what Captioner.picture made of the image or the crop
    photo: Image.Image | None = None
    regions: Sequence[RecordRegion] = ()  # all that are annotated in the image
    number: int = -1  # the one asked about, from 0
    category: str = ""  # where the mode tells it
    caption: str = ""  # what to locate
    version: int = 0  # of the prompt
    seed: int = 0

    @property
    def choices(self) -> list[str]:
        """The only answers of ``locate``."""
        return [str(number) for number in range(1, len(self.regions) + 1)] if self.stage == "locate" else []


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, with the tokens read and written, the seconds it took and the model that gave it."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    model: str = ""


class Failed(Exception):
    """A request that got no finished answer; one ``kind`` a cause, ``again`` where asking at once may help."""

    def __init__(self, kind: str, reason: str, again: bool = False, tokens: tuple[int, int] = (0, 0)) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.again, self.tokens = kind, " ".join(reason.split())[:300], again, tokens


class Stopped(Exception):
    """The run is ending: what was not under way yet is not asked."""


Outcome = Reply | Exception


def checked(reply: Reply, ended: bool, most: int, again: bool = False) -> Reply | Failed:
    """An answer if it has words and an end within ``most`` tokens."""
    tokens = reply.tokens_in, reply.tokens_out
    if not ended:
        return Failed("cut off", f"no end within {most} tokens; raise --max-new-tokens", tokens=tokens)
    if not reply.text.strip():
        return Failed("empty answer", "expected words, got none", again, tokens)
    return replace(reply, text=reply.text.strip())


class Captioner(ABC):
    """What answers requests."""

    identity: dict[str, Any]  # decides its answers, and so the keys of finished work
    wants_photo: bool = False  # it is shown the image's pixels rather than pictures of its own making
    locates: bool = True  # it can choose a region
    stopping: bool = False

    async def open(self) -> None:  # noqa: B027
        """Make sure that it answers; ConfigError where it cannot be used."""

    async def close(self) -> None:  # noqa: B027
        """Give back what it holds."""

    def stop(self) -> None:
        """Finish what is under way, and let everything else go."""
        self.stopping = True

    def picture(self, image: Image.Image) -> Any:
        """What a request carries of an image or a crop; called in a thread of its own."""
        return image

    @abstractmethod
    def has_room(self, begun: int) -> bool:
        """Whether another image should be begun, with so many begun and not done."""

    @abstractmethod
    async def ask(self, request: Request) -> Reply:
        """Answer one request; Failed or Stopped without a finished answer, RegionGPTError where there will be none."""


class Local(Captioner):
    """A model on this machine: answers what is waiting in batches of ``batch_size``, in a thread."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._thread = ThreadPoolExecutor(1)
        self._worker: asyncio.Task[None] | None = None

    def has_room(self, begun: int) -> bool:
        """As many images as fill a batch with their global captions."""
        return begun < self.batch_size

    async def ask(self, request: Request) -> Reply:
        """Wait for a place in a batch."""
        if self.stopping:
            raise Stopped
        place: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, place))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await place

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(0.01)  # whoever got an answer asks the next thing first
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            requests, began = [request for request, _ in batch], time.perf_counter()
            outcomes: Sequence[Outcome] = [Stopped()] * len(batch)
            try:
                if not self.stopping:
                    outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self.answer, requests)
            except Exception as error:
                outcomes = [error] * len(batch)
            seconds = (time.perf_counter() - began) / len(batch)
            for (_, place), outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, Reply) and not place.done():
                    place.set_result(replace(outcome, seconds=seconds))
                elif isinstance(outcome, Exception) and not place.done():
                    place.set_exception(outcome)

    async def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(cancel_futures=True)

    @abstractmethod
    def answer(self, requests: Sequence[Request]) -> Sequence[Outcome]:
        """Answer a batch, in its order; each with a reply or with what went wrong."""


def weights_digest(folder: Path) -> str:
    """What tells a model's weights from others': the sizes of its files and samples of them, for they may be huge."""
    found, most = sha256(), 1 << 20
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in (0, size // 2, max(0, size - most)):
                file.seek(place)
                found.update(file.read(most))
    return found.hexdigest()[:32]


def open_captioner(asking: Asking, seed: int) -> Captioner:
    """The captioner that ``--captioner`` names, with the seed of facts' wording; ConfigError or CheckpointError."""
    name = asking.captioner
    if name == "facts":
        return Facts(seed)
    if name is not None and "://" in name:
        from regiongpt.annotate.endpoint import Endpoint

        return Endpoint(asking)
    if name is not None and not (Path(name) / "config.json").is_file():
        known = "an address such as http://localhost:8000/v1, a model's folder with a config.json in it, or facts"
        raise CheckpointError(f"--captioner {name}: expected {known}")
    if name is None or read_json(Path(name) / "config.json", CheckpointError).get("model_type") == "regiongpt":
        return RegionGPT(asking)
    return TransformersVLM(asking)


class RegionGPT(Local):
    """A RegionGPT checkpoint, asked by the prompts of its training; regions share what it read of their image."""

    wants_photo = True

    def __init__(self, asking: Asking) -> None:
        super().__init__(max(64, asking.batch_size))
        from regiongpt.inference import RegionPredictor
        from regiongpt.model.weights import nano_path

        folder = Path(asking.captioner or nano_path())
        self.predictor = RegionPredictor.from_pretrained(folder, device=asking.device, dtype=asking.dtype, images=16)
        self.asking, self.name = asking, folder.resolve().name
        self.identity = {"captioner": "regiongpt", "model": self.name, "weights": weights_digest(folder)}

    def has_room(self, begun: int) -> bool:
        """Those whose regions fill a batch, and the next ones for their global captions."""
        return begun < 8

    def answer(self, requests: Sequence[Request]) -> Sequence[Outcome]:
        """Ask all at once, image by image."""
        from regiongpt.inference.predictor import Question

        found: dict[int, Outcome] = {}
        choosing: dict[int, list[int]] = {}
        asked, questions, most = [], [], self.asking.max_new_tokens
        for place, request in enumerate(requests):
            if request.stage == "locate":
                choosing.setdefault(id(request.photo), []).append(place)
                continue
            text, regions = region_question(request)
            seed = request.seed if self.asking.temperature else None
            asked.append(place)
            questions.append(Question(text=text, regions=regions, image=request.photo, seed=seed))
        options: Any = {"max_new_tokens": most, "temperature": self.asking.temperature}
        try:
            for number, answer in self.predictor.answers(questions, **options):
                reply = Reply(text=answer.text, tokens_out=answer.tokens, model=self.name)
                found[asked[number]] = checked(reply, answer.complete, most)
            for places in choosing.values():  # those of one image
                self.predictor.set_image(requests[places[0]].photo)  # type: ignore[arg-type]
                boxes = [each.region for each in requests[places[0]].regions]
                located = self.predictor.locate([requests[place].caption for place in places], boxes)
                for place, each in zip(places, located, strict=True):
                    found[place] = Reply(text=str(each.number or 0), model=self.name)
        except RegionGPTError as error:
            if len(requests) == 1:
                return [Failed("refused by the model", str(error))]
            return [self.answer([request])[0] for request in requests]  # one of them is at fault
        return [found[place] for place in range(len(requests))]


def region_question(request: Request) -> tuple[str, list[Region]]:
    """A request as RegionGPT is asked it."""
    if request.stage == "image":
        return question("image_caption", request.version), []
    told = f"The region shows {indefinite(request.category)}. " if request.category else ""
    text = f"{request.lead} {told}{question('describe', request.version, regions=[1])}".lstrip()
    return text, [request.regions[request.number].region]


class TransformersVLM(Local):
    """Whatever ``AutoModelForImageTextToText`` and ``AutoProcessor`` load and whose processor has a chat template."""

    def __init__(self, asking: Asking) -> None:
        super().__init__(asking.batch_size)
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from regiongpt.inference.engine import pick_device, pick_dtype

        folder = Path(str(asking.captioner))
        self._torch, self.asking, self.name = torch, asking, folder.resolve().name
        self._device = pick_device(asking.device)
        dtype = pick_dtype(asking.dtype, self._device)
        try:
            self._processor = AutoProcessor.from_pretrained(folder)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            told = f"not a vision-language model that transformers loads: {reason(error)[:200]}"
            raise CheckpointError(f"--captioner {folder}: {told}") from None
        if not hasattr(self._processor, "image_processor"):
            raise CheckpointError(f"--captioner {folder}: takes no pictures; give a vision-language model")
        if getattr(self._processor, "chat_template", None) is None:
            raise CheckpointError(f"--captioner {folder}: its processor has no chat template; add chat_template.jinja")
        self._model = model.to(self._device).eval()
        self._tokenizer = self._processor.tokenizer
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        ends = self._model.generation_config.eos_token_id or self._tokenizer.eos_token_id
        self._ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=self._device)
        self.identity = {"captioner": "transformers", "model": self.name, "weights": weights_digest(folder)}

    def answer(self, requests: Sequence[Request]) -> Sequence[Outcome]:
        """Generate for all at once; where memory does not do, for halves of them."""
        try:
            return self._generate(requests)
        except self._torch.OutOfMemoryError:
            if len(requests) == 1:
                told = "no memory for one picture; lower --crop-most or --max-new-tokens"
                raise ConfigError(f"--captioner {self.name}: {told}") from None
        self.batch_size = len(requests) // 2
        return [*self.answer(requests[: self.batch_size]), *self.answer(requests[self.batch_size :])]

    def _generate(self, requests: Sequence[Request]) -> list[Outcome]:
        torch, most = self._torch, self.asking.max_new_tokens
        inputs = self._processor.apply_chat_template(
            [messages(request, {"type": "image", "image": request.picture}) for request in requests],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, padding=True,
        ).to(self._device, self._model.dtype)  # fmt: skip
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.asking.temperature:
            torch.manual_seed(sum(request.seed for request in requests) % 2**31)
            options = {"do_sample": True, "temperature": self.asking.temperature}
        options |= {"max_new_tokens": most, "pad_token_id": self._tokenizer.pad_token_id}
        with torch.inference_mode():
            written = self._model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(written, self._ends)
        read = inputs["attention_mask"].sum(1).tolist()
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, written.shape[1]).tolist()
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        return [
            checked(Reply(text=text, tokens_in=tokens_in, tokens_out=tokens_out, model=self.name), end, most)
            for text, tokens_in, tokens_out, end in zip(texts, read, lengths, ended.any(1).tolist(), strict=True)
        ]


def messages(request: Request, picture: dict[str, Any]) -> list[dict[str, Any]]:
    """A request as a chat of one turn."""
    lead = [{"type": "text", "text": request.lead}] if request.lead else []
    return [{"role": "user", "content": [*lead, picture, {"type": "text", "text": request.text}]}]


class Facts(Local):
    """Class, colour, place, size and nearest neighbours of a region: only what annotations and pixels prove.

    How many there are of a class is not said: a source need not annotate them all.
    """

    wants_photo = True
    locates = False

    def __init__(self, seed: int) -> None:
        super().__init__(64)
        self.identity = {"captioner": "facts", "model": "facts"}
        self.seed = seed

    def answer(self, requests: Sequence[Request]) -> Sequence[Outcome]:
        """Word each, those about one image with its colours named once."""
        known: dict[int, tuple[View, dict[int, str]]] = {}
        outcomes: list[Outcome] = []
        openings = WORDING["facts"]["openings"]
        for request in requests:
            assert request.photo is not None
            if id(request.photo) not in known:
                known[id(request.photo)] = _see(request.photo, request.regions)
            view, colours = known[id(request.photo)]
            named = {each.id: each for each in view.objects}
            if request.stage == "image":
                outcomes.append(Reply(text=_whole(view), model="facts"))
            elif each := named.get(request.number):
                opening = openings[draw(self.seed, repr(each.box), len(openings))]
                outcomes.append(Reply(text=_one(view, each, colours.get(each.id), opening), model="facts"))
            else:
                outcomes.append(Failed("region without class", "facts needs class names; give them, or a model"))
        return outcomes


def _see(photo: Image.Image, regions: Sequence[RecordRegion]) -> tuple[View, dict[int, str]]:
    """The image's objects by their places among the regions, and their colours."""
    objects = []
    for number, each in enumerate(regions):
        if each.category:
            x0, y0, x1, y1 = map(float, each.region.bounds(*photo.size))
            drawn = each.region.to_dict().get("polygon")
            rings = tuple(tuple(np.ravel(ring).tolist()) for ring in drawn) if drawn else None
            objects.append(ObjectAnnotation(id=number, category=each.category, box=(x0, y0, x1, y1), polygons=rings))
    image = ImageAnnotations(path=Path(), image_id=0, width=photo.width, height=photo.height, objects=tuple(objects))
    return View(image), colours_of(image, photo)


def _whole(view: View) -> str:
    """What is annotated in the image, by class."""
    if not view.objects:
        return "Nothing in the image is annotated."
    *named, last = [
        with_article(noun(name)) if len(group) == 1 else f"at least {len(group)} {plural(name)}"
        for name, group in view.by_category.items()
    ]
    return f"The image shows {', '.join(named)}{' and ' if named else ''}{last}."


def _one(view: View, each: ViewObject, colour: str | None, opening: str) -> str:
    a, place = with_article(noun(each.category, colour or "")), place_name(each.box, view.width, view.height)
    where = f" {place} of the image" if place else ""
    size = WORDING["facts"]["sizes"][size_name(each.box, view.width, view.height)]
    sentences = [opening.format(a=a, A=a[0].upper() + a[1:], place=where), size]
    near = []
    for other, how in neighbours(view, each, 3):
        name = noun(other.category)
        named = f"another {name}" if other.category == each.category else with_article(name)
        near += [f"{'within the area of' if how == 'inside' else how} {named}"] if how != "around" else []
    sentences += [f"In the image, it is {' and '.join(near[:2])}."] if near else []
    return " ".join(sentences)

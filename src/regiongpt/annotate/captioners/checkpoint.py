"""A RegionGPT checkpoint, with the prompts of its training, or another vision-language model of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from regiongpt.annotate.captioners import Captioner, Reply, Request
from regiongpt.annotate.options import Options
from regiongpt.inference import RegionPredictor
from regiongpt.inference.predictor import Question
from regiongpt.inference.vision_language import VisionLanguageModel
from regiongpt.model.weights import nano_path
from regiongpt.prompts import indefinite, question
from regiongpt.regions import Region
from regiongpt.storage import weights_digest


class Checkpoint(Captioner):
    """Regions share the encoded image."""

    def __init__(self, options: Options) -> None:
        folder = Path(options.captioner or nano_path())
        self.predictor = RegionPredictor.from_pretrained(folder, device=options.device, dtype=options.dtype, images=16)
        self.options, self.name = options, folder.resolve().name
        identity = {"captioner": "regiongpt", "model": self.name, "weights": weights_digest(folder)}
        super().__init__(identity, batch_size=max(64, options.batch_size), images=8)

    def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        found: dict[int, Reply] = {}
        choosing: dict[int, list[int]] = {}  # by image
        asked: dict[int, Question] = {}
        for place, request in enumerate(requests):
            if request.stage == "locate":
                choosing.setdefault(id(request.picture), []).append(place)
                continue
            text, regions = region_question(request)
            seed = request.seed if self.options.temperature else None
            asked[place] = Question(text=text, regions=regions, image=request.picture, seed=seed)
        sampling: Any = {name: getattr(self.options, name) for name in ("max_new_tokens", "temperature")}
        places = list(asked)
        for number, answer in self.predictor.answers(list(asked.values()), **sampling):
            reply = Reply(text=answer.text, ended=answer.complete, tokens_out=answer.tokens, model=self.name)
            found[places[number]] = reply
        for places in choosing.values():
            first, captions = requests[places[0]], [requests[place].caption for place in places]
            self.predictor.set_image(first.picture)
            located = self.predictor.locate(captions, [each.region for each in first.regions])
            found |= {
                p: Reply(text=str(each.number or 0), model=self.name) for p, each in zip(places, located, strict=True)
            }
        return [found[place] for place in range(len(requests))]


def region_question(request: Request) -> tuple[str, list[Region]]:
    """A request as a RegionGPT question."""
    if request.stage == "image":
        return question("image_caption", request.version), []
    told = f"The region shows {indefinite(request.category)}. " if request.category else ""
    text = f"{request.lead} {told}{question('describe', request.version, regions=[1])}".lstrip()
    return text, [request.regions[request.number].region]


class OtherModel(Captioner):
    """LLaVA, Qwen-VL, SmolVLM and whatever else transformers loads with a chat template; each close-up is an image."""

    wants_image = False

    def __init__(self, options: Options) -> None:
        folder = Path(str(options.captioner))
        self.options, saving = options, "--batch-size or --crop-most"
        self.model = VisionLanguageModel(folder, "--captioner", options.device, options.dtype, saving)
        identity = {"captioner": "transformers", "model": self.model.name, "weights": weights_digest(folder)}
        super().__init__(identity, options.batch_size, images=options.batch_size)

    def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        chats = [request.messages({"type": "image", "image": request.picture}) for request in requests]
        sampling: dict[str, Any] = {}
        if self.options.temperature:
            torch.manual_seed(sum(request.seed for request in requests) % 2**31)
            sampling = {"do_sample": True, "temperature": self.options.temperature}
        return [
            Reply(text=text, ended=ended, tokens_in=read, tokens_out=written, model=self.model.name)
            for text, ended, read, written, _ in self.model.ask(chats, self.options.max_new_tokens, **sampling)
        ]

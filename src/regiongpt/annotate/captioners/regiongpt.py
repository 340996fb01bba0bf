"""A RegionGPT checkpoint: it is shown the region itself, and all regions share what it read of their image."""

from collections.abc import Sequence
from pathlib import Path

from regiongpt.annotate.captioners import Asking, Failed, Local, Reply, Request, weights_digest
from regiongpt.annotate.prompts import context
from regiongpt.console import quiet_libraries
from regiongpt.errors import RegionGPTError
from regiongpt.prompts import indefinite, question
from regiongpt.regions import Region


class RegionGPT(Local):
    """Captions by :class:`regiongpt.RegionPredictor`.

    The prompts are the ten that the model was trained on, with ``<region1>`` for the close-up; what the mode tells goes
    before them.

    Args:
        asking: Its options.
    """

    wants_photo = True

    def __init__(self, asking: Asking) -> None:
        super().__init__(max(64, asking.batch_size))
        quiet_libraries()
        from regiongpt.inference import RegionPredictor
        from regiongpt.model.weights import nano_path

        folder = nano_path() if asking.captioner is None else Path(asking.captioner)
        self.predictor = RegionPredictor.from_pretrained(folder, device=asking.device, dtype=asking.dtype, images=16)
        self.asking, self.name = asking, folder.resolve().name
        self.identity = {"captioner": "regiongpt", "model": self.name, "weights": weights_digest(folder)}

    def has_room(self, begun: int) -> bool:
        """Those whose regions fill a batch, and the next ones for their global captions."""
        return begun < 8

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | Exception]:
        """Ask all at once, image by image."""
        from regiongpt.inference.predictor import Question

        found: dict[int, Reply | Exception] = {}
        asked: list[int] = []
        questions: list[Question] = []
        choosing: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            if request.stage == "locate":
                choosing.setdefault(id(request.photo), []).append(place)
                continue
            text, regions = _question(request)
            seed = request.seed if self.asking.temperature else None
            questions.append(Question(text=text, regions=regions, image=request.photo, seed=seed))
            asked.append(place)
        try:
            answers = self.predictor.answers(
                questions, max_new_tokens=self.asking.max_new_tokens, temperature=self.asking.temperature
            )
            for number, answer in answers:
                if not answer.complete:
                    told = f"no end within {self.asking.max_new_tokens} tokens; raise --max-new-tokens"
                    outcome: Reply | Exception = Failed("cut off", told, tokens=(0, answer.tokens))
                elif not answer.text.strip():
                    outcome = Failed("empty answer", "expected words, got none")
                else:
                    outcome = Reply(text=answer.text.strip(), tokens_out=answer.tokens, model=self.name)
                found[asked[number]] = outcome
        except RegionGPTError as error:
            if len(requests) == 1:
                return [Failed("refused by the model", str(error))]
            return [self.answer([request])[0] for request in requests]  # one of them is at fault
        for places in choosing.values():
            found.update(zip(places, self._locate([requests[place] for place in places]), strict=True))
        return [found[place] for place in range(len(requests))]

    def _locate(self, requests: Sequence[Request]) -> Sequence[Reply | Exception]:
        """Which regions of one image the model itself takes captions to mean."""
        regions = [each.region for each in requests[0].regions]
        try:
            assert requests[0].photo is not None
            self.predictor.set_image(requests[0].photo)
            located = self.predictor.locate([request.caption for request in requests], regions)
        except RegionGPTError as error:
            return [Failed("refused by the model", str(error))] * len(requests)
        return [Reply(text=str(each.number or 0), model=self.name) for each in located]


def _question(request: Request) -> tuple[str, list[Region]]:
    if request.stage == "image":
        return question("image_caption", request.version), []
    text = question("describe", request.version, regions=[1])
    if request.category:
        text = f"The region shows {indefinite(request.category)}. {text}"
    return f"{context(request.context)} {text}" if request.context else text, [request.regions[request.number].region]

"""A RegionGPT checkpoint as the model ``regiongpt`` of lmms-eval, which finds this module by an entry point."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from regiongpt.environment import launched, progress, progress_shown
from regiongpt.errors import DataError, short
from regiongpt.images import load_image
from regiongpt.regions import Region

if TYPE_CHECKING:
    from regiongpt.inference import RegionPredictor

Request = tuple[str, Mapping[str, Any], Callable[[Any], Sequence[Any]], Mapping[str, Any], str]
"""The question as the task words it, options, what makes the images of a row, the row of the data set, the task."""


def manifest() -> Any:
    """The registration for lmms-eval; its entry point ``lmms_eval.models`` calls this."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="regiongpt", simple_class_path=f"{__name__}.RegionGPT")


def answer(predictor: "RegionPredictor", request: Request) -> str:
    """The answer to one question, about ``bbox`` (xywh) or ``segmentation`` of the row where the task has a region.

    DataError where the task shows several images or none, or asks for coordinates.
    """
    context, options, visuals, document, task = request
    if re.match(r"refcoco(\+|g)?_bbox_rec|refcoco_grounding", task):
        raise DataError(f"{task}: asks for coordinates, which RegionGPT cannot answer; see `regiongpt evaluate`")
    regions: list[Region] = []
    if named := re.match(r"refcoco(?:\+|g)?_(bbox|seg)", task):
        key = {"bbox": "bbox", "seg": "segmentation"}[named[1]]
        image, regions = document["image"], [_region(document.get(key), f"{task}: {key}")]
        context = context.replace("this region", "<region1>")
        context += "" if "<region1>" in context else " <region1>"
    else:
        images = list(visuals(document))
        if len(images) != 1:
            raise DataError(f"{task}: {len(images)} images in a question; only one is supported")
        image = images[0]
    predictor.set_image(load_image(image))
    numbers = {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0}
    given: Any = {name: type(default)(options.get(name) or default) for name, default in numbers.items()}
    said = predictor.ask(context, regions, **given).text
    until = options.get("until") or ()
    for stop in filter(None, [until] if isinstance(until, str) else until):
        said = said.partition(stop)[0]
    word = re.match(r"\s*(yes|no)\b", said, re.IGNORECASE)
    return word[1].lower() if word and task.startswith("pope") else said.strip()


def _region(value: Any, where: str) -> Region:
    try:
        numbers = [float(each) for each in value]
        if where.endswith("segmentation"):
            return Region.polygon([list(zip(numbers[::2], numbers[1::2], strict=True))])
        x, y, width, height = numbers
        return Region.box(x, y, x + width, y + height)
    except (TypeError, ValueError):
        raise DataError(f"{where}: give x, y, width, height or x, y, x, y, ..., got {short(value)}") from None


@cache
def __getattr__(name: str) -> Any:
    """``RegionGPT``, the model as lmms-eval wants it: a subclass of its own class, made when that asks for it."""
    if name != "RegionGPT":
        raise AttributeError(name)
    from lmms_eval.api.model import lmms

    class RegionGPT(lmms):  # type: ignore[misc]
        """``lmms-eval --model regiongpt --model_args pretrained=DIR``; the batch size is 1 always."""

        is_simple = True

        def __init__(
            self,
            pretrained: str = "",
            device: str | None = None,
            dtype: str | None = None,
            batch_size: Any = 1,
            max_batch_size: Any = None,
        ) -> None:
            super().__init__()
            import torch

            from regiongpt.inference import RegionPredictor

            if launched() > 1:
                from accelerate import Accelerator

                self.accelerator = Accelerator()
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
                device = str(self.accelerator.device)
            if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
                device = None  # lmms-eval says "cuda:0" where nothing was asked for
            self.predictor = RegionPredictor.from_pretrained(pretrained or None, device=device, dtype=dtype)

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Answers in the order of the requests."""
            found = []
            with progress_shown():
                for request in progress(requests, "lmms-eval", "answers"):
                    context, options, visuals, number, task, split = request.args
                    row = self.task_dict[task][split][number]
                    found.append(answer(self.predictor, (context, options, visuals, row, task)))
                    self.cache_hook.add_partial("generate_until", (context, options), found[-1])
            return found

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("RegionGPT answers tasks of the kind generate_until alone")

        generate_until_multi_round = loglikelihood

    return RegionGPT

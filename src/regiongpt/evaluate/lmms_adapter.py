"""A RegionGPT checkpoint as the model ``regiongpt`` of lmms-eval, which finds this module by an entry point."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from regiongpt.console import progress, progress_shown
from regiongpt.distributed import launched
from regiongpt.errors import ConfigError, DataError, short
from regiongpt.images import load_image
from regiongpt.prompts import question
from regiongpt.regions import Region

if TYPE_CHECKING:
    from PIL.Image import Image

    from regiongpt.inference import RegionPredictor

NAME: Final = "regiongpt"
PROMPTS: Final = ("task", "trained")
YES_NO: Final = ("first_word", "verbatim")
_LONGEST: Final = 128
_REGION_TASK: Final = re.compile(r"refcoco(\+|g)?_(bbox|seg)(?!_rec)")
_COORDINATE_TASK: Final = re.compile(r"refcoco(\+|g)?_bbox_rec|refcoco_grounding")


def manifest() -> Any:
    """What lmms-eval registers: its entry point ``lmms_eval.models`` calls this."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.RegionGPT")


class Answering:
    """The answers of a checkpoint to lmms-eval's questions; independent of lmms-eval itself.

    Args:
        predictor: The model.
        prompt: ``"task"`` keeps the benchmark's words, with ``<region1>`` for "this region"; ``"trained"`` asks in the
            words that the model was trained on.
        yes_no: Of POPE: ``"first_word"`` returns a leading yes or no alone, ``"verbatim"`` the whole answer.

    Raises:
        ConfigError: An option is none of these.
    """

    def __init__(self, predictor: "RegionPredictor", prompt: str = "task", yes_no: str = "first_word") -> None:
        for name, value, known in (("prompt", prompt, PROMPTS), ("yes_no", yes_no, YES_NO)):
            if value not in known:
                raise ConfigError(f"{name}: give {' or '.join(known)}, got {value!r}")
        self.predictor, self.prompt, self.yes_no = predictor, prompt, yes_no

    def answer(
        self,
        task: str,
        context: str,
        document: Mapping[str, Any],
        visuals: Callable[[Any], Sequence["Image"]],
        options: Mapping[str, Any],
    ) -> str:
        """The answer to one question.

        Args:
            task: Its name in lmms-eval, ``"pope"`` or ``"refcocog_bbox_val"``.
            context: The question as the task words it.
            document: The row of the data set; a task about a region has ``image`` and ``bbox`` (xywh) or
                ``segmentation`` (a flat polygon) here.
            visuals: Makes the images of a row.
            options: ``max_new_tokens``, ``temperature``, ``top_p`` and ``until``.

        Raises:
            DataError: The task shows several images or none, or asks for coordinates.
        """
        if _COORDINATE_TASK.match(task):
            raise DataError(
                f"{task}: asks for coordinates, which RegionGPT does not write; `regiongpt evaluate refcocog_rec` lets "
                "it choose among boxes"
            )
        regions: list[Region] = []
        if _REGION_TASK.match(task):
            image, regions, context = document["image"], [_region(task, document)], self._about_region(context)
        else:
            images = list(visuals(document))
            if len(images) != 1:
                raise DataError(f"{task}: {len(images)} images in a question; only tasks with one can be answered")
            image = images[0]
            if self.prompt == "trained" and task.startswith("pope"):
                context = context.strip().partition("\n")[0]  # less the line that asks for a single word
        self.predictor.set_image(load_image(image))
        said = self.predictor.ask(
            context,
            regions,
            max_new_tokens=int(options.get("max_new_tokens") or _LONGEST),
            temperature=float(options.get("temperature") or 0.0),
            top_p=float(options.get("top_p") or 1.0),
        ).text
        until = options.get("until") or ()
        for stop in filter(None, [until] if isinstance(until, str) else until):
            said = said.partition(stop)[0]
        word = re.match(r"\s*(yes|no)\b", said, re.IGNORECASE)
        return word[1].lower() if word and task.startswith("pope") and self.yes_no == "first_word" else said.strip()

    def _about_region(self, context: str) -> str:
        if self.prompt == "trained":
            return question("caption", regions=[1])
        asked = context.replace("this region", "<region1>")
        return asked if "<region1>" in asked else f"{asked} <region1>"


def _region(task: str, document: Mapping[str, Any]) -> Region:
    key, wanted = ("segmentation", "x, y, x, y, ...") if "_seg" in task else ("bbox", "x, y, width, height")
    try:
        flat = [float(value) for value in document[key]]
        if len(flat) % 2 or (key == "bbox" and len(flat) != 4):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{task}: {key}: give {wanted}, got {short(document.get(key))}") from None
    if key == "segmentation":
        return Region.polygon([list(zip(flat[::2], flat[1::2], strict=True))])
    x, y, width, height = flat
    return Region.box(x, y, x + width, y + height)


@cache
def _model_class() -> type:
    """The model as lmms-eval wants it: a subclass of its own class."""
    from lmms_eval.api.model import lmms

    class RegionGPT(lmms):  # type: ignore[misc]
        """``lmms-eval --model regiongpt --model_args pretrained=DIR,prompt=task,yes_no=first_word``."""

        is_simple = True

        def __init__(
            self,
            pretrained: str = "",
            device: str | None = None,
            dtype: str | None = None,
            prompt: str = "task",
            yes_no: str = "first_word",
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            if str(batch_size) != "1" or max_batch_size not in (None, 1):
                raise ConfigError(f"batch_size: give 1, got {batch_size}; questions are asked image by image")
            from regiongpt.inference import RegionPredictor

            if launched() > 1:
                from accelerate import Accelerator

                self.accelerator = Accelerator()
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
                device = str(self.accelerator.device)
            # lmms-eval says "cuda:0" where nothing was asked for, there being a device or not.
            import torch

            known = None if device is None or (device.startswith("cuda") and not torch.cuda.is_available()) else device
            predictor = RegionPredictor.from_pretrained(pretrained or None, device=known, dtype=dtype)
            self.answering = Answering(predictor, prompt, yes_no)

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Answers in the order of the requests."""
            found = []
            with progress_shown():
                for request in progress(requests, "lmms-eval", "answers"):
                    context, options, visuals, number, task, split = request.args
                    document = self.task_dict[task][split][number]
                    found.append(self.answering.answer(task, context, document, visuals, options))
                    self.cache_hook.add_partial("generate_until", (context, options), found[-1])
            return found

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("RegionGPT answers tasks of the kind generate_until, not loglikelihood")

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError("RegionGPT answers tasks of the kind generate_until, not of several rounds")

    return RegionGPT


def __getattr__(name: str) -> Any:
    """``RegionGPT``, made when lmms-eval asks for it."""
    if name == "RegionGPT":
        return _model_class()
    raise AttributeError(name)

"""Vision-language models of transformers, asked in batches; regions are drawn, written as numbers or cut out."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from regiongpt.drawing import draw_regions
from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.images import SquareFrame
from regiongpt.inference.engine import TooLong, pick_device, pick_dtype
from regiongpt.prompts import REC_SUFFIX, replace_placeholders
from regiongpt.regions import Region
from regiongpt.storage import reason

_LIST: Final = "[{:.0f}, {:.0f}, {:.0f}, {:.0f}]"
CONVENTIONS: Final[Mapping[str, tuple[str, str]]] = {
    # QwenLM/Qwen3-VL issue 189 for the unit; the report (arXiv 2409.12191) for the form.
    "qwen2_vl": ("<|box_start|>({:.0f},{:.0f}),({:.0f},{:.0f})<|box_end|>", "thousandths"),
    # QwenLM/Qwen3-VL issues 782 and 1126: [x1, y1, x2, y2] in a question, after resizing.
    "qwen2_5_vl": (_LIST, "pixels"),
    # QwenLM/Qwen3-VL cookbooks/2d_grounding.ipynb, issues 1427 and 1486; Qwen3.5: QwenLM/Qwen3.8-Flash-Next issue 4.
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), (_LIST, "thousandths")),
    # InternVL documentation, "Chat Data Format", grounding data.
    "internvl": (f"<box>[{_LIST}]</box>", "thousandths"),
    # haotian-liu/LLaVA issue 606: two decimals, the image padded to a square with the mean colour.
    "llava": ("[{:.2f}, {:.2f}, {:.2f}, {:.2f}]", "square"),
}
"""How a family (``model_type``) writes a box x0, y0, x1, y1, and in which unit.

That is thousandths of the sides, pixels of the image as it is resized, or shares of the image padded to a square.
"""


class Said(NamedTuple):
    """An answer, and what it took."""

    text: str
    ended: bool  # not cut off
    tokens_in: int
    tokens_out: int
    probability: float | None  # of the text and its end


class VisionLanguageModel:
    """Whatever ``AutoModelForImageTextToText`` and ``AutoProcessor`` load and whose processor has a chat template.

    Messages name the option that the folder came from, and in ``saving`` those that save memory.
    """

    def __init__(
        self, folder: Path, option: str, device: Any = None, dtype: Any = None, saving: str = "--batch-size"
    ) -> None:
        self.name, self._called, self._saving = folder.resolve().name, f"{option} {folder}", saving
        self.device = pick_device(device)
        dtype = pick_dtype(dtype, self.device)
        if dtype == torch.int8:
            raise ConfigError(f"{self._called}: int8 is for RegionGPT checkpoints alone; give another dtype")
        try:
            self.processor = AutoProcessor.from_pretrained(folder)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        except Exception as error:  # whatever the folder holds
            told = f"transformers cannot load it as a vision-language model: {reason(error)}"
            if "torchvision" in told.lower():  # of the video processors of Qwen-VL, InternVL and SmolVLM
                told = "its processor needs torchvision; run: pip install torchvision"
            raise CheckpointError(f"{self._called}: {told}") from None
        if not hasattr(self.processor, "image_processor"):
            raise CheckpointError(f"{self._called}: takes no images; give a vision-language model")
        if getattr(self.processor, "chat_template", None) is None:
            raise CheckpointError(f"{self._called}: its processor has no chat template; add chat_template.jinja")
        self._model, self.family = model.to(self.device).eval(), str(model.config.model_type)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=self.device)
        try:
            self.ask([self.region_chat(Image.new("RGB", (64, 64)), "What is it?")], 1)
        except DataError as error:
            raise CheckpointError(str(error)) from None

    def ask(self, chats: Sequence[Any], max_new_tokens: int, *, sure: bool = False, **options: Any) -> list[Said]:
        """Generate for all at once, with the probabilities if ``sure``, and greedily unless ``do_sample``.

        DataError where one of them does not fit the model's context or has an image that it cannot take.
        """
        if not options.get("do_sample"):
            options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **options}
        try:
            inputs = self.processor.apply_chat_template(
                list(chats), tokenize=True, return_dict=True, add_generation_prompt=True,
                processor_kwargs={"padding": True, "return_tensors": "pt"},
            ).to(self.device, self._model.dtype)  # fmt: skip
            read = inputs["attention_mask"].sum(1).tolist()
            context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
            if context and max(read) + max_new_tokens > context:
                raise TooLong(f"question too long: {max(read) + max_new_tokens} of {context} tokens with its answer")
            with torch.inference_mode():
                out = self._model.generate(
                    **inputs, **options, max_new_tokens=max_new_tokens, return_dict_in_generate=True,
                    output_logits=sure, pad_token_id=self.processor.tokenizer.pad_token_id,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            told = f"out of memory with {len(chats)} images at a time; lower {self._saving}"
            raise ConfigError(f"{self._called}: {told}") from None
        except TemplateError as error:
            told = f"its chat template does not take an image and a text: {reason(error)}"
            raise CheckpointError(f"{self._called}: {told}") from None
        except ValueError as error:
            raise DataError(f"{self._called}: transformers cannot answer: {reason(error)}") from None
        written = out.sequences[:, inputs["input_ids"].shape[1] :]
        ends = torch.isin(written, self.ends)
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, written.shape[1]).tolist()
        likely: list[float | None] = [None] * len(chats)
        if sure:
            steps = torch.stack(out.logits, 1).float().log_softmax(-1).gather(2, written[..., None])[..., 0]
            likely = [min(1.0, float(row[:length].sum().exp())) for row, length in zip(steps, lengths, strict=True)]
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        return list(map(Said, texts, ends.any(1).tolist(), read, lengths, likely))

    def region_chat(
        self, image: Image.Image, question: str, regions: Sequence[Region] = (), region_as: str = "",
        names: Sequence[str] = (),
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The turn that asks a question with ``<regionN>`` about regions of an image, at most one for ``crop``.

        Where the question asks for the names of a closed set, it lists ``names`` instead. Of a mask, coordinates and
        crop tell the bounds.
        """
        several = len(regions) > 1
        picture, called = image, {n: f"region {n}" if several else "the region" for n in range(1, len(regions) + 1)}
        if regions and region_as == "outline":
            picture = draw_regions(image, regions, plain=True)
            question = f"The regions are outlined and numbered in the image. {question}" if several else question
            called = called if several else {1: "the outlined region"}
        elif regions and region_as == "crop":
            picture, called = image.crop(regions[0].close_up(*image.size, 0, 1)), {1: "this image"}
        elif regions:
            called = {n: f"{called[n]} {self.box_text(region, image.size)}" for n, region in enumerate(regions, 1)}
        text = replace_placeholders(question, called.__getitem__).replace(REC_SUFFIX, f"{REC_SUFFIX} x is its number.")
        if names:
            listed = f"Answer with one of these names alone: {', '.join(names)}."
            text = re.sub(r"Answer the question using .* category names\.$", lambda _: listed, text)
        images = self.processor.image_processor
        cuts = getattr(images, "do_center_crop", False) and not hasattr(images, "image_grid_pinpoints")
        if cuts or self.family == "llava":  # lest the sides of the image be lost
            red, green, blue = (int(255 * share) for share in images.image_mean)
            picture = SquareFrame(*picture.size).pad(picture, (red, green, blue))
        return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]

    def box_text(self, region: Region, size: tuple[int, int]) -> str:
        """The box around a region of an image of W x H, as the model's family writes it."""
        text, unit = CONVENTIONS[self.family]
        corners, frame = np.reshape(region.bounds(*size), (2, 2)), SquareFrame(*size)
        if unit == "square":
            return text.format(*((corners + frame.offset) / frame.side).ravel())
        scale = _resized(self.processor.image_processor, size) if unit == "pixels" else (1000, 1000)
        return text.format(*(corners / size * scale).ravel())


@cache
def _resized(images: Any, size: tuple[int, int]) -> tuple[int, int]:
    """W x H to which an image processor resizes an image of W x H."""
    _, rows, columns = images(images=Image.new("RGB", size), return_tensors="pt")["image_grid_thw"][0].tolist()
    return columns * images.patch_size, rows * images.patch_size

"""A vision-language model of transformers in a folder (LLaVA, Qwen-VL, SmolVLM, ...), asked in batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from regiongpt.annotate.captioners import Asking, Failed, Local, Reply, Request, weights_digest
from regiongpt.console import quiet_libraries
from regiongpt.errors import CheckpointError, ConfigError


class TransformersVLM(Local):
    """Whatever ``AutoModelForImageTextToText`` and ``AutoProcessor`` load and whose processor has a chat template.

    Args:
        asking: Its options.

    Raises:
        CheckpointError: It cannot be loaded, takes no pictures or has no chat template.
    """

    def __init__(self, asking: Asking) -> None:
        super().__init__(asking.batch_size)
        quiet_libraries()
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
            told = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise CheckpointError(
                f"--captioner {folder}: not a vision-language model that transformers loads: {told}"
            ) from None
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

    def picture(self, image: Image.Image) -> Image.Image:
        """The pixels themselves."""
        return image

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | Exception]:
        """Generate for all at once; where memory does not do, for halves of them."""
        try:
            return self._generate(requests)
        except self._torch.OutOfMemoryError:
            if len(requests) == 1:
                raise ConfigError(
                    f"--captioner {self.name}: no memory for one picture; lower --crop-most or --max-new-tokens"
                ) from None
        self.batch_size = len(requests) // 2
        return [*self.answer(requests[: self.batch_size]), *self.answer(requests[self.batch_size :])]

    def _generate(self, requests: Sequence[Request]) -> list[Reply | Exception]:
        torch = self._torch
        inputs = self._processor.apply_chat_template(
            [_messages(request) for request in requests],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            padding=True,
        ).to(self._device, self._model.dtype)
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.asking.temperature:
            torch.manual_seed(sum(request.seed for request in requests) % 2**31)
            options = {"do_sample": True, "temperature": self.asking.temperature}
        with torch.inference_mode():
            written = self._model.generate(
                **inputs,
                max_new_tokens=self.asking.max_new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
                **options,
            )[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(written, self._ends)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, written.shape[1]).tolist()
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        outcomes: list[Reply | Exception] = []
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            tokens = int(inputs["attention_mask"][row].sum()), length
            if not ended[row].any():
                told = f"no end within {self.asking.max_new_tokens} tokens; raise --max-new-tokens"
                outcomes.append(Failed("cut off", told, tokens=tokens))
            elif not text.strip():
                outcomes.append(Failed("empty answer", "expected words, got none", tokens=tokens))
            else:
                outcomes.append(Reply(text=text.strip(), tokens_in=tokens[0], tokens_out=length, model=self.name))
        return outcomes


def _messages(request: Request) -> list[dict[str, Any]]:
    lead = [{"type": "text", "text": request.lead}] if request.lead else []
    picture = {"type": "image", "image": request.picture}
    return [{"role": "user", "content": [*lead, picture, {"type": "text", "text": request.text}]}]

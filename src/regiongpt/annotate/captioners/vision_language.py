"""A vision-language model of transformers: LLaVA, Qwen-VL, SmolVLM and others with a chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from regiongpt.annotate.captioners import Captioner, Reply, Request
from regiongpt.annotate.options import Options
from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.inference.engine import pick_device, pick_dtype
from regiongpt.storage import reason, weights_digest


class VisionLanguageModel(Captioner):
    """Whatever ``AutoModelForImageTextToText`` and ``AutoProcessor`` load and whose processor has a chat template."""

    wants_image = False

    def __init__(self, options: Options) -> None:
        folder = Path(str(options.captioner))
        self.options, self.name, self._device = options, folder.resolve().name, pick_device(options.device)
        try:
            self._processor = AutoProcessor.from_pretrained(folder)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=pick_dtype(options.dtype, self._device))
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            told = f"transformers cannot load it as a vision-language model: {reason(error)}"
            raise CheckpointError(f"--captioner {folder}: {told}") from None
        if not hasattr(self._processor, "image_processor"):
            raise CheckpointError(f"--captioner {folder}: takes no images; give a vision-language model")
        if getattr(self._processor, "chat_template", None) is None:
            raise CheckpointError(f"--captioner {folder}: its processor has no chat template; add chat_template.jinja")
        self._model = model.to(self._device).eval()
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
        self._ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=self._device)
        identity = {"captioner": "transformers", "model": self.name, "weights": weights_digest(folder)}
        super().__init__(identity, options.batch_size, images=options.batch_size)

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply]:
        """Generate for all at once."""
        most, pad = self.options.max_new_tokens, self._processor.tokenizer.pad_token_id
        inputs = self._processor.apply_chat_template(
            [request.messages({"type": "image", "image": request.picture}) for request in requests],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, padding=True,
        ).to(self._device, self._model.dtype)  # fmt: skip
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.options.temperature:
            torch.manual_seed(sum(request.seed for request in requests) % 2**31)
            sampling = {"do_sample": True, "temperature": self.options.temperature}
        try:
            with torch.inference_mode():
                written = self._model.generate(**inputs, **sampling, max_new_tokens=most, pad_token_id=pad)
        except torch.OutOfMemoryError:
            told = f"out of memory with {len(requests)} images at a time; lower --batch-size or --crop-most"
            raise ConfigError(f"--captioner {self.name}: {told}") from None
        written = written[:, inputs["input_ids"].shape[1] :]
        ends = torch.isin(written, self._ends)
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, written.shape[1]).tolist()
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        read = inputs["attention_mask"].sum(1).tolist()
        return [
            Reply(text=text, ended=ended, tokens_in=tokens_in, tokens_out=tokens_out, model=self.name)
            for text, tokens_in, tokens_out, ended in zip(texts, read, lengths, ends.any(1).tolist(), strict=True)
        ]

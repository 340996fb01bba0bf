"""How well captions fit crops, by CLIP or SigLIP."""

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from regiongpt.errors import CheckpointError
from regiongpt.inference.engine import pick_device
from regiongpt.storage import read_json, reason, weights_digest


class Similarity:
    """Scores captions; ``identity`` stands for the model.

    A caption longer than the text tower's window is scored sentence by sentence, a sentence that is longer still in
    halves; no word is left out. The score is the cosine of crop and part, averaged over the parts with their numbers of
    tokens as weights; ``least`` is that of the worst part.

    Raises:
        CheckpointError: The folder holds no CLIP or SigLIP model.
    """

    def __init__(self, path: Path, device: str | None = None) -> None:
        kind = read_json(path / "config.json", CheckpointError).get("model_type")
        if kind not in ("clip", "siglip"):
            raise CheckpointError(f"{path}: expected a CLIP or SigLIP model, got {kind!r}")
        self._device = pick_device(device)
        try:
            self._model = AutoModel.from_pretrained(path).to(self._device).eval()
            self._processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be loaded: {reason(error)[:200]}") from None
        self._pads, self._lock = kind == "siglip", threading.Lock()  # one batch at a time
        self.window = int(self._model.config.text_config.max_position_embeddings)
        self.identity = f"{path.resolve().name} {weights_digest(path)}"

    def score(self, crops: Sequence[Image.Image], captions: Sequence[str]) -> list[dict[str, float]]:
        """Cosines of crops and their captions; NaN-free, ``{"similarity": ..., "least": ...}`` each."""
        parts = [self.parts(caption) for caption in captions]
        flat = [part for own in parts for part in own]
        # SigLIP was trained on text padded to its window and attends to the padding; CLIP is the other way round.
        padded = {"padding": "max_length", "max_length": self.window} if self._pads else {"padding": True}
        tokens = {**self._processor.tokenizer(flat, return_tensors="pt", **padded).to(self._device)}
        if self._pads:
            tokens = {"input_ids": tokens["input_ids"]}
        pixels = self._processor.image_processor(images=list(crops), return_tensors="pt").to(self._device)
        with self._lock, torch.inference_mode():
            seen, read = _unit(self._model.get_image_features(**pixels)), _unit(self._model.get_text_features(**tokens))
        found = []
        for own, features, crop in zip(parts, read.split([len(own) for own in parts]), seen, strict=True):
            cosines = (features @ crop).double().cpu().numpy()
            mean = np.average(cosines, weights=[self._length(part) for part in own])
            found.append({"similarity": float(mean), "least": float(cosines.min())})
        return found

    def parts(self, caption: str) -> list[str]:
        """A caption as it is if it fits the window, else its sentences, each halved between words until it fits."""
        if self._length(caption) <= self.window:
            return [caption]
        pieces = re.findall(r"\S.*?(?:[.!?]+(?=\s)|$)", caption, re.DOTALL)
        if len(pieces) == 1:
            words_of = caption.split(" ")
            joint, pieces = (" ", words_of) if len(words_of) > 1 else ("", list(caption))
            middle = len(pieces) // 2
            pieces = [joint.join(pieces[:middle]), joint.join(pieces[middle:])]
        return [part for piece in pieces for part in self.parts(piece)]

    def _length(self, text: str) -> int:
        return len(self._processor.tokenizer(text)["input_ids"])


def _unit(output: Any) -> Any:
    """Normalized features, of transformers that returns them by themselves or in an output."""
    features = getattr(output, "pooler_output", output)
    return features / features.norm(dim=-1, keepdim=True)

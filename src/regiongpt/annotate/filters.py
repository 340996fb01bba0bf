"""Columns of doubts about a caption and its fit to the crop, and the decision to keep it.

No caption is deleted, and the decision can be taken again from the columns alone (paper §3.3).
"""

import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from regiongpt.annotate.captioners import weights_digest
from regiongpt.annotate.options import Doubt, Filters
from regiongpt.annotate.plan import WORDING
from regiongpt.errors import CheckpointError
from regiongpt.storage import read_json, reason

_REFUSING: Final = re.compile(
    r"\b(i(?:'m| am) (?:sorry|unable|not able)|i (?:can ?not|can't|do not|don't) (?:see|tell|describe|determine|help)|"
    r"as an ai|unable to (?:see|describe|determine|identify)|no image (?:was|is) (?:provided|attached))",
    re.IGNORECASE,
)
_ABOUT_IMAGE: Final = re.compile(
    r"^\W*(?:in )?(?:the|this|that) (?:entire |whole |overall |given )?(?:image|picture|photo|photograph|scene)\b",
    re.IGNORECASE,
)
_WORD: Final = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def judge(caption: str, category: str, others: Sequence[str], located: int | None, number: int) -> dict[str, Any]:
    """The columns of one caption that need no model.

    ``others`` are the classes of all regions of the image; ``number`` is the region, from 1, that it was written for,
    ``located`` the one that a model took it to describe: 0 for none, None where that was not asked.
    """
    said, own = words(caption), _ways(category)
    foreign = {way for other in {*others} - {category} for way in _ways(other)} - {*own}
    text = rest = f" {' '.join(said)} "
    # A part of the class's own name names nothing else: a hot dog is no dog.
    for way in sorted(own, key=len, reverse=True):
        rest = rest.replace(f" {way} ", " _ ")
    sentences = [joined for part in re.split(r"[.!?]+\s", caption + " ") if (joined := " ".join(words(part)))]
    runs = Counter(zip(said, said[1:], said[2:], said[3:], strict=False))
    return {
        "words": len(said),
        "names_class": any(f" {way} " in text for way in own) if category else None,
        "names_other": any(f" {way} " in rest for way in foreign),
        "repeated": len(sentences) != len({*sentences}) or max(runs.values(), default=0) >= 3,
        "refusing": bool(_REFUSING.search(caption)),
        "about_image": bool(_ABOUT_IMAGE.search(caption)),
        "located": located,
        "located_back": None if located is None else located == number,
    }


def least_of_share(share: float, scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The least similarity of the top share of each class."""
    best = {category: sorted(values, reverse=True) for category, values in scores.items()}
    return {category: values[max(1, round(share * len(values))) - 1] for category, values in best.items()}


def why_not(row: Mapping[str, Any], filters: Filters, least: Mapping[str, float]) -> str:
    """Why a caption is not kept, ``""`` where it is; ``least`` is the similarity of a top share by class."""
    unnamed = row["names_class"] is False
    holds: dict[Doubt, bool] = {
        "short": row["words"] < filters.min_words, "repeated": row["repeated"], "refusing": row["refusing"],
        "about_image": row["about_image"], "unnamed": unnamed, "other_class": unnamed and row["names_other"],
        "not_located": row["located_back"] is False,
    }  # fmt: skip
    for doubt, true in holds.items():
        if true and doubt in filters.reject:
            return doubt
    similarity = row["similarity"]
    if similarity is None:
        return "no similarity" if least or filters.min_similarity is not None else ""
    if filters.min_similarity is not None and similarity < filters.min_similarity:
        return f"similarity below {filters.min_similarity:g}"
    if similarity < least.get(row["category"], -np.inf):
        return f"not among the best {filters.top_share:.0%} of its class"
    return ""


@cache
def _ways(category: str) -> tuple[str, ...]:
    """Words that name a class, in lower case: its own, its plural and its synonyms'."""
    name = " ".join(words(re.sub(r"\(.*?\)|_", " ", category)))
    if not name:
        return ()
    found = []
    for each in (name, *WORDING["synonyms"].get(name, ())):
        found += [f"{each}{ending}" for ending in ("", "s", "es", "'s")]
        found += [f"{each[:-1]}ies"] if each.endswith("y") else []
    return tuple(found)


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
            raise CheckpointError(f"--similarity {path}: expected a CLIP or SigLIP model, got {kind!r}")
        import torch
        from transformers import AutoModel, AutoProcessor

        from regiongpt.inference.engine import pick_device

        try:
            self._device = pick_device(device)
            self._model = AutoModel.from_pretrained(path).to(self._device).eval()
            self._processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"--similarity {path}: cannot be loaded: {reason(error)[:200]}") from None
        self._torch, self._pads, self._lock = torch, kind == "siglip", threading.Lock()  # one batch at a time
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
        with self._lock, self._torch.inference_mode():
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

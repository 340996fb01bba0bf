"""What is doubtful about a caption, as columns; a threshold, a top share a class, or both decide what is kept.

Nothing here deletes a caption, and the decision can be taken again from the columns alone.

Paper: §3.3 (captions are filtered by CLIP similarity)
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt

from regiongpt.annotate.captioners import weights_digest
from regiongpt.errors import CheckpointError
from regiongpt.settings import Settings
from regiongpt.storage import read_json

Doubt = Literal["short", "repeated", "refusing", "about_image", "unnamed", "other_class", "not_located"]

SYNONYMS: Final[dict[str, tuple[str, ...]]] = {
    "person": (
        "people", "man", "men", "woman", "women", "boy", "girl", "child", "children", "kid", "baby", "player", "rider",
        "skier", "surfer", "skateboarder", "snowboarder", "lady", "guy", "gentleman", "adult", "toddler", "pedestrian",
    ),
    "bicycle": ("bike", "cycle"), "motorcycle": ("motorbike", "scooter", "bike"),
    "airplane": ("plane", "aircraft", "jet", "airliner"), "car": ("vehicle", "sedan", "suv", "taxi", "cab"),
    "truck": ("lorry", "pickup", "van"), "boat": ("ship", "canoe", "kayak", "sailboat", "vessel"),
    "traffic light": ("stoplight", "traffic signal"), "fire hydrant": ("hydrant",), "bird": ("gull", "duck", "pigeon"),
    "cat": ("kitten",), "dog": ("puppy",), "cow": ("cattle", "bull", "calf"), "sheep": ("lamb",), "horse": ("pony",),
    "handbag": ("bag", "purse"), "backpack": ("bag", "rucksack"), "suitcase": ("luggage", "bag"), "tie": ("necktie",),
    "sports ball": ("ball", "baseball", "football", "tennis ball"), "skis": ("ski",),
    "baseball glove": ("mitt", "glove"),
    "baseball bat": ("bat",), "tennis racket": ("racket", "racquet"), "wine glass": ("glass", "goblet"),
    "cup": ("mug", "glass"), "donut": ("doughnut",), "cake": ("cupcake",), "couch": ("sofa", "settee"),
    "potted plant": ("plant", "houseplant"), "dining table": ("table",), "tv": ("television", "monitor", "screen"),
    "cell phone": ("phone", "smartphone", "mobile"), "remote": ("remote control", "controller"),
    "mouse": ("computer mouse",), "refrigerator": ("fridge",), "hair drier": ("hair dryer", "hairdryer", "blow dryer"),
    "teddy bear": ("stuffed bear", "stuffed animal", "teddy"), "hot dog": ("hotdog",), "toilet": ("commode",),
}  # fmt: skip
"""Other names of COCO's classes; a class without any is named by its own words alone."""

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


class Filters(Settings):
    """Which captions are kept; the others stay in the table of all captions, with the reason."""

    reject: tuple[Doubt, ...] = ("short", "repeated", "refusing", "about_image")
    """doubts that reject a caption: short, repeated, refusing, about_image, unnamed, other_class, not_located"""
    min_words: NonNegativeInt = 5
    """words below which a caption is short"""
    min_similarity: float | None = None
    """least similarity of crop and caption, as --similarity measures it"""
    top_share: float | None = Field(None, gt=0, le=1)
    """of each class, keep this share of the captions: the most similar"""


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def judge(caption: str, category: str, others: Sequence[str], located: int | None, number: int) -> dict[str, Any]:
    """The columns of one caption that need no model.

    Args:
        caption: Of the region.
        category: Its class; ``""`` where it has none.
        others: Classes of the image's other regions.
        located: Which region a model took it to describe, from 1, 0 for none; None where that was not asked.
        number: Which region it was written for, from 1.
    """
    said = words(caption)
    names = [set(_ways(other)) - set(_ways(category)) for other in {*others} - {category}]
    text = f" {' '.join(said)} "
    # A part of the class's own name names nothing else: a hot dog is no dog.
    rest = text
    for way in sorted(_ways(category), key=len, reverse=True):
        rest = rest.replace(f" {way} ", " _ ")
    return {
        "words": len(said),
        "names_class": any(f" {way} " in text for way in _ways(category)) if category else None,
        "names_other": any(f" {way} " in rest for ways in names for way in ways),
        "repeated": _repeats(caption, said),
        "refusing": bool(_REFUSING.search(caption)),
        "about_image": bool(_ABOUT_IMAGE.search(caption)),
        "located": located,
        "located_back": None if located is None else located == number,
    }


def doubts(row: Mapping[str, Any], filters: Filters) -> list[str]:
    """Which of the doubts hold for a caption's columns."""
    holds = {
        "short": row["words"] < filters.min_words,
        "repeated": row["repeated"],
        "refusing": row["refusing"],
        "about_image": row["about_image"],
        "unnamed": row["names_class"] is False,
        "other_class": row["names_other"] and row["names_class"] is False,
        "not_located": row["located_back"] is False,
    }
    return [name for name, true in holds.items() if true]


class Decision:
    """Keeps or rejects captions, after one look at the scores of all.

    Args:
        filters: The rules.
        scores: Of each class, the similarities of its captions without another reason against them.
    """

    def __init__(self, filters: Filters, scores: Mapping[str, Sequence[float]]) -> None:
        self.filters = filters
        self._least: dict[str, float] = {}
        if filters.top_share is not None:
            for category, values in scores.items():
                best = np.sort(np.asarray(values))[::-1]
                self._least[category] = float(best[max(1, round(filters.top_share * len(best))) - 1])

    def why_not(self, row: Mapping[str, Any]) -> str:
        """Why a caption is not kept; ``""`` where it is."""
        if found := [doubt for doubt in doubts(row, self.filters) if doubt in self.filters.reject]:
            return found[0]
        least, similarity = self.filters.min_similarity, row["similarity"]
        if (least is not None or self._least) and similarity is None:
            return "no similarity"
        if least is not None and similarity < least:
            return f"similarity below {least:g}"
        if similarity is not None and similarity < self._least.get(row["category"], -np.inf):
            return f"not among the best {self.filters.top_share:.0%} of its class"
        return ""


@cache
def _ways(category: str) -> tuple[str, ...]:
    """Words that name a class, in lower case: its own, its plural and its synonyms'."""
    name = " ".join(words(re.sub(r"\(.*?\)|_", " ", category)))
    if not name:
        return ()
    found = []
    for each in (name, *SYNONYMS.get(name, ())):
        ending = "ies" if re.search(r"[^aeiou]y$", each) else "es" if re.search(r"(s|x|ch|sh)$", each) else "s"
        found += [each, (each[:-1] if ending == "ies" else each) + ending, f"{each}'s"]
    return tuple(found)


def _repeats(caption: str, said: Sequence[str]) -> bool:
    """Whether a sentence comes twice, or four words in a row three times."""
    sentences = [" ".join(words(sentence)) for sentence in re.split(r"[.!?]+\s", caption + " ")]
    sentences = [sentence for sentence in sentences if sentence]
    runs = Counter(zip(said, said[1:], said[2:], said[3:], strict=False))
    return len(sentences) != len(set(sentences)) or max(runs.values(), default=0) >= 3


class Similarity:
    """How well captions fit their crops, by a CLIP or SigLIP model of transformers.

    A caption longer than the text tower's window is scored sentence by sentence, a sentence that is longer still in
    halves; no word is left out. The score is the cosine of crop and part, averaged over the parts with their numbers of
    tokens as weights; ``least`` is that of the worst part.

    Args:
        path: The model's folder.
        device: cuda, cuda:N, mps or cpu; the first of these that is there where None.

    Raises:
        CheckpointError: It is no CLIP or SigLIP model.
    """

    def __init__(self, path: Path, device: str | None = None) -> None:
        if not (path / "config.json").is_file():
            raise CheckpointError(f"--similarity {path}: not a model's folder, there is no config.json in it")
        kind = read_json(path / "config.json", CheckpointError).get("model_type")
        if kind not in ("clip", "siglip"):
            raise CheckpointError(f"--similarity {path}: expected a CLIP or SigLIP model, got {kind!r}")
        from regiongpt.console import quiet_libraries

        quiet_libraries()
        import torch
        from transformers import AutoModel, AutoProcessor

        from regiongpt.inference.engine import pick_device

        try:
            self._device = pick_device(device)
            self._model = AutoModel.from_pretrained(path).to(self._device).eval()
            self._processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"--similarity {path}: cannot be loaded: {str(error).splitlines()[0][:200]}"
            ) from None
        self._torch, self._pads = torch, kind == "siglip"
        self.window = int(self._model.config.text_config.max_position_embeddings)
        self.identity: Mapping[str, Any] = {"similarity": path.resolve().name, "weights": weights_digest(path)}

    def score(self, crops: Sequence[Image.Image], captions: Sequence[str]) -> list[dict[str, float]]:
        """Cosines of crops and their captions; NaN-free, ``{"similarity": ..., "least": ...}`` each."""
        torch = self._torch
        parts = [self.parts(caption) for caption in captions]
        flat = [part for own in parts for part in own]
        with torch.inference_mode():
            pixels = self._processor.image_processor(images=list(crops), return_tensors="pt").to(self._device)
            seen = _unit(self._model.get_image_features(**pixels))
            # SigLIP was trained on text padded to its window and attends to the padding; CLIP is the other way round.
            options: dict[str, Any] = (
                {"padding": "max_length", "max_length": self.window} if self._pads else {"padding": True}
            )
            tokens = self._processor.tokenizer(flat, return_tensors="pt", **options).to(self._device)
            if self._pads:
                tokens = {"input_ids": tokens["input_ids"]}
            read = _unit(self._model.get_text_features(**tokens))
        found, start = [], 0
        for row, own in enumerate(parts):
            cosines = (read[start : start + len(own)] @ seen[row]).double().cpu().numpy()
            weights = np.array([self._length(part) for part in own], float)
            found.append({"similarity": float(cosines @ weights / weights.sum()), "least": float(cosines.min())})
            start += len(own)
        return found

    def parts(self, caption: str) -> list[str]:
        """A caption as it is if it fits the window, else its sentences, cut between words where one does not fit."""
        if self._length(caption) <= self.window:
            return [caption]
        sentences = re.findall(r"\S.*?(?:[.!?]+(?=\s)|$)", caption, re.DOTALL)
        return [part for sentence in sentences for part in self._halves(sentence)]

    def _halves(self, text: str) -> list[str]:
        if self._length(text) <= self.window:
            return [text]
        pieces = text.split(" ")
        joint, pieces = (" ", pieces) if len(pieces) > 1 else ("", list(text))
        middle = len(pieces) // 2
        return [*self._halves(joint.join(pieces[:middle])), *self._halves(joint.join(pieces[middle:]))]

    def _length(self, text: str) -> int:
        return len(self._processor.tokenizer(text)["input_ids"])


def _unit(output: Any) -> Any:
    """Normalized features, of transformers that returns them by themselves or in an output."""
    features = getattr(output, "pooler_output", output)
    return features / features.norm(dim=-1, keepdim=True)

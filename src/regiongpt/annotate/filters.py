"""Columns of doubts about a caption, and the decision to keep it, from the columns alone (paper §3.3)."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

from regiongpt.annotate.options import Doubt, Filters
from regiongpt.annotate.plan import WORDING

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
    """The columns of a caption of region ``number``, from 1; ``others`` are the classes of all regions of the image.

    ``located`` is the region that a model took it to describe: 0 for none, None where that was not asked.
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
    if similarity < least.get(row["category"], -1):
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

"""POPE's questions: read as they were published, or built by POPE's rules for any annotated images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from regiongpt.data.convert.jsonl import iter_lines
from regiongpt.data.convert.values import image_name, plain_text, short
from regiongpt.data.shards import Fault, Rejects
from regiongpt.errors import ConfigError, DataError
from regiongpt.prompts import indefinite

STRATEGIES: Final = ("random", "popular", "adversarial")
"""How absent classes are chosen: any; the commonest of the set; the ones that come most often with the one there."""


class Asked(NamedTuple):
    """One yes-or-no question."""

    number: str
    image: str
    text: str
    label: str
    category: str


def read_questions(path: Path, rejects: Rejects) -> list[Asked]:
    """A published file: json lines with ``question_id``, ``image``, ``text`` and ``label`` (yes or no).

    Raises:
        DataError: The file has no question that can be used.
    """
    found: dict[str, Asked] = {}
    for number, entry in iter_lines(path, rejects):
        with rejects.noting(path, number):
            key, image, label = entry.get("question_id", number), entry.get("image"), entry.get("label")
            label = label.lower() if isinstance(label, str) else label
            if isinstance(key, bool) or not isinstance(key, int | str) or label not in ("yes", "no"):
                wanted = "question_id, image, text and the label yes or no"
                raise Fault("question of another form", f"expected {wanted}, got {short(entry)}")
            if str(key) in found:
                raise Fault("duplicate id", f"expected each question_id once, got {key} again")
            text = plain_text(entry.get("text"), "question")
            found[str(key)] = Asked(str(key), image_name(image), text, label, "")
    if not found:
        raise DataError(f"{path}: expected questions with image, text and label, found none; {rejects.summary()}")
    return list(found.values())


def build_questions(
    classes: Mapping[int, Sequence[str]],
    names: Mapping[int, str],
    strategy: str,
    *,
    images: int = 500,
    pairs: int = 3,
    seed: int = 0,
) -> list[tuple[int, Asked]]:
    """Questions by POPE's rules: as many with the answer yes as with no, for images of more than ``pairs`` classes.

    For each of an image's ``pairs`` classes that are there, one that is not: by ``random`` any; by ``popular`` the one
    that most images of the set have; by ``adversarial`` the one that comes in most images together with the class that
    is there. No class is asked for twice in an image; where the strategy has none left, any other is drawn.

    Args:
        classes: Of all annotated images, the classes there; they also say what is popular and what comes together.
        names: File name of each image.
        strategy: One of :data:`STRATEGIES`.
        images: Most images that are asked about, drawn by the seed.
        pairs: Questions of either answer for an image.
        seed: Of every choice.

    Returns:
        Image ids with their questions, by image id.

    Raises:
        ConfigError: No such strategy, or a number below 1.
        DataError: No image has enough classes, or the set has too few.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if images < 1 or pairs < 1:
        raise ConfigError(f"expected at least 1 image and 1 pair of questions, got {images} and {pairs}")
    there = {number: sorted(set(those)) for number, those in sorted(classes.items())}
    often = Counter(name for those in there.values() for name in those)
    together: dict[str, Counter[str]] = {name: Counter() for name in often}
    for those in there.values():
        for name in those:
            together[name].update(other for other in those if other != name)
    usable = [number for number, those in there.items() if len(those) > pairs and len(often) - len(those) >= pairs]
    if not usable:
        raise DataError(
            f"expected images with more than {pairs} classes, and {pairs} others that they lack, found none among "
            f"{len(there)} images of {len(often)} classes"
        )
    drawn = np.random.default_rng((seed, 0)).permutation(len(usable))[:images]
    found = []
    for number in sorted(usable[k] for k in drawn.tolist()):
        rng = np.random.default_rng((seed, 1, number))
        own = there[number]
        absent = [name for name in often if name not in own]
        asked: set[str] = set()
        for turn, k in enumerate(rng.permutation(len(own))[:pairs].tolist()):
            present = own[k]
            if strategy == "popular":
                ranked = _ranked(often, absent)
            elif strategy == "adversarial":
                ranked = _ranked(together[present], absent)
            else:
                ranked = []
            left = [name for name in ranked if name not in asked]
            others = sorted(name for name in absent if name not in asked)
            no = left[0] if left else others[int(rng.integers(len(others)))]
            asked.add(no)
            for half, (name, label) in enumerate(((present, "yes"), (no, "no"))):
                key = f"{number}-{2 * turn + half + 1}"
                text = f"Is there {indefinite(name)} in the image?"
                found.append((number, Asked(key, names[number], text, label, name)))
    return found


def _ranked(counts: Counter[str], absent: Sequence[str]) -> list[str]:
    """The absent classes that were counted, the commonest first, those alike by name."""
    return sorted((name for name in absent if counts[name]), key=lambda name: (-counts[name], name))

"""What sentences call each object: its class where the model has learned to tell it, else a wider word.

Measured between the paper's two stages, by how alike what the connector writes for an object is to the names of the
classes. The language model then learns to name what can be told, and to say less of the rest.
"""

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from alignment import SHARPNESS, ClassWords, likeness
from features import FeatureStore, blurred
from numpy.typing import NDArray
from torch import Tensor

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import GROUPS, OBJECT, View
from regiongpt.environment import progress
from regiongpt.prompts import COCO_80
from regiongpt.regions import Region

log = logging.getLogger(__name__)

NAMES = [*GROUPS, OBJECT]
_GROUP_OF = np.array(
    [next((k for k, each in enumerate(GROUPS.values()) if name in each), len(GROUPS)) for name in COCO_80]
)


class Words(NamedTuple):
    """What to call objects instead of their class, by ids of image and annotation.

    Attributes:
        fast: Without a second look.
        careful: With one; the same where the model takes none.
        confused: Mean probability, careful, that objects of a class were given for each class, (80, 80).
    """

    fast: Mapping[tuple[int, int], str]
    careful: Mapping[tuple[int, int], str]
    confused: NDArray[np.float64]


def words_of(
    images: Sequence[ImageAnnotations],
    store: FeatureStore,
    model: Any,
    processor: Any,
    words: ClassWords,
    sure: float,
    held: Container[int],
    blur: float = 0.0,
) -> Words:
    """Find words of which the share ``sure`` would be true, for every object of the images.

    Args:
        images: Annotated images, in the order of the feature store.
        store: Their features and crops.
        model: RegionGPT after alignment.
        processor: Its processor.
        words: Names of the classes, with the shares that they have among the objects.
        sure: The share of an object's names, of those with its certainty or more, that must be true, in (0, 1).
        held: Ids of images that the model has not learned from, by whose objects it is measured.
        blur: As stage 2 blurs features.
    """
    ids, classes, found = certainties(images, store, model, processor, words, blur)
    unseen = np.array([image in held for image, _ in ids])
    spoken = []
    for shares in found:
        named = shares.argmax(1) == classes
        least = certainty(shares.max(1)[unseen], named[unseen], sure)
        wide = group_shares(shares)
        open_ = shares.max(1) < least
        group = _GROUP_OF[classes]
        right = (wide.argmax(1) == group) & (group < len(GROUPS))
        judged = open_ & unseen
        least_wide = certainty(wide.max(1)[judged], right[judged], sure)
        wider = open_ & (wide.max(1) >= least_wide)
        count = max(1, unseen.sum())
        told = (100 * (1 - judged.sum() / count), least, 100 * wider[unseen].sum() / count, least_wide)
        log.info("naming: %.0f %% of the objects by class (certainty %.2f), %.0f %% by a wider word (%.2f)", *told)
        spoken.append(
            {ids[k]: NAMES[group[k]] if wider[k] else OBJECT for k in np.flatnonzero(open_)}  # the rest by their class
        )
    confused = np.stack([found[-1][classes == k].sum(0) / max((classes == k).sum(), 1) for k in range(len(COCO_80))])
    return Words(spoken[0], spoken[-1], confused.astype(np.float64))


def group_shares(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities (N, 8) of the wider words from those of the classes (N, 80)."""
    return np.stack([shares[:, k == _GROUP_OF].sum(1) for k in range(len(GROUPS))], 1)


def certainty(scores: NDArray[np.float32], right: NDArray[np.bool_], sure: float) -> float:
    """The lowest score such that of all with as high a one or higher the share ``sure`` is right."""
    order = np.argsort(-scores, kind="stable")
    enough = np.flatnonzero(right[order].cumsum() / np.arange(1, len(order) + 1) >= sure)
    return float(scores[order[enough[-1]]]) if len(enough) else float("inf")


@torch.no_grad()
def certainties(
    images: Sequence[ImageAnnotations],
    store: FeatureStore,
    model: Any,
    processor: Any,
    words: ClassWords,
    blur: float = 0.0,
) -> tuple[list[tuple[int, int]], NDArray[np.int64], list[NDArray[np.float32]]]:
    """Ids and classes (N,) of all objects, and probabilities (N, 80) of the classes: fast, and careful if possible."""
    names, common = words(model.get_input_embeddings().weight), words.shares.sqrt().log()
    ids: list[tuple[int, int]] = []
    classes: list[int] = []
    found: list[list[Tensor]] = [[] for _ in range(1 if store.crops is None else 2)]
    written: list[Tensor] = []
    hook = model.connector.register_forward_hook(lambda *call: written.append(call[-1]))
    for index, image in enumerate(progress(images, "naming", "images", len(images))):
        objects = View(image).askable
        if not objects:
            continue
        own = [(image.image_id, each.id) for each in objects]
        refined = model.refine(blurred(store.row(index, 0), blur, 13, abs(image.image_id))[None])
        weights = processor.region_inputs([Region.box(*each.box) for each in objects], image.width, image.height)
        seen: list[Tensor | None] = [None]
        if store.crops is not None:
            rows = [torch.from_numpy(store.crops[each].astype(np.float32)) for each in own]
            rows = [blurred(row, blur, 19, *map(abs, each)) for row, each in zip(rows, own, strict=True)]
            seen.append(torch.stack(rows)[None])
        for crops, into in zip(seen, found, strict=True):
            written.clear()
            model.region_features(refined, weights[None], crops)
            tokens = written[0][0]
            each_object = tokens.reshape(len(own), -1, tokens.shape[-1]).mean(1)
            into.append((SHARPNESS * likeness(each_object, names) + common).softmax(-1))
        ids += own
        classes += [COCO_80.index(each.category) for each in objects]
    hook.remove()
    return ids, np.array(classes), [torch.cat(each).numpy() for each in found]

"""What sentences call each object: its class where the model has learned to tell it, else a wider word.

Measured between the paper's two stages, by how alike what the connector writes for an object is to the names of the
classes. The language model then learns to name what can be told, and to say less of the rest.
"""

import copy
import logging
from collections.abc import Container, Sequence
from typing import Any

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


class Namer:
    """Says what sentences call the objects of a view, by what a model as it is now makes of just this view.

    Args:
        model: RegionGPT after alignment; it may learn on, a copy stays as it is.
        processor: Its processor.
        words: Names of the classes, with the shares that they have among the objects.

    Attributes:
        least: Least probability of a class and of a wider word that is said, without a second look and with one.
        confused: Mean probability, careful, that objects of a class were given for each class, (80, 80).
    """

    def __init__(self, model: Any, processor: Any, words: ClassWords) -> None:
        self._model, self._processor = copy.deepcopy(model).eval(), processor
        self._names = words(model.get_input_embeddings().weight).detach().clone()
        self._common = words.shares.sqrt().log()
        self._written: list[Tensor] = []
        self._model.connector.register_forward_hook(lambda *call: self._written.append(call[-1]))
        self.least = [(0.0, 0.0), (0.0, 0.0)]
        self.confused = np.eye(len(COCO_80))

    def measure(
        self,
        images: Sequence[ImageAnnotations],
        store: FeatureStore,
        sure: float,
        held: Container[int],
        blur: float = 0.0,
    ) -> None:
        """Find the least probabilities from which on the share ``sure`` of the names is true, and what is confused.

        Args:
            images: Annotated images, in the order of the feature store, of which every third is looked at.
            store: Their features and crops.
            sure: The share of an object's names, of those as probable or more, that must be true, in (0, 1).
            held: Ids of images that alignment has not learned from, by whose objects it is measured.
            blur: As stage 2 blurs features.
        """
        unseen: list[bool] = []
        classes: list[int] = []
        found: list[list[NDArray[np.float32]]] = [[], []]
        for index, image in enumerate(progress(images, "naming", "images", len(images))):
            view = View(image)
            if index % 3 or not view.askable:
                continue
            features = blurred(store.row(index, 0), blur, 13, abs(image.image_id))
            crops = None
            if store.crops is not None:
                own = [(image.image_id, each.id) for each in view.askable]
                rows = [torch.from_numpy(store.crops[each].astype(np.float32)) for each in own]
                crops = torch.stack(
                    [blurred(row, blur, 19, *map(abs, each)) for row, each in zip(rows, own, strict=True)]
                )
            for seen, into in zip((None, crops), found, strict=True):
                into.append(self.shares(view, features, seen))
            unseen += [image.image_id in held] * len(view.askable)
            classes += [COCO_80.index(each.category) for each in view.askable]
        apart, of = np.array(unseen), np.array(classes)
        for careful, each in enumerate(found):
            self.least[careful] = least_sure(np.concatenate(each)[apart], of[apart], sure)
        shares = np.concatenate(found[-1])
        means = [shares[of == k].sum(0) / max((of == k).sum(), 1) for k in range(len(COCO_80))]
        self.confused = np.stack(means).astype(np.float64)

    @torch.no_grad()
    def shares(self, view: View, features: Tensor, crops: Tensor | None) -> NDArray[np.float32]:
        """Probabilities (N, 80) of the classes for each object of a view that can be asked about.

        Args:
            view: What the tower saw.
            features: Its features (C, h, w).
            crops: Those of the objects' own crops (N, C), 0 for an object without a second look.
        """
        self._written.clear()
        regions = [Region.box(*each.box) for each in view.askable]
        weights = self._processor.region_inputs(regions, round(view.width), round(view.height))
        refined = self._model.refine(features[None])
        self._model.region_features(refined, weights[None], None if crops is None else crops[None])
        tokens = self._written[0][0]
        each_object = tokens.reshape(len(regions), -1, tokens.shape[-1]).mean(1)
        found: NDArray[np.float32] = (SHARPNESS * likeness(each_object, self._names) + self._common).softmax(-1).numpy()
        return found

    def words(self, view: View, features: Tensor, crops: Tensor | None, careful: Sequence[bool]) -> dict[int, str]:
        """What to call objects of a view instead of their class, by their ids; ``careful``: which get a second look."""
        if not view.askable:
            return {}
        found = self.shares(view, features, crops)
        spoken = {}
        for each, shares, wide, second in zip(view.askable, found, group_shares(found), careful, strict=True):
            least, least_wide = self.least[second]
            if shares.max() < least:
                group = _GROUP_OF[COCO_80.index(each.category)]
                spoken[each.id] = NAMES[group] if wide.max() >= least_wide else OBJECT
        return spoken


def least_sure(shares: NDArray[np.float32], classes: NDArray[np.int64], sure: float) -> tuple[float, float]:
    """Least probabilities of a class, and of a wider word for the other objects, to be said: ``sure`` of them are true.

    Args:
        shares: Probabilities (N, 80) of the classes.
        classes: What the objects are, (N,).
        sure: The share, in (0, 1).
    """
    least = certainty(shares.max(1), shares.argmax(1) == classes, sure)
    wide, group, open_ = group_shares(shares), _GROUP_OF[classes], shares.max(1) < least
    right = (wide.argmax(1) == group) & (group < len(GROUPS))
    least_wide = certainty(wide.max(1)[open_], right[open_], sure)
    wider = open_ & (wide.max(1) >= least_wide)
    told = (100 * (1 - open_.mean()), least, 100 * wider.mean(), least_wide)
    log.info("naming: %.0f %% of the objects by class (certainty %.2f), %.0f %% by a wider word (%.2f)", *told)
    return least, least_wide


def group_shares(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities (N, 8) of the wider words from those of the classes (N, 80)."""
    return np.stack([shares[:, k == _GROUP_OF].sum(1) for k in range(len(GROUPS))], 1)


def certainty(scores: NDArray[np.float32], right: NDArray[np.bool_], sure: float) -> float:
    """The lowest score such that of all with as high a one or higher the share ``sure`` is right."""
    order = np.argsort(-scores, kind="stable")
    enough = np.flatnonzero(right[order].cumsum() / np.arange(1, len(order) + 1) >= sure)
    return float(scores[order[enough[-1]]]) if len(enough) else float("inf")

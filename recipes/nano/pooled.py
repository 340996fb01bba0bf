"""The first part of alignment: refinement and connector learn from features that are pooled already.

A region that looks alike all over is the same before and after pooling. Taken as such, its pooled feature trains
refinement and connector in a thousandth of the time of a whole map, on every object of the data several times. What
differs in real maps is learned from them afterwards.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from alignment import CELL_WEIGHT, ClassWords, cell_alignment, region_alignment
from dataset import shown_in_cells
from features import FeatureStore, plan_views
from recipe import FeatureConfig
from torch import Tensor
from torch.nn import functional as F

from regiongpt.data.coco import ImageAnnotations
from regiongpt.environment import progress
from regiongpt.images import SquareFrame
from regiongpt.prompts import COCO_80
from regiongpt.regions import Region
from regiongpt.train.loop import make_optimizer, rate_at
from regiongpt.train.recipe import StageConfig

log = logging.getLogger(__name__)

BATCH = 128
"""Regions in a step, beside as many cells of the image."""


class Pooled(NamedTuple):
    """Tower features pooled over every object in every view, and over the image tokens' cells in one of them.

    Attributes:
        regions: (N, C) float16.
        crops: (N, C) float16 of the objects' own crops; None where the model takes no second look.
        classes: (N,) int64.
        cells: (M, C) float16.
        shown: (M, 80) boolean, the classes in each cell.
    """

    regions: Tensor
    crops: Tensor | None
    classes: Tensor
    cells: Tensor
    shown: Tensor


def pool(images: Sequence[ImageAnnotations], store: FeatureStore, model: Any, config: FeatureConfig) -> Pooled:
    """Pool the cached features over all objects and cells."""
    grid, rows = model.config.image_grid, model.config.tower_grid
    regions: list[Tensor] = []
    crops, classes, cells, shown = [], [], [], []
    for index, image in enumerate(progress(images, "pooling", "images", len(images))):
        for number, view in enumerate(plan_views(image, store.place(index), config)):
            features = store.row(index, number)
            if number == index % config.views:
                cells.append(F.adaptive_avg_pool2d(features, grid).flatten(1).T.half())
                shown.append(torch.from_numpy(shown_in_cells(view, grid)))
            if view.askable:
                frame = SquareFrame(round(view.width), round(view.height))
                weights = np.stack([Region.box(*each.box).pool_weights(frame, *rows) for each in view.askable])
                regions.append((torch.from_numpy(weights).flatten(1).float() @ features.flatten(1).T).half())
                classes += [COCO_80.index(each.category) for each in view.askable]
                if store.crops is not None:
                    crops += [store.crops[image.image_id, each.id] for each in view.askable]
    looked = torch.from_numpy(np.stack(crops)) if crops else None
    return Pooled(torch.cat(regions), looked, torch.tensor(classes), torch.cat(cells), torch.cat(shown))


def train_pooled(model: Any, words: ClassWords, pooled: Pooled, config: StageConfig, epochs: float, seed: int) -> None:
    """Train what requires gradients, in place: ``epochs`` passes over the regions, half of them without their crop."""
    names = words(model.get_input_embeddings().weight).detach()
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, config)
    count = len(pooled.classes)
    steps = int(epochs * count / BATCH)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(int(epochs) + 1)])
    for step in progress(range(steps), "alignment", "steps"):
        taken = order[step * BATCH : (step + 1) * BATCH]
        cells = torch.randint(len(pooled.cells), (BATCH,), generator=generator)
        vectors = torch.cat([pooled.regions[taken], pooled.cells[cells]]).float()
        refined = model.refinement(vectors[:, :, None, None]).mean((2, 3))
        regions, cells_BC = refined[:BATCH], refined[BATCH:]
        if pooled.crops is not None:
            kept = torch.rand(len(taken), 1, generator=generator) < 0.5
            regions = regions + model.refinement.crop_projection(pooled.crops[taken].float() * kept)
        loss = region_alignment(model.connector(regions), pooled.classes[taken], names, words.shares)
        loss = loss + CELL_WEIGHT * cell_alignment(model.connector(cells_BC), pooled.shown[cells], names)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_at(step, steps, config.warmup_ratio)
        optimizer.zero_grad()
        cast(Any, loss / len(taken)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        if step % 100 == 99:
            mean = float(loss.detach()) / len(taken)
            log.info("alignment: step %d of %d on pooled features, loss %.3f", step + 1, steps, mean)

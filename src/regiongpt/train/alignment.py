"""Before stage 1: the connector learns to write each region's class as the language model's own words.

A small language model that has read about regions in words looks for words; what an untrained connector writes looks
like none, and the gradient through the frozen language model hardly says how to change that. So the connector is first
fitted directly: a region's embedding is pulled towards that of its class's name, by a cross-entropy over all classes.
Paper: §3.2, "to align the image features with language embeddings".
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch.nn import functional as F

from regiongpt.data.coco import ImageAnnotations
from regiongpt.prompts import COCO_80
from regiongpt.regions import Region
from regiongpt.train.features import FeatureStore

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTForConditionalGeneration, RegionGPTProcessor

log = logging.getLogger(__name__)

EPOCHS, BATCH, RATE, SHARPNESS = 20, 128, 1e-3, 10.0


def align_connector(
    model: "RegionGPTForConditionalGeneration",
    processor: "RegionGPTProcessor",
    images: Sequence[ImageAnnotations],
    store: FeatureStore,
    seed: int,
) -> None:
    """Fits the connector, in place, to the names of the classes; nothing else is changed.

    Args:
        model: Its refinement is used as it is.
        processor: Pools the regions and knows the words.
        images: Annotated photographs; their first view is used.
        store: Their tower features.
        seed: Order of the examples.
    """
    names = words_of_classes(model, processor)
    pooled, classes = _pooled_regions(model, processor, images, store)
    if not len(classes):
        return
    connector, generator = model.connector, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(connector.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        right, total = 0, 0.0
        order = torch.randperm(len(classes), generator=generator)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            written = connector(pooled[rows])
            likeness = SHARPNESS * F.normalize(written, dim=-1) @ F.normalize(names, dim=-1).T
            # The second term holds the scale to that of words, which the likeness does not see.
            loss = F.cross_entropy(likeness, classes[rows]) + F.mse_loss(written, names[classes[rows]])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            right += int((likeness.argmax(-1) == classes[rows]).sum())
            total += float(loss.detach()) * len(rows)
        schedule.step()
        if (epoch + 1) % 5 == 0:
            mean, share = total / len(classes), right / len(classes)
            log.info("align: epoch %d of %d, loss %.4f, nearest name right %.3f", epoch + 1, EPOCHS, mean, share)


@torch.no_grad()
def words_of_classes(model: "RegionGPTForConditionalGeneration", processor: "RegionGPTProcessor") -> torch.Tensor:
    """The mean of the word embeddings of each class's name: (80, D)."""
    table = cast(torch.Tensor, model.get_input_embeddings().weight)
    tokens = [processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in COCO_80]
    return torch.stack([table[ids].mean(0) for ids in tokens])


@torch.no_grad()
def _pooled_regions(
    model: "RegionGPTForConditionalGeneration",
    processor: "RegionGPTProcessor",
    images: Sequence[ImageAnnotations],
    store: FeatureStore,
    most: int = 12,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refined features (N, C) and classes (N,) of the single objects, at most ``most`` of an image."""
    pooled, classes = [], []
    for index, image in enumerate(images):
        objects = [each for each in image.objects if not each.iscrowd][:most]
        if objects:
            regions = [Region.box(*each.box) for each in objects]
            weights = processor.region_inputs(regions, image.width, image.height)
            refined = model.refine(store.row(index, 0)[None])
            pooled.append(model.refinement.pool_regions(refined, weights[None])[0])
            classes += [COCO_80.index(each.category) for each in objects]
        if (index + 1) % 1000 == 0:
            log.info("align: %d of %d images", index + 1, len(images))
    return torch.cat(pooled) if pooled else torch.zeros(0, 0), torch.from_numpy(np.array(classes, dtype=np.int64))

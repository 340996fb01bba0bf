"""Conversations about views of annotated images as training examples.

An example is drawn from (seed, item) alone, so that a continued run sees what an uninterrupted one would have seen.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from conversations import Conversation, ConversationSampler, of_blank
from features import FeatureStore, blurred, plan_views
from naming import Namer
from recipe import FeatureConfig
from torch import Tensor
from torch.utils.data import Dataset

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import View
from regiongpt.images import SquareFrame
from regiongpt.prompts import COCO_80
from regiongpt.train.dataset import left_out, task_numbers
from regiongpt.train.packing import turn_numbers

EXTRAS = ("tasks", "turns", "region_classes", "cell_classes")
"""Fields of a batch of conversations besides the model's inputs."""

BLANK_SHARE = 0.02
"""Share of the conversations that are about an image that shows nothing."""

_WINDOW = 16
# An image token's cell shows an object that fills this much of it, or lies in it with half of its own box.
_FILLED, _WITHIN = 0.2, 0.5


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations about annotated images for any number of epochs as one indexable list.

    Item ``i`` belongs to epoch ``i // len(images)``; within an epoch the images come in a seeded order, in groups with
    about as many objects each, which pads little.

    Args:
        images: Annotated images, in the order of the feature store.
        store: Tower features and object colours.
        sampler: Draws the conversation.
        processor: Tokenises it and makes the label mask.
        features: The views that the store holds.
        seed: Seed of the recipe.
        items: Number of examples in the whole run.
        group: Images in a group; the size of a micro-batch.
        isolated_share: Share of the conversations whose turns do not see each other.
        image_grid: Rows and columns of the image tokens.
        namer: Says what to call objects; any by its class when None.
        blur: As :func:`features.blurred` takes it, for the image's features and the crops'.
    """

    def __init__(
        self,
        images: Sequence[ImageAnnotations],
        store: FeatureStore,
        sampler: ConversationSampler,
        processor: Any,
        features: FeatureConfig,
        seed: int,
        items: int,
        group: int,
        isolated_share: float,
        image_grid: tuple[int, int],
        namer: Namer | None = None,
        blur: float = 0.0,
    ) -> None:
        self.images, self.store, self.sampler, self.processor = images, store, sampler, processor
        self.features, self.seed, self.items = features, seed, items
        self.group, self.isolated_share = group, isolated_share
        self.image_grid, self.namer, self.blur = image_grid, namer, blur
        self.order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> dict[str, Any]:
        index, number, view, conversation = self.draw(item)
        rng, features = np.random.default_rng((self.seed, 11, item)), None
        if self.store.blanks is not None and rng.random() < BLANK_SHARE and (talk := of_blank(conversation)):
            conversation, features = talk, self.store.blanks[int(rng.integers(len(self.store.blanks)))]
        example: dict[str, Any] = self.processor.encode_conversation(
            conversation.messages, regions=conversation.regions, image_size=(round(view.width), round(view.height))
        )
        example["vision_features"] = self.features_of(item, index, number, features)
        classes = [COCO_80.index(name) for name in conversation.categories]
        example["region_classes"] = torch.tensor(classes, dtype=torch.long)
        example["cell_classes"] = torch.from_numpy(shown_in_cells(view, self.image_grid))
        if conversation.objects and (crops := self.crops_of(item, index, conversation.objects)) is not None:
            if features is not None:  # of a blank image every crop looks alike
                crops[crops.any(1)] = features[: crops.shape[1]].mean((1, 2))
            example["region_crops"] = crops
        if features is not None:
            example["region_classes"].fill_(-1)
            example["cell_classes"].fill_(False)
        example["tasks"] = task_numbers(example["labels"], conversation.tasks)
        example["turns"] = torch.zeros_like(example["input_ids"])
        if np.random.default_rng((self.seed, 7, item)).random() < self.isolated_share:
            example["turns"] = turn_numbers(example, self.processor.image_token_id)
        return example

    def name_of(self, item: int) -> str:
        """The file of an item's image."""
        epoch, position = divmod(item, len(self.images))
        return str(self.images[int(self.order(epoch)[position])].path)

    def draw(self, item: int) -> tuple[int, int, View, Conversation]:
        """The image's index, the number of its view, that view and the conversation of one item.

        It does not call an object by its class where the model, with or without a second look, could not tell it.
        """
        epoch, position = divmod(item, len(self.images))
        index = int(self.order(epoch)[position])
        # Every image starts at another view and then goes round, so that each is seen equally often.
        number = (epoch + index) % self.features.views
        view = plan_views(self.images[index], self.store.place(index), self.features)[number]
        words = None
        if self.namer is not None:
            ids = [each.id for each in view.askable]
            seen, crops = self.features_of(item, index, number), self.crops_of(item, index, ids)
            words = self.namer.words(view, seen, crops, [not self.without_crop(item, each) for each in ids])
        return index, number, view, self.sampler.sample(view, self.store.colours[index], self.seed, index, epoch, words)

    def features_of(self, item: int, index: int, number: int, instead: Tensor | None = None) -> Tensor:
        """Features (C, h, w) of a view, or of another image ``instead``, blurred for this item."""
        seen = self.store.row(index, number) if instead is None else instead
        return blurred(seen, self.blur, self.seed, 13, item)

    def crops_of(self, item: int, index: int, ids: Sequence[int]) -> Tensor | None:
        """Features (N, C) of some objects' crops, blurred for this item; 0 for those that go without a second look."""
        if self.store.crops is None or not ids:
            return None
        image = self.images[index].image_id
        rows = [torch.from_numpy(self.store.crops[image, each].astype(np.float32)) for each in ids]
        of = [(self.seed, 19, item, abs(each)) for each in ids]
        crops = torch.stack([blurred(row, self.blur, *each) for row, each in zip(rows, of, strict=True)])
        crops[torch.tensor([self.without_crop(item, each) for each in ids])] = 0
        return crops

    def without_crop(self, item: int, annotation: int) -> bool:
        """Whether an object goes without a second look."""
        return bool(left_out(1, self.seed, item, abs(annotation)))

    def _order(self, epoch: int) -> np.ndarray:
        """Image indices of one epoch: shuffled, sorted by objects within windows, then groups shuffled."""
        rng = np.random.default_rng((self.seed, 3, epoch))
        objects = np.array([min(len(image.objects), self.sampler.regions_per_image) for image in self.images])
        shuffled, groups = rng.permutation(len(self.images)), []
        for start in range(0, len(shuffled), _WINDOW * self.group):
            window = shuffled[start : start + _WINDOW * self.group]
            window = window[np.argsort(objects[window], kind="stable")]
            groups += np.split(window, range(self.group, len(window), self.group))
        # The one group that may be short stays last, so that the others fill whole micro-batches.
        short = [group for group in groups if len(group) < self.group]
        whole = [group for group in groups if len(group) == self.group]
        return np.concatenate([whole[k] for k in rng.permutation(len(whole))] + short)


def shown_in_cells(view: View, grid: tuple[int, int]) -> np.ndarray:
    """Which classes each cell of the image tokens shows, by the boxes of the objects and crowds.

    Args:
        view: What the tower saw.
        grid: Rows and columns.

    Returns:
        Boolean (rows * columns, 80), row by row.
    """
    rows, columns = grid
    y_edges, x_edges = SquareFrame(round(view.width), round(view.height)).edges(rows, columns)
    cell_area = (y_edges[1] - y_edges[0]) * (x_edges[1] - x_edges[0])
    shown = np.zeros((rows, columns, len(COCO_80)), dtype=bool)
    for each in view.objects:
        x0, y0, x1, y1 = each.box
        across = np.clip(np.minimum(x_edges[1:], x1) - np.maximum(x_edges[:-1], x0), 0, None)
        down = np.clip(np.minimum(y_edges[1:], y1) - np.maximum(y_edges[:-1], y0), 0, None)
        common = down[:, None] * across
        shown[..., COCO_80.index(each.category)] |= (common >= _FILLED * cell_area) | (common >= _WITHIN * each.area)
    return shown.reshape(rows * columns, -1)

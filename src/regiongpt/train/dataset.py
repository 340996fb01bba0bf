"""Training examples: a conversation about one view of one image, drawn from (seed, index, epoch) alone."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import View
from regiongpt.data.sampling import Conversation, ConversationSampler
from regiongpt.images import SquareFrame
from regiongpt.model.processing import IGNORED
from regiongpt.prompts import COCO_80
from regiongpt.train.features import FeatureStore, plan_views
from regiongpt.train.recipe import FeatureConfig
from regiongpt.train.watch_tally import task_numbers

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTProcessor

Example = dict[str, Any]
_WINDOW = 16
# An image token's cell shows an object that fills this much of it, or lies in it with half of its own box.
_FILLED, _WITHIN = 0.2, 0.5


class ConversationDataset(Dataset[Example]):
    """Conversations for any number of epochs as one indexable list.

    Item ``i`` belongs to epoch ``i // len(images)``; within an epoch the images come in a seeded order, in groups with
    about as many objects each, which pads little. Nothing depends on what was drawn before, so a run that goes on from
    step k sees what an uninterrupted one would have seen.

    Args:
        images: Annotated images, in the order of the feature store.
        store: Tower features and object colours.
        sampler: Draws the conversation.
        processor: Tokenises it and makes the label mask.
        features: The views that the store holds.
        seed: Seed of the recipe.
        items: Number of examples in the whole run.
        group: Images in a group; the size of a micro-batch.
        isolated_share: Share of the conversations whose turns do not see each other; see :func:`turn_numbers`.
        image_grid: Rows and columns of the image tokens.
    """

    def __init__(
        self,
        images: Sequence[ImageAnnotations],
        store: FeatureStore,
        sampler: ConversationSampler,
        processor: "RegionGPTProcessor",
        features: FeatureConfig,
        seed: int,
        items: int,
        group: int,
        isolated_share: float,
        image_grid: tuple[int, int],
    ) -> None:
        self.images, self.store, self.sampler, self.processor = images, store, sampler, processor
        self.features, self.seed, self.items = features, seed, items
        self.group, self.isolated_share = group, isolated_share
        self.image_grid = image_grid
        self.order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> Example:
        index, number, view, conversation = self.draw(item)
        example = self.processor.encode_conversation(
            conversation.messages, regions=conversation.regions, image_size=(round(view.width), round(view.height))
        )
        example["vision_features"] = self.store.row(index, number)
        example["region_classes"] = torch.tensor(
            [COCO_80.index(name) for name in conversation.categories], dtype=torch.long
        ).repeat_interleave(self.processor.tokens_per_region)
        example["cell_classes"] = torch.from_numpy(shown_in_cells(view, self.image_grid))
        example["tasks"] = task_numbers(example["labels"], conversation.tasks)
        if np.random.default_rng((self.seed, 7, item)).random() < self.isolated_share:
            example["turns"] = turn_numbers(example, self.processor.image_token_id)
        return example

    def name_of(self, item: int) -> str:
        """What a person finds the image of an item by."""
        epoch, position = divmod(item, len(self.images))
        return str(self.images[int(self.order(epoch)[position])].path)

    def draw(self, item: int) -> tuple[int, int, View, Conversation]:
        """The image's index, the number of its view, that view and the conversation of one item."""
        epoch, position = divmod(item, len(self.images))
        index = int(self.order(epoch)[position])
        # Every image starts at another view and then goes round, so that each is seen equally often.
        number = (epoch + index) % self.features.views
        view = plan_views(self.images[index], self.store.place(index), self.features)[number]
        return index, number, view, self.sampler.sample(view, self.store.colours[index], self.seed, index, epoch)

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


def turn_numbers(example: Example, image_token_id: int) -> torch.Tensor:
    """Which turn each token belongs to: 0 for what comes before the first question, the image above all; then 1, 2, ...

    A conversation of ten turns about one image trains ten answers for one image's tokens, but what an earlier turn said
    of a region answers a later one. Where turns are isolated, each sees the image and itself alone, at the positions
    it would have as the only turn: ten single-turn conversations that share their image.

    Args:
        example: ``input_ids`` and ``labels``, each (T,), with the image first.
        image_token_id: Id of ``<image>``.

    Returns:
        (T,) int64.
    """
    ids, is_target = example["input_ids"], example["labels"] != IGNORED
    # The line break after the image belongs to no turn: each question follows it, as the first one does.
    head = int((ids == image_token_id).nonzero()[-1]) + 2
    ends = is_target & ~torch.cat([is_target[1:], torch.tensor([False])])
    numbers = 1 + torch.cat([torch.tensor([0]), ends.cumsum(0)[:-1]])
    numbers[:head] = 0
    return numbers


def isolate_turns(turns_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mask and positions under which turns do not see each other.

    Args:
        turns_BT: (B, T) int64 from :func:`turn_numbers`; all 0 for a conversation whose turns see the earlier ones, and
            -1 in the padding.

    Returns:
        Boolean mask (B, 1, T, T), True where attention is allowed, and position ids (B, T).
    """
    length = turns_BT.shape[1]
    query, key = turns_BT[:, :, None], turns_BT[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ((query == key) | ((key == 0) & (query > 0)))
    # How many tokens a token sees is the place it stands at.
    return mask[:, None], mask.sum(-1) - 1


def padded(examples: Sequence[Example], name: str) -> torch.Tensor:
    """What examples have under a name, each (L,), as (B, longest L) with -1 behind the shorter ones."""
    return pad_sequence([each[name] for each in examples], batch_first=True, padding_value=-1)


class ConversationCollate:
    """Pads conversations about photographs into a batch, with the mask and the positions that keep turns apart.

    Args:
        processor: Whose examples they are.
    """

    def __init__(self, processor: "RegionGPTProcessor") -> None:
        self.processor = processor

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The model's inputs, ``labels`` and ``tasks``, and what the alignment is held to."""
        batch = self.processor.collate(examples)
        turns = torch.full(batch["input_ids"].shape, -1)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            turns[row, :length] = example.get("turns", torch.zeros(length, dtype=torch.long))
        mask, positions = isolate_turns(turns)
        classes = padded(examples, "region_classes")
        cells = torch.stack([each["cell_classes"] for each in examples])
        shape = {"attention_mask": mask, "position_ids": positions}
        return {**batch, **shape, "tasks": padded(examples, "tasks"), "region_classes": classes, "cell_classes": cells}


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

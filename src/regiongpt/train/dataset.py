"""Training examples: records of a mixture, or conversations about views of annotated images; and what batches them.

An example is drawn from (seed, item) alone, so that a run that goes on from step k sees what an uninterrupted one would
have seen.
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import View
from regiongpt.data.mixture import Drawn, Mixture
from regiongpt.data.records import Record
from regiongpt.data.sampling import Conversation, ConversationSampler
from regiongpt.errors import DataError, RegionError
from regiongpt.images import SquareFrame, load_image
from regiongpt.model.processing import IGNORED
from regiongpt.prompts import COCO_80, QUESTIONS
from regiongpt.train.features import FeatureStore, plan_views
from regiongpt.train.packing import PACKED, Example, isolate_turns, packed_output
from regiongpt.train.recipe import FeatureConfig

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTProcessor

log = logging.getLogger(__name__)

TASKS: Final[tuple[str, ...]] = (*QUESTIONS, "chat")
"""The tasks that losses are told by; the place of a name here is its number in a batch."""

_WINDOW = 16
# An image token's cell shows an object that fills this much of it, or lies in it with half of its own box.
_FILLED, _WITHIN = 0.2, 0.5


class RecordDataset(Dataset[Example]):
    """The records of a mixture as examples, for any number of epochs as one indexable list.

    A conversation that is longer than the language model can read is cut: at the end of the last turn that fits, or
    inside its answer where it has but one. The first that is cut is told in the log.

    Args:
        mixture: Of records.
        processor: Pads and normalises images, tokenises, and makes the label mask.
        items: Number of examples in the whole run.
        longest: Most tokens in an example, None for no limit.
        suffixes: Whether guided questions end with the suffix that fixes the format of their answer.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: "RegionGPTProcessor",
        items: int,
        longest: int | None = None,
        suffixes: bool = True,
    ) -> None:
        self.mixture, self.processor, self.items, self.longest = mixture, processor, items, longest
        self.suffixes = suffixes
        self._told = False

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> Example:
        """One example: what ``processor.encode_conversation`` makes, and ``tasks``.

        Raises:
            DataError: The image is missing, not readable or of another size; a region makes no sense in it; a
                placeholder has no region; there is nothing to learn.
        """
        return self.encode(self.mixture.draw(item))

    def name_of(self, item: int) -> str:
        """What a person finds the record of an item by."""
        drawn = self.mixture.draw(item)
        return f"{drawn.records.folder}:{drawn.records[drawn.index].id}"

    def encode(self, drawn: Drawn) -> Example:
        """The example of one record; raises as :meth:`__getitem__` does."""
        record = drawn.records[drawn.index]
        where = f"{drawn.records.folder}, record {record.id}"
        try:
            path = drawn.records.image_path(record)
            if path is None:
                return self._encode_turns(record, drawn, None, where)
            image = load_image(path)
            if image.size != (record.width, record.height):
                raise DataError(
                    f"expected an image of {record.width} x {record.height} (W x H), the size its regions are "
                    f"given in, got {image.width} x {image.height}: {path}"
                )
            weights = self.processor.region_inputs([each.region for each in record.regions], *image.size)
            example = self._encode_turns(record, drawn, weights, where)
            example["pixel_values"] = self.processor.pixels_of(image)[0]
        except (DataError, RegionError) as error:
            raise DataError(f"{where}: {error}; `regiongpt inspect` checks all records of a folder") from error
        return example

    def words(self, drawn: Drawn) -> tuple[Record, Example]:
        """A record and its tokens and targets, as :meth:`encode` makes them, without a look at its image.

        Raises:
            DataError: There is nothing to learn in it.
            RegionError: A placeholder has no region.
        """
        record = drawn.records[drawn.index]
        weights = torch.zeros(len(record.regions) * self.processor.tokens_per_region, 1, 1)
        return record, self._encode_turns(record, drawn, weights, f"{drawn.records.folder}, record {record.id}")

    def _encode_turns(self, record: Record, drawn: Drawn, weights: Tensor | None, where: str) -> Example:
        messages = record.messages(self.mixture.seed, drawn.times, drawn.index, self.suffixes)

        def encode(count: int) -> Example:
            return self.processor.encode_conversation(
                messages[: 2 * count], region_weights=weights, with_image=bool(record.image)
            )

        turns = len(messages) // 2
        example = encode(turns)
        tokens = len(example["input_ids"])
        if self.longest is not None and tokens > self.longest:
            fitting = bisect_right(range(1, turns), self.longest, key=lambda count: len(encode(count)["input_ids"]))
            example = encode(max(1, fitting))
            ids, labels = example["input_ids"][: self.longest], example["labels"][: self.longest]
            if bool((labels == IGNORED).all()):
                raise DataError(
                    f"expected a question that leaves room for an answer in the {self.longest} tokens that the "
                    "language model reads, got one that does not"
                )
            regions = int((ids == self.processor.region_token_id).sum())
            example |= {"input_ids": ids, "labels": labels, "region_ids": example["region_ids"][:regions]}
            if not self._told:
                log.warning(
                    "%s: a conversation of %d tokens in %d turn(s) is longer than the language model's %d; what does "
                    "not fit is left out, here and in others like it",
                    where,
                    tokens,
                    turns,
                    self.longest,
                )
                self._told = True
        example["tasks"] = task_numbers(example["labels"], [turn.task for turn in record.turns])
        return example


class ConversationDataset(Dataset[Example]):
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
        example["turns"] = torch.zeros_like(example["input_ids"])
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


class DataCollator:
    """Pads examples of either data set into a batch, those without an image among the others.

    Args:
        processor: Whose examples they are.
        extras: What else to pad of that the examples have; nothing for a trainer that knows the model's inputs alone.
    """

    def __init__(
        self,
        processor: "RegionGPTProcessor",
        extras: Sequence[str] = ("tasks", "turns", "region_classes", "cell_classes"),
    ) -> None:
        self.processor, self.extras = processor, extras

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The model's inputs and ``labels``, and the extras, -1 behind the shorter ones."""
        blank = next((torch.zeros_like(each["pixel_values"]) for each in examples if "pixel_values" in each), None)
        if blank is not None:
            # A text without <image> takes nothing from the pixels in its row, which are there to fill the batch.
            examples = [each if "pixel_values" in each else {**each, "pixel_values": blank} for each in examples]
        batch = dict(self.processor.collate(examples))
        for name in self.extras:
            if name in examples[0]:
                batch[name] = pad_sequence([each[name] for each in examples], batch_first=True, padding_value=-1)
        return batch


def answer_loss(model: Any, batch: dict[str, Any], items: Any) -> Tensor:
    """Loss of the answers: a sum over target tokens, divided by their number in the whole optimiser step.

    Refinement and connector take part in a batch without images too, with nothing to learn: processes that train
    together wait for each other's gradients of every parameter, and one that has none would be left behind.

    Args:
        model: RegionGPT.
        batch: Its inputs, with ``labels``, padded or packed.
        items: Target tokens of the optimiser step.

    Paper: §3.2, "We only set the response as the learning target, ignoring the instruction parts."
    """
    loss: Tensor = answer_output(model, batch, items).loss
    if "pixel_values" not in batch and "vision_features" not in batch:
        blank = loss.new_zeros((1, *model.features_shape))
        loss = loss + 0.0 * model.image_features(model.refine(blank)).sum()
    return loss


def answer_output(model: Any, batch: dict[str, Any], items: Any) -> Any:
    """The model's output with the loss of the answers, of a padded or a packed batch; as :func:`answer_loss`."""
    options = {"loss_only": True, "num_items_in_batch": items, "use_cache": False}
    if PACKED[0] in batch:
        return packed_output(model, batch, **options)
    if "turns" in batch:
        batch = dict(batch)
        batch["attention_mask"], batch["position_ids"] = isolate_turns(batch.pop("turns"))
    return model(**batch, **options)


def task_numbers(labels_T: Tensor, tasks: Sequence[str]) -> Tensor:
    """Which task each target of a conversation belongs to.

    Args:
        labels_T: (T,), -100 where not a target; each run of targets is the answer of one turn.
        tasks: Of the turns, in order; there may be more of them than answers, where the last did not fit.

    Returns:
        (T,) int64: places in :data:`TASKS`; -1 where not a target, and in turns of any other task.
    """
    numbers = torch.tensor([*(TASKS.index(task) if task in TASKS else -1 for task in tasks), -1])
    is_target = labels_T != IGNORED
    begins = is_target & ~torch.cat([torch.tensor([False]), is_target[:-1]])
    turns_T = (begins.cumsum(0) - 1).clamp(0, len(tasks))
    return torch.where(is_target, numbers[turns_T], -1)


def turn_numbers(example: Example, image_token_id: int) -> Tensor:
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

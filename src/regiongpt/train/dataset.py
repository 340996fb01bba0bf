"""The records of a mixture as training examples, their batches and their loss.

An example is drawn from (seed, item) alone, so that a continued run sees what an uninterrupted one would have seen.
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from regiongpt.data.records import Record
from regiongpt.data.shards import Drawn, Mixture
from regiongpt.errors import DataError, RegionError
from regiongpt.images import load_image
from regiongpt.model.processing import IGNORED
from regiongpt.prompts import QUESTIONS
from regiongpt.train.packing import PACKED, Example, isolate_turns, packed_output

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTProcessor

log = logging.getLogger(__name__)

TASKS: Final[tuple[str, ...]] = (*QUESTIONS, "chat")
"""Tasks with a loss of their own; the index of a name is its number in a batch."""


class RecordDataset(Dataset[Example]):
    """The records of a mixture as examples, for any number of epochs (``items``) as one indexable list.

    A conversation of more than ``longest`` tokens is cut: at the end of the last turn that fits, or inside its only
    answer. ``suffixes``: whether guided questions end with the suffix that fixes the format of their answer.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: "RegionGPTProcessor",
        items: int,
        longest: int | None = None,
        suffixes: bool = True,
    ) -> None:
        self.mixture, self.processor, self.items = mixture, processor, items
        self.longest, self.suffixes, self._told = longest, suffixes, False

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> Example:
        """One example; raises as :meth:`encode` does."""
        return self.encode(self.mixture.draw(item))

    def name_of(self, item: int) -> str:
        """Folder and id of an item's record."""
        drawn = self.mixture.draw(item)
        return f"{drawn.records.folder}:{drawn.record().id}"

    def encode(self, drawn: Drawn) -> Example:
        """The example of a record: what ``processor.encode_conversation`` makes, and ``tasks``.

        DataError where the image is missing, not readable or of another size, a region makes no sense in it, a
        placeholder has no region, or there is nothing to learn.
        """
        record = drawn.record()
        try:
            path = drawn.records.image_path(record)
            if path is None:
                return self._encode_turns(record, drawn, None)
            image = load_image(path)
            if image.size != (record.width, record.height):
                size = f"{record.width} x {record.height}"
                raise DataError(f"expected an image of {size} pixels, got {image.width} x {image.height}: {path}")
            regions = [each.region for each in record.regions]
            example = self._encode_turns(record, drawn, self.processor.region_inputs(regions, *image.size))
            example["pixel_values"] = self.processor.pixels_of(image)[0]
            if self.processor.crop_size:
                example["region_crops"] = self.processor.crop_inputs(image, regions)
                example["region_crops"][left_out(len(regions), self.mixture.seed, drawn.times, drawn.index)] = 0
        except (DataError, RegionError) as error:
            where = f"{drawn.records.folder}, record {record.id}"
            raise DataError(f"{where}: {error}; `regiongpt inspect` checks all records of a folder") from error
        return example

    def _encode_turns(self, record: Record, drawn: Drawn, weights: Tensor | None) -> Example:
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
                raise DataError(f"a question leaves no room for an answer in the context of {self.longest} tokens")
            regions = int((ids == self.processor.region_token_id).sum())
            example |= {"input_ids": ids, "labels": labels, "region_ids": example["region_ids"][:regions]}
            if not self._told:
                told = "%s: %d tokens in %d turn(s) exceed the model's %d; longer conversations are cut"
                log.warning(told, record.id, tokens, turns, self.longest)
                self._told = True
        example["tasks"] = task_numbers(example["labels"], [turn.task for turn in record.turns])
        return example


class DataCollator:
    """Pads examples into a batch, those without an image among the others; ``extras`` are padded too, with -1."""

    def __init__(self, processor: "RegionGPTProcessor", extras: Sequence[str] = ("tasks",)) -> None:
        self.processor, self.extras = processor, extras

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The model's inputs, ``labels`` and the extras."""
        blank = next((torch.zeros_like(each["pixel_values"]) for each in examples if "pixel_values" in each), None)
        if blank is not None:
            # A text without <image> takes nothing from the pixels in its row, which are there to fill the batch.
            examples = [each if "pixel_values" in each else {**each, "pixel_values": blank} for each in examples]
        batch = dict(self.processor.collate(examples))
        for name in self.extras:
            if name in examples[0]:
                batch[name] = pad_sequence([each[name] for each in examples], batch_first=True, padding_value=-1)
        return batch


def left_out(count: int, *key: int) -> Tensor:
    """Which of some regions go without a second look, (count,) bool: half of them, so that a model learns both."""
    return torch.from_numpy(np.random.default_rng((41, *key)).random(count) < 0.5)


def answer_loss(model: Any, batch: dict[str, Any], items: Any) -> Tensor:
    """Loss of the answers: a sum over target tokens, divided by their number in the whole optimiser step (``items``).

    Refinement and connector take part in a batch without images too, with nothing to learn: processes that train
    together wait for each other's gradients of every parameter.

    Paper: §3.2, "We only set the response as the learning target, ignoring the instruction parts."
    """
    loss: Tensor = answer_output(model, batch, items).loss
    if "pixel_values" not in batch and "vision_features" not in batch:
        blank = loss.new_zeros((1, *model.features_shape))
        loss = loss + 0.0 * model.image_features(model.refine(blank)).sum()
    if model.config.region_crop:
        loss = loss + 0.0 * model.refinement.crop_projection.weight.sum()
    if model.config.region_connector == "linear":
        loss = loss + 0.0 * sum(each.sum() for each in model.region_connector.parameters())
    return loss


def answer_output(model: Any, batch: dict[str, Any], items: Any) -> Any:
    """The model's output with the loss of the answers, of a padded or a packed batch."""
    options = {"loss_only": True, "num_items_in_batch": items, "use_cache": False}
    if PACKED[0] in batch:
        return packed_output(model, batch, **options)
    if "turns" in batch:
        batch = dict(batch)
        batch["attention_mask"], batch["position_ids"] = isolate_turns(batch.pop("turns"))
    return model(**batch, **options)


def task_numbers(labels_T: Tensor, tasks: Sequence[str]) -> Tensor:
    """Place in :data:`TASKS` of each target's task, (T,) int64; -1 where not a target, and in turns of any other task.

    Each run of targets is the answer of one turn; there may be more turns in ``tasks``, where the last did not fit.
    """
    numbers = torch.tensor([*(TASKS.index(task) if task in TASKS else -1 for task in tasks), -1])
    is_target = labels_T != IGNORED
    begins = is_target & ~torch.cat([torch.tensor([False]), is_target[:-1]])
    turns_T = (begins.cumsum(0) - 1).clamp(0, len(tasks))
    return torch.where(is_target, numbers[turns_T], -1)

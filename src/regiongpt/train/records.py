"""Training examples from records: the image as it is, the regions, and the turns in one of their wordings."""

import logging
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regiongpt.data.mixture import Drawn, Mixture
from regiongpt.data.records import Record
from regiongpt.errors import DataError, RegionError
from regiongpt.images import load_image
from regiongpt.model.processing import IGNORED
from regiongpt.train.dataset import padded
from regiongpt.train.packing import answer_output
from regiongpt.train.watch_tally import task_numbers

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTProcessor

log = logging.getLogger(__name__)
Example = dict[str, Any]


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
        """One example.

        Raises:
            DataError: The image is missing, not readable or of another size; a region makes no sense in it; a
                placeholder has no region; there is nothing to learn.
        """
        return self.encode(self.mixture.draw(item))

    def name_of(self, item: int) -> str:
        """What a person finds the record of an item by."""
        drawn = self.mixture.draw(item)
        return f"{drawn.records.folder}:{drawn.record().id}"

    def encode(self, drawn: Drawn) -> Example:
        """The example of one record; raises as :meth:`__getitem__` does."""
        record = drawn.record()
        where = f"{drawn.records.folder}, record {record.id}"
        try:
            image, weights = None, None
            path = drawn.records.image_path(record)
            if path is not None:
                image = load_image(path)
                if image.size != (record.width, record.height):
                    raise DataError(
                        f"expected an image of {record.width} x {record.height} (W x H), the size its regions are "
                        f"given in, got {image.width} x {image.height}: {path}"
                    )
                weights = self.processor.region_inputs([each.region for each in record.regions], *image.size)
            messages = record.messages(self.mixture.seed, drawn.times, drawn.index, self.suffixes)
            example = self._encode_text(messages, weights, path is not None, where)
            example["tasks"] = task_numbers(example["labels"], [turn.task for turn in record.turns])
            if image is not None:
                example["pixel_values"] = self.processor.image_inputs(image)["pixel_values"][0]
        except (DataError, RegionError) as error:
            raise DataError(f"{where}: {error}; `regiongpt inspect` checks all records of a folder") from error
        return example

    def words(self, drawn: Drawn) -> tuple[Record, Example]:
        """A record and its tokens and targets, as :meth:`encode` makes them, without a look at its image.

        Raises:
            DataError: There is nothing to learn in it.
            RegionError: A placeholder has no region.
        """
        record = drawn.record()
        messages = record.messages(self.mixture.seed, drawn.times, drawn.index, self.suffixes)
        weights = torch.zeros(len(record.regions) * self.processor.tokens_per_region, 1, 1)
        where = f"{drawn.records.folder}, record {record.id}"
        return record, self._encode_text(messages, weights, bool(record.image), where)

    def _encode_text(
        self, messages: list[dict[str, str]], weights: Tensor | None, with_image: bool, where: str
    ) -> Example:
        def of_turns(count: int) -> Example:
            return self.processor.encode_conversation(
                messages[: 2 * count], region_weights=weights, with_image=with_image
            )

        turns = len(messages) // 2
        example = of_turns(turns)
        tokens = len(example["input_ids"])
        if self.longest is None or tokens <= self.longest:
            return example
        fitting = bisect_right(range(1, turns), self.longest, key=lambda count: len(of_turns(count)["input_ids"]))
        example = of_turns(fitting) if fitting else self._cut(of_turns(1), self.longest)
        if not self._told:
            log.warning(
                "%s: a conversation of %d tokens in %d turn(s) is longer than the language model's %d; what does not "
                "fit is left out, here and in others like it",
                where,
                tokens,
                turns,
                self.longest,
            )
            self._told = True
        return example

    def _cut(self, example: Example, longest: int) -> Example:
        """The beginning of a turn that does not fit."""
        ids, labels = example["input_ids"][:longest], example["labels"][:longest]
        if bool((labels == IGNORED).all()):
            raise DataError(
                f"expected a question that leaves room for an answer in the {longest} tokens that the language model "
                "reads, got one that does not"
            )
        regions = int((ids == self.processor.region_token_id).sum())
        return {**example, "input_ids": ids, "labels": labels, "region_ids": example["region_ids"][:regions]}


class RecordCollate:
    """Pads examples into a batch, those without an image among the others.

    Args:
        processor: Whose examples they are.
    """

    def __init__(self, processor: "RegionGPTProcessor") -> None:
        self.processor = processor

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """The model's inputs, ``labels`` and ``tasks`` among them."""
        blank = next((torch.zeros_like(each["pixel_values"]) for each in examples if "pixel_values" in each), None)
        if blank is not None:
            # A text without <image> takes nothing from the pixels in its row, which are there to fill the batch.
            examples = [each if "pixel_values" in each else {**each, "pixel_values": blank} for each in examples]
        batch = dict(self.processor.collate(examples))
        return {**batch, "tasks": padded(examples, "tasks")}


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
    loss = cast(Tensor, answer_output(model, batch, items).loss)
    if "pixel_values" not in batch and "vision_features" not in batch:
        shape = (1, model.config.vision_config.hidden_size, *model.config.tower_grid)
        loss = loss + 0.0 * model.image_features(model.refine(loss.new_zeros(shape))).sum()
    return loss

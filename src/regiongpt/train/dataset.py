"""Training examples: a conversation about one view of one image, drawn from (seed, index, epoch) alone."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import View
from regiongpt.data.sampling import Conversation, ConversationSampler
from regiongpt.prompts import IMAGE_TOKEN, replace_placeholders
from regiongpt.train.config import FeatureConfig
from regiongpt.train.features import FeatureStore, plan_views

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTProcessor

Example = dict[str, Any]


class ConversationDataset(Dataset[Example]):
    """Conversations for any number of epochs as one indexable list.

    Item ``i`` belongs to epoch ``i // len(images)``; within an epoch the images come in a seeded permutation. Nothing
    depends on what was drawn before, so a run that goes on from step k sees what an uninterrupted one would have seen.

    Args:
        images: Annotated images, in the order of the feature store.
        store: Tower features and object colours; None makes text-only examples (the image and its regions dropped).
        sampler: Draws the conversation.
        processor: Tokenises it and makes the label mask.
        features: The views that the store holds.
        seed: Seed of the recipe.
        items: Number of examples in the whole run.
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
    ) -> None:
        self.images, self.store, self.sampler, self.processor = images, store, sampler, processor
        self.features, self.seed, self.items = features, seed, items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> Example:
        index, number, view, conversation = self.draw(item)
        example = self.processor.encode_conversation(
            conversation.messages, regions=conversation.regions, image_size=(round(view.width), round(view.height))
        )
        example["vision_features"] = self.store.row(index, number)
        return example

    def draw(self, item: int) -> tuple[int, int, View, Conversation]:
        """The image's index, the number of its view, that view and the conversation of one item."""
        epoch, position = divmod(item, len(self.images))
        index = int(np.random.default_rng((self.seed, 3, epoch)).permutation(len(self.images))[position])
        # Every image starts at another view and then goes round, so that each is seen equally often.
        number = (epoch + index) % self.features.views
        view = plan_views(self.images[index], index, self.seed, self.features)[number]
        return index, number, view, self.sampler.sample(view, self.store.colours[index], self.seed, index, epoch)


class TextDataset(Dataset[Example]):
    """Text alone, for pre-training the language model: fixed-length windows over documents in a seeded order.

    Args:
        documents: Token ids of each document, ended by the end-of-text token.
        length: Tokens in an example.
        seed: Seed of the order.
        items: Number of examples in the whole run.
    """

    def __init__(self, documents: Sequence[Sequence[int]], length: int, seed: int, items: int) -> None:
        self.documents, self.length, self.seed, self.items = documents, length, seed, items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> Example:
        rng = np.random.default_rng((self.seed, 5, item))
        ids: list[int] = []
        while len(ids) < self.length:
            ids.extend(self.documents[int(rng.integers(len(self.documents)))])
        window = torch.tensor(ids[: self.length])
        return {"input_ids": window, "labels": window.clone()}


def conversation_texts(
    images: Sequence[ImageAnnotations], sampler: ConversationSampler, region_format: str, seed: int
) -> Iterator[str]:
    """What the language model will read, as plain text: every human caption, and one conversation an image."""
    for index, image in enumerate(images):
        yield from image.captions
        conversation = sampler.sample(View(image), {}, seed, index, 0)
        for question, answer in zip(conversation.messages[::2], conversation.messages[1::2], strict=True):
            asked = question["content"].removeprefix(f"{IMAGE_TOKEN}\n")
            asked = replace_placeholders(asked, lambda number: region_format.replace("{n}", str(number)))
            yield f"{asked}\n{answer['content']}"

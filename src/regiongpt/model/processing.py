"""From images, regions and conversations to the tensors the model reads: one path for training and inference.

Shapes: B batch, T tokens, R regions, K region placeholders in a text, S side of the square input image in pixels,
``gh gw`` refined grid.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.images import SquareFrame, load_image
from regiongpt.model.conversations import Messages, Spans, check_turns, control_pattern, expand_regions, images_in
from regiongpt.model.region_grid import split_weights
from regiongpt.prompts import (
    CHAT_TEMPLATES,
    CONTROL_TOKENS,
    IMAGE_TOKEN,
    REGION_TOKEN,
    check_placeholders,
    template_family,
)
from regiongpt.regions import Region

IGNORED = -100
"""Label of a token that the loss leaves out."""

# Beyond this the image is shrunk before it is padded: the square around a 100,000 x 1,000 panorama takes 30 GB.
_LARGEST_SIDE = 8192


def prepare_tokenizer(tokenizer: Any, family: str) -> int:
    """Give a language model's tokenizer the tokens that RegionGPT writes.

    Args:
        tokenizer: a fast transformers tokenizer; changed in place.
        family: the chat template to be used, a key of :data:`regiongpt.prompts.CHAT_TEMPLATES`.

    Returns:
        How many tokens were added; the language model's embeddings must grow to ``len(tokenizer)``.
    """
    turn_tokens = CONTROL_TOKENS[family] if family in ("llama3", "chatml") else ()
    added: int = tokenizer.add_tokens([IMAGE_TOKEN, REGION_TOKEN, *turn_tokens], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return added


class RegionGPTProcessor(ProcessorMixin):  # type: ignore[misc]  # transformers is not typed
    """Image processor, tokenizer and chat template of one checkpoint, plus the grid that regions are pooled on.

    Args:
        image_processor: a transformers image processor that makes S x S pixels of a square image.
        tokenizer: a fast transformers tokenizer that knows ``<image>`` and ``<region>`` (:func:`prepare_tokenizer`).
        image_size: S, pixels.
        num_image_tokens: how many tokens the whole image becomes.
        refined_grid: ``[gh, gw]``, the grid of the refined feature map.
        region_format: what each ``<regionN>`` becomes in the text, ``{n}`` being its number; ``<region>`` in it is the
            one token that the region's embedding replaces.
        pad_fill: ``[r, g, b]``, 0 to 255, for the padding around the image; the image processor's mean by default.
        chat_template: a key of :data:`regiongpt.prompts.CHAT_TEMPLATES`, or jinja with ``generation`` blocks. By
            default that of the tokenizer's family.
        region_grid: side of the square grid of embeddings that a region becomes, over the cells that it touches; 1 for
            the paper's one embedding.

    Raises:
        ConfigError: the tokenizer is slow or lacks a token, or ``region_format`` has no or two ``<region>``.

    Paper: §3.1, §3.2
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_size: int = 224,
        num_image_tokens: int = 49,
        refined_grid: Sequence[int] = (28, 28),
        region_format: str = REGION_TOKEN,
        pad_fill: Sequence[int] | None = None,
        chat_template: str | None = None,
        region_grid: int = 1,
    ):
        # Parameters are not keyword-only because transformers' from_pretrained reads the positional ones.
        if region_format.count(REGION_TOKEN) != 1:
            raise ConfigError(f"expected region_format with {REGION_TOKEN} once, got {region_format!r}")
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"expected a fast tokenizer (it must report offsets), got {type(tokenizer).__name__}")
        missing = [token for token in (IMAGE_TOKEN, REGION_TOKEN) if token not in tokenizer.get_added_vocab()]
        if missing:
            raise ConfigError(f"the tokenizer lacks {' and '.join(missing)}; call prepare_tokenizer on it first")
        self.image_size = int(image_size)
        self.num_image_tokens = int(num_image_tokens)
        self.refined_grid = [int(cells) for cells in refined_grid]
        self.region_format = region_format
        if region_grid < 1:
            raise ConfigError(f"expected region_grid of at least 1, got {region_grid}")
        self.region_grid = int(region_grid)
        mean = getattr(image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        self.pad_fill = (
            [round(255 * level) for level in mean] if pad_fill is None else [int(level) for level in pad_fill]
        )
        self.image_token, self.region_token = IMAGE_TOKEN, REGION_TOKEN
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self.region_token_id = int(tokenizer.convert_tokens_to_ids(REGION_TOKEN))
        template = chat_template or template_family(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=CHAT_TEMPLATES.get(template, template))

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        # Left alone, transformers resizes with torchvision where that is installed and with Pillow where it is not, and
        # the same photograph gives the same checkpoint different pixels on two machines.
        image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kwargs)
        return [image_processor, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs that this processor makes."""
        return ["input_ids", "attention_mask", "pixel_values", "region_weights", "region_ids"]

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Token ids that end an answer: the template's end of turn and the tokenizer's end of text."""
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        encoded = self.encode_conversation(example, with_image=False)
        ids = {int(encoded["labels"][encoded["labels"] != IGNORED][-1])}
        return sorted(ids | ({self.tokenizer.eos_token_id} - {None}))

    @property
    def tokens_per_region(self) -> int:
        """How many tokens, and so rows of region weights, one region takes."""
        return self.region_grid**2

    # -- pieces --------------------------------------------------------------------------------------------------------

    def image_inputs(self, image: Any) -> dict[str, torch.Tensor]:
        """Pad an image to a square and make the tower's input of it.

        Args:
            image: anything that :func:`regiongpt.images.load_image` reads.

        Returns:
            ``pixel_values`` (1, 3, S, S) float32.

        Raises:
            DataError: not a readable image.
            ConfigError: the image processor makes another size than ``image_size``.

        Paper: §4
        """
        picture = load_image(image)
        if max(picture.size) > _LARGEST_SIDE:
            picture = picture.reduce(-(-max(picture.size) // _LARGEST_SIDE))
        red, green, blue = self.pad_fill
        square = SquareFrame(*picture.size).pad(picture, fill=(red, green, blue))
        pixels: torch.Tensor = self.image_processor(square, return_tensors="pt")["pixel_values"]
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ConfigError(
                f"image_size is {self.image_size}, but the image processor makes {tuple(pixels.shape[-2:])}; "
                "change one of them in processor_config.json"
            )
        return {"pixel_values": pixels}

    def region_inputs(self, regions: Sequence[Region], width: int, height: int) -> torch.Tensor:
        """Pooling weights of each region on the refined grid.

        Args:
            regions: in the frame of the original image.
            width: of the original image, pixels.
            height: of the original image, pixels.

        Returns:
            (R, gh, gw) float32; each region's weights sum to 1. Where a region takes several tokens, as many rows for
            each region, one after the other.

        Raises:
            RegionError: a region is empty, wholly outside the image, or otherwise wrong; it is named ``<regionN>``.

        Paper: §3.1
        """
        frame = SquareFrame(width, height)
        weights = np.zeros((len(regions), *self.refined_grid), np.float32)
        for row, region in enumerate(regions):
            checked = region.check(width, height, name=f"<region{row + 1}>")
            weights[row] = checked.pool_weights(frame, *self.refined_grid)
        if self.region_grid > 1 and len(weights):
            weights = np.concatenate([split_weights(each, self.region_grid) for each in weights])
        return torch.from_numpy(weights)

    def encode_conversation(
        self,
        messages: Messages,
        image: Any = None,
        regions: Sequence[Region] | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        region_weights: torch.Tensor | np.ndarray | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        with_image: bool = True,
    ) -> dict[str, Any]:
        """Encode one conversation, for training or to be continued by the model.

        Args:
            messages: turns with ``role`` (an optional ``system`` first, then ``user`` and ``assistant`` by turns) and
                ``content``, a string or transformers' list of parts. Special tokens in the content count as plain text.
            image: anything that :func:`regiongpt.images.load_image` reads; None where its features are supplied to the
                model directly.
            regions: in the frame of the original image. They need ``image`` or ``image_size``.
            image_size: (width, height) of the original image, pixels, where ``image`` is not given.
            region_weights: (R, gh, gw), in place of ``regions``, as :meth:`region_inputs` makes them.
            add_generation_prompt: end where the assistant's answer begins. Unknown placeholders in earlier *answers*
                are then plain text: the model wrote them.
            continue_final_message: end inside the last message, which is the assistant's, to have it continued.
            with_image: False for text without an image.

        Returns:
            ``input_ids`` (T,) int64; ``labels`` (T,) int64, the id where the token belongs to a response or to its end
            of turn and -100 elsewhere (absent when the conversation is to be continued); ``region_ids`` (K,) int64;
            ``region_weights`` (R, gh, gw) float32; ``pixel_values`` (3, S, S) float32 if ``image`` was given;
            ``warnings``, one line for each region never mentioned. :meth:`collate` batches such dictionaries.

        Raises:
            DataError: a question is empty, roles are out of order, or no token is a target of training.
            RegionError: a placeholder is malformed or without its region, or a region is wrong.

        Paper: §3.2
        """
        if regions and region_weights is None:
            if image is not None:
                image = load_image(image)
                image_size = image.size
            if image_size is None:
                raise DataError("regions need the size of their image; give image or image_size=(width, height)")
            region_weights = self.region_inputs(regions, *image_size)
        weights = (
            torch.zeros((0, *self.refined_grid))
            if region_weights is None
            else torch.as_tensor(region_weights, dtype=torch.float32)
        )
        generating = add_generation_prompt or continue_final_message
        n_regions = len(weights) // self.tokens_per_region
        turns = self._turns(messages, with_image, n_regions if generating else None)
        notes = check_placeholders([turn["content"] for turn in turns], n_regions)
        text, spans = self._render(turns, add_generation_prompt, continue_final_message)
        ids, labels, region_ids = self._tokenize(text, spans, n_regions)
        encoded: dict[str, Any] = {
            "input_ids": torch.tensor(ids),
            "region_ids": torch.tensor(region_ids, dtype=torch.long),
            "region_weights": weights,
            "warnings": notes,
        }
        if not generating:
            if all(label == IGNORED for label in labels):
                raise DataError("the conversation has no answer to learn from; give it an assistant turn")
            encoded["labels"] = torch.tensor(labels)
        if image is not None:
            encoded["pixel_values"] = self.image_inputs(image)["pixel_values"][0]
        return encoded

    def collate(
        self,
        encoded: Sequence[Mapping[str, Any]],
        padding_side: str = "right",
        pad_to_multiple_of: int = 1,
    ) -> BatchFeature:
        """Batch conversations of different lengths and numbers of regions.

        Args:
            encoded: what :meth:`encode_conversation` returned; ``vision_features`` (C, h, w) may have been added.
            padding_side: ``"right"`` to train, ``"left"`` to generate.
            pad_to_multiple_of: round T up to a multiple of this.

        Returns:
            ``input_ids``, ``attention_mask`` and, where every item has them, ``labels`` (-100 in the padding), all
            (B, T) int64; ``region_weights`` (B, R, gh, gw), rows of zeros in the padding, and ``region_ids`` (B, K),
            -1 in the padding, both absent where no item has a placeholder; ``pixel_values`` (B, 3, S, S) or
            ``vision_features`` (B, C, h, w), where every item has them.

        Raises:
            ConfigError: ``padding_side`` is neither side.
            DataError: some items have an image and others have not.
        """
        if padding_side not in ("left", "right"):
            raise ConfigError(f"expected padding_side 'left' or 'right', got {padding_side!r}")
        size = len(encoded)
        longest = -(-max(len(item["input_ids"]) for item in encoded) // pad_to_multiple_of) * pad_to_multiple_of
        pad_id = self.tokenizer.pad_token_id
        columns = {"input_ids": torch.full((size, longest), self.tokenizer.eos_token_id if pad_id is None else pad_id)}
        columns["attention_mask"] = torch.zeros((size, longest), dtype=torch.long)
        if all("labels" in item for item in encoded):
            columns["labels"] = torch.full((size, longest), IGNORED)
        for row, item in enumerate(encoded):
            length = len(item["input_ids"])
            place = slice(0, length) if padding_side == "right" else slice(longest - length, longest)
            columns["attention_mask"][row, place] = 1
            for name in columns.keys() & {"input_ids", "labels"}:
                columns[name][row, place] = item[name]
        most_ids = max(len(item["region_ids"]) for item in encoded)
        if most_ids:
            most_regions = max(len(item["region_weights"]) for item in encoded)
            columns["region_ids"] = torch.full((size, most_ids), -1)
            columns["region_weights"] = torch.zeros((size, most_regions, *self.refined_grid))
            for row, item in enumerate(encoded):
                columns["region_ids"][row, : len(item["region_ids"])] = item["region_ids"]
                columns["region_weights"][row, : len(item["region_weights"])] = item["region_weights"]
        for name in ("pixel_values", "vision_features"):
            have = [item[name] for item in encoded if name in item]
            if have and len(have) != size:
                raise DataError(f"{len(have)} of {size} items have {name}; a batch needs it in all of them or in none")
            if have:
                columns[name] = torch.stack(have)
        return BatchFeature(columns)

    # -- the transformers way ------------------------------------------------------------------------------------------

    def apply_chat_template(  # noqa: D417 - template_variables need no line of their own
        self,
        conversation: Messages | Sequence[Messages],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        return_labels: bool = False,
        images: Any = None,
        regions: Any = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        with_image: bool = True,
        padding_side: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> Any:
        """Render one conversation or a batch of them, and encode it if ``tokenize``.

        Args:
            conversation: messages as for :meth:`encode_conversation`, or a list of such conversations.
            chat_template: overrides the processor's own.
            add_generation_prompt: end where the assistant's answer begins.
            continue_final_message: end inside the last message, to have it continued.
            tokenize: return tensors rather than text.
            return_dict: return all of the model's inputs rather than ``input_ids`` alone.
            return_tensors: ``"pt"`` or ``"np"``.
            return_assistant_tokens_mask: add ``assistant_masks`` (B, T), 1 on responses and their ends of turn.
            return_labels: add ``labels`` (B, T).
            images: one image a conversation; by default those found in the messages' content lists.
            regions: a list of regions a conversation (for a single conversation, simply its list).
            image_sizes: (width, height) a conversation, where there are regions but no images.
            with_image: False for text without an image.
            padding_side: by default ``"left"`` for prompts and ``"right"`` for whole conversations.
            processor_kwargs: more of the arguments above, as transformers' pipelines pass them.

        Returns:
            Text (a list of texts for a batch) with ``<image>`` and ``<regionN>`` in place, for the processor; or, if
            ``tokenize``, a BatchFeature of the model's inputs as :meth:`collate` makes it.

        Raises:
            DataError: as for :meth:`encode_conversation`.
            RegionError: as for :meth:`encode_conversation`.
        """
        if processor_kwargs:
            known = {"images": images, "regions": regions, "image_sizes": image_sizes, "padding_side": padding_side}
            known |= {name: value for name, value in processor_kwargs.items() if name in known}
            images, regions, image_sizes, padding_side = known.values()
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations: list[Any] = list(conversation) if batched else [conversation]
        generating = add_generation_prompt or continue_final_message
        region_rows = _per_text(regions, len(conversations), single=not batched)
        rows = [
            self._turns(messages, with_image, len(own or ()) if generating and tokenize else None)
            for messages, own in zip(conversations, region_rows, strict=True)
        ]
        rendered = [
            self._render(turns, add_generation_prompt, continue_final_message, chat_template, **template_variables)
            for turns in rows
        ]
        if not tokenize:
            return [text for text, _ in rendered] if batched else rendered[0][0]
        if images is None:
            found = [images_in(messages) for messages in conversations]
            images = [picture for own in found for picture in own] or None
        batch = self._batch(
            [(text, spans if return_labels or return_assistant_tokens_mask else None) for text, spans in rendered],
            images,
            region_rows,
            image_sizes,
            padding_side or ("left" if generating else "right"),
        )
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = (batch["labels"] != IGNORED).long()
            if not return_labels:
                del batch["labels"]
        batch = _as(batch, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        regions: Any = None,
        *,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Encode text to which the chat template has been applied, with its images and regions.

        Args:
            images: one image a text, or one for all of them; None where features are supplied to the model directly.
            text: one text or several, with ``<image>`` and ``<regionN>`` placeholders. None to process images only.
            regions: a list of regions a text (for a single text, simply its list).
            image_sizes: (width, height) a text, where there are regions but no images.
            return_tensors: ``"pt"`` or ``"np"``.
            padding: anything true; the tensors are as long as the longest text.
            padding_side: ``"left"``, to generate, or ``"right"``.
            add_special_tokens: begin a text with the begin token where it lacks it.

        Returns:
            The model's inputs as :meth:`collate` makes them; only ``pixel_values`` where there is no text.

        Raises:
            ConfigError: ``padding`` is false, but the texts are several.
            DataError: the number of images does not fit the texts, or a text has not one ``<image>`` for its image.
            RegionError: a placeholder is malformed or without its region, or a region is wrong.
        """
        if text is None:
            if images is None:
                raise DataError("expected images, text or both, got neither")
            pixels = [self.image_inputs(image)["pixel_values"] for image in _flat(images)]
            return _as(BatchFeature({"pixel_values": torch.cat(pixels)}), return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        if not padding and len(texts) > 1:
            raise ConfigError(f"expected padding=True for a batch of {len(texts)} texts, got {padding!r}")
        begin = (self.tokenizer.bos_token or "") if add_special_tokens else ""
        begun = [one if one.startswith(begin) else begin + one for one in texts]
        rows = _per_text(regions, len(texts), single=isinstance(text, str))
        batch = self._batch([(one, None) for one in begun], images, rows, image_sizes, padding_side)
        return _as(batch, return_tensors)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _batch(
        self,
        texts: Sequence[tuple[str, Spans | None]],
        images: Any,
        region_rows: Sequence[Any],
        image_sizes: Sequence[tuple[int, int]] | None,
        padding_side: str,
    ) -> BatchFeature:
        """Encode rendered texts with whatever belongs to each."""
        pictures = [load_image(image) for image in _flat(images)]
        if len(pictures) == 1:
            pictures = pictures * len(texts)
        if pictures and len(pictures) != len(texts):
            raise DataError(
                f"expected one image a text, or one for all, got {len(pictures)} images, {len(texts)} texts"
            )
        pixels = {id(picture): self.image_inputs(picture)["pixel_values"][0] for picture in pictures}
        sizes: Sequence[Any] = [picture.size for picture in pictures] or image_sizes or [None] * len(texts)
        items: list[dict[str, Any]] = []
        for (text, spans), own, size in zip(texts, region_rows, sizes, strict=True):
            item: dict[str, Any] = {"region_weights": torch.zeros((0, *self.refined_grid))}
            if own:
                if size is None:
                    raise DataError(
                        "regions need the size of their image; give images or image_sizes=[(width, height)]"
                    )
                item["region_weights"] = self.region_inputs(own, *size)
            for note in check_placeholders(text, len(own or ())):
                warnings.warn(note, stacklevel=3)
            if pictures and text.count(IMAGE_TOKEN) != 1:
                raise DataError(f"expected {IMAGE_TOKEN} once in a text with an image, got {text.count(IMAGE_TOKEN)}")
            ids, labels, region_ids = self._tokenize(text, spans or [], len(own or ()))
            item |= {"input_ids": torch.tensor(ids), "region_ids": torch.tensor(region_ids, dtype=torch.long)}
            if spans is not None:
                item["labels"] = torch.tensor(labels)
            if pictures:
                item["pixel_values"] = pixels[id(pictures[len(items)])]
            items.append(item)
        return self.collate(items, padding_side)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return control_pattern(self.tokenizer, str(self.chat_template))

    def _turns(self, messages: Messages, with_image: bool, forgive_beyond: int | None) -> list[dict[str, str]]:
        return check_turns(messages, self._control, with_image, forgive_beyond)

    def _render(
        self,
        turns: list[dict[str, str]],
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> tuple[str, Spans]:
        """Apply the chat template; returns the text and the character spans of responses and ends of turn."""
        if add_generation_prompt and turns[-1]["role"] != "user":
            raise DataError("expected a question as the last message before an answer, got the assistant's")
        template = CHAT_TEMPLATES.get(chat_template or "", chat_template) or self.chat_template
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            raise ConfigError("the chat template marks no responses; put them between {% generation %} and its end tag")
        texts, spans = render_jinja_template(
            [turns],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **variables},
        )
        return texts[0], spans[0]

    def _tokenize(self, text: str, spans: Spans, n_regions: int) -> tuple[list[int], list[int], list[int]]:
        """Expand placeholders and tokenize; returns ids, labels and the region row of each ``<region>`` token."""
        text, spans, region_ids = expand_regions(text, spans, self.region_format, n_regions)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoding["input_ids"]
        if ids.count(self.region_token_id) != len(region_ids):
            raise RegionError(
                f"expected {len(region_ids)} region tokens in the text, got {ids.count(self.region_token_id)}"
            )
        never = {self.region_token_id, self.image_token_id}  # an embedding stands there, which no word can predict
        labels = [
            token if token not in never and any(start < b and end > a for a, b in spans) else IGNORED
            for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True)
        ]
        # Expanding image and regions in ids rather than in text spares the tokenizer some hundred placeholders.
        counts = {self.image_token_id: self.num_image_tokens, self.region_token_id: self.tokens_per_region}
        for place in [place for place, token in enumerate(ids) if counts.get(token, 1) > 1][::-1]:
            count = counts[ids[place]]
            ids[place : place + 1] = ids[place : place + 1] * count
            labels[place : place + 1] = [IGNORED] * count
        rows = range(self.tokens_per_region)
        return ids, labels, [region * len(rows) + row for region in region_ids for row in rows]


def _flat(images: Any) -> list[Any]:
    """One image, a list of images, or transformers' list of lists, as a list."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in (entry if isinstance(entry, list | tuple) else [entry])]


def _per_text(regions: Any, n_texts: int, single: bool) -> list[Any]:
    """The regions of each text, None where nothing was given; a single text may come with its list itself."""
    if regions is None:
        return [None] * n_texts
    rows = [regions] if single and all(isinstance(region, Region) for region in regions) else list(regions)
    if len(rows) != n_texts or any(isinstance(row, Region) for row in rows):
        raise DataError(f"expected a list of regions for each of {n_texts} text(s), got {len(rows)} entries")
    return rows


def _as(batch: BatchFeature, kind: str | None) -> BatchFeature:
    """Tensors of the kind asked for."""
    if kind in ("pt", None, "auto"):
        return batch
    if kind == "np":
        return BatchFeature({name: value.numpy() for name, value in batch.items()})
    raise ConfigError(f"expected return_tensors 'pt' or 'np', got {kind!r}")

"""Turns images, regions and conversations into the model's tensors, for training and inference.

B batch, T tokens, R regions, K region placeholders in a text, S pixels of the square input's side, gh gw refined grid.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerFast

# From its module: under the package's own name, releases up to 5.16 ask for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from regiongpt import prompts
from regiongpt.errors import ConfigError, DataError, short
from regiongpt.images import SquareFrame, load_image
from regiongpt.prompts import CHAT_TEMPLATES, CONTROL_TOKENS, IMAGE_TOKEN, REGION_TOKEN
from regiongpt.regions import Region
from regiongpt.storage import read_json, write_json

Messages = Sequence[Mapping[str, Any]]

IGNORED = -100
"""Label of a token that the loss leaves out."""

# Beyond this the image is shrunk before it is padded: the square around a 100,000 x 1,000 panorama takes 30 GB.
_LARGEST_SIDE = 8192

# A text that a saved tokenizer has to read as the one in memory does.
_PROBE = (
    "{bos}A chat. USER: <image>\nIs <region> a cat, or <region>? ASSISTANT: It's a cat.{eos}USER: Why? "
    "[1] <region>  two  blanks\n\n\tZürich, 12345 x 0.5 — 東京 🙂 ÉCOLE "
)


def prepare_tokenizer(tokenizer: Any, family: str) -> None:
    """Add the tokens of RegionGPT and a chat template to a fast tokenizer; ConfigError if saving would change it."""
    turn_tokens = () if family == "llama2" else CONTROL_TOKENS[family]  # Llama 2 spells its marks as plain text
    tokenizer.add_tokens([IMAGE_TOKEN, REGION_TOKEN, *turn_tokens], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    text = _PROBE.format(bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")
    try:
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            saved = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # a part written in Python raises an exception of its own kind
        raise ConfigError(f"{type(tokenizer).__name__} cannot be saved as a tokenizer.json: {error}") from error
    ours, theirs = (each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, saved))
    if ours != theirs:
        raise ConfigError(f"{type(tokenizer).__name__} reads a text differently once saved and loaded; use another")


class RegionGPTProcessor(ProcessorMixin):  # type: ignore[misc]  # transformers is not typed
    """Image processor, tokenizer and chat template of one checkpoint, plus the grid that regions are pooled on.

    Args:
        image_processor: makes S x S pixels of a square image.
        tokenizer: a fast tokenizer that :func:`prepare_tokenizer` has given its tokens.
        image_size: S, pixels.
        num_image_tokens: how many tokens the whole image becomes.
        refined_grid: ``[gh, gw]``, the grid of the refined feature map.
        region_format: what each ``<regionN>`` becomes in the text, ``{n}`` being its number; the region's embedding
            replaces the one ``<region>`` in it.
        pad_fill: ``[r, g, b]``, 0 to 255, for the padding around the image; the image processor's mean by default.
        chat_template: a key of :data:`regiongpt.prompts.CHAT_TEMPLATES`, by default the tokenizer's family's, or jinja
            with ``generation`` blocks.
        region_boxes: put each region's box below its weights, for a model with ``region_position``.
        crop_size: side in pixels of a region's own crop, for a model with ``region_crop``; 0 for any other.
        framing: how an image becomes a square: ``pad``, as in the paper, or ``stretch``.
        seen_size: side in pixels of what the tower's patches see of the S x S pixels; S by default.
        mask_weights: ``exact`` areas of regions in cells, or ``sampled`` at points as SpatialRGPT does, which may miss
            a small region: its weights are then zeros.
        citations: how answers name regions in brackets: by the ``numbers`` of the regions, from 1, or by the places of
            their ``mentions`` in the question, from 0, which are mapped to numbers and back.

    Paper: §3.1, §3.2
    """

    # Not keyword-only: transformers' from_pretrained reads the positional parameters.
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
        region_boxes: bool = False,
        crop_size: int = 0,
        framing: str = "pad",
        seen_size: int | None = None,
        mask_weights: str = "exact",
        citations: str = "numbers",
    ):
        if region_format.count(REGION_TOKEN) != 1 or re.search(r"[{}]", region_format.replace("{n}", "")):
            raise ConfigError(f"region_format: expected {REGION_TOKEN} once, no field but {{n}}, got {region_format!r}")
        for name, value, known in (
            ("framing", framing, ("pad", "stretch")),
            ("mask_weights", mask_weights, ("exact", "sampled")),
            ("citations", citations, ("numbers", "mentions")),
        ):
            if value not in known:
                raise ConfigError(f"{name}: expected {' or '.join(known)}, got {short(value)}")
        if mask_weights == "sampled" and framing != "stretch":
            raise ConfigError("mask_weights: sampled ones go with framing stretch; give exact")
        missing = [token for token in (IMAGE_TOKEN, REGION_TOKEN) if token not in tokenizer.get_added_vocab()]
        if missing:
            raise ConfigError(f"the tokenizer lacks {' and '.join(missing)}; call prepare_tokenizer on it first")
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.refined_grid = list(refined_grid)
        self.region_format, self.region_boxes, self.crop_size = region_format, region_boxes, crop_size
        self.framing, self.seen_size = framing, image_size if seen_size is None else seen_size
        self.mask_weights, self.citations = mask_weights, citations
        mean = getattr(image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        self.pad_fill = [round(255 * level) for level in mean] if pad_fill is None else list(pad_fill)
        self.image_token, self.region_token = IMAGE_TOKEN, REGION_TOKEN
        self.image_token_id, self.region_token_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, REGION_TOKEN])
        template = chat_template or prompts.template_family(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=CHAT_TEMPLATES.get(template, template))

    @classmethod
    def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        # By default transformers resizes with torchvision where that is installed and with Pillow where it is not, and
        # the same image gives the same checkpoint different pixels on two machines. It also rebuilds a tokenizer by the
        # rules of its class, which forgets some settings (Llama's ``legacy``); tokenizer.json is what was trained.
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **kwargs)
        return [image_processor, PreTrainedTokenizerFast.from_pretrained(path, **kwargs)]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Save as transformers does, with a tokenizer that is always loaded from tokenizer.json unchanged."""
        files = super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        write_json(path, read_json(path) | {"tokenizer_class": PreTrainedTokenizerFast.__name__}, indent=2)
        return files

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Token ids that end an answer: the template's end of turn and the tokenizer's end of text."""
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        encoded = self.encode_conversation(example, with_image=False)
        ids = {int(encoded["labels"][encoded["labels"] != IGNORED][-1])}
        return sorted(ids | ({self.tokenizer.eos_token_id} - {None}))

    def split_begin(self, text: str) -> tuple[list[int], str]:
        """The begin token of a text as an id, and the rest of the text."""
        begin = self.tokenizer.bos_token  # behind which, as text, some tokenizers leave out a blank
        return ([self.tokenizer.bos_token_id], text[len(begin) :]) if begin and text.startswith(begin) else ([], text)

    def plain_words(self, text: str) -> str:
        """User text for a conversation, stripped: a space is put inside whatever only the template may write."""
        text = text.strip()
        while self._control.search(text):
            text = self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    def pixels_of(self, picture: Image.Image) -> torch.Tensor:
        """The tower's input (1, 3, S, S): an image that ``load_image`` has read, made a square. Paper: §4."""
        small = _small_enough(picture)
        square = small if self.framing == "stretch" else self._square(small)
        return self.image_processor(square, return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]

    def _square(self, picture: Image.Image) -> Image.Image:
        red, green, blue = self.pad_fill
        return SquareFrame(*picture.size).pad(picture, fill=(red, green, blue))

    def region_inputs(self, regions: Sequence[Any], width: int, height: int, first: int = 1) -> torch.Tensor:
        """Pooling weights (R, gh, gw) of regions on the refined grid, each summing to 1. Paper: §3.1.

        With ``region_boxes`` there is one row more, which begins with the box: x0, y0, x1, y1 as shares of the image's
        width and height. Messages number regions from ``first`` on.
        """
        stretched, (rows, columns) = self.framing == "stretch", self.refined_grid
        frame = SquareFrame(width, height, stretched, self.seen_size / self.image_size)
        weights, boxes = (np.zeros((len(regions), each, columns), np.float32) for each in (rows, 1))
        for row, region in enumerate(regions):
            name = f"<region{row + first}>"
            found = Region.of(region, name)
            if self.mask_weights == "sampled":
                mask = found.check(width, height, name).to_mask(width, height)
                weights[row] = sampled_weights(mask, self.image_size, (rows, columns))
            else:
                weights[row] = found.pool_weights(frame, rows, columns, name)
            if self.region_boxes:
                boxes[row, 0, :4] = np.divide(found.bounds(width, height), (width, height) * 2)
        if self.region_boxes:
            weights = np.concatenate([weights, boxes], 1)
        return torch.from_numpy(weights)

    def crop_inputs(self, picture: Image.Image, regions: Sequence[Any]) -> torch.Tensor:
        """Pixels of regions' own crops (R, 3, s, s): squares 1.25 times as long as they, inside the padded image."""
        small, crops = _small_enough(picture), []
        frame, square = SquareFrame(*small.size), self._square(small)
        for region in regions:
            bounds = np.multiply(Region.of(region).bounds(*picture.size), small.width / picture.width)
            side = min(frame.side, max(1, round(1.25 * float(max(bounds[2:] - bounds[:2])))))
            x, y = (
                min(max(round((low + high - side) / 2) + gap, 0), frame.side - side)
                for low, high, gap in zip(bounds[:2].tolist(), bounds[2:].tolist(), frame.offset, strict=True)
            )
            crop = square.crop((x, y, x + side, y + side))
            crops.append(crop.resize((self.crop_size, self.crop_size), self.image_processor.resample))
        if not crops:
            return torch.zeros(0, 3, self.crop_size, self.crop_size)
        how = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        return self.image_processor(crops, **how)["pixel_values"]  # type: ignore[no-any-return]

    def read_citations(self, answer: str, question: str) -> str:
        """An answer of the model to a question, with regions named by their numbers."""
        if self.citations == "numbers":
            return answer
        return prompts.renumber(answer, dict(enumerate(prompts.placeholders(question))), unknown="[?]")

    def write_citations(self, answer: str, question: str) -> str:
        """An answer that names regions by their numbers as the model itself would write it."""
        if self.citations == "numbers":
            return answer
        mentions = prompts.placeholders(question)
        return prompts.renumber(answer, {number: mentions.index(number) for number in mentions})

    def check_detail(self, detail: str) -> None:
        """Raise ConfigError for a detail that is unknown, or that the model does not support."""
        if detail not in ("fast", "careful"):
            raise ConfigError(f"expected detail 'fast' or 'careful', got {short(detail)}")
        if detail == "careful" and not self.crop_size:
            raise ConfigError("detail: this model was made without region_crop; give 'fast'")

    def encode_conversation(
        self,
        messages: Messages,
        image: Any = None,
        regions: Sequence[Any] | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        region_weights: torch.Tensor | np.ndarray | None = None,
        add_generation_prompt: bool = False,
        with_image: bool = True,
        detail: str = "fast",
        **variables: Any,
    ) -> dict[str, Any]:
        """Encode one conversation, for training or to be continued by the model. Paper: §3.2.

        Args:
            messages: turns with ``role`` (an optional ``system`` first, then ``user`` and ``assistant`` by turns) and
                ``content``, a string or transformers' list of parts. Special tokens in it count as plain text.
            image: as for :func:`load_image`; None where the model is given its features.
            regions: whatever :meth:`Region.of` takes.
            image_size: (width, height) of the original image in pixels, for regions without ``image``.
            region_weights: in place of ``regions``, as :meth:`region_inputs` makes them.
            add_generation_prompt: end where the assistant's answer begins. Unknown placeholders in earlier *answers*
                are then plain text: the model wrote them.
            with_image: False for text without an image.
            detail: ``"careful"`` adds ``region_crops`` (R, 3, s, s), a second look at the regions of ``image``.

        Returns:
            ``input_ids`` (T,); ``labels`` (T,), -100 outside of responses and their ends of turn (without
            ``add_generation_prompt``); ``region_ids`` (K,); ``region_weights`` (R, gh, gw); ``pixel_values`` (3, S, S)
            if ``image`` was given; ``warnings``, a line for each region never mentioned.

        Raises:
            DataError: a question is empty, roles are out of order, or no token is a target of training.
            RegionError: a placeholder is malformed or without its region, or a region is wrong.
        """
        self.check_detail(detail)
        if image is not None:
            image = load_image(image)
            image_size = image.size
        regions = [] if regions is None else regions
        if region_weights is None:
            if len(regions) and image_size is None:
                raise DataError("regions need the size of their image; give image or image_size as (width, height)")
            region_weights = self.region_inputs(regions, *(image_size or (1, 1)))
        n_regions = len(region_weights)
        turns = self._turns(messages, with_image, n_regions if add_generation_prompt else None)
        notes = prompts.check_placeholders([turn["content"] for turn in turns], n_regions)
        region_ids: list[int] = []
        for turn in turns:
            turn["content"], named = expand_regions(turn["content"], self.region_format)
            region_ids += named
        encoded = self._encode(*self._render(turns, add_generation_prompt, **variables), region_ids)
        encoded |= {"region_weights": torch.as_tensor(region_weights).float(), "warnings": notes}
        if add_generation_prompt:
            del encoded["labels"]
        elif bool((encoded["labels"] == IGNORED).all()):
            raise DataError("the conversation has no answer to learn from; add one, or set add_generation_prompt")
        if image is not None:
            encoded["pixel_values"] = self.pixels_of(image)[0]
        if detail == "careful" and len(regions):
            if image is None:
                raise DataError("detail 'careful' needs the image; give it")
            encoded["region_crops"] = self.crop_inputs(image, regions)
        return encoded

    def collate(self, encoded: Sequence[Mapping[str, Any]], padding_side: str = "right") -> BatchFeature:
        """Batch what :meth:`encode_conversation` returned, padded on the right to train, on the ``"left"`` to generate.

        ``vision_features`` (C, h, w) may have been added. Padding is -100 in ``labels``, -1 in ``region_ids``, rows of
        zeros in ``region_weights`` and ``region_crops``. What no item has is absent.
        """
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": IGNORED}
        columns = {
            name: pad_sequence([item[name] for item in encoded], True, value, padding_side)
            for name, value in fill.items()
            if all(name in item for item in encoded)
        }
        ones = [torch.ones_like(item["input_ids"]) for item in encoded]
        columns["attention_mask"] = pad_sequence(ones, True, 0, padding_side)
        if any(len(item["region_ids"]) for item in encoded):
            for name, value in (("region_ids", -1), ("region_weights", 0)):
                columns[name] = pad_sequence([item[name] for item in encoded], True, value)
            crops = next((item["region_crops"] for item in encoded if "region_crops" in item), None)
            if crops is not None:
                blank = [crops.new_zeros(len(item["region_weights"]), *crops.shape[1:]) for item in encoded]
                each = [item.get("region_crops", none) for item, none in zip(encoded, blank, strict=True)]
                columns["region_crops"] = pad_sequence(each, True)
        for name in ("pixel_values", "vision_features"):
            have = [item[name] for item in encoded if name in item]
            if have and len(have) != len(encoded):
                raise DataError(f"{len(have)} of {len(encoded)} items have {name}; give it to every item or to none")
            if have:
                columns[name] = torch.stack(have)
        return BatchFeature(columns)

    def apply_chat_template(
        self,
        conversation: Messages,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        images: Any = None,
        regions: Any = None,
        add_generation_prompt: bool = False,
        with_image: bool = True,
        **options: Any,
    ) -> Any:
        """Render a conversation, or encode it as :meth:`encode_conversation` does, a batch of one in PyTorch's tensors.

        Args:
            tokenize: return tensors rather than text with ``<image>`` and ``<regionN>`` in place.
            return_dict: return all of the model's inputs rather than ``input_ids`` alone.
            images: the image, maybe in a list; by default that in the messages' parts.
            regions: as for :meth:`Region.list_of`.
        """
        if not tokenize:
            return self._render(self._turns(conversation, with_image), add_generation_prompt, **options)[0]
        if images is None:
            contents = [message.get("content") for message in conversation if isinstance(message, Mapping)]
            images = [image for each in contents for image in _content(each, "content")[1] if image is not None]
        images = images if isinstance(images, list | tuple) else [images]
        if len(images) > 1:
            raise DataError(f"expected one image, got {len(images)}")
        image = images[0] if images else None
        regions = None if regions is None else Region.list_of(regions)
        how = {"add_generation_prompt": add_generation_prompt, "with_image": with_image, **options}
        item = self.encode_conversation(conversation, image, regions, **how)
        for note in item.pop("warnings"):
            warnings.warn(note, stacklevel=2)
        batch = self.collate([item])
        batch.pop("labels", None)
        return batch if return_dict else batch["input_ids"]

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: only a conversation says where image and regions stand."""
        raise ConfigError("the processor is not called itself; use apply_chat_template(..., tokenize=True)")

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Strings that only the template may write, never user text: special tokens and turn markers."""
        special = [token for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        marks = {mark for tokens in CONTROL_TOKENS.values() for mark in tokens if mark in str(self.chat_template)}
        found = {token.content for token in special} | marks | {IMAGE_TOKEN, REGION_TOKEN}
        breakable = sorted((token for token in found if len(token.strip()) > 1), key=len, reverse=True)
        # A tokenizer that lower-cases may do so before it looks for its special tokens.
        flags = re.IGNORECASE if any(token.normalized for token in special) else 0
        return re.compile("|".join(map(re.escape, breakable)), flags)

    def _turns(self, messages: Messages, with_image: bool, forgive_beyond: int | None = None) -> list[dict[str, str]]:
        """Turns with contents as strings; placeholders beyond ``forgive_beyond`` in the assistant's are plain text."""
        turns: list[dict[str, str]] = []
        expected: tuple[str, ...] = ("system", "user")
        first_question = True
        known = {f"<region{number}>" for number in range(1, (forgive_beyond or 0) + 1)}
        if not isinstance(messages, Sequence):
            raise DataError(f"messages: expected a list of turns, got {type(messages).__name__}")
        for position, message in enumerate(messages, 1):
            where = f"message {position} of {len(messages)}"
            role = message.get("role") if isinstance(message, Mapping) else None
            if role not in expected:
                got = repr(role) if role else short(message)
                raise DataError(f"{where}: expected a dictionary with role {' or '.join(expected)}, got {got}")
            text, images = _content(message.get("content"), where)
            is_first = role == "user" and first_question
            n_images = len(images) + (is_first and text.startswith(IMAGE_TOKEN))
            text = text.removeprefix(IMAGE_TOKEN) if is_first else text
            if n_images > (with_image and is_first):
                raise DataError(f"{where}: expected one image, in the first question, got {n_images} here")
            wanted = {"user": "a question", "assistant": "an answer"}.get(role, "a prompt")
            prompts.check_text(text, f"{wanted} as {where}")
            # A trailing blank is kept out because no tokenizer spells it the same way with and without a next word.
            text = text.strip()
            if role == "assistant" and forgive_beyond is not None:
                text = prompts.PLACEHOLDER.sub(
                    lambda match: match[0] if match[0] in known else f"< {match[0][1:]}", text
                )
            prompts.placeholders(text)  # a malformed one is an error, not a control token to be broken up
            text = self.plain_words(text)
            if is_first:
                text = f"{IMAGE_TOKEN}\n{text}" if with_image else text
                first_question = False
            if role == "assistant":
                text = self.write_citations(text, turns[-1]["content"])
            turns.append({"role": str(role), "content": text})
            expected = ("assistant",) if role == "user" else ("user",)
        if first_question:
            raise DataError("expected a conversation with a question in it, got none; add a user message")
        return turns

    def _render(
        self, turns: list[dict[str, str]], add_generation_prompt: bool, **variables: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of turns, and the character spans of responses and ends of turn in it."""
        if add_generation_prompt and turns[-1]["role"] != "user":
            raise DataError("expected a question as the last message before an answer, got the assistant's")
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template):
            raise ConfigError("the chat template marks no responses; put them between {% generation %} and its end tag")
        how = {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
        how |= {**self.tokenizer.special_tokens_map, **variables}
        texts, spans = render_jinja_template([turns], return_assistant_tokens_mask=True, **how)
        return texts[0], spans[0]

    def _encode(self, text: str, spans: list[tuple[int, int]], region_ids: list[int]) -> dict[str, Any]:
        """Tokenize a text with expanded placeholders; tokens within the spans are labels."""
        begun, rest = self.split_begin(text)
        encoding = self.tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = begun + encoding["input_ids"]
        cut = len(text) - len(rest)
        places = [(0, cut)] * len(begun) + [(start + cut, end + cut) for start, end in encoding["offset_mapping"]]
        # An embedding stands in place of these, which no word can predict; expanding ids spares the tokenizer hundreds.
        counts = {self.image_token_id: self.num_image_tokens, self.region_token_id: 1}
        expanded, labels = [], []
        for token, (start, end) in zip(ids, places, strict=True):
            is_target = token not in counts and any(start < b and end > a for a, b in spans)
            count = counts.get(token, 1)
            expanded += [token] * count
            labels += [token if is_target else IGNORED] * count
        return {
            "input_ids": torch.tensor(expanded),
            "labels": torch.tensor(labels),
            "region_ids": torch.tensor(region_ids, dtype=torch.long),
        }


def _small_enough(picture: Image.Image) -> Image.Image:
    """The image, or a smaller copy of one whose square would not fit into memory."""
    if max(picture.size) > _LARGEST_SIDE:
        picture = picture.reduce(-(-max(picture.size) // _LARGEST_SIDE))
    return picture


def sampled_weights(mask: NDArray[np.bool_], side: int, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Weights of a mask (H, W) on a grid: the nearest pixels of a square, sampled bilinearly at the cells' centres."""
    # Nearest as OpenCV rounds it: its factor is the inverse of an inverse, and misses some whole numbers.
    rows, columns = (
        np.minimum(np.floor(np.arange(side) * (1 / (side / size))), size - 1).astype(int) for size in mask.shape
    )
    square = torch.from_numpy(mask[np.ix_(rows, columns)]).float()[None, None]
    points = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)[0, 0]
    return (points / (points.sum() + 1e-8)).numpy()


def expand_regions(text: str, region_format: str) -> tuple[str, list[int]]:
    """Write each ``<regionN>`` as ``region_format`` says; returns the text, and the 0-based region of each in order."""
    expanded = prompts.replace_placeholders(text, lambda number: region_format.replace("{n}", str(number)))
    return expanded, [number - 1 for number in prompts.placeholders(text)]


def _content(content: Any, where: str) -> tuple[str, list[Any]]:
    """Text and images of a message's string or list of parts; None for an image that is not in its part."""
    if isinstance(content, str):
        return content, []
    texts, images = [], []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text":
            texts.append(str(part.get("text", "")))
        elif kind == "image":
            images.append(next((part[key] for key in ("image", "path", "url") if key in part), None))
        else:
            raise DataError(f"{where}: expected content as a string or parts of type text or image, got {kind!r}")
    return "\n".join(texts), images

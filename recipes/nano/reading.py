"""The recipe's own language model: its tokenizer, its shape, and the text it is pre-trained on.

That is human captions, conversations, and exercises in names, in which the blurred name of what a region or a cell of
the image shows stands in for its embedding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from conversations import DEFAULT_MIX, ClassStatistics, ConversationSampler
from dataset import shown_in_cells
from recipe import NanoModelConfig, NanoRecipe
from sentences import plain_place
from torch.utils.data import Dataset
from transformers import LlamaConfig

from regiongpt.data.coco import ImageAnnotations
from regiongpt.data.facts import UNKNOWN as CANNOT_TELL
from regiongpt.data.facts import View, pick, size_name
from regiongpt.model.processing import IGNORED
from regiongpt.prompts import COCO_80, IMAGE_TOKEN, REGION_TOKEN, placeholders, question, replace_placeholders
from regiongpt.train.stages import train_tokenizer

READING_MIX = {
    "classify": 4.0,
    "describe": 1.2,
    "caption": 0.6,
    "refer": 1.0,
    "relation": 0.8,
    "locate": 3.0,
    "presence": 2.5,
    "locate_each": 1.0,
    "presence_each": 0.8,
    "image_caption": 0.6,
    "where": 0.8,
    "size": 0.3,
    "check": 0.6,
    "compare": 0.5,
    "count": 0.1,
    "other": 0.4,
}
"""Turns of each task in a conversation that is read: more about several regions than in one about images."""

UNKNOWN = len(COCO_80)
"""Stands in for what shows no class: noise alone."""

LENGTH = 160
"""Tokens of a window."""

FIRST, EXERCISES, LISTED = 0.15, 0.35, 0.3
"""Share of the windows, at the beginning, that hold exercises alone, whose names are exact; they become blurred over as
many windows again. Then the share of exercises among the texts, and of listed ones among those about regions."""

ABSENT, ALONE = 0.5, 0.3
"""Share of the exercises in finding a region, after the first ones, that ask for names of none of them too; and of
those in naming that show one region alone."""

IMAGED = 0.7
"""Share of what is asked about regions that an image comes before, as one always does when the whole model answers."""

SIGHTINGS, PLACINGS, NAMINGS = 0.15, 0.2, 0.3
"""Share of the exercises that are about an image alone, of those that ask for places, where regions have one, and of
those that ask for names; the rest ask for numbers. Names are many words, where the others are two or six: with a third
of each, names alone were not learned. With numbers in a fifth, 45 % of the regions were found after all training, where
chance gives 30 %; with numbers in a third, 99 %."""

READ_GRID = 6
"""Most rows and columns of an image in the texts, where a cell is a token of its own."""

PLACES = 0.7
"""Share of the exercises in placing that ask where a region is; the others ask how large it is."""

BLANKS = 0.02
"""Share of the exercises that are about an image that shows nothing."""

NOWHERE = (0.0, 0.0, 0.0, 0.0)
"""The box of what is no region."""

_TRIES = 4  # texts that may turn out too long for what is left of a window
_MOST_REGIONS, _MOST_NAMES, _MOST_CELLS = 5, 5, 3  # in an exercise: and on each side of a rectangle


@dataclass(frozen=True, kw_only=True)
class Text:
    """One turn as the language model reads it.

    Attributes:
        pieces: By turns what is given and what is supervised; a region is its region token, an image its image token.
        shown: For each region in order, the index of its class.
        cells: For each cell of the image, the index of a class that it shows, or :data:`UNKNOWN`; empty without one.
        boxes: For each region its box, as shares of the image's width and height.
    """

    pieces: tuple[str, ...]
    shown: tuple[int, ...] = ()
    cells: tuple[int, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()


def conversation_texts(
    images: Sequence[ImageAnnotations],
    sampler: ConversationSampler,
    region_format: str,
    grid: tuple[int, int],
    seed: int,
) -> Iterator[Text]:
    """Every human caption, and one conversation an image, turn by turn.

    Half of the closed-set questions are asked of a class that is drawn evenly, so that rare ones are read too.
    """
    for index, image in enumerate(images):
        rng = np.random.default_rng((seed, 23, index))
        yield from (Text(pieces=("", caption)) for caption in image.captions)
        view = View(image)
        conversation = sampler.sample(view, {}, seed, index, 0)
        shown = shown_in_cells(view, grid)
        # What few cells show at all would else be lost among what many do, and be asked for nevertheless.
        rarest = np.argsort(shown.sum(0), kind="stable")
        cells = tuple(int(rarest[each[rarest].argmax()]) if each.any() else UNKNOWN for each in shown)
        for ask, answer in zip(conversation.messages[::2], conversation.messages[1::2], strict=True):
            asked, said = ask["content"].removeprefix(f"{IMAGE_TOKEN}\n"), answer["content"]
            numbers = placeholders(asked)
            classes = [COCO_80.index(conversation.categories[number - 1]) for number in numbers]
            if len(classes) == 1 and said == COCO_80[classes[0]] and rng.random() < 0.5:
                classes = [int(rng.integers(len(COCO_80)))]
                said = COCO_80[classes[0]]
            seen = not numbers or rng.random() < IMAGED
            given = _opening(asked, seen, region_format)
            size = (image.width, image.height)
            bounds = [conversation.regions[number - 1].bounds(*size) for number in numbers]
            boxes = tuple(tuple(np.divide(each, size * 2).tolist()) for each in bounds)
            yield Text(pieces=(given, " " + said), shown=tuple(classes), cells=cells if seen else (), boxes=boxes)


def exercise(
    region_format: str,
    rng: np.random.Generator,
    listed: bool = False,
    grid: tuple[int, int] = (0, 0),
    absent: int = 0,
) -> Text:
    """Some regions, then their names in another order, each followed by the number of its region, or by 0.

    The numbers alone are supervised: to look where the embedding like a word is.

    Args:
        region_format: What a region becomes.
        rng: Draws the exercise.
        listed: With a question before it, and brackets around the numbers.
        grid: Rows and columns of the image before it; zeros for none.
        absent: Number of names to ask for that none of the regions has.
    """
    count = int(rng.integers(2, _MOST_REGIONS + 1))
    classes = rng.choice(len(COCO_80), count + absent, replace=False)
    asked = rng.permutation(count + absent)
    regions = (", " if listed else "").join(f"<region{number}>" for number in range(1, count + 1))
    asked_for = f"Find each of these names among {regions}." if listed else regions
    cells = image_of(grid, rng)
    pieces = [_opening(asked_for, bool(cells), region_format)]
    for region in asked:
        pieces[-1] += f" {COCO_80[classes[region]]}" + " [" * listed
        pieces += [str(region + 1 if region < count else 0), "]," * listed]
    return Text(
        pieces=tuple(pieces), shown=tuple(map(int, classes[:count])), cells=cells, boxes=random_boxes(rng, count)
    )


def naming(region_format: str, rng: np.random.Generator, grid: tuple[int, int] = (0, 0)) -> Text:
    """Some regions, then their numbers in another order, each followed by the name; or one region, and its name.

    The names alone are supervised; arguments as for :func:`exercise`.
    """
    count = 1 if rng.random() < ALONE else int(rng.integers(2, _MOST_REGIONS + 1))
    classes = rng.choice(len(COCO_80), count, replace=False)
    regions = "".join(f"<region{number}>" for number in range(1, count + 1))
    cells = image_of(grid, rng)
    pieces = [_opening(regions, bool(cells), region_format)]
    for region in rng.permutation(count):
        pieces[-1] += str(region + 1) * (count > 1)
        pieces += [f" {COCO_80[classes[region]]}", ""]
    return Text(pieces=tuple(pieces), shown=tuple(map(int, classes)), cells=cells, boxes=random_boxes(rng, count))


def placing(region_format: str, rng: np.random.Generator, grid: tuple[int, int] = (0, 0)) -> Text:
    """Some regions, then their numbers in another order, each followed by where the region is, or how large.

    Places and sizes alone are supervised; arguments as for :func:`exercise`.
    """
    count = 1 if rng.random() < ALONE else int(rng.integers(2, _MOST_REGIONS + 1))
    classes, boxes = rng.choice(len(COCO_80), count, replace=False), random_boxes(rng, count)
    cells = image_of(grid, rng)
    pieces = [_opening("".join(f"<region{number}>" for number in range(1, count + 1)), bool(cells), region_format)]
    for region in rng.permutation(count):
        x0, y0, x1, y1 = boxes[region]
        place = plain_place((x0, y0, x1, y1), 1, 1) if rng.random() < PLACES else None
        pieces[-1] += str(region + 1) * (count > 1)
        pieces += [f" {place or size_name((x0, y0, x1, y1), 1, 1)}", ""]
    return Text(pieces=tuple(pieces), shown=tuple(map(int, classes)), cells=cells, boxes=boxes)


def random_boxes(rng: np.random.Generator, count: int) -> tuple[tuple[float, ...], ...]:
    """Boxes anywhere in an image, small ones as often as large ones."""
    sides = np.exp(rng.uniform(np.log(0.03), 0, (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (1 - sides)
    return tuple(map(tuple, np.concatenate([corners, corners + sides], 1).tolist()))


def blank(region_format: str, rng: np.random.Generator, grid: tuple[int, int]) -> Text:
    """A question about an image, and a region of it, that shows nothing."""
    task = pick(rng, ("classify", "describe", "caption", "image_caption", "presence"))
    regions, name = [] if task in ("image_caption", "presence") else [1], COCO_80[int(rng.integers(len(COCO_80)))]
    asked = question(task, int(rng.integers(10)), regions=regions, category=name)
    given, count = _opening(asked, True, region_format), len(regions)
    said = "No." if task == "presence" else CANNOT_TELL
    cells = (UNKNOWN,) * (grid[0] * grid[1])
    shown, boxes = (UNKNOWN,) * count, random_boxes(rng, count)
    return Text(pieces=(given, " " + said), shown=shown, cells=cells, boxes=boxes)


def sightings(grid: tuple[int, int], rng: np.random.Generator) -> Text:
    """An image of the given rows and columns, then names, each followed by whether a cell shows it."""
    cells = image_of(grid, rng)
    there = sorted({*cells} - {UNKNOWN})
    absent = [name for name in rng.permutation(len(COCO_80)) if name not in there]
    asked = [*map(int, rng.permutation(there)[:_MOST_NAMES]), *map(int, absent[: rng.integers(1, _MOST_NAMES + 1)])]
    pieces = [f"{IMAGE_TOKEN}\n"]
    for name in rng.permutation(asked):
        pieces[-1] += f" {COCO_80[name]}"
        pieces += [" Yes" if name in there else " No", ""]
    return Text(pieces=tuple(pieces), cells=cells)


def image_of(grid: tuple[int, int], rng: np.random.Generator) -> tuple[int, ...]:
    """What each cell of a made-up image shows: some classes in rectangles, and else :data:`UNKNOWN`."""
    cells = np.full(grid, UNKNOWN)
    if not cells.size:
        return ()
    for name in rng.choice(len(COCO_80), rng.integers(1, _MOST_NAMES + 2), replace=False):
        (top, left), (high, wide) = rng.integers(grid), rng.integers(1, _MOST_CELLS + 1, 2)
        cells[top : top + high, left : left + wide] = name
    return tuple(map(int, cells.flat))


def _opening(asked: str, seen: bool, region_format: str) -> str:
    """A line of question, with its regions written out, behind the image where there is one."""
    written = replace_placeholders(asked, lambda number: region_format.replace("{n}", str(number)))
    return f"{IMAGE_TOKEN}\n" * seen + written + "\n"


def sampler_of(
    config: NanoRecipe, images: Sequence[ImageAnnotations], mix: Mapping[str, float] | None = None
) -> ConversationSampler:
    """The sampler of a recipe's conversations, or of those in another mix."""
    return ConversationSampler(
        ClassStatistics.of(images),
        mix or config.data.mix or DEFAULT_MIX,
        suffixes=config.data.suffixes,
        outline_share=config.data.outline_share,
        present_share=0.5 if mix else config.data.present_share,
    )


def texts_of(config: NanoRecipe, images: Sequence[ImageAnnotations]) -> list[Text]:
    """What the language model reads."""
    drawn = sampler_of(config, images, READING_MIX)
    return list(conversation_texts(images, drawn, config.model.region_format, _grid_of(config.model), config.seed))


def reading_of(config: NanoRecipe, texts: Sequence[Text], tokenizer: Any) -> "TextDataset":
    """The windows in which the language model reads them."""
    shape = config.model
    settings = (config.seed, config.language.epochs, shape.region_position > 0)
    return TextDataset(texts, tokenizer, shape.region_format, _grid_of(shape), *settings)


def tokenizer_of(texts: Sequence[Text], shape: NanoModelConfig) -> Any:
    """A byte-level BPE of these texts."""
    plain = ("".join(text.pieces).replace(REGION_TOKEN, "").replace(IMAGE_TOKEN, "") for text in texts)
    return train_tokenizer(plain, shape.vocab_size, shape.max_length)


def language_of(shape: NanoModelConfig, tokenizer: Any) -> LlamaConfig:
    """The shape of the language model that a recipe trains for itself."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _grid_of(shape: NanoModelConfig) -> tuple[int, int]:
    side = min(shape.image_grid or READ_GRID, READ_GRID)
    return side, side


class TextDataset(Dataset[dict[str, Any]]):
    """Windows of several texts that do not see each other, in a seeded order; exercises alone come first.

    Args:
        texts: What to read.
        tokenizer: Tokenizer of the language model.
        region_format: What a region becomes in exercises.
        grid: Rows and columns of an image in exercises.
        seed: Seed of the order.
        epochs: Passes over the texts, exercises not counted.
        placed: Whether a region carries the code of its place.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: Any,
        region_format: str,
        grid: tuple[int, int],
        seed: int,
        epochs: float,
        placed: bool = True,
    ) -> None:
        self.region, self.image = (tokenizer.convert_tokens_to_ids(token) for token in (REGION_TOKEN, IMAGE_TOKEN))
        self.tokenizer, self.region_format, self.grid, self.seed = tokenizer, region_format, grid, seed
        self.placed = placed
        # Exercises are made of few pieces, over and over.
        self._tokens = lru_cache(4096)(lambda piece: tokenizer(piece, add_special_tokens=False)["input_ids"])
        self.documents = [each for each in map(self._encoded, texts) if len(each[0]) <= LENGTH]
        self.tokens = sum(len(ids) for ids, *_ in self.documents)
        self.items = math.ceil(epochs * self.tokens / LENGTH)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, 5, item))
        first = item < FIRST * self.items
        share = 1.0 if first else EXERCISES
        columns: tuple[list[Any], ...] = ([], [], [], [], [])
        number = misses = 0
        while misses < _TRIES:
            if rng.random() < share:
                document = self._encoded(self._exercise(rng, first))
            else:
                document = self.documents[int(rng.integers(len(self.documents)))]
            if len(columns[0]) + len(document[0]) > LENGTH:
                misses += 1
                continue
            number += 1
            values: Any
            for column, values in zip(columns, (*document, [number] * len(document[0])), strict=True):
                column.extend(values)
        names = ("input_ids", "labels", "stand_ins", "boxes", "turns")
        fillers = (self.tokenizer.pad_token_id, IGNORED, -1, NOWHERE, -1)
        example = {}
        for name, column, filler in zip(names, columns, fillers, strict=True):
            example[name] = torch.tensor(column + [filler] * (LENGTH - len(column)))
        blur = min(max(item / (FIRST * self.items) - 1, 0.0), 1.0)
        return {**example, "noise_seeds": torch.tensor(int(rng.integers(2**62))), "blurs": torch.tensor(blur)}

    def _exercise(self, rng: np.random.Generator, first: bool) -> Text:
        kind = rng.random()
        if not first and kind > 1 - BLANKS:
            return blank(self.region_format, rng, self.grid)
        if kind < SIGHTINGS:
            return sightings(self.grid, rng)
        grid = self.grid if rng.random() < IMAGED else (0, 0)
        if kind < SIGHTINGS + PLACINGS and self.placed:
            return placing(self.region_format, rng, grid)
        if kind < SIGHTINGS + PLACINGS + NAMINGS:
            return naming(self.region_format, rng, grid)
        if first:
            return exercise(self.region_format, rng)
        absent = int(rng.integers(1, 3)) if rng.random() < ABSENT else 0
        return exercise(self.region_format, rng, bool(rng.random() < LISTED), grid, absent)

    def _encoded(self, text: Text) -> tuple[list[int], list[int], list[int], list[tuple[float, ...]]]:
        """Token ids, labels, the classes that stand in, -1 for words, and the boxes of regions."""
        ids: list[int] = []
        labels: list[int] = []
        for place, piece in enumerate(text.pieces):
            tokens = self._tokens(piece)
            if not place:
                tokens = [self.tokenizer.bos_token_id, *tokens]
            if place % 2 and place + 1 == len(text.pieces):
                tokens = [*tokens, self.tokenizer.eos_token_id]
            ids += tokens
            labels += tokens if place % 2 else [IGNORED] * len(tokens)
        for place in [place for place, token in enumerate(ids) if token == self.image]:
            ids[place : place + 1] = [self.image] * len(text.cells)
            labels[place : place + 1] = [IGNORED] * len(text.cells)
        # A region may take several tokens, all of which show the same.
        taken = ids.count(self.region) // max(1, len(text.shown))
        regions, cells = (each for each in text.shown for _ in range(taken)), iter(text.cells)
        sources = {self.region: regions, self.image: cells}
        boxes = (each for each in text.boxes for _ in range(taken))
        shown = [next(sources[token]) if token in sources else -1 for token in ids]
        return ids, labels, shown, [next(boxes) if token == self.region else NOWHERE for token in ids]

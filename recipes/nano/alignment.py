"""Losses that tie what the connector writes for a region to the name of its class.

A small language model that has read about regions in words looks for words; what an untrained connector writes looks
like none, and the gradient through the language model hardly says how to change that. Two things close the gap. While
it reads text alone, the language model gets *stand-ins* in place of regions: the embedding of the class's name, blurred
as a connector will blur it. And while refinement and connector learn, a second loss pulls what they write for a region
towards its class's name and away from the other classes'.

Paper: §3.2, "to align the image features with language embeddings".
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regiongpt.model.modeling import number_ids, position_code
from regiongpt.prompts import COCO_80
from regiongpt.train.dataset import answer_output
from regiongpt.train.packing import isolate_turns

SHARPNESS = 10.0
"""Logit of a class whose name is written exactly; and what the misfit of direction counts beside the cross-entropy."""

FEW = 5.0
"""Regions of each class that are taken for granted."""

CELL_WEIGHT = 0.1
"""What a cell of the image counts beside a region: it often holds background and parts of several objects."""

NOISE, RIVAL, STRETCH = 2.5, 0.7, 0.4
"""Bounds of a stand-in's blur: length of random noise and share of another class's name, in lengths of a name, and the
spread of the logarithm of its length."""


FOUND = 0.3
"""Scale of what a comparing head reads from a token that it finds."""


class ClassWords:
    """The word embeddings of the classes' names, as they are at the moment.

    Args:
        tokenizer: Tokenizer of the language model.
        counts: How many regions of each class there are, (80,), any of which may be 0; equal if None.

    Attributes:
        shares: (80,) of the classes among the regions; they add up to one.
    """

    def __init__(self, tokenizer: Any, counts: Iterable[float] | None = None) -> None:
        # As if each class had been seen a few times more: one that was never seen is not infinitely rare.
        seen = torch.tensor([0.0] * len(COCO_80) if counts is None else list(counts)) + FEW
        self.shares = seen / seen.sum()
        tokens = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in COCO_80]
        mean = torch.zeros(len(tokens), len(tokenizer))
        for row, ids in enumerate(tokens):
            mean[row].index_add_(0, torch.tensor(ids), torch.full((len(ids),), 1 / len(ids)))
        self.used = mean.any(0).nonzero()[:, 0]
        self.mean = mean[:, self.used]

    def __call__(self, table: Tensor) -> Tensor:
        """The mean of the word embeddings of each class's name: (80, D) from a table (V, D), on its device."""
        return self.mean.to(table.device) @ table[self.used.to(table.device)]


class Marks(NamedTuple):
    """What is added to a stand-in, as the whole model adds it to what it sees.

    Attributes:
        region: The id of ``<region>``.
        offset: How far before a region its number stands, the word of which is added; 0 if regions carry none.
        image: The id of ``<image>``, the word of which is added to each cell; None if cells carry none.
        position: Length of the code of a region's place; 0 if regions carry none.
    """

    region: int
    offset: int = 0
    image: int | None = None
    position: float = 0.0


def stand_in_loss(words: ClassWords, marks: Marks, model: Any, batch: Mapping[str, Tensor], items: Any) -> Tensor:
    """Loss of the language model on texts in which blurred names stand for regions and for cells of the image.

    Args:
        words: Class words of the same tokenizer.
        marks: What regions and cells carry beside the names.
        model: A causal language model.
        batch: ``input_ids``, ``labels``, ``stand_ins`` and ``turns`` (B, T): the class whose name stands at a token, 80
            for none, -1 for a word; the text that a token belongs to; ``boxes`` (B, T, 4) of regions as shares of the
            image; ``noise_seeds`` and ``blurs`` (B,), in [0, 1].
        items: Target tokens of the optimiser step.
    """
    table = model.get_input_embeddings()
    embeds, names = table(batch["input_ids"]), words(table.weight)
    blurred = []
    columns = (batch["stand_ins"], batch["noise_seeds"].tolist(), batch["blurs"].tolist())
    for classes, seed, strength in zip(*columns, strict=True):
        classes = classes[classes >= 0]
        blurred.append(blur(names, classes, torch.Generator().manual_seed(seed), strength))
    embeds = embeds.masked_scatter((batch["stand_ins"] >= 0)[..., None], torch.cat(blurred).to(embeds.dtype))
    is_region = batch["input_ids"] == marks.region
    if marks.position:
        # As long, beside a name, as it will be: untrained words are short, and a whole code would drown them.
        length = marks.position * names.detach().norm(dim=-1).mean()
        embeds[is_region] = embeds[is_region] + length * position_code(batch["boxes"][is_region], embeds.shape[-1])
    if marks.offset:
        embeds[is_region] = embeds[is_region] + table(number_ids(batch["input_ids"], marks.region, marks.offset))
    if marks.image is not None:
        embeds[batch["input_ids"] == marks.image] += table.weight[marks.image]
    mask, positions = isolate_turns(batch["turns"])
    return cast(
        Tensor,
        model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            labels=batch["labels"],
            num_items_in_batch=items,
            use_cache=False,
        ).loss,
    )


def blur(names: Tensor, classes: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Names as a connector may write them, (N, D): with noise, with some of another class, longer or shorter.

    Args:
        names: (80, D) from :class:`ClassWords`.
        classes: (N,) which of them; 80 for noise alone.
        generator: Draws the blur, on the CPU.
        strength: From 0, exact names, to 1.
    """
    count, width = len(classes), names.shape[1]
    noise = torch.randn(count, width, generator=generator) / width**0.5
    rivals = torch.randint(len(names), (count,), generator=generator)
    shares = torch.rand(count, 3, generator=generator)
    stretch = (strength * STRETCH * torch.randn(count, 1, generator=generator)).exp()
    noise, rivals, shares, stretch = (each.to(names.device) for each in (noise, rivals, shares, stretch))
    length = names.detach().norm(dim=-1).mean()
    rival_share = strength * RIVAL * shares[:, 1:2] * (shares[:, 2:3] < 0.5)
    named = torch.cat([names, torch.zeros_like(names[:1])])
    blurred: Tensor = stretch * (
        named[classes] + strength * NOISE * shares[:, :1] * length * noise + rival_share * names[rivals]
    )
    return blurred


def visual_loss(
    words: ClassWords, weight: float, answers: bool, model: Any, batch: dict[str, Any], items: Any
) -> Tensor:
    """Loss of the whole model: its answers', and ``weight`` times that of the alignment.

    Both are sums, over target tokens and over regions, divided by the target tokens of the optimiser step.

    Args:
        words: Class words of the same tokenizer.
        weight: Target tokens that a region's alignment counts for; 0 leaves the alignment out.
        answers: Whether the language model answers at all.
        model: RegionGPT.
        batch: Its inputs, with ``labels``; and ``region_classes`` (B, R), -1 where none, and ``cell_classes`` (B, N,
            80), True for what an image token's cell shows.
        items: Target tokens of the optimiser step.
    """
    classes, cells = batch.pop("region_classes"), batch.pop("cell_classes")
    with _outputs_of(model.connector) as written:
        if answers:
            loss = answer_output(model, batch, items).loss
        else:
            refined = model.refine(batch["vision_features"])
            model.image_features(refined)
            if "region_weights" in batch:
                model.region_features(refined, batch["region_weights"], batch.get("region_crops"))
            loss = 0.0
    if weight:
        names = words(model.get_input_embeddings().weight).detach()
        shares = words.shares.to(names.device)
        image_BND, *regions_BRD = written
        sums = CELL_WEIGHT * cell_alignment(image_BND, cells, names)
        for region_BRD in regions_BRD:
            sums = sums + region_alignment(region_BRD, classes, names, shares)
        loss = loss + weight * sums / items
    return cast(Tensor, loss)


def likeness(embeds: Tensor, names: Tensor) -> Tensor:
    """Cosine of embeddings (..., D) and names (80, D): (..., 80).

    A cosine, because whatever else an embedding holds drowns the name for a reader of words: with the part along the
    names alone trained, the rest grew to three times a word's length, and nothing was read.
    """
    return F.normalize(embeds.float(), dim=-1) @ F.normalize(names.float(), dim=-1).T


def region_alignment(embeds_BRD: Tensor, classes_BR: Tensor, names: Tensor, shares: Tensor) -> Tensor:
    """Sum over regions, but for those of class -1, of three misfits: of the class, of the direction and of the length.

    With the cross-entropy of the class alone, embeddings lay at a cosine of 0.45 to their name, and a language model
    that looks for words found little. One minus the cosine asks for the name itself and, where that is in doubt, for
    the mean of the names in question. Common classes count less, by the square root of their share: otherwise half of
    every embedding says "person", which every third region is.

    Args:
        embeds_BRD: Region embeddings.
        classes_BR: Their classes, -1 where there is no region.
        names: (80, D) from :class:`ClassWords`.
        shares: (80,) of the classes, from there.
    """
    embeds, classes = embeds_BRD[classes_BR >= 0], classes_BR[classes_BR >= 0]
    cosines = likeness(embeds, names)
    common = shares.sqrt()
    entropy = F.cross_entropy(SHARPNESS * cosines + common.log(), classes, reduction="sum")
    missed = 1 - cosines.gather(-1, classes[:, None])[:, 0]
    direction = SHARPNESS * (missed / common[classes]).sum() / common.sum()
    return entropy + direction + _stretch(embeds, names).sum()


def cell_alignment(embeds_BND: Tensor, classes_BNK: Tensor, names: Tensor) -> Tensor:
    """Sum over image cells of the misfit of the length and, where a cell shows any class, of two more.

    Minus the log of what the classes shown get together, and how far off the direction of the nearest of their names
    is.
    """
    shown = classes_BNK.any(-1)
    cosines, absent = likeness(embeds_BND[shown], names), ~classes_BNK[shown]
    entropy = -(SHARPNESS * cosines).log_softmax(-1).masked_fill(absent, -torch.inf).logsumexp(-1).sum()
    direction = SHARPNESS * (1 - cosines.masked_fill(absent, -1.0).amax(-1)).sum()
    return entropy + direction + _stretch(embeds_BND, names).sum()


def _stretch(embeds: Tensor, names: Tensor) -> Tensor:
    """Squared logarithm of how many times the length of a word an embedding is."""
    times: Tensor = embeds.float().norm(dim=-1) / names.float().norm(dim=-1).mean()
    return times.clamp_min(1e-4).log() ** 2


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module returns at each call."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@torch.no_grad()
def compare_at_first(model: Any, layers: int, seed: int) -> None:
    """Make half the heads of the first layers attend to tokens like their own, and pass on what those hold.

    Whether an image shows what a word names is a search for an embedding like the word's, which a small model hardly
    learns from random weights. Trockman and Kolter, *Mimetic Initialization of Self-Attention Layers*, arXiv
    2305.09828. Query and key of a head become the same random orthonormal projection, values another one, which the
    output undoes.

    Args:
        model: An untrained Llama with as many keys as queries; changed in place.
        layers: How many layers from the first; 0 leaves the model as it is.
        seed: Seed of the projections.
    """
    heads, size = model.config.num_attention_heads, model.config.head_dim
    for index, layer in enumerate(model.model.layers[:layers]):
        attention = layer.self_attn
        for head in range(heads // 2):
            rows = slice(head * size, (head + 1) * size)
            generator = torch.Generator().manual_seed((seed * len(model.model.layers) + index) * heads + head)
            alike, found = (_orthonormal(size, model.config.hidden_size, generator) for _ in range(2))
            attention.q_proj.weight[rows] = alike
            attention.k_proj.weight[rows] = alike
            attention.v_proj.weight[rows] = FOUND * found
            attention.o_proj.weight[:, rows] = found.T


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random rows, each of length one and at right angles to the others: (rows, columns)."""
    drawn = torch.randn(columns, rows, generator=generator)
    orthonormal: Tensor = torch.linalg.qr(drawn).Q
    return orthonormal.T

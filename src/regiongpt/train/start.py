"""What training starts from: a new model of a tower and a language model, or a checkpoint that matches the recipe."""

import ctypes
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from regiongpt.errors import CheckpointError
from regiongpt.images import load_image
from regiongpt.model import weights
from regiongpt.model.configuration import RegionGPTConfig
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN, chat_template, closed_set_suffix
from regiongpt.storage import new_folder
from regiongpt.train.known import language_shape, tower_shape
from regiongpt.train.recipe import ModelConfig, Recipe

_OF_PARTS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")


def save_whole(folder: Path, model: Any, processor: Any) -> None:
    """Write a checkpoint, so that a folder of this name is always whole."""
    with new_folder(folder) as beside:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)


def create_start(shape: ModelConfig, language: str | Path, folder: Path, images: Sequence[Path] = ()) -> None:
    """Join a tower and a language model by an untrained refinement and connector, unless that has been done.

    Args:
        shape: Shape of the model.
        language: Folder or hub name of the language model.
        folder: Where to write the checkpoint.
        images: Training images to measure the mean and spread of the tower's channels on.
    """
    if (folder / "config.json").exists():
        return
    model, processor = weights.create(
        shape.vision,
        language,
        **_shape_options(shape),
        # A language model that the recipe has trained itself knows the plain template.
        chat_template=(shape.chat_template or None) if shape.language else "plain",
        region_format=shape.region_format,
        region_grid=shape.region_grid,
        region_numbers=shape.region_numbers,
        image_marks=shape.image_marks,
    )
    if images:
        calibrate(model, processor, images)
    save_whole(folder, model, processor)


def new_shape(shape: ModelConfig, vision: Any, language: Any = None) -> RegionGPTConfig:
    """Configuration of the model that :func:`create_start` makes, by the configurations of its parts."""
    return RegionGPTConfig(vision_config=vision, text_config=language, **_shape_options(shape))


def _shape_options(shape: ModelConfig) -> dict[str, Any]:
    return {
        "image_size": shape.image_size or None,
        "refinement": shape.refinement,
        "refinement_channels": shape.refinement_channels or None,
        "connector_size": shape.connector_size or None,
        "image_grid": [shape.image_grid] * 2 if shape.image_grid else None,
    }


def check_start(config: Recipe) -> None:
    """Check that a recipe can start, without making anything; raises a RegionGPTError if not."""
    config.check_files()
    if config.model.init and config.with_start().model.init:
        read_shape(config.model.folder)
        check_shape(config.model, config.model.folder)
        return
    tower, _ = weights.load_tower(config.model.vision, config.model.image_size or None)
    new_shape(config.model, tower.config)


def check_shape(shape: ModelConfig, folder: Path) -> None:
    """Check that a checkpoint is what the recipe's [model] describes, if that names a language model.

    Raises:
        CheckpointError: The folder is no RegionGPT checkpoint, or differs; the message lists every difference.
    """
    if not shape.language:
        return
    config = read_shape(folder)
    grid = [shape.image_grid] * 2 if shape.image_grid else config.image_grid
    pairs: dict[str, tuple[Any, Any]] = {
        "refinement": (config.refinement, shape.refinement),
        "refinement_channels": (config.refinement_channels, shape.refinement_channels or None),
        "connector_size": (config.connector_size, shape.connector_size or None),
        "image_size": (config.image_size, shape.image_size or config.image_size),
        "image_grid": (list(config.image_grid), grid),
        "region_numbers": (bool(config.region_number_offset), shape.region_numbers),
        "image_marks": (config.image_marks, shape.image_marks),
    }
    try:
        described = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        # The first releases did not write the paper's values.
        pairs["region_grid"] = described.get("region_grid", 1), shape.region_grid
        pairs["region_format"] = described.get("region_format", "<region>"), shape.region_format
    except (OSError, ValueError, AttributeError):
        pass  # reported where the checkpoint is loaded
    parts = (
        ("vision", config.vision_config, tower_shape(shape.vision)),
        ("language", config.text_config, language_shape(shape.language)),
    )
    for part, ours, theirs in parts:
        for name in _OF_PARTS:
            pairs[f"{part}.{name}"] = getattr(ours, name, None), getattr(theirs, name, None)
    wrong = [f"{name} is {got} there and {wanted} here" for name, (got, wanted) in pairs.items() if got != wanted]
    if wrong:
        raise CheckpointError(
            f"{folder}: not the checkpoint that the recipe describes: {'; '.join(wrong)}; correct model.init or the "
            "recipe's [model], or give another --out"
        )


def read_shape(folder: Path) -> RegionGPTConfig:
    """Configuration of a checkpoint folder, without its weights; CheckpointError if it has none."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no checkpoint there")
    with weights.reading(f"the configuration of {folder}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, RegionGPTConfig):
        raise CheckpointError(
            f"expected a RegionGPT checkpoint in {folder}; its config.json says model_type {config.model_type!r}"
        )
    return config


@torch.no_grad()
def calibrate(model: Any, processor: Any, images: Sequence[Path]) -> None:
    """Measure on some images the mean and spread of what goes into the refinement and into the connector, in place.

    The connector's output layer is scaled so that what it writes begins with the length of a word. Of towers, an
    EfficientNet-Lite alone is changed.
    """
    pixels = [processor.pixels_of(load_image(each)) for each in images]
    if model.config.vision_config.model_type == "efficientnet_lite":
        tower = model.vision_tower
        _standardise(tower, [model.encode_image(each)[0, : len(tower.mean)].flatten(1).T for each in pixels])
    pooled = [model.refinement.pool_image(model.refine(model.encode_image(each)))[0] for each in pixels]
    _standardise(model.connector, pooled)
    written = model.connector(torch.cat(pooled))
    words = model.get_input_embeddings().weight
    model.connector.linear_2.weight.mul_(words.norm(dim=-1).mean() / written.norm(dim=-1).mean())


def _standardise(module: Any, samples: Sequence[Tensor]) -> None:
    """Set the buffers ``mean`` and ``std`` of a module by samples (N, C) that they do not yet act on."""
    values = torch.cat(list(samples)).double()
    module.mean.copy_(values.mean(0))
    module.std.copy_(values.std(0).clamp_min(1e-3))


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of so many tokens in which digits stand alone, and the closed-set suffix is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=["<pad>", "<s>", "</s>", IMAGE_TOKEN, REGION_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([" " + closed_set_suffix()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN, REGION_TOKEN],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template("plain")
    return fast


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back: on a CPU the tower then runs twice as fast.

    Activations of tens of megabytes are otherwise mapped anew for every layer, and zeroing fresh pages costs more than
    the convolutions.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)

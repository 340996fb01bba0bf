"""What training starts from: a new model of a tower and a language model, or a checkpoint that matches the recipe."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig

from regiongpt.errors import CheckpointError
from regiongpt.model import weights
from regiongpt.model.configuration import RegionGPTConfig
from regiongpt.storage import new_folder
from regiongpt.train.features import calibrate
from regiongpt.train.known import language_shape, tower_shape
from regiongpt.train.recipe import ModelConfig, Recipe

Image = TypeVar("Image")
_OF_PARTS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")


def save_whole(folder: Path, model: Any, processor: Any) -> None:
    """Write a checkpoint so that a folder of this name is whole.

    Raises:
        DataError: It cannot be written.
    """
    with new_folder(folder) as beside:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)


def measured_on(images: Sequence[Image]) -> Sequence[Image]:
    """About 128 evenly spread images, to measure a tower's channels on."""
    return images[:: max(1, len(images) // 128)]


def create_start(
    shape: ModelConfig,
    language: str | Path,
    folder: Path,
    images: Sequence[Path] = (),
) -> None:
    """Join a tower and a language model by an untrained refinement and connector, unless that has been done.

    Args:
        shape: Shape of the model.
        language: Folder or hub name of the language model.
        folder: Where to write the checkpoint.
        images: Training images to measure the mean and spread of the tower's channels on.

    Raises:
        CheckpointError: A part cannot be read or lacks weights, or its tokenizer is another's.
        ConfigError: The shape does not fit the parts.
        DataError: The checkpoint cannot be written.
    """
    if (folder / "config.json").exists():
        return
    model, processor = weights.create(
        shape.vision,
        language,
        image_size=shape.image_size or None,
        refinement=shape.refinement,
        refinement_channels=shape.refinement_channels or None,
        connector_size=shape.connector_size or None,
        image_grid=[shape.image_grid] * 2 if shape.image_grid else None,
        # The project's own language model is trained with the plain template.
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
    """Configuration of the model that :func:`create_start` makes.

    Args:
        shape: Shape of the model.
        vision: Configuration of its tower.
        language: Configuration of its language model; any where it does not matter.

    Raises:
        ConfigError: The parts do not fit each other.
    """
    return RegionGPTConfig(
        vision_config=vision,
        text_config=language,
        image_size=shape.image_size or None,
        refinement=shape.refinement,
        refinement_channels=shape.refinement_channels or None,
        connector_size=shape.connector_size or None,
        image_grid=[shape.image_grid] * 2 if shape.image_grid else None,
    )


def check_start(config: Recipe) -> None:
    """Check that a recipe can start, without making anything.

    Raises:
        ConfigError: The parts of a new model do not fit each other, or stage 2 comes first.
        CheckpointError: The checkpoint is missing or of another shape; the tower cannot be read.
        DataError: Data is missing.
    """
    config.check_files()
    if config.data.on_records and config.with_start().model.init:
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
    """Configuration of a checkpoint folder, without its weights.

    Raises:
        CheckpointError: The folder has none, or that of another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no checkpoint there")
    with weights.reading(f"the configuration of {folder}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, RegionGPTConfig):
        raise CheckpointError(
            f"expected a RegionGPT checkpoint in {folder}; its config.json says model_type {config.model_type!r}"
        )
    return config

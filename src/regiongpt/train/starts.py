"""What training begins with: a new model of a tower and a language model, or a checkpoint held to its description."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.model import weights
from regiongpt.model.configuration import RegionGPTConfig
from regiongpt.train.features import calibrate, calibrate_like
from regiongpt.train.recipe import ModelConfig
from regiongpt.train.shapes import language_shape, tower_shape

Image = TypeVar("Image")
_OF_PARTS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")


def save_whole(folder: Path, model: Any, processor: Any) -> None:
    """Writes beside the folder and renames, so that a folder that exists is whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(folder)


def start_shape(shape: ModelConfig) -> ModelConfig:
    """That of a model on photographs: a recipe that trains its own language model teaches it the plain template."""
    return shape if shape.language else shape.replace(chat_template="plain")


def measured_on(images: Sequence[Image]) -> Sequence[Image]:
    """Those of the photographs that a tower's channels are measured on: 128 or somewhat more, evenly spread."""
    return images[:: max(1, len(images) // 128)]


def create_start(
    shape: ModelConfig,
    language: str | Path,
    folder: Path,
    photographs: Sequence[Path],
    like: tuple[Path, Sequence[Tensor]] | None = None,
) -> None:
    """Joins a tower and a language model by an untrained refinement and connector, unless that has been done.

    Args:
        shape: Of the model.
        language: Folder or hub name of the language model.
        folder: Gets the checkpoint.
        photographs: Some that are trained on, to measure the mean and spread of the tower's channels on; none to leave
            that out.
        like: In place of photographs: a checkpoint of the same tower, and the tower's features (C, h, w) of some.

    Raises:
        CheckpointError: A part cannot be read or lacks weights, or its tokenizer is another's.
        ConfigError: The shape does not fit the parts.
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
        image_grid=[shape.image_grid, shape.image_grid] if shape.image_grid else None,
        chat_template=shape.chat_template or None,
        region_format=shape.region_format,
        region_grid=shape.region_grid,
        region_numbers=shape.region_numbers,
        image_marks=shape.image_marks,
    )
    if like is not None:
        calibrate_like(model, *like)
    elif photographs:
        calibrate(model, processor, photographs)
    save_whole(folder, model, processor)


def new_shape(shape: ModelConfig, vision: Any, language: Any = None) -> RegionGPTConfig:
    """Configuration of the model that :func:`create_start` makes.

    Args:
        shape: Of the model.
        vision: Configuration of its tower.
        language: Of its language model; that of any where it does not matter.

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


def checkpoint_folder(shape: ModelConfig) -> Path:
    """That of the checkpoint that a recipe on records begins with."""
    return weights.nano_path() if shape.init == "nano" else Path(shape.init)


def needs_calibration(shape: ModelConfig) -> bool:
    """Whether the tower's channels differ so much in scale that they have to be measured first."""
    return bool(tower_shape(shape.vision).model_type == "efficientnet_lite")


def check_shape(shape: ModelConfig, folder: Path) -> None:
    """Holds a checkpoint to what a recipe says that it is made of; says nothing where the recipe says nothing.

    Raises:
        CheckpointError: The folder is no RegionGPT checkpoint, or differs; the message lists every difference.
    """
    if not shape.language:
        return
    config = read_shape(folder)
    cells = [shape.image_grid, shape.image_grid] if shape.image_grid else config.image_grid
    pairs: dict[str, tuple[Any, Any]] = {
        "refinement": (config.refinement, shape.refinement),
        "refinement_channels": (config.refinement_channels, shape.refinement_channels or None),
        "connector_size": (config.connector_size, shape.connector_size or None),
        "image_size": (config.image_size, shape.image_size or config.image_size),
        "image_grid": (list(config.image_grid), cells),
        "region_numbers": (bool(config.region_number_offset), shape.region_numbers),
        "image_marks": (config.image_marks, shape.image_marks),
    }
    try:
        described = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        # What the first releases did not write is the paper's.
        pairs |= {"region_grid": (described.get("region_grid", 1), shape.region_grid)}
        pairs |= {"region_format": (described.get("region_format", "<region>"), shape.region_format)}
    except (OSError, ValueError, AttributeError):
        pass  # what is missing or torn is named where the checkpoint is loaded
    for part, ours, theirs in (
        ("vision", config.vision_config, tower_shape(shape.vision)),
        ("language", config.text_config, language_shape(shape.language)),
    ):
        for name in _OF_PARTS:
            pairs[f"{part}.{name}"] = (getattr(ours, name, None), getattr(theirs, name, None))
    wrong = [
        f"{name} is {came} there and {expected} here" for name, (came, expected) in pairs.items() if came != expected
    ]
    if wrong:
        raise CheckpointError(
            f"{folder}: expected a checkpoint of the shape that the recipe gives, got another: {'; '.join(wrong)}; "
            "correct model.init or the recipe's [model], or give another --out"
        )


def read_shape(folder: Path) -> RegionGPTConfig:
    """The configuration of a checkpoint folder, without its weights.

    Raises:
        CheckpointError: It has none, or that of another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"expected a checkpoint folder at {folder}; there is none")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # A damaged file makes transformers raise nearly anything.
    except Exception as error:
        raise CheckpointError(f"cannot read the configuration of {folder}: {error}") from error
    if not isinstance(config, RegionGPTConfig):
        raise CheckpointError(
            f"expected a RegionGPT checkpoint in {folder}; its config.json says model_type {config.model_type!r}"
        )
    return config


def is_untrained(folder: Path) -> bool:
    """Whether what lies between tower and language model has learnt nothing yet: its last bias begins as zeros.

    Args:
        folder: A checkpoint; its weights are not loaded but for that one.
    """
    deconvolves = read_shape(folder).refinement.startswith("deconv")
    name = "refinement.deconv_2.bias" if deconvolves else "connector.linear_2.bias"
    index = folder / "model.safetensors.index.json"
    file = "model.safetensors"
    if index.exists():
        file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name, file)
    try:
        with safe_open(folder / file, "pt") as stored:
            return not bool(stored.get_tensor(name).any())
    # What is missing or torn is named, with what else is, where the checkpoint is loaded.
    except Exception:
        return False


def require_trained(folder: Path, from_scratch: bool) -> str | None:
    """Makes sure that stage 2 begins where stage 1 has been.

    Args:
        folder: The checkpoint that stage 2 is to begin with.
        from_scratch: Whether to go on nevertheless.

    Returns:
        A warning, or None.

    Raises:
        ConfigError: Stage 1 has not been there, and ``from_scratch`` is not given.
    """
    if not is_untrained(folder):
        return None
    said = (
        f"stage 2 begins with {folder}, whose refinement and connector are untrained: the language model would learn "
        "to live with noise"
    )
    if not from_scratch:
        raise ConfigError(f"{said}; run stage 1 first and give its result as model.init, or give --from-scratch")
    return said

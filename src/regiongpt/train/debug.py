"""Any recipe in seconds on a laptop: ``regiongpt train RECIPE --debug``.

Tower and language model are of the recipe's families with a few thousand random weights, the pictures are drawn.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, SiglipImageProcessorPil

from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Rejects, require_data_extra, write_records
from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.prompts import closed_set_suffix
from regiongpt.regions import Region
from regiongpt.storage import locked, write_json, writing
from regiongpt.train.known import language_shape, tower_shape
from regiongpt.train.recipe import ModelConfig, PlanConfig, Recipe, StageConfig
from regiongpt.train.start import create_start, read_shape, save_whole, train_tokenizer

PICTURES = 12
SIZE = (96, 64)
"""Width and height of a drawn picture, in pixels."""

_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
POSITIONS = 512
_KINDS = ((17, "cat", "red", 4), (18, "dog", "blue", 52))
_TEMPLATES = {"llama": "vicuna_v1", "qwen2": "chatml", "qwen3": "chatml"}


def debug_size(config: Recipe, outlines: bool = False) -> Recipe:
    """The same recipe at debug size, with what it needs made beside its run.

    Args:
        config: Any recipe. ``out`` gets ``-debug`` behind its name; what another debug run left there is deleted.
        outlines: Annotate the objects of the pictures with outlines too.

    Returns:
        A recipe of about three optimiser steps per stage.

    Raises:
        ConfigError: The shape of the recipe's tower or language model is not known, a library is missing, or the folder
            holds something else than a debug run, or one that is not finished.
        DataError: The folder cannot be written; nothing is left in it.
    """
    with debug_folder(config, outlines) as made:
        require_data_extra()
        data = config.data
        if data.pretrain_mixture:
            data = data.replace(pretrain_mixture=_write(made / "pretrain", made, with_text=False))
        if data.mixture:
            data = data.replace(mixture=_write(made / "mixture", made, with_text=True))
        if data.dev_mixture:
            data = data.replace(dev_mixture=data.mixture or data.pretrain_mixture)
        return config.replace(
            **few_steps(config, made), data=data.replace(root=""), model=_small_on_records(config.model, made)
        )


@contextmanager
def debug_folder(config: Recipe, outlines: bool = False) -> Iterator[Path]:
    """A new folder ``made`` beside a debug run, with annotated pictures; it is removed if the block fails."""
    out = Path(f"{config.out}-debug")
    with writing(out):
        if out.exists() and {path.name for path in out.iterdir()} - {"made", "run", ".lock"}:
            raise ConfigError(f"{out}: holds something else than a debug run, which would be deleted; give another out")
    with locked(out), locked(out / "run"):
        try:
            with writing(out):
                for name in ("made", "run"):
                    shutil.rmtree(out / name, ignore_errors=True)
                (out / "made").mkdir()
                draw_pictures(out / "made", outlines)
                yield out / "made"
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise


def few_steps(config: Recipe, made: Path, epochs: Mapping[str, float] = {}) -> dict[str, Any]:
    """Settings of a recipe at debug size: about three optimiser steps a stage, of as many micro-batches as before."""
    stages = {}
    for name in config.all_steps:
        stage: StageConfig = getattr(config, name)
        micro = 2 if stage.batch_size > stage.micro_batch_size else 4
        small = {"batch_size": 4, "micro_batch_size": micro, "save_steps": 2, "log_steps": 1}
        stages[name] = stage.replace(epochs=epochs.get(name, 1.0), **small)
    watch = config.watch
    steps = {"dev_steps": min(watch.dev_steps, 2), "answer_steps": min(watch.answer_steps, 2)}
    return {
        **stages,
        "out": made.parent / "run",
        "from_scratch": True,
        "lora": config.lora.replace(rank=min(config.lora.rank, 4)),
        "watch": watch.replace(**steps, dev_items=2, answers=2),
        "plan": PlanConfig(gpu=config.plan.gpu),
        # Data-loading processes take longer to start than all of the run.
        "engine": config.engine.replace(pack_length=min(config.engine.pack_length, POSITIONS), workers=0),
    }


def draw_pictures(folder: Path, outlines: bool = False) -> None:
    """Draw a red cat and a blue dog into each picture, as rectangles, and annotate them in COCO's format."""
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for number in range(1, PICTURES + 1):
        picture = Image.new("RGB", SIZE, "white")
        drawing = ImageDraw.Draw(picture)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE[0], "height": SIZE[1]})
        captions.append({"id": number, "image_id": number, "caption": "A red cat and a blue dog."})
        for kind, _, colour, (x, y, w, h) in _objects(number):
            drawing.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "category_id": kind}
            ring = {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]} if outlines else {}
            boxes.append({"id": len(boxes) + 1, "image_id": number, **box, **ring})
        picture.save(folder / "images" / f"{number}.png")
    categories = [{"id": kind, "name": name} for kind, name, *_ in _KINDS]
    write_json(folder / "instances_train.json", {"images": images, "annotations": boxes, "categories": categories})
    write_json(folder / "captions_train.json", {"images": images, "annotations": captions})


def _objects(number: int) -> Iterator[tuple[int, str, str, tuple[int, int, int, int]]]:
    """Category, its name, colour and box (x, y, width, height) of what is in a picture."""
    rng = np.random.default_rng((0, number))
    for kind, name, colour, left in _KINDS:
        x, y, w = left + int(rng.integers(8)), int(rng.integers(4, 20)), int(rng.integers(16, 30))
        yield kind, name, colour, (x, y, w, 30)


def _write(folder: Path, made: Path, with_text: bool) -> str:
    images = str((made / "images").resolve())
    write_records(folder, _records(with_text), Rejects(), source="debug", images=images, inputs=[], arguments={})
    return str(folder)


def _records(with_text: bool) -> Iterator[Record]:
    """Records of the pictures, a few of text alone among them if the stage can learn from those."""
    for number in range(1, PICTURES + 1):
        if with_text and number % 4 == 0:
            talk = Turn(task="chat", question="What is two and two?", answer="Four.")
            yield Record(id=f"talk/{number}", source="debug", image="", width=0, height=0, regions=(), turns=(talk,))
            continue
        (_, first, _, _), (_, second, colour, _) = objects = list(_objects(number))
        regions = (
            RecordRegion(region=Region.box(x, y, x + w, y + h), category=name) for _, name, _, (x, y, w, h) in objects
        )
        turns = (
            Turn(task="classify", regions=(1,), answer=first, label_set="COCO-80", guided=True),
            Turn(task="caption", regions=(2,), answer=f"a {colour} {second}"),
            Turn(task="chat", question="What are <region1> and <region2>?", answer="A red cat and a blue dog."),
        )
        yield Record(
            id=f"picture/{number}",
            source="debug",
            image=f"{number}.png",
            width=SIZE[0],
            height=SIZE[1],
            regions=tuple(regions),
            turns=turns,
        )


def small_model(shape: ModelConfig, made: Path, vision: str, **values: Any) -> Any:
    """The shape with a tiny new tower of a kind, and other values."""
    return shape.replace(
        vision=str(_make_tower(vision, made / "tower")),
        image_size=0,
        refinement_channels=16 if shape.refinement_channels else 0,
        connector_size=32 if shape.connector_size else 0,
        image_grid=2 if shape.image_grid else 0,
        **values,
    )


def _small_on_records(shape: ModelConfig, made: Path) -> ModelConfig:
    """A new model of the same families, or a checkpoint of them if the recipe continues from one."""
    vision, language = "clip_vision_model", "llama"
    if shape.language:
        vision, language = tower_shape(shape.vision).model_type, language_shape(shape.language).model_type
    else:
        # The checkpoint alone says what it is made of; if it is missing, it is taken for the paper's model.
        try:
            found = read_shape(shape.folder)
            vision, language = found.vision_config.model_type, found.text_config.model_type
            shape = shape.replace(
                refinement=found.refinement,
                refinement_channels=found.refinement_channels or 0,
                connector_size=found.connector_size or 0,
                image_grid=0 if list(found.tower_grid) == found.image_grid else found.image_grid[0],
            )
        except RegionGPTError:
            pass
    model = str(make_language(language, made / "language"))
    template = shape.chat_template or _TEMPLATES.get(language, "plain")
    small: ModelConfig = small_model(shape, made, vision, language=model, chat_template=template, init="")
    if shape.init:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            create_start(small, model, made / "start")
        small = small.replace(init=str(made / "start"))
    return small


def _make_tower(kind: str, folder: Path) -> Path:
    """A tower of random weights, with its image processor."""
    side, patch = 32, 8
    shape: dict[str, Any] = {**_VIT, "image_size": side, "patch_size": patch}
    if kind == "siglip2_vision_model":
        shape = {**_VIT, "num_patches": (side // patch) ** 2, "patch_size": patch}
    elif kind.startswith("dinov2"):
        shape["mlp_ratio"] = 2
    elif kind == "efficientnet_lite":
        side = 64
        shape = {"variant": "efficientnet-lite0", "image_size": side}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = AutoModel.from_config(AutoConfig.for_model(kind, **shape))
    save_whole(folder, tower, SiglipImageProcessorPil(size={"height": side, "width": side}))
    return folder


def make_language(kind: str, folder: Path) -> Path:
    """A language model of random weights, with a tokenizer of the words in the made-up records."""
    texts = [text for record in _records(with_text=True) for each in record.messages(0, 0, 0) for text in each.values()]
    tokenizer = train_tokenizer([*texts, closed_set_suffix()], 400, POSITIONS)
    tokenizer.chat_template = None
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        # As with large ones, a few more than there are tokens: some families' tokenizers add one when they are loaded.
        "vocab_size": len(tokenizer) + 8,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    save_whole(folder, model, tokenizer)
    return folder

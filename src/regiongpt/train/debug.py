"""Any recipe in seconds on a laptop: ``regiongpt train RECIPE --debug``.

Tower and language model are of the recipe's families with a few thousand random weights, the images are drawn.
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
from regiongpt.errors import ConfigError
from regiongpt.prompts import closed_set_suffix
from regiongpt.regions import Region
from regiongpt.storage import locked, write_json, writing
from regiongpt.train.recipe import ModelConfig, Recipe, language_shape, tower_shape
from regiongpt.train.stages import create_start, save_whole, train_tokenizer

IMAGES, WIDTH, HEIGHT, POSITIONS = 12, 96, 64, 512
_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_KINDS = ((17, "cat", "red", 4), (18, "dog", "blue", 52))
_TEMPLATES = {"llama": "vicuna_v1", "qwen2": "chatml", "qwen3": "chatml"}


def debug_size(config: Recipe) -> Recipe:
    """The same recipe with about three optimiser steps per stage, and what it needs made beside its run.

    ``out`` gets ``-debug`` behind its name; what another debug run left there is deleted. ConfigError where the shape
    of tower or language model is not known, or the folder holds something else or is in use; DataError where it cannot
    be written, and then nothing is left in it.
    """
    with debug_folder(config) as made:
        require_data_extra()
        data: dict[str, Any] = {"root": ""}
        for name in ("pretrain_mixture", "mixture"):
            if getattr(config.data, name):
                given: Any = {"images": str((made / "images").resolve()), "inputs": [], "arguments": {}}
                write_records(made / name, _records(name == "mixture"), Rejects(), source="debug", **given)
                data[name] = str(made / name)
        if config.data.dev_mixture:
            data["dev_mixture"] = data.get("mixture", data.get("pretrain_mixture"))
        # A new model of the same families, nano's if none are named; or a checkpoint of it if the recipe has one.
        shape, vision, language = config.model, "efficientnet_lite", "llama"
        if shape.language:
            vision, language = tower_shape(shape.vision).model_type, language_shape(shape.language).model_type
        model = str(make_language(language, made / "language"))
        template = shape.chat_template or _TEMPLATES.get(language, "plain")
        small = small_model(shape, made, vision, language=model, chat_template=template, init="")
        if shape.init:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(2)
                create_start(small, model, made / "start")
            small = small.replace(init=str(made / "start"))
        return config.replace(**few_steps(config, made), data=config.data.replace(**data), model=small)


@contextmanager
def debug_folder(config: Recipe) -> Iterator[Path]:
    """A new folder ``made`` beside a debug run, with annotated images; it is removed if the block fails."""
    out = Path(f"{config.out}-debug")
    with writing(out):
        if out.exists() and {path.name for path in out.iterdir()} - {"made", "run", ".lock"}:
            raise ConfigError(f"{out}: is not a debug run and would be deleted; give another out")
    with locked(out), locked(out / "run"):
        try:
            with writing(out):
                for name in ("made", "run"):
                    shutil.rmtree(out / name, ignore_errors=True)
                (out / "made" / "images").mkdir(parents=True)
                _draw_images(out / "made")
                yield out / "made"
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise


def few_steps(config: Recipe, made: Path, epochs: Mapping[str, float] = {}) -> dict[str, Any]:
    """Settings of a recipe at debug size: about three optimiser steps a stage, of as many micro-batches as before."""
    stages = {}
    for name in config.all_steps:
        stage = getattr(config, name)
        micro = 2 if stage.batch_size > stage.micro_batch_size else 4
        small = {"batch_size": 4, "micro_batch_size": micro, "save_steps": 2, "log_steps": 1}
        stages[name] = stage.replace(epochs=epochs.get(name, 1.0), **small)
    return {
        **stages,
        "out": made.parent / "run",
        "from_scratch": True,
        "lora": config.lora.replace(rank=min(config.lora.rank, 4)),
        "watch": config.watch.replace(dev_steps=min(config.watch.dev_steps, 2), dev_items=2),
        "plan": config.plan.replace(gpus=1),
        # Data-loading processes take longer to start than all of the run.
        "engine": config.engine.replace(workers=0),
    }


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


def make_language(kind: str, folder: Path) -> Path:
    """A language model of random weights, with a tokenizer of the words in the made-up records."""
    texts = [text for record in _records(True) for each in record.messages(0, 0, 0) for text in each.values()]
    tokenizer = train_tokenizer([*texts, closed_set_suffix()], 400, POSITIONS)
    tokenizer.chat_template = None
    shape = {**_SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    # As with large ones, a few more than there are tokens: some families' tokenizers add one when they are loaded.
    shape |= {"vocab_size": len(tokenizer) + 8, "max_position_embeddings": POSITIONS}
    shape |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    save_whole(folder, _drawn(1, AutoModelForCausalLM, kind, shape), tokenizer)
    return folder


def _make_tower(kind: str, folder: Path) -> Path:
    side = 64 if kind == "efficientnet_lite" else 32
    shape: dict[str, Any] = {**_SHAPE, "num_hidden_layers": 3, "image_size": side, "patch_size": 8}
    if kind == "siglip2_vision_model":
        shape["num_patches"] = (shape.pop("image_size") // 8) ** 2
    elif kind.startswith("dinov2"):
        shape["mlp_ratio"] = 2
    elif kind == "efficientnet_lite":
        shape = {"variant": "efficientnet-lite0", "image_size": side}
    processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    save_whole(folder, _drawn(0, AutoModel, kind, shape), processor)
    return folder


def _drawn(seed: int, auto: Any, kind: str, shape: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(AutoConfig.for_model(kind, **shape))


def _draw_images(folder: Path) -> None:
    """Draw a red cat and a blue dog into each image, as rectangles, and annotate them in COCO's format."""
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number in range(1, IMAGES + 1):
        picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
        images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        for kind, _, colour, (x, y, w, h) in _objects(number):
            ImageDraw.Draw(picture).rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "category_id": kind}
            boxes.append({"id": len(boxes) + 1, "image_id": number, **box})
        picture.save(folder / "images" / f"{number}.png")
    categories = [{"id": kind, "name": name} for kind, name, *_ in _KINDS]
    write_json(folder / "instances_train.json", {"images": images, "annotations": boxes, "categories": categories})
    captions = [{**each, "image_id": each["id"], "caption": "A red cat and a blue dog."} for each in images]
    write_json(folder / "captions_train.json", {"images": images, "annotations": captions})


def _objects(number: int) -> Iterator[tuple[int, str, str, tuple[int, int, int, int]]]:
    """Category, its name, colour and box (x, y, width, height) of what is in an image."""
    rng = np.random.default_rng((0, number))
    for kind, name, colour, left in _KINDS:
        x, y, w = left + int(rng.integers(8)), int(rng.integers(4, 20)), int(rng.integers(16, 30))
        yield kind, name, colour, (x, y, w, 30)


def _records(with_text: bool) -> Iterator[Record]:
    """Records of the images, a few of text alone among them if the stage can learn from those."""
    for number in range(1, IMAGES + 1):
        shape: Any = {"image": f"{number}.png", "width": WIDTH, "height": HEIGHT}
        turns: tuple[Turn, ...] = (
            Turn(task="classify", regions=(1,), answer="cat", label_set="COCO-80", guided=True),
            Turn(task="caption", regions=(2,), answer="a blue dog"),
            Turn(task="chat", question="What are <region1> and <region2>?", answer="A red cat and a blue dog."),
        )
        regions = tuple(
            RecordRegion(region=Region.box(x, y, x + w, y + h), category=name)
            for _, name, _, (x, y, w, h) in _objects(number)
        )
        if with_text and number % 4 == 0:
            shape = {"image": "", "width": 0, "height": 0}
            turns, regions = (Turn(task="chat", question="What is two and two?", answer="Four."),), ()
        yield Record(id=f"debug/{number}", source="debug", regions=regions, turns=turns, **shape)

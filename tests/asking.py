"""Tiny random models with their processors, to ask, and the plain way of asking them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tiny import text_config, tower_config, trained_bpe
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from regiongpt.inference.engine import Engine, Scene
from regiongpt.inference.options import Options
from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration, RegionGPTProcessor
from regiongpt.model.configuration import EfficientNetLiteConfig
from regiongpt.model.processing import prepare_tokenizer
from regiongpt.regions import Region


def tiny_parts(
    tower: str = "clip_vision_model", template: str = "vicuna_v1", language: Any = None, seed: int = 0, **options: Any
) -> tuple[RegionGPTForConditionalGeneration, RegionGPTProcessor]:
    """A random model and its processor; ``language`` makes its configuration from the size of the vocabulary."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained_bpe(), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    prepare_tokenizer(tokenizer, template)
    efficient = tower == "efficientnet_lite"
    vision = EfficientNetLiteConfig(variant="efficientnet-lite0", image_size=64) if efficient else tower_config(tower)
    make = language or (lambda size: text_config(vocab_size=size, max_position_embeddings=512))
    config = RegionGPTConfig(
        vision_config=vision,
        text_config=make(len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        region_token_id=tokenizer.convert_tokens_to_ids("<region>"),
        initializer_range=0.3,
        **options,
    )
    torch.manual_seed(seed)
    model = RegionGPTForConditionalGeneration(config).eval()
    side = {"height": config.image_size, "width": config.image_size}
    processor = RegionGPTProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer,
        image_size=config.image_size,
        num_image_tokens=config.num_image_tokens,
        refined_grid=config.refined_grid,
        region_boxes=bool(config.region_position),
        crop_size=config.crop_size,
        chat_template=template,
    )
    return model, processor


def photograph(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def boxes(count: int, seed: int = 0) -> list[Region]:
    """Boxes in a photograph, no two alike."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform([0, 0], [40, 25], (count, 2))
    sizes = generator.uniform(4, 15, (count, 2))
    return [Region.box(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, sizes, strict=True)]


@torch.inference_mode()
def plain_tokens(engine: Engine, photo: Any, messages: Any, regions: Sequence[Region], most: int) -> list[int]:
    """What ``generate`` writes to this one conversation, tower and all."""
    processor, model = engine.processor, engine.model
    encoded = processor.encode_conversation(messages, image=photo, regions=regions, add_generation_prompt=True)
    inputs = processor.collate([encoded])
    new = model.generate(**inputs, max_new_tokens=most, do_sample=False, eos_token_id=processor.stop_token_ids)
    tokens: list[int] = new[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def batch_tokens(
    engine: Engine, scene: Scene, asked: Sequence[tuple[Any, Sequence[Region]]], most: int | Sequence[int]
) -> list[list[int]]:
    """What one batch writes to these conversations."""
    room = [most] * len(asked) if isinstance(most, int) else most
    jobs = []
    for (messages, regions), limit in zip(asked, room, strict=True):
        prompt = engine.prompt(messages, engine.pool(scene, regions), len(regions), limit)
        jobs.append(engine.job(scene, prompt, Options(max_new_tokens=limit)))
    for _ in engine.scheduler.run(jobs):
        pass
    return [job.tokens for job in jobs]

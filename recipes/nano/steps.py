"""nano's steps, in order: language model, start, features, alignment, the two stages of the paper, and polish."""

import logging
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alignment import ClassWords, Marks, compare_at_first, stand_in_loss, visual_loss
from conversations import ConversationSampler
from dataset import EXTRAS, ConversationDataset
from features import FeatureStore, build_features
from naming import Namer
from pooled import pool, train_pooled
from reading import language_of, reading_of, sampler_of, texts_of, tokenizer_of
from recipe import NanoRecipe, NanoStageConfig
from transformers import LlamaForCausalLM, set_seed

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.errors import ConfigError
from regiongpt.model import weights
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN
from regiongpt.train.dataset import DataCollator
from regiongpt.train.debug import POSITIONS, debug_folder, few_steps, make_language, small_model
from regiongpt.train.loop import Loop
from regiongpt.train.recipe import language_shape, tower_shape
from regiongpt.train.stages import check_shape, create_start, save_whole, train_stage, training
from regiongpt.train.watch import note_run

log = logging.getLogger("nano")

HELD = 12
"""One image in so many is left out before stage 2, and shows which names of unseen objects are true."""

WORTH_A_PROCESS = 1_000
"""Images from which on features are cached beside the language step."""


def train(config: NanoRecipe) -> Path:
    """Run every step that is not yet done, and return the folder of the finished checkpoint."""
    with training(config):
        return _train(config)


def _train(config: NanoRecipe) -> Path:
    out = config.out
    set_seed(config.seed)
    data = load_coco(photo_sources(Path(config.data.root), config.data.split))
    log.info("data: %s", data.report())
    images = data.images
    found = {"folder": config.data.root, "split": config.data.split, "found": data.report()}
    note_run(out, config, {"photographs": found})
    sampler = sampler_of(config, images)
    language = Path(config.model.language) if config.model.language else out / "language"
    if not config.model.language and not (language / "config.json").exists():
        if not config.runs("language"):
            raise ConfigError(f"steps: 'language' has left no result in {language}; run that step first")
        with caching_features(config, len(images)):
            train_language(config, images, language)
    elif config.runs("language"):
        log.info("language: already finished, in %s; give another --out to train again", language)
    later = [name for name in config.all_steps[1:] if config.runs(name)]
    if not later:
        return language
    start = out / "start"
    whole = cached_images(config) if config.features.root else images
    set_seed(config.seed)  # whether the language model was made by this call or by an earlier one
    store = start_features(config, language, start, whole)
    check_shape(config.model.replace(language=str(language)), start)
    earlier = [image for k, image in enumerate(images) if k % HELD or not config.sure] or images
    earlier_store = store.part(whole, earlier)
    store = store.part(whole, images)

    finished = start
    for name in config.all_steps[1:]:
        if name not in later:
            finished = out / name / "model" if (out / name / "model").exists() else finished
            continue
        if name == "stage2" and finished.parent.name != "stage1" and not config.from_scratch:
            raise ConfigError(f"stage 2 starts from {finished}; run stage 1 first, or give --from-scratch")

        def prepare(model: Any, processor: Any, name: str = name) -> dict[str, Any]:
            stage: NanoStageConfig = getattr(config, name)
            grid = model.config.image_grid
            words = ClassWords(processor.tokenizer, sampler.statistics.boxes)
            asking, namer = sampler, None
            whole_data = name in ("stage2", "polish")
            learned, rows = (images, store) if whole_data else (earlier, earlier_store)
            if name == "align" and stage.pooled_epochs:
                pooled = pool(learned, rows, model, config.features)
                train_pooled(model, words, pooled, stage, stage.pooled_epochs, config.seed)
            if name == "polish":
                model.language_model.requires_grad_(not config.lora.rank)
            if whole_data and config.sure:
                namer = Namer(model, processor, words)
                namer.measure(images, store, config.sure, {image.image_id for image in images[::HELD]}, stage.blur)
                asking = replace(sampler, statistics=replace(sampler.statistics, confused=namer.confused))
            return {
                "dataset": conversations_of(config, stage, learned, rows, asking, processor, grid, namer),
                "collate": DataCollator(processor, EXTRAS),
                "loss": partial(visual_loss, words, stage.alignment, name != "align"),
                "dev": dev_conversations(config, sampler, model, processor),
            }

        finished = train_stage(config, name, finished, prepare)
    return finished


def start_features(config: NanoRecipe, language: Path, start: Path, images: Sequence[ImageAnnotations]) -> FeatureStore:
    """Join tower and language model, and cache what the tower sees."""
    measured = images[:: max(1, len(images) // 128)]
    create_start(config.model, language, start, [each.path for each in measured])
    model, processor = weights.load(start, device="cpu")
    return build_features(config.out / "features", images, model, processor, config.features)


@contextmanager
def caching_features(config: NanoRecipe, images: int) -> Iterator[None]:
    """Cache features in a process of its own, which is stopped at the end; what is missing then is computed later.

    Two processes on half the cores each take less time than one after the other on all of them.
    """
    threads = torch.get_num_threads()
    half, later = threads // 2, any(config.runs(name) for name in config.all_steps[1:])
    if not half or not later or images < WORTH_A_PROCESS:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=_cache_features, args=(config, half), daemon=True)
    process.start()
    torch.set_num_threads(threads - half)
    try:
        yield
    finally:
        process.terminate()
        process.join()
        torch.set_num_threads(threads)


def _cache_features(config: NanoRecipe, threads: int) -> None:
    """The features depend on the tower alone, so a small language model stands in for the one under way.

    Ends with the process that began it, however that ends: the next run must be the only one that writes them.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as made:
        language = make_language("llama", Path(made) / "language")
        start_features(config, language, Path(made) / "start", cached_images(config))


def cached_images(config: NanoRecipe) -> Sequence[ImageAnnotations]:
    """The images whose features are cached: the training images, or more."""
    return load_coco(photo_sources(Path(config.features.root or config.data.root), config.data.split)).images


def conversations_of(
    config: NanoRecipe,
    stage: NanoStageConfig,
    images: Sequence[ImageAnnotations],
    store: FeatureStore,
    sampler: ConversationSampler,
    processor: Any,
    grid: tuple[int, int],
    namer: Namer | None,
) -> ConversationDataset:
    """The conversations of a stage, all its epochs."""
    items = max(1, round(stage.epochs * len(images)))
    shape = (config.features, config.seed, items, stage.micro_batch_size, config.isolated_share, grid)
    return ConversationDataset(images, store, sampler, processor, *shape, namer, stage.blur)


def dev_conversations(
    config: NanoRecipe, sampler: ConversationSampler, model: Any, processor: Any
) -> ConversationDataset | None:
    """One conversation about each of some dev images, the same ones at every measurement; None without any."""
    if not config.data.dev_split or not config.watch.dev_steps:
        return None
    found = load_coco(photo_sources(Path(config.data.root), config.data.dev_split)).images
    images = found[:: max(1, len(found) // config.watch.dev_items)][: config.watch.dev_items]
    whole = config.features.replace(views=1)
    store = build_features(config.out / "features-dev", images, model, processor, whole)
    grid = model.config.image_grid
    return ConversationDataset(images, store, sampler, processor, whole, config.seed, len(images), 1, 1.0, grid)


def train_language(config: NanoRecipe, images: Sequence[ImageAnnotations], folder: Path) -> None:
    """Train the tokenizer and the language model, and write them."""
    texts = texts_of(config, images)
    shape = config.model
    tokenizer = tokenizer_of(texts, shape)
    model = LlamaForCausalLM(language_of(shape, tokenizer))
    compare_at_first(model, shape.comparing_layers, config.seed)
    dataset = reading_of(config, texts, tokenizer)
    told = (len(texts), dataset.tokens / 1e6, sum(p.numel() for p in model.parameters()) / 1e6)
    log.info("language: %d texts, %.2f M tokens, %.2f M parameters", *told)
    region, image = (tokenizer.convert_tokens_to_ids(token) for token in (REGION_TOKEN, IMAGE_TOKEN))
    offset = weights.number_offset(tokenizer, shape.region_format) if shape.region_numbers else 0
    marks = Marks(region, offset, image if shape.image_marks else None, shape.region_position)
    Loop(
        "language",
        model,
        dataset,
        stacked,
        partial(stand_in_loss, ClassWords(tokenizer), marks),
        config.language,
        folder.with_name("language-checkpoints"),
        config.seed,
        engine=config.engine,
        watch=config.watch,
    ).run()
    save_whole(folder, model, tokenizer)


def stacked(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of windows."""
    return {name: torch.stack([each[name] for each in examples]) for name in examples[0]}


def debug_size(config: NanoRecipe) -> NanoRecipe:
    """The recipe at a size of seconds, on drawn pictures; as :func:`regiongpt.train.debug.debug_size`."""
    with debug_folder(config) as made:
        shape, language = config.model, ""
        if shape.language:
            language = str(make_language(language_shape(shape.language).model_type, made / "language"))
        own = {"vocab_size": 500, "hidden_size": 32, "layers": 1, "heads": 2, "mlp_size": 32, "max_length": POSITIONS}
        vision = tower_shape(shape.vision).model_type
        return config.replace(
            **few_steps(config, made, {"language": 0.2}),
            features=config.features.replace(views=min(config.features.views, 2), root=""),
            data=config.data.replace(root=str(made), dev_split=config.data.dev_split and "train"),
            # Earlier steps must be done too.
            steps=config.steps if "language" in config.steps else (),
            model=small_model(shape, made, vision, language=language, **own),
        )

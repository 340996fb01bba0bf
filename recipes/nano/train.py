"""Train nano, from annotated photographs to a model that answers; run again after an interruption, it continues.

    python recipes/nano/train.py --data.root ../shared/data/coco_photos --out runs/nano

Every setting of nano.toml can be overridden by its dotted name. The steps, each skipped when its result is there:

1. ``language`` - a byte-level BPE and the small language model, on text in which blurred names stand for regions
2. ``features`` - every view of every image through the frozen tower, once
3. ``align`` - refinement and connector learn to write a region's class as the language model's own word
4. ``stage1`` - refinement and connector learn, the language model is frozen (paper §3.2, pre-training stage)
5. ``stage2`` - refinement, connector and language model learn (paper §3.2, fine-tuning stage)
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alignment import ClassWords, Marks, compare_at_first, stand_in_loss, visual_loss
from conversations import ConversationSampler
from dataset import EXTRAS, ConversationDataset
from features import FeatureStore, build_features
from reading import language_of, reading_of, sampler_of, texts_of, tokenizer_of
from recipe import NanoRecipe, NanoStageConfig
from transformers import LlamaForCausalLM, set_seed

from regiongpt.console import progress_shown, quiet_libraries
from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.sampling import dev_questions
from regiongpt.errors import ConfigError, RegionGPTError
from regiongpt.model import weights
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN
from regiongpt.train.answers import Question, choose_questions
from regiongpt.train.checkpoint import resume_of
from regiongpt.train.dataset import DataCollator
from regiongpt.train.debug import POSITIONS, debug_folder, few_steps, make_language, small_model
from regiongpt.train.known import language_shape, tower_shape
from regiongpt.train.loop import run_stage
from regiongpt.train.report import note_run
from regiongpt.train.stages import StageData, train_stage, training
from regiongpt.train.start import check_shape, create_start, save_whole
from regiongpt.train.watch import StageCost

log = logging.getLogger("nano")

RECIPE = Path(__file__).with_name("nano.toml")


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
        train_language(config, images, language)
    elif config.runs("language"):
        log.info("language: finished before, in %s; give another --out to train anew", language)
    later = [name for name in config.all_steps[1:] if config.runs(name)]
    if not later:
        return language
    start = out / "start"
    whole = cached_images(config) if config.features.root else images
    set_seed(config.seed)  # whether the language model was made by this call or by an earlier one
    measured = whole[:: max(1, len(whole) // 128)]
    create_start(config.model, language, start, [each.path for each in measured])
    check_shape(config.model.replace(language=str(language)), start)
    model, processor = weights.load(start, device="cpu")
    store = build_features(out / "features", whole, model, processor, config.features)
    store = store.part(whole, images) if config.features.root else store
    questions = dev_asked(config) if config.watch.answer_steps else ()

    finished = start
    for name in config.all_steps[1:]:
        if name not in later:
            finished = out / name / "model" if (out / name / "model").exists() else finished
            continue
        if name == "stage2" and finished.parent.name != "stage1" and not config.from_scratch:
            raise ConfigError(f"stage 2 starts from {finished}; run stage 1 first, or give --from-scratch")

        def prepare(model: Any, processor: Any, name: str = name) -> StageData:
            stage: NanoStageConfig = getattr(config, name)
            grid = model.config.image_grid
            words = ClassWords(processor.tokenizer, sampler.statistics.boxes)
            return StageData(
                conversations_of(config, stage, images, store, sampler, processor, grid),
                DataCollator(processor, EXTRAS),
                partial(visual_loss, words, stage.alignment, name != "align"),
                dev_conversations(config, sampler, model, processor),
                questions,
            )

        finished = train_stage(config, name, finished, prepare, cached=True, reads=name != "align")
    return finished


def cached_images(config: NanoRecipe) -> Sequence[ImageAnnotations]:
    """The images whose features are cached: those that are trained on, or more."""
    return load_coco(photo_sources(Path(config.features.root or config.data.root), config.data.split)).images


def conversations_of(
    config: NanoRecipe,
    stage: NanoStageConfig,
    images: Sequence[ImageAnnotations],
    store: FeatureStore,
    sampler: ConversationSampler,
    processor: Any,
    grid: tuple[int, int],
) -> ConversationDataset:
    """The conversations of a stage, all its epochs."""
    items = max(1, round(stage.epochs * len(images)))
    shape = (config.features, config.seed, items, stage.micro_batch_size, config.isolated_share, grid)
    return ConversationDataset(images, store, sampler, processor, *shape)


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


def dev_asked(config: NanoRecipe) -> list[Question]:
    """What the model is asked while it trains, by the settings of the watch."""
    data = config.data
    if not data.dev_split:
        raise ConfigError("watch.answer_steps: needs data.dev_split, whose regions are asked about")
    images = load_coco(photo_sources(Path(data.root), data.dev_split)).images

    def found() -> Iterator[Question]:
        number = 0
        for place in np.random.default_rng((config.seed, 41)).permutation(len(images)).tolist():
            path, task = images[place].path, ("describe", "classify", "caption")[number % 3]
            if asked := dev_questions([images[place]], task):
                # The largest region: what is said of it can be held against the picture.
                one = max(asked, key=lambda each: each.share)
                name, regions = f"{path.name} ({task})", tuple(one.regions)
                yield Question(name=name, image=path, regions=regions, text=one.text, expected=one.answer)
                number += 1

    return choose_questions(found(), config.watch.answers, data.dev_split)


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
    run_stage(
        "language",
        model,
        dataset,
        lambda examples: {name: torch.stack([each[name] for each in examples]) for name in examples[0]},
        partial(stand_in_loss, ClassWords(tokenizer), Marks(region, offset, image if shape.image_marks else None)),
        config.language,
        folder.with_name("language-checkpoints"),
        config.seed,
        engine=config.engine,
        watch=config.watch,
        resume=resume_of(config, "language"),
        cost=StageCost.of(model.config, trained=True, sees=False),
    )
    save_whole(folder, model, tokenizer)


def debug_size(config: NanoRecipe, outlines: bool = False) -> NanoRecipe:
    """The recipe at a size of seconds, on drawn pictures; as :func:`regiongpt.train.debug.debug_size`."""
    with debug_folder(config, outlines) as made:
        shape, language = config.model, ""
        if shape.language:
            language = str(make_language(language_shape(shape.language).model_type, made / "language"))
        own = {"vocab_size": 500, "hidden_size": 32, "layers": 1, "heads": 2, "mlp_size": 32, "max_length": POSITIONS}
        vision = tower_shape(shape.vision).model_type
        return config.replace(
            **few_steps(config, made, {"language": 0.2}),
            features=config.features.replace(views=min(config.features.views, 2), root=""),
            data=config.data.replace(root=str(made), dev_split=config.data.dev_split and "train"),
            # What comes before the chosen steps has to be made too.
            steps=config.steps if "language" in config.steps else (),
            model=small_model(shape, made, vision, language=language, **own),
        )


def main(words: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(RECIPE), help="TOML file; nano.toml beside this script")
    parser.add_argument("--debug", action="store_true", help="run in seconds, tiny, on drawn pictures")
    parser.add_argument("--from-scratch", action="store_true", help="let stage 2 start without stage 1")
    options, overrides = parser.parse_known_args(words)
    try:
        recipe = NanoRecipe.load(options.recipe, [*overrides, *["--from_scratch=true"] * options.from_scratch])
        if not options.debug:
            recipe.check_files()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        quiet_libraries()
        with progress_shown():
            print(train(debug_size(recipe) if options.debug else recipe))
    except RegionGPTError as error:
        print(f"nano: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A whole recipe, from annotated photographs or records to a model that answers.

Six steps, each skipped when its result is already in the run's folder, each continuing where it was stopped:

1. ``tokenizer`` - a byte-level BPE of the project's own
2. ``language`` - the small language model, pre-trained on text in which blurred words stand for regions
3. ``features`` - every view of every image through the frozen tower, once
4. ``align`` - refinement and connector learn to write a region's class as the language model's own word
5. ``stage1`` - refinement and connector learn, the language model is frozen (paper §3.2, pre-training stage)
6. ``stage2`` - refinement, connector and language model learn (paper §3.2, fine-tuning stage)

On records there are the two stages alone, from a checkpoint or from a new model of a tower and a language model.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, set_seed

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.mixture import Mixture, open_mixture
from regiongpt.data.sampling import ConversationSampler
from regiongpt.distributed import Processes, connect
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import weights
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN
from regiongpt.storage import locked, write_file, writing
from regiongpt.train import report
from regiongpt.train.alignment import ClassWords, Marks, compare_at_first, stand_in_loss, visual_loss
from regiongpt.train.answers import load_questions
from regiongpt.train.checkpoint import prepare_resuming, require_finished_with, resume_of
from regiongpt.train.dataset import ConversationDataset, DataCollator, RecordDataset, answer_loss
from regiongpt.train.features import build_features, keep_freed_memory
from regiongpt.train.known import tower_shape
from regiongpt.train.loop import Loss, decisive_settings, run_stage
from regiongpt.train.lora import choose_learners, merge_adapters
from regiongpt.train.recipe import STEPS, Recipe, StageConfig
from regiongpt.train.report import data_of, note_run
from regiongpt.train.start import check_shape, create_start, measured_on, save_whole
from regiongpt.train.text import language_of, reading_of, sampler_of, texts_of, tokenizer_of
from regiongpt.train.watch import StageCost

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTProcessor

log = logging.getLogger(__name__)

StageData = tuple[ConversationDataset | RecordDataset, Dataset[Any] | None, Callable[[list[Any]], dict[str, Any]], Loss]
"""Training set, dev set, collate function and loss of a stage."""


def train(config: Recipe) -> Path:
    """Run every step of a recipe that is not yet done.

    Returns:
        Folder of the finished checkpoint, which ``--model`` and ``from_pretrained`` take.

    Raises:
        ConfigError: The folder of the run holds a run on other records, or another process is training there.
        DataError: An annotation file, a photograph or a record cannot be used; the folder cannot be written.
        CheckpointError: The checkpoint to continue from cannot be used.

    Paper: §3.2, §4
    """
    config.check_files()
    connect()
    first = Processes().is_first
    with ExitStack() as stack:
        Processes().from_first(lambda: stack.enter_context(locked(config.out)))
        prepare_resuming(config)
        for name in STEPS[1:]:
            if config.runs(name) and (config.out / name / "model" / "config.json").exists():
                require_finished_with(config.out / name, decisive_settings(getattr(config, name)))
        keep_freed_memory()
        try:
            return _train_on_records(config) if config.data.on_records else _train_on_photographs(config)
        finally:
            if config.watch.report and first:
                report.report_what_there_is(config.out)


def _train_on_photographs(config: Recipe) -> Path:
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
        _train_language(config, images, language)
    elif config.runs("language"):
        log.info("language: finished before, in %s; give another --out to train anew", language)
    start = out / "start"
    whole = cached_images(config) if config.features.root else images
    set_seed(config.seed)  # whether the language model was made by this call or by an earlier one
    create_start(config.model, language, start, [each.path for each in measured_on(whole)])
    check_shape(config.model.replace(language=str(language)), start)
    model, processor = weights.load(start, device="cpu")
    store = build_features(out / "features", whole, model, processor, config.features)
    store = store.part(whole, images) if config.features.root else store

    def prepare(name: str, stage: StageConfig, model: Any, processor: "RegionGPTProcessor") -> StageData:
        dataset = ConversationDataset(
            images,
            store,
            sampler,
            processor,
            config.features,
            config.seed,
            max(1, round(stage.epochs * len(images))),
            stage.micro_batch_size,
            config.isolated_share,
            model.config.image_grid,
        )
        words = ClassWords(processor.tokenizer, sampler.statistics.boxes)
        loss = partial(visual_loss, words, stage.alignment, name != "align")
        return dataset, dev_conversations(config, sampler, model, processor), DataCollator(processor), loss

    finished = start
    for name in ("align", "stage1", "stage2"):
        if config.runs(name):
            if name == "stage2" and finished.parent.name != "stage1" and not config.from_scratch:
                raise ConfigError(f"stage 2 starts from {finished}; run stage 1 first, or give --from-scratch")
            finished = _learn(config, name, finished, prepare)
        elif (out / name / "model").exists():
            finished = out / name / "model"
    return finished


def cached_images(config: Recipe) -> Sequence[ImageAnnotations]:
    """The photographs whose features are cached: those that are trained on, or more."""
    return load_coco(photo_sources(Path(config.features.root or config.data.root), config.data.split)).images


def dev_conversations(
    config: Recipe, sampler: ConversationSampler, model: Any, processor: "RegionGPTProcessor"
) -> ConversationDataset | None:
    """One conversation about each of some dev photographs, the same ones at every measurement; None without any."""
    if not config.data.dev_split or not config.watch.dev_steps:
        return None
    found = load_coco(photo_sources(Path(config.data.root), config.data.dev_split)).images
    images = found[:: max(1, len(found) // config.watch.dev_items)][: config.watch.dev_items]
    whole = config.features.replace(views=1)
    store = build_features(config.out / "features-dev", images, model, processor, whole)
    return ConversationDataset(
        images, store, sampler, processor, whole, config.seed, len(images), 1, 1.0, model.config.image_grid
    )


def _learn(
    config: Recipe,
    name: str,
    start: Path,
    prepare: Callable[[str, StageConfig, Any, "RegionGPTProcessor"], StageData],
) -> Path:
    """Train a checkpoint for one stage, unless that has been done, and return the finished one."""
    stage: StageConfig = getattr(config, name)
    folder = config.out / name
    finished = folder / "model"
    if (finished / "config.json").exists():
        log.info("%s: finished before, in %s; give another --out to train anew", name, finished)
        return finished
    # Adam's steps are lost in half precision, which a checkpoint may be stored in.
    model, processor = weights.load(start, dtype=torch.float32)
    if name == "stage2" and model.untrained:
        told = f"stage 2 starts from {start}, whose refinement and connector are untrained"
        if not config.from_scratch and start != config.out / "stage1" / "model":
            raise ConfigError(f"{told}; run stage 1 first and give its result as model.init, or give --from-scratch")
        log.warning("%s", told)
    model.train()
    adapts = choose_learners(name, model, config.lora)
    dataset, dev, collate, loss = prepare(name, stage, model, processor)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s: %d conversations, %.2f M trainable parameters", name, len(dataset), learning / 1e6)
    first = Processes().is_first
    trainer = run_stage(
        name,
        model,
        dataset,
        collate,
        loss,
        stage,
        folder,
        config.seed,
        engine=config.engine,
        watch=config.watch,
        dev=dev,
        resume=resume_of(config, name),
        processor=processor,
        questions=load_questions(config.data, config.watch.answers, config.seed) if config.watch.answer_steps else (),
        cost=StageCost.of(name, model.config, cached=not config.data.on_records, lora=config.lora) if first else None,
    )
    if first:
        if adapts:
            merge_adapters(model.language_model)
        save_whole(finished, model, processor)
    trainer.processes.wait()
    return finished


def _train_on_records(config: Recipe) -> Path:
    config, data = config.with_start(), config.data
    mixtures = {
        name: open_mixture(mixture, data.root, config.seed)
        for name, mixture in (("stage1", data.pretrain_mixture), ("stage2", data.mixture))
        # A finished stage is known by what it was trained on, whether or not it is to be run now.
        if mixture and (config.runs(name) or (config.out / name / "model").exists())
    }
    processes = Processes()
    shape = {name: value for name, value in config.model.model_dump().items() if name != "init"}
    seen: list[Any] = []
    for name, mixture in mixtures.items():
        log.info("%s: %s", name, mixture.report())
        if name == "stage1":
            _require_images(mixture)
        seen.append(mixture.identity())
        identity: dict[str, Any] = {"init": config.model.init or shape, "mixtures": seen}
        identity |= {} if data.suffixes else {"suffixes": False}
        identity |= {"lora": config.lora.model_dump()} if config.lora.rank and name == "stage2" else {}
        folder = config.out / name
        begun = (folder / "model").exists() or any(folder.glob("checkpoint-*"))
        if begun or config.runs(name):
            _require_same(processes, folder / "records.json", identity, begun, "the same records")
    set_seed(config.seed)
    start = config.model.folder if config.model.init else config.out / "start"
    if config.model.init:
        processes.from_first(lambda: check_shape(config.model, start))
    else:
        _require_same(
            processes, config.out / "start.json", {**shape, "seed": config.seed}, start.exists(), "this model"
        )
        processes.from_first(lambda: _create_start_on_records(config, start, next(iter(mixtures.values()))))
    dev = open_mixture(data.dev_mixture, data.root, config.seed) if data.dev_mixture else None
    if processes.is_first:
        read = mixtures | ({"dev": dev} if dev is not None else {})
        note_run(config.out, config, {name: data_of(mixture) for name, mixture in read.items()})

    def prepare(name: str, stage: StageConfig, model: Any, processor: "RegionGPTProcessor") -> StageData:
        mixture = mixtures[name]
        longest = getattr(model.config.text_config, "max_position_embeddings", None)
        of = partial(RecordDataset, processor=processor, longest=longest, suffixes=data.suffixes)
        measured = of(dev, items=min(config.watch.dev_items, len(dev))) if dev else None
        items = max(1, round(stage.epochs * len(mixture)))
        return of(mixture, items=items), measured, DataCollator(processor), answer_loss

    finished = start
    for name in mixtures:
        finished = _learn(config, name, finished, prepare) if config.runs(name) else config.out / name / "model"
    return finished


def _require_images(mixture: Mixture) -> None:
    """Raise DataError for records without an image, from which stage 1 learns nothing."""
    for part in mixture.parts:
        if count := part.without_image():
            raise DataError(
                f"{part.records.folder}: {count} of {len(part.records)} records have no image, from which stage 1 "
                "learns nothing, since the language model is frozen; leave the part to stage 2"
            )


def _require_same(processes: Processes, note: Path, identity: Any, begun: bool, what: str) -> None:
    """Raise ConfigError if what is in the folder was made of something else, or note what it will be made of."""
    text = json.dumps(identity, indent=1)

    def compare() -> None:
        if begun and (not note.exists() or note.read_bytes() != text.encode()):
            raise ConfigError(
                f"{note.parent}: a run on {what}, with the same seed and start, was expected there, and another one "
                "found; give another --out, or delete the folder"
            )
        with writing(note):
            note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, text)

    processes.from_first(compare)


def _create_start_on_records(config: Recipe, folder: Path, mixture: Mixture) -> None:
    images: list[Path] = []
    if tower_shape(config.model.vision).model_type == "efficientnet_lite":  # its channels differ much in scale
        drawn = (mixture.draw(item) for item in range(min(128, len(mixture))))
        paths = (each.records.image_path(each.record()) for each in drawn)
        images = [path for path in paths if path is not None]
    create_start(config.model, config.model.language, folder, images)


def _train_language(config: Recipe, images: Sequence[ImageAnnotations], folder: Path) -> None:
    texts = texts_of(config, images)
    tokenizer = tokenizer_of(texts, config.model)
    model = LlamaForCausalLM(language_of(config.model, tokenizer))
    compare_at_first(model, config.model.comparing_layers, config.seed)
    dataset = reading_of(config, texts, tokenizer)
    log.info(
        "language: %d texts, %.2f M tokens, %.2f M parameters",
        len(texts),
        dataset.tokens / 1e6,
        sum(p.numel() for p in model.parameters()) / 1e6,
    )
    shape = config.model
    region = tokenizer.convert_tokens_to_ids(REGION_TOKEN)
    offset = weights.number_offset(tokenizer, shape.region_format) if shape.region_numbers else 0
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) if shape.image_marks else None
    run_stage(
        "language",
        model,
        dataset,
        cast(Any, _collate_text),
        partial(stand_in_loss, ClassWords(tokenizer), Marks(region, offset, image)),
        config.language,
        folder.with_name("language-checkpoints"),
        config.seed,
        engine=config.engine,
        watch=config.watch,
        resume=resume_of(config, "language"),
        cost=StageCost.of("language", model.config, cached=True),
    )
    save_whole(folder, model, tokenizer)


def _collate_text(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

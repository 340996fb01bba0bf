"""A whole recipe from annotated photographs to a model that answers: ``regiongpt train CONFIG.toml``.

Six steps, each skipped when its result is already in the run folder, each going on where it was stopped:

1. ``tokenizer`` - a byte-level BPE of the project's own
2. ``language`` - the small language model, pre-trained on text in which blurred words stand for regions
3. ``features`` - every view of every image through the frozen tower, once
4. ``align`` - refinement and connector learn to write a region's class as the language model's own word
5. ``stage1`` - refinement and connector learn, the language model is frozen (paper §3.2, pre-training stage)
6. ``stage2`` - refinement, connector and language model learn (paper §3.2, fine-tuning stage)

With a mixture of records in place of photographs, a checkpoint goes through the two stages alone, or a new model of a
tower and a language model does.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, set_seed
from transformers.utils import logging as transformers_logging

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.mixture import Mixture, open_mixture
from regiongpt.data.sampling import ConversationSampler
from regiongpt.distributed import Processes, connect, launched
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import weights
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN
from regiongpt.train import report
from regiongpt.train.alignment import ClassWords, Marks, stand_in_loss, visual_loss
from regiongpt.train.answers import load_questions
from regiongpt.train.checkpoint import prepare_resuming, resume_of
from regiongpt.train.dataset import ConversationDataset, DataCollator, RecordDataset, answer_loss
from regiongpt.train.debug import debug_size
from regiongpt.train.features import build_features, keep_freed_memory
from regiongpt.train.loop import Loss, run_stage
from regiongpt.train.lora import choose_learners, merge_adapters
from regiongpt.train.matching import compare_at_first
from regiongpt.train.photographs import language_of, reading_of, sampler_of, texts_of, tokenizer_of
from regiongpt.train.plan import make_plan
from regiongpt.train.recipe import Recipe, StageConfig
from regiongpt.train.report import data_of, note_run
from regiongpt.train.starts import (
    check_shape,
    checkpoint_folder,
    create_start,
    measured_on,
    needs_calibration,
    new_shape,
    read_shape,
    require_trained,
    save_whole,
    start_shape,
)
from regiongpt.train.watch import StageCost

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTProcessor

log = logging.getLogger(__name__)

_IDENTITY = "records.json"
StageData = tuple[ConversationDataset | RecordDataset, Dataset[Any] | None, Callable[[list[Any]], dict[str, Any]], Loss]
"""The data set of a stage, that of its dev loss, what makes a batch of their examples, and the loss."""


def run_cli(arguments: Sequence[str]) -> int:
    """``regiongpt train CONFIG.toml [--out DIR] [--data.root DIR] [--stage2.lr 5e-4 ...]``.

    Raises:
        ConfigError: The recipe or an override is wrong.
        DataError: The photographs or annotations are.
    """
    if (code := report.run_cli(arguments)) is not None:
        return code
    parser = argparse.ArgumentParser(
        prog="regiongpt train",
        description="Train a model from a recipe; run the same command again to go on after an interruption.",
        epilog="Every field of the recipe can be overridden by its dotted name: --stage2.lr 5e-4 --data.root DIR. "
        "`regiongpt train --report DIR` makes the report of a run anew, also of one that runs or was killed.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="recipe, a TOML file such as configs/nano.toml")
    parser.add_argument(
        "--plan", action="store_true", help="say what the recipe takes - parameters, tokens, memory, days - and stop"
    )
    parser.add_argument("--gpu", metavar="NAME", help="with --plan: the kind of GPU, such as a100-80gb or h100-sxm")
    parser.add_argument("--gpus", metavar="N", help="with --plan: how many of them")
    parser.add_argument("--json", action="store_true", help="with --plan: print it as JSON")
    parser.add_argument(
        "--debug", action="store_true", help="run the recipe at a size that takes seconds, on pictures made up for it"
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="let stage 2 begin with an untrained refinement and connector"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|never|FOLDER",
        help="go on from the newest whole checkpoint (auto, the default), put what is there aside and begin anew "
        "(never), or go on from the checkpoint in a folder such as runs/nano/stage2/checkpoint-200",
    )
    options, overrides = parser.parse_known_args(arguments)
    overrides += [f"--plan.gpu={options.gpu}"] if options.gpu else []
    overrides += [f"--plan.gpus={options.gpus}"] if options.gpus else []
    if not options.plan and (options.gpu or options.gpus or options.json):
        raise ConfigError("--gpu, --gpus and --json go with --plan; give it too, or leave them out")
    overrides += ["--from_scratch=true"] if options.from_scratch else []
    overrides += [f"--resume={options.resume}"] if options.resume else []
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    config = Recipe.load(options.config, overrides)
    if options.debug:
        if launched() > 1:
            connect()
        config = Processes().from_first(partial(debug_size, config))
    if options.plan:
        plan = make_plan(config)
        print(json.dumps(plan.to_dict(), indent=2) if options.json else plan.text())
        return 0
    finished = train(config)
    if Processes().is_first:
        print(finished)
    return 0


def train(config: Recipe) -> Path:
    """Runs every step of a recipe that is not yet done.

    Args:
        config: The recipe.

    Returns:
        Folder of the finished checkpoint, which ``--model`` and ``from_pretrained`` take.

    Raises:
        ConfigError: No data folder was given, or the folder of the run holds a run on other records.
        DataError: An annotation file, a photograph or a record cannot be used.
        CheckpointError: The checkpoint to go on from cannot be used.

    Paper: §3.2, §4
    """
    if launched() > 1:
        if not config.data.on_records:
            raise ConfigError(
                f"expected one process, since a recipe on photographs trains a small model, got {launched()}; several "
                "processes train on records (data.mixture)"
            )
        connect()
    prepare_resuming(config)
    try:
        return _train_on_records(config) if config.data.on_records else _train_on_photographs(config)
    finally:
        if config.watch.report and Processes().is_first:
            report.report_what_there_is(config.out)


def _train_on_photographs(config: Recipe) -> Path:
    """Takes a new model through all steps."""
    if not config.data.root:
        raise ConfigError("data.root: expected the folder of the annotated photographs; give --data.root DIR")
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    set_seed(config.seed)
    data = load_coco(photo_sources(Path(config.data.root), config.data.split))
    log.info("data: %s", data.report())
    images = data.images
    found = {"folder": config.data.root, "split": config.data.split, "found": data.report()}
    note_run(out, config, {"photographs": found})
    sampler = sampler_of(config, images)

    language = Path(config.model.language) if config.model.language else out / "language"
    if config.runs("language") and not config.model.language:
        if (language / "config.json").exists():
            log.info("language: finished before, in %s; give another --out to train anew", language)
        else:
            _train_language(config, images, sampler, language)
    if not config.model.language and not (language / "config.json").exists():
        raise ConfigError(f"steps: expected the result of 'language' in {language}, found none; run that step first")
    start = out / "start"
    whole = cached_images(config) if config.features.root else images
    set_seed(config.seed)  # whether the language model was made by this call or by an earlier one
    create_start(start_shape(config.model), language, start, [each.path for each in measured_on(whole)])
    check_shape(start_shape(config.model).replace(language=str(language)), start)
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
            round(stage.epochs * len(images)),
            stage.micro_batch_size,
            config.isolated_share,
            model.config.image_grid,
        )
        words = ClassWords(processor.tokenizer, sampler.statistics.boxes)
        loss = partial(visual_loss, words, stage.alignment, name != "align")
        return dataset, dev_conversations(config, sampler, model, processor), DataCollator(processor), loss

    finished = start
    for name, stage in (("align", config.align), ("stage1", config.stage1), ("stage2", config.stage2)):
        if config.runs(name):
            if name == "stage2" and finished.parent.name != "stage1" and not config.from_scratch:
                raise ConfigError(
                    f"stage 2 begins with {finished}, which stage 1 has not trained; run that step first, or give "
                    "--from-scratch"
                )
            finished = _learn(config, name, stage, finished, out / name, partial(prepare, name, stage))
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
    stage: StageConfig,
    start: Path,
    folder: Path,
    prepare: Callable[[Any, "RegionGPTProcessor"], StageData],
) -> Path:
    """Takes a checkpoint through one stage, unless that has been done; all but the tower learns in stage 2 alone.

    Args:
        config: The recipe.
        name: Of the stage.
        stage: Its hyper-parameters.
        start: The checkpoint to go on from.
        folder: Of the stage.
        prepare: Makes what is learnt from, of the model and its processor.

    Returns:
        Folder of the checkpoint that came of it.
    """
    finished = folder / "model"
    if not (finished / "config.json").exists():
        if name == "stage2" and (warning := require_trained(start, config.from_scratch)):
            log.warning("%s", warning)
        # Adam's steps are lost in half precision, which a checkpoint may be stored in.
        model, processor = weights.load(start, dtype=torch.float32)
        model.train()
        adapts = choose_learners(name, model, config.lora)
        dataset, dev, collate, loss = prepare(model, processor)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("%s: %d conversations, %.2f M trainable parameters", name, len(dataset), learning / 1e6)
        watch = config.watch
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
            questions=load_questions(config.data, watch.answers, config.seed) if watch.answer_steps else (),
            cost=_cost(config, name, model),
        )
        if trainer.processes.is_first:
            if adapts:
                merge_adapters(model.language_model)
            save_whole(finished, model, processor)
        trainer.processes.wait()
    else:
        log.info("%s: finished before, in %s; give another --out to train anew", name, finished)
    return finished


def _cost(config: Recipe, name: str, model: Any) -> StageCost | None:
    """The arithmetic of a stage, which the first process writes down."""
    if not Processes().is_first:
        return None
    return StageCost.of(name, model.config, cached=not config.data.on_records, lora=config.lora)


def _train_on_records(config: Recipe) -> Path:
    """Takes a checkpoint through the stages that have records."""
    config = _with_a_beginning(config)
    stages = [
        (name, stage, open_mixture(mixture, config.data.root, config.seed))
        for name, stage, mixture in (
            ("stage1", config.stage1, config.data.pretrain_mixture),
            ("stage2", config.stage2, config.data.mixture),
        )
        # What is finished is known by what it learnt from, whether or not it is to be run now.
        if mixture and (config.runs(name) or (config.out / name / "model").exists())
    ]
    if not any(config.runs(name) for name, *_ in stages):
        raise ConfigError(
            f"steps: expected a stage that has records, got {', '.join(config.steps)}; stage1 learns from "
            "data.pretrain_mixture, stage2 from data.mixture"
        )
    identities: dict[str, str] = {}
    for number, (name, _, mixture) in enumerate(stages, 1):
        log.info("%s: %s", name, mixture.report())
        if name == "stage1":
            _refuse_text_alone(mixture)
        seen = [each.identity() for _, _, each in stages[:number]]
        adapters = {"lora": config.lora.model_dump()} if config.lora.rank and name == "stage2" else {}
        words = {} if config.data.suffixes else {"suffixes": False}
        identities[name] = json.dumps({"init": _begins_with(config), "mixtures": seen, **words, **adapters}, indent=1)
        _refuse_other_records(config.out / name, identities[name])
    keep_freed_memory()
    set_seed(config.seed)
    processes = Processes()
    finished = processes.from_first(lambda: _start_on_records(config, stages[0][2]))
    dev = open_mixture(config.data.dev_mixture, config.data.root, config.seed) if config.data.dev_mixture else None
    if processes.is_first:
        read = {name: mixture for name, _, mixture in stages} | ({"dev": dev} if dev is not None else {})
        note_run(config.out, config, {name: data_of(mixture) for name, mixture in read.items()})

    def prepare(stage: StageConfig, mixture: Mixture, model: Any, processor: "RegionGPTProcessor") -> StageData:
        items = max(1, round(stage.epochs * len(mixture)))
        longest = getattr(model.config.text_config, "max_position_embeddings", None)
        of = partial(RecordDataset, processor=processor, longest=longest, suffixes=config.data.suffixes)
        measured = of(dev, items=min(config.watch.dev_items, len(dev))) if dev else None
        return of(mixture, items=items), measured, DataCollator(processor), answer_loss

    for name, stage, mixture in stages:
        folder = config.out / name
        if config.runs(name):
            if processes.is_first:
                _note(folder, identities[name])
            finished = _learn(config, name, stage, finished, folder, partial(prepare, stage, mixture))
        else:
            finished = folder / "model"
    return finished


def check_beginning(config: Recipe) -> None:
    """Holds a recipe to what it begins with: its records, and its checkpoint or its tower. Nothing is made.

    Raises:
        ConfigError: The parts of a new model do not fit each other, or stage 2 comes first and was not told to begin
            with one.
        CheckpointError: The checkpoint is none, or of another shape; the tower cannot be read.
        DataError: A part of a mixture is no folder of finished records.
    """
    if config.data.on_records:
        config = _with_a_beginning(config)
        for mixture in filter(None, (config.data.pretrain_mixture, config.data.mixture)):
            open_mixture(mixture, config.data.root, config.seed)
        if config.model.init:
            folder = checkpoint_folder(config.model)
            read_shape(folder)
            check_shape(config.model, folder)
            return
    tower, _ = weights.load_tower(config.model.vision, config.model.image_size or None)
    new_shape(config.model, tower.config)


def _with_a_beginning(config: Recipe) -> Recipe:
    """The recipe with a start that is there: a new model where stage 2 comes first and was told to begin with one.

    Raises:
        ConfigError: Stage 2 comes first, stage 1 has left no checkpoint, and ``from_scratch`` is not given. Said before
            a new model is made, which takes long where it is large.
    """
    out, init = config.out, config.model.init
    there = init == "nano" or (init and (Path(init) / "config.json").is_file())
    begun = config.runs("stage1") or any((out / stage / "model").exists() for stage in ("stage1", "stage2"))
    if there or begun or not config.model.language:
        return config
    if not config.from_scratch:
        raise ConfigError(
            f"stage 2 comes first: expected a checkpoint that stage 1 has trained, got "
            f"{f'{init}, where there is none' if init else 'none'}; run stage 1 first and give its result as "
            "model.init, or give --from-scratch"
        )
    return config.replace(model=config.model.replace(init=""))


def _begins_with(config: Recipe) -> Any:
    """What the run's first checkpoint is known by: its name, or the shape of the new model."""
    return config.model.init or {name: value for name, value in config.model.model_dump().items() if name != "init"}


def _start_on_records(config: Recipe, mixture: Mixture) -> Path:
    """The checkpoint to begin with, held to what the recipe says of it; made first where the recipe names its parts."""
    if config.model.init:
        folder = checkpoint_folder(config.model)
        check_shape(config.model, folder)
        return folder
    folder = config.out / "start"
    _note_start(folder, config)
    photographs: list[Path] = []
    if needs_calibration(config.model):
        drawn = (mixture.draw(item) for item in range(min(128, len(mixture))))
        paths = (each.records.image_path(each.record()) for each in drawn)
        photographs = [path for path in paths if path is not None]
    create_start(config.model, config.model.language, folder, photographs)
    return folder


def _note_start(folder: Path, config: Recipe) -> None:
    """Raises ConfigError where the folder of the run holds the start of another model."""
    identity = json.dumps({**_begins_with(config), "seed": config.seed}, indent=1)
    note = folder.with_name("start.json")
    if folder.exists() and (not note.exists() or note.read_text(encoding="utf-8") != identity):
        raise ConfigError(
            f"{folder}: expected the start of a run on the same model, with the same seed, got another one; give "
            "another --out, or delete the folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(identity, encoding="utf-8")


def _refuse_text_alone(mixture: Mixture) -> None:
    """Raises DataError for records from which refinement and connector, which alone learn in stage 1, learn nothing."""
    for part in mixture.parts:
        if count := part.without_image():
            raise DataError(
                f"{part.records.folder}: expected an image in every record, since the language model is frozen in "
                f"stage 1, got {count} of {len(part.records)} without one; leave the part to stage 2"
            )


def _refuse_other_records(folder: Path, identity: str) -> None:
    """Raises ConfigError where a stage has begun on something else: going on would mix the two unseen."""
    begun = (folder / "model").exists() or any(folder.glob("checkpoint-*"))
    if begun and _noted(folder) != identity:
        raise ConfigError(
            f"{folder}: expected a run on the same records, with the same seed and from the same checkpoint, got "
            "another one; give another --out, or delete the folder"
        )


def _noted(folder: Path) -> str:
    note = folder / _IDENTITY
    return note.read_text(encoding="utf-8") if note.exists() else ""


def _note(folder: Path, identity: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if _noted(folder) != identity:
        (folder / _IDENTITY).write_text(identity, encoding="utf-8")


def _collate_text(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def _train_language(
    config: Recipe, images: Sequence[ImageAnnotations], sampler: ConversationSampler, folder: Path
) -> None:
    texts = texts_of(config, images, sampler)
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
        cost=_cost(config, "language", model),
    )
    save_whole(folder, model, tokenizer)

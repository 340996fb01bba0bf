"""A recipe, from records to a model that answers (paper §3.2): stage 1, then stage 2.

Stage 1 trains refinement and connector, stage 2 the language model too. A finished stage is skipped, an interrupted
one continues.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import set_seed

from regiongpt.data.mixture import Mixture, open_mixture
from regiongpt.distributed import Processes, connect
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import weights
from regiongpt.storage import locked, write_file, writing
from regiongpt.train import report
from regiongpt.train.answers import Question, load_questions
from regiongpt.train.checkpoint import prepare_resuming, require_finished_with, resume_of
from regiongpt.train.dataset import DataCollator, RecordDataset, answer_loss
from regiongpt.train.known import tower_shape
from regiongpt.train.loop import Loss, decisive_settings, run_stage
from regiongpt.train.lora import choose_learners, merge_adapters
from regiongpt.train.recipe import Recipe
from regiongpt.train.start import check_shape, create_start, keep_freed_memory, save_whole
from regiongpt.train.watch import StageCost

log = logging.getLogger(__name__)


class StageData(NamedTuple):
    """What a stage learns from: its data sets, their collate function, its loss, and what it is asked meanwhile."""

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], dict[str, Any]]
    loss: Loss
    dev: Dataset[Any] | None = None
    questions: Sequence[Question] = ()


@contextmanager
def training(config: Recipe) -> Iterator[None]:
    """Hold the run's folder while it trains, after checking that it can continue; write the report at the end.

    Raises:
        ConfigError: Another process trains there, or what is finished there was made with other settings.
        CheckpointError: The checkpoint to continue from cannot be used.
        DataError: Data is missing, or the folder cannot be written.
    """
    config.check_files()
    connect()
    first = Processes().is_first
    with ExitStack() as stack:
        Processes().from_first(lambda: stack.enter_context(locked(config.out)))
        prepare_resuming(config)
        for name in config.all_steps:
            if config.runs(name) and (config.out / name / "model" / "config.json").exists():
                require_finished_with(config.out / name, decisive_settings(getattr(config, name)))
        keep_freed_memory()
        try:
            yield
        finally:
            if config.watch.report and first:
                report.report_what_there_is(config.out)


def train_stage(
    config: Recipe,
    name: str,
    start: Path,
    prepare: Callable[[Any, Any], StageData],
    *,
    cached: bool = False,
    reads: bool = True,
) -> Path:
    """Train a checkpoint for one stage, unless that has been done.

    Args:
        config: A recipe, which has the stage's settings as its field ``name``.
        name: Of the stage; in ``stage2`` the language model learns too.
        start: Folder of the checkpoint to begin with.
        prepare: Makes the data of the model and its processor.
        cached: Whether the tower has been run beforehand.
        reads: Whether the language model runs.

    Returns:
        Folder of the finished checkpoint.

    Raises:
        ConfigError: Stage 2 would start from an untrained refinement, without ``from_scratch``.
    """
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
    data = prepare(model, processor)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    items: Any = data.dataset
    log.info("%s: %d conversations, %.2f M trainable parameters", name, len(items), learning / 1e6)
    processes = Processes()
    options: Any = {"trained": name == "stage2", "reads": reads, "cached": cached}
    options["lora"] = config.lora if adapts else None
    run_stage(
        name,
        model,
        data.dataset,
        data.collate,
        data.loss,
        getattr(config, name),
        folder,
        config.seed,
        engine=config.engine,
        watch=config.watch,
        dev=data.dev,
        resume=resume_of(config, name),
        processor=processor,
        questions=data.questions,
        cost=StageCost.of(model.config, **options) if processes.is_first else None,
    )
    if processes.is_first:
        if adapts:
            merge_adapters(model.language_model)
        save_whole(finished, model, processor)
    processes.wait()
    return finished


def train(config: Recipe) -> Path:
    """Run every stage of a recipe that is not yet done.

    Returns:
        Folder of the finished checkpoint, which ``--model`` and ``from_pretrained`` take.

    Raises:
        ConfigError: The run's folder holds a run on other records, or another process is training there.
        DataError: A record cannot be used; the folder cannot be written.
        CheckpointError: The checkpoint to continue from cannot be used.

    Paper: §3.2, §4
    """
    with training(config):
        return _train(config.with_start())


def _train(config: Recipe) -> Path:
    data = config.data
    mixtures = {
        name: open_mixture(mixture, data.root, config.seed)
        for name, mixture in (("stage1", data.pretrain_mixture), ("stage2", data.mixture))
        # A finished stage is known by what it was trained on, whether or not it is to be run now.
        if mixture and (config.runs(name) or (config.out / name / "model").exists())
    }
    processes = Processes()
    shape = config.model.model_dump(exclude={"init"})
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
            _require_same(folder / "records.json", identity, begun)
    set_seed(config.seed)
    start = config.model.folder if config.model.init else config.out / "start"
    if config.model.init:
        processes.from_first(lambda: check_shape(config.model, start))
    else:
        _require_same(config.out / "start.json", {**shape, "seed": config.seed}, start.exists())
        processes.from_first(lambda: _create_start(config, start, next(iter(mixtures.values()))))
    dev = open_mixture(data.dev_mixture, data.root, config.seed) if data.dev_mixture else None
    if processes.is_first:
        read = mixtures | ({"dev": dev} if dev is not None else {})
        report.note_run(config.out, config, {name: report.data_of(mixture) for name, mixture in read.items()})

    finished = start
    for name, mixture in mixtures.items():

        def prepare(model: Any, processor: Any, name: str = name, mixture: Mixture = mixture) -> StageData:
            longest = getattr(model.config.text_config, "max_position_embeddings", None)
            of = partial(RecordDataset, processor=processor, longest=longest, suffixes=data.suffixes)
            return StageData(
                of(mixture, items=max(1, round(getattr(config, name).epochs * len(mixture)))),
                DataCollator(processor),
                answer_loss,
                of(dev, items=min(config.watch.dev_items, len(dev))) if dev else None,
                load_questions(data, config.watch.answers, config.seed) if config.watch.answer_steps else (),
            )

        runs = config.runs(name)
        finished = train_stage(config, name, finished, prepare) if runs else config.out / name / "model"
    return finished


def _require_images(mixture: Mixture) -> None:
    """Raise DataError for records without an image, from which stage 1 learns nothing."""
    for part in mixture.parts:
        if count := part.without_image():
            raise DataError(
                f"{part.records.folder}: {count} of {len(part.records)} records have no image, from which stage 1 "
                "learns nothing, since the language model is frozen; leave the part to stage 2"
            )


_RETIRED = {"vocab_size", "hidden_size", "layers", "heads", "comparing_layers", "mlp_size", "max_length"}
_NAMES = {"init": "start", "mixtures": "records", "suffixes": "data.suffixes", "lora": "lora settings"}


def _require_same(note: Path, identity: dict[str, Any], begun: bool) -> None:
    """Raise ConfigError if what is in the folder was made of something else, or note what it will be made of."""

    def compare() -> None:
        if begun:
            try:
                # Releases before 0.3 noted settings of nano's language model too.
                known = json.loads(
                    note.read_bytes(), object_hook=lambda each: {k: each[k] for k in each if k not in _RETIRED}
                )
                odd = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
                theirs, ours = ([each["parts"] for each in of.get("mixtures", ())] for of in (known, identity))
                if "mixtures" in odd and theirs == ours:
                    odd[odd.index("mixtures")] = "seed"
            except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
                odd = ["record of what it was made of"]
            if odd:
                what = ", ".join(_NAMES.get(name, name) for name in odd)
                raise ConfigError(
                    f"{note.parent}: holds a run with other {what}; give another --out, or delete the folder"
                )
        with writing(note):
            note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, json.dumps(identity, indent=1))

    Processes().from_first(compare)


def _create_start(config: Recipe, folder: Path, mixture: Mixture) -> None:
    images: list[Path] = []
    if tower_shape(config.model.vision).model_type == "efficientnet_lite":  # its channels differ much in scale
        drawn = (mixture.draw(item) for item in range(min(128, len(mixture))))
        paths = (each.records.image_path(each.record()) for each in drawn)
        images = [path for path in paths if path is not None]
    create_start(config.model, config.model.language, folder, images)

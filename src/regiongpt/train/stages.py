"""A whole recipe from annotated photographs to a model that answers: ``regiongpt train CONFIG.toml``.

Six steps, each skipped when its result is already in the run folder, each going on where it was stopped:

1. ``tokenizer`` - a byte-level BPE of the project's own
2. ``language`` - the small language model, pre-trained on text in which blurred words stand for regions
3. ``features`` - every view of every image through the frozen tower, once
4. ``align`` - refinement and connector learn to write a region's class as the language model's own word
5. ``stage1`` - refinement and connector learn, the language model is frozen (paper §3.2, pre-training stage)
6. ``stage2`` - refinement, connector and language model learn (paper §3.2, fine-tuning stage)

With a mixture of records in place of photographs, a checkpoint goes through the two stages alone.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.mixture import Mixture, open_mixture
from regiongpt.data.sampling import DEFAULT_MIX, ClassStatistics, ConversationSampler
from regiongpt.errors import ConfigError, DataError
from regiongpt.model import weights
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN
from regiongpt.train.alignment import ClassWords, stand_in_loss, visual_loss
from regiongpt.train.config import StageConfig, TrainConfig, load_config
from regiongpt.train.dataset import ConversationDataset, isolate_turns
from regiongpt.train.features import build_features, calibrate, keep_freed_memory
from regiongpt.train.records import RecordCollate, RecordDataset, answer_loss
from regiongpt.train.text import READING_MIX, TextDataset, conversation_texts
from regiongpt.train.tokenizer import train_tokenizer
from regiongpt.train.trainer import Loss, run_stage

if TYPE_CHECKING:
    from regiongpt.model import RegionGPTProcessor

log = logging.getLogger(__name__)

_IDENTITY = "records.json"
Lessons = tuple[ConversationDataset | RecordDataset, Callable[[list[Any]], dict[str, Any]], Loss]
"""The data set of a stage, what makes a batch of its examples, and the loss."""


def run_cli(arguments: Sequence[str]) -> int:
    """``regiongpt train CONFIG.toml [--out DIR] [--data.root DIR] [--stage2.lr 5e-4 ...]``.

    Raises:
        ConfigError: The recipe or an override is wrong.
        DataError: The photographs or annotations are.
    """
    parser = argparse.ArgumentParser(
        prog="regiongpt train",
        description="Train a model from a recipe; run the same command again to go on after an interruption.",
        epilog="Every field of the recipe can be overridden by its dotted name: --stage2.lr 5e-4 --data.root DIR",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="recipe, a TOML file such as configs/nano.toml")
    options, overrides = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    finished = train(load_config(options.config, overrides))
    print(finished)
    return 0


def train(config: TrainConfig) -> Path:
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
    if config.data.on_records:
        return _train_on_records(config)
    if not config.data.root:
        raise ConfigError("data.root: expected the folder of the annotated photographs; give --data.root DIR")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    set_seed(config.seed)
    data = load_coco(photo_sources(Path(config.data.root), config.data.split))
    log.info("data: %s", data.report())
    images = data.images
    sampler = ConversationSampler(ClassStatistics.of(images), config.data.mix or DEFAULT_MIX)

    language = out / "language"
    if not (language / "config.json").exists():
        _train_language(config, images, sampler, language)
    start = out / "start"
    if not (start / "config.json").exists():
        _create(config, language, start, images)
    model, processor = weights.load(start, device="cpu")
    store = build_features(out / "features", images, model, processor, config.features, config.seed)

    def prepare(name: str, stage: StageConfig, model: Any, processor: "RegionGPTProcessor") -> Lessons:
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
        loss = partial(visual_loss, ClassWords(processor.tokenizer), stage.alignment, name != "align")
        return dataset, _Collate(processor), loss

    finished = start
    for name, stage in (("align", config.align), ("stage1", config.stage1), ("stage2", config.stage2)):
        finished = _learn(name, stage, finished, out / name, config.seed, partial(prepare, name, stage))
    return finished


def _learn(
    name: str,
    stage: StageConfig,
    start: Path,
    folder: Path,
    seed: int,
    prepare: Callable[[Any, "RegionGPTProcessor"], Lessons],
) -> Path:
    """Takes a checkpoint through one stage, unless that has been done; all but the tower learns in stage 2 alone.

    Args:
        name: Of the stage.
        stage: Its hyper-parameters.
        start: The checkpoint to go on from.
        folder: Of the stage.
        seed: Of the run.
        prepare: Makes what is learnt from, of the model and its processor.

    Returns:
        Folder of the checkpoint that came of it.
    """
    finished = folder / "model"
    if not (finished / "config.json").exists():
        # Adam's steps are lost in half precision, which a checkpoint may be stored in.
        model, processor = weights.load(start, dtype=torch.float32)
        model.train()
        model.language_model.requires_grad_(name == "stage2")
        dataset, collate, loss = prepare(model, processor)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        log.info("%s: %d conversations, %.2f M trainable parameters", name, len(dataset), learning / 1e6)
        run_stage(name, model, dataset, collate, loss, stage, folder, seed)
        _save(finished, model, processor)
    return finished


def _train_on_records(config: TrainConfig) -> Path:
    """Takes a checkpoint through the stages that have records."""
    stages = [
        (name, stage, open_mixture(mixture, config.data.root, config.seed))
        for name, stage, mixture in (
            ("stage1", config.stage1, config.data.pretrain_mixture),
            ("stage2", config.stage2, config.data.mixture),
        )
        if mixture
    ]
    identities: dict[str, str] = {}
    for number, (name, _, mixture) in enumerate(stages, 1):
        log.info("%s: %s", name, mixture.report())
        if name == "stage1":
            _refuse_text_alone(mixture)
        seen = [each.identity() for _, _, each in stages[:number]]
        identities[name] = json.dumps({"init": config.model.init, "mixtures": seen}, indent=1)
        _refuse_other_records(Path(config.out) / name, identities[name])
    keep_freed_memory()
    set_seed(config.seed)
    finished = weights.nano_path() if config.model.init == "nano" else Path(config.model.init)

    def prepare(stage: StageConfig, mixture: Mixture, model: Any, processor: "RegionGPTProcessor") -> Lessons:
        items = max(1, round(stage.epochs * len(mixture)))
        longest = getattr(model.config.text_config, "max_position_embeddings", None)
        return RecordDataset(mixture, processor, items, longest), RecordCollate(processor), answer_loss

    for name, stage, mixture in stages:
        folder = Path(config.out) / name
        _note(folder, identities[name])
        finished = _learn(name, stage, finished, folder, config.seed, partial(prepare, stage, mixture))
    return finished


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


class _Collate:
    """Pads examples into a batch."""

    def __init__(self, processor: "RegionGPTProcessor") -> None:
        self.processor = processor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.processor.collate(examples)
        turns = torch.full(batch["input_ids"].shape, -1)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            turns[row, :length] = example.get("turns", torch.zeros(length, dtype=torch.long))
        mask, positions = isolate_turns(turns)
        classes = pad_sequence([each["region_classes"] for each in examples], batch_first=True, padding_value=-1)
        cells = torch.stack([each["cell_classes"] for each in examples])
        shape = {"attention_mask": mask, "position_ids": positions}
        return {**batch, **shape, "region_classes": classes, "cell_classes": cells}


def _collate_text(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def _save(folder: Path, model: Any, processor: Any) -> None:
    """Writes beside the folder and renames, so that a folder that exists is whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(folder)


def _train_language(
    config: TrainConfig, images: Sequence[ImageAnnotations], sampler: ConversationSampler, folder: Path
) -> None:
    shape = config.model
    grid = (shape.image_grid, shape.image_grid)
    sampler = ConversationSampler(sampler.statistics, READING_MIX)
    texts = list(conversation_texts(images, sampler, shape.region_format, grid, config.seed))
    plain = ("".join(text.pieces).replace(REGION_TOKEN, "").replace(IMAGE_TOKEN, "") for text in texts)
    tokenizer = train_tokenizer(plain, shape.vocab_size, shape.max_length)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.mlp_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.max_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    dataset = TextDataset(
        texts,
        tokenizer,
        shape.region_format,
        grid,
        config.seed,
        config.language.epochs,
    )
    log.info(
        "language: %d texts, %.2f M tokens, %.2f M parameters",
        len(texts),
        dataset.tokens / 1e6,
        sum(p.numel() for p in model.parameters()) / 1e6,
    )
    region = tokenizer.convert_tokens_to_ids(REGION_TOKEN)
    offset = weights.number_offset(tokenizer, shape.region_format) if shape.region_numbers else 0
    run_stage(
        "language",
        model,
        dataset,
        cast(Any, _collate_text),
        partial(stand_in_loss, ClassWords(tokenizer), (region, offset)),
        config.language,
        folder.with_name("language-checkpoints"),
        config.seed,
    )
    _save(folder, model, tokenizer)


def _create(config: TrainConfig, language: Path, folder: Path, images: Sequence[ImageAnnotations]) -> None:
    shape = config.model
    grid = [shape.image_grid, shape.image_grid] if shape.image_grid else None
    model, processor = weights.create(
        shape.vision,
        language,
        image_size=shape.image_size,
        refinement=shape.refinement,
        refinement_channels=shape.refinement_channels or None,
        image_grid=grid,
        chat_template="plain",
        region_format=shape.region_format,
        region_numbers=shape.region_numbers,
    )
    calibrate(model, processor, images[:: max(1, len(images) // 128)])
    _save(folder, model, processor)

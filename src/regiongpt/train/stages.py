"""A recipe, from records to a model that answers (paper §3.2): stage 1, then stage 2.

Stage 1 trains refinement and connector, stage 2 the language model too. Finished stages are skipped, others resume.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, set_seed

from regiongpt.data.shards import Mixture, open_mixture
from regiongpt.environment import Processes, connect, keep_freed_memory
from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.images import load_image
from regiongpt.model import weights
from regiongpt.model.configuration import RegionGPTConfig
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN, chat_template, closed_set_suffix
from regiongpt.storage import locked, new_folder, read_json
from regiongpt.train.checkpoint import require_settings
from regiongpt.train.dataset import DataCollator, RecordDataset, answer_loss
from regiongpt.train.loop import Loop, decisive_settings
from regiongpt.train.recipe import LoraConfig, ModelConfig, Recipe, language_shape, tower_shape
from regiongpt.train.watch import note_run

log = logging.getLogger(__name__)

_OF_PARTS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")


def train(config: Recipe) -> Path:
    """Run every stage of a recipe that is not yet done; returns the folder of the finished checkpoint.

    Raises:
        ConfigError: The run's folder holds a run on other records, or another process is training there.
        DataError: A record cannot be used; the folder cannot be written.
        CheckpointError: The checkpoint to continue from cannot be used.

    Paper: §3.2, §4
    """
    with training(config):
        return _train(config)


@contextmanager
def training(config: Recipe) -> Iterator[None]:
    """Lock the run's folder during training, after checking that it can resume."""
    config.check_files()
    processes = connect()
    with ExitStack() as stack:
        processes.from_first(lambda: stack.enter_context(locked(config.out)))
        for name in config.all_steps:
            if config.runs(name) and (config.out / name / "model" / "config.json").exists():
                require_settings(config.out / name, decisive_settings(getattr(config, name)))
        keep_freed_memory()
        yield


def _train(config: Recipe) -> Path:
    data, processes = config.data, Processes()
    mixtures = {
        name: open_mixture(mixture, data.root, config.seed)
        for name, mixture in (("stage1", data.pretrain_mixture), ("stage2", data.mixture))
        # A finished stage is known by what it was trained on, whether or not it is to be run now.
        if mixture and (config.runs(name) or (config.out / name / "model").exists())
    }
    dev = open_mixture(data.dev_mixture, data.root, config.seed) if data.dev_mixture else None
    made_of: dict[str, dict[str, Any]] = {}
    records: list[Any] = []
    start = config.model.init or config.model.model_dump(mode="json", exclude={"init"})
    for name, mixture in mixtures.items():
        log.info("%s: %s", name, mixture.report())
        for part in mixture.parts if name == "stage1" else ():
            if count := part.without_image():
                lacking = f"{count} of {len(part.records)} records have no image, and stage 1 learns from images alone"
                raise DataError(f"{part.records.folder}: {lacking}; leave the part to stage 2")
        records = [*records, mixture.identity()["parts"]]
        lora = config.lora.model_dump(mode="json") if config.lora.rank and name == "stage2" else None
        made_of[name] = {"start": start, "records": records, "suffixes": data.suffixes, "lora": lora}
        require_settings(config.out / name, {"seed": config.seed, **made_of[name]})
    set_seed(config.seed)
    finished = config.model.folder if config.model.init else config.out / "start"

    def make_start() -> None:
        begun = any(list((config.out / name).glob("checkpoint-*")) for name in mixtures)
        if not config.model.init and not begun:  # an earlier start may have been made for other settings
            shutil.rmtree(finished, ignore_errors=True)
            first = next(iter(mixtures.values()))
            drawn = [first.draw(item) for item in range(min(128, len(first)))]
            paths = filter(None, (each.records.image_path(each.record()) for each in drawn))
            create_start(config.model, config.model.language, finished, paths)
        check_shape(config.model, finished)

    processes.from_first(make_start)
    if processes.is_first:
        read = mixtures | ({"dev": dev} if dev is not None else {})
        note_run(config.out, config, {name: {"records": mixture.report()} for name, mixture in read.items()})

    for name, mixture in mixtures.items():

        def prepare(model: Any, processor: Any, name: str = name, mixture: Mixture = mixture) -> dict[str, Any]:
            longest = getattr(model.config.text_config, "max_position_embeddings", None)
            of = partial(RecordDataset, processor=processor, longest=longest, suffixes=data.suffixes)
            return {
                "dataset": of(mixture, items=max(1, round(getattr(config, name).epochs * len(mixture)))),
                "collate": DataCollator(processor),
                "loss": answer_loss,
                "dev": of(dev, items=min(config.watch.dev_items, len(dev))) if dev else None,
            }

        if config.runs(name):
            finished = train_stage(config, name, finished, prepare, made_of=made_of[name])
        else:
            finished = config.out / name / "model"
    return finished


def train_stage(
    config: Recipe,
    name: str,
    start: Path,
    prepare: Callable[[Any, Any], dict[str, Any]],
    *,
    made_of: Mapping[str, Any] | None = None,
) -> Path:
    """Train a checkpoint for one stage, unless that has been done; returns the folder of the finished checkpoint.

    Its settings are the recipe's field ``name``; in ``stage2`` the language model learns too. ``prepare`` makes
    ``dataset``, ``collate``, ``loss`` and ``dev`` of a :class:`Loop`, given model and processor.
    """
    folder, processes = config.out / name, Processes()
    finished = folder / "model"
    if (finished / "config.json").exists():
        log.info("%s: already finished, in %s; give another --out to train again", name, finished)
        return finished
    # Adam's steps are lost in half precision, which a checkpoint may be stored in.
    model, processor = weights.load(start, dtype=torch.float32)
    if name == "stage2" and model.untrained:
        told = f"stage 2 starts from {start}, whose refinement and connector are untrained"
        if not config.from_scratch and start != config.out / "stage1" / "model":
            raise ConfigError(f"{told}; run stage 1 first and give its result as model.init, or give --from-scratch")
        log.warning("%s", told)
    adapts = choose_learners(name, model.train(), config.lora)
    data = prepare(model, processor)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s: %d conversations, %.2f M trainable parameters", name, len(data["dataset"]), learning / 1e6)
    given: Any = {"config": getattr(config, name), "folder": folder, "seed": config.seed, "engine": config.engine}
    Loop(name, model, **given, watch=config.watch, made_of=made_of, **data).run()
    if processes.is_first:
        if adapts:
            merge_adapters(model.language_model)
        save_whole(finished, model, processor)
    processes.wait()
    return finished


# -- what a stage starts from ------------------------------------------------------------------------------------------


def save_whole(folder: Path, model: Any, processor: Any) -> None:
    """Write a checkpoint folder atomically."""
    with new_folder(folder) as beside:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)


def create_start(shape: ModelConfig, language: str | Path, folder: Path, images: Iterable[Path] = ()) -> None:
    """Join a tower and a language model by an untrained refinement and connector, unless that has been done.

    The channels of an EfficientNet-Lite tower differ much in scale, and are measured on some training ``images``.
    """
    if (folder / "config.json").exists():
        return
    same = {"region_format", "region_numbers", "image_marks"}
    # A language model that the recipe has trained itself knows the plain template.
    template = (shape.chat_template or None) if shape.language else "plain"
    options = {**_shape_options(shape), **shape.model_dump(include=same)}
    model, processor = weights.create(shape.vision, language, chat_template=template, **options)
    if model.config.vision_config.model_type == "efficientnet_lite" and (paths := list(images)):
        _calibrate(model, processor, paths)
    save_whole(folder, model, processor)


def new_shape(shape: ModelConfig, vision: Any, language: Any = None) -> RegionGPTConfig:
    """Configuration of the model that :func:`create_start` makes, by the configurations of its parts."""
    return RegionGPTConfig(vision_config=vision, text_config=language, **_shape_options(shape))


def _shape_options(shape: ModelConfig) -> dict[str, Any]:
    sizes = {name: getattr(shape, name) or None for name in ("image_size", "refinement_channels", "connector_size")}
    grid = [shape.image_grid] * 2 if shape.image_grid else None
    return {**shape.model_dump(include={"refinement", "region_position", "region_crop"}), **sizes, "image_grid": grid}


def check_start(config: Recipe) -> None:
    """Check that a recipe whose files are there can start, without making anything; a RegionGPTError if not."""
    if config.model.init:
        check_shape(config.model, config.model.folder)
    else:
        tower, _ = weights.load_tower(config.model.vision, config.model.image_size or None)
        new_shape(config.model, tower.config)


def check_shape(shape: ModelConfig, folder: Path) -> None:
    """Raise CheckpointError, with every difference, if a checkpoint is not what the recipe's [model] describes."""
    there = weights.read_shape(folder)
    if not shape.language:
        return
    here = new_shape(shape, tower_shape(shape.vision), language_shape(shape.language))
    names = ["refinement", "refinement_channels", "connector_size", "region_position", "region_crop"]
    names += [name for name in ("image_size", "image_grid") if getattr(shape, name)]
    pairs = {name: (getattr(there, name), getattr(here, name)) for name in names}
    pairs["image_marks"] = there.image_marks, shape.image_marks
    pairs["region_numbers"] = bool(there.region_number_offset), shape.region_numbers
    described = read_json(folder / "processor_config.json", CheckpointError)
    pairs["region_format"] = described.get("region_format"), shape.region_format
    for part, kind in (("vision", "vision_config"), ("language", "text_config")):
        for name in _OF_PARTS:
            ours, theirs = (getattr(getattr(each, kind), name, None) for each in (there, here))
            pairs[f"{part}.{name}"] = ours, theirs
    if wrong := [f"{name} is {got} there and {wanted} here" for name, (got, wanted) in pairs.items() if got != wanted]:
        told = f"{folder}: the checkpoint does not match the recipe: {'; '.join(wrong)}"
        raise CheckpointError(f"{told}; correct model.init or the recipe's [model], or give another --out")


@torch.no_grad()
def _calibrate(model: Any, processor: Any, images: Sequence[Path]) -> None:
    """Standardise refinement's and connector's input, measured on images, and scale their output to a word's length."""

    def standardise(module: Any, samples: Sequence[Tensor]) -> None:
        values = torch.cat(list(samples)).double()  # (N, C), not yet standardised
        module.mean.copy_(values.mean(0))
        module.std.copy_(values.std(0).clamp_min(1e-3))

    pixels = [processor.pixels_of(load_image(each)) for each in images]
    tower = model.vision_tower
    standardise(tower, [model.encode_image(each)[0, : len(tower.mean)].flatten(1).T for each in pixels])
    pooled = [model.refinement.pool_image(model.refine(model.encode_image(each)))[0] for each in pixels]
    standardise(model.connector, pooled)
    written = model.connector(torch.cat(pooled))
    words = model.get_input_embeddings().weight
    model.connector.linear_2.weight.mul_(words.norm(dim=-1).mean() / written.norm(dim=-1).mean())


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with single digits and the closed-set suffix as one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=["<pad>", "<s>", "</s>", IMAGE_TOKEN, REGION_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([" " + closed_set_suffix()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN, REGION_TOKEN],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template("plain")
    return fast


# -- what learns -------------------------------------------------------------------------------------------------------


def choose_learners(stage: str, model: Any, config: LoraConfig) -> bool:
    """Freeze or train the language model, or put adapters beside its linear layers, to be merged at the end: True."""
    language, adapts = model.language_model, stage == "stage2" and config.rank > 0
    language.requires_grad_(stage == "stage2" and not adapts)
    if adapts:
        try:
            from peft import LoraConfig as PeftConfig
            from peft import inject_adapter_in_model
        except ImportError as error:
            raise ConfigError("lora: peft is not installed; run: pip install '.[train]'") from error
        given: Any = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
        inject_adapter_in_model(PeftConfig(**given, target_modules="all-linear"), language)
        for name, parameter in language.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return adapts


def merge_adapters(language_model: Any) -> None:
    """Add the adapters to the weights beside them, and take them out: the checkpoint is then like any other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(language_model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(language_model.get_submodule(parent), child, layer.get_base_layer())
    # peft's marks on the model would look like remaining adapters.
    for note in ("peft_config", "_hf_peft_config_loaded"):
        vars(language_model).pop(note, None)

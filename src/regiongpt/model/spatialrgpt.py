"""SpatialRGPT checkpoints as ours: every tensor is used, left out on purpose, or an error, and few are held at a time.

One comes as a folder with a subfolder for each part of the model, of which the extractor is the paper's.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from regiongpt.environment import progress
from regiongpt.errors import CheckpointError
from regiongpt.model.modeling import RegionGPTForConditionalGeneration
from regiongpt.model.processing import prepare_tokenizer
from regiongpt.model.weights import describe, reading, some, square_image_processor
from regiongpt.prompts import CHAT_TEMPLATES, CONTROL_TOKENS
from regiongpt.storage import check_new, new_folder, read_json, weight_files, write_json

TERMS = (
    "SpatialRGPT's authors give code and weights under the Apache License 2.0. The weights were trained from VILA-1.5 "
    "(CC-BY-NC-SA-4.0) and Llama 3 (Meta Llama 3 Community License), whose terms hold too: use them for non-commercial "
    "purposes only. Built with Meta Llama 3."
)
PIECE = 2**29
"""Bytes of a file that is written, unless a single tensor has more."""

_KINDS: dict[str, dict[str, Any]] = {  # what the forward pass here repeats, by file and field
    "config.json": {
        "model_type": "llava_llama",
        "image_aspect_ratio": "resize",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
    },
    "llm/config.json": {"model_type": "llama"},
    "vision_tower/config.json": {"model_type": "siglip_vision_model"},
    "region_extractor/config.json": {"region_extractor_type": "regiongpt"},
    "mm_projector/config.json": {"mm_projector_type": "mlp_downsample"},
}
_PARTS = ("llm", "vision_tower", "region_extractor", "mm_projector")
_NAMES = {  # what names begin with here, and in the source
    "language_model.": "llm/",
    "vision_tower.": "vision_tower/vision_model.",
    "refinement.deconv_1.": "region_extractor/feature_refinement_module.0.",
    "refinement.norm.": "region_extractor/feature_refinement_module.1.",
    "refinement.deconv_2.": "region_extractor/feature_refinement_module.3.",
    "region_connector.": "region_extractor/rgb_projector.",
    "connector.norm.": "mm_projector/layers.1.",
    "connector.linear_1.": "mm_projector/layers.2.",
    "connector.linear_2.": "mm_projector/layers.4.",
}
# The depth branch, whose maps another model computes; and tables that older versions stored and all versions compute.
_LEFT_OUT = re.compile(r"region_extractor/depth_projector\.(weight|bias)|\S+\.(position_ids|inv_freq)")
_VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_MADE = {"connector.mean": 0.0, "connector.std": 1.0}  # ours alone

# What it was trained to read first.
_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{%- set messages = [{'role': 'system', 'content': '"
    + _SYSTEM
    + "'}] + messages -%}{%- endif -%}"
    + CHAT_TEMPLATES["llama3"]
)
_END_OF_TEXT = "<|end_of_text|>"  # ends the last answer of a conversation, others the end of turn


class _Stored(NamedTuple):
    file: Path
    name: str
    shape: list[int]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)


def import_spatialrgpt(source: str, out: str | Path, mask_weights: str = "exact") -> tuple[int, list[str]]:
    """Write a SpatialRGPT checkpoint as one of ours, the tensors unchanged.

    Args:
        source: a folder, or the name of a repository on the hub.
        out: folder to write, new or empty.
        mask_weights: ``exact``, or ``sampled`` as SpatialRGPT itself weighs regions; see :class:`RegionGPTProcessor`.

    Returns:
        The number of parameters, and the names of the tensors left out.

    Raises:
        CheckpointError: the source is another model, or a file or tensor is missing, unknown or of another shape.
    """
    check_new(out)
    folder = _folder(source)
    config, processor, generation, stored_rows = _describe(folder, mask_weights)
    with torch.device("meta"):
        model = RegionGPTForConditionalGeneration(config)
    shapes = {name: list(each.shape) for name, each in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[_VOCABULARY[1]]
    tensors, left_out = _accounted(folder, shapes, stored_rows)
    pieces = list(_pieces(tensors))
    with new_folder(out) as fresh:
        weight_map: dict[str, str] = {}
        for number, piece in enumerate(progress(pieces, "import", "file"), 1):
            file = tensors[piece[0]].file
            with reading(f"the weights {file}"), safe_open(file, "pt") as stored:
                held = {name: _lengthened(stored.get_tensor(tensors[name].name), shapes[name]) for name in piece}
            if number == 1:
                config.dtype = next(iter(held.values())).dtype
                held |= {name: torch.full(shapes[name], value, dtype=config.dtype) for name, value in _MADE.items()}
            name = f"model-{number:05d}-of-{len(pieces):05d}.safetensors"
            save_file(held, fresh / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, name)
            del held
        total = {"total_size": sum(each.size for each in tensors.values())}
        write_json(fresh / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
        config.architectures = [RegionGPTForConditionalGeneration.__name__]
        config.text_config.dtype = config.vision_config.dtype = config.dtype
        for part in (config, processor, generation):
            part.save_pretrained(fresh)
        told = f"# SpatialRGPT, imported into RegionGPT\n\nFrom `{source}` by `regiongpt weights import`.\n\n{TERMS}\n"
        (fresh / "README.md").write_text(told, encoding="utf-8")
    return sum(math.prod(shapes[name]) for name in tensors), left_out


def _folder(source: str) -> Path:
    """The source's folder, downloaded if it is a name of the hub; checked to be of the kind."""
    folder = Path(source)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise CheckpointError(f"{source}: expected a folder, or OWNER/NAME of a repository on the hub")
        with reading(f"{source} from the hub"):
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    for file, fields in _KINDS.items():
        if not (folder / file).is_file():
            raise CheckpointError(f"{source}: expected a SpatialRGPT checkpoint, but there is no {file}")
        found: Any = read_json(folder / file, CheckpointError)
        for name, wanted in fields.items():
            if (got := found.get(name) if isinstance(found, dict) else found) != wanted:
                raise CheckpointError(f"{folder / file}: expected {name} {wanted!r} of a SpatialRGPT, got {got!r:.80}")
    return folder


def _describe(folder: Path, mask_weights: str) -> tuple[Any, Any, Any, int]:
    """Configuration, processor and generation settings, and how many tokens the stored vocabulary has."""
    with reading(f"the configuration of {folder}"):
        text, vision = (AutoConfig.from_pretrained(folder / part, local_files_only=True) for part in _PARTS[:2])
        tokenizer = AutoTokenizer.from_pretrained(folder / "llm", local_files_only=True)
    if unknown := {*CONTROL_TOKENS["llama3"], _END_OF_TEXT} - tokenizer.get_vocab().keys():
        raise CheckpointError(f"{folder}/llm: expected the tokenizer of Llama 3, but it has no {min(unknown)}")
    tokenizer.eos_token = _END_OF_TEXT
    prepare_tokenizer(tokenizer, "llama3")
    for config in (text, vision):  # what SpatialRGPT notes in them says nothing here
        for name in ("resume_path", "llm_mask_token_id", "llm_depth_token_id"):
            vars(config).pop(name, None)
    stored_rows = int(text.vocab_size)
    text.vocab_size = max(stored_rows, len(tokenizer))
    cells = vision.image_size // vision.patch_size
    shape = {"image_size": vision.image_size, "image_grid": [cells, cells], "refinement_norm_eps": 1e-6}
    shape |= {"image_connector": "downsample", "region_connector": "linear"}
    processing = {
        "chat_template": _TEMPLATE,
        "framing": "stretch",
        "mask_weights": mask_weights,
        "citations": "mentions",
    }
    image_processor = square_image_processor(vision.image_size, str(folder / "vision_tower"))
    image_processor.resample = Image.Resampling.BICUBIC  # images are stretched by it, whatever is stored
    return *describe(vision, text, tokenizer, image_processor, processing, **shape), stored_rows


def _accounted(folder: Path, shapes: dict[str, list[int]], stored_rows: int) -> tuple[dict[str, _Stored], list[str]]:
    """The source's tensors by their names here, and the names of those left out; only the files' headers are read."""
    stored: dict[str, _Stored] = {}
    for part in _PARTS:
        for file in weight_files(folder / part):
            with reading(f"the weights {file}"), safe_open(file, "pt") as header:
                for name in header.keys():  # noqa: SIM118
                    one = header.get_slice(name)
                    stored[f"{part}/{name}"] = _Stored(file, name, one.get_shape(), one.get_dtype())
    tensors: dict[str, _Stored] = {}
    for target in shapes.keys() - _MADE.keys():
        start = next(start for start in _NAMES if target.startswith(start))
        # Older transformers begin a tower's names with vision_model here, too.
        found = stored.pop(_NAMES[start] + target.removeprefix(start).removeprefix("vision_model."), None)
        if found is None:
            continue
        wanted = [stored_rows, *shapes[target][1:]] if target in _VOCABULARY else shapes[target]
        if found.shape != wanted or found.dtype not in ("F32", "F16", "BF16"):
            got = f"{found.shape} of {found.dtype}, expected {wanted} of floats"
            raise CheckpointError(f"{found.file}: {found.name} is {got} by config.json; copy the whole folder again")
        tensors[target] = found
    left_out = [name for name in stored if _LEFT_OUT.fullmatch(name)]
    if unknown := stored.keys() - set(left_out):
        raise CheckpointError(f"{folder}: has tensors that no SpatialRGPT has, {some(unknown)}; not imported")
    missing = shapes.keys() - tensors.keys() - _MADE.keys()
    if missing:
        raise CheckpointError(f"{folder}: lacks the tensors for {some(missing)}; copy the whole folder again")
    return tensors, left_out


def _pieces(tensors: dict[str, _Stored]) -> Iterator[list[str]]:
    """Names of tensors of one file, as many as go into a file of ours."""
    piece: list[str] = []
    for name, each in sorted(tensors.items(), key=lambda item: item[1]):
        same = piece and tensors[piece[0]].file == each.file
        if piece and not (same and sum(tensors[one].size for one in piece) + each.size <= PIECE):
            yield piece
            piece = []
        piece.append(name)
    yield piece


def _lengthened(stored: Tensor, shape: list[int]) -> Tensor:
    """A vocabulary's tensor with the mean of all rows for each token that is new; any other as it is."""
    if new := shape[0] - len(stored):
        mean = stored.mean(0, keepdim=True, dtype=torch.float32).to(stored.dtype)
        stored = torch.cat([stored, mean.expand(new, -1)])
    return stored.contiguous()

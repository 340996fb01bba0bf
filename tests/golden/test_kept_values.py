"""What a rewrite must not change: the shipped model's answers and region embeddings, and the training losses.

``kept_values.json`` holds what was measured before. Answers must match token for token, and numbers to 1e-5: kernels of
other machines sum in another order.
``python tests/golden/test_kept_values.py`` writes the file anew, after weights have been trained anew.
"""

import json
import os
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parents[1]))

from learning import learn, settings

from regiongpt import Region, RegionPredictor
from regiongpt.model.weights import nano_path

FILE = Path(__file__).parent / "kept_values.json"
DATA = Path(os.environ.get("REGIONGPT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "coco_photos"
IMAGES = {"chelsea": (30, 10, 380, 290), "coffee": (172, 16, 404, 308), "astronaut": (20, 15, 365, 512)}
DEV_IMAGES = 40
"""Annotated images whose every box is asked about; more would take longer than they tell."""


def regions_of(box: tuple[int, int, int, int], image: Image.Image) -> list[Region]:
    """One region of every kind."""
    x0, y0, x1, y1 = box
    rows, columns = np.mgrid[: image.height, : image.width]
    disc = (columns - (x0 + x1) / 2) ** 2 + (rows - (y0 + y1) / 2) ** 2 < (min(x1 - x0, y1 - y0) / 3) ** 2
    return [
        Region.box(*box),
        Region.box(x0 + 0.3, y0 + 0.6, x0 + 3.9, y0 + 2.2),
        Region.polygon([[x0, y1], [(x0 + x1) / 2, y0], [x1, y1 - 7.5]]),
        Region.mask(disc),
        Region.point((x0 + x1) / 2, (y0 + y1) / 2),
        Region.scribble([[x0, y0], [(x0 + x1) / 2, y1], [x1, y0]]),
    ]


def of_every_kind(predictor: RegionPredictor) -> dict[str, Any]:
    """Answers about regions of every kind on images that scikit-image carries."""
    found = {}
    for name, box in IMAGES.items():
        spec = find_spec("skimage")
        assert spec is not None
        assert spec.origin is not None
        image = Image.open(Path(spec.origin).parent / "data" / f"{name}.png").convert("RGB")
        predictor.set_image(image)
        regions = regions_of(box, image)
        found[name] = {
            "describe": [each.text for each in predictor.describe(regions)],
            "ask": [predictor.ask(f"What is <region{n}>?", regions).text for n in range(1, len(regions) + 1)],
            "classify": [each.label for each in predictor.classify(regions, choices=["cat", "cup", "person", "spoon"])],
            "locate": predictor.locate("the person", regions).index,
        }
    return found


def embeddings() -> list[str]:
    """Region embeddings, as float32 in hexadecimal: one text a region."""
    model = AutoModelForImageTextToText.from_pretrained(nano_path()).eval()
    processor = AutoProcessor.from_pretrained(nano_path())
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    found = []
    for name, box in IMAGES.items():
        image = Image.open(Path(spec.origin).parent / "data" / f"{name}.png").convert("RGB")
        regions = regions_of(box, image)
        text = " ".join(f"<region{n}>" for n in range(1, len(regions) + 1))
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        inputs = processor.apply_chat_template(
            messages, images=[image], regions=regions, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        with torch.no_grad():
            refined = model.refine(model.encode_image(inputs["pixel_values"]))
            rows = model.region_features(refined, inputs["region_weights"])[0]
        found += [row.numpy().astype("<f4").tobytes().hex() for row in rows]
    return found


def dev_answers(predictor: RegionPredictor) -> dict[str, str]:
    """Digests, by image, of the answers about every annotated box; neither boxes nor answers are kept here."""
    content = json.loads((DATA / "instances_dev.json").read_text(encoding="utf-8"))
    boxes: dict[int, list[list[float]]] = {}
    for each in content["annotations"]:
        boxes.setdefault(each["image_id"], []).append(each["bbox"])
    found = {}
    for entry in [each for each in content["images"] if each["id"] in boxes][:DEV_IMAGES]:
        predictor.set_image(DATA / "images" / entry["file_name"])
        regions = [Region.box(x, y, x + w, y + h) for x, y, w, h in boxes[entry["id"]]]
        texts = [each.text for each in predictor.describe(regions)]
        texts.append(predictor.ask("Describe <region1> in detail.", regions[:1]).text)
        found[str(entry["id"])] = sha256(json.dumps(texts).encode()).hexdigest()[:16]
    return found


def losses(folder: Path) -> list[str]:
    """Losses of twelve steps of a tiny model, as hexadecimal floats."""
    learn(folder, items=96, stage=settings(log_steps=1, save_steps=100))
    return [float(json.loads(line)["loss"]).hex() for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="module")
def predictor() -> RegionPredictor:
    return RegionPredictor.from_pretrained(device="cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_nano_answers_as_before(kept: dict[str, Any], predictor: RegionPredictor) -> None:
    assert of_every_kind(predictor) == kept["answers"]


def test_region_embeddings_are_the_same(kept: dict[str, Any]) -> None:
    found = embeddings()
    ours, theirs = (np.frombuffer(bytes.fromhex("".join(rows)), "<f4") for rows in (found, kept["embeddings"]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_nano_answers_as_before_on_dev_images(kept: dict[str, Any], predictor: RegionPredictor) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no annotated images at {DATA}; set REGIONGPT_DATA")
    assert dev_answers(predictor) == kept["dev_answers"]


def test_training_losses_are_the_same(kept: dict[str, Any], tmp_path: Path) -> None:
    found = losses(tmp_path / "stage2")
    assert [float.fromhex(each) for each in found] == pytest.approx(
        [float.fromhex(each) for each in kept["losses"]], rel=1e-5
    )


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    nano = RegionPredictor.from_pretrained(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "answers": of_every_kind(nano),
            "embeddings": embeddings(),
            "dev_answers": dev_answers(nano),
            "losses": losses(Path(folder) / "stage2"),
        }
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

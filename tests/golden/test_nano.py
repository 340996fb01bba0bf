"""What nano's recipe trains on must not change: the losses of a debug run, and the batches of 200 steps.

``nano.json`` was written by the recipe as it is. Token ids, labels and the like must match, and floats to 1e-5.
``python tests/golden/test_nano.py`` writes the file anew, after a change of the recipe.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "nano"))

from dataset import EXTRAS
from reading import reading_of, sampler_of, texts_of, tokenizer_of
from recipe import RECIPE, NanoRecipe
from steps import conversations_of, debug_size, train
from test_kept_values import DATA

from regiongpt.data.coco import load_coco, photo_sources
from regiongpt.data.facts import COLOURS, OBJECT, View
from regiongpt.model import weights
from regiongpt.train.dataset import DataCollator

FILE = Path(__file__).with_name("nano.json")
BLOCK = 20


def losses(out: Path) -> dict[str, list[str]]:
    """Losses of every step of a debug run, as hexadecimal floats."""
    config = debug_size(NanoRecipe.load(RECIPE, [f"--out={out}"]))
    train(config)
    return {
        log.parent.name: [float(json.loads(line)["loss"]).hex() for line in log.read_text().splitlines()]
        for log in sorted(config.out.glob("*/log.jsonl"))
    }


def kept_of(batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, list[Any]]:
    """Of each block of batches, the sum of its floats and a digest of everything else."""
    found: dict[str, list[Any]] = {"integers": [], "floats": []}
    digest, total = sha256(), 0.0
    for number, batch in enumerate(batches, 1):
        for name in sorted(batch):
            if batch[name].is_floating_point():
                total += float(batch[name].double().sum())
            else:
                digest.update(
                    f"{name} {tuple(batch[name].shape)}".encode() + batch[name].contiguous().numpy().tobytes()
                )
        if number % BLOCK == 0:
            found["integers"].append(digest.hexdigest()[:16])
            found["floats"].append(total)
            digest, total = sha256(), 0.0
    return found


def objects_of(view: View, features: Any, crops: Any, careful: Sequence[bool]) -> dict[int, str]:
    """Stands for what a model makes of a view."""
    return {o.id: OBJECT for o, second in zip(view.askable, careful, strict=True) if o.id % 3 == 0 and not second}


def batches() -> dict[str, dict[str, list[Any]]]:
    """What is kept of the batches of 200 steps; colours and features are made up, for they depend on pixels."""
    recipe = NanoRecipe.load(RECIPE, [f"--data.root={DATA}"])
    images = load_coco(photo_sources(DATA, "train")).images
    texts = texts_of(recipe, images)
    reading = reading_of(recipe, texts, tokenizer_of(texts, recipe.model))
    model, processor = weights.load(weights.nano_path(), device="cpu")
    store: Any = SimpleNamespace(
        colours=[{o.id: COLOURS[o.id % 13] for o in i.objects if o.id % 13 < len(COLOURS)} for i in images],
        row=lambda index, view: torch.full((1, 1, 1), 10.0 * index + view),
        place=lambda index: index,
        blanks=None,
        crops=None,
    )
    collate = DataCollator(processor, EXTRAS)

    def read(step: int) -> dict[str, torch.Tensor]:
        size = recipe.language.batch_size
        examples = [reading[k] for k in range(step * size, (step + 1) * size)]
        return {name: torch.stack([each[name] for each in examples]) for name in examples[0]}

    steps = {"language": [read(step) for step in [*range(100), *range(600, 700)]]}
    for name, first in (("align", 0), ("stage2", 400)):
        stage, sampler = getattr(recipe, name), sampler_of(recipe, images)
        namer: Any = SimpleNamespace(words=objects_of) if name == "stage2" else None
        data = conversations_of(recipe, stage, images, store, sampler, processor, model.config.image_grid, namer)
        size = stage.batch_size
        steps[name] = [
            collate([data[k] for k in range(step * size, (step + 1) * size)]) for step in range(first, first + 200)
        ]
    return {name: kept_of(iter(each)) for name, each in steps.items()}


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return values


def test_the_losses_of_a_debug_run_are_the_same(kept: dict[str, Any], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = losses(tmp_path / "nano")
    finally:
        torch.set_num_threads(threads)
    assert found.keys() == kept["losses"].keys()
    for name, values in kept["losses"].items():
        expected = [float.fromhex(each) for each in values]
        assert [float.fromhex(each) for each in found[name]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_batches_of_200_steps_are_the_same(kept: dict[str, Any]) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no annotated images at {DATA}; set REGIONGPT_DATA")
    for name, found in batches().items():
        assert found["integers"] == kept["batches"][name]["integers"], name
        assert found["floats"] == pytest.approx(kept["batches"][name]["floats"], rel=1e-5), name


if __name__ == "__main__":
    import tempfile

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        values = {"losses": losses(Path(folder) / "nano"), "batches": batches()}
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

"""An ablation at a size of seconds: trained, asked, tabulated, gone on with, and refused where it would mislead."""

import json
from pathlib import Path

import pytest
from pictures import draw_pictures
from tiny_checkpoint import make_parts

from regiongpt import ConfigError
from regiongpt.ablate import KINDS, choose_variants, summarise, tables
from regiongpt.cli import main
from regiongpt.data.sources import convert, load_converter
from regiongpt.evaluate.bootstrap import Sampled, mean_statistic, resample
from regiongpt.evaluate.task import TABLES
from regiongpt.model.configuration import REFINEMENTS
from regiongpt.train.recipe import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Annotated pictures, their ``records``, and in ``vision`` and ``language`` the parts of a model."""
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root, 8, "instances_dev.json")
    source = load_converter("coco")(instances=(root / "instances_dev.json",), images=root / "images")
    convert(source, root / "records")
    make_parts(root)
    return root


def ablate(kind: str, pictures: Path, out: Path, *words: str, recipe: str = "table6_deconv") -> int:
    stages = ("stage2",) if recipe == "finetune_records" else ("stage1", "stage2")
    sizes = [f"--{stage}.{name}=4" for stage in stages for name in ("batch_size", "micro_batch_size")]
    sizes += ["--engine.precision=fp32", f"--data.mixture={pictures / 'records'}", "--resamples=20"]
    if recipe == "table6_deconv":
        sizes += [f"--model.{name}={pictures / name}" for name in ("vision", "language")]
        sizes += [f"--data.pretrain_mixture={pictures / 'records'}", "--model.image_size=32", "--model.image_grid=2"]
    asked = ["--eval.split", "dev", "--eval.limit=4", f"--eval.data={pictures}"]
    taken = {word.partition("=")[0] for word in words if "=" in word}
    given = [word for word in [*sizes, *asked] if word.partition("=")[0] not in taken]
    return main(["ablate", kind, str(CONFIGS / f"{recipe}.toml"), "--out", str(out), *given, *words])


def seen(right: list[float]) -> dict[str, dict[str, Sampled]]:
    """Results of a seed: the mean, and the mean over classes of which most have one image."""
    images, classes = list(range(len(right))), [min(k, 30) for k in range(len(right))]
    found = {"AP": mean_statistic(images, right), "class_average": mean_statistic(images, right, classes)}
    return {"p": {name: resample(each, 300) for name, each in found.items()}}


def test_intervals_lie_around_means():
    # Rare classes fall out of resamples, and what is said of the others would move the interval off the mean.
    cell = summarise({"a": [seen([0.0] * 30 + [1.0] * 30)] * 2, "b": [seen([1.0] * 60)] * 2})["p"]["class_average"]
    for name, value, interval in (("a", "mean", "interval"), ("b", "gain", "gain_interval")):
        low, high = cell[name][interval]
        assert abs(cell[name][value] - (low + high) / 2) < (high - low) / 4


@pytest.mark.parametrize(("seeds", "images", "differing"), [(1, 60, 30), (2, 20, 10), (2, 60, 4)])
def test_one_seed_or_a_handful_of_images_claim_nothing(seeds, images, differing):
    none, deconv = [0.0] * images, [1.0] * differing + [0.0] * (images - differing)
    found = summarise({"deconv": [seen(deconv)] * seeds, "none": [seen(none)] * seeds})
    cell = found["p"]["AP"]["none"]
    assert (cell["too_few"], cell["gain_interval"]) == (True, None)
    assert found["p"]["AP"]["deconv"]["interval"] is None or differing == 4
    assert tables(found)[0][1][1][2].endswith(", too few to tell")


@pytest.mark.slow
def test_variants_are_trained_asked_and_tabulated_and_not_twice(pictures, tmp_path, capsys):
    out, words = tmp_path / "out", ["--variants", "none,deconv", "--seeds", "0"]
    assert ablate("refinement", pictures, out, *words) == 0
    printed = capsys.readouterr().out
    for part in ("difference from none", "| result | none | deconv |", "The paper's Table 6", "too few to tell"):
        assert part in printed
    found = json.loads((out / "result.json").read_text())
    cells = found["protocols"]["score all choices"]["accuracy"]
    assert cells["deconv"]["gain"] == pytest.approx(cells["deconv"]["mean"] - cells["none"]["mean"])
    assert found["manifests"]["deconv"][0]["settings"]["split"] == "dev"
    models = {name: out / name / "seed-0/training/stage2/model" for name in ("none", "deconv")}
    for name, model in models.items():
        assert json.loads((model / "config.json").read_text())["refinement"] == name
    files = [model / "model.safetensors" for model in models.values()]
    before = [path.stat().st_mtime_ns for path in files], (out / "table.md").read_text()
    assert ablate("refinement", pictures, out, *words) == 0
    assert ([path.stat().st_mtime_ns for path in files], (out / "table.md").read_text()) == before
    # Another recipe in the same folder would pass the old models off as its own.
    capsys.readouterr()
    assert ablate("refinement", pictures, out, *words, "--stage2.lr=1e-2") == 2
    assert "other settings" in capsys.readouterr().err
    # Two trained checkpoints, of a recipe that says nothing of their shape.
    starts = [f"{name}={out / name / 'seed-0/training/stage1/model'}" for name in models]
    further = ["--seeds=0", f"--variants={','.join(starts)}"]
    assert ablate("refinement", pictures, tmp_path / "further", *further, recipe="finetune_records") == 0
    # The suffix is part of no record, and a model may be asked without the suffix that it was taught with.
    prompt = ["--seeds=0", f"--model.init={starts[0].partition('=')[2]}"]
    assert ablate("prompt", pictures, tmp_path / "prompt", *prompt, recipe="finetune_records") == 0
    runs = {name: tmp_path / "prompt" / name / "seed-0" for name in ("with", "without", "asked-without")}
    weights = {name: run / "training/stage2/model/model.safetensors" for name, run in runs.items()}
    assert weights["with"].read_bytes() != weights["without"].read_bytes()
    assert not weights["asked-without"].exists()
    for name, run in runs.items():
        first = json.loads((run / "evaluation/coco_cls/items.jsonl").read_text().splitlines()[0])
        guided = first["question"].endswith("Answer the question using COCO-80 category names.")
        assert guided == (name == "with")


@pytest.mark.slow
def test_an_ablation_at_debug_size_needs_no_data(tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--debug", "--variants=none,deconv", "--eval.limit=2", "--resamples=20"]
    assert main(["ablate", "refinement", "table6_deconv", *words]) == 0
    assert "too few to tell" in capsys.readouterr().out
    found = json.loads((tmp_path / "out-debug" / "result.json").read_text())
    assert (found["seeds"], {len(runs) for runs in found["manifests"].values()}) == ([0], {1})
    assert not (tmp_path / "out").exists()


def test_variants_by_name_and_by_value():
    recipe = Recipe.load(CONFIGS / "table6_deconv.toml")
    assert [each.name for each in choose_variants("refinement", None, recipe)] == list(REFINEMENTS)
    assert choose_variants("refinement", "none,deconv", recipe)[0].recipe == {"model.refinement": "none"}
    lite, clip = choose_variants("tower", "efficientnet-lite0@320,models/clip", recipe)
    assert lite.recipe == {"model.vision": "efficientnet-lite0", "model.image_size": "320"}
    assert (clip.name, clip.recipe) == ("clip", {"model.vision": "models/clip"})
    masks = choose_variants("data", "masks=records-m,boxes=records-b", recipe)[0]
    assert (masks.recipe, masks.asked) == ({"data.mixture": "records-m"}, {"region": "mask"})
    assert choose_variants("prompt", None, recipe) == KINDS["prompt"].variants
    for words in (("refinement", "deconv"), ("refinement", "cubic,none"), ("data", "0%,5%"), ("data", None)):
        with pytest.raises(ConfigError, match="--variants"):
            choose_variants(*words, recipe)
    # A recipe that describes its checkpoint is held to the description, one that does not to none.
    described = choose_variants("refinement", "none=a,deconv=b", Recipe.load(CONFIGS / "vicuna7b_stage2.toml"))
    assert described[0].recipe == {"model.init": "a", "model.refinement": "none"}
    bare = Recipe.load(CONFIGS / "finetune_records.toml")
    assert choose_variants("refinement", "none=a,deconv=b", bare)[0].recipe == {"model.init": "a"}
    with pytest.raises(ConfigError, match=r"NAME=VALUE with the value of model\.init"):
        choose_variants("refinement", "deconv,none", bare)


def test_the_variants_of_the_papers_tables_have_the_names_and_shapes_of_their_recipes():
    for kind, recipes in (("refinement", "table6"), ("tower", "table7")):
        for variant in KINDS[kind].variants:
            config = Recipe.load(CONFIGS / f"{recipes}_{variant.name}.toml")
            for field, value in variant.recipe.items():
                assert str(getattr(config.model, field.removeprefix("model."))) == value
        assert {variant.name for variant in KINDS[kind].variants} == set(TABLES[kind].rows)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("refinement", ["--seeds", "0,x"], "--seeds: "),
        ("refinement", ["--eval", "3"], "--eval: name an option"),
        ("prompt", ["--data.suffixes=false"], "--data.suffixes: the ablation of prompt varies it"),
        ("data", ["--variants=boxes=a,masks=b", "--eval.region=mask"], "--eval.region: the ablation of data varies it"),
        # What would stop the last variant is said before the first is trained.
        ("tower", ["--variants", "efficientnet-lite2@64,efficientnet-lite4@64"], "efficientnet-lite4-pytorch-model"),
        ("refinement", ["--model.image_grid=20"], "image_grid must be two"),
        ("refinement", ["--eval.data=nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_trained(kind, words, message, pictures, tmp_path, capsys):
    assert ablate(kind, pictures, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("regiongpt: error:")
    assert message in error
    assert not (tmp_path / "out").exists()

"""An ablation at a size of seconds: trained, asked, tabulated, gone on with, and refused where it would mislead."""

import json
import shutil
from pathlib import Path

import pytest
from pictures import TINY, draw_pictures
from safetensors.torch import load_file
from tiny import save_tower, tower_config
from tiny_checkpoint import make_parts
from transformers import AutoModel

from regiongpt import ConfigError
from regiongpt.ablate.study import KINDS, choose_variants, cut_annotations, photographs
from regiongpt.ablate.summary import orders, summarise, tables
from regiongpt.cli import main
from regiongpt.data.sources import convert, load_converter
from regiongpt.evaluate.metrics.bootstrap import Statistic, mean_statistic
from regiongpt.evaluate.paper import TABLES
from regiongpt.model.configuration import REFINEMENTS
from regiongpt.train.recipe import Recipe

RECIPE = Path(__file__).parents[2] / "configs" / "nano.toml"
SIZE = {**TINY, "language.epochs": 0.2, "align.epochs": 2, "stage1.epochs": 3, "stage2.epochs": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root, 8, "instances_train.json")
    content = json.loads((root / "instances_train.json").read_text())
    for each in content["annotations"][::2]:
        x, y, w, h = each["bbox"]
        each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (root / "instances_train.json").write_text(json.dumps(content))
    shutil.copy(root / "instances_train.json", root / "instances_dev.json")
    return root


def ablate(kind: str, pictures: Path, out: Path, *words: str) -> int:
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    asked = ["--eval.split", "dev", "--eval.limit=4", "--data.root", str(pictures), "--resamples", "50"]
    return main(["ablate", kind, str(RECIPE), "--out", str(out), *size, *asked, *words])


def seen(right: list[float]) -> dict[str, dict[str, Statistic]]:
    """Statistics of a seed: the mean, and the mean over classes of which most have one image."""
    images, classes = list(range(len(right))), [min(k, 30) for k in range(len(right))]
    return {"p": {"AP": mean_statistic(images, right), "class_average": mean_statistic(images, right, classes)}}


def test_what_is_beyond_chance_is_said_and_intervals_lie_around_means():
    wrong, even, right = [0.0] * 60, [0.0, 1.0] * 30, [1.0] * 60
    measured = {"deconv": [seen(even), seen(even[::-1])], "none": [seen(wrong)] * 2, "bilinear": [seen(even)] * 2}
    found = summarise(measured, 300)
    (line,) = orders(found, TABLES["refinement"])
    # What is alike has none before the other.
    order = "p, AP: here deconv = bilinear > none; paper deconv > bilinear > none: another order"
    assert line == f"{order}; beyond chance 'none' differs from 'deconv'"
    # Rare classes fall out of resamples, and what is said of the others would move the interval off the mean.
    cell = summarise({"a": [seen([0.0] * 30 + [1.0] * 30)] * 2, "b": [seen(right)] * 2}, 300)["p"]["class_average"]
    for each, (low, high) in ((cell["a"].mean, cell["a"].interval), (cell["b"].gain, cell["b"].gain_interval)):
        assert abs(each - (low + high) / 2) < (high - low) / 4
    assert orders(found, None) == []
    (line,) = orders(summarise({"deconv": [seen(even)] * 2, "none": [seen(wrong)] * 2}, 50), TABLES["refinement"])
    assert "here deconv > none; paper deconv > none: the same order" in line
    # What was not measured has no place in an order.
    nothing = {"p": {"AP": mean_statistic([0], [float("nan")])}}
    assert orders(summarise({"deconv": [nothing], "none": [seen(even)]}, 50), TABLES["refinement"]) == []


@pytest.mark.parametrize(("seeds", "images", "differing"), [(1, 60, 30), (2, 20, 10), (2, 60, 4)])
def test_one_seed_or_a_handful_of_images_claim_nothing(seeds, images, differing):
    none, deconv = [0.0] * images, [1.0] * differing + [0.0] * (images - differing)
    found = summarise({"deconv": [seen(deconv)] * seeds, "none": [seen(none)] * seeds}, 200)
    cell = found["p"]["AP"]["none"]
    assert (cell.too_few, cell.gain_interval) == (True, None)
    assert found["p"]["AP"]["deconv"].interval is None or differing == 4
    assert orders(found, TABLES["refinement"]) == ["p, AP: here too few to tell; paper deconv > none"]
    assert tables(found)[1][1][1] == ["AP", "too few to tell"]


@pytest.mark.slow
def test_variants_are_trained_asked_and_tabulated_and_not_twice(pictures, tmp_path, capsys):
    words = ["--variants", "none,deconv", "--seeds", "0"]
    assert ablate("refinement", pictures, tmp_path, *words) == 0
    printed = capsys.readouterr().out
    assert "difference from none" in printed
    assert "| figure | none | deconv |" in printed
    assert "The paper's Table 6" in printed
    assert "paper deconv > none" in printed
    assert "too few to tell" in printed
    found = json.loads((tmp_path / "result.json").read_text())
    cells = found["protocols"]["score all choices"]["accuracy"]
    assert cells["none"]["gain"] is None
    assert cells["deconv"]["gain"] == pytest.approx(cells["deconv"]["mean"] - cells["none"]["mean"])
    assert len(cells["deconv"]["seeds"]) == 1
    assert found["manifests"]["deconv"][0]["settings"]["split"] == "dev"
    assert "<svg" in (tmp_path / "index.html").read_text()
    # What the two have in common was made once.
    assert len(list((tmp_path / "shared").glob("features-*"))) == 1
    assert len(list((tmp_path / "shared").glob("language-*"))) == 1
    models = sorted(tmp_path.glob("*/seed-0/training/stage2/model/model.safetensors"))
    assert len(models) == 2
    stamps = [path.stat().st_mtime_ns for path in models]
    table = (tmp_path / "table.md").read_text()
    assert ablate("refinement", pictures, tmp_path, *words) == 0
    assert [path.stat().st_mtime_ns for path in models] == stamps
    assert (tmp_path / "table.md").read_text() == table
    # Another recipe in the same folder would pass the old models off as its own.
    assert ablate("refinement", pictures, tmp_path, *words, "--stage2.lr=1e-2") == 2
    assert "stage2 differ" in capsys.readouterr().err


@pytest.mark.slow
def test_an_ablation_at_debug_size_needs_no_data(tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--debug", "--eval.limit=2", "--resamples=20", "--stage2.lr=1e-3"]
    assert main(["ablate", "data", "nano", *words]) == 0
    assert "too few to tell" in capsys.readouterr().out
    found = json.loads((tmp_path / "out-debug" / "result.json").read_text())
    assert found["seeds"] == [0]
    assert all(cell["too_few"] for cells in found["protocols"]["score all choices"].values() for cell in cells.values())
    assert {len(runs) for runs in found["manifests"].values()} == {1}
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_is_asked_with_and_without_the_guiding_words(pictures, tmp_path, capsys):
    assert ablate("prompt", pictures, tmp_path, "--variants", "with,asked-without", "--seeds", "1") == 0
    capsys.readouterr()
    assert len(list(tmp_path.glob("*/seed-1/training/stage2"))) == 1
    asked = {
        name: json.loads((tmp_path / name / "seed-1/evaluation/coco_cls/items.jsonl").read_text().splitlines()[0])
        for name in ("with", "asked-without")
    }
    assert asked["with"]["question"].endswith("Answer the question using COCO-80 category names.")
    assert not asked["asked-without"]["question"].endswith("category names.")


@pytest.mark.slow
def test_an_earlier_run_is_reused_by_all_variants_and_seeds(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    learnt = ["--steps=language,align", "--data.root", str(pictures)]
    assert main(["train", str(RECIPE), *size, *learnt, "--out", str(run)]) == 0
    made = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    words = ["--seeds", "0,1", "--reuse", str(run), "--shared", str(tmp_path / "shared"), "--steps=align"]
    out = tmp_path / "out"
    assert ablate("refinement", pictures, out, "--variants", "none,deconv", *words) == 0
    assert not list((tmp_path / "shared").glob("language-*"))
    towers = {
        tower.tobytes()
        for path in out.glob("*/seed-*/training/align/model/model.safetensors")
        for tower in [load_file(path)["vision_tower.mean"].numpy()]
    }
    assert towers == {load_file(run / "start" / "model.safetensors")["vision_tower.mean"].numpy().tobytes()}
    first, second = (load_file(path)["connector.mean"] for path in out.glob("none/seed-*/training/start/*.safetensors"))
    assert not first.equal(second)
    # Boxes and masks learn on some of the photographs, whose rows of the same features they take.
    assert ablate("data", pictures, tmp_path / "data", *words, "--seeds", "0") == 0
    found = json.loads((tmp_path / "data" / "result.json").read_text())
    assert [variant["name"] for variant in found["variants"]] == ["boxes", "masks"]
    assert len(list((tmp_path / "shared" / "towers").glob("*"))) == 1
    # The alignment learns no words: of one seed it is made once for all wordings.
    prompt = [*words[:-1], "--steps=align,stage2", "--stage2.epochs=1", "--from_scratch=true", "--seeds", "0"]
    before = len(list((tmp_path / "shared").glob("align-*")))
    assert ablate("prompt", pictures, tmp_path / "prompt", "--variants", "with,without", *prompt) == 0
    aligned = {path.read_bytes() for path in (tmp_path / "prompt").glob("*/*/training/align/model/model.safetensors")}
    assert len(aligned) == 1
    assert len(list((tmp_path / "shared").glob("align-*"))) == before
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == made
    # Neither another language model nor a folder without a run passes for the recipe's own.
    capsys.readouterr()
    assert ablate("refinement", pictures, tmp_path / "other", *words, "--model.layers=2") == 2
    assert "layers 1 for 2" in capsys.readouterr().err
    assert ablate("refinement", pictures, tmp_path / "other", "--reuse", str(tmp_path / "none")) == 2
    assert "regiongpt train" in capsys.readouterr().err


@pytest.mark.slow
def test_towers_and_numbers_of_tokens_are_set_side_by_side(pictures, tmp_path, capsys):
    small, large = tmp_path / "clip", tmp_path / "siglip"
    save_tower(small, AutoModel.from_config(tower_config("clip_vision_model")))
    save_tower(large, AutoModel.from_config(tower_config("siglip_vision_model")))
    variants = f"{small}@28,{large}@56"
    assert ablate("tower", pictures, tmp_path / "towers", "--variants", variants, "--seeds", "0") == 0
    printed = capsys.readouterr().out
    assert "| figure | clip-28 | siglip-56 |" in printed
    assert "The paper's Table 7" in printed
    grids = "image=2,image=1,region=2"
    assert ablate("tokens", pictures, tmp_path / "tokens", "--variants", grids, "--seeds", "0") == 0
    assert "| figure | image=2 | image=1 | region=2 |" in capsys.readouterr().out
    cells = {
        name: json.loads((tmp_path / "tokens" / name / "seed-0/training/stage2/model" / file).read_text())[field]
        for name, file, field in (
            ("image=2", "config.json", "image_grid"),
            ("image=1", "config.json", "image_grid"),
            ("region=2", "processor_config.json", "region_grid"),
        )
    }
    assert cells == {"image=2": [2, 2], "image=1": [1, 1], "region=2": 2}


@pytest.mark.slow
def test_a_recipe_of_the_paper_is_varied_on_records(pictures, tmp_path, capsys):
    vision, language = make_parts(tmp_path)
    source = load_converter("coco")(instances=(pictures / "instances_train.json",), images=pictures / "images")
    convert(source, tmp_path / "records")
    parts = [
        f"--model.vision={vision}",
        f"--model.language={language}",
        "--model.image_size=32",
        "--model.image_grid=2",
    ]
    records = [f"--data.{name}={tmp_path / 'records'}" for name in ("pretrain_mixture", "mixture")]
    size = [f"--{stage}.{name}=4" for stage in ("stage1", "stage2") for name in ("batch_size", "micro_batch_size")]
    asked = [f"--eval.data={pictures}", "--eval.split=dev", "--eval.limit=2", "--resamples=20", "--seeds=0"]
    words = [*parts, *records, *size, *asked, "--engine.precision=fp32"]
    recipe = str(RECIPE.with_name("table6_deconv.toml"))
    assert main(["ablate", "refinement", recipe, "--variants=deconv,none", f"--out={tmp_path / 'out'}", *words]) == 0
    assert "paper deconv > none" in capsys.readouterr().out
    made = {
        name: json.loads((tmp_path / "out" / name / "seed-0/training/stage2/model/config.json").read_text())[
            "refinement"
        ]
        for name in ("deconv", "none")
    }
    assert made == {"deconv": "deconv", "none": "none"}
    # Two trained checkpoints, of a recipe that says nothing of their shape.
    starts = [f"{name}={tmp_path / 'out' / name / 'seed-0/training/stage1/model'}" for name in made]
    recipe = str(RECIPE.with_name("finetune_records.toml"))
    words = [*records[1:], *size[2:], *asked, f"--variants={','.join(starts)}", f"--out={tmp_path / 'further'}"]
    assert main(["ablate", "refinement", recipe, *words]) == 0
    # The suffix is part of no record.
    words[-2:] = [
        f"--model.init={starts[0].partition('=')[2]}",
        "--variants=with,without",
        f"--out={tmp_path / 'prompt'}",
    ]
    assert main(["ablate", "prompt", recipe, *words]) == 0
    learnt = [
        (tmp_path / "prompt" / name / "seed-0/training/stage2/model/model.safetensors") for name in ("with", "without")
    ]
    assert learnt[0].read_bytes() != learnt[1].read_bytes()


def test_annotations_are_cut_down_and_larger_shares_hold_smaller_ones(pictures, tmp_path):
    outlined = cut_annotations(pictures, "train", "outlined", tmp_path)
    kept = json.loads((outlined / "instances_train.json").read_text())
    assert len(kept["annotations"]) == 8
    assert all(each["segmentation"] for each in kept["annotations"])
    assert (outlined / "images" / "1.png").is_file()
    images = {}
    for share in ("25%", "50%", "100%"):
        content = json.loads((cut_annotations(pictures, "train", share, tmp_path) / "instances_train.json").read_text())
        images[share] = {image["id"] for image in content["images"]}
    assert [len(each) for each in images.values()] == [2, 4, 8]
    assert images["25%"] < images["50%"] < images["100%"]
    assert cut_annotations(pictures, "train", "outlined", tmp_path) == outlined


def test_variants_by_name_and_by_value():
    recipe = Recipe.load(RECIPE)
    assert [each.name for each in choose_variants("refinement", None, recipe)] == list(REFINEMENTS)
    tower = choose_variants("tower", "efficientnet-lite0@320,models/clip", recipe)
    assert tower[0].recipe == {"model.vision": "efficientnet-lite0", "model.image_size": "320"}
    assert (tower[1].name, tower[1].recipe) == ("clip", {"model.vision": "models/clip"})
    assert choose_variants("tokens", "image=3,region=2", recipe)[1].recipe == {"model.region_grid": "2"}
    assert [variant.annotations for variant in choose_variants("data", "25%,100%", recipe)] == ["25%", "100%"]
    for words in (("refinement", "deconv"), ("refinement", "cubic,none"), ("data", "0%,5%")):
        with pytest.raises(ConfigError, match="--variants"):
            choose_variants(*words, recipe)


def test_variants_of_records_are_fields_of_a_new_model_checkpoints_and_records():
    new = Recipe.load(RECIPE.with_name("table6_deconv.toml"))
    assert [each.recipe for each in choose_variants("refinement", "none,deconv", new)] == [
        {"model.refinement": "none"},
        {"model.refinement": "deconv"},
    ]
    # A recipe that describes its checkpoint is held to the description, one that does not to none.
    described = choose_variants("refinement", "none=a,deconv=b", Recipe.load(RECIPE.with_name("vicuna7b_stage2.toml")))
    assert described[0].recipe == {"model.init": "a", "model.refinement": "none"}
    bare = Recipe.load(RECIPE.with_name("finetune_records.toml"))
    assert choose_variants("refinement", "none=a,deconv=b", bare)[0].recipe == {"model.init": "a"}
    for recipe in (new, bare):
        masks = choose_variants("data", "masks=records-m,boxes=records-b", recipe)[0]
        assert (masks.recipe, masks.asked) == ({"data.mixture": "records-m"}, {"region": "mask"})
        assert choose_variants("prompt", None, recipe) == KINDS["prompt"].variants
        with pytest.raises(ConfigError, match=r"NAME=VALUE with the value of data\.mixture"):
            choose_variants("data", None, recipe)
    with pytest.raises(ConfigError, match=r"NAME=VALUE, the value of model\.init"):
        choose_variants("refinement", "deconv,none", bare)


def test_the_variants_of_the_papers_tables_have_the_names_and_shapes_of_their_recipes():
    for kind, recipes in (("refinement", "table6"), ("tower", "table7")):
        for variant in KINDS[kind].variants:
            config = Recipe.load(RECIPE.with_name(f"{recipes}_{variant.name}.toml"))
            for field, value in variant.recipe.items():
                assert str(getattr(config.model, field.removeprefix("model."))) == value
        assert {variant.name for variant in KINDS[kind].variants} == set(TABLES[kind].rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,0"], "--seeds: give numbers"),
        (["--seeds", "00,0"], "--seeds: give numbers"),
        (["--seed", "5"], "--seed: give --seeds"),
        (["--resamples", "0"], "--resamples: input should be greater"),
        (["--eval", "3"], "--eval: name an option"),
        (["--eval.limits", "3"], "did you mean 'limit'"),
        (["--eval.limit", "few"], "--eval.limit: "),
        (["--eval.guided", "maybe"], "--eval.guided: "),
        (["--stage2.epoch=1"], "did you mean 'stage2.epochs'"),
        (["--task", "coco_clas"], "did you mean 'coco_cls'"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_trained(words, message, pictures, tmp_path, capsys):
    assert ablate("refinement", pictures, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("regiongpt: error:")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "word"),
    [("prompt", "--data.suffixes=false"), ("prompt", "--eval.guided=false"), ("data", "--eval.region=mask")],
)
def test_what_is_varied_is_not_given_for_all(kind, word, pictures, tmp_path, capsys):
    assert ablate(kind, pictures, tmp_path / "out", word) == 2
    name = word.partition("=")[0]
    assert f"{name}: the ablation of {kind} varies it" in capsys.readouterr().err


def test_photographs_that_changed_are_other_photographs(pictures, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(pictures, tmp_path / name)
    content = (tmp_path / "b" / "instances_train.json").read_text()
    (tmp_path / "b" / "instances_train.json").write_text(content + " ")
    picture = next((tmp_path / "c" / "images").iterdir())
    picture.write_bytes(picture.read_bytes() + b" ")
    found = [photographs(str(tmp_path / name), "train") for name in ("a", "b", "c")]
    assert found[0] == photographs(str(pictures), "train")
    assert found[0]["images"] == found[1]["images"] != found[2]["images"]
    assert found[0]["annotations"] == found[2]["annotations"] != found[1]["annotations"]


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (
            "tower",
            ["--variants", "efficientnet-lite2@64,efficientnet-lite4@64"],
            "efficientnet-lite4 are not installed",
        ),
        ("tokens", ["--variants", "image=2,image=20"], "image_grid must be two numbers from 1"),
        ("refinement", ["--eval.data", "nowhere"], "nowhere"),
        ("refinement", ["--device", "cuda:99"], "expected device"),
    ],
)
def test_what_would_stop_the_last_variant_is_said_before_the_first(kind, words, message, pictures, tmp_path, capsys):
    assert ablate(kind, pictures, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

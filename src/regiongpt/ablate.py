"""The verb ``regiongpt ablate``: train, evaluate and compare variants of one part of a model.

``OUT/VARIANT/seed-N`` holds training and evaluation, OUT table.md and result.json. Paper: Tables 1, 6 and 7; §3.2
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypedDict, get_args

import numpy as np
from pydantic import Field

from regiongpt.drawing import Rows
from regiongpt.environment import launched
from regiongpt.errors import ConfigError, DataError, naming
from regiongpt.evaluate import task_class
from regiongpt.evaluate.bootstrap import FEWEST_IMAGES, TOO_FEW, Sampled, ends, too_few
from regiongpt.evaluate.task import RESAMPLES, TABLES, RunOptions
from regiongpt.settings import Settings, nearest, override
from regiongpt.storage import finite, locked, write_file, write_json
from regiongpt.train.recipe import ModelConfig, Recipe, dotted

if TYPE_CHECKING:
    from regiongpt.evaluate.report import TaskRun

log = logging.getLogger(__name__)

FEWEST_SEEDS: Final = 2


class Variant(NamedTuple):
    """One of the compared models."""

    name: str
    recipe: Mapping[str, str] = {}  # fields by dotted name, over those of the file
    asked: Mapping[str, str] = {}  # options of the benchmark, over those given for all


class Kind(NamedTuple):
    """One ablation; the other variants are compared with the first."""

    summary: str
    variants: tuple[Variant, ...]
    target: str = ""  # what NAME=VALUE sets in the recipe: the records, or the checkpoint to continue from


def _tower(name: str, vision: str, size: str = "") -> Variant:
    return Variant(name, {"model.vision": vision} | ({"model.image_size": size} if size else {}))


KINDS: Final = {
    "refinement": Kind(
        "the module that refines the feature map (Table 6)",
        tuple(
            Variant(name, {"model.refinement": name})
            for name in get_args(ModelConfig.model_fields["refinement"].annotation)
        ),
        "model.init",
    ),
    "tower": Kind(
        "the vision tower (Table 7); --variants NAME@SIZE,... names hub towers or folders",
        (
            _tower("openai_vit_l_336", "openai/clip-vit-large-patch14-336", "336"),
            _tower("siglip_vit_b_512", "google/siglip-base-patch16-512", "512"),
            _tower("siglip_vit_l_384", "google/siglip-large-patch16-384", "384"),
            # Its patches of 14 cover 27 x 14 = 378 of the 384 pixels.
            _tower("siglip_vit_so400m_384", "google/siglip-so400m-patch14-384", "378"),
        ),
        "model.init",
    ),
    "prompt": Kind(
        "the task-guided suffix (Table 1): trained and asked with it, without it, or only asked without it",
        (
            Variant("with"),
            Variant("without", {"data.suffixes": "false"}, {"guided": "false"}),
            Variant("asked-without", asked={"guided": "false"}),
        ),
    ),
    "data": Kind(
        "the records: boxes and masks, or others (--variants boxes=RECORDS,masks=RECORDS)",
        (Variant("boxes", asked={"region": "box"}), Variant("masks", asked={"region": "mask"})),
        "data.mixture",
    ),
}
"""The ablations by name."""


def choose_variants(kind: str, text: str | None, recipe: Recipe) -> tuple[Variant, ...]:
    """The variants that ``--variants`` names, or all; ConfigError where these are not two or more known ones.

    Records, and the model of a recipe that continues from a checkpoint, are varied as ``NAME=VALUE``.
    """
    known, target = {variant.name: variant for variant in KINDS[kind].variants}, KINDS[kind].target
    valued = target == "data.mixture" or (target == "model.init" and bool(recipe.model.init))
    found = []
    for word in known if text is None else [word.strip() for word in text.split(",") if word.strip()]:
        name, _, value = word.partition("=")
        if valued and name and value:
            like = known.get(name, Variant(name))
            # A recipe that says what its checkpoint is made of is held to it.
            described = like.recipe if target == "model.init" and recipe.model.language else {}
            found.append(Variant(name, {**described, target: value}, like.asked))
        elif valued:
            raise ConfigError(f"--variants: write each as NAME=VALUE with the value of {target}, got {word!r}")
        elif word in known:
            found.append(known[word])
        elif kind == "tower":
            tower, _, size = word.partition("@")
            found.append(_tower(Path(tower).name + (f"-{size}" if size else ""), tower, size))
        else:
            raise ConfigError(f"--variants: {nearest(word, known)}, got {word!r}")
    names = [variant.name for variant in found]
    if len(names) < 2 or len(set(names)) < len(names) or any(name in ("", ".", "..") or "/" in name for name in names):
        raise ConfigError(f"--variants: give at least two different names, such as {', '.join(known)}, got {text!r}")
    return tuple(found)


class Options(Settings):
    """Options of an ablation."""

    out: Path
    """Folder of all runs and the table."""
    variants: str | None = None
    """Comma-separated variants, default: all; the others are compared with the first."""
    seeds: str = Field(default="0,1,2", pattern=r"^\d{1,9}(,\d{1,9})*$")
    """Training seeds; every variant is trained with each."""
    task: str = "coco_cls"
    """The benchmark."""
    device: str | None = None
    """Device for evaluation; default: the first available."""
    resamples: int = Field(default=RESAMPLES, ge=1)
    """Resamples of the bootstrap."""
    debug: bool = False
    """Run with tiny models, one seed and drawn images, in OUT-debug."""


class Study:
    """An ablation of :data:`KINDS`; ConfigError where something does not go together.

    ``words`` are overrides of the recipe, and options of the benchmark such as ``--eval.limit=50``, for all variants.
    """

    def __init__(self, kind: str, recipe: str, words: Sequence[str], options: Options) -> None:
        if launched() > 1:
            raise ConfigError("ablate runs in one process; variants are trained one after the other")
        if options.debug and options.task != "coco_cls":
            raise ConfigError("--debug only runs coco_cls; leave out --task")
        given = override({}, words)
        asked = given.pop("eval", {})
        if not isinstance(asked, dict):
            raise ConfigError("--eval: name an option of the benchmark, such as --eval.limit 50")
        asked = {name.replace("-", "_"): value for name, value in asked.items()}
        if "seed" in given:
            raise ConfigError("--seed: give --seeds N,N,... instead")
        self.kind, self.recipe, self.options = kind, recipe, options
        self.overrides = [f"--{name}={value}" for name, value in dotted(given).items()]
        base = Recipe.load(recipe, self.overrides)
        self.variants = choose_variants(kind, options.variants, base)
        # A variant that leaves a field as it is stands for its default; where each names its own, none is mistaken.
        plain = any(not variant.recipe for variant in self.variants)
        for variant in self.variants:
            both = [f"--{name}" for name in variant.recipe if plain and name in dotted(given)]
            if both := [*both, *(f"--eval.{name}" for name in variant.asked if name in asked)]:
                raise ConfigError(f"{both[0]}: the ablation of {kind} varies it; leave it out")
        self.out, self.seeds = options.out, list(dict.fromkeys(map(int, options.seeds.split(","))))
        if options.debug:
            self.out, self.seeds = Path(f"{self.out}-debug"), self.seeds[:1]
            made = self._folder(self.variants[0], self.seeds[0]) / "training-debug" / "made"
            asked |= {"data": str(made), "split": "train"}
        elif base.data.root:
            asked = {"data": base.data.root, **asked}
        task = task_class(options.task)
        with naming("--eval"):
            self.tasks = {variant.name: task(**{**asked, **variant.asked}) for variant in self.variants}

    def run(self) -> str:
        """Check all files, train and evaluate what is missing, write the table and JSON, and return the table.

        Raises:
            ConfigError: The folder holds an ablation of another recipe, or another process is writing there.
            DataError: The folder cannot be written, or a file of a recipe or the benchmark cannot be used.
        """
        from regiongpt.evaluate.run import evaluate
        from regiongpt.inference.engine import pick_device
        from regiongpt.train.debug import debug_size
        from regiongpt.train.stages import check_start, train

        configs = {(variant.name, seed): self._load(variant, seed) for variant in self.variants for seed in self.seeds}
        pick_device(self.options.device)
        if not self.options.debug:
            for variant in self.variants:
                config = configs[variant.name, self.seeds[0]]
                config.check_files()
                if not (config.out / "start" / "config.json").exists():
                    check_start(config)
        # Known before the first training, but for debug runs, whose images are drawn with it.
        shared = set() if self.options.debug else self._shared_items()
        runs: dict[str, list[TaskRun]] = {variant.name: [] for variant in self.variants}
        measured: dict[str, list[Measured]] = {variant.name: [] for variant in self.variants}
        with locked(self.out):
            if self.options.debug:
                configs = {key: debug_size(config) for key, config in configs.items()}
                shared = self._shared_items()
            # Seed by seed: an ablation that is ended early has all variants with fewer seeds.
            for seed, variant in itertools.product(self.seeds, self.variants):
                log.info("%s, seed %d", variant.name, seed)
                # A variant that differs in the questions alone is asked of an earlier one's model.
                owner = next(each for each in self.variants if each.recipe == variant.recipe)
                options = RunOptions(
                    out=self._folder(variant, seed) / "evaluation",
                    model=train(configs[owner.name, seed]),
                    device=self.options.device,
                    resamples=self.options.resamples,
                    untrained=True,  # after a few steps of a trial it looks so
                    overwrite=True,  # results of the same model; stored answers are reused
                )
                task = self.tasks[variant.name]
                (run,) = evaluate([task], options)
                items = [item for item in run.items if item.id in shared]
                runs[variant.name].append(run)
                measured[variant.name].append(task.score(items, run.answers, resamples=options.resamples).sampled)
            return self._write(runs, summarise(measured), len(shared))

    def _folder(self, variant: Variant, seed: int) -> Path:
        return self.out / variant.name / f"seed-{seed}"

    def _load(self, variant: Variant, seed: int) -> Recipe:
        words = [*self.overrides, *(f"--{name}={value}" for name, value in variant.recipe.items())]
        out = self._folder(variant, seed) / "training"
        return Recipe.load(self.recipe, [*words, f"--seed={seed}", f"--out={out}"])

    def _shared_items(self) -> set[str]:
        """Ids of the items that every variant is asked about."""
        from regiongpt.evaluate.run import load_items

        shared = set.intersection(*({item.id for item in load_items(task)} for task in self.tasks.values()))
        if not shared:
            raise DataError("the variants have no item in common")
        return shared

    def _write(self, runs: "Mapping[str, Sequence[TaskRun]]", found: "Summary", items: int) -> str:
        from regiongpt.evaluate.report import RESULT, markdown, printed_rows

        pinned = [run.result["pinned"] for own in runs.values() for run in own]
        alike = {name: text for name, text in pinned[0].items() if all(each.get(name) == text for each in pinned)}
        rows = tables(found)
        if paper := TABLES.get(self.kind):
            rows.append((f"The paper's {paper.number}, measured on {paper.data}", printed_rows(paper)))
        parts = [
            f"# Ablation: {self.kind}",
            " ".join([f"{KINDS[self.kind].summary}; recipe {self.recipe}", *self.overrides]),
            f"{self.options.task}, {items:,} items. Means over the seeds {self.options.seeds}, times 100; in brackets "
            "the range of 95 % of the resamples, which draw images and seeds anew; then the difference from "
            f"{self.variants[0].name}. Fewer than {FEWEST_SEEDS} seeds, {FEWEST_IMAGES} images or 6 images with "
            f"differing answers are {TOO_FEW}.",
            "\n".join(f"- {name}: {text}" for name, text in alike.items()),
            *(f"## {name}\n\n{markdown(each)}" for name, each in rows),
        ]
        text = "\n\n".join(parts) + "\n"
        write_file(self.out / "table.md", text)
        result = {"ablation": self.kind, "task": self.options.task, "items": items, "seeds": self.seeds}
        variants = [variant._asdict() for variant in self.variants]
        manifests = {name: [run.manifest for run in own] for name, own in runs.items()}
        result |= {"variants": variants, "pinned": alike, "protocols": finite(found), "manifests": manifests}
        write_json(self.out / RESULT, result)
        return text + f"\nwritten to {self.out / 'table.md'} and {self.out / RESULT}"


# -- Side by side ------------------------------------------------------------------------------------------------------

Measured = Mapping[str, Mapping[str, Sampled]]  # by protocol and result


class Cell(TypedDict):
    """One result of one variant, times 100; no interval with too few seeds or images."""

    mean: float
    seeds: list[float]
    interval: tuple[float, float] | None  # 95 % of the resamples, each of which draws images and seeds anew
    gain: float | None  # difference from the first variant
    gain_interval: tuple[float, float] | None  # resampled with the same images
    too_few: bool


Summary = dict[str, dict[str, dict[str, Cell]]]  # by protocol, result and variant


def summarise(measured: Mapping[str, Sequence[Measured]]) -> Summary:
    """Means, intervals and differences of all results that every variant has, from those of its seeds."""
    summary: Summary = {}
    for protocol, results in next(iter(measured.values()))[0].items():
        for result in results:
            if all(result in each.get(protocol, {}) for runs in measured.values() for each in runs):
                own = {name: [each[protocol][result] for each in runs] for name, runs in measured.items()}
                summary.setdefault(protocol, {})[result] = _cells(own)
    return summary


def _cells(own: Mapping[str, Sequence[Sampled]]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    drawn = {}
    first = next(iter(own))
    for place, (name, seeds) in enumerate(own.items()):
        mean = 100 * float(np.mean([each.value for each in seeds]))
        # Each resample draws the same images for all variants, and each variant's own seeds.
        values = 100 * np.stack([each.values for each in seeds])
        picks = np.random.default_rng((0, 31, place)).integers(len(seeds), size=values.shape)
        drawn[name] = np.take_along_axis(values, picks, axis=0).mean(axis=0)
        few = len(seeds) < FEWEST_SEEDS or len(seeds[0].parts) < FEWEST_IMAGES
        interval = None if few else ends(np.clip(drawn[name], 0, 100 * seeds[0].most))
        own_means = [100 * each.value for each in seeds]
        cell = Cell(mean=mean, seeds=own_means, interval=interval, gain=None, gain_interval=None, too_few=few)
        if name != first:
            cell["gain"] = mean - cells[first]["mean"]
            cell["too_few"] = few or any(map(too_few, own[first], seeds))
            cell["gain_interval"] = None if cell["too_few"] else ends(drawn[name] - drawn[first])
        cells[name] = cell
    return cells


def tables(summary: Summary) -> list[tuple[str, Rows]]:
    """For each protocol its name and a row of text per result, the header first."""
    found = []
    for protocol, results in summary.items():
        rows = [[name, *map(cell_text, cells.values())] for name, cells in results.items()]
        found.append((protocol, [["result", *next(iter(results.values()))], *rows]))
    return found


def cell_text(cell: Cell) -> str:
    """A mean and the difference from the first variant, each with its interval: ``58.3 (52.8 to 63.9), -0.1``."""

    def shown(value: float | None, interval: tuple[float, float] | None, sign: str = "") -> str:
        if value is None or value != value:
            return "–"
        return f"{value:{sign}.1f}" + (f" ({interval[0]:{sign}.1f} to {interval[1]:{sign}.1f})" if interval else "")

    text = shown(cell["mean"], cell["interval"])
    if cell["gain"] is None:
        return text
    return f"{text}, {TOO_FEW if cell['too_few'] else shown(cell['gain'], cell['gain_interval'], '+')}"

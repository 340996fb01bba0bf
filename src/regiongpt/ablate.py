"""The verb ``regiongpt ablate``: train, evaluate and compare variants of one part of a model.

OUT/VARIANT/seed-N/  training/, evaluation/
OUT/                 table.md, result.json

Paper: Tables 1, 6 and 7; §3.2 (the task-guided prompt)
"""

import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypedDict, get_args

import numpy as np
from pydantic import Field, field_validator, model_validator

from regiongpt.environment import launched
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate import bootstrap, task_class
from regiongpt.evaluate.bootstrap import FEWEST_IMAGES, TOO_FEW, Statistic, too_few
from regiongpt.evaluate.task import RESAMPLES, TABLES, Rows, RunOptions, Task
from regiongpt.settings import Settings, override
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


def _tower(name: str, vision: str, size: int | str = "") -> Variant:
    return Variant(name, {"model.vision": vision} | ({"model.image_size": str(size)} if size else {}))


_REFINEMENTS: Final = get_args(ModelConfig.model_fields["refinement"].annotation)
KINDS: Final = {
    "refinement": Kind(
        "the module that refines the feature map (Table 6)",
        tuple(Variant(name, {"model.refinement": name}) for name in _REFINEMENTS),
        "model.init",
    ),
    "tower": Kind(
        "the vision tower (Table 7); --variants NAME@SIZE,... names hub towers or folders",
        (
            _tower("openai_vit_l_336", "openai/clip-vit-large-patch14-336", 336),
            _tower("siglip_vit_b_512", "google/siglip-base-patch16-512", 512),
            _tower("siglip_vit_l_384", "google/siglip-large-patch16-384", 384),
            # Its patches of 14 cover 27 x 14 = 378 of the 384 pixels.
            _tower("siglip_vit_so400m_384", "google/siglip-so400m-patch14-384", 378),
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
    known = {variant.name: variant for variant in KINDS[kind].variants}
    words = [word.strip() for word in text.split(",") if word.strip()] if text is not None else list(known)
    target = KINDS[kind].target
    valued = target == "data.mixture" or (target == "model.init" and bool(recipe.model.init))
    found = []
    for word in words:
        name, _, value = word.partition("=")
        if valued:
            if not (name and value):
                raise ConfigError(f"--variants: write each as NAME=VALUE with the value of {target}, got {word!r}")
            like = known.get(name, Variant(name))
            # A recipe that says what its checkpoint is made of is held to it.
            described = like.recipe if target == "model.init" and recipe.model.language else {}
            found.append(Variant(name, {**described, target: value}, like.asked))
        elif word in known:
            found.append(known[word])
        elif kind == "tower":
            tower, _, size = word.rpartition("@") if word.rpartition("@")[2].isdecimal() else (word, "", "")
            found.append(_tower(Path(tower).name + (f"-{size}" if size else ""), tower, size))
        else:
            raise ConfigError(f"--variants: unknown variant {word!r}; known: {', '.join(known)}")
    if len(found) < 2 or len({variant.name for variant in found}) < len(found):
        raise ConfigError(f"--variants: give at least two different ones, got {text!r}; such as {', '.join(known)}")
    if odd := [variant.name for variant in found if variant.name in ("", ".", "..") or "/" in variant.name]:
        raise ConfigError(f"--variants: {odd[0]!r} is not a valid folder name; choose another")
    return tuple(found)


class Options(Settings):
    """Options of an ablation."""

    out: Path
    """Folder of all runs and the table."""
    variants: str | None = None
    """Comma-separated variants, default: all; the others are compared with the first."""
    seeds: str = "0,1,2"
    """Training seeds; every variant is trained with each."""
    task: str = "coco_cls"
    """The benchmark."""
    device: str | None = None
    """Device for evaluation; default: the first available."""
    resamples: int = Field(default=RESAMPLES, ge=1)
    """Resamples of the bootstrap."""
    debug: bool = False
    """Run with tiny models, one seed and drawn images, in OUT-debug."""

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, value: str) -> str:
        words = [word.strip() for word in value.split(",")]
        if not all(word.isdecimal() and len(word) < 10 for word in words) or len(set(map(int, words))) < len(words):
            raise ValueError("give numbers such as 0,1,2, each once")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.debug and self.task != "coco_cls":
            raise ValueError("--debug only runs coco_cls; leave out --task")
        return self


class Study:
    """An ablation; ConfigError where something does not go together.

    Args:
        kind: Key of :data:`KINDS`.
        recipe: TOML file, or the name of a shipped recipe.
        words: Overrides of the recipe, and options of the benchmark such as ``--eval.limit=50``, for all variants.
        options: The rest.
    """

    def __init__(self, kind: str, recipe: str, words: Sequence[str], options: Options) -> None:
        if launched() > 1:
            raise ConfigError("ablate runs in one process; variants are trained one after the other")
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
        self.out, self.seeds = options.out, tuple(map(int, options.seeds.split(",")))
        if options.debug:
            self.out, self.seeds = Path(f"{self.out}-debug"), self.seeds[:1]
            made = self._folder(self.variants[0], self.seeds[0]) / "training-debug" / "made"
            asked |= {"data": str(made), "split": "train"}
        elif base.data.root:
            asked = {"data": base.data.root, **asked}
        self.tasks: dict[str, Task] = {}
        task = task_class(options.task)
        for variant in self.variants:
            try:
                self.tasks[variant.name] = task(**{**asked, **variant.asked})
            except ConfigError as error:
                is_option = str(error).partition(":")[0] in task.model_fields
                raise ConfigError(f"--eval{'.' if is_option else ': '}{error}") from None

    def run(self) -> str:
        """Train and evaluate what is missing, write the table and JSON, and return the table.

        All files are checked before the first variant is trained.

        Raises:
            ConfigError: The folder holds an ablation of another recipe, or another process is writing there.
            DataError: The folder cannot be written, or a file of a recipe or the benchmark cannot be used.
        """
        from regiongpt.evaluate.run import evaluate
        from regiongpt.inference.engine import pick_device
        from regiongpt.train.debug import debug_size
        from regiongpt.train.stages import check_start, train

        configs = {(variant.name, seed): self._load(variant, seed) for variant in self.variants for seed in self.seeds}
        if not self.options.debug:
            for variant in self.variants:
                configs[variant.name, self.seeds[0]].check_files()
            self._shared_items()
        pick_device(self.options.device)
        for variant in self.variants:
            config = configs[variant.name, self.seeds[0]]
            if not self.options.debug and not (config.out / "start" / "config.json").exists():
                check_start(config)
        runs: dict[str, list[tuple[TaskRun, Measured]]] = {variant.name: [] for variant in self.variants}
        with locked(self.out):
            if self.options.debug:
                for folder in self.out.glob("*/seed-*"):
                    shutil.rmtree(folder, ignore_errors=True)
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
                (run,) = evaluate([self.tasks[variant.name]], options)
                items = [item for item in run.items if item.id in shared]
                scored = self.tasks[variant.name].score(items, run.answers, resamples=0)
                runs[variant.name].append((run, scored.statistics))
            return self._write(runs, len(shared))

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

    def _write(self, runs: "Mapping[str, Sequence[tuple[TaskRun, Measured]]]", items: int) -> str:
        from regiongpt.evaluate.report import RESULT, markdown, printed_rows

        found = summarise({name: [each for _, each in own] for name, own in runs.items()}, self.options.resamples)
        pinned = [run.result["pinned"] for own in runs.values() for run, _ in own]
        alike = {name: text for name, text in pinned[0].items() if all(each.get(name) == text for each in pinned)}
        rows = tables(found)
        if paper := TABLES.get(self.kind):
            rows.append((f"The paper's {paper.number}, measured on {paper.data}", printed_rows(paper)))
        parts = [
            f"# Ablation: {self.kind}",
            " ".join([f"{KINDS[self.kind].summary}; recipe {self.recipe}", *self.overrides]),
            f"{self.options.task}, {items:,} items. Means over the seeds {self.options.seeds}, times 100; in brackets "
            "the range of 95 % of the resamples, which draw images and seeds anew. With fewer than "
            f"{FEWEST_SEEDS} seeds, {FEWEST_IMAGES} images or 6 images with differing answers there are {TOO_FEW}.",
            "\n".join(f"- {name}: {text}" for name, text in alike.items()),
            *(f"## {name}\n\n{markdown(each)}" for name, each in rows),
        ]
        text = "\n\n".join(parts) + "\n"
        write_file(self.out / "table.md", text)
        result = {
            "ablation": self.kind,
            "task": self.options.task,
            "items": items,
            "seeds": list(self.seeds),
            "variants": [variant._asdict() for variant in self.variants],
            "pinned": alike,
            "protocols": finite(found),
            "manifests": {name: [run.manifest for run, _ in own] for name, own in runs.items()},
        }
        write_json(self.out / RESULT, result)
        return text + f"\nwritten to {self.out / 'table.md'} and {self.out / RESULT}"


# ---------------------------------------------------------------------------------------------------------------------
# Side by side

Measured = Mapping[str, Mapping[str, Statistic]]  # by protocol and result


class Cell(TypedDict):
    """One result of one variant, times 100; no interval with too few seeds or images."""

    mean: float
    seeds: list[float]
    interval: tuple[float, float] | None  # 95 % of the resamples, each of which draws images and seeds anew
    gain: float | None  # difference from the first variant
    gain_interval: tuple[float, float] | None  # resampled with the same images
    too_few: bool


Summary = dict[str, dict[str, dict[str, Cell]]]  # by protocol, result and variant


def summarise(measured: Mapping[str, Sequence[Measured]], resamples: int, seed: int = 0) -> Summary:
    """Means, intervals and differences of all results that every variant has, from the statistics of its seeds."""
    summary: Summary = {}
    for protocol, figures in next(iter(measured.values()))[0].items():
        for figure in figures:
            if all(figure in each.get(protocol, {}) for runs in measured.values() for each in runs):
                own = {name: [each[protocol][figure] for each in runs] for name, runs in measured.items()}
                summary.setdefault(protocol, {})[figure] = _cells(own, resamples, seed)
    return summary


def _cells(own: Mapping[str, Sequence[Statistic]], resamples: int, seed: int) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    drawn = {}
    first = next(iter(own))
    for place, (name, statistics) in enumerate(own.items()):
        values = [100 * each.value() for each in statistics]
        mean = float(np.mean(values))
        # Each resample draws the same images for all variants, and each variant's own seeds.
        picks = np.random.default_rng((seed, 31, place)).integers(len(statistics), size=(len(statistics), resamples))
        each_seed = 100 * np.stack(bootstrap.resampled(statistics, resamples, seed))
        drawn[name] = np.take_along_axis(each_seed, picks, axis=0).mean(axis=0)
        few = len(statistics) < FEWEST_SEEDS or len(statistics[0].clusters) < FEWEST_IMAGES
        cell = Cell(mean=mean, seeds=values, interval=None, gain=None, gain_interval=None, too_few=few)
        if not few:
            cell["interval"] = bootstrap.around(drawn[name], mean, 100 * statistics[0].most)
        if name != first:
            cell["gain"] = gain = mean - cells[first]["mean"]
            alike = statistics[0].clusters == own[first][0].clusters
            cell["too_few"] = few or (alike and any(map(too_few, own[first], statistics)))
            if alike and not cell["too_few"]:
                cell["gain_interval"] = bootstrap.ends(bootstrap.centred(drawn[name] - drawn[first], gain))
        cells[name] = cell
    return cells


def tables(summary: Summary) -> list[tuple[str, Rows]]:
    """For each protocol its name and a row of text per result, the header first; then the same for differences."""
    found = []
    for protocol, figures in summary.items():
        first, *others = next(iter(figures.values()))
        means, gains = [["result", first, *others]], [["result", *others]]
        for name, cells in figures.items():
            means.append([name, *(_text(cell["mean"], cell["interval"]) for cell in cells.values())])
            own = [cells[other] for other in others]
            gains.append([name, *(TOO_FEW if c["too_few"] else _text(c["gain"], c["gain_interval"], "+") for c in own)])
        found += [(protocol, means), (f"{protocol}, difference from {first}", gains)]
    return found


def _text(value: float | None, ends: tuple[float, float] | None, sign: str = "") -> str:
    if value is None or value != value:
        return "–"
    return f"{value:{sign}.1f}" + (f" ({ends[0]:{sign}.1f} to {ends[1]:{sign}.1f})" if ends else "")

"""The verb ``regiongpt ablate``: variants of one part of a model trained alike, asked alike, and set side by side.

OUT/VARIANT/seed-N/recipe.json   the recipe, resolved; a run of another one is refused
OUT/VARIANT/seed-N/training/     the run of ``regiongpt train``
OUT/VARIANT/seed-N/evaluation/   the run of ``regiongpt evaluate``
OUT/shared/                      language models, features and the like of variants whose recipes agree in them

Paper: Tables 1, 6 and 7; §3.1 (image tokens), §3.2 (the task-guided prompt)
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Self, get_args

from pydantic import Field, field_validator, model_validator

from regiongpt.data.coco import photo_sources
from regiongpt.data.shards import file_identity
from regiongpt.distributed import launched
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.task import RESAMPLES, Task
from regiongpt.evaluate.tasks import task_class
from regiongpt.settings import Settings, override
from regiongpt.storage import digest, locked, new_folder, read_json, write_json, writing
from regiongpt.train.recipe import ModelConfig, Recipe, dotted

log = logging.getLogger(__name__)

RECIPE: Final = "recipe.json"
_ASKED: Final = "--eval."
_REFINEMENTS: Final[tuple[str, ...]] = get_args(ModelConfig.model_fields["refinement"].annotation)
_NOT_OF_LANGUAGE: Final = {
    *("init", "vision", "image_size", "refinement", "refinement_channels", "connector_size", "image_grid")
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things that are compared.

    Attributes:
        name: Its column in tables and its folder.
        recipe: Fields of the recipe by dotted name, over those of the file.
        asked: Options of the benchmark, over those given for all.
        annotations: What is done to the annotations of the photographs before training: ``""`` for nothing,
            ``"outlined"`` to keep the objects with an outline alone, or ``"N%"`` to keep that share of the images.
    """

    name: str
    recipe: dict[str, str] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    annotations: str = ""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One ablation.

    Attributes:
        summary: One line of help.
        variants: What is compared if nothing is named; the others are held against the first.
        field: Field of a recipe on records that ``NAME=VALUE`` sets: the checkpoint to continue from, unless the recipe
            makes a new model, or the records; empty if records are varied like photographs.
        paper: Key of :data:`regiongpt.evaluate.paper.TABLES`; empty if the paper has no results.
    """

    summary: str
    variants: tuple[Variant, ...]
    field: str = ""
    paper: str = ""


def _named(kind: str, word: str) -> Variant:
    """The variant that a word of ``--variants`` describes."""
    what, _, side = word.partition("=")
    tower, _, size = word.rpartition("@") if word.rpartition("@")[2].isdecimal() else (word, "", "")
    if kind == "tower":
        name = tower.rstrip("/").rpartition("/")[2] + (f"-{size}" if size else "")
        return Variant(name=name, recipe={"model.vision": tower} | ({"model.image_size": size} if size else {}))
    if kind == "tokens" and what in ("image", "region") and side.isdecimal():
        return Variant(name=word, recipe={f"model.{what}_grid": side})
    if kind == "data" and word.endswith("%") and word[:-1].isdecimal() and 0 < int(word[:-1]) <= 100:
        return Variant(name=word, annotations=word)
    known = ", ".join(variant.name for variant in KINDS[kind].variants)
    more = {"tokens": "image=SIDE or region=SIDE", "data": "a share of the images such as 25%"}.get(kind)
    raise ConfigError(f"--variants: unknown variant {word!r}; known: {known}{f', or {more}' if more else ''}")


def _tower(name: str, vision: str, size: int) -> Variant:
    return Variant(name=name, recipe={"model.vision": vision, "model.image_size": str(size)})


def _objects(name: str, share: str, region: str) -> Variant:
    recipe = {"data.outline_share": share}
    return Variant(name=name, recipe=recipe, asked={"region": region}, annotations="outlined")


KINDS: Final[dict[str, Kind]] = {
    "refinement": Kind(
        summary="the module that refines the feature map (Table 6)",
        variants=tuple(Variant(name=name, recipe={"model.refinement": name}) for name in _REFINEMENTS),
        field="model.init",
        paper="refinement",
    ),
    "tower": Kind(
        summary="the vision tower (Table 7); --variants NAME@SIZE,... names towers of a hub or folders",
        variants=(
            _tower("openai_vit_l_336", "openai/clip-vit-large-patch14-336", 336),
            _tower("siglip_vit_b_512", "google/siglip-base-patch16-512", 512),
            _tower("siglip_vit_l_384", "google/siglip-large-patch16-384", 384),
            # Its patches of 14 cover 27 x 14 = 378 of the 384 pixels.
            _tower("siglip_vit_so400m_384", "google/siglip-so400m-patch14-384", 378),
        ),
        field="model.init",
        paper="tower",
    ),
    "prompt": Kind(
        summary="the task-guided suffix (Table 1): taught and asked with it, taught and asked without, asked without",
        variants=(
            Variant(name="with"),
            Variant(name="without", recipe={"data.suffixes": "false"}, asked={"guided": "false"}),
            Variant(name="asked-without", asked={"guided": "false"}),
        ),
    ),
    "tokens": Kind(
        summary="number of tokens per image and region; --variants image=SIDE,region=SIDE,...",
        variants=tuple(
            Variant(name=f"{what}={side}", recipe={f"model.{what}_grid": str(side)})
            for what, side in (("image", 6), ("image", 3), ("image", 1), ("image", 9), ("region", 2))
        ),
        field="model.init",
    ),
    "data": Kind(
        summary="boxes against masks on the objects with an outline, or shares of the images (--variants 25%,50%,100%)",
        variants=(_objects("boxes", "0", "box"), _objects("masks", "1", "mask")),
        field="data.mixture",
    ),
}
"""The ablations by name."""


def choose_variants(kind: str, text: str | None, recipe: Recipe) -> tuple[Variant, ...]:
    """The variants to compare.

    Args:
        kind: A key of :data:`KINDS`.
        text: Value of ``--variants``: names with commas between them; None for all.
        recipe: What all are varied from. If it trains a checkpoint on records, each variant of the model is
            ``NAME=VALUE``, since a checkpoint brings its own shape; so is, on any records, each variant of the data.

    Raises:
        ConfigError: There is no such variant, there are fewer than two, or a name is no folder's.
    """
    known = {variant.name: variant for variant in KINDS[kind].variants}
    words = [word.strip() for word in text.split(",") if word.strip()] if text else []
    target, on_records = KINDS[kind].field, recipe.data.on_records
    valued = on_records and (target == "data.mixture" or (target == "model.init" and bool(recipe.model.init)))
    if valued:
        found = []
        for word in words:
            name, _, value = word.partition("=")
            if not (name and value):
                raise ConfigError(f"--variants: write each as NAME=VALUE, the value of {target}, got {word!r}")
            like = known.get(name, Variant(name=name))
            # A recipe that says what its checkpoint is made of is held to it.
            described = like.recipe if target == "model.init" and recipe.model.language else {}
            found.append(Variant(name=name, recipe={**described, target: value}, asked=like.asked))
    else:
        found = [known[word] if word in known else _named(kind, word) for word in words]
        found = found if text is not None else list(known.values())
    if len(found) < 2 or len({variant.name for variant in found}) < len(found):
        how = f"NAME=VALUE with the value of {target}" if valued else ", ".join(known)
        raise ConfigError(f"--variants: give at least two different ones, got {text!r}; such as {how}")
    for variant in found:
        if variant.name in ("", ".", "..") or "/" in variant.name:
            raise ConfigError(f"--variants: {variant.name!r} cannot be the name of a folder; give another")
    return tuple(found)


class Options(Settings):
    """How an ablation is run, whatever is varied."""

    out: Path
    """Folder of all runs and of the table."""
    variants: str | None = None
    """Which, with commas between them, otherwise all; the others are held against the first."""
    seeds: str = "0,1,2"
    """Seeds of the training; every variant is trained with each."""
    reuse: Path | None = None
    """An earlier run of `regiongpt train`: its language model and features serve all variants and seeds."""
    shared: Path | None = None
    """Folder of what runs have in common, which several ablations may use; otherwise OUT/shared."""
    task: str = "coco_cls"
    """The benchmark."""
    device: str | None = None
    """Device that the trained models are asked on; otherwise the first there is."""
    resamples: int = Field(default=RESAMPLES, ge=1)
    """Resamples of the bootstrap."""
    debug: bool = False
    """Run it all tiny, with one seed, on drawn pictures, in OUT-debug."""

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, value: str) -> str:
        words = [word.strip() for word in value.split(",")]
        if not all(word.isdecimal() and len(word) < 10 for word in words) or len(set(map(int, words))) < len(words):
            raise ValueError("give numbers such as 0,1,2, each once")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.debug and (self.task != "coco_cls" or self.reuse or self.shared):
            raise ValueError("--debug asks coco_cls alone, and shares nothing; leave out --task, --reuse and --shared")
        return self


def _refuse_varied(kind: str, variants: Sequence[Variant], given: set[str], asked: Mapping[str, str]) -> None:
    """Raise ConfigError for an option whose value the variants or the seeds decide."""
    # A variant that leaves a field as it is stands for its default; where each names its own, none is mistaken.
    plain = any(not variant.recipe for variant in variants)
    fields = {name for variant in variants for name in variant.recipe if plain}
    options = {f"{_ASKED}{name}" for variant in variants for name in variant.asked}
    if "seed" in given:
        raise ConfigError("--seed: give --seeds N,N,... instead; every variant is trained with each of them")
    if both := sorted(f"--{name}" for name in given & fields) + sorted(options & {f"{_ASKED}{n}" for n in asked}):
        raise ConfigError(f"{both[0]}: the ablation of {kind} varies it; leave it out")


def _folder(out: Path, variant: Variant, seed: int) -> Path:
    return out / variant.name / f"seed-{seed}"


class Study:
    """An ablation.

    Args:
        kind: Key of :data:`KINDS`.
        recipe: TOML file, or the name of a shipped recipe.
        words: Overrides of the recipe and options of the benchmark, for all variants: ``["--stage2.lr=1e-3",
            "--eval.limit", "50"]``.
        options: The rest.

    Attributes:
        variants: What is compared.
        seeds: Seeds of the training.
        tasks: What each variant is asked, by its name.
        out: Folder of all runs.

    Raises:
        ConfigError: Something does not go together.
    """

    def __init__(self, kind: str, recipe: str, words: Sequence[str], options: Options) -> None:
        if launched() > 1:
            raise ConfigError("ablate runs in one process; variants are trained one after the other")
        given = override({}, words)
        asked = given.pop("eval", {})
        if not isinstance(asked, dict):
            raise ConfigError("--eval: name an option of the benchmark, such as --eval.limit 50")
        asked = {name.replace("-", "_"): value for name, value in asked.items()}
        self.kind, self.recipe, self.options = kind, recipe, options
        self.overrides = [f"--{name}={value}" for name, value in dotted(given).items()]
        self.base = Recipe.load(recipe, self.overrides)
        self.variants = choose_variants(kind, options.variants, self.base)
        _refuse_varied(kind, self.variants, set(dotted(given)), asked)
        self.out, self.seeds = options.out, tuple(map(int, options.seeds.split(",")))
        asked = {"data": self.base.data.root, **asked}
        if options.debug:
            self.out, self.seeds = Path(f"{self.out}-debug"), self.seeds[:1]
            training = _folder(self.out, self.variants[0], self.seeds[0]) / "training-debug"
            asked |= {"data": str(training / "made"), "split": "train"}
        self.shared = options.shared or self.out / "shared"
        self.tasks: dict[str, Task] = {}
        task = task_class(options.task)
        for variant in self.variants:
            try:
                self.tasks[variant.name] = task(**{**asked, **variant.asked})
            except ConfigError as error:
                is_option = str(error).partition(":")[0] in task.model_fields
                raise ConfigError(f"{_ASKED if is_option else '--eval: '}{error}") from None

    def check_files(self) -> None:
        """Check every variant's recipe and data, and the benchmark's, without loading anything heavy.

        Raises:
            RegionGPTError: Something is missing or does not go together.
        """
        from regiongpt.evaluate.runner import load_items

        if self.options.reuse is not None:
            _check_reuse(self.options.reuse, self.base)
        for variant in self.variants:
            config = self._load(variant, self.seeds[0])
            if not self.options.debug:
                config.check_files()
        for task in {} if self.options.debug else self.tasks.values():
            load_items(task)

    def run(self) -> dict[str, list[Any]]:
        """Train and ask whatever is still to be trained and asked.

        Returns:
            By variant, the scored task (:class:`regiongpt.evaluate.runs.TaskRun`) of every seed.

        Raises:
            RegionGPTError: As training and evaluation do.
        """
        from regiongpt.evaluate.session import Session
        from regiongpt.inference.engine import pick_device
        from regiongpt.train.start import check_start

        pick_device(self.options.device)
        if self.options.debug:
            with writing(self.out):
                shutil.rmtree(self.out, ignore_errors=True)
        configs = {(v.name, seed): self._config(v, seed) for v in self.variants for seed in self.seeds}
        for variant in self.variants:
            config = configs[variant.name, self.seeds[0]]
            if not (config.out / "start" / "config.json").exists():
                check_start(config)
        for variant in self.variants:
            for seed in self.seeds:
                self._note(_folder(self.out, variant, seed), configs[variant.name, seed])
        found: dict[str, list[Any]] = {variant.name: [] for variant in self.variants}
        # Seed by seed: an ablation that is ended early has all variants with fewer seeds.
        for seed in self.seeds:
            for variant in self.variants:
                log.info("%s, seed %d", variant.name, seed)
                # A variant that differs in the questions alone is asked of an earlier one's model.
                owner = next(
                    each
                    for each in self.variants
                    if (each.recipe, each.annotations) == (variant.recipe, variant.annotations)
                )
                model = self._train(configs[owner.name, seed])
                session = Session(
                    out=_folder(self.out, variant, seed) / "evaluation",
                    resamples=self.options.resamples,
                    towers=self.shared / "towers",
                    untrained=True,  # after a few steps of a trial it looks so
                    overwrite=True,  # of the same model, as the noted recipe has it; its answers are kept
                )
                found[variant.name] += session.score_model([self.tasks[variant.name]], model, self.options.device)
        return found

    def _load(self, variant: Variant, seed: int) -> Recipe:
        words = [*self.overrides, *(f"--{name}={value}" for name, value in variant.recipe.items())]
        return Recipe.load(
            self.recipe, [*words, f"--seed={seed}", f"--out={_folder(self.out, variant, seed) / 'training'}"]
        )

    def _config(self, variant: Variant, seed: int) -> Recipe:
        """The recipe of one variant with one seed, with its annotations and debug size."""
        config = self._load(variant, seed)
        if self.options.debug:
            from regiongpt.train.debug import debug_size

            config = debug_size(config, outlines=True)
        if not variant.annotations or config.data.on_records:
            return config
        whole = config.data.root
        folder = config.out.parent if self.options.debug else self.shared
        root = cut_annotations(Path(whole), config.data.split, variant.annotations, folder)
        # The features of a part are some of those of the whole, which other ablations have made, or will need.
        features = config.features.replace(root=config.features.root or whole)
        return config.replace(data=config.data.replace(root=str(root)), features=features)

    def _note(self, folder: Path, config: Recipe) -> None:
        """Raise ConfigError if the folder holds a run of another recipe, whose model would pass for this one's."""
        plain = config.model_dump(mode="json", exclude={"out"})
        if not config.data.on_records:  # of records their training keeps note
            plain["photographs"] = photographs(config.data.root, config.data.split)
        if self.options.reuse is not None:
            plain["reuse"] = str(self.options.reuse.resolve())
        there = _read_object(folder / RECIPE) if (folder / RECIPE).exists() else plain
        if there != plain:
            parts = [part for part in {**there, **plain} if plain.get(part) != there.get(part)]
            raise ConfigError(
                f"{folder}: holds a run of another recipe ({', '.join(parts)} differ); give another --out, or delete "
                "the folder"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECIPE, plain)

    def _train(self, config: Recipe) -> Path:
        """Train, taking what another run has made in the same way: language model, features, alignment."""
        from regiongpt.train.stages import cached_images, train

        if config.data.on_records:
            return train(config)
        kept, features = self._kept(config), self._features(config)
        # Another process with other seeds waits for what it would else make too, and trains beside this one then.
        with locked(self.shared, wait=True):
            for made, place in kept.items():
                if place.exists() and not made.exists():
                    _copy(place, made)
            link = config.out / "features"
            with writing(link):
                if not link.exists() and not link.is_symlink():
                    config.out.mkdir(parents=True, exist_ok=True)
                    features.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(os.path.relpath(features, config.out), target_is_directory=True)
            progress = features / "progress.json"
            ready = progress.exists() and _read_object(progress).get("done") == len(cached_images(config))
            if not ready or not all(place.exists() for made, place in kept.items() if made.name == "language"):
                model = train(config)
                _copy_all(kept)
                return model
        model = train(config)
        with locked(self.shared, wait=True):
            _copy_all(kept)
        return model

    def _kept(self, config: Recipe) -> dict[Path, Path]:
        """What a run makes that others can take, and where it is kept for them."""
        seen, kept = photographs(config.data.root, config.data.split), {}
        if not config.model.language:
            shape = config.model.model_dump(exclude=_NOT_OF_LANGUAGE)
            made = [shape, config.data.model_dump(), seen, config.language.model_dump(), config.seed]
            kept[config.out / "language"] = self.shared / f"language-{digest(made)}"
            if self.options.reuse is not None and shape == self.base.model.model_dump(exclude=_NOT_OF_LANGUAGE):
                kept[config.out / "language"] = self.options.reuse / "language"
        if config.runs("align"):
            # The words of questions and answers are not learnt there.
            data = config.data.model_dump(exclude={"suffixes"})
            parts = [config.model.model_dump(), data, seen, config.align.model_dump(), config.isolated_share]
            origin = [
                str(self._features(config).resolve()),
                str(self.options.reuse.resolve()) if self.options.reuse else "",
            ]
            name = digest([*parts, config.seed], config.features.model_dump(), origin)
            kept[config.out / "align" / "model"] = self.shared / f"align-{name}"
        return kept

    def _features(self, config: Recipe) -> Path:
        """In the earlier run, if it has made the features that this one needs, or among what is shared."""
        if self.options.reuse is not None and _seen(config) == _seen(self.base):
            return self.options.reuse / "features"
        return self.shared / f"features-{digest(_seen(config))}"


def _seen(config: Recipe) -> list[Any]:
    """What features depend on."""
    root = config.features.root or config.data.root
    features = {**config.features.model_dump(), "root": root, "photographs": photographs(root, config.data.split)}
    return [config.data.split, features, config.model.vision, config.model.image_size]


@cache
def photographs(root: str, split: str) -> dict[str, Any]:
    """What a folder of photographs holds: annotations by their content, images by their names and sizes in bytes.

    Args:
        root: The folder.
        split: Split of the annotations.

    Raises:
        DataError: It has no such annotations.
    """
    sources = photo_sources(Path(root), split)
    files = [path for source in sources for path in (source.instances, source.captions) if path is not None]
    images = [
        sorted((path.name, path.stat().st_size) for path in source.images.glob("*") if path.is_file())
        for source in sources
    ]
    return {"annotations": [file_identity(path) for path in files], "images": digest(images)}


def cut_annotations(root: Path, split: str, how: str, folder: Path) -> Path:
    """A folder laid out as ``root`` is, with fewer objects or images of one split; its images are links.

    Args:
        root: Folder with ``instances_<split>.json`` and ``images/``.
        split: The split to cut down; no other is there.
        how: ``"outlined"`` keeps the objects that have an outline; ``"25%"`` keeps that share of the images, drawn
            once, so that a larger share holds every smaller one.
        folder: Where the new folder is made.

    Returns:
        The new folder; one that was made before of the same files is used again.

    Raises:
        DataError: A file is missing or not in COCO's format, or nothing is left.
    """
    import numpy as np

    out = folder / f"annotations-{how.replace('%', '-percent')}"
    origin = {"of": [photographs(str(root), split)["annotations"], [str(s.images) for s in photo_sources(root, split)]]}
    if (out / "made.json").exists() and read_json(out / "made.json") == origin:
        return out
    shutil.rmtree(out, ignore_errors=True)
    left = 0
    with new_folder(out) as beside:
        for source in photo_sources(root, split):
            content = read_json(source.instances)
            try:
                images, objects = content["images"], content["annotations"]
                if how == "outlined":
                    objects = [each for each in objects if each.get("segmentation") and not each.get("iscrowd")]
                    there = {each["image_id"] for each in objects}
                else:
                    count = max(1, round(len(images) * int(how.removesuffix("%")) / 100))
                    order = np.random.default_rng(0).permutation(len(images))
                    there = {images[k]["id"] for k in order[:count]}
                    objects = [each for each in objects if each["image_id"] in there]
                images = [each for each in images if each["id"] in there]
                captions = read_json(source.captions) if source.captions is not None else None
                if captions is not None:
                    captions["annotations"] = [each for each in captions["annotations"] if each["image_id"] in there]
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{source.instances}: not in COCO's format ({error!r}); check the path") from None
            left += len(objects)
            write_json(beside / source.instances.name, {**content, "images": images, "annotations": objects})
            (beside / source.images.name).symlink_to(source.images.resolve(), target_is_directory=True)
            if source.captions is not None:
                write_json(beside / source.captions.name, captions)
        write_json(beside / "made.json", origin)
        if not left:
            raise DataError(f"{root}: nothing is left to train on after keeping {how}; give other annotations")
    return out


def _check_reuse(run: Path, config: Recipe) -> None:
    """Raise an error if an earlier run of ``regiongpt train`` lacks what an ablation takes from it."""
    if config.data.on_records or config.model.language:
        raise ConfigError("--reuse goes with a recipe that trains its own language model on photographs; leave it out")
    for name in ("language/config.json", "features/features.npy", "features/progress.json", "run.json"):
        if not (run / name).exists():
            raise DataError(f"--reuse: {run / name} is missing; give the folder of a finished `regiongpt train`")
    noted = _read_object(run / "run.json").get("config")
    if not isinstance(noted, dict):
        raise DataError(f"--reuse: {run / 'run.json'} does not hold the recipe of a run; give another folder")
    there, ours = Recipe(**noted).model, config.model
    names = ("hidden_size", "layers", "heads", "mlp_size", "image_marks")
    if wrong := [
        f"{n} {getattr(there, n)} for {getattr(ours, n)}" for n in names if getattr(there, n) != getattr(ours, n)
    ]:
        raise ConfigError(f"--reuse: {run / 'language'} is not the recipe's language model: {', '.join(wrong)}")


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object; delete the file")
    return value


def _copy_all(kept: Mapping[Path, Path]) -> None:
    for made, place in kept.items():
        if made.exists() and not place.exists():
            _copy(made, place)


def _copy(source: Path, target: Path) -> None:
    with new_folder(target) as beside:
        shutil.copytree(source, beside, dirs_exist_ok=True)

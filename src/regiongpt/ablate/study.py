"""Trains every variant with every seed, and asks each the same questions; what has been done is not done again.

OUT/VARIANT/seed-N/recipe.json   the recipe, resolved; another one is refused
OUT/VARIANT/seed-N/training/     the run of ``regiongpt train``
OUT/VARIANT/seed-N/evaluation/   the run of ``regiongpt evaluate``
OUT/shared/                      language models, features and the like of variants whose recipes agree in them
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from regiongpt.ablate.annotations import prepare
from regiongpt.ablate.variants import Variant, same_training
from regiongpt.data.coco import photo_sources
from regiongpt.data.shards import file_identity
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.runner import load_items
from regiongpt.evaluate.runs import TaskRun
from regiongpt.evaluate.session import Session
from regiongpt.evaluate.task import Task
from regiongpt.storage import digest, read_json, write_json
from regiongpt.train.recipe import Recipe

log = logging.getLogger(__name__)

RECIPE: Final = "recipe.json"
_NOT_OF_LANGUAGE: Final = (
    "init",
    "vision",
    "image_size",
    "refinement",
    "refinement_channels",
    "connector_size",
    "image_grid",
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """An ablation.

    Attributes:
        kind: Key of :data:`regiongpt.ablate.variants.KINDS`.
        recipe: TOML file.
        overrides: Of its fields, for all variants: ``["--stage2.lr=1e-3"]``.
        variants: At least two.
        seeds: Of the training; every variant is trained with each.
        tasks: By variant, what it is asked; the same items for all.
        out: Folder.
        device: That the trained models are asked on.
        resamples: Of the bootstrap.
        shared: Folder of what runs have in common, which several ablations may use; ``OUT/shared`` where None.
        reuse: An earlier run of ``regiongpt train``, whose language model, tower and features serve all runs whose
            recipe is of the same shape.
    """

    kind: str
    recipe: Path
    overrides: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    tasks: Mapping[str, Task]
    out: Path
    device: str | None
    resamples: int
    shared: Path | None = None
    reuse: Path | None = None

    def run(self) -> dict[str, list[TaskRun]]:
        """Trains and asks whatever is still to be trained and asked.

        Returns:
            By variant, the scored task of every seed.

        Raises:
            RegionGPTError: As training and evaluation do.
        """
        if self.reuse is not None:
            check_reuse(self.reuse, Recipe.load(self.recipe, self.overrides))
        configs = {(v.name, seed): self._config(v, seed) for v in self.variants for seed in self.seeds}
        self._check([configs[variant.name, self.seeds[0]] for variant in self.variants])
        for (name, seed), config in configs.items():
            self._note(name, seed, config)
        found: dict[str, list[TaskRun]] = {variant.name: [] for variant in self.variants}
        # Seed by seed: an ablation that is ended early has all variants with fewer seeds.
        for seed in self.seeds:
            for number, variant in enumerate(self.variants):
                log.info("%s, seed %d", variant.name, seed)
                model = self._model(number, seed, configs)
                session = Session(
                    out=self._folder(variant.name, seed) / "evaluation",
                    resamples=self.resamples,
                    towers=self._shared / "towers",
                    untrained=True,  # after a few steps of a trial it looks so
                    overwrite=True,  # of the same model, as the recipe noted has it; its answers are kept
                )
                found[variant.name] += session.score_model([self.tasks[variant.name]], model, self.device)
        return found

    def _check(self, configs: Sequence[Recipe]) -> None:
        """Raises, before the first variant is trained for hours, what would stop the last one or its questions."""
        from regiongpt.inference.engine import pick_device
        from regiongpt.train.start import check_start

        pick_device(self.device)
        for task in self.tasks.values():
            load_items(task)
        for config in configs:
            if not (config.out / "start" / "config.json").exists():
                check_start(config)

    @property
    def _shared(self) -> Path:
        return self.shared if self.shared is not None else self.out / "shared"

    def _folder(self, name: str, seed: int) -> Path:
        return self.out / name / f"seed-{seed}"

    def _config(self, variant: Variant, seed: int) -> Recipe:
        """The recipe of one variant with one seed, all of it checked."""
        words = [*self.overrides, *(f"--{name}={value}" for name, value in variant.recipe.items())]
        words += [f"--seed={seed}", f"--out={self._folder(variant.name, seed) / 'training'}"]
        config = Recipe.load(self.recipe, words)
        if not config.data.on_records and not config.data.root:
            raise ConfigError("data.root: expected the folder of the annotated photographs; give --data.root DIR")
        if variant.annotations:
            whole = config.data.root
            root = prepare(Path(whole), config.data.split, variant.annotations, self._shared)
            # The features of a part are some of those of the whole, which other ablations have made, or will need.
            config = config.replace(
                data=config.data.replace(root=str(root)),
                features=config.features.replace(root=config.features.root or whole),
            )
        return config

    def _note(self, name: str, seed: int, config: Recipe) -> None:
        """Raises ConfigError where the folder holds a run of another recipe, whose model would pass for this one's."""
        plain = config.model_dump(mode="json")
        del plain["out"]
        if not config.data.on_records:  # of records their training keeps note
            plain["photographs"] = photographs(config.data.root, config.data.split)
        if self.reuse is not None:
            plain["reuse"] = str(self.reuse.resolve())
        path = self._folder(name, seed) / RECIPE
        if path.exists() and read_json(path) != plain:
            there = read_json(path)
            parts = [part for part in {**there, **plain} if plain.get(part) != there.get(part)]
            raise ConfigError(
                f"{path.parent}: expected a run of the same recipe, found another ({', '.join(parts)} differ); give "
                "another --out, or delete the folder"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, plain)
        except OSError as error:
            raise DataError(f"{path.parent}: expected a folder to write to, got {error.strerror}") from None

    def _model(self, number: int, seed: int, configs: Mapping[tuple[str, int], Recipe]) -> Path:
        """The trained model of a variant: that of an earlier one where only the questions differ."""
        from transformers.utils import logging as transformers_logging

        from regiongpt.train.stages import train

        transformers_logging.disable_progress_bar()
        variant = self.variants[number]
        owner = next(each for each in self.variants if same_training(each, variant))
        config = configs[owner.name, seed]
        if config.data.on_records:
            return train(config)
        # Another process with other seeds waits for what it would else make too, and trains beside this one then.
        with self._alone():
            self._take(config)
            if not all(kept.exists() for made, kept in self._kept(config) if made.name != "model"):
                model = train(config)
                self._keep(config)
                return model
        model = train(config)
        with self._alone():
            self._keep(config)
        return model

    def _kept(self, config: Recipe) -> list[tuple[Path, Path]]:
        """What a run makes that others can take, and where it is kept for them."""
        training = config.out
        pairs = [(training / "start", self._tower(config))]
        if not config.model.language:
            pairs.append((training / "language", self._language(config)))
        if config.runs("align"):
            pairs.append((training / "align" / "model", self._align(config)))
        return pairs

    def _keep(self, config: Recipe) -> None:
        for made, kept in self._kept(config):
            if made.exists() and not kept.exists():
                _copy(made, kept)

    def _take(self, config: Recipe) -> None:
        """Gives a run what another has made in the same way: language model, features, start, alignment."""
        import torch
        from transformers import set_seed

        from regiongpt.train.stages import cached_images
        from regiongpt.train.start import create_start, measured_on

        training = config.out
        training.mkdir(parents=True, exist_ok=True)
        for made, kept in self._kept(config):
            if made.name != "start" and kept.exists() and not made.exists():
                _copy(kept, made)
        features = training / "features"
        if not features.exists() and not features.is_symlink():
            shared = self._features(config)
            shared.mkdir(parents=True, exist_ok=True)
            features.symlink_to(os.path.relpath(shared, training), target_is_directory=True)
        language = Path(config.model.language or training / "language")
        tower, start = self._tower(config), training / "start"
        if tower.exists() and (language / "config.json").exists() and not (start / "config.json").exists():
            rows = np.load(features / "features.npy", mmap_mode="r")
            measured = [torch.from_numpy(rows[k, 0].astype(np.float32)) for k in measured_on(range(len(rows)))]
            if len(rows) != len(cached_images(config)):
                raise DataError(
                    f"{features}: expected features of the {len(cached_images(config))} photographs, got {len(rows)}; "
                    "give another folder, or leave it out"
                )
            set_seed(config.seed)
            create_start(config.model, language, start, (), (tower, measured))

    def _alone(self) -> AbstractContextManager[None]:
        return _locked(self._shared / "lock")

    def _features(self, config: Recipe) -> Path:
        return self._of_tower(config, "features", "features")

    def _tower(self, config: Recipe) -> Path:
        return self._of_tower(config, "start", "tower")

    def _of_tower(self, config: Recipe, there: str, shared: str) -> Path:
        """In the earlier run, where it has made the features that this one needs, or among what is shared."""
        if self.reuse is not None and self._seen(config) == self._seen(self._base()):
            return self.reuse / there
        return self._shared / f"{shared}-{digest(self._seen(config))}"

    def _language(self, config: Recipe) -> Path:
        if self.reuse is not None and _shape(config) == _shape(self._base()):
            return self.reuse / "language"
        seen = photographs(config.data.root, config.data.split)
        made = [_shape(config), config.data.model_dump(), seen, config.language.model_dump(), config.seed]
        return self._shared / f"language-{digest(made)}"

    def _align(self, config: Recipe) -> Path:
        # The words of questions and answers are not learnt there.
        data = {name: value for name, value in config.data.model_dump().items() if name != "suffixes"}
        seen = photographs(config.data.root, config.data.split)
        parts = [config.model.model_dump(), data, seen, config.align.model_dump(), config.isolated_share, config.seed]
        origin = [str(self._features(config).resolve()), str(self.reuse.resolve()) if self.reuse else ""]
        return self._shared / f"align-{digest(parts, config.features.model_dump(), origin)}"

    def _base(self) -> Recipe:
        return Recipe.load(self.recipe, self.overrides)

    @staticmethod
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
        split: Of the annotations.

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


def check_reuse(run: Path, config: Recipe) -> None:
    """Holds an earlier run to what an ablation takes from it.

    Args:
        run: Folder of ``regiongpt train``.
        config: The recipe that all variants are varied from.

    Raises:
        ConfigError: The recipe trains on records, or its language model is of another shape.
        DataError: The run has not made all of it.
    """
    if config.data.on_records or config.model.language:
        raise ConfigError(
            "expected --reuse with a recipe that trains its own language model on photographs; leave it out"
        )
    for name in ("language/config.json", "start/config.json", "features/features.npy", "features/progress.json"):
        if not (run / name).exists():
            raise DataError(
                f"{run / name}: expected the folder of an earlier `regiongpt train` with its features, found none"
            )
    there, model = read_json(run / "language" / "config.json"), config.model
    wanted = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_size,
        "image_marks": model.image_marks,
    }
    there["image_marks"] = read_json(run / "start" / "config.json").get("image_marks", False)
    if wrong := [f"{name} {there.get(name)} for {value}" for name, value in wanted.items() if there.get(name) != value]:
        raise ConfigError(f"{run / 'language'}: expected the recipe's language model, got another: {', '.join(wrong)}")


def _shape(config: Recipe) -> dict[str, Any]:
    """What the shape of a language model depends on, and the form of what it reads."""
    return {name: value for name, value in config.model.model_dump().items() if name not in _NOT_OF_LANGUAGE}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file that one process holds at a time, where the system has such locks; its end lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:
            pass
        yield


def _copy(source: Path, target: Path) -> None:
    """Copies a folder; one that a kill cuts short does not count."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(target)

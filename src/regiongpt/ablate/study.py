"""Trains every variant with every seed, and asks each the same questions; what has been done is not done again.

OUT/VARIANT/seed-N/recipe.json   the recipe, resolved; another one is refused
OUT/VARIANT/seed-N/training/     the run of ``regiongpt train``
OUT/VARIANT/seed-N/evaluation/   the run of ``regiongpt evaluate``
OUT/shared/                      language models and features of variants whose recipes agree in them
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from regiongpt.ablate.annotations import prepare
from regiongpt.ablate.variants import Variant, same_training
from regiongpt.errors import ConfigError, DataError
from regiongpt.evaluate.runs import TaskRun, read_json, write_json
from regiongpt.evaluate.session import Session
from regiongpt.evaluate.store import digest
from regiongpt.evaluate.task import Task
from regiongpt.train.config import TrainConfig, load_config

log = logging.getLogger(__name__)

RECIPE: Final = "recipe.json"
_NOT_OF_LANGUAGE: Final = ("init", "vision", "image_size", "refinement", "refinement_channels", "connector_size", "image_grid")


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

    def run(self) -> dict[str, list[TaskRun]]:
        """Trains and asks whatever is still to be trained and asked.

        Returns:
            By variant, the scored task of every seed.

        Raises:
            RegionGPTError: As training and evaluation do.
        """
        configs = {(v.name, seed): self._config(v, seed) for v in self.variants for seed in self.seeds}
        for (name, seed), config in configs.items():
            self._note(name, seed, config)
        found: dict[str, list[TaskRun]] = {variant.name: [] for variant in self.variants}
        # Seed by seed: an ablation that is ended early has all variants with fewer seeds.
        for seed in self.seeds:
            for number, variant in enumerate(self.variants):
                log.info("%s, seed %d", variant.name, seed)
                model = self._model(number, seed, configs)
                session = Session(out=self._folder(variant.name, seed) / "evaluation", resamples=self.resamples)
                found[variant.name] += session.score_model([self.tasks[variant.name]], model, self.device)
        return found

    def _folder(self, name: str, seed: int) -> Path:
        return self.out / name / f"seed-{seed}"

    def _config(self, variant: Variant, seed: int) -> TrainConfig:
        """The recipe of one variant with one seed, all of it checked."""
        words = [*self.overrides, *(f"--{name}={value}" for name, value in variant.recipe.items())]
        words += [f"--seed={seed}", f"--out={self._folder(variant.name, seed) / 'training'}"]
        config = load_config(self.recipe, words)
        if not config.data.on_records and not config.data.root:
            raise ConfigError("data.root: expected the folder of the annotated photographs; give --data.root DIR")
        if variant.annotations:
            root = prepare(Path(config.data.root), config.data.split, variant.annotations, self.out / "shared")
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))
        return config

    def _note(self, name: str, seed: int, config: TrainConfig) -> None:
        """Raises ConfigError where the folder holds a run of another recipe, whose model would pass for this one's."""
        plain = json.loads(json.dumps(asdict(config)))
        del plain["out"]
        path = self._folder(name, seed) / RECIPE
        if path.exists() and read_json(path) != plain:
            there = read_json(path)
            parts = [part for part in plain if plain[part] != there.get(part)]
            raise ConfigError(
                f"{path.parent}: expected a run of the same recipe, found another ({', '.join(parts)} differ); give "
                "another --out, or delete the folder"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, plain)
        except OSError as error:
            raise DataError(f"{path.parent}: expected a folder to write to, got {error.strerror}") from None

    def _model(self, number: int, seed: int, configs: Mapping[tuple[str, int], TrainConfig]) -> Path:
        """The trained model of a variant: that of an earlier one where only the questions differ."""
        from transformers.utils import logging as transformers_logging

        from regiongpt.train.stages import train

        transformers_logging.disable_progress_bar()
        variant = self.variants[number]
        owner = next(each for each in self.variants if same_training(each, variant))
        config = configs[owner.name, seed]
        if not config.data.on_records:
            self._share(config)
        model = train(config)
        if not config.data.on_records:
            self._keep_language(config)
        return model

    def _share(self, config: TrainConfig) -> None:
        """Gives a run the language model and the features that another has made in the same way."""
        training = Path(config.out)
        training.mkdir(parents=True, exist_ok=True)
        language, kept = training / "language", self._language(config)
        if not config.model.language and not language.exists() and kept.exists():
            _copy(kept, language)
        features = training / "features"
        if not features.exists() and not features.is_symlink():
            data, model = config.data, config.model
            made = [data.root, data.split, asdict(config.features), config.seed, model.vision, model.image_size]
            shared = self.out / "shared" / f"features-{digest(made)}"
            shared.mkdir(parents=True, exist_ok=True)
            features.symlink_to(os.path.relpath(shared, training), target_is_directory=True)

    def _keep_language(self, config: TrainConfig) -> None:
        language, kept = Path(config.out) / "language", self._language(config)
        if language.exists() and not kept.exists():
            _copy(language, kept)

    def _language(self, config: TrainConfig) -> Path:
        shape = {name: value for name, value in asdict(config.model).items() if name not in _NOT_OF_LANGUAGE}
        made = [shape, asdict(config.data), asdict(config.language), config.seed]
        return self.out / "shared" / f"language-{digest(made)}"


def _copy(source: Path, target: Path) -> None:
    """Copies a folder; one that a kill cuts short does not count."""
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(target)

"""What ``--resume`` means for the folder of a run."""

import logging
from pathlib import Path

from regiongpt.errors import CheckpointError, ConfigError
from regiongpt.train.checkpoints import damage, set_aside
from regiongpt.train.processes import Processes
from regiongpt.train.recipe import STEPS, Recipe
from regiongpt.train.state import stage_of

log = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"


def prepare_resuming(config: Recipe) -> None:
    """Does what ``resume`` asks for, before anything of the run is looked at.

    ``auto`` leaves the folder as it is: finished steps are skipped, and a stage goes on from its newest whole
    checkpoint. ``never`` puts the results of the recipe's steps aside, under a name that begins with ``aside-``. A
    checkpoint's folder is held to be one that the run can go on from.

    Raises:
        CheckpointError: The checkpoint named is none, or is damaged.
        ConfigError: It belongs to a stage that the recipe does not run, or that is finished.
    """
    if config.resume == AUTO:
        return
    Processes().from_first(lambda: _begin_anew(config) if config.resume == NEVER else _check(config))


def resume_of(config: Recipe, stage: str) -> str:
    """``resume`` as it concerns one stage: a checkpoint of another stage is not its own."""
    if config.resume in (AUTO, NEVER):
        return AUTO
    return config.resume if stage_of(Path(config.resume)) == stage else AUTO


def _begin_anew(config: Recipe) -> None:
    names: list[str] = [step for step in STEPS if config.runs(step)]
    if "language" in names:
        names += ["language-checkpoints", "start"]
    for name in names:
        folder = config.out / name
        if (aside := set_aside(folder)) is not None:
            log.info("%s is now %s, and is made anew", folder, aside.name)


def _check(config: Recipe) -> None:
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"resume: expected auto, never or the folder of a checkpoint, got '{checkpoint}', where there is none"
        )
    if (fault := damage(checkpoint)) is not None:
        raise CheckpointError(f"{checkpoint}: {fault}; --resume auto takes the newest whole one")
    stage = stage_of(checkpoint)
    if not config.runs(stage):
        raise ConfigError(f"resume: {checkpoint} is of {stage}, which this recipe does not run")
    finished = config.out / stage / "model"
    if finished.exists():
        raise ConfigError(
            f"resume: {checkpoint} is of {stage}, which is finished: {finished}; move that folder away to go on from it"
        )

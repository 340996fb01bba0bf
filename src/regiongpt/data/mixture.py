"""Several folders of records as one list without an end, in an order that the seed and the epoch alone decide.

Nothing depends on what was drawn before: a run that resumes at step k sees what an uninterrupted one would.
Paper: §3.2, §4
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

from regiongpt.data.records import Record
from regiongpt.data.shards import Manifest, RecordSet, require_data_extra
from regiongpt.errors import ConfigError, DataError, naming
from regiongpt.settings import Settings, read_toml


class Part(Settings):
    """One folder of records in a mixture."""

    records: Annotated[str, Field(min_length=1)]
    """The folder, relative to the mixture's root."""
    images: str = ""
    """Folder of its images, relative to the mixture's root, where they have moved."""
    weight: PositiveFloat = 1.0
    """Passes over the records in one epoch: 1 for each record once, 0.5 for every other one, 2 for twice."""
    cap: NonNegativeInt = 0
    """Most records in one epoch, 0 for no limit. What one epoch leaves out comes first in the next."""


class MixtureConfig(Settings):
    """A mixture as its file has it."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    """Folders of records, each one once."""

    @field_validator("parts")
    @classmethod
    def _check_parts(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        names = [part.records for part in parts]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"'{repeated[0]}' comes more than once; give it a weight instead")
        return parts


def read_mixture(path: str | Path) -> MixtureConfig:
    """Read a mixture's TOML file; ConfigError if it cannot be used."""
    values = read_toml(Path(path))
    with naming(str(path)):
        return MixtureConfig(**values)


def find_parts(path: str | Path, root: str | Path = "") -> list[tuple[Path, Path | None, Part]]:
    """Folders of records, folders of images where given, and settings of a mixture's parts; no record is read.

    Args:
        path: A mixture's file, or one folder of records.
        root: Folder that the file's paths are relative to; by default the one that the file lies in.

    Raises:
        ConfigError: The file cannot be used, or a root is given with a folder of records.
        DataError: A part is not a folder of finished records.
    """
    require_data_extra()
    path = Path(path)
    if path.is_dir():
        Manifest.read(path)
        if root:
            raise ConfigError(f"root: {path} is one folder of records; leave it out")
        return [(path, None, Part(records=str(path)))]
    if not path.exists():
        raise DataError(f"{path}: no such folder of records or mixture file; make one with `regiongpt convert`")
    config = read_mixture(path)
    base = Path(root) if root else path.parent
    if not base.is_dir():
        raise DataError(f"{path}: expected its parts below the folder {base}, found none; check the root")
    for number, part in enumerate(config.parts, 1):
        with naming(f"{path}: parts[{number}]"):
            Manifest.read(base / part.records)
    return [(base / part.records, base / part.images if part.images else None, part) for part in config.parts]


def open_mixture(path: str | Path, root: str | Path = "", seed: int = 0) -> "Mixture":
    """Open the records of a mixture; the seed decides their order.

    Raises:
        ConfigError: As for :func:`find_parts`.
        DataError: Likewise; or a part's shards are damaged.
    """
    parts = find_parts(path, root)
    return Mixture(
        [MixturePart(RecordSet(folder, images), part.weight, part.cap) for folder, images, part in parts], seed
    )


class MixturePart:
    """The records of one part, and how many of them make an epoch by its weight and cap."""

    def __init__(self, records: RecordSet, weight: float = 1.0, cap: int = 0) -> None:
        self.records = records
        self.name = records.folder.name
        passes = max(1, round(weight * len(records)))
        self.per_epoch = min(passes, cap) if cap else passes

    def without_image(self) -> int:
        """How many of its records have no image."""
        import pyarrow.compute as pc

        return int(pc.sum(pc.equal(self.records.table.data.column("image"), "")).as_py() or 0)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One item of a mixture: a record of a part, by its place, and how often it has come before."""

    records: RecordSet
    index: int
    times: int

    def record(self) -> Record:
        """Read it."""
        return self.records[self.index]


class Mixture:
    """A list of records without an end, one epoch after the other, in a seeded order.

    A part goes through all its records before any comes again, also where a cap takes several epochs for one pass.
    """

    def __init__(self, parts: Sequence[MixturePart], seed: int) -> None:
        self.parts, self.seed = list(parts), seed
        self._starts = np.cumsum([0] + [part.per_epoch for part in self.parts])
        # An epoch of a part may end one pass and begin the next.
        self._shuffled = lru_cache(maxsize=2 + 2 * len(self.parts))(self._shuffle)

    def __len__(self) -> int:
        """Records in one epoch."""
        return int(self._starts[-1])

    def draw(self, item: int) -> Drawn:
        """The record at one place: places from ``epoch * len(self)`` on are those of that epoch."""
        epoch, place = divmod(item, len(self))
        slot = int(self._shuffled(len(self), 31, epoch)[place])
        number = int(np.searchsorted(self._starts, slot, side="right")) - 1
        part = self.parts[number]
        times, offset = divmod(epoch * part.per_epoch + slot - int(self._starts[number]), len(part.records))
        index = int(self._shuffled(len(part.records), 37, number, times)[offset])
        return Drawn(records=part.records, index=index, times=times)

    def _shuffle(self, count: int, *key: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, *key)).permutation(count)

    def identity(self) -> dict[str, Any]:
        """What decides the order and the records, wherever the folders lie."""
        parts = [(part.per_epoch, part.records.manifest.shards) for part in self.parts]
        listed = [{"records_per_epoch": n, "shards": [shard["sha256"] for shard in shards]} for n, shards in parts]
        return {"seed": self.seed, "parts": listed}

    def report(self) -> str:
        """One line: what an epoch holds."""
        listed = ", ".join(f"{part.name} {part.per_epoch:,} of {len(part.records):,}" for part in self.parts)
        return f"{len(self):,} records an epoch: {listed}"

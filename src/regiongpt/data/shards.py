"""Records on disk: Parquet shards, ``rejects.jsonl``, and ``manifest.json`` last; and mixtures of such folders.

A folder without a manifest is not read: a kill at any moment leaves nothing half-written. Paper: §3.2, §4 (mixtures)
"""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator
from typing_extensions import TypedDict

from regiongpt.data.records import SCHEMA_VERSION, Record
from regiongpt.errors import ConfigError, DataError, RegionError, RegionGPTError, naming
from regiongpt.prompts import replace_placeholders
from regiongpt.settings import Settings, read_toml
from regiongpt.storage import is_below, read_json, reason, sha256, write_json, writing

MANIFEST: Final = "manifest.json"
REJECTS: Final = "rejects.jsonl"
CROWD: Final = "crowd"
"""Kind of the entries that are skipped on purpose: a group annotated as one object. It does not end a strict run."""
RECORDS_PER_SHARD: Final = 20_000
_BATCH: Final = 1000  # records of a row group, and in memory


def schema() -> Any:
    """The Arrow schema of a record; its metadata carries the version."""
    import pyarrow as pa

    def struct(names: str, **others: Any) -> Any:
        return pa.struct([(name, others.get(name, pa.string())) for name in names.split()])

    whole, rows = pa.int32(), pa.list_(pa.list_(pa.float64()))
    region = struct("kind coordinates size counts category source_id", coordinates=rows, size=pa.list_(whole))
    turn = struct(
        "task question answer regions expression category label_set guided", regions=pa.list_(whole), guided=pa.bool_()
    )
    lists = {"regions": pa.list_(region), "turns": pa.list_(turn)}
    record = struct("id source task image width height regions turns", width=whole, height=whole, **lists)
    return pa.schema(list(record), metadata={"regiongpt_schema_version": str(SCHEMA_VERSION)})


class Fault(DataError):
    """Why a record cannot be used: its kind, such as ``"box without size"``, and what was expected and what came."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def fault_of(error: RegionGPTError) -> Fault:
    """An error about a record as its fault."""
    if isinstance(error, Fault):
        return error
    kind = "region that makes no sense" if isinstance(error, RegionError) else "record without a lesson"
    return Fault(kind, str(error))


class Rejects:
    """Entries that a conversion could not use, counted by kind; ``strict`` fails at the first."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.counts: Counter[str] = Counter()
        self.last = ""  # reason
        self._file: Any = None

    @contextmanager
    def writing_to(self, path: Path) -> Iterator[None]:
        """Inside the block, each addition becomes a line of JSON in a file: its kind, file, record and reason."""
        with path.open("w", encoding="utf-8", errors="backslashreplace") as self._file:
            yield
        self._file = None

    def add(self, kind: str, file: str | Path, record: object, reason: str) -> None:
        """Count a record, known by its id or place in the file, that is left out; DataError in strict mode."""
        name = Path(file).name
        if self.strict and kind != CROWD:
            raise DataError(f"{name}, record {record}: {kind}: {reason}")
        self.counts[kind] += 1
        self.last = reason
        if self._file is not None:
            line = {"kind": kind, "file": name, "record": str(record), "reason": reason}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    @contextmanager
    def noting(self, file: str | Path, record: object) -> Iterator[None]:
        """Count a :class:`Fault` or a wrong region inside the block, and continue after it."""
        try:
            yield
        except (Fault, RegionError) as error:
            self.add(fault_of(error).kind, file, record, str(error))

    def listed(self) -> str:
        """How many of each kind: ``"1 crowd, 2 box without size"``."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))

    def summary(self) -> str:
        """One line: how many were left out, by kind."""
        return f"{self.counts.total()} left out: {self.listed()}" if self.counts else "nothing left out"


class Shard(TypedDict):
    """One shard, with the hash of its bytes."""

    file: str
    records: int
    sha256: str


class Manifest(Settings):
    """Manifest of a folder of records; see docs/data.md."""

    schema_version: int
    source: str
    arguments: dict[str, Any]
    inputs: list[dict[str, Any]]
    images: str
    counts: dict[str, int]
    rejects: dict[str, int]
    shards: list[Shard]
    regiongpt_version: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a folder; DataError if no conversion ended there, or one of another schema."""
        path = Path(folder) / MANIFEST
        if not path.exists():
            raise DataError(f"{folder}: no finished records: no {MANIFEST}; run `regiongpt convert` again")
        values = read_json(path)
        try:
            manifest = cls(**values if isinstance(values, dict) else {"": values})
        except ConfigError as error:
            raise DataError(f"{path}: not a manifest of records: {error}; convert the source again") from None
        if manifest.schema_version != SCHEMA_VERSION:
            got = f"expected schema version {SCHEMA_VERSION}, got {manifest.schema_version}"
            raise DataError(f"{path}: {got}; convert the source again with this version")
        return manifest


def file_identity(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a file; DataError if it cannot be read."""
    try:
        return {"name": Path(path).name, "bytes": Path(path).stat().st_size, "sha256": sha256(path)}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}; check the path") from None


def usable(records: Iterable[Record], rejects: Rejects, source: str, check_regions: bool = True) -> Iterator[Record]:
    """The records that a model can learn from, each id once; the others are noted."""
    seen: set[str] = set()
    for record in records:
        try:
            record.check(regions=check_regions)
            if record.id in seen:
                raise Fault("duplicate id", "expected each id once")
        except RegionGPTError as error:
            rejects.add(fault_of(error).kind, source, record.id, str(error))
            continue
        seen.add(record.id)
        yield record


def write_records(
    out: Path, records: Iterable[Record], rejects: Rejects, *, source: str, images: str, inputs: Sequence[Path],
    arguments: Mapping[str, Any], records_per_shard: int = RECORDS_PER_SHARD, check_regions: bool = True,
) -> Manifest:  # fmt: skip
    """Write records to a folder, all of them or none; the same records give byte-identical shards.

    A record that no model could learn from is left out and counted, also in ``rejects.jsonl``. Records that the folder
    holds are replaced when the new ones are whole. Source, images' folder, inputs and arguments go to the manifest.
    DataError where the disk is full or the folder not writable, or in strict mode a record is wrong.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    seen_images: set[str] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for record in usable(records, rejects, source, check_regions):
            seen_images.update([record.image] if record.image else [])
            counts.update(records=1, regions=len(record.regions), turns=len(record.turns))
            counts.update(f"task:{turn.task}" for turn in record.turns)
            yield record.row()

    shards: list[Shard] = []
    with writing(out), _filling(Path(out)) as folder, rejects.writing_to(folder / REJECTS):
        rest = rows()
        while batch := list(islice(rest, min(_BATCH, records_per_shard))):
            path, written = folder / f"records-{len(shards):05d}.parquet", 0
            with pq.ParquetWriter(path, schema(), compression="zstd") as writer:
                while batch:
                    writer.write_table(pa.Table.from_pylist(batch, schema=schema()))
                    written += len(batch)
                    batch = list(islice(rest, min(_BATCH, records_per_shard - written)))
            shards.append({"file": path.name, "records": written, "sha256": sha256(path)})
        counts["images"] = len(seen_images)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION, source=source, arguments=dict(arguments), images=images, shards=shards,
            inputs=[file_identity(path) for path in inputs], counts=dict(sorted(counts.items())),
            rejects=dict(sorted(rejects.counts.items())), regiongpt_version=version("regiongpt"),
        )  # fmt: skip
        write_json(folder / MANIFEST, manifest.model_dump())
    return manifest


@contextmanager
def _filling(out: Path) -> Iterator[Path]:
    """A folder inside ``out`` whose files replace the records there when the block ends, and vanish when it fails."""
    new = not out.exists()
    unfinished = out / f".unfinished-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".unfinished-*"):  # left by a killed run
            shutil.rmtree(left)
        unfinished.mkdir()
        yield unfinished
        shutil.rmtree(out / ".arrow", ignore_errors=True)  # what RecordSet has made of the old ones
        for old in [out / MANIFEST, *out.glob("records-*")]:
            old.unlink(missing_ok=True)
        for file in sorted(unfinished.iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(out / file.name)
    except BaseException:
        shutil.rmtree(out if new else unfinished, ignore_errors=True)
        raise
    unfinished.rmdir()


class RecordSet:
    """A folder of records, written by `regiongpt convert`, as an indexable list that is mapped into memory.

    ``images`` is the images' folder where it is not the one that the manifest names. DataError where ``folder`` holds
    no finished conversion, or a shard is missing or broken.
    """

    def __init__(self, folder: str | Path, images: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.images = self.folder / self.manifest.images if images is None else Path(images)
        files = [str(self.folder / shard["file"]) for shard in self.manifest.shards]
        if not files:
            raise DataError(f"{self.folder}: no records: the conversion rejected everything; see its {REJECTS}")
        from datasets import Dataset, disable_progress_bars
        from datasets.exceptions import DatasetsError

        disable_progress_bars()
        cache = self.folder / ".arrow"
        try:
            self.table: Any = Dataset.from_parquet(files, cache_dir=str(cache))
        except (OSError, ValueError, DatasetsError) as error:
            told = f"its shards cannot be read or copied to {cache}: {reason(error)}"
            raise DataError(f"{self.folder}: {told}; convert the source again, or free some space") from error

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        return Record.from_row(self.table[index])

    def __iter__(self) -> Iterator[Record]:
        return map(Record.from_row, self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in order, read in batches: many times as fast as one by one."""
        for table in self.table.with_format("arrow").iter(batch_size=500):
            yield from table.to_pylist()

    def image_path(self, record: Record) -> Path | None:
        """Path of the record's image, None without one; DataError for a path that leaves the images' folder."""
        if not is_below(record.image):
            raise DataError(f"{self.folder}: record {record.id}: {record.image!a} is outside the image folder")
        return self.images / record.image if record.image else None


def require_data_extra() -> None:
    """Raise ConfigError unless the libraries that read and write records are installed."""
    from importlib.util import find_spec

    if missing := [name for name in ("pyarrow", "datasets") if find_spec(name) is None]:
        raise ConfigError(f"reading and writing records needs {', '.join(missing)}; pip install '.[data]'")


def many(count: int, noun: str) -> str:
    """A number with its noun: ``1 record``, ``2,000 records``, ``3 classes``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith(("s", "x")) else "s")


def counted(kinds: Mapping[str, int]) -> list[str]:
    """A line for each kind, the most frequent first."""
    width = max((len(f"{count:,}") for count in kinds.values()), default=0)
    return [f"  {count:>{width},}  {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])]


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures: several folders as one list without an end. Nothing depends on what was drawn before, so a run that resumes
# at step k sees what an uninterrupted one would.


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
            raise ValueError(f"'{repeated[0]}' is listed more than once; give it a weight instead")
        return parts


def find_parts(path: str | Path, root: str | Path = "") -> list[tuple[Path, Path | None, Part]]:
    """Folders of records, folders of images where given, and settings of a mixture's parts; no record is read.

    ``path`` is a mixture's file, whose paths are relative to ``root`` (by default its folder), or a folder of records.
    RegionGPTError where the file cannot be used, or a part is not a folder of finished records.
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
    base, values, found = Path(root) if root else path.parent, read_toml(path), []
    with naming(str(path)):
        for part in MixtureConfig(**values).parts:
            Manifest.read(base / part.records)
            found.append((base / part.records, base / part.images if part.images else None, part))
    return found


def open_mixture(path: str | Path, root: str | Path = "", seed: int = 0) -> "Mixture":
    """Open the records of a mixture, see :func:`find_parts`; the seed determines their order."""
    parts = find_parts(path, root)
    opened = [MixturePart(RecordSet(folder, images), part.weight, part.cap) for folder, images, part in parts]
    return Mixture(opened, seed)


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
        """Identity of the order and records, independent of the folders' location."""
        parts = [(part.per_epoch, part.records.manifest.shards) for part in self.parts]
        listed = [{"records_per_epoch": n, "shards": [shard["sha256"] for shard in shards]} for n, shards in parts]
        return {"seed": self.seed, "parts": listed}

    def report(self) -> str:
        """One line: what an epoch holds."""
        listed = ", ".join(f"{part.name} {part.per_epoch:,} of {len(part.records):,}" for part in self.parts)
        return f"{len(self):,} records an epoch: {listed}"


# -- Layouts of other trainers -----------------------------------------------------------------------------------------


def read_records(folder: Path) -> Iterator[Record]:
    """The records of a folder one by one, without the copy that a RecordSet maps."""
    import pyarrow.parquet as pq

    for file in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(1000):
            yield from map(Record.from_row, batch.to_pylist())


def write_llava(records: Iterable[Record], path: str | Path) -> None:
    """Write records as JSON lines of ``{id, image, conversations}``, as LLaVA's training reads them.

    A region becomes a box written out in its question, in fractions of the image's sides. DataError if the file cannot
    be written.
    """

    def lines() -> Iterator[str]:
        for index, record in enumerate(records):
            sides = 2 * (record.width, record.height)
            boxes = []
            for each in record.regions:
                corners = zip(each.region.bounds(*sides[:2]), sides, strict=True)
                boxes.append(f"region [{', '.join(f'{value / side:.3f}' for value, side in corners)}]")
            said = []
            for message in record.messages(0, 0, index):
                text = replace_placeholders(message["content"], ["", *boxes].__getitem__)
                said.append({"from": "human" if message["role"] == "user" else "gpt", "value": text})
            yield json.dumps({"id": record.id, "image": record.image, "conversations": said}, ensure_ascii=False) + "\n"

    with writing(path), Path(path).open("w", encoding="utf-8") as file:
        file.writelines(lines())


def write_webdataset(records: Iterable[Record], images: Path, folder: Path) -> None:
    """Write records with their images as tar files of a thousand samples: an image and the record's row as JSON."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        rest = iter(records)
        for number in count():
            if not (some := list(islice(rest, 1000))):
                return
            with tarfile.open(folder / f"records-{number:05d}.tar", "w") as tar:
                for record in some:
                    path, row = images / record.image, json.dumps(record.row(), ensure_ascii=False).encode()
                    for suffix, data in ((path.suffix.lower() or ".jpg", path.read_bytes()), (".json", row)):
                        member = tarfile.TarInfo(record.id.replace("/", "-").replace(".", "-") + suffix)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))

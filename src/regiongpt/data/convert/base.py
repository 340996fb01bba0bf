"""What every converter is: a frozen dataclass whose fields are the command's options, and a stream of records."""

import dataclasses
import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from regiongpt.data.records import Record
from regiongpt.data.shards import MANIFEST, REJECTS, Manifest, Rejects, file_identity, require_data_extra, write_records
from regiongpt.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def option(help: str, **given: Any) -> Any:
    """A field of a converter: its help on the command line, and ``default=`` unless it is required."""
    return dataclasses.field(metadata={"help": help}, **given)


@dataclass(frozen=True, kw_only=True)
class Converter(ABC):
    """One data set's files as records.

    A subclass adds its files and options as fields made by :func:`option`, of the types ``Path``, ``Path | None``,
    ``tuple[Path, ...]``, ``int``, ``float``, ``str`` or ``bool``; an option of 0 or ``""`` is off.

    Attributes:
        images: Folder that image paths are relative to.
        seed: Of every random choice.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    sound_regions: ClassVar[bool] = False
    """Whether each region of a record has been held against its image already."""

    images: Path = option("folder of the images")
    seed: int = option("of every random choice", default=0)

    @abstractmethod
    def inputs(self) -> list[Path]:
        """The files that are read, for the manifest; images are not among them."""

    @abstractmethod
    def records(self, rejects: Rejects) -> Iterator[Record]:
        """The records in an order that the files and the options alone decide; what cannot be used goes to ``rejects``.

        Raises:
            DataError: A whole file is missing, truncated or of another format, or files do not belong together.
        """

    def arguments(self) -> dict[str, Any]:
        """The options as the manifest states them; of paths the last part alone, so that a moved folder is the same."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _stated(value) for name, value in values.items()}


def convert(
    converter: Converter,
    out: Path,
    strict: bool = False,
    overwrite: bool = False,
    watch: Callable[[Iterator[Record]], Iterator[Record]] = iter,
) -> Manifest:
    """Converts one source into a folder of records; does nothing where that has been done before.

    Args:
        converter: The source and its options.
        out: The folder.
        strict: Fail at the first record that cannot be used.
        overwrite: Replace records of another source or of other options.
        watch: Passes the records on one by one, to show how far the work is.

    Raises:
        ConfigError: The folder holds other records, or the libraries are missing.
        DataError: A file cannot be used; in strict mode, a record; the disk is full.
    """
    require_data_extra()
    out = Path(out)
    if not converter.images.is_dir():
        raise DataError(f"images: expected a folder at {converter.images}, found none; check the path")
    if (out / MANIFEST).exists() and not overwrite:
        there = Manifest.read(out)
        same = (there.source, there.arguments) == (converter.name, converter.arguments())
        if same and there.inputs == [file_identity(path) for path in converter.inputs()]:
            log.info("%s: already converted, nothing to do", out)
            return there
        raise ConfigError(
            f"{out}: expected an empty folder or records of the same source and options, found those of "
            f"'{there.source}' with {there.arguments}; give another --out, or --overwrite"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        rejects = Rejects(out / REJECTS, strict)
    except OSError as error:
        raise DataError(f"{out}: expected a folder to write to, got {error.strerror}; give another --out") from error
    try:
        with _without_collections():
            return write_records(
                out,
                watch(converter.records(rejects)),
                rejects,
                source=converter.name,
                images=str(converter.images.resolve()),
                inputs=converter.inputs(),
                arguments=converter.arguments(),
                check_regions=not converter.sound_regions,
            )
    finally:
        rejects.close()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Never looks for cycles of garbage: millions of parsed values hold none, and looking took a tenth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _stated(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    return [_stated(each) for each in value] if isinstance(value, tuple) else value

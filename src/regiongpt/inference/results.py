"""The answers about one image or many in a file: json lines, csv or COCO."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regiongpt.errors import ConfigError
from regiongpt.regions import Region
from regiongpt.storage import check_writable, write_file, write_json, writing

SUFFIXES = (".jsonl", ".csv", ".json")


class Results:
    """Writes one record an image.

    ``.jsonl`` holds each record from the moment it is added, so a run that is killed leaves those before. ``.csv``, a
    row a region, and ``.json``, a COCO data set, are written whole by :meth:`close`.

    Args:
        path: the file; its suffix is the format.
        overwrite: replace a file that is there.
        categories: names that regions may have in the COCO data set.

    Raises:
        ConfigError: the suffix is another, the file is there, or its folder is missing or not writable.
    """

    def __init__(self, path: Path, overwrite: bool = False, categories: Sequence[str] = ()) -> None:
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{path}: end the name in .jsonl (json lines), .csv or .json (COCO)")
        check_writable(path)
        if path.exists() and not overwrite:
            raise ConfigError(f"{path}: there already; give --overwrite to replace it, or another name")
        self.path, self.suffix = path, path.suffix.lower()
        self._categories = {name: number for number, name in enumerate(categories or ["region"], 1)}
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._file: Any = None

    def add(
        self, record: dict[str, Any], size: tuple[int, int], regions: Sequence[Region], notes: Sequence[dict[str, Any]]
    ) -> None:
        """Add the answers about an image.

        Args:
            record: what is said of the image, plain values; its ``image`` is the path.
            size: width and height of the image in pixels.
            regions: those asked about.
            notes: of each region, further keys of its COCO annotation; ``category`` is one of the categories.

        Raises:
            DataError: the file cannot be written.
        """
        if self.suffix == ".jsonl":
            with writing(self.path):
                self._file = self._file or self.path.open("w", encoding="utf-8", errors="backslashreplace")
                self._file.write(as_json(record) + "\n")
                self._file.flush()
        elif self.suffix == ".csv":
            self._rows += rows(record)
        else:
            image = {"id": len(self._images) + 1, "file_name": record["image"], "width": size[0], "height": size[1]}
            self._images.append(image)
            for region, note in zip(regions, notes, strict=True):
                given = {"category": "region", **note}
                head = {"id": len(self._annotations) + 1, "image_id": image["id"], "iscrowd": 0}
                head["category_id"] = self._categories[given.pop("category")]
                self._annotations.append({**head, **region.to_coco(*size), **given})

    def close(self) -> None:
        """Write what is not yet in the file.

        Raises:
            DataError: the file cannot be written.
        """
        if self.suffix == ".jsonl":
            with writing(self.path):
                (self._file or self.path.open("w", encoding="utf-8")).close()
        elif self.suffix == ".csv":
            text = io.StringIO()
            table = csv.DictWriter(text, list(dict.fromkeys(key for row in self._rows for key in row)))
            table.writeheader()
            table.writerows(self._rows)
            write_file(self.path, text.getvalue())
        elif self.suffix == ".json":
            places = [str(Path(image["file_name"]).absolute().parent) for image in self._images]
            folder = os.path.commonpath(places or ["."])
            for image in self._images:
                image["file_name"] = Path(os.path.relpath(image["file_name"], folder)).as_posix()
            categories = [{"id": number, "name": name} for name, number in self._categories.items()]
            found = {"images": self._images, "annotations": self._annotations, "categories": categories}
            write_json(self.path, found, indent=None)


def as_json(record: Any, indent: int | None = None) -> str:
    """Plain values as JSON, on one line or indented."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False, indent=indent)


def rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record as rows of a table, one a region where each region has an answer of its own; lists become JSON."""
    own = [entry for entry in record["regions"] if "region" in entry]
    for each in [{"number": number, **entry} for number, entry in enumerate(own, 1)] or [
        {"regions": record["regions"]}
    ]:
        row: dict[str, Any] = {}
        for key, value in record.items():
            row |= each if key == "regions" else {key: value}
        yield {key: as_json(value) if isinstance(value, list | dict) else value for key, value in row.items()}

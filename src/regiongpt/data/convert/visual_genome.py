"""Visual Genome: short captions of regions, as one dialogue an image; names of objects and relations where wanted.

``region_descriptions.json`` is read image by image and never held. ``objects.json`` and ``relationships.json`` come in
the same order in the release, but nothing says so: what they hold waits in a temporary file until its image comes.

Paper: §3.2 (up to 10 boxes an image, sampled into a dialogue).
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
from pydantic import NonNegativeInt

from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.images import check_image
from regiongpt.data.convert.jsonstream import iter_array
from regiongpt.data.convert.values import (
    APART,
    MALFORMED,
    Corners,
    clipped_box,
    image_name,
    is_whole,
    plain_text,
    short,
    sides,
)
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Fault, Rejects
from regiongpt.errors import DataError
from regiongpt.prompts import region_answer
from regiongpt.regions import Region

_TABLES: Final = ("objects", "relationships")


class _Image(NamedTuple):
    path: str
    width: int
    height: int


class _Part(NamedTuple):
    """A box with its id in the source behind a letter for its kind: regions and objects are numbered apart."""

    key: str
    box: Corners
    name: str


class _Topic(NamedTuple):
    """What can be said of one box, or of two."""

    task: str
    parts: tuple[_Part, ...]
    answer: str


class VisualGenomeConverter(Converter):
    """Region descriptions of Visual Genome, each image's sample as one dialogue.

    Each turn asks for the short caption of a box. With ``objects``, the name of an object in a box is a topic too
    (``classify`` without a closed set: the names are free); with ``relationships``, how two objects relate, answered as
    ``Region [1] on Region [2]``. The topics of an image are drawn evenly until its boxes are used up.
    """

    name: ClassVar[str] = "vg"
    summary: ClassVar[str] = "Visual Genome: short captions of regions, object names and relations"

    regions: Path
    """region_descriptions.json."""
    image_data: Path
    """image_data.json, the images' sizes and folders."""
    objects: Path | None = None
    """objects.json, to ask for names of objects too."""
    relationships: Path | None = None
    """relationships.json, to ask how objects relate too."""
    boxes_per_image: NonNegativeInt = 10
    """Most boxes in the dialogue of an image, drawn by the seed; 0 for all."""
    check_images: bool = True
    """Leave out images that are missing or of another size."""

    def inputs(self) -> list[Path]:
        """The files that are given."""
        return [path for path in (self.regions, self.image_data, self.objects, self.relationships) if path is not None]

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """One dialogue an image, in the order of ``region_descriptions.json``."""
        images = self._images(rejects)
        try:
            # A database of no name is a temporary file that goes with its connection.
            with closing(sqlite3.connect("")) as store:
                for table in _TABLES:
                    store.execute(f"CREATE TABLE {table} (image INTEGER PRIMARY KEY, content TEXT)")
                    self._keep(table, images, store, rejects)
                yield from self._dialogues(images, store, rejects)
        except sqlite3.Error as error:
            raise DataError(
                f"expected room for a temporary file beside {self.regions.name}, got {error}; "
                "free some space, or point TMPDIR to a larger disk"
            ) from error

    def _images(self, rejects: Rejects) -> dict[int, _Image]:
        images: dict[int, _Image] = {}
        for place, entry in enumerate(iter_array(self.image_data, None, rejects)):
            with rejects.noting(self.image_data, place):
                number, size = _image_id(entry), sides(entry)
                # The release lies in the two folders that its addresses end in: .../VG_100K_2/1.jpg
                path = image_name("/".join(str(entry.get("url", "")).split("/")[-2:]))
                if number in images:
                    raise Fault("duplicate id", f"expected each image once, got {number} again")
                images[number] = _Image(path, *size)
        return images

    def _keep(self, table: str, images: dict[int, _Image], store: sqlite3.Connection, rejects: Rejects) -> None:
        """Puts aside what one of the two further files says of each image."""
        path: Path | None = getattr(self, table)
        if path is None:
            return
        for place, entry in enumerate(iter_array(path, None, rejects)):
            with rejects.noting(path, place):
                number, content = _image_id(entry), entry.get(table)
                if not isinstance(content, list):
                    raise Fault(MALFORMED, f"expected a list {table!r}, got {short(entry)}")
                if number not in images:
                    raise Fault(APART, f"expected an image of {self.image_data.name}, got {number}")
                row = (number, json.dumps(content, separators=(",", ":")))
                if store.execute(f"INSERT OR IGNORE INTO {table} VALUES (?, ?)", row).rowcount == 0:
                    raise Fault("duplicate id", f"expected each image once, got {number} again")

    def _dialogues(self, images: dict[int, _Image], store: sqlite3.Connection, rejects: Rejects) -> Iterator[Record]:
        seen: set[int] = set()
        apart = 0
        for place, entry in enumerate(iter_array(self.regions, None, rejects)):
            with rejects.noting(self.regions, place):
                number, described = _image_id(entry), entry.get("regions")
                if not isinstance(described, list):
                    raise Fault(MALFORMED, f"expected a list 'regions', got {short(entry)}")
                if number not in images:
                    apart += 1
                    found = f"got {number}, with {len(described)} regions"
                    raise Fault(APART, f"expected an image of {self.image_data.name}, {found}")
                if number in seen:
                    raise Fault("duplicate id", f"expected each image once, got {number} again")
                seen.add(number)
                image = images[number]
                if self.check_images:
                    check_image(self.images / image.path, image.width, image.height)
                topics = self._captions(number, image, described, rejects)
                objects = self._objects(number, image, store, rejects)
                topics += [_Topic("classify", (part,), part.name) for part in objects.values()]
                topics += self._relations(number, image, objects, store, rejects)
                if topics:
                    yield self._dialogue(number, image, topics)
        if apart and not seen:
            raise DataError(
                f"{self.regions}: expected images of {self.image_data}, but it has none of the {apart} that are "
                "described; give two files of one release"
            )

    def _captions(self, number: int, image: _Image, described: list[Any], rejects: Rejects) -> list[_Topic]:
        topics: dict[str, _Topic] = {}
        for place, entry in enumerate(described):
            try:  # and not rejects.noting: there are millions
                if not isinstance(entry, dict):
                    raise Fault(MALFORMED, f"expected a region, got {short(entry)}")
                key = entry.get("region_id", entry.get("id"))
                if not is_whole(key):
                    raise Fault(MALFORMED, f"expected region_id as a whole number, got {short(key)}")
                if entry.get("image_id", number) != number:
                    raise Fault(APART, f"expected a region of image {number}, got one of {short(entry['image_id'])}")
                if (name := f"r{key}") in topics:
                    raise Fault("duplicate id", f"expected each region once, got {key} again")
                part = _Part(name, _box(entry, ("width", "height"), image), "")
                topics[name] = _Topic("caption", (part,), plain_text(entry.get("phrase"), "expression"))
            except Fault as fault:
                rejects.add(fault.kind, self.regions, f"{number}[{place}]", fault.reason)
        return list(topics.values())

    def _objects(self, number: int, image: _Image, store: sqlite3.Connection, rejects: Rejects) -> dict[str, _Part]:
        found: dict[str, _Part] = {}
        for place, entry in enumerate(_kept(store, "objects", number)):
            with rejects.noting(self.objects or "", f"{number}[{place}]"):
                part = _object(entry, image)
                if part.key in found:
                    raise Fault("duplicate id", f"expected each object once, got {part.key[1:]} again")
                found[part.key] = part
        return found

    def _relations(
        self, number: int, image: _Image, objects: dict[str, _Part], store: sqlite3.Connection, rejects: Rejects
    ) -> list[_Topic]:
        topics: list[_Topic] = []
        for place, entry in enumerate(_kept(store, "relationships", number)):
            with rejects.noting(self.relationships or "", f"{number}[{place}]"):
                topics.append(_relation(entry, image, objects))
        return topics

    def _dialogue(self, number: int, image: _Image, topics: list[_Topic]) -> Record:
        most = self.boxes_per_image or sum(len(topic.parts) for topic in topics)
        numbers: dict[str, int] = {}
        regions: list[RecordRegion] = []
        turns: list[Turn] = []
        for choice in np.random.default_rng((self.seed, number)).permutation(len(topics)).tolist():
            topic = topics[choice]
            new = [part for part in topic.parts if part.key not in numbers]
            if len(regions) + len(new) > most:
                continue
            for part in new:
                regions.append(RecordRegion(region=Region.box(*part.box), category=part.name, source_id=part.key[1:]))
                numbers[part.key] = len(regions)
            named = tuple(numbers[part.key] for part in topic.parts)
            answer = topic.answer
            if topic.task == "relation":
                answer = f"{region_answer(named[0])} {answer} {region_answer(named[1])}"
            turns.append(Turn(task=topic.task, answer=answer, regions=named))
        return Record(
            id=f"{self.name}/{number}",
            source=self.name,
            image=image.path,
            width=image.width,
            height=image.height,
            regions=tuple(regions),
            turns=tuple(turns),
        )


def _image_id(entry: Any) -> int:
    """The image id of a file's element: ``image_id``, or ``id`` as some files of the release have it."""
    number = entry.get("image_id", entry.get("id")) if isinstance(entry, dict) else None
    if not is_whole(number):
        raise Fault(MALFORMED, f"expected image_id as a whole number, got {short(entry)}")
    return number


def _box(entry: dict[str, Any], names: tuple[str, str], image: _Image) -> Corners:
    values = (entry.get("x"), entry.get("y"), entry.get(names[0]), entry.get(names[1]))
    return clipped_box(values, image.width, image.height)


def _object(entry: Any, image: _Image) -> _Part:
    key = entry.get("object_id") if isinstance(entry, dict) else None
    if not is_whole(key):
        raise Fault(MALFORMED, f"expected an object with object_id, got {short(entry)}")
    box, names = _box(entry, ("w", "h"), image), entry.get("names") or [entry.get("name", "")]
    return _Part(f"o{key}", box, plain_text(names[0] if isinstance(names, list) else names, "object name"))


def _relation(entry: Any, image: _Image, objects: dict[str, _Part]) -> _Topic:
    if not isinstance(entry, dict):
        raise Fault(MALFORMED, f"expected a relationship, got {short(entry)}")
    predicate = plain_text(entry.get("predicate"), "predicate")
    parts: list[_Part] = []
    for role in ("subject", "object"):
        whole = entry.get(role)
        if isinstance(whole, dict):  # as in relationships.json; scene graphs have the id alone
            parts.append(objects.get(f"o{whole.get('object_id')}") or _object(whole, image))
        elif f"o{entry.get(f'{role}_id')}" in objects:
            parts.append(objects[f"o{entry[f'{role}_id']}"])
        else:
            raise Fault(APART, f"expected the {role} of a relationship or its id in objects.json, got neither")
    if parts[0].key == parts[1].key:
        raise Fault("relation of an object to itself", f"expected two objects, got {parts[0].key[1:]} twice")
    return _Topic("relation", tuple(parts), predicate.lower())


def _kept(store: sqlite3.Connection, table: str, number: int) -> list[Any]:
    found = store.execute(f"SELECT content FROM {table} WHERE image = ?", (number,)).fetchone()
    return list(json.loads(found[0])) if found else []

"""Visual Genome: captions of up to 10 boxes as one dialogue an image; object names and relations. Paper: §3.2."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import AliasChoices, Field, NonNegativeInt

from regiongpt.data.reading import (
    APART,
    MALFORMED,
    Corners,
    Expression,
    Row,
    Side,
    Whole,
    check_image,
    clipped_box,
    image_name,
    iter_array,
    plain_text,
)
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Fault, Rejects
from regiongpt.data.sources import Converter
from regiongpt.errors import DataError, short
from regiongpt.prompts import region_answer
from regiongpt.regions import Region


class _Entry(Row):
    """An element of a file: what it says of one image, whose id some files call ``id``."""

    image_id: Whole = Field(validation_alias=AliasChoices("image_id", "id"))


class _Image(_Entry):
    width: Side
    height: Side
    url: str = ""

    @property
    def path(self) -> str:
        """The end of the address, since the release has two folders: VG_100K_2/1.jpg."""
        return "/".join(self.url.split("/")[-2:])


class _Region(Row):
    region_id: Whole = Field(validation_alias=AliasChoices("region_id", "id"))
    image_id: Any = None
    phrase: Expression


class _Object(Row):
    object_id: Whole
    names: Any = ()
    name: Any = ""


class _Part(NamedTuple):
    """A box with its id in the source behind a letter for its kind: regions and objects are numbered apart."""

    key: str
    box: Corners
    name: str = ""


class _Topic(NamedTuple):
    """Facts about one box, or two."""

    task: str
    parts: tuple[_Part, ...]
    answer: str


class VisualGenomeConverter(Converter):
    """Region descriptions of Visual Genome, each image's sample as one dialogue.

    Each turn asks for the short caption of a box. With ``objects``, the name of an object is a topic too (``classify``
    without a closed set); with ``relationships``, how two objects relate, answered as ``Region [1] on Region [2]``. The
    topics of an image are drawn evenly until its boxes are used up.
    """

    name: ClassVar[str] = "vg"
    summary: ClassVar[str] = "Visual Genome: short captions of regions, object names and relations"

    regions: Path
    """region_descriptions.json."""
    image_data: Path
    """image_data.json, the images' sizes and folders."""
    objects: Path | None = None
    """objects.json, to also ask for object names."""
    relationships: Path | None = None
    """relationships.json, to also ask about relations."""
    boxes_per_image: NonNegativeInt = 10
    """Most boxes per image, sampled; 0 for all."""
    seed: NonNegativeInt = 0
    """Random seed."""
    check_images: bool = True
    """Skip images that are missing or have another size."""

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """One dialogue an image, in the order of ``region_descriptions.json``."""
        images: dict[int, _Image] = {}
        for place, entry in enumerate(iter_array(self.image_data)):
            with rejects.noting(self.image_data, place):
                image = _Image.read(entry)
                image_name(image.path)
                if image.image_id in images:
                    raise Fault("duplicate id", f"expected each image once, got {image.image_id} again")
                images[image.image_id] = image
        # As text until its image comes: a tenth of what the objects would take.
        waiting: dict[str, dict[int, str]] = {"objects": {}, "relationships": {}}
        for table, held in waiting.items():
            if path := getattr(self, table):
                for number, content in self._by_image(path, table, images, rejects):
                    held[number] = json.dumps(content, separators=(",", ":"))
        for number, described in self._by_image(self.regions, "regions", images, rejects):
            with rejects.noting(self.regions, number):
                image = images[number]
                if self.check_images:
                    check_image(self.images / image.path, image.width, image.height)
                known = {table: json.loads(held.get(number, "[]")) for table, held in waiting.items()}
                if topics := self._topics(image, {"regions": described, **known}, rejects):
                    yield self._drawn(image, topics)

    def _by_image(
        self, path: Path, key: str, images: dict[int, _Image], rejects: Rejects
    ) -> Iterator[tuple[int, list[Any]]]:
        """Each image's entry in a file, once."""
        seen: set[int] = set()
        apart = 0
        for place, entry in enumerate(iter_array(path)):
            with rejects.noting(path, place):
                number = _Entry.read(entry).image_id
                content = entry.get(key)
                if not isinstance(content, list):
                    raise Fault(MALFORMED, f"expected a list {key!r}, got {short(entry)}")
                if number not in images:
                    apart += 1
                    raise Fault(APART, f"expected an image of {self.image_data.name}, got {number}")
                if number in seen:
                    raise Fault("duplicate id", f"expected each image once, got {number} again")
                seen.add(number)
                yield number, content
        if apart and not seen:
            raise DataError(f"{path}: none of its images is in {self.image_data}; give two files of one release")

    def _topics(self, image: _Image, known: dict[str, list[Any]], rejects: Rejects) -> list[_Topic]:
        """All that the files tell of an image."""
        captions: dict[str, _Topic] = {}
        objects: dict[str, _Part] = {}
        relations: list[_Topic] = []
        for table, entries in known.items():
            for place, entry in enumerate(entries):
                with rejects.noting(getattr(self, table), f"{image.image_id}[{place}]"):
                    if table == "relationships":
                        relations.append(_relation(entry, image, objects))
                        continue
                    part, phrase = _object(entry, image) if table == "objects" else _region(entry, image)
                    if part.key in objects or part.key in captions:
                        raise Fault("duplicate id", f"expected each of {table} once, got {part.key[1:]} again")
                    if table == "objects":
                        objects[part.key] = part
                    else:
                        captions[part.key] = _Topic("caption", (part,), phrase)
        named = [_Topic("classify", (part,), part.name) for part in objects.values()]
        return [*captions.values(), *named, *relations]

    def _drawn(self, image: _Image, topics: Sequence[_Topic]) -> Record:
        most = self.boxes_per_image or sum(len(topic.parts) for topic in topics)
        numbers: dict[str, int] = {}
        regions: list[RecordRegion] = []
        turns: list[Turn] = []
        for choice in np.random.default_rng((self.seed, image.image_id)).permutation(len(topics)).tolist():
            task, parts, answer = topics[choice]
            new = [part for part in parts if part.key not in numbers]
            if len(regions) + len(new) > most:
                continue
            for part in new:
                regions.append(RecordRegion(region=Region.box(*part.box), category=part.name, source_id=part.key[1:]))
                numbers[part.key] = len(regions)
            named = tuple(numbers[part.key] for part in parts)
            if task == "relation":
                answer = f"{region_answer(named[0])} {answer} {region_answer(named[1])}"
            turns.append(Turn(task=task, answer=answer, regions=named))
        return self.record(str(image.image_id), image.path, (image.width, image.height), regions, turns)


def _region(entry: Any, image: _Image) -> tuple[_Part, str]:
    row = _Region.read(entry)
    if row.image_id not in (None, image.image_id):
        raise Fault(APART, f"expected a region of image {image.image_id}, got one of {short(row.image_id)}")
    box = clipped_box([entry.get(side) for side in ("x", "y", "width", "height")], image.width, image.height)
    return _Part(f"r{row.region_id}", box), row.phrase


def _object(entry: Any, image: _Image) -> tuple[_Part, str]:
    row = _Object.read(entry)
    box = clipped_box([entry.get(side) for side in ("x", "y", "w", "h")], image.width, image.height)
    names = row.names or [row.name]
    name = plain_text(names[0] if isinstance(names, list) else names, "object name")
    return _Part(f"o{row.object_id}", box, name), name


def _relation(entry: Any, image: _Image, objects: dict[str, _Part]) -> _Topic:
    if not isinstance(entry, dict):
        raise Fault(MALFORMED, f"expected a relationship, got {short(entry)}")
    predicate = plain_text(entry.get("predicate"), "predicate")
    parts: list[_Part] = []
    for role in ("subject", "object"):
        whole = entry.get(role)
        known = objects.get(f"o{whole.get('object_id')}") if isinstance(whole, dict) else None
        parts.append(known or _object(whole, image)[0])
    if parts[0].key == parts[1].key:
        raise Fault("relation of an object to itself", f"expected two objects, got {parts[0].key[1:]} twice")
    return _Topic("relation", tuple(parts), predicate.lower())

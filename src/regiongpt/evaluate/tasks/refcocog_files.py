"""The files of RefCOCOg as the evaluation reads them: by the converters' readers, or JSON lines of expressions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from regiongpt.data.reading import (
    APART,
    Corners,
    Expression,
    Row,
    Whole,
    clipped_box,
    image_name,
    is_box,
    iter_lines,
    known_size,
)
from regiongpt.data.refcoco import Scene, read_instances, read_json, read_pickle
from regiongpt.data.shards import Fault, Rejects
from regiongpt.errors import DataError, short
from regiongpt.evaluate.task import Task
from regiongpt.evaluate.tasks.scoring import find
from regiongpt.regions import MAX_COORDINATE

REFS = ("refcocog/refs(umd).p", "refs(umd).p", "refcocog/refs(google).p", "refs(google).p")
INSTANCES = ("refcocog/instances.json", "instances.json")
FOLDERS = ("train2014", "images/mscoco/images/train2014", "coco/train2014", "images", ".")


class Referred(NamedTuple):
    """One object with the expressions that refer to it."""

    image_id: int
    file: str
    size: tuple[int, int] | None
    ann_id: int
    box: Corners
    category: str
    expressions: tuple[tuple[int, str], ...]


class RefCocogTask(Task):
    """A benchmark on the files of RefCOCOg."""

    split: str = "val"
    """Split of a refs(...).p; a json holds one split, which this names."""
    refs: Path | None = None
    """refs(umd).p, a json in COCO's layout or json lines, wherever it is."""
    instances: Path | None = None
    """instances.json of the data set, wherever it is; only refs(...).p needs it."""
    images: Path | None = None
    """Folder of the images, wherever it is."""

    def inputs(self) -> list[Path]:
        """Expressions and objects."""
        if self._refs.suffix != ".p" and self.instances is None:
            return [self._refs]
        return [self._refs, find(self.instances, self.data, INSTANCES, "objects", "instances")]

    @property
    def _refs(self) -> Path:
        return find(self.refs, self.data, REFS, "expressions", "refs")

    @property
    def folder(self) -> Path:
        """The folder of the images."""
        return find(self.images, self.data, FOLDERS, "images", "images", file=False)

    @property
    def partition(self) -> str:
        """Who divided the data set, as far as the file's name says it."""
        return next((name for name in ("umd", "google") if name in self._refs.name.lower()), "as in the file")

    @property
    def split_read(self) -> str:
        """The split where the file holds several, and it is chosen by name."""
        return self.split if self._refs.suffix == ".p" else ""

    def objects(self) -> list[Referred]:
        """The objects of the split, in the order of the file; DataError if there are none."""
        path, *instances = RefCocogTask.inputs(self)
        rejects = self.left_out
        if path.suffix == ".jsonl":
            return _read_lines(path, self.folder, rejects)
        scenes: dict[int, Scene] = {}
        if path.suffix == ".p":
            refs = read_pickle(path, self.split, rejects)
        else:
            refs, scenes = read_json(path, "refcocog", rejects)
        if instances:
            scenes = read_instances(instances[0], set(refs), rejects)
        found: list[Referred] = []
        for image_id, ref in ((image_id, ref) for image_id, those in refs.items() for ref in those):
            scene = scenes.get(image_id)
            if scene is None or ref.ann_id not in scene.objects:
                rejects.add(APART, path, ref.ann_id, "expected the object in the instances, found none")
                continue
            each, size = scene.objects[ref.ann_id], (scene.width, scene.height)
            said = tuple(ref.expressions)
            found.append(Referred(image_id, scene.path, size, ref.ann_id, each.box, each.category, said))
        if not found:
            raise DataError(f"{path}: no objects of the split {self.split!r}; {rejects.summary()}")
        return found


class _Line(Row):
    image_id: Whole
    ann_id: Whole
    sent_id: Whole | None = None
    sent: Expression
    bbox: Any = None
    bbox_xywh: Any = None
    file_name: str = ""
    category: Any = ""


def _read_lines(path: Path, folder: Path, rejects: Rejects) -> list[Referred]:
    """``{"image_id", "ann_id", "bbox_xywh", "sent"}`` a line; further: ``sent_id``, ``file_name``, ``category``."""
    found: dict[int, Referred] = {}
    seen: set[int] = set()
    for number, entry in iter_lines(path, rejects):
        with rejects.noting(path, number):
            line = _Line.read(entry)
            box = line.bbox_xywh or line.bbox
            if not is_box(box):
                raise Fault("box that is not four numbers", f"expected bbox_xywh as four numbers, got {short(box)}")
            name = image_name(line.file_name or f"COCO_train2014_{line.image_id:012d}.jpg")
            corners = clipped_box(box, *(known_size(folder / name) or (int(MAX_COORDINATE), int(MAX_COORDINATE))))
            if line.sent_id in seen:
                raise Fault("duplicate id", f"expected each sent_id once, got {line.sent_id} again")
            said = (number if line.sent_id is None else line.sent_id, line.sent)
            seen.add(said[0])
            kept = found.get(line.ann_id)
            if kept is None:
                found[line.ann_id] = Referred(
                    line.image_id, name, None, line.ann_id, corners, str(line.category), (said,)
                )
            elif (kept.image_id, kept.box) != (line.image_id, corners):
                raise Fault(APART, f"expected one image and box of ann_id {line.ann_id}, got another")
            else:
                found[line.ann_id] = kept._replace(expressions=(*kept.expressions, said))
    return list(found.values())


def each_expression(objects: list[Referred]) -> Iterator[tuple[Referred, int, str]]:
    """Every expression with its object."""
    for each in objects:
        for number, text in each.expressions:
            yield each, number, text

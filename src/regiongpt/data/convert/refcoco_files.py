"""The files of RefCOCO, RefCOCO+ and RefCOCOg: which object is referred to, in which words, and where objects are."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from regiongpt.data.convert.images import Fault
from regiongpt.data.convert.jsonstream import iter_arrays
from regiongpt.data.convert.plain_pickle import load_plain_pickle
from regiongpt.data.convert.values import (
    MALFORMED,
    Corners,
    clipped_box,
    image_fault,
    is_side,
    is_whole,
    plain_text,
    short,
)
from regiongpt.data.instances import InstancesFile
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError

APART: Final = "files that do not belong together"
_ARRAYS: Final = ("images", "annotations", "categories")


class Expression(NamedTuple):
    """Words that single out an object, with their id in the file."""

    id: int
    text: str


@dataclass(slots=True)
class Ref:
    """One object that is referred to."""

    ann_id: int
    expressions: list[Expression] = field(default_factory=list)


class SceneObject(NamedTuple):
    """One annotated object, or a crowd of them."""

    box: Corners
    category: str
    crowd: bool


@dataclass(slots=True)
class Scene:
    """An image with its annotated objects by their ids; of those that cannot be used, the ids alone."""

    path: str
    width: int
    height: int
    objects: dict[int, SceneObject] = field(default_factory=dict)
    faulty: set[int] = field(default_factory=set)

    def add(self, number: int, entry: dict[str, Any], categories: dict[int, str]) -> Fault | None:
        """Adds an annotation of COCO's form, or says what is wrong with it."""
        found = _object(entry, self, categories)
        if isinstance(found, Fault):
            self.faulty.add(number)
            return found
        self.objects[number] = found
        return None


def read_pickle(path: Path, split: str, rejects: Rejects) -> dict[int, list[Ref]]:
    """The objects of one split that a ``refs(...).p`` refers to, by image.

    Raises:
        DataError: The file is no pickle of plain data, or has no such split.
    """
    entries = load_plain_pickle(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of references, got {short(entries)}; give a refs(...).p")
    refs: dict[int, list[Ref]] = {}
    seen: set[int] = set()
    splits: set[str] = set()
    for place, entry in enumerate(entries):
        own = entry.get("split") if isinstance(entry, dict) else None
        if not isinstance(own, str):
            rejects.add(MALFORMED, path, place, f"expected a reference with a split, got {short(entry)}")
            continue
        splits.add(own)
        if own != split:
            continue
        ref_id, ann_id, image_id, sentences = (entry.get(key) for key in ("ref_id", "ann_id", "image_id", "sentences"))
        if not (is_whole(ref_id) and is_whole(ann_id) and is_whole(image_id) and isinstance(sentences, list)):
            reason = f"expected ref_id, ann_id, image_id as whole numbers and a list of sentences, got {short(entry)}"
            rejects.add(MALFORMED, path, place, reason)
        elif ref_id in seen:
            rejects.add("duplicate id", path, ref_id, "expected each ref_id once, got it again")
        else:
            seen.add(ref_id)
            if expressions := list(_expressions(sentences, path, ref_id, rejects)):
                refs.setdefault(image_id, []).append(Ref(ann_id, expressions))
    if split not in splits:
        found = ", ".join(sorted(splits)) or "none"
        raise DataError(f"{path}: expected references of the split {split!r}, found {found}; give --split")
    return refs


def _expressions(sentences: list[Any], path: Path, ref_id: int, rejects: Rejects) -> Iterable[Expression]:
    for place, entry in enumerate(sentences):
        number = entry.get("sent_id") if isinstance(entry, dict) else None
        if not is_whole(number):
            rejects.add(MALFORMED, path, f"{ref_id}[{place}]", f"expected a sentence with sent_id, got {short(entry)}")
            continue
        text = plain_text(entry.get("sent"), "expression")
        if isinstance(text, Fault):
            rejects.add(text.kind, path, f"{ref_id}[{place}]", text.reason)
        else:
            yield Expression(number, text)


def read_json(path: Path, dataset: str, rejects: Rejects) -> tuple[dict[int, list[Ref]], dict[int, Scene]]:
    """The objects that a json in COCO's layout refers to, by image, and what the file itself says of the images.

    Each of its ``images`` is one expression, its ``caption``; the photograph's id is ``original_id``. Its annotation is
    the object, whose id in COCO is ``original_id`` too.

    Raises:
        DataError: The file is not of that layout, or of another data set.
    """
    said: dict[int, dict[str, Any]] = {}
    shown: dict[int, dict[str, Any]] = {}
    categories: dict[int, str] = {}
    for key, entry in iter_arrays(path, _ARRAYS, rejects):
        if key == "categories":
            _add_category(entry, categories)
            continue
        known, own_id = (said, "id") if key == "images" else (shown, "image_id")
        number = entry.get(own_id) if isinstance(entry, dict) else None
        if not is_whole(number):
            rejects.add(MALFORMED, path, key, f"expected {own_id} as a whole number, got {short(entry)}")
        elif number in known:
            rejects.add("duplicate id", path, number, f"expected one of the {key} for an expression, got another")
        else:
            known[number] = entry
            if key == "images" and entry.get("dataset_name", dataset) != dataset:
                raise DataError(
                    f"{path}: expected expressions of {dataset!r}, got {short(entry['dataset_name'])}; give --dataset"
                )
    for number in sorted(shown.keys() - said.keys()):
        rejects.add(APART, path, number, "expected the expression of an annotation, found none")
    refs: dict[int, dict[int, Ref]] = {}
    scenes: dict[int, Scene] = {}
    for number, entry in said.items():
        fault = _add_said(number, entry, shown.get(number), refs, scenes, categories)
        if fault is not None:
            rejects.add(fault.kind, path, number, fault.reason)
    return {image_id: list(of_image.values()) for image_id, of_image in refs.items()}, scenes


def _add_said(
    number: int,
    entry: dict[str, Any],
    annotation: dict[str, Any] | None,
    refs: dict[int, dict[int, Ref]],
    scenes: dict[int, Scene],
    categories: dict[int, str],
) -> Fault | None:
    """Adds one expression with its object and its image, or says what is wrong with it."""
    if annotation is None:
        return Fault(APART, "expected the annotation of an expression, found none")
    text = plain_text(entry.get("caption"), "expression")
    if isinstance(text, Fault):
        return text
    image_id, ann_id = entry.get("original_id", number), annotation.get("original_id", annotation.get("id"))
    if not (is_whole(image_id) and is_whole(ann_id)):
        return Fault(MALFORMED, f"expected original_id as a whole number, got {short((image_id, ann_id))}")
    scene = scenes.get(image_id) or _scene(entry)
    if isinstance(scene, Fault):
        return scene
    if ann_id not in scene.objects and (fault := scene.add(ann_id, annotation, categories)):
        return fault
    scenes[image_id] = scene
    refs.setdefault(image_id, {}).setdefault(ann_id, Ref(ann_id)).expressions.append(Expression(number, text))
    return None


def read_instances(path: Path, wanted: set[int], rejects: Rejects) -> dict[int, Scene]:
    """The wanted images of an ``instances.json`` with their objects, by their ids.

    Raises:
        DataError: The file is not of COCO's layout.
    """
    file = InstancesFile(path, rejects, crowds="keep", wanted=wanted)
    frames = zip(file.paths, file.widths.tolist(), file.heights.tolist(), strict=True)
    scenes = [Scene(*frame, faulty=file.faulty) for frame in frames]
    columns = (file.ids, file.places, file.categories, file.boxes, file.crowd)
    for number, place, category, box, crowd in zip(*(column.tolist() for column in columns), strict=True):
        scenes[place].objects[number] = SceneObject(tuple(box), file.names[category], crowd)
    return dict(zip(file.images.tolist(), scenes, strict=True))


def _scene(entry: dict[str, Any]) -> Scene | Fault:
    width, height, path = entry.get("width"), entry.get("height"), entry.get("file_name")
    if not (is_side(width) and is_side(height)):
        return Fault(MALFORMED, f"expected width and height as whole numbers, got {short((width, height))}")
    return image_fault(path) or Scene(str(path), width, height)


def _object(entry: dict[str, Any], scene: Scene, categories: dict[int, str]) -> SceneObject | Fault:
    given, category = entry.get("bbox"), entry.get("category_id")
    if not isinstance(given, list) or len(given) != 4:
        return Fault("box that is not four numbers", f"expected bbox as [x, y, width, height], got {short(given)}")
    x, y, width, height = given
    box = clipped_box(x, y, width, height, scene.width, scene.height)
    if isinstance(box, Fault):
        return box
    if not is_whole(category) or category not in categories:
        return Fault("unknown category", f"expected a category id of the file, got {short(category)}")
    return SceneObject(box, categories[category], bool(entry.get("iscrowd")))


def _add_category(entry: Any, categories: dict[int, str]) -> None:
    number = entry.get("id") if isinstance(entry, dict) else None
    if is_whole(number) and isinstance(entry.get("name"), str):
        categories[number] = entry["name"]

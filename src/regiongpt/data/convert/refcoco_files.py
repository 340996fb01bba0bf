"""The files of RefCOCO, RefCOCO+ and RefCOCOg: which object is referred to, in which words, and where objects are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from regiongpt.data.convert.jsonstream import iter_arrays
from regiongpt.data.convert.plain_pickle import load_plain_pickle
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
from regiongpt.data.instances import InstancesFile, is_crowd, read_box
from regiongpt.data.shards import Fault, Rejects
from regiongpt.errors import DataError

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
        with rejects.noting(path, place):
            own = entry.get("split") if isinstance(entry, dict) else None
            if not isinstance(own, str):
                raise Fault(MALFORMED, f"expected a reference with a split, got {short(entry)}")
            splits.add(own)
            if own != split:
                continue
            ids, sentences = [entry.get(key) for key in ("ref_id", "ann_id", "image_id")], entry.get("sentences")
            if not (all(map(is_whole, ids)) and isinstance(sentences, list)):
                wanted = "ref_id, ann_id, image_id as whole numbers and a list of sentences"
                raise Fault(MALFORMED, f"expected {wanted}, got {short(entry)}")
            ref_id, ann_id, image_id = ids
            if ref_id in seen:
                raise Fault("duplicate id", f"expected each ref_id once, got {ref_id} again")
            seen.add(ref_id)
            ref = Ref(ann_id)
            for k, sentence in enumerate(sentences):
                with rejects.noting(path, f"{ref_id}[{k}]"):
                    number = sentence.get("sent_id") if isinstance(sentence, dict) else None
                    if not is_whole(number):
                        raise Fault(MALFORMED, f"expected a sentence with sent_id, got {short(sentence)}")
                    ref.expressions.append(Expression(number, plain_text(sentence.get("sent"), "expression")))
            if ref.expressions:
                refs.setdefault(image_id, []).append(ref)
    if split not in splits:
        found = ", ".join(sorted(splits)) or "none"
        raise DataError(f"{path}: expected references of the split {split!r}, found {found}; give --split")
    return refs


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
            number = entry.get("id") if isinstance(entry, dict) else None
            if is_whole(number) and isinstance(entry.get("name"), str):
                categories[number] = entry["name"]
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
        with rejects.noting(path, number):
            annotation = shown.get(number)
            if annotation is None:
                raise Fault(APART, "expected the annotation of an expression, found none")
            text = plain_text(entry.get("caption"), "expression")
            image_id, ann_id = entry.get("original_id", number), annotation.get("original_id", annotation.get("id"))
            if not (is_whole(image_id) and is_whole(ann_id)):
                raise Fault(MALFORMED, f"expected original_id as a whole number, got {short((image_id, ann_id))}")
            scene = scenes.get(image_id)
            if scene is None:
                size = sides(entry)
                scene = Scene(image_name(entry.get("file_name")), *size)
            if ann_id not in scene.objects:
                scene.faulty.add(ann_id)
                scene.objects[ann_id] = _object(annotation, scene, categories)
                scene.faulty.remove(ann_id)
            scenes[image_id] = scene
            refs.setdefault(image_id, {}).setdefault(ann_id, Ref(ann_id)).expressions.append(Expression(number, text))
    return {image_id: list(of_image.values()) for image_id, of_image in refs.items()}, scenes


def _object(entry: dict[str, Any], scene: Scene, categories: dict[int, str]) -> SceneObject:
    box, category = read_box(entry.get("bbox")), entry.get("category_id")
    if box is None:
        raise Fault("box that is not four numbers", f"expected [x, y, width, height], got {short(entry.get('bbox'))}")
    corners = clipped_box(box, scene.width, scene.height)
    if not is_whole(category) or category not in categories:
        raise Fault("unknown category", f"expected a category id of the file, got {short(category)}")
    return SceneObject(corners, plain_text(categories[category], "category name"), bool(is_crowd(entry.get("iscrowd"))))


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

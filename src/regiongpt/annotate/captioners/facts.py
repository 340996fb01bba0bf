"""``facts``: captions that state only what annotations and pixels prove. No model, and no other captioner's errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from regiongpt.annotate.captioners import Failed, Local, Reply, Request
from regiongpt.annotate.prompts import draw
from regiongpt.data.coco import ImageAnnotations, ObjectAnnotation
from regiongpt.data.facts import View, ViewObject, colours_of, neighbours, place_name, size_name
from regiongpt.data.records import RecordRegion
from regiongpt.data.wording import noun, plural, with_article

_SIZES: Final = {
    "tiny": "It takes up only a tiny part of the image.",
    "small": "It takes up a small part of the image.",
    "medium-sized": "It takes up a fair part of the image.",
    "large": "It takes up a large part of the image.",
    "huge": "It fills much of the image.",
}
_HOW: Final = {"inside": "within the area of"}
_OPENINGS: Final = ("{A}{place}.", "This is {a}{place}.", "The region shows {a}{place}.", "There is {a}{place}.")


class Facts(Local):
    """Class, colour, place, size and the nearest neighbours of a region, in a few sentences.

    How many there are of a class is not said: a source need not annotate them all.

    Args:
        seed: Of the wording.
    """

    wants_photo = True
    locates = False

    def __init__(self, seed: int) -> None:
        super().__init__(64)
        self.identity = {"captioner": "facts", "model": "facts"}
        self.seed = seed

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | Exception]:
        """Word each, those about one image with its colours named once."""
        known: dict[int, tuple[View, dict[int, str]]] = {}
        replies: list[Reply | Exception] = []
        for request in requests:
            assert request.photo is not None
            if request.stage == "locate":
                replies.append(Failed("cannot choose", "facts reads no captions"))
                continue
            if id(request.photo) not in known:
                known[id(request.photo)] = _see(request.photo, request.regions)
            view, colours = known[id(request.photo)]
            if request.stage == "image":
                text = _whole(view)
            else:
                each = next((each for each in view.objects if each.id == request.number), None)
                if each is None:
                    replies.append(Failed("region without class", "facts needs class names; give them, or a model"))
                    continue
                text = _one(view, each, colours.get(each.id), draw(self.seed, repr(each.box), len(_OPENINGS)))
            replies.append(Reply(text=text, model="facts"))
        return replies


def _see(photo: Image.Image, regions: Sequence[RecordRegion]) -> tuple[View, dict[int, str]]:
    """The image's objects by their places among the regions, and their colours."""
    objects = []
    for number, each in enumerate(regions):
        if each.category:
            x0, y0, x1, y1 = map(float, each.region.bounds(*photo.size))
            drawn = each.region.to_dict().get("polygon")
            rings = tuple(tuple(np.ravel(ring).tolist()) for ring in drawn) if drawn else None
            objects.append(ObjectAnnotation(id=number, category=each.category, box=(x0, y0, x1, y1), polygons=rings))
    annotations = ImageAnnotations(
        path=Path(), image_id=0, width=photo.width, height=photo.height, objects=tuple(objects)
    )
    return View(annotations), colours_of(annotations, photo)


def _whole(view: View) -> str:
    """What is annotated in the image, by class, as often as it is."""
    if not view.objects:
        return "Nothing in the image is annotated."
    counts = {name: len(group) for name, group in view.by_category.items()}
    named = [
        with_article(noun(name)) if count == 1 else f"at least {count} {plural(name)}" for name, count in counts.items()
    ]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"The image shows {listed}."


def _mention(other: ViewObject, each: ViewObject) -> str:
    return f"another {noun(other.category)}" if other.category == each.category else with_article(noun(other.category))


def _one(view: View, each: ViewObject, colour: str | None, opening: int) -> str:
    a = with_article(noun(each.category, colour or ""))
    place = place_name(each.box, view.width, view.height)
    where = f" {place} of the image" if place else ""
    sentences = [_OPENINGS[opening].format(a=a, A=a[0].upper() + a[1:], place=where)]
    sentences.append(_SIZES[size_name(each.box, view.width, view.height)])
    near = [
        f"{_HOW.get(how, how)} {_mention(other, each)}" for other, how in neighbours(view, each, 3) if how != "around"
    ][:2]
    if near:
        sentences.append(f"In the image, it is {' and '.join(near)}.")
    return " ".join(sentences)

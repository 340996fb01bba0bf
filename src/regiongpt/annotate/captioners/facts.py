"""No model: class, colour, place, size and nearest neighbours of a region, as annotations and pixels prove them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from regiongpt.annotate.captioners import Failed, LocalCaptioner, Reply, Request
from regiongpt.annotate.options import Options
from regiongpt.annotate.plan import WORDING, draw
from regiongpt.data.coco import ImageAnnotations, ObjectAnnotation
from regiongpt.data.facts import (
    View,
    ViewObject,
    colours_of,
    neighbours,
    noun,
    place_name,
    plural,
    size_name,
    with_article,
)
from regiongpt.data.records import RecordRegion


class Facts(LocalCaptioner):
    """Says no number of a class as certain, since a source need not annotate them all."""

    def __init__(self, options: Options) -> None:
        self.seed = options.seed
        super().__init__({"captioner": "facts", "model": "facts"}, batch_size=64, images=64)

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | Failed]:
        """Word each; the colours in an image are named once for all that is asked about it."""
        seen: dict[int, tuple[View, dict[int, str]]] = {}
        outcomes: list[Reply | Failed] = []
        openings = WORDING["facts"]["openings"]
        for request in requests:
            assert request.photo is not None
            if id(request.photo) not in seen:
                seen[id(request.photo)] = _see(request.photo, request.regions)
            view, colours = seen[id(request.photo)]
            named = {each.id: each for each in view.objects}
            if request.stage == "image":
                outcomes.append(Reply(text=_whole(view), model="facts"))
            elif each := named.get(request.number):
                opening = openings[draw(self.seed, repr(each.box), len(openings))]
                outcomes.append(Reply(text=_one(view, each, colours.get(each.id), opening), model="facts"))
            else:
                outcomes.append(Failed("region without class", "facts needs class names; give them, or a model"))
        return outcomes


def _see(photo: Image.Image, regions: Sequence[RecordRegion]) -> tuple[View, dict[int, str]]:
    """The image's objects by their places among the regions, and their colours."""
    objects = []
    for number, each in enumerate(regions):
        if each.category:
            x0, y0, x1, y1 = map(float, each.region.bounds(*photo.size))
            drawn = each.region.to_dict().get("polygon")
            rings = tuple(tuple(np.ravel(ring).tolist()) for ring in drawn) if drawn else None
            objects.append(ObjectAnnotation(id=number, category=each.category, box=(x0, y0, x1, y1), polygons=rings))
    image = ImageAnnotations(path=Path(), image_id=0, width=photo.width, height=photo.height, objects=tuple(objects))
    return View(image), colours_of(image, photo)


def _whole(view: View) -> str:
    """What is annotated in the image, by class."""
    if not view.objects:
        return "Nothing in the image is annotated."
    *named, last = [
        with_article(noun(name)) if len(group) == 1 else f"at least {len(group)} {plural(name)}"
        for name, group in view.by_category.items()
    ]
    return f"The image shows {', '.join(named)}{' and ' if named else ''}{last}."


def _one(view: View, each: ViewObject, colour: str | None, opening: str) -> str:
    a, place = with_article(noun(each.category, colour or "")), place_name(each.box, view.width, view.height)
    where = f" {place} of the image" if place else ""
    size = WORDING["facts"]["sizes"][size_name(each.box, view.width, view.height)]
    sentences = [opening.format(a=a, A=a[0].upper() + a[1:], place=where), size]
    near = []
    for other, how in neighbours(view, each, 3):
        name = noun(other.category)
        named = f"another {name}" if other.category == each.category else with_article(name)
        near += [f"{'within the area of' if how == 'inside' else how} {named}"] if how != "around" else []
    sentences += [f"In the image, it is {' and '.join(near[:2])}."] if near else []
    return " ".join(sentences)

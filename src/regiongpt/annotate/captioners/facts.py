"""No model: class, colour, place, size and nearest neighbours of a region, as annotations and pixels prove them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from regiongpt.annotate.captioners import LocalCaptioner, Reply, Request
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
    """Says no number of a class as certain, since a source need not annotate them all; without a class, an object."""

    def __init__(self, options: Options) -> None:
        self.seed = options.seed
        super().__init__({"captioner": "facts", "model": "facts"}, batch_size=64, images=64)

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply]:
        """Word each; an image's colours are measured once."""
        seen: dict[int, tuple[View, dict[int, str]]] = {}
        replies = []
        for request in requests:
            if id(request.picture) not in seen:
                seen[id(request.picture)] = _see(request.picture, request.regions)
            view, colours = seen[id(request.picture)]
            text = _whole(view)
            if request.stage == "region":
                each = next(each for each in view.objects if each.id == request.number)
                openings = WORDING["facts"]["openings"]
                opening = openings[draw(self.seed, repr(each.box), len(openings))]
                named = bool(request.regions[request.number].category)
                text = _one(view, each, colours.get(each.id, "") if named else "", opening)
            replies.append(Reply(text=text, model="facts"))
        return replies


def _see(image: Image.Image, regions: Sequence[RecordRegion]) -> tuple[View, dict[int, str]]:
    """The image's objects by their places among the regions, and their colours."""
    objects = []
    for number, each in enumerate(regions):
        x0, y0, x1, y1 = map(float, each.region.bounds(*image.size))
        drawn = each.region.to_dict().get("polygon")
        rings = tuple(tuple(np.ravel(ring).tolist()) for ring in drawn) if drawn else None
        category = each.category or "object"
        objects.append(ObjectAnnotation(id=number, category=category, box=(x0, y0, x1, y1), polygons=rings))
    known = ImageAnnotations(path=Path(), image_id=0, width=image.width, height=image.height, objects=tuple(objects))
    return View(known), colours_of(known, image)


def _whole(view: View) -> str:
    """The image's annotations by class."""
    *named, last = [
        with_article(noun(name)) if len(group) == 1 else f"at least {len(group)} {plural(name)}"
        for name, group in view.by_category.items()
    ]
    return f"The image shows {', '.join(named)}{' and ' if named else ''}{last}."


def _one(view: View, each: ViewObject, colour: str, opening: str) -> str:
    a, place = with_article(noun(each.category, colour)), place_name(each.box, view.width, view.height)
    opened = opening.format(a=a, A=a[0].upper() + a[1:], place=f" {place} of the image" if place else "")
    sentences = [opened, WORDING["facts"]["sizes"][size_name(each.box, view.width, view.height)]]
    near = []
    for other, how in neighbours(view, each, 3):
        name = noun(other.category)
        named = f"another {name}" if other.category == each.category else with_article(name)
        near += [f"{'within the area of' if how == 'inside' else how} {named}"] if how != "around" else []
    sentences += [f"In the image, it is {' and '.join(near[:2])}."] if near else []
    return " ".join(sentences)

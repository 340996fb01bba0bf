"""No model: class, colour, place and size of a region, as annotations and pixels prove them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from regiongpt.annotate.captioners import Captioner, Reply, Request
from regiongpt.annotate.options import Options
from regiongpt.annotate.plan import WORDING, draw
from regiongpt.data.coco import ImageAnnotations, ObjectAnnotation
from regiongpt.data.facts import SIZED, View, colours_of, noun, place_name, plural, size_name, with_article
from regiongpt.data.records import RecordRegion


class Facts(Captioner):
    """Says no number of a class as certain, since a source need not annotate them all; without a class, an object."""

    def __init__(self, options: Options) -> None:
        self.seed = options.seed
        super().__init__({"captioner": "facts", "model": "facts"}, batch_size=64, images=64)

    def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        views = {id(each.picture): (each.picture, each.regions) for each in requests}
        seen = {}
        for key, (image, regions) in views.items():
            objects = tuple(_object(number, each, image.size) for number, each in enumerate(regions))
            known = ImageAnnotations(path=Path(), image_id=0, width=image.width, height=image.height, objects=objects)
            seen[key] = View(known), colours_of(known, image)
        return [Reply(text=self._text(each, *seen[id(each.picture)]), model="facts") for each in requests]

    def _text(self, request: Request, view: View, colours: dict[int, str]) -> str:
        if request.stage == "image":
            groups = [(len(group), name) for name, group in view.by_category.items()]
            *some, last = [f"at least {n} {plural(name)}" if n > 1 else with_article(noun(name)) for n, name in groups]
            return f"The image shows {', '.join(some)}{' and ' if some else ''}{last}."
        each = next(each for each in view.objects if each.id == request.number)
        place = place_name(each.box, view.width, view.height)
        size = size_name(each.box, view.width, view.height)
        colour = colours.get(each.id, "") if request.regions[request.number].category else ""
        a, openings = with_article(noun(each.category, colour)), WORDING["facts"]["openings"]
        opening = openings[draw(self.seed, repr(each.box), len(openings))]
        opened = opening.format(a=a, A=a[0].upper() + a[1:], place=f" {place} of the image" if place else "")
        return f"{opened} {SIZED[size]}"


def _object(number: int, each: RecordRegion, size: tuple[int, int]) -> ObjectAnnotation:
    x0, y0, x1, y1 = map(float, each.region.bounds(*size))
    drawn = each.region.to_dict().get("polygon")
    rings = tuple(tuple(np.ravel(ring).tolist()) for ring in drawn) if drawn else None
    return ObjectAnnotation(id=number, category=each.category or "object", box=(x0, y0, x1, y1), polygons=rings)

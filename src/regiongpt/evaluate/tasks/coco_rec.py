"""Which of five annotated boxes does an expression mean that was written from the annotations themselves?

A stand-in for referring expressions where only boxes, classes and pixels are known: expressions say a class, a place, a
size or a colour that is true of one of the five alone. Its figures are no RefCOCOg figures.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar

from regiongpt.data.coco import ImageAnnotations, load_coco, photo_sources
from regiongpt.data.facts import View, colours_of
from regiongpt.data.sampling import LOCATED_AMONG, dev_questions
from regiongpt.errors import DataError
from regiongpt.evaluate.task import RESAMPLES, Answer, Item, Result, Task
from regiongpt.evaluate.tasks.choosing import READS, RULES, choice_statistics, choices_of, chosen
from regiongpt.evaluate.tasks.scoring import figures, limited, means_by_group, notes_of, rows_of
from regiongpt.images import load_image
from regiongpt.prompts import parse_region_answer, question


def _colours(image: ImageAnnotations) -> dict[int, str]:
    try:
        photo = load_image(image.path)
    except DataError:  # said when it is asked about; until then its expressions name no colour
        return {}
    return colours_of(image, photo) if photo.size == (image.width, image.height) else {}


class CocoRec(Task):
    """Up to three questions an image of at least five objects; without colours no image is read to write them."""

    name: ClassVar[str] = "coco_rec"
    summary: ClassVar[str] = "the box that an expression means, among five of an annotated image; needs no RefCOCOg"
    item_id: ClassVar[str] = "question id"
    reads: ClassVar[tuple[str, ...]] = READS

    split: str = "dev"
    """instances_SPLIT.json in the folder, with images/."""
    colours: bool = True
    """Let expressions name a colour, found in the pixels."""
    guided: bool = True
    """End the question with the template of the answer."""
    choices: bool = True
    """Score all candidates too."""
    calls: bool = True
    """Ask of each candidate by itself, too, how likely it is called so."""

    def inputs(self) -> list[Path]:
        """The annotations."""
        return [source.instances for source in photo_sources(self.data, self.split)]

    def items(self) -> list[Item]:
        """Questions by image, in their first wording."""
        self.left_out.counts.clear()
        data = load_coco(photo_sources(self.data, self.split))
        self.left_out.counts.update(data.skipped)
        images = self._first(data.images)
        colours = {k: v for image in images if self.colours for k, v in _colours(image).items()}
        asked = dev_questions(images, "locate", self.seed, colours)
        items = []
        turn: dict[int, int] = {}
        for each in asked:
            number = turn[each.image.image_id] = turn.get(each.image.image_id, 0) + 1
            text = each.text if self.guided else question_without_guide(each.text)
            items.append(
                Item(
                    id=f"{each.image.image_id}-{number}",
                    image=each.image.path,
                    image_id=each.image.image_id,
                    size=(each.image.width, each.image.height),
                    question=text,
                    regions=tuple(each.regions),
                    choices=choices_of(len(each.regions)) if self.choices else (),
                    expression=each.expression if self.calls else "",
                    truth=each.answer,
                    groups={"kind": each.kind, "category": each.category},
                    detail={"right": parse_region_answer(each.answer), "chance": 1 / len(each.regions)},
                )
            )
        if not items:
            raise DataError(f"{self.data}: no image has five objects or more; {data.report()}")
        return limited(items, self.limit)

    def _first(self, images: Sequence[ImageAnnotations]) -> Sequence[ImageAnnotations]:
        """The images up to the last that is asked about; one's questions follow from its place among all."""
        if self.limit <= 0:
            return images
        usable = (place for place, image in enumerate(images, 1) if len(View(image).askable) >= LOCATED_AMONG)
        return images[: max(islice(usable, self.limit), default=0)]

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        """Right is the region that the expression was written of."""
        statistics, rights = {}, {}
        for protocol, picked in chosen(items, answers).items():
            right = [number == item.detail["right"] for item, number in zip(items, picked, strict=True)]
            statistics[protocol] = choice_statistics(items, picked, right)
            rights[protocol] = [float(ok) for ok in right]
        return Result(
            task=self.name,
            pinned={
                "split": self.split,
                "expressions": f"of annotations, seed {self.seed}, {'with' if self.colours else 'no'} colours",
                "candidates": "five objects of the image, drawn by the seed, crowds aside",
                **{f"protocol {name}": RULES[name] for name in statistics},
            },
            protocols={name: figures(each, len(items), resamples, seed) for name, each in statistics.items()},
            breakdowns={
                name: means_by_group(items, ("kind", "category"), {"accuracy": each}) for name, each in rights.items()
            },
            rows=rows_of(items, answers, {f"{name}.accuracy": each for name, each in rights.items()}),
            notes=tuple(notes_of(self, items, answers)),
            statistics=statistics,
        )


def question_without_guide(text: str) -> str:
    """A question without the suffix that fixes the form of its answer."""
    guide = question("locate", 0, regions=[1], expression="x").removeprefix(
        question("locate", 0, regions=[1], expression="x", guided=False)
    )
    return text.removesuffix(guide)

"""Which of the candidate boxes does an expression of RefCOCOg mean?

Paper: §4.3, Table 5
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar, Final

from pydantic import Field

from regiongpt.data.convert.images import known_size
from regiongpt.errors import DataError
from regiongpt.evaluate.metrics.bootstrap import Statistic, mean_statistic
from regiongpt.evaluate.metrics.detection import ENOUGH, overlaps
from regiongpt.evaluate.paper import TABLES
from regiongpt.evaluate.task import RESAMPLES, Answer, Item, Result, Task
from regiongpt.evaluate.tasks.choosing import READS, RULES, choice_statistics, choices_of, chosen
from regiongpt.evaluate.tasks.proposals import candidates_of, read_proposals
from regiongpt.evaluate.tasks.refcocog_files import RefCocogFiles, each_expression
from regiongpt.evaluate.tasks.scoring import (
    box_area,
    figures,
    find,
    images_of,
    limited,
    means_by_group,
    notes_of,
    rows_of,
    size_name,
)
from regiongpt.prompts import question, region_answer
from regiongpt.regions import Region

INJECTED: Final = "ground truth injected"
BARE: Final = "without injection"


class RefCocogRec(Task):
    """One question an expression, among the proposals for its image.

    Where no proposal reaches an overlap of 0.5 with the object, the object's own box is added, as in the paper; such
    questions cannot be lost by the detector any more, so their share is reported. Without the injection the same
    questions have no right answer among the candidates and count as wrong: every other question is the same in both
    variants, so one run measures both.
    """

    name: ClassVar[str] = "refcocog_rec"
    summary: ClassVar[str] = "the box that an expression means, among proposals (Table 5)"
    item_id: ClassVar[str] = "sentence id"
    reads: ClassVar[tuple[str, ...]] = READS
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        f"generate, {INJECTED}": {"accuracy": TABLES["rec"].figure("val") / 100}
    }
    paper_source: ClassVar[str] = "Table 5, RefCOCOg val (test: 86.96), ground truth injected; proposals not published"

    split: str = "val"
    """Split of a refs(...).p; a json holds one split, which this names."""
    proposals: Path | None = None
    """Json array of detections: image_id, bbox (x, y, w, h), score."""
    refs: Path | None = None
    """refs(umd).p, a json in COCO's layout or json lines, wherever it is."""
    instances: Path | None = None
    """instances.json of the data set, wherever it is."""
    images: Path | None = None
    """Folder of the images, wherever it is."""
    top: int = Field(default=20, ge=0)
    """Most proposals an image, the best by score; 0 for all."""
    min_score: float = 0.0
    """Least score of a proposal; 0 for all."""
    guided: bool = True
    """End the question with the template of the answer."""
    choices: bool = True
    """Score all candidates too."""
    calls: bool = True
    """Ask of each candidate by itself, too, how likely it is called so."""

    @property
    def split_read(self) -> str:
        """Of ``refs(...).p``."""
        return self._files.split_read(self.split)

    @property
    def _files(self) -> RefCocogFiles:
        return RefCocogFiles(self.data, self.refs, self.instances, self.images)

    @property
    def _proposals(self) -> Path:
        names = [f"proposals_{self.split}.json", "proposals.json"]
        return find(self.proposals, self.data, names, "proposals", "proposals")

    def inputs(self) -> list[Path]:
        """Expressions, objects and proposals."""
        return [*self._files.inputs, self._proposals]

    def items(self) -> list[Item]:
        """One item an expression, in the order of the file."""
        self.left_out.counts.clear()
        files = self._files
        objects, folder = files.objects(self.split, self.left_out), files.folder
        images = {each.image_id: folder / each.file for each in objects}
        size = cache(lambda number: known_size(images[number]))
        found = read_proposals(self._proposals, set(images), self.top, self.min_score, self.left_out, size)
        items = []
        for each, number, text in each_expression(objects):
            proposed = found.boxes.get(each.image_id, ())
            boxes, lacking = candidates_of(each.box, proposed, True, (self.seed, each.image_id, number))
            agreement = overlaps(each.box, boxes)
            right = [k for k, overlap in enumerate(agreement.tolist(), 1) if overlap >= ENOUGH]
            items.append(
                Item(
                    id=str(number),
                    image=folder / each.file,
                    image_id=each.image_id,
                    size=each.size,
                    question=question(
                        "locate", 0, regions=range(1, len(boxes) + 1), expression=text, guided=self.guided
                    ),
                    regions=tuple(Region.box(*box) for box in boxes),
                    choices=choices_of(len(boxes)) if self.choices else (),
                    expression=text if self.calls else "",
                    truth=region_answer(int(agreement.argmax()) + 1),
                    groups={"size": size_name(box_area(each.box)), "injected": "yes" if lacking else "no"},
                    detail={"right": right, "injected": lacking, "chance": len(right) / len(boxes), "expression": text},
                )
            )
        if not items:
            raise DataError(f"{files.refs}: no expressions; {self.left_out.summary()}")
        return limited(items, self.limit)

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        """Right is a candidate whose overlap with the object is at least 0.5."""
        injected = [bool(item.detail["injected"]) for item in items]
        share = mean_statistic(images_of(items), [float(each) for each in injected])
        statistics: dict[str, dict[str, Statistic]] = {}
        rights: dict[str, list[float]] = {}
        for protocol, picked in chosen(items, answers).items():
            right = [number in item.detail["right"] for item, number in zip(items, picked, strict=True)]
            for variant in (INJECTED, BARE):
                name = f"{protocol}, {variant}"
                kept = [ok and (variant == INJECTED or not own) for ok, own in zip(right, injected, strict=True)]
                statistics[name] = choice_statistics(items, picked, kept)
                if variant == BARE:
                    del statistics[name]["chance"]
                else:
                    statistics[name]["injected_share"] = share
                rights[name] = [float(ok) for ok in kept]
        candidates = sum(len(item.regions) for item in items) / len(items)
        note = (
            f"{sum(injected)} of {len(items)} questions had no candidate with an overlap of {ENOUGH}; "
            f"{candidates:.1f} candidates a question on average"
        )
        these = f"at most {self.top} an image" if self.top else "all"
        if self.min_score:
            these += f" of a score of {self.min_score:g} or more"
        return Result(
            task=self.name,
            pinned={
                "split": f"RefCOCOg {self._files.partition} {self.split}",
                "candidates": f"{self._proposals.name}, {these}, order drawn by seed {self.seed}",
                "right": f"overlap with the object of at least {ENOUGH}",
                **{f"protocol {name}": rule for name, rule in RULES.items()},
                f"variant {INJECTED}": "the object's box is added where no candidate overlaps it enough",
                f"variant {BARE}": "the same questions, of which those count as wrong",
            },
            protocols={name: figures(each, len(items), resamples, seed) for name, each in statistics.items()},
            breakdowns={
                name: means_by_group(items, ("size", "injected"), {"accuracy": each}) for name, each in rights.items()
            },
            rows=rows_of(items, answers, {f"{name}.accuracy": each for name, each in rights.items()}),
            notes=(*notes_of(self, items, answers), note),
            statistics=statistics,
        )

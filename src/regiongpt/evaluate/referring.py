"""Words for regions: expressions to choose a proposal by, and captions. Paper: §4.2, §4.3, Tables 4 and 5."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple

import numpy as np
from pydantic import Field

from regiongpt.data.coco import annotated_box, read_annotation, read_score
from regiongpt.data.reading import APART, MALFORMED, Corners, is_whole, iter_array, overlaps
from regiongpt.data.refcoco import read_instances, read_json, read_pickle
from regiongpt.data.shards import Fault, Rejects, many
from regiongpt.data.visual_genome import VisualGenomeConverter
from regiongpt.errors import DataError, short
from regiongpt.evaluate.bootstrap import mean_statistic
from regiongpt.evaluate.caption_metrics import Metric, caption_scores, find_java
from regiongpt.evaluate.task import Answer, Item, Measured, Scored, Task, find, given, images_of, size_name
from regiongpt.prompts import NO_MATCH, parse_region_answer, question, region_answer
from regiongpt.regions import Region
from regiongpt.storage import read_json as load_json

ENOUGH: Final = 0.5
"""Least IoU for a box to count as the object (paper §4.3)."""
PROTOCOLS: Final = {"generate": "text", "score all choices": "scores"}
"""By what is scored: the generated ``Region [x]``, or the most probable of these answers and that of no match."""
_REFS: Final = ("refcocog/refs(umd).p", "refs(umd).p", "refcocog/refs(google).p", "refs(google).p")
_INSTANCES: Final = ("refcocog/instances.json", "instances.json")
_FOLDERS: Final = ("train2014", "images/mscoco/images/train2014", "coco/train2014", "images", ".")


class Referred(NamedTuple):
    """One object with the expressions that refer to it, each with its id."""

    place: dict[str, Any]  # image, image_id and size of an item
    ann_id: int
    box: Corners
    category: str
    expressions: Sequence[tuple[int, str]]


class RefCocogTask(Task):
    """A benchmark on the files of RefCOCOg."""

    split: str = "val"
    """Split of refs(...).p; a JSON file holds only one, which this names."""
    refs: Path | None = None
    """refs(umd).p or a JSON file in COCO's format, if not in the folder."""
    images: Path | None = None
    """Folder of the images, if not in the folder."""

    def inputs(self) -> list[Path]:
        """Expressions and objects."""
        refs = find(self.refs, self.data, _REFS, "refs")
        return [refs, find(None, self.data, _INSTANCES, "data")] if refs.suffix == ".p" else [refs]

    def objects(self) -> list[Referred]:
        """The objects of the split, in the order of the file; DataError if there are none."""
        path, *instances = self.inputs()
        rejects, folder = self.left_out, find(self.images, self.data, _FOLDERS, "images", file=False)
        if path.suffix == ".p":
            refs = read_pickle(path, self.split, rejects)
            scenes = read_instances(instances[0], set(refs), rejects)
        else:
            refs, scenes = read_json(path, "refcocog", rejects)
        found: list[Referred] = []
        for image_id, ann_id, said in ((k, *each) for k, those in refs.items() for each in those.items()):
            scene = scenes.get(image_id)
            if scene is None or ann_id not in scene.objects:
                rejects.add(APART, path, ann_id, "expected the object in the instances, found none")
                continue
            one = scene.objects[ann_id]
            place = {"image": folder / scene.path, "image_id": image_id, "size": (scene.width, scene.height)}
            found.append(Referred(place, ann_id, one.box, one.category, said))
        if not found:
            raise DataError(f"{path}: no objects of the split {self.split!r}; {rejects.summary()}")
        return found


class RefCocogRec(RefCocogTask):
    """One question per expression, among the proposals of its image.

    Where none overlaps the object by 0.5, the object's own box is added, as in the paper; a result of its own counts
    these questions as wrong.
    """

    name: ClassVar[str] = "refcocog_rec"
    summary: ClassVar[str] = "the box that an expression refers to, among proposals (Table 5)"
    by: ClassVar[tuple[str, ...]] = ("size", "injected")

    proposals: Path | None = None
    """JSON array of detections: image_id, bbox (x, y, w, h), score."""
    top: int = Field(default=20, ge=0)
    """Most proposals per image, the best by score; 0 for all."""
    seed: int = Field(default=0, ge=0)
    """Random seed."""

    def inputs(self) -> list[Path]:
        """Expressions, objects and proposals."""
        names = [f"proposals_{self.split}.json", "proposals.json"]
        return [*super().inputs(), find(self.proposals, self.data, names, "proposals")]

    def read_items(self) -> list[Item]:
        """One item per expression, in the order of the file."""
        objects = self.objects()
        sizes = {each.place["image_id"]: each.place["size"] for each in objects}
        proposed = read_proposals(self.inputs()[-1], sizes, self.top, self.left_out)
        items = []
        for each, (number, text) in [(one, said) for one in objects for said in one.expressions]:
            image_id = each.place["image_id"]
            boxes, lacking = candidates_of(each.box, proposed.get(image_id, ()), (self.seed, image_id, number))
            agreement = overlaps(each.box, boxes)
            right = (np.flatnonzero(agreement >= ENOUGH) + 1).tolist()
            items.append(
                Item(
                    id=str(number),
                    **each.place,
                    question=question("locate", 0, regions=range(1, len(boxes) + 1), expression=text),
                    regions=tuple(Region.box(*box) for box in boxes),
                    choices=(*map(region_answer, range(1, len(boxes) + 1)), NO_MATCH),
                    truth=region_answer(int(agreement.argmax()) + 1),
                    groups={"size": size_name(each.box), "injected": "yes" if lacking else "no"},
                    detail={"right": right, "injected": lacking, "chance": len(right) / len(boxes)},
                )
            )
        return items

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """A candidate with an IoU of at least 0.5 with the object is correct."""
        injected = [bool(item.detail["injected"]) for item in items]
        protocols = {}
        for protocol, kind in PROTOCOLS.items():
            said = given(items, answers, kind)
            if all(each is None for each in said):
                continue
            picked = [_choice(each, len(item.regions)) for each, item in zip(said, items, strict=True)]
            right = [number in item.detail["right"] for item, number in zip(items, picked, strict=True)]
            results = {
                "accuracy": [float(each) for each in right],
                "without_injection": [float(ok and not own) for ok, own in zip(right, injected, strict=True)],
                "chance": [item.detail["chance"] for item in items],
                "no_match": [float(each == "none") for each in picked],
                "invalid": [float(each == "invalid") for each in picked],
            }
            statistics = {name: mean_statistic(images_of(items), values) for name, values in results.items()}
            protocols[protocol] = Scored(statistics=statistics, scores={"accuracy": results["accuracy"]})
        refs, *_, proposals = self.inputs()
        these = f"at most {self.top} an image" if self.top else "all"
        return Measured(
            protocols=protocols,
            pinned={
                "split": f"RefCOCOg {self.split} of {refs.name}",
                "candidates": f"{proposals.name}, {these}, order drawn by seed {self.seed}",
                "injection": "the object's box is added where none overlaps it enough",
                "right": f"overlap with the object of at least {ENOUGH}",
            },
            notes=[f"the object's box was added to {sum(injected)} of {many(len(items), 'question')}"],
        )


def _choice(said: str | Sequence[float] | None, count: int) -> int | str:
    """The number of the region chosen, "none", or "invalid", also without an answer."""
    if said is None:
        return "invalid"
    number = parse_region_answer(said) if isinstance(said, str) else int(np.argmax(said)) + 1
    if number is None or (number == count + 1 and not isinstance(said, str)):  # the last score is of none
        return "none"
    return number if isinstance(number, int) and number <= count else "invalid"


def read_proposals(
    path: Path, sizes: Mapping[int, tuple[int, int]], top: int, rejects: Rejects
) -> dict[int, list[Corners]]:
    """The ``top`` best boxes (xyxy in pixels; 0 for all) of each image, by its id, from a JSON array of detections."""
    found: dict[int, list[tuple[float, Corners]]] = {}
    for place, entry in enumerate(iter_array(path)):
        with rejects.noting(path, place):
            row, score = read_annotation(entry), read_score(entry)
            if row.image is None or row.box is None or score is None:
                wanted = "expected image_id, a score, and a bbox of four numbers or a segmentation"
                raise Fault(MALFORMED, f"{wanted}, got {short(entry)}")
            if row.image in sizes:
                found.setdefault(row.image, []).append((score, annotated_box(row.box, *sizes[row.image])))
    if not found:
        raise DataError(f"{path}: no candidates of these images; {rejects.summary()}; is the file of another split?")
    for those in found.values():
        those.sort(key=lambda each: -each[0])
    return {number: [box for _, box in those[: top or None]] for number, those in found.items()}


def candidates_of(truth: Corners, proposed: Sequence[Corners], seed: tuple[int, ...]) -> tuple[list[Corners], bool]:
    """The boxes to choose among, in drawn order, and whether none overlapped the truth by 0.5, which was then added.

    Paper: §4.3
    """
    lacking = not proposed or bool(overlaps(truth, proposed).max() < ENOUGH)
    boxes = [*proposed, truth] if lacking else list(proposed)
    order = np.random.default_rng(seed).permutation(len(boxes)).tolist()
    return [boxes[k] for k in order], lacking


# ---------------------------------------------------------------------------------------------------------------------
# Captions

SCORERS: Final = "pycocoevalcap 1.2: METEOR 1.5 (-l en -norm), CIDEr, ROUGE-L, BLEU (closest reference length)"
TOKENIZER: Final = "Penn Treebank tokenizer of CoreNLP 3.4.1, lower case, punctuation dropped"


class CaptionTask(Task):
    """Asks for a caption of each region; a subclass reads the regions and their references."""

    by: ClassVar[tuple[str, ...]] = ("size", "category")

    metrics: tuple[Metric, ...] = Field(default=("METEOR", "CIDEr", "ROUGE_L", "BLEU"), min_length=1)
    """Metrics: METEOR, CIDEr, ROUGE_L, BLEU."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest caption, in tokens."""

    def item(
        self, number: str, box: Sequence[float], references: Sequence[str], category: str = "", **place: Any
    ) -> list[Item]:
        """The question about a box (xyxy in pixels) of an image, the ``place``; none where no reference has a word."""
        worded = [text for text in references if any(map(str.isalnum, text))]
        self.left_out.counts["reference without words"] += len(references) - len(worded)
        item = Item(
            id=number,
            question=question("caption", 0, regions=[1]),
            regions=(Region.box(*box),),
            max_new_tokens=self.max_new_tokens,
            truth=next(iter(worded), ""),
            groups={"size": size_name(box), **({"category": category} if category else {})},
            detail={"references": worded},
            **place,
        )
        return [item] if worded else []

    @abstractmethod
    def references(self) -> dict[str, str]:
        """The split, and what the captions are compared with."""

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """The metrics over all items; one without an answer is the empty caption."""
        texts = [text or "" for text in given(items, answers, "text")]
        found = caption_scores(
            texts, [item.detail["references"] for item in items], metrics=self.metrics, clusters=images_of(items)
        )
        empty = sum(not any(map(str.isalnum, text)) for text in texts)
        # METEOR and BLEU of a set are no means of the items' scores, and differ a little.
        scored = Scored(
            statistics={name: each.statistic for name, each in found.items()},
            scores={name: each.items.tolist() for name, each in found.items()},
        )
        return Measured(
            protocols={"generate": scored},
            pinned={**self.references(), "tokenizer": TOKENIZER, "scorer": SCORERS},
            notes=[f"{many(empty, 'caption')} without a word, of the score 0"] if empty else [],
        )


class RefCocogCaption(RefCocogTask, CaptionTask):
    """One caption per object, or per expression; published results use both and seldom say which."""

    name: ClassVar[str] = "refcocog_caption"
    summary: ClassVar[str] = "captions of RefCOCOg's objects: METEOR and CIDEr (Table 4)"

    grouping: Literal["object", "expression"] = "object"
    """Group references by object, or use each expression by itself."""

    def read_items(self) -> list[Item]:
        """One item per object or expression, in the order of the file."""
        find_java()  # what is missing is better said now than after all the answers
        items: list[Item] = []
        for each in self.objects():
            said = [(number, [text]) for number, text in each.expressions]
            if self.grouping == "object":
                said = [(each.ann_id, [text for _, text in each.expressions])]
            for number, texts in said:
                items += self.item(str(number), each.box, texts, each.category, **each.place)
        return items

    def references(self) -> dict[str, str]:
        """The file of expressions, and how they are grouped."""
        split = f"RefCOCOg {self.split} of {self.inputs()[0].name}"
        return {"split": split, "references": f"grouped by {self.grouping}"}


class VisualGenomeCaption(CaptionTask):
    """One caption per region of the images of a split, which a file lists."""

    name: ClassVar[str] = "vg_caption"
    summary: ClassVar[str] = "captions of Visual Genome's regions: METEOR and CIDEr (Table 4)"

    split: str = "test"
    """Split in the splits file."""
    splits: Path | None = None
    """JSON of image ids by split, such as densecap_splits.json; default: all images."""
    images: Path | None = None
    """Folder with VG_100K and VG_100K_2, if not in the folder."""

    def inputs(self) -> list[Path]:
        """Regions, images' sizes and splits."""
        names = "region_descriptions.json", "image_data.json"
        return [*(find(None, self.data, [name], "data") for name in names), *([self.splits] if self.splits else [])]

    def read_items(self) -> list[Item]:
        """One a region, by image and region id."""
        find_java()
        regions, image_data = self.inputs()[:2]
        folder = find(self.images, self.data, ["images", "."], "images", file=False)
        splits = load_json(self.splits) if self.splits else {}
        wanted = splits.get(self.split) if isinstance(splits, dict) else None
        if self.splits and not (wanted and isinstance(wanted, list) and all(map(is_whole, wanted))):
            raise DataError(f"{self.splits}: no image ids under {self.split!r}; give another --splits or --split")
        reader = VisualGenomeConverter(
            images=folder, regions=regions, image_data=image_data, boxes_per_image=0, check_images=False
        )
        items: list[Item] = []
        kept = set(wanted or ())
        for record in reader.records(self.left_out):
            image_id = int(record.id.rsplit("/", 1)[-1])
            if kept and image_id not in kept:
                continue
            place: Any = {"image": folder / record.image, "image_id": image_id, "size": (record.width, record.height)}
            asked = [(record.regions[turn.regions[0] - 1], turn.answer) for turn in record.turns]
            for region, phrase in sorted(asked, key=lambda each: int(each[0].source_id)):
                items += self.item(region.source_id, region.region.to_dict()["box"], [phrase], **place)
        if not items:
            raise DataError(f"{regions}: no regions of the split {self.split!r}; {self.left_out.summary()}")
        return items

    def references(self) -> dict[str, str]:
        """The images of the split, and their phrases."""
        split = f"{self.split} of {self.splits.name}" if self.splits else "all images of the file"
        return {"split": f"Visual Genome, {split}", "references": "the one phrase of each region"}

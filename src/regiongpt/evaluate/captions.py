"""Short descriptions of regions, scored against human ones: RefCOCOg and Visual Genome.

Paper: §4.2, Table 4
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from regiongpt.data.reading import is_whole
from regiongpt.data.shards import many
from regiongpt.data.visual_genome import VisualGenomeConverter
from regiongpt.errors import DataError
from regiongpt.evaluate.caption_metrics import Metric, caption_scores, find_java
from regiongpt.evaluate.refcocog import RefCocogTask
from regiongpt.evaluate.task import Answer, Item, Measured, Scored, Task, find, given, images_of, size_name
from regiongpt.prompts import question
from regiongpt.regions import Region
from regiongpt.storage import read_json

PROTOCOL: Final = "generate"
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
            protocols={PROTOCOL: scored},
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
        splits = read_json(self.splits) if self.splits else {}
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

"""Short descriptions of regions, scored against human ones: RefCOCOg and Visual Genome.

Paper: §4.2, Table 4
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal, NamedTuple

from pydantic import Field

from regiongpt.data.reading import is_whole
from regiongpt.data.shards import many
from regiongpt.data.visual_genome import VisualGenomeConverter
from regiongpt.errors import DataError
from regiongpt.evaluate.caption_metrics import Metric, caption_scores, find_java, scored_words
from regiongpt.evaluate.choosing import RefCocogTask
from regiongpt.evaluate.task import (
    Answer,
    Item,
    Measured,
    Scored,
    Task,
    find,
    given,
    images_of,
    printed,
    size_name,
)
from regiongpt.prompts import question
from regiongpt.regions import Region
from regiongpt.storage import read_json

PROTOCOL: Final = "generate"
SCORERS: Final = {
    "CIDEr": "CIDEr of pycocoevalcap 1.2 (mean of n-grams 1 to 4, sigma 6, document frequencies of these references)",
    "METEOR": "METEOR 1.5 (-l en -norm), summed over the set",
    "ROUGE_L": "ROUGE-L of pycocoevalcap 1.2 (beta 1.2)",
    "BLEU": "BLEU of pycocoevalcap 1.2 (closest reference length)",
}
_GROUPED: Final = {
    "object": "all expressions of an object are the references of its one caption",
    "expression": "each expression is an item of its own, with itself as its only reference",
}


class Described(NamedTuple):
    """A region, its box xyxy in pixels, the annotated size of its image, and what people said of it."""

    id: str
    image: Path
    image_id: int
    size: tuple[int, int] | None
    box: Sequence[float]
    references: Sequence[str]
    category: str = ""


class CaptionTask(Task):
    """Asks for a caption of each region; a subclass reads the regions and their references."""

    by: ClassVar[tuple[str, ...]] = ("size", "category")

    metrics: tuple[Metric, ...] = Field(default=("METEOR", "CIDEr", "ROUGE_L", "BLEU"), min_length=1)
    """Metrics: METEOR, CIDEr, ROUGE_L, BLEU."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest caption, in tokens."""

    @abstractmethod
    def regions_described(self) -> list[Described]:
        """The regions to describe, with their human captions."""

    @abstractmethod
    def pinned(self) -> dict[str, str]:
        """Split and grouping of the references."""

    def read_items(self) -> list[Item]:
        """One item per region that has a reference with words."""
        find_java()  # what is missing is better said now than after all the answers
        described = self.regions_described()
        words = iter(scored_words([text for each in described for text in each.references]))
        items = []
        for each in described:
            worded = []
            for text in each.references:
                if next(words):
                    worded.append(text)
                else:
                    self.left_out.add("reference without words", self.inputs()[0], each.id, f"no word in {text!r}")
            if not worded:
                continue
            items.append(
                Item(
                    id=each.id,
                    image=each.image,
                    image_id=each.image_id,
                    size=each.size,
                    question=question("caption", 0, regions=[1]),
                    regions=(Region.box(*each.box),),
                    max_new_tokens=self.max_new_tokens,
                    truth=worded[0],
                    groups={"size": size_name(each.box), **({"category": each.category} if each.category else {})},
                    detail={"references": worded},
                )
            )
        return items

    def measure(self, items: Sequence[Item], answers: Mapping[str, Answer]) -> Measured:
        """The metrics over all items; one without an answer is the empty caption."""
        texts = [text or "" for text in given(items, answers, "text")]
        references = [list(item.detail["references"]) for item in items]
        found = caption_scores(texts, references, metrics=self.metrics, clusters=images_of(items))
        empty = sum(not any(map(str.isalnum, text)) for text in texts)
        # METEOR and BLEU of a set are no means of the items' scores, and differ a little.
        scored = Scored(
            statistics={name: each.statistic for name, each in found.items()},
            scores={name: each.items.tolist() for name, each in found.items()},
        )
        words = "Penn Treebank tokenizer of CoreNLP 3.4.1, lower case, punctuation dropped"
        return Measured(
            protocols={PROTOCOL: scored},
            pinned={**self.pinned(), "tokenizer": words, **{f"scorer {name}": SCORERS[name] for name in self.metrics}},
            notes=[f"{many(empty, 'caption')} without a word, of the score 0"] if empty else [],
        )


class RefCocogCaption(RefCocogTask, CaptionTask):
    """One caption per object, or per expression; published results use both and seldom say which."""

    name: ClassVar[str] = "refcocog_caption"
    summary: ClassVar[str] = "captions of RefCOCOg's objects: METEOR and CIDEr (Table 4)"
    item_id: ClassVar[str] = "annotation id"
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        PROTOCOL: printed("refcocog_caption", METEOR="METEOR", CIDEr="CIDEr")
    }

    grouping: Literal["object", "expression"] = "object"
    """Group references by object, or use each expression by itself."""

    def pinned(self) -> dict[str, str]:
        """Partition, split and grouping."""
        return {"split": self.part, "references": _GROUPED[self.grouping]}

    def regions_described(self) -> list[Described]:
        """One item per object or expression, in the order of the file."""
        found = []
        for each in self.objects():
            said = [(number, [text]) for number, text in each.expressions]
            if self.grouping == "object":
                said = [(each.ann_id, [text for _, text in each.expressions])]
            place = self.folder / each.file, each.image_id, each.size, each.box
            found += [Described(str(number), *place, texts, each.category) for number, texts in said]
        return found


class VisualGenomeCaption(CaptionTask):
    """One caption per region of the images of a split, which a file lists."""

    name: ClassVar[str] = "vg_caption"
    summary: ClassVar[str] = "captions of Visual Genome's regions: METEOR and CIDEr (Table 4)"
    item_id: ClassVar[str] = "region id"
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        PROTOCOL: printed("vg_caption", METEOR="METEOR", CIDEr="CIDEr")
    }

    split: str = "test"
    """Split in the splits file."""
    regions: Path | None = None
    """region_descriptions.json, if not in the folder."""
    image_data: Path | None = None
    """image_data.json, if not in the folder."""
    splits: Path | None = None
    """JSON of image ids by split, such as densecap_splits.json; default: all images."""
    images: Path | None = None
    """Folder with VG_100K and VG_100K_2, if not in the folder."""

    def inputs(self) -> list[Path]:
        """Regions, images' sizes and splits."""
        found = [
            find(self.regions, self.data, ["region_descriptions.json"], "regions", "regions"),
            find(self.image_data, self.data, ["image_data.json"], "sizes of images", "image-data"),
        ]
        return [*found, self.splits] if self.splits is not None else found

    def pinned(self) -> dict[str, str]:
        """Split and grouping."""
        split = f"{self.split} of {self.splits.name}" if self.splits is not None else "all images of the file"
        return {"split": f"Visual Genome, {split}", "references": "the one phrase of each region"}

    def regions_described(self) -> list[Described]:
        """One a region, by image and region id."""
        regions, image_data = self.inputs()[:2]
        folder = find(self.images, self.data, ["images", "."], "images", "images", file=False)
        wanted = _split_of(self.splits, self.split) if self.splits is not None else None
        reader = VisualGenomeConverter(
            images=folder, regions=regions, image_data=image_data, boxes_per_image=0, check_images=False
        )
        found: list[Described] = []
        for record in reader.records(self.left_out):
            image_id = int(record.id.rsplit("/", 1)[-1])
            if wanted is not None and image_id not in wanted:
                continue
            asked = [(record.regions[turn.regions[0] - 1], turn.answer) for turn in record.turns]
            for region, phrase in sorted(asked, key=lambda each: int(each[0].source_id)):
                size, box = (record.width, record.height), region.region.to_dict()["box"]
                found.append(Described(region.source_id, folder / record.image, image_id, size, box, [phrase]))
        if not found:
            raise DataError(f"{regions}: no regions of the split {self.split!r}; {self.left_out.summary()}")
        return found


def _split_of(path: Path, split: str) -> set[int]:
    """The image ids of a split; DataError where the file has no such list."""
    splits = read_json(path)
    numbers = splits.get(split) if isinstance(splits, dict) else None
    if not numbers or not isinstance(numbers, list) or not all(map(is_whole, numbers)):
        raise DataError(f"{path}: expected a list of image ids under {split!r}; give another --splits or --split")
    return set(numbers)

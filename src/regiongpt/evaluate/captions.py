"""One short description a region, scored against people's: RefCOCOg and Visual Genome.

Paper: §4.2, Table 4
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple

from pydantic import Field

from regiongpt.data.reading import is_whole, iter_array
from regiongpt.data.shards import Rejects, many
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
    box_area,
    find,
    given,
    images_of,
    printed,
    size_name,
)
from regiongpt.prompts import question
from regiongpt.regions import Region

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
    "region": "each region is an item of its own, with its one phrase as the only reference",
    "box": "regions of one image with the same box are one item, with all their phrases as references",
}


class Described(NamedTuple):
    """A region, its box xyxy in pixels, with what people said of it, and the annotated size of its image."""

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
    """Which metrics to compute: METEOR, CIDEr, ROUGE_L, BLEU."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest caption, in tokens."""

    @abstractmethod
    def regions_described(self) -> list[Described]:
        """The regions to be described, with what people said of them."""

    @abstractmethod
    def pinned(self) -> dict[str, str]:
        """Split and grouping of the references."""

    def read_items(self) -> list[Item]:
        """One item a region, except those of which no reference has a word."""
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
                    groups={
                        "size": size_name(box_area(each.box)),
                        **({"category": each.category} if each.category else {}),
                    },
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
    """One caption an object, or one for each of its expressions; published results use both and seldom say which."""

    name: ClassVar[str] = "refcocog_caption"
    summary: ClassVar[str] = "captions of RefCOCOg's objects: METEOR and CIDEr (Table 4)"
    item_id: ClassVar[str] = "annotation id"
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        PROTOCOL: printed("refcocog_caption", METEOR="METEOR", CIDEr="CIDEr")
    }
    paper_source: ClassVar[str] = "Table 4, RefCOCOg; the paper names neither split nor grouping of the references"

    grouping: Literal["object", "expression"] = "object"
    """How references are grouped: those of an object together, or each expression by itself."""

    def pinned(self) -> dict[str, str]:
        """Partition, split and grouping."""
        split = self.split if self._refs.suffix == ".p" else self._refs.name
        return {"split": f"RefCOCOg {self.partition} {split}", "references": _GROUPED[self.grouping]}

    def regions_described(self) -> list[Described]:
        """One an object or an expression, in the order of the file."""
        return [
            Described(number, self.folder / each.file, each.image_id, each.size, each.box, said, each.category)
            for each in self.objects()
            for number, said in (
                [(str(each.ann_id), [text for _, text in each.expressions])]
                if self.grouping == "object"
                else [(str(number), [text]) for number, text in each.expressions]
            )
        ]


class VisualGenomeCaption(CaptionTask):
    """One caption a region of the images of a split, which a file lists."""

    name: ClassVar[str] = "vg_caption"
    summary: ClassVar[str] = "captions of Visual Genome's regions: METEOR and CIDEr (Table 4)"
    item_id: ClassVar[str] = "region id"
    paper: ClassVar[Mapping[str, Mapping[str, float]]] = {
        PROTOCOL: printed("vg_caption", METEOR="METEOR", CIDEr="CIDEr")
    }
    paper_source: ClassVar[str] = "Table 4, Visual Genome; the paper names neither split nor number of regions"

    split: str = "test"
    """Split of the file of splits."""
    regions: Path | None = None
    """region_descriptions.json, wherever it is."""
    image_data: Path | None = None
    """image_data.json, wherever it is."""
    splits: Path | None = None
    """Json of image ids by split, such as densecap_splits.json; without one, all images."""
    images: Path | None = None
    """Folder with VG_100K and VG_100K_2, wherever it is."""
    grouping: Literal["region", "box"] = "region"
    """How references are grouped: each region by itself, or regions with the same box together."""

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
        return {"split": f"Visual Genome, {split}", "references": _GROUPED[self.grouping]}

    def regions_described(self) -> list[Described]:
        """One a region or a box, by image and region id."""
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
            parts = [(record.regions[turn.regions[0] - 1], turn.answer) for turn in record.turns]
            asked: dict[Any, tuple[str, Sequence[float], list[str]]] = {}
            for region, phrase in sorted(parts, key=lambda part: int(part[0].source_id)):
                box = region.region.to_dict()["box"]
                key = region.source_id if self.grouping == "region" else tuple(box)
                asked.setdefault(key, (region.source_id, box, []))[2].append(phrase)
            found += [
                Described(number, folder / record.image, image_id, (record.width, record.height), box, phrases)
                for number, box, phrases in asked.values()
            ]
        if not found:
            raise DataError(f"{regions}: no regions of the split {self.split!r}; {self.left_out.summary()}")
        return found


def _split_of(path: Path, split: str) -> set[int]:
    """The image ids of a split; DataError where the file has no such list."""
    rejects = Rejects()
    try:
        numbers = list(iter_array(path, split, rejects))
    except DataError as error:
        raise DataError(f"{error}; the file of splits needs a list of image ids by split") from None
    if rejects.counts or not numbers or not all(is_whole(number) for number in numbers):
        raise DataError(f"{path}: {split!r} is no list of image ids as whole numbers; give another file")
    return set(numbers)

"""What the captioning tasks share: one short description a region, scored against people's.

Paper: §4.2, Table 4
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from regiongpt.data.convert.base import option
from regiongpt.errors import ConfigError
from regiongpt.evaluate.metrics.captions import METRICS, CaptionScore, caption_scores
from regiongpt.evaluate.metrics.java import find_java, find_spice, scored_words
from regiongpt.evaluate.task import RESAMPLES, Answer, Figure, Item, Result, Task
from regiongpt.evaluate.tasks.scoring import (
    SIZES,
    by_group,
    figure,
    images_of,
    limited,
    mean_figure,
    missing_notes,
    rows_of,
    size_name,
)
from regiongpt.prompts import question
from regiongpt.regions import Region

PROTOCOL = "generate"
SCORERS = {
    "CIDEr": "CIDEr of pycocoevalcap 1.2 (mean of n-grams 1 to 4, sigma 6, document frequencies of these references)",
    "METEOR": "METEOR 1.5 (-l en -norm), summed over the set",
    "ROUGE_L": "ROUGE-L of pycocoevalcap 1.2 (beta 1.2)",
    "BLEU": "BLEU of pycocoevalcap 1.2 (closest reference length)",
    "SPICE": "SPICE 1.0",
}


class Described(NamedTuple):
    """A region with what people said of it.

    Attributes:
        id: Of the item.
        image: File.
        image_id: Of the image.
        size: Width and height of the image in pixels, as the annotations say it.
        box: xyxy in pixels.
        references: Texts.
        category: Of the region, where it is known.
    """

    id: str
    image: Path
    image_id: int
    size: tuple[int, int] | None
    box: Sequence[float]
    references: Sequence[str]
    category: str = ""


@dataclass(frozen=True, kw_only=True)
class CaptionTask(Task):
    """Asks for a caption of each region; a subclass reads the regions and their references."""

    metrics: str = option(
        f"by commas: {', '.join(METRICS)}; METEOR and SPICE need Java", default="METEOR,CIDEr,ROUGE_L,BLEU"
    )
    max_new_tokens: int = option("longest caption, in tokens", default=64)

    def __post_init__(self) -> None:
        for name in self._metrics:
            if name not in METRICS:
                raise ConfigError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
        if not self._metrics:
            raise ConfigError(f"metrics: expected some of {', '.join(METRICS)}, got none")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}")

    @property
    def _metrics(self) -> list[str]:
        return [name.strip() for name in self.metrics.split(",") if name.strip()]

    @abstractmethod
    def regions_described(self) -> list[Described]:
        """The regions to be described, with what people said of them."""

    @abstractmethod
    def pinned(self) -> dict[str, str]:
        """Split and grouping of the references."""

    def load(self) -> list[Item]:
        """One item a region, but those of which no reference has a word."""
        # What is missing is better said now than after all the answers.
        find_java()
        if "SPICE" in self._metrics:
            find_spice()
        self.left_out.counts.clear()
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
            if worded:
                items.append(self._item(each, worded))
        return limited(items, self.limit)

    def _item(self, each: Described, references: list[str]) -> Item:
        area = (each.box[2] - each.box[0]) * (each.box[3] - each.box[1])
        return Item(
            id=each.id,
            image=each.image,
            image_id=each.image_id,
            size=each.size,
            question=question("caption", 0, regions=[1]),
            regions=(Region.box(*each.box),),
            max_new_tokens=self.max_new_tokens,
            truth=references[0],
            groups={"size": size_name(area), **({"category": each.category} if each.category else {})},
            detail={"references": references},
        )

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        """The metrics over all items; one without an answer is the empty caption."""
        texts = [(a.text or "") if (a := answers.get(item.id)) is not None else "" for item in items]
        references = [list(item.detail["references"]) for item in items]
        found = caption_scores(texts, references, metrics=self._metrics, clusters=images_of(items))
        figures = {name: figure(each.statistic, len(items), resamples, seed) for name, each in found.items()}
        notes = missing_notes(items, answers, self.item_id)
        if empty := sum(not any(map(str.isalnum, text)) for text in texts):
            notes.append(f"{empty} captions have no word and score 0")
        if self.left_out.counts:
            notes.append(f"annotations not asked about: {self.left_out.summary()}")
        return Result(
            task=self.name,
            pinned={
                **self.pinned(),
                "tokenizer": "Penn Treebank tokenizer of CoreNLP 3.4.1, lower case, punctuation dropped",
                **{f"scorer {name}": SCORERS[name] for name in self._metrics},
            },
            protocols={PROTOCOL: figures},
            breakdowns={PROTOCOL: _breakdowns(items, found)},
            rows=rows_of(items, answers, {f"{PROTOCOL}.{name}": each.items.tolist() for name, each in found.items()}),
            notes=tuple(notes),
            statistics={PROTOCOL: {name: each.statistic for name, each in found.items()}},
        )


def _breakdowns(items: Sequence[Item], found: Mapping[str, CaptionScore]) -> dict[str, dict[str, Mapping[str, Figure]]]:
    """Means of the items' own scores: those of METEOR and BLEU over a set are no means, and differ a little."""

    def measure(places: list[int]) -> dict[str, Figure]:
        return {name: mean_figure(items, each.items.tolist(), places) for name, each in found.items()}

    parts = {"size": by_group(items, "size", measure, [name for name, _ in SIZES])}
    if any("category" in item.groups for item in items):
        parts["category"] = by_group(items, "category", measure)
    return parts

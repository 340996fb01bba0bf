"""What the captioning tasks share: one short description a region, scored against people's.

Paper: §4.2, Table 4
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from regiongpt.evaluate.metrics.captions import METRICS, caption_scores
from regiongpt.evaluate.metrics.java import find_java, find_spice, scored_words
from regiongpt.evaluate.task import RESAMPLES, Answer, Item, Result, Task
from regiongpt.evaluate.tasks.scoring import (
    box_area,
    figures,
    given,
    images_of,
    limited,
    means_by_group,
    notes_of,
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


class CaptionTask(Task):
    """Asks for a caption of each region; a subclass reads the regions and their references."""

    metrics: str = "METEOR,CIDEr,ROUGE_L,BLEU"
    """Joined by commas: CIDEr, METEOR, ROUGE_L, BLEU, SPICE."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest caption, in tokens."""

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, value: str) -> str:
        names = _names(value)
        if not names or not set(names) <= set(METRICS):
            raise ValueError(f"give some of {', '.join(METRICS)}, joined by commas")
        return value

    @abstractmethod
    def regions_described(self) -> list[Described]:
        """The regions to be described, with what people said of them."""

    @abstractmethod
    def pinned(self) -> dict[str, str]:
        """Split and grouping of the references."""

    def items(self) -> list[Item]:
        """One item a region, but those of which no reference has a word."""
        # What is missing is better said now than after all the answers.
        find_java()
        if "SPICE" in _names(self.metrics):
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
        return Item(
            id=each.id,
            image=each.image,
            image_id=each.image_id,
            size=each.size,
            question=question("caption", 0, regions=[1]),
            regions=(Region.box(*each.box),),
            max_new_tokens=self.max_new_tokens,
            truth=references[0],
            groups={"size": size_name(box_area(each.box)), **({"category": each.category} if each.category else {})},
            detail={"references": references},
        )

    def score(
        self, items: Sequence[Item], answers: Mapping[str, Answer], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> Result:
        """The metrics over all items; one without an answer is the empty caption."""
        texts = [text or "" for text in given(items, answers, "text")]
        metrics = _names(self.metrics)
        references = [list(item.detail["references"]) for item in items]
        found = caption_scores(texts, references, metrics=metrics, clusters=images_of(items))
        statistics = {name: each.statistic for name, each in found.items()}
        scores = {name: each.items.tolist() for name, each in found.items()}
        notes = notes_of(self, items, answers)
        if empty := sum(not any(map(str.isalnum, text)) for text in texts):
            notes.append(f"{empty} captions have no word and score 0")
        return Result(
            task=self.name,
            pinned={
                **self.pinned(),
                "tokenizer": "Penn Treebank tokenizer of CoreNLP 3.4.1, lower case, punctuation dropped",
                **{f"scorer {name}": SCORERS[name] for name in metrics},
            },
            protocols={PROTOCOL: figures(statistics, len(items), resamples, seed)},
            # Means of the items' own scores: those of METEOR and BLEU over a set are no means, and differ a little.
            breakdowns={PROTOCOL: means_by_group(items, ("size", "category"), scores)},
            rows=rows_of(items, answers, {f"{PROTOCOL}.{name}": each for name, each in scores.items()}),
            notes=tuple(notes),
            statistics={PROTOCOL: statistics},
        )


def _names(metrics: str) -> list[str]:
    return [name.strip() for name in metrics.split(",") if name.strip()]

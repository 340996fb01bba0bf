"""What a run makes of its store: the table of all captions, records to train on, exports, a data card and a page."""

import itertools
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from markupsafe import Markup

from regiongpt import charts
from regiongpt.annotate.engine import Ask, Keys
from regiongpt.annotate.filters import Decision, Filters, judge, words
from regiongpt.annotate.prompts import MODES, Closeup
from regiongpt.annotate.source import Item, Source
from regiongpt.annotate.store import Store
from regiongpt.data.convert.values import words_alone
from regiongpt.data.records import Record, Turn, region_row
from regiongpt.data.shards import Rejects, write_records
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.report import picture, write_page
from regiongpt.settings import Settings
from regiongpt.storage import locked, new_folder, sha256, write_file, write_json, writing

CAPTIONS, RECORDS, PAGE, CARD = "captions", "records", "index.html", "README.md"
_ROWS: Final = 50_000  # in one file of the table
_PAPER: Final = (
    ("RefCOCO", "20K", "142K", 3.50),
    ("RefCOCO+", "20K", "142K", 3.53),
    ("RefCOCOg", "25.8K", "95K", 8.46),
    ("Visual Genome", "82.4K", "3.8M", 5.09),
    ("RegionGPT's paper", "213K", "1.5M", 87.14),
)
"""The paper's Table 2: images, regions, average words."""


class Export(Settings):
    """Other layouts of the captions that are kept."""

    export: tuple[Literal["llava", "webdataset"], ...] = ()
    """llava (json lines of image and conversations), webdataset (tar files of images with their captions)"""


@dataclass(kw_only=True)
class Statistics:
    """What the page, the card and the table say about the captions."""

    images: int = 0
    regions: int = 0
    """Of the source."""
    captioned: int = 0
    kept: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    similarities: list[float] = field(default_factory=list)
    located: Counter[bool] = field(default_factory=Counter)
    named: Counter[bool] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    growth: list[tuple[int, int]] = field(default_factory=list)
    """Captions, and the different words in them."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def mean_words(self) -> float:
        """Words a caption, of all that are kept."""
        return sum(words * count for words, count in self.lengths.items()) / max(self.lengths.total(), 1)


class Output:
    """Writes what is finished, at the end of a run or while another process goes on with it.

    Args:
        store: The finished work.
        source: The regions, in the order of the output.
        keys: Of what is wanted.
        closeup: How crops were made.
        filters: What is kept.
        export: Other layouts.
        described: Of the run, for the manifest.
    """

    def __init__(
        self, *, store: Store, source: Source, keys: Keys, closeup: Closeup, filters: Filters, export: Export,
        described: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.store, self.source, self.keys, self.closeup = store, source, keys, closeup
        self.filters, self.export, self.described = filters, export, dict(described)
        self.out, self.statistics, self.vocabulary = store.folder, Statistics(), set[str]()
        self.gallery: list[tuple[Item, Ask, dict[str, Any]]] = []

    def write(self) -> Statistics:
        """Write everything, each folder whole or not at all.

        Raises:
            DataError: The disk is full.
        """
        decision = Decision(self.filters, self._scores())
        with locked(self.out / ".writing", wait=True), new_folder(self.out / ".new") as folder:
            rejects = Rejects(folder / "rejects.jsonl")
            writer = _Writer(folder / CAPTIONS)
            (folder / RECORDS).mkdir()
            manifest = write_records(
                folder / RECORDS,
                writer.passing(self._records(decision), self.export.export, folder, self.source.images),
                rejects,
                source="annotate",
                images=str(self.source.images.resolve()),
                inputs=[self.source.path] if self.source.path.is_file() else [],
                arguments=self.described,
                check_regions=False,
            )
            rejects.close()
            described = {
                **self.described,
                "filters": self.filters.model_dump(mode="json"),
                "captions": self.statistics.captioned,
                "kept": self.statistics.kept,
                "regions": self.statistics.regions,
                "failures": dict(self.statistics.failures),
                "cost": self.store.cost(),
                "shards": writer.finish(),
                "records": manifest.counts,
                "regiongpt_version": version("regiongpt"),
            }
            write_json(folder / "manifest.json", described)
            write_file(folder / CARD, self._card(described))
            self._page(folder / PAGE)
            with writing(self.out):  # from here on nothing is computed
                for made in sorted(folder.iterdir()):
                    there = self.out / made.name
                    if there.is_dir():
                        shutil.rmtree(there)
                    made.replace(there)
        shutil.rmtree(self.out / ".new", ignore_errors=True)
        return self.statistics

    # -----------------------------------------------------------------------------------------------------------------
    # Captions in the order of the source

    def _items(self) -> Iterator[tuple[str, Item, list[Ask], dict[bytes, dict[str, Any]]]]:
        for item in self.source:
            try:
                digest = self.store.image_digest(self.source.images / item.name, item.name)
            except OSError:
                digest = ""
            asks = self.keys.regions(digest, item) if digest else []
            whole = self.keys.image(digest)
            yield digest, item, [whole, *asks], self.store.get([key for ask in (whole, *asks) for key in ask.keys])

    def rows(
        self, item: Item, asks: list[Ask], known: Mapping[bytes, dict[str, Any]]
    ) -> Iterator[tuple[Ask, dict[str, Any]]]:
        """A row of the table for each caption of an image that is finished."""
        classes = [each.category for each in item.regions]
        for ask in asks:
            if ask.number < 0 or ask.mode != self.keys.plan.mode or ask.key not in known:
                continue
            value, each = known[ask.key], item.regions[ask.number]
            located = known.get(ask.locate or b"", {}).get("number")
            score = known.get(ask.score or b"", {})
            yield (
                ask,
                {
                    "id": f"{item.name}#{each.source_id or ask.number + 1}",
                    "image": item.name,
                    "width": item.width,
                    "height": item.height,
                    "region": {**region_row(each.region), "category": each.category, "source_id": each.source_id},
                    "category": each.category,
                    "caption": value["text"],
                    "global_caption": known.get(asks[0].key, {}).get("text", ""),
                    "crop": list(self.closeup.window(each.region, item.width, item.height)) if item.width else [],
                    "mode": ask.mode,
                    "prompt_version": value["version"],
                    "model": value["model"],
                    "seed": value["seed"],
                    "seconds": value["seconds"],
                    "tokens_in": value["tokens_in"],
                    "tokens_out": value["tokens_out"],
                    "cost": value["cost"],
                    "finished": value["at"],
                    "similarity": score.get("similarity"),
                    "least_similarity": score.get("least"),
                    **judge(value["text"], each.category, classes, located, ask.number + 1),
                },
            )

    def _scores(self) -> dict[str, list[float]]:
        """Similarities by class, of captions that nothing else speaks against; needed for top shares alone."""
        scores: dict[str, list[float]] = {}
        if self.filters.top_share is not None:
            plain = Decision(self.filters.replace(top_share=None), {})
            for _, item, asks, known in self._items():
                for _, row in self.rows(item, asks, known):
                    if row["similarity"] is not None and not plain.why_not(row):
                        scores.setdefault(row["category"], []).append(row["similarity"])
            if not scores:
                raise DataError(f"{self.out}: no caption has a similarity; run with --similarity before --top-share")
        return scores

    def _records(self, decision: Decision) -> Iterator[tuple[list[dict[str, Any]], Record | None]]:
        """The rows of each image, and the record of those that are kept."""
        found = self.statistics
        for digest, item, asks, known in self._items():
            found.images += 1
            found.regions += len(item.regions)
            asked = asks if self.keys.plan.mode != "crop" else asks[1:]
            missing = [ask.key for ask in asked if ask.key not in known]
            found.failures.update(failure.kind for failure in self.store.failures(missing).values())
            rows, regions, turns = [], [], []
            whole = known.get(asks[0].key, {}).get("text", "")
            for ask, row in self.rows(item, asks, known):
                row["reason"] = decision.why_not(row)
                row["kept"] = not row["reason"]
                rows.append(row)
                self._count(row)
                if row["kept"]:
                    regions.append(item.regions[ask.number])
                    answer = words_alone(row["caption"])
                    turns.append(Turn(task="describe", answer=answer, regions=(len(regions),)))
                if sum(other.number == ask.number for other in asks) == len(MODES):
                    self.gallery.append((item, ask, {"row": row, **self._modes(item, asks, known, ask)}))
            if whole and turns:
                turns.append(Turn(task="image_caption", answer=words_alone(whole)))
            record = Record(
                id=f"annotate/{digest[:16]}/{item.place}", source="annotate", image=item.name, width=item.width,
                height=item.height, regions=tuple(regions), turns=tuple(turns),
            )  # fmt: skip
            yield rows, record if turns else None

    @staticmethod
    def _modes(item: Item, asks: list[Ask], known: Mapping[bytes, dict[str, Any]], shown: Ask) -> dict[str, str]:
        return {ask.mode: known.get(ask.key, {}).get("text", "") for ask in asks if ask.number == shown.number}

    def _count(self, row: Mapping[str, Any]) -> None:
        found = self.statistics
        found.captioned += 1
        found.tokens[0] += row["tokens_in"]
        found.tokens[1] += row["tokens_out"]
        if row["names_class"] is not None:
            found.named[row["names_class"]] += 1
        if row["located_back"] is not None:
            found.located[row["located_back"]] += 1
        if row["similarity"] is not None:
            found.similarities.append(row["similarity"])
        if row["reason"]:
            found.reasons[row["reason"]] += 1
            return
        found.kept += 1
        found.lengths[row["words"]] += 1
        self.vocabulary.update(words(row["caption"]))
        if found.kept & (found.kept - 1) == 0 or found.kept % 2000 == 0:
            found.growth.append((found.kept, len(self.vocabulary)))

    # -----------------------------------------------------------------------------------------------------------------
    # For people

    def table(self) -> list[tuple[str, str, str, str]]:
        """The paper's Table 2 with a line for this run."""
        own = (
            self.out.resolve().name,
            f"{self.statistics.images:,}",
            f"{self.statistics.kept:,}",
            self.statistics.mean_words,
        )
        head = ("Data set", "Images", "Regions", "Average words")
        return [head, *((name, images, regions, f"{mean:.2f}") for name, images, regions, mean in (*_PAPER, own))]

    def _card(self, described: Mapping[str, Any]) -> str:
        head, *body = self.table()
        table = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)]
        found, print_ = self.statistics, described["fingerprint"]
        dropped = [f"- {count:,}: {reason}" for reason, count in found.reasons.most_common()] or ["- nothing"]
        failed = [f"- {count:,}: {kind}" for kind, count in found.failures.most_common()] or ["- nothing"]
        asked = "; ".join(f"{name} {value}" for name, value in print_.items())
        return "\n".join(
            [
                "---",
                "task_categories: [image-to-text]",
                "tags: [region captions, synthetic]",
                "---",
                f"# {self.out.resolve().name}",
                "",
                f"Captions of image regions written by a model, not by people: {found.captioned:,} of "
                f"{found.regions:,} regions of {found.images:,} images are captioned, and {found.kept:,} are kept.",
                "",
                *table,
                "",
                "## How they were made",
                "",
                "First a caption of the whole image, then one of the close-up of each region, told the caption of the "
                "image and the class name that people gave (mode full; context leaves out the name, crop both). "
                f"{asked}.",
                "",
                "## What is not kept",
                "",
                *dropped,
                "",
                "## What has no caption",
                "",
                *failed,
                "",
                "## Files",
                "",
                f"- `{CAPTIONS}/`: every caption, kept or not, a row each, with its provenance and scores",
                f"- `{RECORDS}/`: those that are kept, as `regiongpt train` reads them",
                "- `manifest.json`: settings, counts and the hashes of all files",
                "",
                "The captions carry the errors of the model that wrote them, and the images keep the licences of their "
                "authors.",
                "",
            ]
        )

    def _page(self, path: Path) -> None:
        found, seconds = self.statistics, self.store.busy_seconds()
        rate = self.store.count() / seconds if seconds else 0.0
        write_page(
            path,
            "annotations.html",
            title=f"Captions: {self.out.resolve().name}",
            made="; ".join(f"{name} {value}" for name, value in self.described["fingerprint"].items()),
            table=self.table(),
            facts=[
                ("images", f"{found.images:,}"),
                ("regions", f"{found.regions:,}"),
                ("captioned", f"{found.captioned:,}"),
                ("kept", f"{found.kept:,}"),
                ("words a caption", f"{found.mean_words:.2f} (RefCOCOg 8.46, the paper 87.14)"),
                ("different words", f"{len(self.vocabulary):,}"),
                ("name their class", _share(found.named)),
                ("located back", _share(found.located)),
                ("tokens", f"{found.tokens[0]:,} read, {found.tokens[1]:,} written"),
                ("cost", f"{self.store.cost():,.4f}"),
                ("answers a second", f"{rate:,.2f} over {seconds:,.1f} s of work"),
            ],
            reasons=found.reasons.most_common(),
            failures=found.failures.most_common(),
            charts=[
                _histogram(
                    "Words a caption", [n for n, count in found.lengths.items() for _ in range(count)], whole=True
                ),
                _histogram("Similarity of crop and caption", found.similarities),
                charts.line_chart(
                    "Vocabulary growth",
                    [
                        charts.Curve(
                            name="different words", xs=[n for n, _ in found.growth], ys=[n for _, n in found.growth]
                        )
                    ],
                    "captions",
                ),
            ],
            gallery=[shown for shown in map(self._shown, self.gallery) if shown],
            modes=MODES,
        )

    def _shown(self, found: tuple[Item, Ask, dict[str, Any]]) -> dict[str, Any] | None:
        item, ask, texts = found
        region = item.regions[ask.number]
        try:
            photo = load_image(self.source.images / item.name)
            crop = picture(self.closeup.crop(photo, region.region), f"close-up of {region.category or 'a region'}", 320)
            whole = picture(draw_regions(photo, [region.region]), f"{item.name} with the region", 480)
        except RegionGPTError:
            return None
        row = texts["row"]
        return {"crop": crop, "whole": whole, "category": region.category, "name": item.name,
                "global": row["global_caption"], "texts": texts, "reason": row["reason"]}  # fmt: skip


def _share(counts: Counter[bool]) -> str:
    return f"{counts[True] / counts.total():.1%}" if counts else "not asked"


def _histogram(title: str, values: list[float] | list[int], whole: bool = False) -> Markup:
    if not values:
        return Markup("")
    edges = np.histogram_bin_edges(np.asarray(values, float), bins=12)
    if whole:
        edges = np.unique(np.ceil(edges))
        edges = edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1])
    counts, _ = np.histogram(values, edges)
    named = [f"{low:g}–{high:g}" if whole else f"{low:.3f}" for low, high in itertools.pairwise(edges)]
    bars = [(name, [charts.Bar(value=float(count))]) for name, count in zip(named, counts.tolist(), strict=True)]
    return charts.bar_chart(title, bars, ["captions"], unit="", reach=1.1 * float(counts.max()))


class _Writer:
    """Parquet files of all captions, and the exports of those that are kept, written as records pass by."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self._rows = folder, list[dict[str, Any]](), list[dict[str, Any]]()
        folder.mkdir()

    def passing(
        self,
        found: Iterable[tuple[list[dict[str, Any]], Record | None]],
        export: tuple[str, ...],
        folder: Path,
        images: Path,
    ) -> Iterator[Record]:
        """Hand on the records, and write the rest."""
        (folder / "export").mkdir()
        lines = (folder / "export" / "llava.jsonl").open("w", encoding="utf-8") if "llava" in export else None
        tar: tarfile.TarFile | None = None
        count = 0
        for rows, record in found:
            self._rows += rows
            if len(self._rows) >= _ROWS:
                self._flush()
            if record is None:
                continue
            kept = [row for row in rows if row["kept"]]
            if lines is not None:
                lines.write(json.dumps(_llava(record, kept), ensure_ascii=False) + "\n")
            if "webdataset" in export:
                if tar is None or count % 1000 == 0:
                    if tar is not None:
                        tar.close()
                    tar = tarfile.open(folder / "export" / f"captions-{count // 1000:05d}.tar", "w")  # noqa: SIM115
                _add(tar, record, kept, images)
            count += 1
            yield record
        for file in (lines, tar):
            if file is not None:
                file.close()
        if not export:
            (folder / "export").rmdir()

    def finish(self) -> list[dict[str, Any]]:
        """Name, rows and SHA-256 of every file."""
        if self._rows or not self.files:
            self._flush()
        return self.files

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / f"captions-{len(self.files):05d}.parquet"
        table = pa.Table.from_pylist(self._rows, schema=_schema())
        pq.write_table(table, path, compression="zstd")
        self.files.append({"file": f"{CAPTIONS}/{path.name}", "rows": len(self._rows), "sha256": sha256(path)})
        self._rows = []


def _schema() -> Any:
    """The columns of the table of all captions."""
    import pyarrow as pa

    from regiongpt.data.shards import schema

    text, whole, real, flag = pa.string(), pa.int32(), pa.float64(), pa.bool_()
    region = schema().field("regions").type.value_type
    columns = {
        "id": text, "image": text, "width": whole, "height": whole, "region": region, "category": text,
        "caption": text, "kept": flag, "reason": text, "global_caption": text, "crop": pa.list_(whole), "mode": text,
        "prompt_version": whole, "model": text, "seed": pa.int64(), "seconds": real, "tokens_in": whole,
        "tokens_out": whole, "cost": real, "finished": real, "words": whole, "similarity": real,
        "least_similarity": real, "names_class": flag, "names_other": flag, "repeated": flag, "refusing": flag,
        "about_image": flag, "located": whole, "located_back": flag,
    }  # fmt: skip
    return pa.schema(list(columns.items()))


def _llava(record: Record, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """One image as LLaVA's training reads it: a region is a box in fractions of the image's sides, written out."""
    said: list[dict[str, str]] = []
    for row, region in zip(kept, record.regions, strict=True):
        x0, y0, x1, y1 = region.region.bounds(record.width, record.height)
        box = [x0 / record.width, y0 / record.height, x1 / record.width, y1 / record.height]
        where = ", ".join(f"{value:.3f}" for value in box)
        said.append({"from": "human", "value": f"Describe the region [{where}] of the image in detail."})
        said.append({"from": "gpt", "value": words_alone(row["caption"])})
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": record.id, "image": record.image, "conversations": said}


def _add(tar: tarfile.TarFile, record: Record, kept: list[dict[str, Any]], images: Path) -> None:
    """An image and its captions as one sample of a WebDataset."""
    key = record.id.replace("/", "-").replace(".", "-")
    path = images / record.image
    for suffix, data in (
        (path.suffix.lower() or ".jpg", path.read_bytes()),
        (".json", json.dumps({"record": record.row(), "captions": kept}, ensure_ascii=False).encode()),
    ):
        member = tarfile.TarInfo(key + suffix)
        member.size = len(data)
        tar.addfile(member, BytesIO(data))

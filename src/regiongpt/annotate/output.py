"""Output of a run: the table of all captions, training records, exports, a data card and a page."""

import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from regiongpt.annotate.filters import judge, least_of_share, why_not, words
from regiongpt.annotate.options import MODES, Filters, Options
from regiongpt.annotate.plan import WORDING, Ask, Work, works
from regiongpt.data.records import Record, Turn, region_of_row, region_row
from regiongpt.data.shards import Rejects, read_records, schema, write_llava, write_records, write_webdataset
from regiongpt.data.sources import AnnotatedImages
from regiongpt.drawing import draw_regions, picture, render, write_page
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.storage import Store, locked, new_folder, sha256, write_file, write_json, writing

_FILES: Final = ("captions", "records", "llava.jsonl", "webdataset", "README.md", "index.html", "manifest.json")
_ROWS: Final = 50_000
"""Captions in one file of the table."""
Row = dict[str, Any]


class Output:
    """Writes the finished captions, at the end of a run or while another process continues it."""

    def __init__(self, options: Options, store: Store, source: AnnotatedImages, noted: Mapping[str, Any]) -> None:
        assert options.out
        self.options, self.store, self.source, self.noted, self.out = options, store, source, noted, options.out
        self.counts: Counter[str] = Counter(images=0, regions=0, captions=0, kept=0, words=0)  # words of what is kept
        self.reasons: Counter[str] = Counter()  # why captions are not kept
        self.failures: Counter[str] = Counter()  # by kind, of captions that are missing
        self.last_failure = ""
        self._lengths: Counter[float] = Counter()  # rounded down to tens of words
        self._fits: Counter[float] = Counter()  # similarities, rounded to two hundredths
        self._finished = array("d")  # seconds
        self._vocabulary: set[str] = set()
        self._growth: list[tuple[int, int]] = []
        self._gallery, self._rows, self._shards = list[Row](), list[Row](), list[Row]()

    def write(self) -> None:
        """Write all files atomically; DataError if the disk is full."""
        with locked(self.out / ".writing", wait=True):
            self._write()
            (self.out / ".new").rmdir()

    def _write(self) -> None:
        least = self._least()
        with new_folder(self.out / ".new") as folder:
            (folder / "captions").mkdir()
            manifest = write_records(
                folder / "records", self._records(least, folder), Rejects(), source="annotate",
                images=str(self.source.images.resolve()), inputs=[], arguments=self.noted["fingerprint"],
                check_regions=False,
            )  # fmt: skip
            self._flush(folder)
            if "llava" in self.options.export:
                write_llava(read_records(folder / "records"), folder / "llava.jsonl")
            if "webdataset" in self.options.export:
                write_webdataset(read_records(folder / "records"), self.source.images, folder / "webdataset")
            cost = self.store.total("cost")
            write_json(folder / "manifest.json", {
                **self.noted, "filters": self.options.model_dump(mode="json", include={*Filters.model_fields}),
                **{name: self.counts[name] for name in ("images", "regions", "captions", "kept", "words")},
                "not_kept": self.reasons, "failures": self.failures, "cost": cost, "shards": self._shards,
                "records": manifest.counts, "regiongpt_version": version("regiongpt"),
            })  # fmt: skip
            self._show(folder, cost)
            with writing(self.out):
                for name in _FILES:
                    if (there := self.out / name).is_dir():
                        shutil.rmtree(there)
                    there.unlink(missing_ok=True)
                    if (folder / name).exists():
                        (folder / name).replace(there)

    def table(self) -> list[list[str]]:
        """The paper's Table 2 with a line for this run."""
        images, kept, words = (self.counts[name] for name in ("images", "kept", "words"))
        own = [self.out.resolve().name, f"{images:,}", f"{kept:,}", f"{words / max(kept, 1):.2f}"]
        return [*WORDING["table_2"], own]

    def _captioned(self) -> Iterator[tuple[Work, list[Row]]]:
        """Each image, in the order of the source, with the rows of its captions."""
        for work in works(self.source, self.store, self.options, self.noted, write=False):
            own = [ask for ask in work.asks if ask.stage == "region" and ask.mode == self.options.mode]
            todo = work.todo()
            yield work, [self._row(ask, work) for ask in own if ask.key not in todo]

    def _row(self, ask: Ask, work: Work) -> Row:
        record, known = work.record, work.known
        value, each = known[ask.key], record.regions[ask.number]
        score = known.get(f"{ask.key} {self.noted['scorer']}", {})
        located = known.get(f"{ask.key} locate", {}).get("number")
        whole = known.get(work.asks[0].key, {}).get("text", "") if work.asks[0].stage == "image" else ""
        sides = record.width, record.height, self.options.crop_margin, self.options.crop_least
        return {
            "id": f"{record.image}#{each.source_id or ask.number + 1}", "image": record.image, "width": record.width,
            "height": record.height, "number": ask.number, "category": each.category, "mode": ask.mode,
            "region": {**region_row(each.region), "category": each.category, "source_id": each.source_id},
            "caption": value["text"], "global_caption": whole, "prompt_version": value["version"],
            "crop": [*each.region.close_up(*sides)], "finished": value["at"],
            **{name: value[name] for name in ("model", "seed", "seconds", "tokens_in", "tokens_out", "cost")},
            "similarity": score.get("similarity"), "least_similarity": score.get("least"),
            **judge(value["text"], each.category, [each.category for each in record.regions], located, ask.number + 1),
        }  # fmt: skip

    def _least(self) -> dict[str, float]:
        """Similarities of the top share of each class, among captions that nothing else speaks against."""
        scores: dict[str, list[float]] = {}
        if self.options.top_share is None:
            return {}
        for row in (row for _, rows in self._captioned() for row in rows):
            if row["similarity"] is not None and not why_not(row, self.options, {}):
                scores.setdefault(row["category"], []).append(row["similarity"])
        if not scores:
            raise DataError(f"{self.out}: no caption has a similarity; run with --similarity before --top-share")
        return least_of_share(self.options.top_share, scores)

    def _records(self, least: Mapping[str, float], folder: Path) -> Iterator[Record]:
        """The records of what is kept; as they pass by, the table is written and everything counted."""
        for work, rows in self._captioned():
            record = work.record
            self.counts.update(images=1, regions=len(record.regions))
            for ask in work.asks:
                value = work.known.get(ask.key, {})
                if ask.stage in ("image", "region") and "error" in value:
                    self.failures[value["error"]] += 1
                    self.last_failure = value["reason"]
            for row in rows:
                row["reason"] = why_not(row, self.options, least)
                row["kept"] = not row["reason"]
                self._count(row)
                keys = {ask.mode: ask.key for ask in work.asks if (ask.number, ask.stage) == (row["number"], "region")}
                if len(keys) == len(MODES):
                    texts = {mode: work.known.get(key, {}).get("text") for mode, key in keys.items()}
                    self._gallery.append({**row, "texts": texts})
            self._rows += rows
            if len(self._rows) >= _ROWS:
                self._flush(folder)
            if kept := [row for row in rows if row["kept"]]:
                turns = [Turn(task="describe", answer=row["caption"], regions=(k,)) for k, row in enumerate(kept, 1)]
                if whole := kept[0]["global_caption"]:
                    turns.append(Turn(task="image_caption", answer=whole))
                regions = tuple(record.regions[row["number"]] for row in kept)
                name = f"annotate/{work.image[:16]}/{record.id}"
                yield replace(record, id=name, source="annotate", regions=regions, turns=tuple(turns))

    def _count(self, row: Row) -> None:
        self.counts.update(captions=1, **{name: row[name] for name in ("tokens_in", "tokens_out")})
        self.counts.update(f"{name} {row[name]}" for name in ("names_class", "located_back"))
        self._finished.append(row["finished"])
        if row["similarity"] is not None:
            self._fits[round(50 * row["similarity"]) / 50] += 1
        if not row["kept"]:
            self.reasons[row["reason"]] += 1
            return
        self.counts.update(kept=1, words=row["words"])
        self._lengths[row["words"] // 10 * 10] += 1
        self._vocabulary.update(words(row["caption"]))
        if (count := self.counts["kept"]).bit_count() == 1:
            self._growth.append((count, len(self._vocabulary)))

    def _flush(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {
            pa.string(): "id image category caption reason global_caption mode model",
            pa.int32(): "width height number prompt_version tokens_in tokens_out words located",
            pa.int64(): "seed",
            pa.float64(): "seconds cost finished similarity least_similarity",
            pa.bool_(): "kept names_class names_other repeated refusing about_image located_back",
            pa.list_(pa.int32()): "crop",
            schema().field("regions").type.value_type: "region",
        }
        columns = pa.schema([(name, kind) for kind, names in kinds.items() for name in names.split()])
        path = folder / "captions" / f"captions-{len(self._shards):05d}.parquet"
        pq.write_table(pa.Table.from_pylist(self._rows, schema=columns), path, compression="zstd")
        self._shards.append({"file": f"captions/{path.name}", "rows": len(self._rows), "sha256": sha256(path)})
        self._rows = []

    def _show(self, folder: Path, cost: float) -> None:
        """Write the page and the data card."""
        counts = self.counts
        gaps = np.diff(np.sort(self._finished))
        seconds = float(gaps[gaps < 60].sum())  # over all runs, without the gaps between them
        told = {
            "title": f"Captions: {self.out.resolve().name}", "table": self.table(), "counts": counts,
            "reasons": self.reasons.most_common(), "failures": self.failures.most_common(),
            "made": "; ".join(f"{name} {value}" for name, value in self.noted["fingerprint"].items()),
        }  # fmt: skip
        write_file(folder / "README.md", render("captions_card.md", **told))
        growth = dict([*self._growth, (counts["kept"], len(self._vocabulary))])
        write_page(
            folder / "index.html", "annotations.html", **told, modes=MODES,
            facts=[
                *((name, f"{counts[name]:,}") for name in ("images", "regions", "captions", "kept")),
                ("words a caption", f"{self.table()[-1][-1]} (RefCOCOg 8.46, the paper 87.14)"),
                ("different words", f"{len(self._vocabulary):,}"),
                ("name their class", self._share("names_class")),
                ("located back", self._share("located_back")),
                ("tokens", f"{counts['tokens_in']:,} read, {counts['tokens_out']:,} written"),
                ("cost", f"{cost:,.4f}"),
                ("regions a second", f"{len(gaps) / max(seconds, 1e-9):,.2f} over {seconds:,.1f} s of work"),
            ],
            histograms=[
                ("Words a caption, from", sorted(self._lengths.items())),
                ("Similarity of crop and caption, about", sorted(self._fits.items())),
                ("Different words in as many captions", list(growth.items())),
            ],
            gallery=[shown for row in self._gallery if (shown := self._shown(row))],
        )  # fmt: skip

    def _share(self, name: str) -> str:
        """How many of the captions that were asked about say yes."""
        yes, no = self.counts[f"{name} True"], self.counts[f"{name} False"]
        return f"{yes / (yes + no):.1%}" if yes + no else "not asked"

    def _shown(self, row: Row) -> Row | None:
        """A caption of the gallery with its pictures."""
        try:
            image, name = load_image(self.source.images / row["image"]), row["category"] or "a region"
            close_up = picture(image.crop(row["crop"]), f"close-up of {name}", 320)
            whole = picture(draw_regions(image, [region_of_row(row["region"])]), f"{row['image']} with {name}", 480)
        except RegionGPTError:
            return None
        return {**row, "close_up": close_up, "whole": whole}

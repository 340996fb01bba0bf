"""What a run makes of its store: the table of all captions, records to train on, exports, a data card and a page."""

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from regiongpt.annotate.filters import Decision, judge, words
from regiongpt.annotate.options import MODES, Filters, Options
from regiongpt.annotate.plan import WORDING, Ask, Source, Work, window, works
from regiongpt.data.records import Record, Turn, region_of_row, region_row
from regiongpt.data.shards import Rejects, schema, write_llava, write_records, write_webdataset
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.report import Curve, line_chart, picture, render, write_page
from regiongpt.storage import Store, locked, new_folder, sha256, write_file, write_json, writing

_FILES: Final = ("captions", "records", "llava.jsonl", "webdataset", "README.md", "index.html", "manifest.json")
_ROWS: Final = 50_000
"""Captions in one file of the table."""
Row = dict[str, Any]


class Output:
    """Writes what is finished, at the end of a run or while another process goes on with it."""

    def __init__(self, options: Options, store: Store, source: Source, noted: Mapping[str, Any]) -> None:
        assert options.out
        self.options, self.store, self.source, self.noted, self.out = options, store, source, noted, options.out
        self.counts: Counter[str] = Counter(images=0, regions=0, captions=0, kept=0, words=0)  # words of what is kept
        self.reasons: Counter[str] = Counter()  # why captions are not kept
        self.failures: Counter[str] = Counter()  # by kind, of captions that are missing
        self.last_failure = ""
        self._rows: list[Row] = []
        self._shards: list[dict[str, Any]] = []
        self._gallery: list[Row] = []

    def write(self) -> None:
        """Write everything; what was there is replaced when all of it is whole. DataError where the disk is full."""
        decision = Decision(self.options, self._similarities_by_class())
        with locked(self.out / ".writing", wait=True), new_folder(self.out / ".new") as folder:
            (folder / "captions").mkdir()
            manifest = write_records(
                folder / "records", self._records(decision, folder), Rejects(), source="annotate",
                images=str(self.source.images.resolve()), inputs=[], arguments=self.noted["fingerprint"],
                check_regions=False,
            )  # fmt: skip
            self._flush(folder)
            if "llava" in self.options.export:
                write_llava(map(Record.from_row, _read(folder / "records")), folder / "llava.jsonl")
            if "webdataset" in self.options.export:
                records = map(Record.from_row, _read(folder / "records"))
                write_webdataset(records, self.source.images, folder / "webdataset")
            counted = {
                "filters": self.options.model_dump(mode="json", include={*Filters.model_fields}), **self.counts,
                "not_kept": self.reasons, "failures": self.failures, "cost": self.store.total("cost"),
                "shards": self._shards, "records": manifest.counts, "regiongpt_version": version("regiongpt"),
            }  # fmt: skip
            write_json(folder / "manifest.json", {**self.noted, **counted})
            self._show(folder)
            with writing(self.out):
                for name in _FILES:
                    if (there := self.out / name).is_dir():
                        shutil.rmtree(there)
                    there.unlink(missing_ok=True)
                    if (folder / name).exists():
                        (folder / name).replace(there)
        (self.out / ".new").rmdir()

    def table(self) -> list[list[str]]:
        """The paper's Table 2 with a line for this run."""
        mean = self.counts["words"] / max(self.counts["kept"], 1)
        own = f"{self.counts['images']:,}", f"{self.counts['kept']:,}", f"{mean:.2f}"
        return [*WORDING["table_2"], [self.out.resolve().name, *own]]

    # -----------------------------------------------------------------------------------------------------------------
    # Captions in the order of the source

    def _captioned(self) -> Iterator[tuple[Work, list[Row]]]:
        """Each image with the rows of its captions."""
        for work in works(self.source, self.store, self.options, self.noted, write=False):
            wanted = [ask for ask in work.asks if ask.number >= 0 and ask.mode == self.options.mode]
            yield work, [self._row(ask, work) for ask in wanted if not work.missing([ask.key])]

    def _row(self, ask: Ask, work: Work) -> Row:
        item, known = work.item, work.known
        value, each = known[ask.key], item.regions[ask.number]
        score, located = known.get(ask.score, {}), known.get(ask.locate, {}).get("number")
        whole = known.get(work.asks[0].key, {}).get("text", "") if work.asks[0].number < 0 else ""
        return {
            "id": f"{item.name}#{each.source_id or ask.number + 1}", "image": item.name, "width": item.width,
            "height": item.height, "number": ask.number, "category": each.category, "mode": ask.mode,
            "region": {**region_row(each.region), "category": each.category, "source_id": each.source_id},
            "caption": value["text"], "global_caption": whole, "prompt_version": value["version"],
            "crop": [*window(self.options, each.region, item.width, item.height)], "finished": value["at"],
            **{name: value[name] for name in ("model", "seed", "seconds", "tokens_in", "tokens_out", "cost")},
            "similarity": score.get("similarity"), "least_similarity": score.get("least"),
            **judge(value["text"], each.category, [each.category for each in item.regions], located, ask.number + 1),
        }  # fmt: skip

    def _similarities_by_class(self) -> dict[str, list[float]]:
        """Those of captions that nothing else speaks against, needed for top shares alone."""
        scores: dict[str, list[float]] = {}
        if self.options.top_share is not None:
            plain = Decision(self.options.replace(top_share=None), {})
            for row in (row for _, rows in self._captioned() for row in rows):
                if row["similarity"] is not None and not plain.why_not(row):
                    scores.setdefault(row["category"], []).append(row["similarity"])
            if not scores:
                raise DataError(f"{self.out}: no caption has a similarity; run with --similarity before --top-share")
        return scores

    def _records(self, decision: Decision, folder: Path) -> Iterator[Record]:
        """The records of what is kept, and as they pass by the table and the counts."""
        for work, rows in self._captioned():
            item = work.item
            for value in (work.known.get(ask.key, {}) for ask in work.asks):
                if "error" in value:
                    self.failures[value["error"]] += 1
                    self.last_failure = value["reason"]
            for row in rows:
                row["reason"] = decision.why_not(row)
                row["kept"] = not row["reason"]
                self.reasons.update(filter(None, [row["reason"]]))
                keys = {ask.mode: ask.key for ask in work.asks if ask.number == row["number"]}
                if len(keys) == len(MODES):
                    texts = {mode: work.known.get(key, {}).get("text") for mode, key in keys.items()}
                    self._gallery.append({**row, "texts": texts})
            kept = [row for row in rows if row["kept"]]
            self.counts.update(images=1, regions=len(item.regions), captions=len(rows), kept=len(kept))
            self.counts["words"] += sum(row["words"] for row in kept)
            self._rows += rows
            if len(self._rows) >= _ROWS:
                self._flush(folder)
            if kept:
                turns = [Turn(task="describe", answer=row["caption"], regions=(k,)) for k, row in enumerate(kept, 1)]
                if whole := kept[0]["global_caption"]:
                    turns.append(Turn(task="image_caption", answer=whole))
                yield Record(
                    id=f"annotate/{work.image[:16]}/{item.place}", source="annotate", image=item.name,
                    width=item.width, height=item.height,
                    regions=tuple(item.regions[row["number"]] for row in kept), turns=tuple(turns),
                )  # fmt: skip

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

    # -----------------------------------------------------------------------------------------------------------------
    # For people

    def _show(self, folder: Path) -> None:
        """Write the page and the data card, from the table."""
        names = ("caption", "kept", "words", "similarity", "names_class", "located_back", "finished", "tokens_in",
                 "tokens_out")  # fmt: skip
        columns: dict[str, list[Any]] = {name: [] for name in names[2:]}
        vocabulary: set[str] = set()
        growth: list[tuple[int, int]] = []
        for row in _read(folder / "captions", names):
            for name, values in columns.items():
                if row[name] is not None and (name != "words" or row["kept"]):
                    values.append(row[name])
            if row["kept"]:
                vocabulary.update(words(row["caption"]))
                if (
                    (count := len(columns["words"])).bit_count() == 1
                    or count % 2000 == 0
                    or count == self.counts["kept"]
                ):
                    growth.append((count, len(vocabulary)))
        gaps = np.diff(np.sort(columns["finished"]))
        seconds = float(gaps[gaps < 60].sum())  # of all runs, without what lies between them
        share = {name: f"{np.mean(columns[name]):.1%}" if columns[name] else "not asked" for name in names[4:6]}
        told = {
            "title": f"Captions: {self.out.resolve().name}", "table": self.table(), "counts": self.counts,
            "reasons": self.reasons.most_common(), "failures": self.failures.most_common(),
            "made": "; ".join(f"{name} {value}" for name, value in self.noted["fingerprint"].items()),
        }  # fmt: skip
        write_file(folder / "README.md", render("captions_card.md", **told))
        curve = Curve(name="different words", xs=[n for n, _ in growth], ys=[n for _, n in growth])
        write_page(
            folder / "index.html", "annotations.html", **told, modes=MODES,
            facts=[
                *((name, f"{self.counts[name]:,}") for name in ("images", "regions", "captions", "kept")),
                ("words a caption", f"{self.table()[-1][-1]} (RefCOCOg 8.46, the paper 87.14)"),
                ("different words", f"{len(vocabulary):,}"),
                ("name their class", share["names_class"]),
                ("located back", share["located_back"]),
                ("tokens", f"{sum(columns['tokens_in']):,} read, {sum(columns['tokens_out']):,} written"),
                ("cost", f"{self.store.total('cost'):,.4f}"),
                ("regions a second", f"{len(gaps) / max(seconds, 1e-9):,.2f} over {seconds:,.1f} s of work"),
            ],
            growth=line_chart("Vocabulary growth", [curve], "captions"),
            histograms=[
                ("Words a caption", _histogram(columns["words"], whole=True)),
                ("Similarity of crop and caption", _histogram(columns["similarity"])),
            ],
            gallery=[shown for row in self._gallery if (shown := self._shown(row))],
        )  # fmt: skip

    def _shown(self, row: Row) -> Row | None:
        """A caption of the gallery with its pictures."""
        try:
            photo, name = load_image(self.source.images / row["image"]), row["category"] or "a region"
            close_up = picture(photo.crop(row["crop"]), f"close-up of {name}", 320)
            whole = picture(draw_regions(photo, [region_of_row(row["region"])]), f"{row['image']} with {name}", 480)
        except RegionGPTError:
            return None
        return {**row, "close_up": close_up, "whole": whole}


def _read(folder: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    import pyarrow.parquet as pq

    for file in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(1000, columns=columns):
            yield from batch.to_pylist()


def _histogram(values: Sequence[float], whole: bool = False) -> list[tuple[str, int, float]]:
    """Bins with their counts and the share of the fullest."""
    if not values:
        return []
    edges = np.histogram_bin_edges(np.asarray(values, float), bins=12)
    if whole:
        edges = np.unique(np.append(np.floor(edges), np.floor(edges[-1]) + 1))
    counts = np.histogram(values, edges)[0].tolist()
    names = [f"{low:.0f}-{high - 1:.0f}" if whole else f"{low:.3f}" for low, high in itertools.pairwise(edges)]
    return [(name, count, count / max(counts)) for name, count in zip(names, counts, strict=True)]

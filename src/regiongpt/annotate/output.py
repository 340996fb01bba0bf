"""What a run makes of its store: the table of all captions, records to train on, exports, a data card and a page."""

import itertools
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from markupsafe import Markup

from regiongpt.annotate.filters import Decision, Filters, judge, words
from regiongpt.annotate.plan import MODES, WORDING, Ask, Closeup, Item, Source, Wanted, keys_of
from regiongpt.annotate.store import Store
from regiongpt.data.records import Record, Turn, region_row
from regiongpt.data.shards import Rejects, schema, write_records
from regiongpt.drawing import draw_regions
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.images import load_image
from regiongpt.report import Bar, Curve, bar_chart, line_chart, picture, write_page
from regiongpt.settings import Settings
from regiongpt.storage import locked, new_folder, sha256, write_file, write_json, writing

_ROWS: Final = 50_000  # in one file of the table
_SAMPLES: Final = 1000  # in one tar file


class Export(Settings):
    """Other layouts of the captions that are kept."""

    export: tuple[Literal["llava", "webdataset"], ...] = ()
    """llava (json lines of image and conversations), webdataset (tar files of images with their captions)"""


class Output:
    """Writes what is finished, at the end of a run or while another process goes on with it, and counts it."""

    def __init__(self, store: Store, source: Source, filters: Filters, export: Export) -> None:
        self.store, self.source, self.filters, self.export = store, source, filters, export.export
        self.out, self.noted = store.folder, store.described()
        self.wanted, self.fingerprint = Wanted(self.noted, source.places), self.noted["fingerprint"]
        self.closeup = Closeup(**{name: self.fingerprint[name] for name in Closeup.model_fields})
        self._asked = "; ".join(f"{name} {value}" for name, value in self.fingerprint.items())
        self.counts: Counter[str] = Counter()  # images, regions, captioned, kept, tokens_in, tokens_out
        self.lengths: Counter[int] = Counter()  # words of captions that are kept
        self.truths: Counter[tuple[str, bool]] = Counter()  # named and located
        self.reasons: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.similarities: list[float] = []
        self._vocabulary: set[str] = set()
        self._growth: list[tuple[int, int]] = []  # captions, and the different words in them
        self._gallery: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._files: list[dict[str, Any]] = []

    def write(self) -> None:
        """Write everything; what was there is replaced when all of it is whole. DataError where the disk is full."""
        decision = Decision(self.filters, self._scores())
        with locked(self.out / ".writing", wait=True), new_folder(self.out / ".new") as folder:
            (folder / "captions").mkdir()
            with _Exports(folder / "export", self.export, self.source.images) as exports:
                told = "../captions: model, prompt version, seed, seconds, tokens and cost of each caption"
                manifest = write_records(
                    folder / "records", self._records(decision, folder, exports), Rejects(), source="annotate",
                    images=str(self.source.images.resolve()), inputs=[], check_regions=False,
                    arguments={**self.fingerprint, "provenance": told},
                )  # fmt: skip
            self._flush(folder)
            more = {"filters": self.filters.model_dump(), **self.counts, "failures": self.failures}
            more |= {"cost": self.store.cost(), "shards": self._files, "records": manifest.counts}
            write_json(folder / "manifest.json", {**self.noted, **more, "regiongpt_version": version("regiongpt")})
            write_file(folder / "README.md", self._card())
            self._page(folder / "index.html")
            with writing(self.out):
                for made in folder.iterdir():
                    if (there := self.out / made.name).is_dir():
                        shutil.rmtree(there)
                    made.replace(there)
        (self.out / ".new").rmdir()

    # -----------------------------------------------------------------------------------------------------------------
    # Captions in the order of the source

    def _items(self) -> Iterator[tuple[str, Item, list[Ask], dict[bytes, dict[str, Any]], list[dict[str, Any]]]]:
        """Of each image its hash, all that was asked, what is known of that, and the rows of its captions."""
        for item in self.source:
            try:
                digest = self.store.image_digest(self.source.images / item.name, item.name)
            except OSError:
                digest = ""
            asks, mode = self.wanted.asks(digest, item), self.wanted.plan.mode
            known = self.store.get(keys_of(asks))
            whole = known.get(asks[0].key, {}).get("text", "") if asks[0].number < 0 else ""
            done = [ask for ask in asks if ask.number >= 0 and ask.mode == mode and ask.key in known]
            yield digest, item, asks, known, [self._row(ask, item, whole, known) for ask in done]

    def _row(self, ask: Ask, item: Item, whole: str, known: Mapping[bytes, Any]) -> dict[str, Any]:
        value, each = known[ask.key], item.regions[ask.number]
        score = known.get(ask.score or b"", {})
        located = known.get(ask.locate or b"", {}).get("number")
        classes = [other.category for other in item.regions]
        return {
            "id": f"{item.name}#{each.source_id or ask.number + 1}", "image": item.name, "width": item.width,
            "height": item.height, "number": ask.number, "category": each.category, "mode": ask.mode,
            "region": {**region_row(each.region), "category": each.category, "source_id": each.source_id},
            "caption": value["text"], "global_caption": whole, "prompt_version": value["version"],
            "crop": [*self.closeup.window(each.region, item.width, item.height)], "finished": value["at"],
            **{name: value[name] for name in ("model", "seed", "seconds", "tokens_in", "tokens_out", "cost")},
            "similarity": score.get("similarity"), "least_similarity": score.get("least"),
            **judge(value["text"], each.category, classes, located, ask.number + 1),
        }  # fmt: skip

    def _scores(self) -> dict[str, list[float]]:
        """Similarities by class, of captions that nothing else speaks against; needed for top shares alone."""
        scores: dict[str, list[float]] = {}
        if self.filters.top_share is not None:
            plain = Decision(self.filters.replace(top_share=None), {})
            for row in (row for *_, rows in self._items() for row in rows):
                if row["similarity"] is not None and not plain.why_not(row):
                    scores.setdefault(row["category"], []).append(row["similarity"])
            if not scores:
                raise DataError(f"{self.out}: no caption has a similarity; run with --similarity before --top-share")
        return scores

    def _records(self, decision: Decision, folder: Path, exports: "_Exports") -> Iterator[Record]:
        """The records of what is kept, and as they pass by the table, the exports and the counts."""
        for digest, item, asks, known, rows in self._items():
            missing = [ask.key for ask in asks if ask.key not in known]
            self.failures.update(failure.kind for failure in self.store.failures(missing).values())
            self.counts.update(images=1, regions=len(item.regions))
            for row in rows:
                row["reason"] = decision.why_not(row)
                row["kept"] = not row["reason"]
                self._count(row)
                own = [ask for ask in asks if ask.number == row["number"]]
                texts: dict[str, str] = {ask.mode: known.get(ask.key, {}).get("text", "") for ask in own}
                if len(texts) == len(MODES):
                    self._gallery.append({"item": item, "row": row, "texts": texts})
            self._rows += rows
            if len(self._rows) >= _ROWS:
                self._flush(folder)
            kept = [row for row in rows if row["kept"]]
            if not kept:
                continue
            turns = [Turn(task="describe", answer=row["caption"], regions=(k,)) for k, row in enumerate(kept, 1)]
            if whole := kept[0]["global_caption"]:
                turns.append(Turn(task="image_caption", answer=whole))
            record = Record(
                id=f"annotate/{digest[:16]}/{item.place}", source="annotate", image=item.name, width=item.width,
                height=item.height, regions=tuple(item.regions[row["number"]] for row in kept), turns=tuple(turns),
            )  # fmt: skip
            exports.add(record, kept)
            yield record

    def _count(self, row: Mapping[str, Any]) -> None:
        self.counts.update(captioned=1, tokens_in=row["tokens_in"], tokens_out=row["tokens_out"])
        self.truths.update((name, row[name]) for name in ("names_class", "located_back") if row[name] is not None)
        if row["similarity"] is not None:
            self.similarities.append(row["similarity"])
        if row["reason"]:
            self.reasons[row["reason"]] += 1
            return
        self.counts["kept"] += 1
        self.lengths[row["words"]] += 1
        self._vocabulary.update(words(row["caption"]))
        if (kept := self.counts["kept"]).bit_count() == 1 or kept % 2000 == 0:
            self._growth.append((kept, len(self._vocabulary)))

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
        path = folder / "captions" / f"captions-{len(self._files):05d}.parquet"
        pq.write_table(pa.Table.from_pylist(self._rows, schema=columns), path, compression="zstd")
        self._files.append({"file": f"captions/{path.name}", "rows": len(self._rows), "sha256": sha256(path)})
        self._rows = []

    # -----------------------------------------------------------------------------------------------------------------
    # For people

    def table(self) -> list[tuple[str, ...]]:
        """The paper's Table 2 with a line for this run."""
        own = f"{self.counts['images']:,}", f"{self.counts['kept']:,}", f"{self._mean_words:.2f}"
        return [*map(tuple, WORDING["table_2"]), (self.out.resolve().name, *own)]

    @property
    def _mean_words(self) -> float:
        return sum(length * count for length, count in self.lengths.items()) / max(self.lengths.total(), 1)

    def _card(self) -> str:
        head, *body = self.table()
        dropped, failed = (
            "\n".join(f"- {count:,}: {why}" for why, count in found.most_common()) or "- nothing"
            for found in (self.reasons, self.failures)
        )
        template = Path(__file__).parents[1] / "templates" / "captions_card.md"
        return template.read_text(encoding="utf-8").format(
            name=self.out.resolve().name, asked=self._asked,
            table="\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)), dropped=dropped,
            failed=failed, **{name: self.counts[name] for name in ("captioned", "regions", "images", "kept")},
        )  # fmt: skip

    def _page(self, path: Path) -> None:
        seconds, counts = self.store.busy_seconds(), self.counts
        growth = Curve(name="different words", xs=[n for n, _ in self._growth], ys=[n for _, n in self._growth])
        write_page(
            path, "annotations.html", title=f"Captions: {self.out.resolve().name}", table=self.table(), modes=MODES,
            made=self._asked, reasons=self.reasons.most_common(), failures=self.failures.most_common(),
            facts=[
                *((name, f"{counts[name]:,}") for name in ("images", "regions", "captioned", "kept")),
                ("words a caption", f"{self._mean_words:.2f} (RefCOCOg 8.46, the paper 87.14)"),
                ("different words", f"{len(self._vocabulary):,}"),
                ("name their class", self._share("names_class")),
                ("located back", self._share("located_back")),
                ("tokens", f"{counts['tokens_in']:,} read, {counts['tokens_out']:,} written"),
                ("cost", f"{self.store.cost():,.4f}"),
                ("regions a second", f"{counts['captioned'] / max(seconds, 1e-9):,.2f} over {seconds:,.1f} s of work"),
            ],
            charts=[
                _histogram("Words a caption", [*self.lengths.elements()], whole=True),
                _histogram("Similarity of crop and caption", self.similarities),
                line_chart("Vocabulary growth", [growth], "captions"),
            ],
            gallery=[shown for each in self._gallery if (shown := self._shown(**each))],
        )  # fmt: skip

    def _share(self, name: str) -> str:
        total = self.truths[name, True] + self.truths[name, False]
        return f"{self.truths[name, True] / total:.1%}" if total else "not asked"

    def _shown(self, item: Item, row: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any] | None:
        each = item.regions[row["number"]]
        try:
            photo = load_image(self.source.images / item.name)
            crop = picture(self.closeup.crop(photo, each.region), f"close-up of {each.category or 'a region'}", 320)
            whole = picture(draw_regions(photo, [each.region]), f"{item.name} with the region", 480)
        except RegionGPTError:
            return None
        return {**row, "crop": crop, "whole": whole, "texts": texts}


def _histogram(title: str, values: Sequence[float], whole: bool = False) -> Markup:
    if not values:
        return Markup("")
    edges = np.histogram_bin_edges(np.asarray(values, float), bins=12)
    if whole:
        edges = np.unique(np.ceil(edges))
        edges = edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1])
    counts, _ = np.histogram(values, edges)
    named = [f"{low:g}–{high:g}" if whole else f"{low:.3f}" for low, high in itertools.pairwise(edges)]
    bars = [(name, [Bar(value=float(count))]) for name, count in zip(named, counts.tolist(), strict=True)]
    return bar_chart(title, bars, ["captions"], unit="", reach=1.1 * float(counts.max()))


class _Exports(ExitStack):
    """The layouts of other trainers, an image at a time."""

    def __init__(self, folder: Path, names: Sequence[str], images: Path) -> None:
        super().__init__()
        self.folder, self.names, self.images, self.count = folder, names, images, 0
        self.tar: tarfile.TarFile | None = None
        self.callback(self._close_tar)
        if names:
            folder.mkdir()
        if "llava" in names:
            self.lines = self.enter_context((folder / "llava.jsonl").open("w", encoding="utf-8"))

    def add(self, record: Record, kept: list[dict[str, Any]]) -> None:
        """Add an image and its captions to each layout."""
        if "llava" in self.names:
            self.lines.write(json.dumps(_conversations(record, kept), ensure_ascii=False) + "\n")
        if "webdataset" in self.names:
            number, first = divmod(self.count, _SAMPLES)
            if self.tar is None or not first:
                self._close_tar()
                self.tar = tarfile.open(self.folder / f"captions-{number:05d}.tar", "w")  # noqa: SIM115
            path = self.images / record.image
            whole = json.dumps({"record": record.row(), "captions": kept}, ensure_ascii=False).encode()
            for suffix, data in ((path.suffix.lower() or ".jpg", path.read_bytes()), (".json", whole)):
                member = tarfile.TarInfo(record.id.replace("/", "-") + suffix)
                member.size = len(data)
                self.tar.addfile(member, BytesIO(data))
            self.count += 1

    def _close_tar(self) -> None:
        if self.tar is not None:
            self.tar.close()


def _conversations(record: Record, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """An image as LLaVA's training reads it: a region is a box in fractions of the image's sides, written out."""
    said: list[dict[str, str]] = []
    for row, each in zip(kept, record.regions, strict=True):
        box = np.array(each.region.bounds(record.width, record.height)) / (2 * (record.width, record.height))
        where = ", ".join(f"{value:.3f}" for value in box)
        begin = "" if said else "<image>\n"
        said.append({"from": "human", "value": f"{begin}Describe the region [{where}] of the image in detail."})
        said.append({"from": "gpt", "value": row["caption"]})
    return {"id": record.id, "image": record.image, "conversations": said}

"""The verb ``annotate``: settings to a run, a run to files."""

import asyncio
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, model_validator

from regiongpt.annotate.captioners import Asking, open_captioner
from regiongpt.annotate.engine import Ask, Keys, Limits, Plan, Run, Work
from regiongpt.annotate.filters import Filters, Similarity
from regiongpt.annotate.output import Export, Output
from regiongpt.annotate.prompts import Closeup
from regiongpt.annotate.source import Item, Source
from regiongpt.annotate.store import Store, key_of
from regiongpt.console import progress, tell
from regiongpt.data.shards import CROWD, require_data_extra
from regiongpt.errors import ConfigError
from regiongpt.settings import Settings
from regiongpt.storage import reason


class Where(Settings):
    """What is captioned, and where it goes."""

    images: Path | None = None
    """folder of the images"""
    regions: Path | None = None
    """json of COCO, LVIS, V3Det or another tool's COCO export, or a folder of records"""
    out: Path | None = None
    """folder of the captions; the same command goes on with what is there"""
    refilter: Path | None = None
    """write the files of such a folder again, with other filters or while a run goes on; no model is asked"""
    crowds: bool = False
    """caption what is marked as a crowd too, as some tools mark every mask"""
    similarity: Path | None = None
    """folder of a CLIP or SigLIP model that scores how well a caption fits its crop"""
    engine: Literal["local", "ray"] = "local"
    """ray spreads images over a Ray cluster"""
    workers: int | None = Field(None, ge=1)
    """with --engine ray: processes (default: one a node)"""

    @model_validator(mode="after")
    def _check(self) -> "Where":
        if self.refilter is not None and (self.images or self.regions or self.out):
            raise ValueError("--refilter takes images, regions and captions from its folder; leave the others out")
        missing = [f"--{name}" for name in ("images", "regions", "out") if getattr(self, name) is None]
        if self.refilter is None and missing:
            raise ValueError(f"give {', '.join(missing)}")
        if self.workers is not None and self.engine != "ray":
            raise ValueError("--workers goes with --engine ray")
        return self


OPTIONS: Final[dict[str, Any]] = {
    "data": Where, "captioner": Asking, "captions": Plan, "close-ups": Closeup, "limits": Limits, "filters": Filters,
    "exports": Export,
}  # fmt: skip
"""All options of the verb by their headings in its help, in the order of :func:`annotate`'s arguments."""


def annotate(
    where: Where, asking: Asking, plan: Plan, closeup: Closeup, limits: Limits, filters: Filters, export: Export
) -> int:
    """Caption what is missing, write the files, and say what there is; of an interrupted run only its store.

    Returns:
        The exit code: 0; 2 where regions are left without a caption, 130 after Ctrl-C.

    Raises:
        RegionGPTError: The run cannot begin or go on; everything finished is kept.
    """
    require_data_extra()
    if where.refilter is not None:
        with Store(where.refilter, read_only=True) as store:
            there = store.described()
            source = Source(Path(there["images"]), Path(there["regions"]), there["crowds"])
            _write(Output(store, source, _keys(there, source), filters, export, there), None)
        return 0
    if limits.max_cost is not None and (asking.input_price is None or asking.output_price is None):
        raise ConfigError("--max-cost: give --input-price and --output-price, of a million tokens, too")
    assert where.images
    assert where.regions
    assert where.out
    source = Source(where.images, where.regions, where.crowds)
    if plan.mode == "full" and not any(each.category for item in source for each in item.regions):
        raise ConfigError(f"--regions {source.path}: no region has a class name to tell; give names, or --mode context")
    with Store(where.out) as store:
        run = asyncio.run(_caption(store, source, where, asking, plan, closeup, limits))
        if run.ended == "interrupted":
            tell(f"{store.folder}: stopped; the same command goes on, and --refilter {store.folder} writes the files")
            return 130
        there = store.described()
        return _write(Output(store, source, _keys(there, source), filters, export, there), run)


async def _caption(
    store: Store, source: Source, where: Where, asking: Asking, plan: Plan, closeup: Closeup, limits: Limits
) -> Run:
    captioner = await asyncio.to_thread(open_captioner, asking, plan.seed)
    try:
        await captioner.open()
        if plan.locate_back and not captioner.locates:
            raise ConfigError("--locate-back: facts reads no captions; caption with a model, or leave it out")
        scorer = Similarity(where.similarity, asking.device) if where.similarity else None
        fingerprint = {
            **captioner.identity, "mode": plan.mode, "seed": plan.seed, "temperature": asking.temperature,
            **closeup.model_dump(), "regions": source.path.name,
        }  # fmt: skip
        noted = {
            "images": str(source.images.resolve()), "regions": str(source.path.resolve()), "crowds": where.crowds,
            "plan": plan.model_dump(), "scorer": scorer.identity if scorer is not None else None,
            "max_new_tokens": asking.max_new_tokens,
        }  # fmt: skip
        store.begin(fingerprint, noted)
        work = Work(
            keys=_keys(store.described(), source), captioner=captioner, keeper=store, closeup=closeup, asking=asking,
            images=source.images, scorer=scorer, spent=store.cost(),
        )  # fmt: skip
        ticks = iter(progress(itertools.repeat(None), "captioning", "regions", source.count))
        run = Run(work, limits, functools.partial(next, ticks))
        pending = _pending(work, store, source, run)
        if where.engine == "ray":
            from regiongpt.annotate.on_ray import on_ray

            on_ray(run, pending, where.workers, where.similarity)
        else:
            await run.go(pending)
        return run
    finally:
        await captioner.close()


def _keys(noted: Mapping[str, Any], source: Source) -> Keys:
    """The keys of a run as it was noted."""
    plan, fingerprint = Plan(**noted["plan"]), noted["fingerprint"]
    rng = np.random.default_rng((plan.seed, 1))
    places = rng.permutation(source.places)[: plan.gallery].tolist()
    gallery = dict(zip(places, rng.integers(0, 2**31, len(places)).tolist(), strict=True))
    # Mode and seed are in each key by themselves, and a region is the same in whatever file it stands.
    settings = {name: value for name, value in fingerprint.items() if name not in ("mode", "seed", "regions")}
    return Keys(plan=plan, settings=settings, scorer=noted["scorer"], gallery=gallery)


def _pending(work: Work, store: Store, source: Source, run: Run) -> Iterator[tuple[str, Item, list[Ask]] | None]:
    """The images of which something is missing, and a None now and then between them."""
    for item in source:
        try:
            digest = store.image_digest(source.images / item.name, item.name)
        except OSError as error:
            store.fail(key_of("file", item.name), "image that cannot be used", reason(error))
            run.note("image that cannot be used", f"{item.name}: {reason(error)}")
            continue
        asks = work.keys.wanted(digest, item)
        keys = [key for ask in asks for key in ask.keys]
        if len(store.finished(keys)) < len(keys):
            yield digest, item, asks
            continue
        for _ in item.regions:
            run.tick()
        if item.place % 32 == 0:
            yield None


def _write(output: Output, run: Run | None) -> int:
    output.write()
    table, out, counts = output.table(), output.out, output.counts
    widths = [max(len(row[k]) for row in table) for k in range(4)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{out}: {counts['captioned']:,} of {counts['regions']:,} regions captioned, {counts['kept']:,} kept")
    for why, count in output.reasons.most_common():
        print(f"not kept: {count:,} {why}")
    if run is not None and run.ended:
        print(f"ended by --{run.ended}; the same command goes on")
    print(f"see {out / 'index.html'}")
    rejects = output.source.rejects
    wrong = [f"{count:,} {kind}" for kind, count in rejects.counts.items() if kind != CROWD]
    if wrong:
        tell(f"regiongpt: error: {output.source.path}: left out: {', '.join(wrong)}; the last: {rejects.last}")
    failed = [f"{count:,} {kind}" for kind, count in run.failures.most_common()] if run is not None else []
    if run is not None and failed:
        tell(f"regiongpt: error: failed: {', '.join(failed)}; the last: {run.last}; the same command tries again")
    return 2 if wrong or failed else 0

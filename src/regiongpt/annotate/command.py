"""The verb ``annotate``: settings to a run, a run to files."""

import asyncio
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from regiongpt.annotate.captioners import Asking, open_captioner
from regiongpt.annotate.engine import Engine, Limits
from regiongpt.annotate.filters import Filters, Similarity
from regiongpt.annotate.output import Export, Output
from regiongpt.annotate.plan import Ask, Closeup, Item, Plan, Source, Wanted, keys_of
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


OPTIONS: Final[dict[str, Any]] = {  # by their headings in the help, in the order of the arguments of annotate()
    "data": Where, "captioner": Asking, "captions": Plan, "close-ups": Closeup, "limits": Limits, "filters": Filters,
    "exports": Export,
}  # fmt: skip


def annotate(
    where: Where, asking: Asking, plan: Plan, closeup: Closeup, limits: Limits, filters: Filters, export: Export
) -> int:
    """Caption what is missing, write the files, and say what there is; of an interrupted run only its store.

    Returns:
        The exit code: 0; 2 where regions are left without a caption, 130 after Ctrl-C.
    """
    require_data_extra()
    if where.refilter is not None:
        with Store(where.refilter, read_only=True) as store:
            noted = store.described()
            source = Source(Path(noted["images"]), Path(noted["regions"]), noted["crowds"])
            return _write(Output(store, source, filters, export))
    if limits.max_cost is not None and (asking.input_price is None or asking.output_price is None):
        raise ConfigError("--max-cost: give --input-price and --output-price, of a million tokens, too")
    assert where.images
    assert where.regions
    assert where.out
    source = Source(where.images, where.regions, where.crowds)
    if plan.mode == "full" and not any(each.category for item in source for each in item.regions):
        raise ConfigError(f"--regions {source.path}: no region has a class name to tell; give names, or --mode context")
    with Store(where.out) as store:
        engine = asyncio.run(_caption(store, source, where, asking, plan, closeup, limits))
        if engine.ended == "interrupted":
            tell(f"{store.folder}: stopped; the same command goes on, and --refilter {store.folder} writes the files")
            return 130
        return _write(Output(store, source, filters, export), engine)


async def _caption(
    store: Store, source: Source, where: Where, asking: Asking, plan: Plan, closeup: Closeup, limits: Limits
) -> Engine:
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
        described = {
            "images": str(source.images.resolve()), "regions": str(source.path.resolve()), "crowds": where.crowds,
            "plan": plan.model_dump(), "scorer": scorer.identity if scorer is not None else None,
            "max_new_tokens": asking.max_new_tokens,
        }  # fmt: skip
        store.begin(fingerprint, described)
        wanted = Wanted(store.described(), source.places)
        ticks = iter(progress(itertools.repeat(None), "captioning", "regions", source.count))
        tick = functools.partial(next, ticks)
        engine = Engine(wanted, captioner, store, closeup, asking, source.images, scorer, limits, tick)
        pending = _pending(engine, store, source)
        if where.engine == "ray":
            from regiongpt.annotate.on_ray import on_ray

            on_ray(engine, pending, where.workers, where.similarity)
        else:
            await engine.go(pending)
        return engine
    finally:
        await captioner.close()


def _pending(engine: Engine, store: Store, source: Source) -> Iterator[tuple[str, Item, list[Ask]] | None]:
    """The images of which something is missing, and a None now and then between them."""
    for item in source:
        try:
            digest = store.image_digest(source.images / item.name, item.name)
        except OSError as error:
            store.fail(key_of("file", item.name), "image that cannot be used", reason(error))
            engine.note("image that cannot be used", f"{item.name}: {reason(error)}")
            continue
        asks = engine.wanted.asks(digest, item)
        if not store.has(keys_of(asks)):
            yield digest, item, asks
            continue
        for _ in item.regions:
            engine.tick()
        if item.place % 32 == 0:
            yield None


def _write(output: Output, engine: Engine | None = None) -> int:
    """Write the files and say what is in them, in one line on standard error what failed."""
    output.write()
    table, out, counts, rejects = output.table(), output.out, output.counts, output.source.rejects
    for name, *numbers in table:
        print(f"{name:<20}" + "".join(f"{number:>15}" for number in numbers))
    print(f"\n{out}: {counts['captioned']:,} of {counts['regions']:,} regions captioned, {counts['kept']:,} kept")
    for why, count in output.reasons.most_common():
        print(f"not kept: {count:,} {why}")
    if engine is not None and engine.ended:
        print(f"ended by --{engine.ended}; the same command goes on")
    print(f"see {out / 'index.html'}")
    wrong = []
    if left_out := [f"{count:,} {kind}" for kind, count in rejects.counts.items() if kind != CROWD]:
        wrong.append(f"left out of {output.source.path}: {', '.join(left_out)}; the last: {rejects.last}")
    if engine is not None and engine.failures:
        failed = ", ".join(f"{count:,} {kind}" for kind, count in engine.failures.most_common())
        wrong.append(f"failed: {failed}; the last: {engine.last}; the same command tries again")
    if wrong:
        tell(f"regiongpt: error: {'; '.join(wrong)}")
    return 2 if wrong else 0

"""The verb ``annotate``: settings to a run, a run to files."""

import asyncio
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, model_validator

from regiongpt.annotate.captioners import Asking, Captioner, open_captioner
from regiongpt.annotate.engine import Ask, Keys, Limits, Plan, Progress, Run, Work
from regiongpt.annotate.filters import Filters, Similarity
from regiongpt.annotate.output import PAGE, Export, Output
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
        if self.refilter is None and not (self.images and self.regions and self.out):
            missing = [f"--{name}" for name in ("images", "regions", "out") if getattr(self, name) is None]
            raise ValueError(f"give {', '.join(missing)}")
        if self.workers is not None and self.engine != "ray":
            raise ValueError("--workers goes with --engine ray")
        return self


OPTIONS: Final[dict[str, Any]] = {
    "data": Where,
    "captioner": Asking,
    "captions": Plan,
    "close-ups": Closeup,
    "limits": Limits,
    "filters": Filters,
    "exports": Export,
}
"""All options of the verb, by their headings in its help; in the order of :class:`Annotation`'s arguments."""


class Annotation:
    """One call of the verb.

    Args:
        where: What is captioned, and where it goes.
        asking: Who captions.
        plan: What is asked.
        closeup: How crops are made.
        limits: When to end early.
        filters: What is kept.
        export: Other layouts.

    Raises:
        ConfigError: Options do not go together, or a library is missing.
    """

    def __init__(
        self,
        where: Where,
        asking: Asking,
        plan: Plan,
        closeup: Closeup,
        limits: Limits,
        filters: Filters,
        export: Export,
    ) -> None:
        self.where, self.asking, self.plan, self.closeup = where, asking, plan, closeup
        self.limits, self.filters, self.export = limits, filters, export
        if limits.max_cost is not None and (asking.input_price is None or asking.output_price is None):
            raise ConfigError("--max-cost: give --input-price and --output-price, of a million tokens, too")
        require_data_extra()

    def run(self) -> int:
        """Caption what is missing, write the files, and say what there is; of an interrupted run only its store.

        Returns:
            The exit code: 0; 2 where regions are left without a caption, 130 after Ctrl-C.

        Raises:
            RegionGPTError: The run cannot begin or go on; everything finished is kept.
        """
        if self.where.refilter is not None:
            with Store(self.where.refilter, read_only=True) as store:
                described = store.described()
                if not described:
                    raise ConfigError(f"{self.where.refilter}: no run was begun there")
                source = Source(Path(described["images"]), Path(described["regions"]), described["crowds"])
                self._write(store, source, Progress())
            return 0
        assert self.where.images
        assert self.where.regions
        assert self.where.out
        source = Source(self.where.images, self.where.regions, self.where.crowds)
        if self.plan.mode == "full" and not any(each.category for item in source for each in item.regions):
            raise ConfigError(
                f"--regions {source.path}: no region has a class name to tell; give names, or --mode context"
            )
        with Store(self.where.out) as store:
            ended = asyncio.run(self._caption(source, store))
            if ended.ended == "interrupted":
                tell(
                    f"{store.folder}: stopped; the same command goes on, and --refilter {store.folder} writes the files"
                )
                return 130
            return self._write(store, source, ended)

    def _write(self, store: Store, source: Source, ended: Progress) -> int:
        described = store.described()
        output = Output(
            store=store,
            source=source,
            keys=keys_of(described, source),
            closeup=Closeup(**{name: described["fingerprint"][name] for name in Closeup.model_fields}),
            filters=self.filters,
            export=self.export,
            described=described,
        )
        found, table = output.write(), output.table()
        widths = [max(len(row[k]) for row in table) for k in range(4)]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in table]
        lines += [
            "",
            f"{store.folder}: {found.captioned:,} of {found.regions:,} regions captioned, {found.kept:,} kept",
        ]
        lines += [f"not kept: {count:,} {why}" for why, count in found.reasons.most_common()]
        if ended.ended:
            lines.append(f"ended by --{ended.ended}; the same command goes on")
        print("\n".join([*lines, f"see {store.folder / PAGE}"]))
        wrong = {kind: count for kind, count in source.rejects.counts.items() if kind != CROWD}
        if wrong:
            listed = ", ".join(f"{count:,} {kind}" for kind, count in wrong.items())
            tell(f"regiongpt: error: {source.path}: left out: {listed}; the last: {source.rejects.last}")
        if ended.failures:
            listed = ", ".join(f"{count:,} {kind}" for kind, count in ended.failures.most_common())
            tell(f"regiongpt: error: failed: {listed}; the last: {ended.last}; the same command tries again")
        return 2 if wrong or ended.failures else 0

    async def _caption(self, source: Source, store: Store) -> Progress:
        captioner = await asyncio.to_thread(open_captioner, self.asking, self.closeup, self.plan.seed)
        try:
            await captioner.open()
            if self.plan.locate_back and not captioner.locates:
                raise ConfigError("--locate-back: facts reads no captions; caption with a model, or leave it out")
            scorer = Similarity(self.where.similarity, self.asking.device) if self.where.similarity else None
            described = self._describe(source, captioner, scorer)
            store.begin(described.pop("fingerprint"), described)
            keys = keys_of(store.described(), source)
            work = Work(
                keys=keys, captioner=captioner, keeper=store, closeup=self.closeup, asking=self.asking,
                images=source.images, scorer=scorer, spent=store.cost(),
            )  # fmt: skip
            ticks = iter(progress(itertools.repeat(None), "captioning", "regions", source.count))
            run = Run(work, self.limits, functools.partial(next, ticks))
            pending = _pending(work, store, source, run)
            if self.where.engine == "ray":
                from regiongpt.annotate.on_ray import on_ray

                return on_ray(run, pending, self.where.workers, self.where.similarity)
            return await run.go(pending)
        finally:
            await captioner.close()

    def _describe(self, source: Source, captioner: Captioner, scorer: Similarity | None) -> dict[str, Any]:
        fingerprint = {
            **captioner.identity,
            "mode": self.plan.mode,
            "seed": self.plan.seed,
            "temperature": self.asking.temperature,
            **self.closeup.model_dump(),
            "regions": source.path.name,
        }
        return {
            "fingerprint": fingerprint,
            "images": str(source.images.resolve()),
            "regions": str(source.path.resolve()),
            "crowds": self.where.crowds,
            "plan": self.plan.model_dump(mode="json"),
            "scorer": dict(scorer.identity) if scorer is not None else None,
            "max_new_tokens": self.asking.max_new_tokens,
        }


def keys_of(described: dict[str, Any], source: Source) -> Keys:
    """The keys of a run as it was noted."""
    plan = Plan(**described["plan"])
    places = source.places
    rng = np.random.default_rng((plan.seed, 1))
    chosen = rng.permutation(places)[: plan.gallery].tolist()
    numbers = rng.integers(0, 2**31, len(chosen)).tolist()
    settings = {
        name: value for name, value in described["fingerprint"].items() if name not in ("mode", "regions", "seed")
    }
    return Keys(
        plan=plan, settings=settings, scorer=described["scorer"], gallery=dict(zip(chosen, numbers, strict=True))
    )


def _pending(work: Work, store: Store, source: Source, run: Run) -> Iterator[tuple[str, Item, list[Ask]] | None]:
    """The images of which something is missing, and a None now and then between them."""
    for item in source:
        try:
            digest = store.image_digest(source.images / item.name, item.name)
        except OSError as error:
            store.fail(key_of("file", item.name), "unreadable image", reason(error))
            run.note("unreadable image", f"{item.name}: {reason(error)}")
            continue
        asks = work.wanted(digest, item)
        keys = [key for ask in asks for key in ask.keys]
        if len(store.finished(keys)) < len(keys):
            yield digest, item, asks
            continue
        for _ in item.regions:
            run.tick()
        if item.place % 32 == 0:
            yield None

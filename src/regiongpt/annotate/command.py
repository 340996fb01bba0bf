"""The verb ``annotate``: options to a run, a run to files."""

import asyncio
from typing import Any, Final

from regiongpt.annotate.captioners import make_captioner
from regiongpt.annotate.engine import Run, scorer_of
from regiongpt.annotate.options import Captions, Filters, Options
from regiongpt.annotate.output import Output
from regiongpt.annotate.plan import works
from regiongpt.data.shards import CROWD, require_data_extra
from regiongpt.data.sources import AnnotatedImages
from regiongpt.environment import tell
from regiongpt.errors import ConfigError
from regiongpt.storage import Store, locked

_RUN: Final = "run"
"""Key of what the store notes about the run."""


def annotate(options: Options) -> int:
    """Caption what is missing, write the files and print a summary; an interrupted run only keeps its store.

    Returns:
        The exit code: 0; 2 where requests failed or regions cannot be used, 130 after Ctrl-C.
    """
    require_data_extra()
    if out := options.refilter:
        store = Store(out / "store")
        if (noted := store.get([_RUN]).get(_RUN)) is None:
            raise ConfigError(f"{out}: holds no captions; check the path")
        kept = {name: getattr(options, name) for name in Filters.model_fields}
        options = Options(**{**noted["options"], **kept, "out": out})
        return _write(Output(options, store, _source(options), noted))
    source, out = _source(options), options.out
    assert out
    if options.mode == "full" and not any(each.category for record in source for each in record.regions):
        raise ConfigError(f"--regions {source.path}: no region has a class name; add names, or use --mode context")
    with locked(out), Store(out / "store") as store:
        run, noted = asyncio.run(_caption(options, source, store))
        if run.ended != "interrupted":
            return _write(Output(options, store, source, noted), run)
    tell(f"{out}: stopped; run the same command again to resume, or --refilter {out} to write the files")
    return 130


def _source(options: Options) -> AnnotatedImages:
    assert options.images
    assert options.regions
    return AnnotatedImages(options.images, options.regions, options.crowds)


async def _caption(options: Options, source: AnnotatedImages, store: Store) -> tuple[Run, dict[str, Any]]:
    """Run both stages; the finished run, and what the store notes of it."""
    captioner = await asyncio.to_thread(make_captioner, options)
    try:
        scorer, identity = scorer_of(options)
        noted = _begin(options, source, store, captioner.identity, identity)
        run, images = Run(options, store, captioner, source.count), works(source, store, options, noted, write=True)
        if options.engine == "ray":
            from regiongpt.annotate.on_ray import on_ray

            on_ray(run, images)
        else:
            await run.go(images, scorer)
        return run, noted
    finally:
        await captioner.close()


def _begin(
    options: Options, source: AnnotatedImages, store: Store, captioner: dict[str, str], scorer: str
) -> dict[str, Any]:
    """What the store notes of a run; ConfigError where it holds one with another fingerprint."""
    own = ("mode", "seed", "temperature", *(name for name in Captions.model_fields if name.startswith("crop")))
    now = {**captioner, **{name: getattr(options, name) for name in own}, "regions": source.path.name}
    noted = {"fingerprint": now, "options": options.noted(), "scorer": scorer}
    before = store.get([_RUN]).get(_RUN, noted)["fingerprint"]
    differs = [
        f"{name} is {before.get(name)!r:.60} there and {now.get(name)!r:.60} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differs and store.total("seconds"):  # of answers; where there is none yet, nothing is mixed up
        raise ConfigError(f"{options.out}: holds another run: {'; '.join(differs)}; give another --out")
    store.add({_RUN: noted})
    return noted


def _write(output: Output, run: Run | None = None) -> int:
    """Write the files and print a summary; failures go to standard error in one line."""
    output.write()
    for name, *numbers in output.table():
        print(f"{name:<20}" + "".join(f"{number:>15}" for number in numbers))
    out, counts, source = output.out, output.counts, output.source
    print(f"\n{out}: {counts['captions']:,} of {counts['regions']:,} regions captioned, {counts['kept']:,} kept")
    for why, count in output.reasons.most_common():
        print(f"not kept: {count:,} {why}")
    if run and run.ended and counts["captions"] < counts["regions"]:
        print(f"ended by --{run.ended}; run the same command again to resume")
    print(f"see {out / 'index.html'}")
    wrong = []
    if left_out := [f"{count:,} {kind}" for kind, count in source.rejects.counts.items() if kind != CROWD]:
        wrong.append(f"skipped in {source.path}: {', '.join(left_out)}; the last: {source.rejects.last}")
    if run and output.failures:
        failed = ", ".join(f"{count:,} {kind}" for kind, count in output.failures.most_common())
        wrong.append(f"failed: {failed}; the last: {output.last_failure}; run the same command again to retry")
    if wrong:
        tell(f"regiongpt: error: {'; '.join(wrong)}")
    return 2 if wrong else 0

"""The same stages over Ray Data: workers answer, and send back rows that this process alone writes to its store.

A row never raises, since one that does ends the whole job; it carries its failures instead. Rows may come back in any
order: what is finished is found by its key.
"""

import asyncio
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from regiongpt.annotate.captioners import open_captioner
from regiongpt.annotate.engine import Engine, Limits
from regiongpt.annotate.filters import Similarity
from regiongpt.annotate.plan import Ask, Item, keys_of
from regiongpt.errors import ConfigError, RegionGPTError

_IMAGES: Final = 16
"""Images in a block, which a worker answers together."""
_ROUND: Final = 4096
"""Images handed to Ray at a time, which bounds memory."""


class _Kept:
    """What a worker knows about some images, in place of the store, and ``said``: calls for the process at home."""

    def __init__(self, rows: list[Any]) -> None:
        self.said: list[tuple[str, Any]] = []
        known = {key: value for _, known, _ in rows for key, value in known.items()}
        failed = {key: value for _, _, failed in rows for key, value in failed.items()}
        self.get = lambda keys: {key: known[key] for key in keys if key in known}
        self.failures = lambda keys: {key: failed[key] for key in keys if key in failed}
        self.cost = float
        self.add, self.fail, self.note = (
            lambda *values, what=what: self.said.append((what, values)) for what in ("add", "fail", "note")
        )


class _Remote(Engine):
    def note(self, kind: str, why: str) -> None:
        self.keeper.note(kind, why)


class _Worker:
    """One process of the cluster, with a captioner of its own for each block."""

    def __init__(self, recipe: bytes) -> None:
        self.wanted, self.asking, self.closeup, self.images, similarity = pickle.loads(recipe)
        self.scorer = Similarity(similarity, self.asking.device) if similarity else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            said = asyncio.run(self._answer([pickle.loads(row) for row in batch["row"]]))
        except Exception as error:  # ends the run at home, with its own message
            said = [("error", error if isinstance(error, RegionGPTError) else RuntimeError(repr(error)))]
        return {"said": [pickle.dumps(said)]}

    async def _answer(self, rows: list[Any]) -> list[tuple[str, Any]]:
        kept = _Kept(rows)
        captioner = open_captioner(self.asking, self.wanted.plan.seed)
        try:
            await captioner.open()
            engine = _Remote(
                self.wanted, captioner, kept, self.closeup, self.asking, self.images, self.scorer, Limits(), int
            )
            outcomes = await asyncio.gather(*(engine.image(*found) for found, _, _ in rows), return_exceptions=True)
        finally:
            await captioner.close()
        return [*kept.said, *(("error", each) for each in outcomes if isinstance(each, BaseException))]


def on_ray(
    engine: Engine, pending: Iterator[tuple[str, Item, list[Ask]] | None], workers: int | None, similarity: Path | None
) -> None:
    """Work through images on the cluster that ``RAY_ADDRESS`` names, or here; by default a worker for each node."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--engine ray: Ray is not installed; install it: pip install '.[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    recipe = pickle.dumps((engine.wanted, engine.asking, engine.closeup, engine.images, similarity))
    count = workers or max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    apply = {"add": engine.keeper.add, "fail": engine.keeper.fail, "note": engine.note}
    for rows in _rounds(engine.keeper, pending):
        blocks = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _IMAGES))
        answers = blocks.map_batches(
            _Worker, fn_constructor_args=(recipe,), batch_size=_IMAGES, concurrency=count, batch_format="numpy"
        )
        for row in answers.iter_rows():
            for what, values in pickle.loads(row["said"]):
                if what == "error":
                    raise values
                engine.spent += values[-1] if what != "note" and isinstance(values[-1], float) else 0.0
                apply[what](*values)
            if engine.is_over():  # what the cluster has under way is dropped, and asked again
                return


def _rounds(keeper: Any, pending: Iterator[Any]) -> Iterator[list[dict[str, bytes]]]:
    images = (found for found in pending if found is not None)
    while rows := [
        {"row": pickle.dumps((found, keeper.get(keys), keeper.failures(keys)))}
        for found in itertools.islice(images, _ROUND)
        for keys in [keys_of(found[2])]
    ]:
        yield rows

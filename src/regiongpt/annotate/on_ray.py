"""The same stages over Ray Data: workers answer, and send back rows that this process alone writes to its store.

A row never raises, since one that does ends the whole job; it carries its failures instead. Rows may come back in any
order: what is finished is found by its key.
"""

import asyncio
import pickle
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

from regiongpt.annotate.captioners import open_captioner
from regiongpt.annotate.engine import Ask, Run, Work
from regiongpt.annotate.filters import Similarity
from regiongpt.annotate.source import Item
from regiongpt.errors import ConfigError, RegionGPTError

_IMAGES: Final = 16
"""Images in a block, which a worker answers together."""
_ROUND: Final = 4096
"""Images handed to Ray at a time, which bounds memory."""


class _Kept:
    """What a worker knows and finds out about some images, in place of the store."""

    def __init__(self) -> None:
        self.known: dict[bytes, Any] = {}
        self.failed: dict[bytes, Any] = {}
        self.said: list[tuple[str, Any]] = []

    def get(self, keys: Collection[bytes]) -> dict[bytes, Any]:
        return {key: self.known[key] for key in keys if key in self.known}

    def failures(self, keys: Collection[bytes]) -> dict[bytes, Any]:
        return {key: self.failed[key] for key in keys if key in self.failed}

    def add(self, *values: Any) -> None:
        self.said.append(("add", values))

    def fail(self, *values: Any) -> None:
        self.said.append(("fail", values))

    def note(self, *values: str) -> None:
        self.said.append(("note", values))


class _Worker:
    """One process of the cluster, with a captioner of its own for each block."""

    def __init__(self, recipe: bytes) -> None:
        self.keys, self.asking, self.closeup, self.images, similarity = pickle.loads(recipe)
        self.scorer = Similarity(similarity, self.asking.device) if similarity else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            said = asyncio.run(self._answer([pickle.loads(row) for row in batch["row"]]))
        except Exception as error:  # ends the run at home, with its own message
            said = [("error", error if isinstance(error, RegionGPTError) else RuntimeError(repr(error)))]
        return {"said": [pickle.dumps(said)]}

    async def _answer(self, images: list[Any]) -> list[tuple[str, Any]]:
        kept = _Kept()
        captioner = open_captioner(self.asking, self.keys.plan.seed)
        try:
            await captioner.open()
            work = Work(
                keys=self.keys, captioner=captioner, keeper=kept, closeup=self.closeup, asking=self.asking,
                images=self.images, scorer=self.scorer, noted=kept.note,
            )  # fmt: skip
            for _, known, failed in images:
                kept.known |= known
                kept.failed |= failed
            outcomes = await asyncio.gather(*(work.image(*found) for found, _, _ in images), return_exceptions=True)
        finally:
            await captioner.close()
        return [*kept.said, *(("error", each) for each in outcomes if isinstance(each, BaseException))]


def on_ray(
    run: Run, pending: Iterator[tuple[str, Item, list[Ask]] | None], workers: int | None, similarity: Path | None
) -> None:
    """Work through images on the cluster that ``RAY_ADDRESS`` names, or on this machine.

    Args:
        run: Counts and limits.
        pending: What is missing.
        workers: Processes; one for each node of the cluster where None.
        similarity: Folder of the model that scores.

    Raises:
        ConfigError: Ray is not installed.
        RegionGPTError: The run cannot go on; everything finished is kept.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--engine ray: Ray is not installed; install it: pip install '.[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    work = run.work
    recipe = pickle.dumps((work.keys, work.asking, work.closeup, work.images, similarity))
    count = workers or max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    apply: dict[str, Callable[..., None]] = {"add": work.keeper.add, "fail": work.keeper.fail, "note": run.note}
    for rows in _rounds(work, pending):
        blocks = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _IMAGES))
        answers = blocks.map_batches(
            _Worker, fn_constructor_args=(recipe,), batch_size=_IMAGES, concurrency=count, batch_format="numpy"
        )
        for row in answers.iter_rows():
            for what, values in pickle.loads(row["said"]):
                if what == "error":
                    raise values
                work.spent += values[2] if what == "add" and len(values) > 2 else 0.0
                apply[what](*values)
            if run.is_over():  # what the cluster has under way is dropped, and asked again
                return


def _rounds(work: Work, pending: Iterator[Any]) -> Iterator[list[dict[str, bytes]]]:
    rows: list[dict[str, bytes]] = []
    for found in pending:
        if found is not None:
            keys = [key for ask in found[2] for key in ask.keys]
            rows.append({"row": pickle.dumps((found, work.keeper.get(keys), work.keeper.failures(keys)))})
        if len(rows) == _ROUND:
            yield rows
            rows = []
    if rows:
        yield rows

"""The same stages over Ray Data: workers answer in any order, failures as values, and this process alone stores."""

import asyncio
import pickle
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Final

from regiongpt.annotate.captioners import make_captioner
from regiongpt.annotate.engine import ImageTask, Run, scorer_of
from regiongpt.annotate.options import Options
from regiongpt.annotate.plan import Work
from regiongpt.errors import ConfigError, RegionGPTError

_IMAGES: Final = 16
"""Images in a block, which a worker answers together."""
_ROUND: Final = 4096
"""Images handed to Ray at a time, which bounds memory."""


class _Worker:
    """One process of the cluster; answers a block with what to keep, the images that are done, and errors."""

    def __init__(self, options: Options) -> None:
        self.options, self.loop = options, asyncio.Runner()
        self.models: Any = None  # loaded at the first block

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        kept: list[Any] = []
        try:
            self.loop.run(self._answer([pickle.loads(row) for row in batch["row"]], kept))
        except Exception as error:  # ends the run at home, with its own message
            kept.append(error if isinstance(error, RegionGPTError) else RuntimeError(repr(error)))
        return {"kept": [pickle.dumps(kept)]}

    async def _answer(self, works: list[Work], kept: list[Any]) -> None:
        if self.models is None:
            self.models = await asyncio.to_thread(make_captioner, self.options), scorer_of(self.options)[0]
        own = partial(ImageTask, options=self.options, captioner=self.models[0], scorer=self.models[1])
        tasks = [own(work, keep=lambda *value: kept.append(value)) for work in works]
        outcomes = await asyncio.gather(*(task.run() for task in tasks), return_exceptions=True)
        kept += [*filter(None, outcomes), *works]


def on_ray(run: Run, images: Iterator[Work]) -> None:
    """Work through images on the cluster that ``RAY_ADDRESS`` names, or here; by default a worker for each node."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--engine ray: Ray is not installed: pip install '.[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    workers = max(1, sum(1 for node in ray.nodes() if node["Alive"]))

    def rows() -> Iterator[dict[str, bytes]]:
        for work in images:
            if work.todo():
                yield {"row": pickle.dumps(work)}
            else:
                run.tick(work)

    left = rows()
    while some := list(islice(left, _ROUND)):
        blocks = ray.data.from_items(some, override_num_blocks=-(-len(some) // _IMAGES))
        answers = blocks.map_batches(
            _Worker, fn_constructor_args=(run.options,), batch_size=_IMAGES, concurrency=workers, batch_format="numpy"
        )
        for each in (each for row in answers.iter_rows() for each in pickle.loads(row["kept"])):
            if isinstance(each, Exception):
                raise each
            if isinstance(each, Work):
                run.tick(each)
            else:
                run.keep(*each)
            if run.is_over():  # requests in flight on the cluster are dropped and repeated later
                return

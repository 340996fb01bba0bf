"""Count the files of this package that a typed box, a training record and an evaluation item go through.

    python benchmarks/path_lengths.py

The box goes from ``regiongpt ask --box`` to its embedding, with the model loaded before; the record is drawn from a
shard, encoded, batched and passed through the model as in a step of training; an item of ``coco_cls`` is read, asked,
scored and printed. Counted are the files of ``src/regiongpt`` in which a function is entered on the way, the calls,
and the files that are read.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from pictures import draw_pictures
from tiny_checkpoint import make_checkpoint

import regiongpt
from regiongpt import cli
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import RecordSet, Rejects, open_mixture, write_records
from regiongpt.evaluate.detection import CocoClassification
from regiongpt.evaluate.report import as_text
from regiongpt.inference import RegionPredictor, over_images
from regiongpt.inference.engine import Engine
from regiongpt.model import weights
from regiongpt.regions import Region
from regiongpt.train.dataset import DataCollator, RecordDataset, answer_loss
from regiongpt.train.loop import Loop
from regiongpt.train.recipe import EngineConfig, StageConfig

PACKAGE = Path(regiongpt.__file__).parent


class Path_:
    """What is entered between a call of one function and the return of another.

    Args:
        first: Code that begins the path.
        last: Code that ends it.
    """

    def __init__(self, first: Any, last: Any) -> None:
        self.first, self.last = first.__code__, last.__code__
        self.files: dict[str, int] = {}
        self.reads: list[str] = []
        self.open = self.done = False

    def run(self, work: Callable[[], object]) -> None:
        """Do the work and follow its first path."""
        sys.addaudithook(self._audit)
        sys.setprofile(self._profile)
        try:
            work()
        finally:
            sys.setprofile(None)
        self.open = False

    def _audit(self, event: str, given: tuple[Any, ...]) -> None:
        if self.open and event == "open":
            self.reads.append(str(given[0]))

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code is self.first and not self.done:
            self.open = True
        if self.open and event == "call":
            path = Path(code.co_filename)
            if path.suffix == ".py" and path.is_relative_to(PACKAGE) and not code.co_name.startswith("<"):
                name = str(path.relative_to(PACKAGE))
                self.files[name] = self.files.get(name, 0) + 1
        if self.open and event == "return" and code is self.last:
            self.open, self.done = False, True


def box_to_embedding(folder: Path) -> Path_:
    """From the words of ``regiongpt ask`` to the embedding of the box typed."""
    draw_pictures(folder, 1, "instances.json")
    predictor = RegionPredictor.from_pretrained(make_checkpoint(folder / "parts"), device="cpu")
    photo, box = str(folder / "images" / "1.png"), ["--box", "4,4,30,40"]
    # Once before, so that nothing is imported, and once to count. The image is encoded once.
    with (
        mock.patch.object(over_images, "load_predictor", return_value=predictor),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        cli.main(["ask", photo, "What is <region1>?", *box])
        found = Path_(cli.main, Engine.pool)
        found.run(lambda: cli.main(["ask", photo, "What is <region1>?", *box]))
    return found


def record_to_loss(folder: Path, packing: bool) -> Path_:
    """From the shard that a record is read from to its loss, in the training loop."""
    draw_pictures(folder, 2, "instances.json")
    cat = RecordRegion(region=Region.box(4, 4, 30, 40), category="cat")
    turn = Turn(task="caption", answer="a red cat", regions=(1,))
    made = [Record(id="1", source="s", image="1.png", width=96, height=64, regions=(cat,), turns=(turn,))]
    images = str(folder / "images")
    write_records(folder / "records", made, Rejects(), source="s", images=images, inputs=[], arguments={})
    model, processor = weights.load(make_checkpoint(folder / "parts"), dtype=torch.float32)
    dataset = RecordDataset(open_mixture(folder / "records"), processor, 1)
    stage = StageConfig(batch_size=1, micro_batch_size=1)
    found = Path_(RecordSet.__getitem__, answer_loss)
    engine = EngineConfig(packing=packing)
    found.run(
        lambda: Loop(
            "stage2", model, dataset, DataCollator(processor), answer_loss, stage, folder / "run", 0, engine=engine
        ).run()
    )
    return found


def item_to_table(folder: Path) -> Path_:
    """From the annotations that an item is read from to the table of results."""
    draw_pictures(folder, 1, "instances_dev.json")
    model = make_checkpoint(folder / "parts")
    words = ["coco_cls", "--data", str(folder), "--split", "dev", "--model", str(model), "--out", str(folder / "run")]
    found = Path_(CocoClassification.items, as_text)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        found.run(lambda: cli.main(["evaluate", *words]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the counts as JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    result = {}
    paths: dict[str, Callable[[Path], Path_]] = {
        "box to embedding": box_to_embedding,
        "record to loss": partial(record_to_loss, packing=False),
        "record to loss, packed": partial(record_to_loss, packing=True),
        "item to table": item_to_table,
    }
    for name, path in paths.items():
        with tempfile.TemporaryDirectory() as folder:
            found = path(Path(folder))
            reads = [Path(each).name for each in found.reads if each.startswith(folder)]
        result[name] = {"files": found.files, "calls": sum(found.files.values()), "reads": reads}
        print(f"{name}: {len(found.files)} files, {sum(found.files.values())} calls, reads {', '.join(reads)}")
        for file, calls in found.files.items():
            print(f"  {calls:5}  {file}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

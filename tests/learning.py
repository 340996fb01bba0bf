"""A tiny stage of training: drawn examples, their collate, and one call that trains on them.

Run as a script, it is one process of a real run: the tests start it by itself, or several of it with torchrun.
"""

import argparse
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import IMAGE, REGION, tiny_inputs, tiny_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from regiongpt.errors import DataError
from regiongpt.train.dataset import answer_loss
from regiongpt.train.loop import Loop
from regiongpt.train.packing import turn_numbers
from regiongpt.train.recipe import EngineConfig, StageConfig, WatchConfig

Example = dict[str, Any]


def example(item: int, config: Any, text_alone: bool = False, isolated: bool = False) -> Example:
    """A conversation of two turns: an image and up to three regions, or neither."""
    generator = torch.Generator().manual_seed(item)
    count = int(torch.randint(0, 4, (1,), generator=generator))
    rows = [] if text_alone else torch.randint(0, 3, (count,), generator=generator).tolist()
    made = {name: value[0] for name, value in tiny_inputs(config, rows, seed=item).items()}
    del made["attention_mask"]
    words = torch.randint(3, IMAGE, (6 + 3 * (item % 5),), generator=generator)
    ids = torch.cat([made["input_ids"], words])
    if text_alone:
        ids = ids[(ids != IMAGE) & (ids != REGION)]
        del made["pixel_values"]
    answered = torch.zeros_like(ids, dtype=torch.bool)
    answered[-2:] = answered[-5:-3] = True
    made |= {"input_ids": ids, "labels": torch.where(answered, ids, -100), "tasks": torch.where(answered, item % 2, -1)}
    if isolated:
        made["turns"] = turn_numbers(made, IMAGE)
    return made


class Examples(Dataset[Example]):
    """Examples by number: ``texts`` have no image, ``broken`` cannot be made, ``endless`` has infinite pixels."""

    def __init__(self, config: Any, items: int, texts: Any = (), broken: int = -1, endless: int = -1) -> None:
        self.config, self.items, self.texts, self.broken, self.endless = config, items, texts, broken, endless

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> Example:
        if item == self.broken:
            raise DataError(f"record {item}: expected sense, got none")
        made = example(item, self.config, item in self.texts)
        if item == self.endless:
            made["pixel_values"] = made["pixel_values"] * torch.inf
        return made

    def name_of(self, item: int) -> str:
        return f"record-{item}"


def collate(examples: list[Example]) -> dict[str, Any]:
    """Padded, as the processor pads."""

    def padded(name: str, fill: int) -> torch.Tensor:
        return pad_sequence([each[name] for each in examples], batch_first=True, padding_value=fill)

    ones = [torch.ones_like(each["input_ids"]) for each in examples]
    fills = {"input_ids": 0, "labels": -100, "tasks": -1}
    batch: dict[str, Any] = {name: padded(name, fill) for name, fill in fills.items() if name in examples[0]}
    batch["attention_mask"] = pad_sequence(ones, batch_first=True)
    if any(len(each["region_ids"]) for each in examples):
        batch["region_ids"] = padded("region_ids", -1)
        batch["region_weights"] = torch.stack([each["region_weights"] for each in examples])
    blank = next((torch.zeros_like(each["pixel_values"]) for each in examples if "pixel_values" in each), None)
    if blank is not None:
        batch["pixel_values"] = torch.stack([each.get("pixel_values", blank) for each in examples])
    return batch


def settings(**changed: Any) -> StageConfig:
    small = {"batch_size": 8, "micro_batch_size": 2, "lr": 1e-2, "log_steps": 1, "save_steps": 2}
    return StageConfig(**{**small, **changed})


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files take this many bytes, as where a disk has room for no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def learn(
    out: Path,
    *,
    items: int = 32,
    stage: StageConfig | None = None,
    engine: EngineConfig | None = None,
    watch: WatchConfig | None = None,
    name: str = "stage2",
    dev: int = 0,
    text_config: Any = None,
    **data: Any,
) -> tuple[Any, Loop]:
    """Trains a tiny model: the model and the trainer."""
    model = (tiny_model(text_config=text_config) if text_config else tiny_model()).train()
    model.language_model.requires_grad_(name == "stage2")
    given = (Examples(model.config, items, **data), collate, answer_loss, stage or settings(), out, 0)
    held = Examples(model.config, dev) if dev else None
    how: Any = {"engine": engine, "watch": watch, "dev": held}
    return model, Loop(name, model, *given, **how).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--sharding", default="ddp")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--texts", type=int, nargs="*", default=[])
    given = parser.parse_args()
    engine = EngineConfig(sharding=given.sharding, packing=given.packing)
    how: Any = {"stage": settings(save_steps=1), "engine": engine, "watch": WatchConfig(keep=3)}
    model, trainer = learn(given.out, items=given.items, texts=given.texts, **how)
    if trainer.processes.is_first:
        torch.save(model.state_dict(), given.out / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()

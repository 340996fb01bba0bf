"""How much arithmetic a step takes, and how fast the device could do it: their ratio is the utilisation."""

import re
import time
from dataclasses import dataclass
from typing import Any, Final

import torch

from regiongpt.model.modeling import RegionGPTForConditionalGeneration
from regiongpt.train.gpus import GPUS
from regiongpt.train.recipe import LoraConfig
from regiongpt.train.sizes import Costs, LayerCosts, language_costs, visual_costs
from regiongpt.train.watch_tally import StepSums

_SIDE: Final = {"cpu": 1024, "cuda": 8192, "mps": 4096}
_RUNS: Final = 3
_SECONDS: Final = 0.3
_NAMES: Final = {
    "a100-40gb": ("A100", "40GB"),
    "a100-80gb": ("A100", "80GB"),
    "h100-pcie": ("H100", "PCIe"),
    "h100-sxm": ("H100", "HBM3"),
    "h200": ("H200",),
    "b200": ("B200",),
    "l40s": ("L40S",),
    "l4": ("L4",),
    "a10": ("A10",),
    "a6000": ("RTX A6000",),
    "rtx3090": ("RTX 3090",),
    "rtx4090": ("RTX 4090",),
    "mi300x": ("MI300X",),
}
"""Words in the driver's name of each GPU."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Arithmetic of a stage's steps: what learning takes, without padding and without what is computed twice.

    Attributes:
        costs: Of an image, a token and a target. Regions are left out: one takes a thousandth of what its image takes.
    """

    costs: Costs

    @classmethod
    def of(cls, name: str, config: Any, *, cached: bool, lora: LoraConfig | None = None) -> "StageCost":
        """That of a stage.

        Args:
            name: ``language``, ``align``, ``stage1`` or ``stage2``.
            config: Of the model that is trained.
            cached: Whether the tower has been run beforehand.
            lora: The adapters, where they learn in place of the language model.
        """
        text = config if name == "language" else config.text_config
        visual: dict[str, float] = {}
        if name != "language":
            with torch.device("meta"):
                visual = visual_costs(RegionGPTForConditionalGeneration(config), with_tower=not cached)
        layers, head = LayerCosts(), 0.0
        if name != "align":
            layers, head = language_costs(text, name in ("language", "stage2"), lora if name == "stage2" else None)
        return cls(costs=Costs(**visual, layers=layers, head=head))

    def flops(self, step: StepSums) -> float:
        """Floating-point operations of a step, forward and backward, over all processes."""
        visual = step.images * (self.costs.tower + self.costs.image)
        rows = step.examples * self.costs.layers.row(step.tokens / step.examples) if step.examples else 0.0
        return visual + rows + step.targets * self.costs.head


def peak_flops(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations a second of one device: its maker's figure where it is known, else a product's rate.

    A device that is slower in bfloat16, as most CPUs are, is held to its float32.

    Args:
        device: Of the model.
        precision: In which it computes.
    """
    known = named_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else 0.0
    return known or max(matmul_rate(device, each) for each in {precision, torch.float32})


def named_peak(name: str, precision: torch.dtype) -> float:
    """The maker's figure for a GPU, 0 where it is not known.

    Args:
        name: As the driver has it.
        precision: ``torch.bfloat16``, or ``torch.float32``.
    """
    for key, parts in _NAMES.items():
        if all(re.search(rf"\b{part}\b", name) for part in parts):
            return GPUS[key].peak("bf16" if precision == torch.bfloat16 else "fp32")
    return 0.0


def matmul_rate(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, the best of a few measurements.

    Args:
        device: That multiplies.
        precision: Of the matrices.
    """
    side = _SIDE.get(device.type, 2048)
    left, right = (torch.ones(side, side, dtype=precision, device=device) for _ in range(2))
    best, until = 0.0, time.perf_counter() + _SECONDS
    for _ in range(_RUNS):
        if best and time.perf_counter() > until:  # a single product took all the time there is
            break
        _finish(device)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < _SECONDS / _RUNS:
            left @ right
            count += 1
            if count % 8 == 0:  # a GPU takes orders faster than it carries them out
                _finish(device)
        _finish(device)
        best = max(best, 2 * side**3 * count / (time.perf_counter() - began))
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

"""What GPUs can do, by their makers' data sheets: what `--plan` divides by."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        bf16: Peak of dense matrix products in bfloat16 that are summed in float32, in TFLOP/s.
        fp32: The same in float32, without TF32.
        memory: GiB.
        utilisation: Share of the peak that a well-run training reaches; assumed, not measured here.
    """

    bf16: float
    fp32: float
    memory: float
    utilisation: float = 0.4

    def peak(self, precision: str) -> float:
        """FLOP/s in ``bf16`` or ``fp32``."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


GPUS: Final[dict[str, Gpu]] = {
    "a100-40gb": Gpu(bf16=312, fp32=19.5, memory=40),
    "a100-80gb": Gpu(bf16=312, fp32=19.5, memory=80),
    "h100-pcie": Gpu(bf16=756, fp32=51, memory=80, utilisation=0.35),
    "h100-sxm": Gpu(bf16=989, fp32=67, memory=80, utilisation=0.35),
    "h200": Gpu(bf16=989, fp32=67, memory=141, utilisation=0.35),
    "b200": Gpu(bf16=2250, fp32=75, memory=180, utilisation=0.35),
    "l40s": Gpu(bf16=362, fp32=91.6, memory=48),
    "l4": Gpu(bf16=121, fp32=30.3, memory=24),
    "a10": Gpu(bf16=125, fp32=31.2, memory=24),
    "a6000": Gpu(bf16=155, fp32=38.7, memory=48),
    "rtx3090": Gpu(bf16=71, fp32=35.6, memory=24),
    "rtx4090": Gpu(bf16=165, fp32=82.6, memory=24),
    "mi300x": Gpu(bf16=1307, fp32=163.4, memory=192, utilisation=0.3),
    "laptop": Gpu(bf16=0.1, fp32=0.1, memory=16),
}
"""By the name that ``--gpu`` takes. ``laptop`` is no GPU: two cores of a CPU, for the small recipes."""

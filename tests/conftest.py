"""Makes the helpers of this folder, nano's recipe and the benchmarks importable from every test below it."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "recipes" / "nano"), str(ROOT / "benchmarks")]

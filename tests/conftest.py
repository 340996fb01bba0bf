"""Makes the helpers of this folder, and nano's recipe, importable from every test below it."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "recipes" / "nano")]

"""Train nano, from annotated images to a model that answers; run again after an interruption, it continues.

    python recipes/nano/train.py --data.root data/nano --out runs/nano

Every setting of nano.toml can be overridden by its dotted name, as in --stage2.lr 5e-4. The steps, each skipped when
its result is there:

1. language: a byte-level BPE and the small language model, on text in which blurred names stand for regions
2. features: every view of every image through the frozen tower, once
3. align: refinement and connector learn to write a region's class as the language model's own word
4. stage1: refinement and connector learn, the language model is frozen (paper §3.2, pre-training)
5. stage2: refinement, connector and language model learn (paper §3.2, fine-tuning)
6. polish: stage 2 a little longer, when sentences may name what it has learned to tell
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from recipe import RECIPE, NanoRecipe

from regiongpt.environment import progress_shown, quiet_libraries
from regiongpt.errors import RegionGPTError


def main(words: Sequence[str] | None = None) -> int:
    """The command line; mistakes are answered before torch is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(RECIPE), help="TOML file; nano.toml beside this script")
    parser.add_argument("--debug", action="store_true", help="run in seconds, tiny, on drawn pictures")
    parser.add_argument("--from-scratch", action="store_true", help="let stage 2 start without stage 1")
    options, overrides = parser.parse_known_args(words)
    try:
        recipe = NanoRecipe.load(options.recipe, [*overrides, *["--from_scratch=true"] * options.from_scratch])
        if not options.debug:
            recipe.check_files()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        quiet_libraries()
        from steps import debug_size, train

        with progress_shown():
            print(train(debug_size(recipe) if options.debug else recipe))
    except RegionGPTError as error:
        print(f"nano: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

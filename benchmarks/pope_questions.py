"""Questions by POPE's rules about the images of an instances file, for ``regiongpt evaluate pope``.

    python benchmarks/pope_questions.py --data data/nano --split dev --out runs/pope

Writes ``coco_pope_random.json``, ``coco_pope_popular.json`` and ``coco_pope_adversarial.json`` in POPE's own format.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from regiongpt.data.coco import InstancesFile
from regiongpt.data.shards import Rejects
from regiongpt.errors import DataError, RegionGPTError
from regiongpt.evaluate.pope import STRATEGIES
from regiongpt.prompts import indefinite

Asked = dict[str, int | str]


def build_questions(
    classes: Mapping[int, set[str]], names: Mapping[int, str], strategy: str, images: int = 500, pairs: int = 3,
    seed: int = 0,
) -> list[Asked]:  # fmt: skip
    """As many questions with the answer yes as with no, for images of more than ``pairs`` classes.

    For each of an image's ``pairs`` classes that are there, one that is not: by ``random`` any; by ``popular`` the one
    that most images of the set have; by ``adversarial`` the one that comes in most images together with the class that
    is there. No class is asked for twice in an image; where the strategy has none left, any other is drawn.

    Args:
        classes: Classes in each annotated image.
        names: File name of each image.
        strategy: How absent classes are chosen.
        images: Most images that are asked about, drawn by the seed.
        pairs: Questions of either answer for an image.
        seed: Random seed.
    """
    there = {number: sorted(those) for number, those in sorted(classes.items())}
    often = Counter(name for those in there.values() for name in those)
    together: dict[str, Counter[str]] = {name: Counter() for name in often}
    for those in there.values():
        for name in those:
            together[name].update(those)
    usable = [number for number, those in there.items() if len(those) > pairs and len(often) - len(those) >= pairs]
    if not usable:
        raise DataError(f"no image has more than {pairs} classes and lacks {pairs} others; give other annotations")
    drawn = np.random.default_rng((seed, 0)).permutation(len(usable))[:images]
    found: list[Asked] = []
    for number in sorted(usable[k] for k in drawn.tolist()):
        rng = np.random.default_rng((seed, 1, number))
        own = there[number]
        absent = sorted(often.keys() - own)
        for k in rng.permutation(len(own))[:pairs].tolist():
            counts = {"popular": often, "adversarial": together[own[k]]}.get(strategy, Counter[str]())
            ranked = sorted((name for name in absent if counts[name]), key=lambda name: (-counts[name], name))
            no = ranked[0] if ranked else absent[int(rng.integers(len(absent)))]
            absent.remove(no)
            for name, label in ((own[k], "yes"), (no, "no")):
                text = f"Is there {indefinite(name)} in the image?"
                found.append({"question_id": len(found) + 1, "image": names[number], "text": text, "label": label})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and instances_<split>.json")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--images", type=int, default=500, help="images to ask about (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the three files")
    options = parser.parse_args(argv)
    try:
        path = options.data / f"instances_{options.split}.json"
        # A crowd of people is people there.
        file = InstancesFile(path, Rejects(), folder=options.data / "images", crowds="keep")
        classes = {image.id: {file.names[each.category] for each in found} for image, found in file.by_image()}
        names = {image.id: image.path for image in file.images}
        options.out.mkdir(parents=True, exist_ok=True)
        for strategy in STRATEGIES:
            asked = build_questions(classes, names, strategy, images=options.images, seed=options.seed)
            lines = "".join(json.dumps(each) + "\n" for each in asked)
            (options.out / f"coco_pope_{strategy}.json").write_text(lines, encoding="utf-8")
            print(f"{strategy}: {len(asked)} questions")
    except RegionGPTError as error:
        print(f"pope_questions: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

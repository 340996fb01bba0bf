"""Ask the model of this package about regions of four photographs, and draw what was asked: `make demo`.

The photographs are licence-free ones that scikit-image carries; nothing is downloaded. The regions were drawn by hand:
boxes, polygons and a scribble.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from transformers.utils import logging

from regiongpt import Region, RegionGPTError, RegionPredictor
from regiongpt.annotate.captioners import Request
from regiongpt.annotate.captioners.checkpoint import region_question
from regiongpt.annotate.plan import context
from regiongpt.data.records import RecordRegion
from regiongpt.drawing import draw_regions, save_picture
from regiongpt.errors import DataError
from regiongpt.prompts import question


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A photograph, its regions, and what is asked of them; each region is also described in a phrase."""

    name: str
    regions: tuple[Region, ...]
    questions: tuple[str, ...]
    locate: str | None = None
    limits: str = ""


def name_it(number: int) -> str:
    """The closed-set question about one region."""
    return question("classify", 4, regions=[number])


CAT = [
    *([30, 70], [70, 0], [230, 0], [345, 25], [385, 0], [395, 0], [362, 60], [352, 130], [335, 190], [320, 235]),
    *([310, 262], [300, 300], [40, 300], [15, 215], [10, 140]),
]
CUP = Region.box(172, 16, 404, 308)
SPOON = Region.polygon([[327, 262], [380, 205], [402, 66], [424, 72], [390, 240], [405, 270], [372, 325], [332, 308]])
SCENES = (
    Scene(
        name="chelsea",
        regions=(Region.polygon(CAT),),
        questions=(question("describe", regions=[1]), "Is <region1> a cat?", question("presence", category="cat")),
    ),
    Scene(
        name="astronaut",
        regions=(Region.box(20, 15, 365, 512),),
        questions=("Is <region1> a person?", "How big is <region1>?", question("presence", category="person")),
    ),
    Scene(
        name="motorcycle_left",
        regions=(
            Region.box(95, 75, 685, 455),
            Region.box(50, 105, 290, 305),
            Region.scribble([[5, 190], [35, 200], [50, 165], [20, 150]], width=40),
        ),
        questions=("Is <region2> bigger than <region1>?", "Where is <region3>?", "Is <region1> a motorcycle?"),
        locate="the motorcycle",
    ),
    Scene(
        name="coffee",
        regions=(SPOON, CUP),
        questions=(name_it(1), "What colour is <region1>?", question("relation", regions=[1, 2])),
        locate="the cup",
        limits="LIMITS: [1] is a spoon; it is called a cup and taken for 'the cup', which is [2]. If asked, the model "
        "sees an umbrella and a chair beside the astronaut, and a person and a bicycle beside the motorcycle. Colours, "
        "numbers and relations are not known.",
    ),
)


def photograph(name: str) -> Path:
    """A file inside the installed scikit-image, found without importing it.

    Raises:
        DataError: scikit-image is not installed, or carries no such photograph.
    """
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise DataError("expected scikit-image, whose photographs are asked about; run: pip install '.[demo]'")
    path = Path(package.origin).parent / "data" / f"{name}.png"
    if not path.exists():
        raise DataError(f"expected the photograph {path}; this release of scikit-image lacks it, install another")
    return path


def sheet(pictures: Sequence[Image.Image], width: int = 1600) -> Image.Image:
    """Lay pictures out in two columns, each below the shorter one: captions of different length leave no holes."""
    gap = width // 80
    cell = (width - 3 * gap) // 2
    ends, places = [gap, gap], []
    for picture in pictures:
        column = ends.index(min(ends))
        scaled = picture.resize((cell, round(picture.height * cell / picture.width)), Image.Resampling.LANCZOS)
        places.append((scaled, (gap + column * (cell + gap), ends[column])))
        ends[column] += scaled.height + gap
    drawn = Image.new("RGB", (width, max(ends)), (228, 228, 228))
    for scaled, place in places:
        drawn.paste(scaled, place)
    return drawn


def caption_in_two_stages(predictor: RegionPredictor, scene: Scene) -> None:
    """What `regiongpt annotate` does: a caption of the image, then one of each region in its context."""
    path, regions = photograph(scene.name), [RecordRegion(region=scene.regions[0], category="cat")]
    predictor.set_image(path)
    whole = predictor.ask(question("image_caption")).text
    request = Request(stage="region", text="", lead=context(whole), regions=regions, number=0, category="cat")
    print(f"\nA caption in two stages, as `regiongpt annotate` writes them ({path.name})")
    print(f"  image:  {whole}\n  region: {predictor.ask(*region_question(request)).text}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, print and draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint folder (default: the model of this package)")
    parser.add_argument("--out", type=Path, default=Path("demo/demo.png"), help="picture to write")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    began = time.perf_counter()
    predictor = RegionPredictor.from_pretrained(options.model)
    pictures = []
    for scene in SCENES:
        path = photograph(scene.name)
        predictor.set_image(path)
        print(f"\n{path.name}")

        def ask(text: str, regions: Sequence[Region] = scene.regions) -> str:
            answer = predictor.ask(text, regions, detail="careful").text
            print(f"  Q: {text}\n  A: {answer}")
            return answer

        captions = [ask(question("caption", regions=[k])) for k in range(1, len(scene.regions) + 1)]
        dialogue = [(scene.limits, "")] if scene.limits else []
        dialogue += [(text, ask(text)) for text in scene.questions]
        if scene.locate:
            found = predictor.locate(scene.locate, scene.regions, detail="careful")
            asked, answer = f'Which one is "{scene.locate}"?', f"{found.text} ({found.probability:.0%} sure)"
            print(f"  Q: {asked}\n  A: {answer}")
            dialogue.append((asked, answer))
        pictures.append(draw_regions(path, scene.regions, captions, dialogue=dialogue))
    caption_in_two_stages(predictor, SCENES[0])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(sheet(pictures), options.out)
    print(f"\n{options.out}: the regions, outlined, numbered and captioned ({time.perf_counter() - began:.1f} s)")
    print("Now draw on an image of your own and ask: pip install '.[serve]' && regiongpt serve")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RegionGPTError as error:
        sys.exit(f"demo: error: {error}")

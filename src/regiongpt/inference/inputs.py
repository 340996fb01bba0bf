"""Regions as a person types them on the command line.

torch and transformers are not imported here, so that a mistake costs a fraction of a second.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from regiongpt.errors import DataError, RegionError
from regiongpt.storage import read_json

if TYPE_CHECKING:
    from regiongpt.regions import Region

REGION_OPTIONS = {
    "--box": ("X0,Y0,X1,Y1", "a box, in pixels from the image's top left corner"),
    "--mask": ("FILE", "an image of the photograph's size, not black (or not transparent) inside the region"),
    "--polygon": ("X,Y,X,Y,X,Y,...", "the corners of a polygon, at least three"),
    "--rle": ("FILE", "a JSON file with a COCO run-length mask: size [height, width] and counts"),
    "--point": ("X,Y", "a point: the small disk around it"),
    "--scribble": ("X,Y,X,Y,...", "a stroke through at least two points"),
}


class _AddRegion(argparse.Action):
    """Collects (option, text) of every kind of region in one list, for regions are numbered as they were typed."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.regions = [*namespace.regions, (option, values)]


def add_region_options(parser: argparse.ArgumentParser) -> None:
    """Give a verb the options for regions, which :func:`read_regions` reads."""
    group = parser.add_argument_group("regions", "any number of them; the first one typed is <region1>")
    for option, (metavar, text) in REGION_OPTIONS.items():
        group.add_argument(option, action=_AddRegion, dest="regions", metavar=metavar, help=text, default=[])


def bind_coordinates(arguments: Sequence[str]) -> list[str]:
    """Write ``--box -5,0,9,9`` as ``--box=-5,0,9,9``: argparse takes what begins with a dash for an option."""
    bound: list[str] = []
    for argument in arguments:
        negative = argument[:1] == "-" and (argument[1:2].isdigit() or argument[1:2] == "." or argument[1:4] == "inf")
        if bound and bound[-1] in REGION_OPTIONS and negative:
            bound[-1] += f"={argument}"
        else:
            bound.append(argument)
    return bound


def read_regions(typed: Sequence[tuple[str, str]], size: tuple[int, int]) -> "list[Region]":
    """The regions typed for an image, checked against its size (width, height) in pixels."""
    regions = []
    for number, (option, text) in enumerate(typed, 1):
        region = _read_region(option, text, number, size)
        regions.append(region.check(*size, f"<region{number}> ({option})"))
    return regions


def _read_region(option: str, text: str, number: int, size: tuple[int, int]) -> "Region":
    from regiongpt.regions import Region

    where = f"<region{number}> ({option})"
    if option == "--mask":
        return Region.mask(_read_mask(text, where, size))
    if option == "--rle":
        return Region.from_dict({"rle": read_json(text)}, where)
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        raise RegionError(f"{where}: expected numbers {REGION_OPTIONS[option][0]}, got {text!r}") from None
    return Region.from_dict({option.removeprefix("--"): values}, where)


def _read_mask(path: str, where: str, size: tuple[int, int]) -> Any:
    """The bool (H, W) mask in an image file, whose size is held against the photograph's before it is decoded."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    expected = f"{where}: expected an image of {size[0]}x{size[1]} pixels, the size of the photograph"
    try:
        with Image.open(path) as file:
            if file.size != size:
                raise RegionError(f"{expected}, got {file.width}x{file.height}: {path}")
            if "A" in file.getbands() or "transparency" in file.info:
                alpha = np.asarray(file.convert("RGBA"))[..., 3]
                if alpha.min() < 255:  # else the alpha channel says nothing, and the colours do
                    return alpha > 0
            pixels = np.asarray(file.convert("RGB") if "A" in file.getbands() else file)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image that can be read"
        raise DataError(f"{expected}, got {path}: {reason}") from None
    return pixels.any(axis=-1) if pixels.ndim == 3 else pixels != 0

"""Regions as a person types them on the command line.

torch and transformers are not imported here, so that a mistake costs a fraction of a second.
"""

import argparse
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from regiongpt.console import tell
from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.storage import read_json, reason

if TYPE_CHECKING:
    from regiongpt.regions import Region

REGION_OPTIONS = {
    "--box": ("X0,Y0,X1,Y1", "a box, in pixels from the image's top left corner"),
    "--mask": ("FILE", "an image of the same size, white (or opaque) inside the region"),
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
    normalized = "coordinates are fractions of the image's width and height, 0 to 1, not pixels"
    group.add_argument("--normalized", action="store_true", help=normalized)
    group.add_argument("--xywh", action="store_true", help="--box is left, top, width, height")


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


def read_regions(options: argparse.Namespace, size: tuple[int, int]) -> "list[Region]":
    """The regions typed for an image, checked against its size (width, height) in pixels."""
    typed = {option for option, _ in options.regions}
    if options.normalized and not typed - {"--mask", "--rle"}:
        raise ConfigError("--normalized goes with --box, --polygon, --point or --scribble, got none of them")
    if options.xywh and "--box" not in typed:
        raise ConfigError("--xywh goes with --box, got none")
    regions = []
    for number, (option, text) in enumerate(options.regions, 1):
        where = f"<region{number}> ({option})"
        if option == "--mask":
            region = _read_mask(text, where, size)
        else:
            region = _read_region(option, text, where, size, options)
        if region.note:
            tell(f"regiongpt: warning: {where}: {region.note}")
            region = type(region).from_dict(region.to_dict())  # without the note, which is said once
        regions.append(region.check(*size, where))
    return regions


def _read_region(option: str, text: str, where: str, size: tuple[int, int], options: argparse.Namespace) -> "Region":
    from regiongpt.regions import Region

    if option == "--rle":
        return Region.from_dict({"rle": read_json(text, RegionError)}, where)
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        raise RegionError(f"{where}: expected numbers {REGION_OPTIONS[option][0]}, got {text!r}") from None
    if option == "--box" and options.xywh and len(values) == 4:
        if min(values[2:]) <= 0:
            raise RegionError(f"{where}: expected left, top, width, height with the last two above 0, got {text}")
        values[2:] = [values[0] + values[2], values[1] + values[3]]
    if not options.normalized:
        return Region.from_dict({option.removeprefix("--"): values}, where)
    if not all(-1 <= value <= 2 for value in values):
        raise RegionError(f"{where}: expected normalized numbers within 0..1, got {text}")
    values = [value * size[index % 2] for index, value in enumerate(values)]
    certain = {"normalized": False} if option == "--box" else {}
    return Region.from_dict({option.removeprefix("--"): values, **certain}, where)


def _read_mask(path: str, where: str, size: tuple[int, int]) -> "Region":
    """The mask in an image file, whose size is compared with the image's before it is decoded."""
    from PIL import Image, ImageOps

    from regiongpt.regions import Region

    expected = f"{where}: expected an image of {size[0]}x{size[1]} pixels, the size of the image asked about"
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            if sorted(file.size) != sorted(size):
                raise RegionError(f"{expected}, got {file.width}x{file.height}: {path}")
            return Region.mask(ImageOps.exif_transpose(file))
    except RegionError as error:
        raise RegionError(str(error).replace("region:", f"{where}: {path}:", 1)) from None
    except Exception as error:  # decoders raise nearly every built-in exception on broken data
        raise DataError(f"{expected}, got {path}, not an image that can be read: {reason(error)}") from None

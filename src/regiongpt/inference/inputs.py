"""Regions as a person types them on the command line.

torch and transformers are not imported here, so that a mistake costs a fraction of a second.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from regiongpt.console import tell
from regiongpt.errors import ConfigError, DataError, RegionError
from regiongpt.storage import read_json

if TYPE_CHECKING:
    from regiongpt.regions import Region

REGION_OPTIONS = {
    "--box": ("X0,Y0,X1,Y1", "a box, in pixels from the image's top left corner"),
    "--xywh": ("X,Y,W,H", "a box by its left and top edge, width and height"),
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
    """Add the options for regions, whose values :func:`read_regions` reads."""
    group = parser.add_argument_group("regions", "any number of them; the first one typed is <region1>")
    for option, (metavar, text) in REGION_OPTIONS.items():
        group.add_argument(option, action=_AddRegion, dest="regions", metavar=metavar, help=text, default=[])
    group.add_argument("--normalized", action="store_true", help="--box and --xywh in fractions of the image's sides")


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


def read_regions(typed: Sequence[tuple[str, str]], normalized: bool = False) -> "list[tuple[str, Region]]":
    """The regions that were typed, each behind what messages call it; not yet checked against an image.

    Args:
        typed: what :func:`add_region_options` collects.
        normalized: boxes are fractions of the image's width and height.

    Raises:
        RegionError: one is malformed.
        DataError: a file cannot be read.
    """
    from regiongpt.images import open_image
    from regiongpt.regions import Region

    if normalized and not {option for option, _ in typed} & {"--box", "--xywh"}:
        raise ConfigError("--normalized goes with --box and --xywh, got neither; give pixels without it")
    regions: list[tuple[str, Region]] = []
    for number, (option, text) in enumerate(typed, 1):
        where = f"<region{number}> ({option})"
        try:
            if option == "--mask":
                region = Region.mask(open_image(text)[1])
            elif option == "--rle":
                region = Region.rle(read_json(text))
            else:
                values = [float(value) for value in text.split(",")]
                if option in ("--box", "--xywh"):
                    make = Region.box if option == "--box" else Region.from_xywh
                    x, y, right, bottom = values  # or width and height; another count is a ValueError
                    region = make(x, y, right, bottom, normalized=normalized or None)
                elif normalized:
                    raise RegionError(f": --normalized goes with --box and --xywh; give {option} in pixels")
                else:
                    region = Region.from_dict({option.removeprefix("--"): values}, where)
        except ValueError:
            raise RegionError(f"{where}: expected numbers {REGION_OPTIONS[option][0]}, got {text!r}") from None
        except RegionError as error:
            raise RegionError(f"{where}{str(error).removeprefix('region').removeprefix(where)}") from None
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if region.note:  # said here, once, and in no answer again
            tell(f"regiongpt: warning: {where}: {region.note}")
            region = replace(cast(Any, region), note="")
        regions.append((where, region))
    return regions

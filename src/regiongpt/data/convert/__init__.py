"""Converters: one file a data set, each of which reads a public source and yields records."""

from importlib import import_module
from typing import Final

from regiongpt.data.convert.base import Converter
from regiongpt.errors import ConfigError

CONVERTERS: Final[dict[str, str]] = {
    "coco": "regiongpt.data.convert.coco:CocoConverter",
    "lvis": "regiongpt.data.convert.lvis:LvisConverter",
    "v3det": "regiongpt.data.convert.v3det:V3DetConverter",
    "vg": "regiongpt.data.convert.visual_genome:VisualGenomeConverter",
    "refcoco": "regiongpt.data.convert.refcoco:RefCocoConverter",
    "llava": "regiongpt.data.convert.llava:LlavaConverter",
    "region_captions": "regiongpt.data.convert.region_captions:RegionCaptionsConverter",
    "jsonl": "regiongpt.data.convert.jsonl:JsonlConverter",
}
"""Each converter's name with its module and class, imported when it is asked for."""


def load_converter(name: str) -> type[Converter]:
    """The converter class of a name.

    Raises:
        ConfigError: There is no converter of that name.
    """
    if name not in CONVERTERS:
        raise ConfigError(f"expected a source among {', '.join(CONVERTERS)}, got {name!r}")
    module, _, attribute = CONVERTERS[name].partition(":")
    found: type[Converter] = getattr(import_module(module), attribute)
    return found

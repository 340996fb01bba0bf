"""This project's own region captions: detailed descriptions of regions, as the caption engine writes them.

Paper: §3.3
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from regiongpt.data.convert.base import Converter
from regiongpt.data.convert.images import check_image
from regiongpt.data.convert.jsonl import iter_lines, noting_line
from regiongpt.data.convert.values import MALFORMED, image_name, plain_text, short, sides, words_alone
from regiongpt.data.records import Record, RecordRegion, Turn
from regiongpt.data.shards import Fault, Rejects
from regiongpt.regions import Region


class RegionCaptionsConverter(Converter):
    """One record a line, each line one described region as a json object.

    ``id``: text or a whole number, unique in the file.
    ``image``: path below the images' folder, with forward slashes.
    ``width``, ``height``: of the image in pixels.
    ``region``: in the form of :meth:`regiongpt.Region.to_dict`, in pixels of the image: ``{"box": [10, 20, 60, 80]}``.
    ``category``: the name of the region's class, ``""`` or missing where it has none.
    ``caption``: the description.

    Further keys, such as those of a caption engine's scores, are not looked at.
    """

    name: ClassVar[str] = "region_captions"
    summary: ClassVar[str] = "this project's own detailed descriptions of regions"
    sound_regions: ClassVar[bool] = True

    data: Path
    """The file of json lines."""
    check_images: bool = True
    """Leave out images that are missing or of another size."""

    def inputs(self) -> list[Path]:
        """The one file."""
        return [self.data]

    def records(self, rejects: Rejects) -> Iterator[Record]:
        """One record a line, in the order of the file."""
        seen: set[str] = set()
        for number, entry in iter_lines(self.data, rejects):
            with noting_line(self.data, number, rejects):
                found = self._record(entry)
                if found.id in seen:
                    raise Fault("duplicate id", f"expected each id once, got {short(entry['id'])} again")
                seen.add(found.id)
                yield found

    def _record(self, entry: Mapping[str, Any]) -> Record:
        own, category = entry.get("id"), entry.get("category")
        if not isinstance(own, str | int) or own == "":
            raise Fault(MALFORMED, f"expected an id, got {short(own)}")
        width, height = sides(entry)
        if not isinstance(category, str | None):
            raise Fault(MALFORMED, f"expected category as text, got {short(category)}")
        caption, name = plain_text(entry.get("caption"), "caption"), image_name(entry.get("image"))
        region = Region.from_dict(entry.get("region") or {}).check(width, height)
        if self.check_images:
            check_image(self.images / name, width, height)
        return Record(
            id=f"{self.name}/{own}",
            source=self.name,
            image=name,
            width=width,
            height=height,
            regions=(RecordRegion(region=region, category=words_alone(category or "")),),
            turns=(Turn(task="describe", answer=caption, regions=(1,)),),
        )
